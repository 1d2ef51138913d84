"""Trans-Encoder against the authors' libraries (goldens), closed forms, transformers' tokenizers, and files in the published layouts."""

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.backbones.bert import Bert, BertConfig, BertEncoder, CrossEncoder
from common.errors import UserError
from common.layers import init_by_fan_in
from papers.trans_encoder import eval as evaluation
from papers.trans_encoder import model as te
from papers.trans_encoder import train as training
from papers.trans_encoder.model import Family, Pairs, SimCSE, caption_pairs, encode, rows, scored, spearman, trans_encoder
from tests.goldens import Case, cases

CASES = pytest.mark.parametrize("case", cases("trans_encoder"), ids=lambda c: c.name)
KINDS = pytest.mark.parametrize("kind", ["bert", "roberta"])


def close(case: Case, actual: torch.Tensor, name: str, kind: str = "f32") -> None:
    torch.testing.assert_close(actual, case.tensors[name].to(actual.dtype), rtol=0, atol=case.meta["tolerance"][kind])


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


def golden_config(case: Case, kind: str) -> BertConfig:
    c = case.meta["config"]
    sizes = [c[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")]
    pad = c["roberta_pad_id"] if kind == "roberta" else 0
    options = {"type_vocab_size": c[f"{kind}_type_vocab"], "layer_norm_eps": c[f"{kind}_layer_norm_eps"], "pad_token_id": pad}
    return BertConfig(*sizes, c["max_position_embeddings"], **options, id2label=dict.fromkeys(range(c["num_labels_cross"])), model_type=kind)


@CASES
@KINDS
@torch.no_grad()
def test_backbones(case, kind):
    t, model = case.tensors, Bert(golden_config(case, kind)).eval()
    model.load_state_dict(case.state(f"{kind}/param/"))
    ids = t["input_ids" if kind == "bert" else "roberta_input_ids"]
    close(case, model(ids, t["attention_mask"]), f"{kind}/last_hidden_state")
    for pooling in ("cls", "mean"):
        if f"{kind}/emb_{pooling}" in t:
            close(case, model.embed(ids, t["attention_mask"], pooling), f"{kind}/emb_{pooling}")


@CASES
@KINDS
@torch.no_grad()
def test_cross_encoders(case, kind):
    t, model = case.tensors, CrossEncoder(golden_config(case, kind)).eval()
    model.load_state_dict(case.state(f"{kind}_cross/param/"))
    ids, types = (t["input_ids"], t["token_type_ids"]) if kind == "bert" else (t["roberta_input_ids"], torch.zeros_like(t["roberta_input_ids"]))
    close(case, te.logits(model, (ids, t["attention_mask"], types))[:, None], f"{kind}_cross/logits")


@CASES
def test_losses_and_labels(case):
    t = case.tensors
    e1, z = t["loss/e1"].clone().requires_grad_(), t["loss/cross_logits"].clone().requires_grad_()
    x = F.cosine_similarity(e1, t["loss/e2"])
    close(case, x.detach(), "loss/cosine_pseudo_label")
    loss = te.squared_error(x, t["loss/silver"])
    close(case, loss.detach()[None], "loss/bi_mse")
    loss.backward()
    close(case, e1.grad, "loss/grad_e1")
    loss = te.cross_entropy(z, t["loss/cosine_pseudo_label"])
    close(case, loss.detach()[None], "loss/cross_bce")
    loss.backward()
    close(case, z.grad, "loss/grad_logits")
    close(case, z.detach().sigmoid(), "loss/cross_pseudo_label")


@CASES
def test_evaluators(case):
    t = case.tensors
    gold, cosines = t["eval/gold"], [F.cosine_similarity(t[f"{a}"], t[f"{b}"]) for a, b in (("loss/e1", "loss/e2"), ("eval/e3", "eval/e4"))]
    points = lambda value: torch.tensor([value / 100], dtype=torch.float64)
    for name in ("eval/bi_score", "eval/bi_cosine_only"):
        close(case, points(spearman(cosines[0], gold)), name, "scores")
    close(case, points(spearman(sum(cosines) / 2, gold)), "eval/bi_ensemble_cosine_only", "scores")
    both = [(t["loss/e1"], t["loss/e2"]), (t["eval/e3"], t["eval/e4"])]
    close(case, points(evaluation.best_of_similarities(both, gold)), "eval/bi_ensemble_score", "scores")


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_cross_encoder_is_the_error_of_its_score():
    z, y = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.linspace(-0.5, 1, 7, dtype=torch.float64)
    te.cross_entropy(z, y).backward()
    torch.testing.assert_close(z.grad, (z.detach().sigmoid() - y) / 7)
    inside = y.clamp(0, 1)
    torch.testing.assert_close(te.cross_entropy(z, inside), F.binary_cross_entropy_with_logits(z, inside))


def test_swapped_losses():
    z, x, y = torch.randn(6, dtype=torch.float64), torch.linspace(-0.9, 0.9, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(te.swapped_cross(z, y), ((z.sigmoid() - y) ** 2).mean())
    torch.testing.assert_close(te.swapped_bi(x, y), F.binary_cross_entropy((1 + x) / 2, y))
    ends = torch.tensor([-1.0, 1.0], requires_grad=True)
    te.swapped_bi(ends, torch.tensor([0.5, 0.5])).backward()
    assert ends.grad.isfinite().all()


def test_contrastive_by_loops():
    u, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())
    expected = 0.0
    for i in range(4):
        scores = torch.tensor([cosine(u[i], v[j]) / 0.05 for j in range(4)], dtype=torch.float64)
        expected -= (scores[i] - scores.logsumexp(0)).item() / 4
    assert te.contrastive(u, v).item() == pytest.approx(expected)


def test_spearman_counts_ties_by_their_mean_rank():
    scores, gold = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2]), torch.tensor([0.0, 1.0, 0.5, 0.5, 0.5])
    rank = lambda x: torch.tensor([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x], dtype=torch.float64)
    a, b = (rank(x) - 3 for x in (scores, gold))
    assert spearman(scores, gold) == pytest.approx(100 * (a @ b / a.norm() / b.norm()).item())
    assert spearman(scores.exp(), gold) == pytest.approx(spearman(scores, gold))


