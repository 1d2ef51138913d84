"""tiny-lm and tiny-bert: what ships is as good as its json says, and the code around it against hand-made cases and transformers."""

import math

import numpy as np
import pytest
import torch

from common import ngrams
from common.attention import controlled
from common.backbones import pretrained
from common.backbones.bert import BertConfig
from common.backbones.bert_pretraining import BertPretraining
from common.backbones.llama import Llama, LlamaConfig
from common.data import text
from common.errors import UserError
from common.pretrain import recipe, shipping, tiny_bert, tiny_lm

# ---- what ships -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-lm", "tiny-bert"])
def test_it_is_as_good_as_its_json_says(name):
    """Another Python has other docstrings, held-out ones too: there the figures need only be of the same size."""
    found = shipping.provenance(name)
    same_text = found["data"]["text: stdlib"] == text.corpus(tokenizer=text.tokenizer(name)).hash
    tolerance = {"rel": 2e-3, "abs": 2e-3} if same_text else {"rel": 0.15, "abs": 0.05}
    assert recipe(name).measure(shipping.load(name)) == pytest.approx(found["quality"], **tolerance)


def test_tiny_lm_loads_with_its_tokenizer():
    llama, tokenizer = Llama.from_pretrained("tiny"), text.tokenizer("tiny-lm")
    assert tokenizer.get_vocab_size() == llama.config.vocab_size
    sentence = torch.tensor([tokenizer.encode("Return the name of the file, or None if there is no such file.").ids])
    with torch.no_grad():
        forward, backward = (tiny_lm.loss(llama, (ids[:, :-1], ids[:, 1:])) for ids in (sentence, sentence.flip(1)))
    assert forward < 4 < backward


# ---- the recipes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-lm", "tiny-bert"])
def test_a_recipe_trains_ships_and_loads_back(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(shipping, "SHEETS", tmp_path)
    cfg = recipe(name).SCALES["smoke"]
    cfg.out = tmp_path / "run"
    found = shipping.run(name, cfg, "test")
    assert all(math.isfinite(value) for value in found["quality"].values())
    model = shipping.load(name)[""]
    assert type(model).from_pretrained("tiny").config == model.config
    assert text.tokenizer(name).get_vocab_size() == model.config.vocab_size


# ---- tokenizers -----------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_exists_cuts_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    bpe = text.byte_level_bpe(["something else entirely, something else."], 270)
    bpe.save(str(tmp_path / "tokenizer.json"))
    corpus = text.corpus(str(tmp_path / "a.txt"), context=16, tokenizer=text.tokenizer(tmp_path))
    assert corpus.vocab_size == 270 and bpe.decode(corpus.val.tolist()) == (tmp_path / "a.txt").read_text()[-225:]
    assert corpus.tokenizer.to_str() == bpe.to_str()
    of_pairs = text.corpus(str(tmp_path / "a.txt"), context=16, tokenizer=tiny_bert.for_sentences(bpe))
    assert np.array_equal(of_pairs.val, corpus.val)  # no [CLS] and [SEP] around a corpus


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tiny-nothing/tokenizer\.json does not exist"):
        text.tokenizer("tiny-nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        text.tokenizer(tmp_path)


def test_sentences_are_encoded_as_bert_reads_them():
    tokenizer = tiny_bert.for_sentences(text.byte_level_bpe([], 256))
    letter = tokenizer.token_to_id
    pair, one = tokenizer.encode_batch([("ab", "c"), "a[MASK]"])
    assert pair.tokens == ["[CLS]", "a", "b", "[SEP]", "c", "[SEP]"] and pair.type_ids == [0, 0, 0, 0, 1, 1]
    assert one.ids == [257, letter("a"), 259, 258, 256, 256] and one.attention_mask == [1, 1, 1, 1, 0, 0]
    assert tokenizer.decode(pair.ids) == "abc"


# ---- counting -------------------------------------------------------------------------------------------------------------------------


def kneser_ney(grams, vocab):
    """The docstring's formulas on dictionaries, token by token."""
    order = len(grams[0])
    counts = {order: {}}
    for gram in grams:
        counts[order][gram] = counts[order].get(gram, 0) + 1
    for k in range(order - 1, 0, -1):
        before = {}
        for gram in counts[k + 1]:
            before.setdefault(gram[1:], set()).add(gram[0])
        counts[k] = {gram: len(tokens) for gram, tokens in before.items()}

    def discounts(k):
        n = [sum(c == i for c in counts[k].values()) for i in range(5)]
        if 0 in n[1:]:
            return [0] + [0.5] * 3
        y = n[1] / (n[1] + 2 * n[2])
        return [0] + [min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.1), i) for i in (1, 2, 3)]

    def p(gram):
        k = len(gram)
        if k == 0:
            return 1 / vocab
        same = {other: c for other, c in counts[k].items() if other[:-1] == gram[:-1]}
        if not same:
            return p(gram[1:])
        d, c = discounts(k), counts[k].get(gram, 0)
        left = sum(d[min(c, 3)] for c in same.values())
        return (c - d[min(c, 3)] + left * p(gram[1:])) / sum(same.values())

    return p