# ---- tokens -----------------------------------------------------------------------------------------------------------------------------


def tokens_of(words, tokens) -> list[list[str]]:
    return [
        [words.id_to_token(i) for i, real in zip(*pair, strict=True) if real] for pair in zip(tokens[0].tolist(), tokens[1].tolist(), strict=True)
    ]


@KINDS
def test_pairs_as_the_families_read_them(kind):
    words = training.tokenizer(kind)
    tokens = encode(words, [" big red circle ", "tiny"], ["blue ring", "small green box on teal"])
    sep = ["[SEP]"] if kind == "bert" else ["[SEP]", "[SEP]"]
    assert tokens_of(words, tokens)[0] == ["[CLS]", "big", "red", "circle", *sep, "blue", "ring", "[SEP]"]
    assert tokens[2][0].tolist()[: 5 + len(sep) + 2] == ([0] * 5 + [1] * 3 if kind == "bert" else [0] * 9)
    alone = encode(words, ["big red circle", "tiny"])
    assert tokens_of(words, alone) == [["[CLS]", "big", "red", "circle", "[SEP]"], ["[CLS]", "tiny", "[SEP]"]]
    assert not alone[2].any() and alone[1].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert [t.shape[1] for t in rows(alone, torch.tensor([1]))] == [3, 3, 3]


def test_the_longer_sentence_is_cut_first():
    words = training.tokenizer("bert")
    a, b = "big red circle left blue ring on teal", "tiny green"
    cut = tokens_of(words, encode(words, [a], [b], 8))[0]
    assert cut == ["[CLS]", "big", "red", "circle", "[SEP]", "tiny", "green", "[SEP]"]
    assert len(tokens_of(words, encode(words, [a], length=5))[0]) == 5


def test_examples_come_in_both_orders_with_one_label():
    words, pairs = training.tokenizer("bert"), caption_pairs(5, 1)
    cross, bi = te.cross_examples(words, pairs, pairs.gold), te.bi_examples(words, pairs, pairs.gold)
    assert len(cross) == 10 and len(bi) == 5 and len(te.cross_examples(words, pairs, pairs.gold, both_orders=False)) == 5
    (((there,), back),) = [cross.batch(torch.tensor([2, 7]))]
    first, second = tokens_of(words, there)
    cut = first.index("[SEP]")
    assert second == ["[CLS]", *first[cut + 1 :], *first[1:cut], "[SEP]"] and back[0] == back[1] == pairs.gold[2]
    (a, b), y = bi.batch(torch.tensor([3]))
    assert tokens_of(words, a)[0][1:-1] == pairs.a[3].split() and tokens_of(words, b)[0][1:-1] == pairs.b[3].split() and y == pairs.gold[3]


# ---- the cycles -------------------------------------------------------------------------------------------------------------------------


def family(kind: str, seed: int = 0) -> Family:
    torch.manual_seed(seed)
    plm, simcse = (init_by_fan_in(cls(training.config(kind))).eval() for cls in (Bert, BertEncoder))
    return Family(training.tokenizer(kind), plm, simcse, seed)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recorder(seen: list):
    """In the place of training: note what is given, and disturb every weight."""

    def train(kind, cycle, i, model, examples):
        seen.append((kind, cycle, i, weights(model), examples))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model.eval()

    return train


@KINDS
def test_every_student_starts_fresh(kind):
    seen, starts, pairs = [], family(kind), caption_pairs(6, 1)
    for _ in trans_encoder([starts], pairs, 3, recorder(seen)):
        pass
    assert [(k, c) for k, c, *_ in seen] == [(k, c) for c in (1, 2, 3) for k in ("cross", "bi")]
    crosses, bis = ([state for k, _, _, state, _ in seen if k == kind] for kind in ("cross", "bi"))
    assert all(same(state, crosses[0]) for state in crosses) and all(same(state, weights(starts.simcse)) for state in bis)
    body = {name.removeprefix(f"{kind}."): tensor for name, tensor in crosses[0].items() if name.startswith(kind)}
    assert all(torch.equal(tensor, starts.plm.state_dict()[name]) for name, tensor in body.items())
    assert ("pooler.dense.weight" in body) == (kind == "bert")


def test_a_continued_student_starts_from_its_teacher():
    seen, starts = [], family("bert")
    found = list(trans_encoder([starts], caption_pairs(6, 1), 2, recorder(seen), fresh=False))
    inside = lambda state: {name.removeprefix("bert."): t for name, t in state.items() if name.startswith("bert.") and "pooler" not in name}
    given = [state for *_, state, _ in seen]
    assert same(inside(given[0]), weights(starts.simcse))
    assert same(given[1], inside(weights(found[0][0][0]))) and same(inside(given[2]), weights(found[0][1][0]))


@pytest.mark.parametrize("kinds", [("bert",), ("bert", "roberta")], ids=["self", "mutual"])
@pytest.mark.parametrize("clamp", [False, True])
def test_labels_are_the_means_of_the_teachers_and_carry_no_gradient(kinds, clamp):
    seen, families, pairs = [], [family(kind, seed) for seed, kind in enumerate(kinds)], caption_pairs(6, 1)
    list(trans_encoder(families, pairs, 1, recorder(seen), clamp=clamp))
    crosses, bis = ([examples for k, *_, examples in seen if k == kind] for kind in ("cross", "bi"))
    expected = []
    for starts in families:
        tokens = [[starts.simcse.embed(*encode(starts.tokenizer, [text])[:2])[0] for text in side] for side in (pairs.a, pairs.b)]
        expected.append(torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in zip(*tokens, strict=True)]))
    expected = torch.stack(expected).mean(0)
    expected = expected.clamp(0, 1) if clamp else expected
    for examples in crosses:
        torch.testing.assert_close(examples.y, torch.cat([expected, expected]), rtol=0, atol=1e-5)
        assert not examples.y.requires_grad
    assert all(torch.equal(examples.y, bis[0].y) for examples in bis) and len(bis[0]) == 6
    assert not bis[0].y.requires_grad and (bis[0].y > 0).all() and (bis[0].y < 1).all()


def test_scores_are_of_eval_mode_and_leave_the_model_as_it_was():
    starts, pairs = family("bert"), caption_pairs(9, 2)
    for model in (starts.bi(), starts.cross()):
        quiet, noisy = scored(model.eval(), starts.tokenizer, pairs), scored(model.train(), starts.tokenizer, pairs, size=4)
        assert model.training
        torch.testing.assert_close(noisy, quiet)