def test_kneser_ney_is_its_formula_and_a_distribution():
    ids = np.random.default_rng(0).zipf(1.3, 1500) % 20
    model = ngrams.KneserNey(ngrams.ngrams(ids, 3), 20)
    p = kneser_ney([tuple(gram) for gram in ngrams.ngrams(ids, 3).tolist()], 20)
    tried = np.random.default_rng(1).integers(20, size=(60, 3))
    assert np.exp(model.log_prob(tried)) == pytest.approx([p(tuple(gram)) for gram in tried.tolist()], rel=1e-10)
    every = np.stack(np.meshgrid([3, 19], [0, 7], np.arange(20), indexing="ij"), -1).reshape(-1, 3)
    assert np.exp(model.log_prob(every)).reshape(4, 20).sum(1) == pytest.approx(1)


def test_a_long_history_does_not_fit():
    with pytest.raises(ValueError, match="lower the order"):
        ngrams.KneserNey(np.zeros((1, 6), int), 2048)


def test_the_chain_reads_both_sides_of_a_gap():
    """After 1 comes 2 or 3, before 4 comes 3 or 5: between 1 and 4 stands 3."""
    train = np.array([1, 2, 6, 1, 3, 4, 6, 5, 4, 6, 6] * 30, np.uint16)
    words = 7
    hidden, chosen = torch.tensor([[8, 1, 10, 4, 10, 10]]), torch.tensor([[False, False, True, False, True, True]])
    p = tiny_bert.chain(train, hidden, chosen, words).softmax(-1)
    assert p[0].argmax() == 3 and p[0, 3] > 0.9
    assert p[1].argmax() == 6  # after 4, and nothing to the right
    assert torch.allclose(p[2], tiny_bert.unigrams(train, words).exp(), atol=1e-6)  # nothing but [MASK] on the left, [CLS] on the right


# ---- tiny-lm --------------------------------------------------------------------------------------------------------------------------


def test_scores_of_heads():
    """Five tokens twice: a head that looks at what followed, and one that looks back."""
    copying = torch.zeros(10, 10)
    for i in range(5):
        copying[5 + i, i + 1] = 1
    back = torch.eye(10).roll(-1, 1).tril()
    back[0, 0] = 1
    maps = torch.stack([copying, back])[None]
    assert tiny_lm.induction(maps).tolist() == [[1, 0]] and tiny_lm.previous_token(maps).tolist() == [[0, 1]]


def test_even_weights_are_the_floor_of_the_scores():
    """A model whose keys are all zero looks everywhere alike."""
    model = Llama(LlamaConfig(300, 16, 16, 2, 2)).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.k_proj.weight)
    scores = tiny_lm.heads(model)
    assert scores["induction"] == pytest.approx(scores["induction_even"], rel=1e-4)
    assert scores["induction_even"] == pytest.approx(np.mean([1 / (i + 1) for i in range(32, 64)]), rel=1e-4)
    assert scores["previous_token"] == pytest.approx(scores["previous_token_even"], rel=1e-4)
    assert scores["copied"] < 0.05


def test_ngrams_are_scored_on_the_targets_of_the_windows():
    train, val = np.array([0, 1] * 20, np.uint16), np.array([0, 1, 0, 1, 1, 0, 1], np.uint16)
    corpus = text.Corpus(2, train, val, context=3, bytes_per_token=1.0, hash="")
    _, targets = corpus.val_windows()
    model = ngrams.KneserNey(ngrams.ngrams(train, 2), 2)
    pairs = [(0, 1), (1, 0), (0, 1), (1, 1), (1, 0), (0, 1)]
    assert targets.flatten().tolist() == [after for _, after in pairs]
    assert tiny_lm.by_counting(corpus, 2, targets.numel()) == pytest.approx(-model.log_prob(np.array(pairs)).mean())