def test_both_orders_teach_symmetry():
    """After arbitrary labels of (a, b), σ(z) of (b, a) is another number; after labels of both orders it is nearly the same."""
    starts, pairs, gaps = family("bert"), caption_pairs(12, 3), {}
    turned, y = Pairs(pairs.b, pairs.a, pairs.gold), torch.randint(2, (12,)).float()
    for both in (False, True):
        model, examples = starts.cross().eval(), te.cross_examples(starts.tokenizer, pairs, y, both)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(60):
            (ab,), label = examples.batch(torch.arange(len(examples)))
            te.cross_entropy(te.logits(model, ab), label).backward()
            optimizer.step()
            optimizer.zero_grad()
        gaps[both] = (scored(model, starts.tokenizer, pairs) - scored(model, starts.tokenizer, turned)).abs().mean().item()
    assert gaps[True] < 0.1 < gaps[False]


def test_simcse_needs_dropout_and_pulls_two_passes_together():
    starts = family("bert")
    model, sentences = SimCSE(starts.bi()).train(), encode(starts.tokenizer, caption_pairs(16, 4).a)
    before, optimizer = model.loss(sentences).item(), torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        model.loss(sentences).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(sentences).item() < before
    assert torch.equal(*(model.eval().encoder.embed(*sentences[:2]) for _ in range(2)))


def test_masked_words_are_words_and_all_are_told(monkeypatch):
    monkeypatch.setattr(te, "MASKED", 1.0)
    model, tokens = training.plm("bert"), encode(training.tokenizer("bert"), ["big red circle", "tiny"])
    given, states = [], torch.randn(2, tokens[0].shape[1], 64)
    monkeypatch.setattr(model.bert, "forward", lambda ids, mask, types: given.append(ids) or states)
    loss, special = te.masked_words(model, tokens).item(), tokens[0] < 4
    assert torch.equal(given[0][special], tokens[0][special]) and (given[0][~special] >= 3).all()
    assert loss == pytest.approx(F.cross_entropy(model.words(states)[~special], tokens[0][~special]).item(), rel=1e-5)


# ---- captions ---------------------------------------------------------------------------------------------------------------------------

SCENE = (("big", "red", "circle"), ("small", "blue", "ring"), "left", "teal")


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (SCENE, 8),
        ((SCENE[1], SCENE[0], "right", "teal"), 8),  # the same, told from the other thing
        ((SCENE[0], SCENE[1], "right", "teal"), 7),
        ((("big", "blue", "circle"), ("small", "red", "ring"), "left", "teal"), 6),
        ((("big", "red", "square"), SCENE[1], "left", "teal"), 4),
        ((("small", "red", "circle"), SCENE[1], "above", "white"), 5),
    ],
)
def test_facts_in_common(other, shared):
    assert len(te.facts(SCENE)) == 8 and len(te.facts(SCENE) & te.facts(other)) == shared


def read(text: str) -> tuple:
    """A scene from its caption, by position, the first thing in the order of names."""
    meaning = {synonym: word for word, synonyms in te.SYNONYMS.items() for synonym in synonyms}
    words = [meaning.get(word, word) for word in text.split()]
    ground = words.pop(words.index("on") + 1)
    words.remove("on")
    relation = next(i for i, word in enumerate(words) if word in te.OPPOSITE)
    things = [tuple(sorted(words[i : i + 3])) for i in ((0, 4) if relation == 3 else (4, 1))]
    named = words[relation]
    if things[0] > things[1]:
        things, named = things[::-1], te.OPPOSITE[named]
    return *things, named, ground


def test_captions_say_what_the_gold_says():
    rng = random.Random(0)
    for _ in range(200):
        scene = te.sample_scene(rng)
        texts = [te.caption(scene, rng) for _ in range(4)]
        assert len({read(text) for text in texts}) == 1 and all(set(text.split()) <= set(te.WORDS) for text in texts)
        changed = te.edit(scene, rng)
        assert (read(te.caption(changed, rng)) == read(texts[0])) == (te.facts(changed) == te.facts(scene))
        assert changed[0][2] != changed[1][2]


def test_trading_colours_leaves_the_words():
    plain = lambda scene: Counter([*scene[0], *scene[1], scene[3]])
    rng, kinds = random.Random(1), set()
    for _ in range(300):
        scene = te.sample_scene(rng)
        changed = te.edit(scene, rng)
        if te.facts(changed) != te.facts(scene) and plain(changed) == plain(scene):
            kinds.add(len(te.facts(changed) & te.facts(scene)))
    assert kinds >= {6, 7}