# ---- tiny-bert ------------------------------------------------------------------------------------------------------------------------


def test_inputs_are_one_text_or_two():
    pad, cls, sep, mask = range(1000, 1004)
    windows = torch.arange(2 * 24).view(2, 24)
    ids, types, kind = tiny_bert.inputs(windows, 8, 1000)
    assert kind.tolist() == [tiny_bert.FOLLOWS, tiny_bert.ELSEWHERE, tiny_bert.ALONE] * 2
    for row, (text_ids, text_types) in enumerate(zip(ids.tolist(), types.tolist(), strict=True)):
        start, middle = row * 8, text_ids.index(sep)
        assert text_ids[0] == cls and text_ids[-1] == sep and not {pad, mask} & set(text_ids)
        assert text_ids[1:middle] == list(range(start, start + middle - 1))
        assert text_types == [0] * (middle + 1) + [1] * (7 - middle)
        if kind[row] == tiny_bert.ALONE:
            assert middle == 7
        else:
            begin = start + middle - 1 + (kind[row] == tiny_bert.ELSEWHERE) * (24 if row < 3 else -24)
            assert 3 <= middle <= 6 and text_ids[middle + 1 : -1] == list(range(begin, begin + 6 - middle))


def test_at_first_heads_look_at_the_tokens_beside():
    model = BertPretraining(BertConfig(104, 128, 2, 4, 64, 64)).eval()
    tiny_bert.initialize(model)
    maps = []

    class Recording:
        def weights(self, site, a):
            maps.append(a)
            return a

    with controlled(model, Recording()), torch.no_grad():
        model(torch.randint(100, (2, 40)))
    places = torch.arange(4, 36)
    for head, shift in enumerate((-1, 1, -2, 2)):
        assert (maps[0][:, head, 4:36].argmax(-1) == places + shift).all()


def test_corruption_takes_the_shares_it_says_and_spares_special_tokens():
    words = 500
    ids = torch.randint(words, (400, 100))
    ids[:, 0], ids[:, -1] = words + 1, words + 2
    corrupted, chosen = tiny_bert.corrupt(ids, words)
    assert torch.equal(corrupted[~chosen], ids[~chosen]) and not chosen[:, [0, -1]].any()
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.4, abs=0.01)
    masked, same = corrupted[chosen] == words + 3, corrupted[chosen] == ids[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02) and same.float().mean() == pytest.approx(0.1, abs=0.02)
    assert corrupted[chosen][~masked].max() < words


def test_the_loss_asks_for_the_chosen_tokens_only(monkeypatch):
    monkeypatch.setattr(tiny_bert, "corrupt", lambda ids, words: (ids, ids == 7))
    model = BertPretraining(BertConfig(104, 16, 1, 2, 16, 32)).eval()
    asked = {}
    for answer in (7, 8):
        model.cls["predictions"].bias.data = 50.0 * (torch.arange(104) == answer)
        asked[answer] = tiny_bert.loss(model, torch.arange(4 * 32).view(4, 32) % 100)["masked"].item()
    assert asked[7] == pytest.approx(0, abs=1e-3) and asked[8] == pytest.approx(50, abs=1)


def test_both_heads_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**sizes, max_position_embeddings=20)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = BertPretraining.from_pretrained(tmp_path)
    ids, types, real = torch.randint(60, (3, 12)), torch.arange(12).expand(3, 12) // 7, torch.ones(3, 12, dtype=torch.long)
    real[1, 8:] = 0
    with torch.no_grad():
        expected = theirs(ids, real, types)
        torch.testing.assert_close(ours(ids, real, types), expected.prediction_logits, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.follows(ours.bert(ids, real, types)), expected.seq_relationship_logits, atol=2e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_names_of_old_releases_load():
    assert BertPretraining.rename("cls.predictions.transform.LayerNorm.gamma") == "cls.predictions.transform.LayerNorm.weight"
    assert BertPretraining.rename("bert.embeddings.LayerNorm.beta") == "bert.embeddings.LayerNorm.bias"
    assert BertPretraining.rename("bert.embeddings.position_ids") is None and BertPretraining.rename("cls.predictions.decoder.bias") is None