def test_caption_pairs_do_not_depend_on_their_number():
    few, many = caption_pairs(5, 1), caption_pairs(40, 1)
    assert few.a == many.a[:5] and few.b == many.b[:5] and torch.equal(few.gold, many.gold[:5])
    assert few.a != caption_pairs(5, 2).a and (caption_pairs(5, 1, 0).gold == 1).all()
    assert not set(zip(many.a, many.b, strict=True)) & set(zip(caption_pairs(40, training.TEST).a, caption_pairs(40, training.TEST).b, strict=True))
    assert set(many.gold.mul(8).tolist()) <= set(range(9)) and many.gold.min() < 0.5 < many.gold.max() == 1


# ---- published models -------------------------------------------------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "sat", "on", "the", "mat", ".", "Cat", *"0123456789?", "test"]
TEXTS = ["A cats sat.", "the mat", "a cat", "the cat sat on the mat on the mat on the mat ."]


def write_wordpiece(folder: Path, lower: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))


def write_bpe(folder: Path) -> None:
    from tokenizers import pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "at", "Ġt", "he", "Ġthe", "Ġm", "Ġmat"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t\nĠ t\nh e\nĠt he\nĠ m\nĠm at\n")


def test_wordpiece_by_hand(tmp_path):
    write_wordpiece(tmp_path)
    words = training.load_tokenizer(tmp_path)
    ids, mask, types = encode(words, ["A cats sat.", "a"], ["the zoo", "mat"])
    assert tokens_of(words, (ids, mask))[0] == ["[CLS]", "a", "cat", "##s", "sat", ".", "[SEP]", "the", "[UNK]", "[SEP]"]
    assert types[0].tolist() == [0] * 7 + [1] * 3 and ids[1, -1] == 0
    write_wordpiece(tmp_path, lower=False)
    words = training.load_tokenizer(tmp_path)
    assert tokens_of(words, encode(words, ["Cat"]))[0] == ["[CLS]", "Cat", "[SEP]"]


def test_bpe_by_hand(tmp_path):
    write_bpe(tmp_path)
    words = training.load_tokenizer(tmp_path)
    ids, mask, types = encode(words, ["at the mat", "t"], ["the", "h"])
    assert tokens_of(words, (ids, mask))[0] == ["<s>", "at", "Ġthe", "Ġmat", "</s>", "</s>", "t", "he", "</s>"]
    assert not types.any() and ids[1, -1] == 1 and mask[1, -1] == 0


@KINDS
def test_tokenizers_agree_with_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    {"bert": write_wordpiece, "roberta": write_bpe}[kind](tmp_path)
    cls = transformers.BertTokenizer if kind == "bert" else transformers.RobertaTokenizer
    theirs = cls.from_pretrained(tmp_path)
    words, seconds = training.load_tokenizer(tmp_path), TEXTS[::-1]
    for pair in (None, seconds):
        expected = theirs(TEXTS, pair, padding=True, truncation=True, max_length=14)
        ids, mask, _ = encode(words, TEXTS, pair, 14)
        assert ids.tolist() == expected["input_ids"] and mask.tolist() == expected["attention_mask"]
    theirs.save_pretrained(tmp_path / "fast")
    if (tmp_path / "fast/tokenizer.json").is_file():
        assert torch.equal(encode(training.load_tokenizer(tmp_path / "fast"), TEXTS, seconds)[0], encode(words, TEXTS, seconds)[0])


def write_model(folder: Path, kind: str, cross: bool, suffix: str) -> torch.nn.Module:
    """A small model with its tokenizer, as the hub has them."""
    {"bert": write_wordpiece, "roberta": write_bpe}[kind](folder)
    options = {"model_type": kind, "pad_token_id": int(kind == "roberta"), "type_vocab_size": 2 - (kind == "roberta"), "id2label": {"0": "LABEL_0"}}
    model = init_by_fan_in((CrossEncoder if cross else Bert)(BertConfig(300, 8, 1, 2, 12, 40, **options))).eval()
    model.save_pretrained(folder)
    head = "ForSequenceClassification" if cross else "Model"
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [kind.capitalize() + head]}
    (folder / "config.json").write_text(json.dumps(config))
    if suffix == "bin":
        torch.save(
            model.state_dict() | {f"{'' if not cross else kind + '.'}embeddings.position_ids": torch.arange(40)[None]}, folder / "pytorch_model.bin"
        )
        (folder / "model.safetensors").unlink()
    return model


@KINDS
@pytest.mark.parametrize("cross", [False, True], ids=["bi", "cross"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_published_folders_load(kind, cross, suffix, tmp_path):
    model = write_model(tmp_path, kind, cross, suffix)
    loaded = evaluation.load_published(tmp_path)
    assert type(loaded) is (CrossEncoder if cross else BertEncoder) and not loaded.training
    tokens = encode(training.load_tokenizer(tmp_path), TEXTS, TEXTS[::-1] if cross else None)
    expected = model(*tokens) if cross else model(*tokens[:2])
    assert torch.equal(loaded(*tokens) if cross else loaded(*tokens[:2]), expected)


def test_hostile_folders(tmp_path):
    with pytest.raises(UserError, match="give the folder of a published model"):
        evaluation.load_published(tmp_path)
    for content, message in (("{", "holds no json object"), ("[1, 2]", "holds no json object"), ("{}", "lacks vocab_size|found none")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            evaluation.load_published(tmp_path)
    with pytest.raises(UserError, match="fetch the tokenizer's files again"):
        training.load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("cat\nmat\n")
    with pytest.raises(UserError, match=r"fetch the tokenizer's files again|neither \[PAD\] nor <pad>"):
        training.load_tokenizer(tmp_path)
    write_model(tmp_path / "many", "bert", True, "safetensors")
    config = json.loads((tmp_path / "many/config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "many/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit|give a cross-encoder with one label"):
        evaluation.load_published(tmp_path / "many")
    write_model(tmp_path / "cut", "bert", False, "bin")
    whole = (tmp_path / "cut/pytorch_model.bin").read_bytes()
    (tmp_path / "cut/pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a torch checkpoint"):
        evaluation.load_published(tmp_path / "cut")


# ---- published data ---------------------------------------------------------------------------------------------------------------------


def write_data(root: Path) -> None:
    """Every set in its authors' layout, a few rows each."""
    for folder in ("STS_data/en", "quora-IR-dataset/classification", "QNLI", "MRPC"):
        (root / folder).mkdir(parents=True)
    for year in range(2012, 2017):
        rows = [f'{k}.5\tthe "cat {k}\ta cat\n' for k in range(3)] + ["\tno score\tthe mat\n"]
        (root / f"STS_data/en/{year}.test.tsv").write_text("".join(rows))
    stsb = "split\tgenre\tdataset\tyear\tsid\tscore\tsentence1\tsentence2\n"
    stsb += "".join(f"{split}\tmain\tx\t2012\t{k}\t{k}.0\ta cat {split} {k}\tthe mat\n" for split in ("train", "dev", "test") for k in range(3))
    with gzip.open(root / "stsbenchmark.tsv.gz", "wt") as file:
        file.write(stsb)
    sick = "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tSemEval_set\n"
    sick += "".join(f"{k}\ta cat {part} {k}\ta mat\tNEUTRAL\t{k + 1}.5\t{part}\n" for part in ("TRAIN", "TRIAL", "TEST") for k in range(3))
    (root / "STS_data/en/SICK_annotated.txt").write_text(sick)
    for split in ("train", "dev", "test"):
        rows = "".join(f"{k}\t{k}\t{k}\ta cat {k}\tthe mat {split}\t{k % 2}\n" for k in range(4))
        (root / f"quora-IR-dataset/classification/{split}_pairs.tsv").write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + rows)
    for split in ("train", "dev"):
        rows = "".join(f"{k}\ta cat {k}?\tthe mat\t{'not_' * (k % 2)}entailment\n" for k in range(1004))
        (root / f"QNLI/{split}.tsv").write_text("index\tquestion\tsentence\tlabel\n" + rows)
    for name in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        rows = "".join(f"{k % 2}\t{k}\t{k}\ta cat {k}\tthe mat\n" for k in range(4))
        (root / "MRPC" / name).write_text("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + rows, encoding="utf-8")


def test_readers(tmp_path):
    write_data(tmp_path)
    old = te.read_pairs(tmp_path, "sts14")
    assert old.a == ['the "cat 0', 'the "cat 1', 'the "cat 2', "no score"] and old.b[-1] == "the mat"
    assert old.gold[:3].tolist() == [0.5, 1.5, 2.5] and old.gold[3].isnan()
    assert te.read_pairs(tmp_path, "stsb", "dev").a == [f"a cat dev {k}" for k in range(3)]
    assert te.read_pairs(tmp_path, "sickr", "dev").a == [f"a cat TRIAL {k}" for k in range(3)]
    assert te.read_pairs(tmp_path, "sickr").gold.tolist() == [1.5, 2.5, 3.5]
    assert te.read_pairs(tmp_path, "qqp", "train").b == ["the mat train"] * 4 and te.read_pairs(tmp_path, "qqp").gold.tolist() == [0, 1, 0, 1]
    assert len(te.read_pairs(tmp_path, "qnli", "dev")) == 1000 and te.read_pairs(tmp_path, "qnli").gold.tolist() == [1, 0, 1, 0]
    assert te.read_pairs(tmp_path, "qnli").a[0] == "a cat 1000?" and len(te.read_pairs(tmp_path, "qnli", "train")) == 1004
    assert te.read_pairs(tmp_path, "mrpc").gold.tolist() == [0, 1, 0, 1]


def test_what_is_learnt_from(tmp_path):
    write_data(tmp_path)
    proper, official = te.unlabelled(tmp_path, "sts", False), te.unlabelled(tmp_path, "sts", True)
    assert len(proper) == 6 and all("train" in a.lower() for a in proper.a)
    assert len(official) == 6 + 6 + 4 and official.gold.isnan().all()  # five equal years count once
    assert len(te.unlabelled(tmp_path, "qqp", True)) == 8
    custom = tmp_path / "own.txt"
    custom.write_text("a cat || the mat\nthe cat||a mat\n\n")
    assert [*zip(*(lambda p: (p.a, p.b))(te.read_custom(custom)), strict=True)] == [("a cat ", " the mat"), ("the cat", "a mat")]
    assert te.unlabelled(custom, "sts", False).a == te.read_custom(custom).a
    with pytest.raises(UserError, match="take one of sts, qqp, qnli, mrpc"):
        te.unlabelled(tmp_path, "stsb2", False)


def test_hostile_data(tmp_path):
    with pytest.raises(UserError, match=r"2012.test.tsv does not exist: fangyuliu.me"):
        te.read_pairs(tmp_path, "sts12")
    write_data(tmp_path)
    (tmp_path / "STS_data/en/2012.test.tsv").write_text("1.0\tonly one\n")
    (tmp_path / "STS_data/en/2013.test.tsv").write_text("high\ta\tb\n")
    (tmp_path / "STS_data/en/2014.test.tsv").write_text("")
    (tmp_path / "STS_data/en/2015.test.tsv").write_bytes(b"1.0\t\xff\xfe\tb\n")
    (tmp_path / "STS_data/en/SICK_annotated.txt").write_text("a\tb\n1\t2\n")
    (tmp_path / "stsbenchmark.tsv.gz").write_bytes((tmp_path / "stsbenchmark.tsv.gz").read_bytes()[:40])
    for name, message in [
        ("sts12", "line 1: a tab-separated line has too few columns"), ("sts13", "line 1: 'high' is no score"), ("sts14", "has no pairs"),
        ("sts15", "is damaged or no tab-separated text"), ("sickr", "lacks the column sentence_A"), ("stsb", "is damaged or no tab-separated text"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            te.read_pairs(tmp_path, name)
    (tmp_path / "stsbenchmark.tsv.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="is damaged"):
        te.read_pairs(tmp_path, "stsb")
    own = tmp_path / "own.txt"
    for content, message in (("one sentence\n", "two sentences with"), ("", "is empty"), ("a||b||c\n", "two sentences with")):
        own.write_text(content)
        with pytest.raises(UserError, match=message):
            te.read_custom(own)
    own.write_bytes(b"\xff\xfe||a")
    with pytest.raises(UserError, match="not UTF-8"):
        te.read_custom(own)


@KINDS
@pytest.mark.parametrize("cross", [False, True], ids=["bi", "cross"])
def test_published_models_on_published_sets(kind, cross, tmp_path):
    write_data(tmp_path / "data")
    model = write_model(tmp_path / "model", kind, cross, "safetensors")
    cfg = replace(training.SCALES["full"], data=str(tmp_path / "data"), weights=tmp_path / "model", device="cpu")
    found = evaluation.evaluate_published(cfg)
    assert list(found) == [*te.STS, *te.BINARY, "sts_mean"] and found["sts_mean"] == pytest.approx(sum(found[name] for name in te.STS) / 7)
    words, pairs = training.load_tokenizer(tmp_path / "model"), te.read_pairs(tmp_path / "data", "stsb")
    scores = []
    for a, b in zip(pairs.a, pairs.b, strict=True):  # one by one
        if cross:
            scores.append(model(*encode(words, [a], [b], 64)).sigmoid().item())
        else:
            scores.append(F.cosine_similarity(*(model.embed(*encode(words, [text])[:2]) for text in (a, b))).item())
    assert found["stsb"] == pytest.approx(spearman(torch.tensor(scores), pairs.gold), abs=1e-3)
    with pytest.raises(UserError, match="has none of the test sets"):
        evaluation.evaluate_published(replace(cfg, data=str(tmp_path)))


def test_distilling_published_models_leaves_folders_that_are_evaluated(tmp_path):
    write_data(tmp_path / "data")
    for kind in ("bert", "roberta"):
        write_model(tmp_path / kind, kind, False, "safetensors")
    folders = tuple(str(tmp_path / kind) for kind in ("bert", "roberta"))
    cfg = replace(
        training.SCALES["full"], data=str(tmp_path / "data"), out=tmp_path / "run", plms=folders, simcse=folders, cycles=1, bi_epochs=1,
        cross_batch=16, bi_batch=8, device="cpu", precision="fp32", processes=1,
    )  # fmt: skip
    training.train(cfg)
    for kind in ("0-bert", "1-roberta"):
        for student, cls in (("cross", CrossEncoder), ("bi", BertEncoder)):
            folder = tmp_path / f"run/published/2021/{kind}/{student}-1-model"
            assert isinstance(evaluation.load_published(folder), cls)
            assert 0 <= evaluation.evaluate_published(replace(cfg, weights=folder))["mrpc"] <= 100
    with pytest.raises(UserError, match="as many: each PLM and its SimCSE encoder"):
        training.train(replace(cfg, simcse=()))


# ---- what is measured -------------------------------------------------------------------------------------------------------------------


def test_claims_by_hand():
    """A table in which every claim has a value of its own."""
    cfg, table = replace(training.SCALES["smoke"], cycles=3), {}
    row = lambda test, dev=0.0, auc=50.0: {"test": test, "dev": dev, "auc": auc}
    table |= {("simcse", "bert"): row(50.0, auc=60.0), ("simcse", "roberta"): row(40.0, auc=60.0)}
    for variant, names in training.VARIANTS.items():
        for name in names:
            for cycle in (1, 2, 3):
                base = {"bert": 50.0, "roberta": 40.0}[name] + {"mutual": 7.0, "continued": -3.0}.get(variant, 4.0)
                for kind, more in (("cross", 2.0), ("bi", 0.0)):
                    best = float(cycle == 2)  # cycle 2 is best on dev, 3 on test
                    table[variant, name, kind, cycle] = row(base + more + cycle, best, auc=62.0 + more)
    table |= {("swaps", "mse"): row(56.0), ("swaps", "bce-bce"): row(54.0), ("swaps", "mse-mse"): row(53.0), ("swaps", "mse-bce"): row(50.0)}
    found = evaluation.claims(cfg, table, ensemble=51.0)
    expected = {"C1": 6, "C2": 8, "C3": 6 - 1, "C3b": 0, "C4": 3, "C4b": 3, "C5": 55 - 51, "C6": 57 - 56, "C6b": (55 - 54 + 3) / 2, "C6c": 7, "C8": 2}
    assert found == pytest.approx(expected)


def test_auc_by_counting():
    scores, same_scene = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    won = [float(a > b) + 0.5 * float(a == b) for a in scores[same_scene] for b in scores[~same_scene]]
    assert evaluation.auc(scores, same_scene) == pytest.approx(100 * sum(won) / len(won))


def test_all_cosines_are_those_of_the_pairs():
    starts, sentences = family("roberta"), caption_pairs(5, 6).a
    table = evaluation.all_cosines(starts.bi().eval(), starts, sentences)
    for i, j in permutations(range(5), 2):
        pair = Pairs([sentences[i]], [sentences[j]], torch.zeros(1))
        torch.testing.assert_close(table[i, j], scored(starts.simcse, starts.tokenizer, pair)[0])


def test_claims_are_not_judged_on_other_data():
    with pytest.raises(UserError, match="without --data"):
        evaluation.evaluate(replace(training.SCALES["small"], data="x"))
