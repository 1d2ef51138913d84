"""FILIP against x-clip's and DeCLIP's re-implementations (goldens), loops over single pairs, and open_clip."""

import io
import json
import math
import multiprocessing
import tarfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common import gpu
from common.backbones.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, open_clip_config
from common.data import scenes
from common.errors import UserError
from common.layers import init_by_fan_in
from papers.filip import eval as evaluation
from papers.filip import model as filip
from papers.filip import train as training
from papers.filip.model import (
    FILIP,
    GlobalCLIP,
    PairedFILIP,
    UnmaskedFILIP,
    contrastive_loss,
    keep_best,
    load_published,
    matches,
    similarities,
    take,
    towers,
    unit_tokens,
)
from tests.goldens import Case, cases

CASES = cases("filip")
XCLIP = [case for case in CASES if "text_ids" in case.tensors]
DECLIP = [case for case in CASES if "word_dense" in case.tensors]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def close(case: Case, actual: torch.Tensor, name: str) -> None:
    kind = f"f{torch.finfo(actual.dtype).bits}"
    torch.testing.assert_close(actual, case.tensors[f"{name}_{kind}"], **case.meta["tolerance"][kind])


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", XCLIP, ids=lambda c: c.name)
@DTYPES
def test_xclip(case, dtype):
    t = case.tensors
    heads = {}
    for side in ("text", "visual"):
        weight = t[f"to_{side}_latent.weight"].to(dtype)
        heads[side] = nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)
        heads[side].weight.data = weight
    features = {side: t[f"{side}_features"].to(dtype).detach().requires_grad_() for side in ("text", "image")}
    temperature = t["temperature"].to(dtype).detach().requires_grad_()
    text = unit_tokens(heads["text"], features["text"])[:, int(t["text_cls"]) :]  # a class token comes first
    image = unit_tokens(heads["visual"], features["image"])[:, int(t["visual_cls"]) :]
    close(case, text, "text_latents")
    close(case, image, "image_latents")
    mask = t["text_ids"] != 0
    s_image, s_text = similarities(image, text, mask)
    scale = temperature.exp()
    close(case, scale * s_text.T, "s_text_to_image")
    close(case, scale * s_image.T, "s_image_to_text")
    close(case, contrastive_loss(s_image, s_text, scale), "loss_paper")
    pair = scale * torch.einsum("btd,bid->bti", text, image)
    close(case, pair, "pair_sim")
    loss = contrastive_loss(s_image.T, s_text, scale)  # x-clip's softmax runs over the images in both directions
    close(case, loss, "loss_xclip")
    loss.backward()
    for name, tensor in [("temperature", temperature), *((f"{side}_features", x) for side, x in features.items())]:
        close(case, tensor.grad, f"grad_{name}")
    for side, head in heads.items():
        close(case, head.weight.grad, f"grad_to_{side}_latent.weight")


@pytest.mark.parametrize("case", DECLIP, ids=lambda c: c.name)
@DTYPES
def test_declip(case, dtype):
    t = case.tensors
    image, text = (F.normalize(t[name].to(dtype), dim=-1) for name in ("image_dense", "word_dense"))
    model = PairedFILIP(config(), case.meta["config"]["k"])
    s_image, s_text = model.across_workers(image, text, torch.ones(text.shape[:2], dtype=torch.bool))
    scale = t["logit_scale_dense"].to(dtype).exp()
    close(case, scale * s_image, "logits_image")
    close(case, scale * s_text.T, "logits_text")


# ---- the equations, pair by pair --------------------------------------------------------------------------------------------------------


def config(size=12, patch=4, width=16, embed=8, vocab=20, length=9) -> CLIPConfig:
    layers = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**layers, image_size=size, patch_size=patch)
    return CLIPConfig(vision, CLIPTextConfig(**layers, vocab_size=vocab, max_position_embeddings=length), embed)


def tokens(images=4, texts=5, patches=6, words=7, width=3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit tokens; text j has 1 + j words."""
    image, text = (F.normalize(torch.randn(*shape, width, dtype=torch.float64), dim=-1) for shape in ((images, patches), (texts, words)))
    return image, text, torch.arange(words) <= torch.arange(texts)[:, None]


def ids_of(lengths: list[int], vocab=20, length=9) -> torch.Tensor:
    """Token ids that end with the highest one, and zeros behind it."""
    ids = torch.randint(1, vocab - 1, (len(lengths), length))
    for row, n in zip(ids, lengths, strict=True):
        row[n - 1], row[n:] = vocab - 1, 0
    return ids


@pytest.mark.parametrize("block", [1, 100, filip.BLOCK])
def test_similarities_by_loops(block, monkeypatch):
    monkeypatch.setattr(filip, "BLOCK", block)
    image, text, mask = tokens()
    s_image, s_text = similarities(image, text, mask)
    for i in range(len(image)):
        for j in range(len(text)):
            cosines = [[float(patch @ word) for word, real in zip(text[j], mask[j], strict=True) if real] for patch in image[i]]
            assert s_image[i, j].item() == pytest.approx(sum(map(max, cosines)) / len(cosines))
            columns = list(zip(*cosines, strict=True))
            assert s_text[i, j].item() == pytest.approx(sum(map(max, columns)) / len(columns))
    assert s_image.abs().max() <= 1 and s_text.abs().max() <= 1


def test_matches_by_loops():
    image, text, mask = tokens(images=5)
    found = matches(image, text, mask)
    for i in range(5):
        for k in range(6):
            assert found[i, k].item() == max(range(1 + i), key=lambda r, i=i, k=k: float(image[i, k] @ text[i, r]))


def test_loss_by_loops():
    s_image, s_text, scale = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64), torch.tensor(1 / 0.07)
    expected = 0.0
    for k in range(4):
        row, column = (scale * s_image[k]).tolist(), (scale * s_text[:, k]).tolist()
        for scores in (row, column):
            expected -= (scores[k] - math.log(sum(map(math.exp, scores)))) / 4 / 2
    assert contrastive_loss(s_image, s_text, scale).item() == pytest.approx(expected)


def test_what_stands_in_the_padding_changes_nothing():
    image, text, mask = tokens()
    other = torch.where(mask[..., None], text, 100 * torch.randn_like(text))
    for a, b in zip(similarities(image, text, mask), similarities(image, other, mask), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(matches(image, text[:4], mask[:4]), matches(image, other[:4], mask[:4]))
    (patches, words, kept), (others, other_words, other_kept) = keep_best(image, text, mask, 0.5), keep_best(image, other, mask, 0.5)
    assert torch.equal(patches, others) and torch.equal(kept, other_kept) and torch.equal(words[kept], other_words[kept])


def test_the_gradient_reaches_the_words_that_were_found_and_no_others():
    image, text, mask = tokens(images=1, texts=1, words=4)
    mask[:], text = torch.tensor([True, True, True, False]), text.requires_grad_()
    similarities(image, text, mask)[0].sum().backward()
    found = set(matches(image, text.detach(), mask)[0].tolist())
    assert [bool(g.abs().sum() > 0) for g in text.grad[0]] == [r in found for r in range(4)]


@pytest.mark.parametrize("block", [1, filip.BLOCK])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7, 1.0])
def test_selection_by_loops(ratio, block, monkeypatch):
    monkeypatch.setattr(filip, "BLOCK", block)
    image, text, mask = tokens()
    patches, words, kept = keep_best(image, text, mask, ratio)
    every_word = [word for j in range(5) for word in text[j][mask[j]]]
    for i in range(4):
        score = [max(float(patch @ word) for word in every_word) for patch in image[i]]
        assert set(patches[i].tolist()) == set(sorted(range(6), key=lambda k, s=score: -s[k])[: math.ceil(ratio * 6)])
    for j in range(5):
        score = [max(float(patch @ word) for patch in image.flatten(0, 1)) for word in text[j][mask[j]]]
        assert words[j][kept[j]].tolist() == sorted(range(1 + j), key=lambda k, s=score: -s[k])[: math.ceil(ratio * (1 + j))]


def test_all_of_the_tokens_is_no_selection():
    image, text, mask = tokens()
    patches, words, kept = keep_best(image, text, mask, 1.0)
    for a, b in zip(similarities(take(image, patches), take(text, words), kept), similarities(image, text, mask), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_model_compares_what_it_keeps(ratio):
    image, text, mask = (t[:4] for t in tokens())
    patches, words, kept = keep_best(image, text, mask, ratio)
    expected = similarities(take(image, patches), take(text, words), kept)
    assert all(map(torch.equal, FILIP(config(), ratio=ratio).across_workers(image, text, mask), expected))


# ---- the model --------------------------------------------------------------------------------------------------------------------------


def test_one_token_on_each_side_is_clip():
    model = GlobalCLIP(config())
    image, ids = torch.randn(3, 3, 12, 12), ids_of([4, 9, 6, 5])
    s_image, s_text = model(image, ids)
    expected = CLIP.forward(model, image, ids) / model.logit_scale.exp()
    torch.testing.assert_close(s_image, expected)
    torch.testing.assert_close(s_text, expected)


def test_the_loss_is_that_of_the_model_s_own_scores():
    model, image, ids = FILIP(config()), torch.randn(3, 3, 12, 12), ids_of([4, 9, 6])
    s_image, s_text = model(image, ids)
    torch.testing.assert_close(model.loss(image, ids), contrastive_loss(s_image, s_text, torch.tensor(1 / 0.07)))


@pytest.mark.parametrize("build", [FILIP, partial(FILIP, ratio=0.5), GlobalCLIP, partial(PairedFILIP, count=4)], ids=range(4))
def test_a_handful_of_pairs_is_learnt(build):
    """A loss this low ranks every pair first among the tokens that count."""
    torch.manual_seed(0)
    model, image, ids = init_by_fan_in(build(config())), torch.randn(4, 3, 12, 12), ids_of([4, 9, 6, 5])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(image, ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * math.log(4)


def test_words_end_at_the_end_of_text():
    ids = ids_of([4, 9, 2])
    mask = FILIP(config()).text_tokens(ids)[1]
    assert mask.sum(1).tolist() == [4, 9, 2] and UnmaskedFILIP(config()).text_tokens(ids)[1].all()
    open_ids = open_clip.get_tokenizer("ViT-B-32")(["a red circle", "a photo of a cat"])
    assert FILIP(config(vocab=49408, length=77)).text_tokens(open_ids)[1].sum(1).tolist() == [5, 7]
    ours = training.tokenizer()(["a red circle", "a photo of a blue ring"])
    vocab = len(training.tokenizer().vocab)
    assert FILIP(config(vocab=vocab, length=training.LENGTH)).text_tokens(ours)[1].sum(1).tolist() == [5, 8]


def test_the_class_token_is_left_out_and_every_token_has_length_one():
    model = FILIP(config())
    image, (text, _) = model.image_tokens(torch.randn(2, 3, 12, 12)), model.text_tokens(ids_of([4, 5]))
    assert image.shape == (2, 9, 8) and text.shape == (2, 9, 8)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2, 9))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2, 9))
    swapped = torch.randn(1, 3, 12, 12)
    swapped, plain = swapped.roll(4, 3), swapped  # patches move with the picture, but for their positions
    model.vision_model.embeddings.position_embedding.weight.data[1:] = 0
    torch.testing.assert_close(model.image_tokens(swapped)[0].view(3, 3, 8), model.image_tokens(plain)[0].view(3, 3, 8).roll(1, 1))


def test_the_temperature_is_bounded():
    model = FILIP(config())
    assert model.scale.item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(9.0)
    assert model.scale.item() == 100


def test_prompts_are_averaged_as_scores():
    model = FILIP(config())
    image, text, mask = tokens(texts=6)
    score = model.class_scores(image, text, mask, 2)
    s_image = similarities(image, text, mask)[0]
    torch.testing.assert_close(score, torch.stack([s_image[:, :3].mean(1), s_image[:, 3:].mean(1)], 1))


def test_sums_start_where_means_do():
    cfg = training.SCALES["smoke"]
    gpu.seed_everything(0)
    mean = training.build(cfg, "filip")
    gpu.seed_everything(0)
    summed = training.build(cfg, "summed")
    train = training.scene_set(cfg.train_scenes, 1, cfg.size)
    image, ids = training.normalized(train.images), training.tokenizer()(train.captions)
    (a, b), (c, d) = mean(image, ids), summed(image, ids)
    patches, words = (cfg.size // cfg.patch) ** 2, summed.text_tokens(ids)[1].sum(1)
    torch.testing.assert_close(c, patches * a)
    torch.testing.assert_close(d, words * b)
    assert (mean.scale / summed.scale).item() ** 2 == pytest.approx(patches * words.double().mean().item(), rel=1e-5)


def test_declip_s_padding_is_neither_chosen_nor_counted():
    image, text, mask = (t[:4] for t in tokens())
    other = torch.where(mask[..., None], text, 100 * torch.randn_like(text))
    model = PairedFILIP(config(), 2)
    for a, b in zip(model.across_workers(image, text, mask), model.across_workers(image, other, mask), strict=True):
        torch.testing.assert_close(a, b)


def worker(rank: int, model: FILIP, image: torch.Tensor, ids: torch.Tensor, folder: Path) -> None:
    """One of two: its loss and its gradient."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    torch.save(loss_and_gradient(model, image[mine], ids[mine]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def loss_and_gradient(model: FILIP, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    loss = model.loss(image, ids)
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("model", [FILIP(config()), GlobalCLIP(config()), PairedFILIP(config(), 2)], ids=lambda m: type(m).__name__)
def test_two_workers_have_the_loss_and_the_gradient_of_one(model, tmp_path):
    """As DDP sees them: averaged over the workers."""
    model, image, ids = model.double(), torch.randn(4, 3, 12, 12).double(), ids_of([4, 9, 6, 5])
    fork = multiprocessing.get_context("fork")  # a spawned worker would import torch again
    workers = [fork.Process(target=worker, args=(rank, model, image, ids, tmp_path)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    found = (torch.load(tmp_path / "0.pt") + torch.load(tmp_path / "1.pt")) / 2
    torch.testing.assert_close(found, loss_and_gradient(model, image, ids))


# ---- published weights ------------------------------------------------------------------------------------------------------------------

OPEN = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def theirs() -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(**OPEN).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms and biases too
    return model


@torch.no_grad()
def tokens_of(theirs: open_clip.CLIP, image: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token after open_clip's last norms."""
    theirs.visual.output_tokens = True
    x = theirs.token_embedding(ids) + theirs.positional_embedding
    return theirs.visual(image)[1], theirs.ln_final(theirs.transformer(x, attn_mask=theirs.attn_mask))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@torch.no_grad()
def test_open_clip_s_weights(theirs, tmp_path, suffix):
    file = tmp_path / f"clip.{suffix}"
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    model, image, ids = load_published(open_clip_config(OPEN), file), torch.randn(2, 3, 12, 12), ids_of([4, 9, 6])
    patches, words = tokens_of(theirs, image, ids)
    torch.testing.assert_close(model.image_tokens(image), F.normalize(patches @ theirs.visual.proj, dim=-1))
    torch.testing.assert_close(model.text_tokens(ids)[0], F.normalize(words @ theirs.text_projection, dim=-1))
    clip = load_published(open_clip_config(OPEN), file, GlobalCLIP)
    expected = F.normalize(theirs.visual(image)[0], dim=-1)
    torch.testing.assert_close(clip(image, ids)[0], expected @ theirs.encode_text(ids, normalize=True).T)


@torch.no_grad()
def test_declip_s_weights(theirs, tmp_path):
    """The names of its FILIP: text tower below encode_text, projections with bias to a width of their own, all below `model` and `module.`"""
    state = theirs.state_dict()
    file = {name if name.startswith("visual.") else f"encode_text.{name}": tensor for name, tensor in state.items() if name != "logit_scale"}
    del file["encode_text.text_projection"]
    file |= {"encode_text.text_projection.weight": torch.randn(8, 16), "encode_text.text_projection.bias": torch.randn(8)}
    mappings = {f"{side}_mapping.{leaf}": torch.randn(*shape) for side in ("image", "text") for leaf, shape in (("weight", (6, 16)), ("bias", (6,)))}
    file |= mappings | {"logit_scale": torch.ones(1), "logit_scale_dense": torch.tensor(3.5)}
    torch.save({"model": {f"module.{name}": tensor for name, tensor in file.items()}, "step": 1}, tmp_path / "declip.pth")
    model, image, ids = load_published(open_clip_config(OPEN), tmp_path / "declip.pth"), torch.randn(2, 3, 12, 12), ids_of([4, 9, 6])
    patches, words = tokens_of(theirs, image, ids)
    head = lambda x, side: F.normalize(x @ mappings[f"{side}_mapping.weight"].T + mappings[f"{side}_mapping.bias"], dim=-1)
    torch.testing.assert_close(model.image_tokens(image), head(patches, "image"))
    torch.testing.assert_close(model.text_tokens(ids)[0], head(words, "text"))
    assert model.logit_scale.item() == 3.5


def test_hostile_weights(theirs, tmp_path):
    for content, message in [
        (b"junk", "is not a torch checkpoint"),
        ({"model": {"x": torch.ones(1)}}, "holds no two towers"),
        ([1, 2], "is not a torch checkpoint"),
        (theirs.state_dict() | {"visual.conv1.weight": torch.ones(2, 3, 4, 4)}, "does not fit FILIP"),
    ]:
        file = tmp_path / "weights.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(UserError, match=message):
            load_published(open_clip_config(OPEN), file)
    with pytest.raises(UserError, match="does not exist"):
        load_published(open_clip_config(OPEN), tmp_path / "no.pt")


def test_architectures_of_open_clip():
    base = towers("ViT-B-32").vision_config
    assert (base.hidden_size, base.patch_size, base.num_hidden_layers, base.image_size) == (768, 32, 12, 224)
    for name in ("ViT-B-33", "roberta-ViT-B-32", "RN50"):
        with pytest.raises(UserError, match="no pair of plain towers"):
            towers(name)
    with pytest.raises(UserError, match="take one of clip, filip"):
        training.full_model(replace(training.SCALES["full"], variant="flip"))


def test_training_may_start_from_published_towers(theirs, tmp_path, monkeypatch):
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(training, "towers", lambda arch: open_clip_config(OPEN))
    model = training.full_model(replace(training.SCALES["full"], weights=tmp_path / "clip.pt", embed=5))
    assert model.ratio == 0.25 and model.visual_projection.weight.shape == (5, 16)
    assert torch.equal(model.vision_model.embeddings.patch_embedding.weight, theirs.visual.conv1.weight)
    assert torch.equal(model.text_model.final_layer_norm.bias, theirs.ln_final.bias)


# ---- data on disk -----------------------------------------------------------------------------------------------------------------------


def jpeg(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(file, "JPEG")
    return file.getvalue()


def read(root: Path) -> training.ImageText:
    return training.ImageText(root, lambda image: image.resize((1, 1)).getpixel((0, 0)), lambda text: [text])


def colour_of(pixel: tuple[int, int, int]) -> str:
    return {0: "red", 2: "blue"}[pixel.index(max(pixel))]


def write_csv(root: Path) -> None:
    (root / "images").mkdir()
    for colour in ("red", "blue"):
        (root / f"images/{colour}.jpg").write_bytes(jpeg(colour))
    (root / "train.csv").write_text('image_path,caption\nimages/red.jpg,"red, or so"\nimages/blue.jpg,blue\n')


def write_yfcc(root: Path) -> None:
    (root / "data").mkdir()
    for colour in ("red", "blue"):
        (root / f"data/{colour}.jpg").write_bytes(jpeg(colour))
    rows = [{"filename": "data/red.jpg", "caption": ["red one", "red two"]}, {"filename": "data/blue.jpg", "caption": "blue"}]
    (root / "yfcc15m_clean_open_data.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


def write_shards(root: Path) -> None:
    for shard, colour in enumerate(("red", "blue")):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for suffix, content in (("jpg", jpeg(colour)), ("json", b"{}"), ("txt", f"{colour} é".encode())):
                member = tarfile.TarInfo(f"{shard:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("write", [write_csv, write_yfcc, write_shards], ids=lambda f: f.__name__)
def test_pairs_on_disk(write, tmp_path):
    write(tmp_path)
    dataset = read(tmp_path)
    assert len(dataset) == 2
    seen = {dataset[i] for _ in range(30) for i in range(2)}
    assert all(colour_of(pixel) == text[:4].strip(" ,") for pixel, text in seen)
    assert {text for _, text in seen} in ({"red, or so", "blue"}, {"red one", "red two", "blue"}, {"red é", "blue é"})


def test_broken_pairs(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "images/red.jpg").write_bytes(jpeg("red")[:300])
    with pytest.warns(UserWarning, match=r"skipped .*red\.jpg"):
        assert read(tmp_path)[0][1] == "blue"
    (tmp_path / "images/blue.jpg").unlink()
    with warnings.catch_warnings(), pytest.raises(UserError, match="11 images in a row"):
        warnings.simplefilter("ignore")
        read(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "no such directory"),
        ("other.txt", "", "has no pairs"),
        ("train.csv", "path,text\na,b\n", "needs the columns image_path and caption"),
        ("train.csv", "", "needs the columns"),
        ("list.json", '{"filename": "a.jpg"}\n', "line 1: expected an object with filename and caption"),
        ("list.json", "[1]\n", "line 1: expected"),
        ("00000.tar", "no tar at all", "is not a whole tar file"),
    ],
)
def test_hostile_pairs(name, content, message, tmp_path):
    root = tmp_path / "data"
    if name:
        root.mkdir()
        (root / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(root)


def test_training_transform():
    image = Image.new("RGB", (300, 260), "red")
    for train in (True, False):
        assert training.transform(224, train)(image).shape == (3, 224, 224)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(training.transform(224, False)(image)[:, 100, 100], expected)


# ---- measuring --------------------------------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    relevant = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    assert [round(evaluation.recall(scores, relevant, k)) for k in (1, 2, 3)] == [33, 67, 100]
    relevant[2, 1] = True  # either of two will do
    assert [round(evaluation.recall(scores, relevant, k)) for k in (1, 2)] == [33, 100]


def test_phrases_and_patches_by_hand():
    ring = scenes.Thing("ring", "orange", 0.3, 0.5, 0.2, "striped")
    assert evaluation.phrase_of(ring, "a red circle left of a striped orange ring on a teal background") == [7, 8, 9]
    assert evaluation.phrase_of(scenes.Thing("circle", "red", 0, 0, 1), "a red circle left of a ring on a teal background") == [2, 3]
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :2] = True  # all of patch 0
    mask[2, 2:4] = True  # half of patch 4
    mask[3, 5] = True  # a quarter of patch 5
    assert evaluation.patches_of(mask, 2).tolist() == [True, False, False, False, True, False]


def test_alignment_by_hand(monkeypatch):
    """Patches of the left half find a word of their thing, those of the right half do not."""
    thing = scenes.Thing("square", "blue", 0.5, 0.5, 0.2)
    one = scenes.Captioned(None, ["a blue square"], [scenes.Scene((thing,), "teal")], torch.ones(1, 4, 4, dtype=torch.uint8), None)
    monkeypatch.setattr(evaluation, "found_words", lambda model, test: (torch.tensor([[2, 0, 3, 4]]), torch.tensor([[True] * 5 + [False]])))
    right, chance = evaluation.alignment(replace(training.SCALES["smoke"], size=4, patch=2), None, one)
    assert right == 0.5 and chance == pytest.approx(0.4)


def test_captions_fit_the_tokenizer():
    words = {word for caption in training.scene_set(300, 5, 16).captions for word in caption.split()}
    assert words <= set(training.WORDS)
    asked = evaluation.prompts(["red ring", "orange cross"])
    assert len(asked) == 12 and {word for prompt in asked for word in prompt.split()} <= set(training.WORDS)
    assert asked[6:8] == ["an orange cross on a gray background", "an orange cross at the center on a gray background"]


def test_what_is_classified_is_what_the_captions_say():
    """The captions of the same draw, read back."""
    cfg = training.SCALES["smoke"]
    image, label = evaluation.single_things(cfg)
    drawn = training.scene_set(4 * cfg.test_scenes, 3, cfg.size, single=1.0)
    told = [(picture, caption) for picture, caption in zip(drawn.images, drawn.captions, strict=True) if "on a gray background" in caption]
    assert len(told) == len(image) > 0
    for picture, c, (expected, caption) in zip(image, label, told, strict=True):
        assert torch.equal(picture, expected) and evaluation.CLASSES[c] in caption


def fake_towers(arch: str) -> CLIPConfig:
    return config(size=224, patch=32, vocab=49408, length=77)


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(evaluation, "towers", fake_towers)
    save_file({name: t.contiguous() for name, t in FILIP(fake_towers("")).state_dict().items()}, tmp_path / "filip.safetensors")
    return tmp_path / "filip.safetensors"


@pytest.mark.parametrize("variant", ["filip_25", "clip"])
def test_zero_shot_on_imagenets_layout(variant, weights, tmp_path):
    """Images of a class are alike, so all or none of a class is right."""
    for name in ("red", "sky_blue"):
        (tmp_path / "data/val" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / f"data/val/{name}/{i}.JPEG").write_bytes(jpeg(name.split("_")[-1]))
    cfg = replace(training.SCALES["full"], data=str(tmp_path / "data"), weights=weights, variant=variant, workers=0, device="cpu")
    found = evaluation.evaluate_published(cfg)
    assert found["images"] == 4 and found["top1"] in (0, 50, 100)


@pytest.mark.parametrize(("name", "folder"), [("dataset_flickr30k.json", None), ("dataset_coco.json", "val2014")])
def test_retrieval_in_karpathy_s_layout(name, folder, weights, tmp_path):
    """Of equal images each is found by luck of the order alone, but every one is among the first ten."""
    data = tmp_path / "data"
    (data / (folder or "flickr30k-images")).mkdir(parents=True)
    rows = []
    for i, split in enumerate(["test", "train", "test", "val"]):
        (data / (folder or "flickr30k-images") / f"{i}.jpg").write_bytes(jpeg("red" if i else "blue"))
        rows.append(
            {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"{i} cats"}, {"raw": f"{i} dogs"}]}
            | ({"filepath": folder} if folder else {})
        )
    (data / name).write_text(json.dumps({"images": rows}))
    paths, captions = evaluation.karpathy(data / name)
    assert [path.name for path in paths] == ["0.jpg", "2.jpg"] and captions == [["0 cats", "0 dogs"], ["2 cats", "2 dogs"]]
    cfg = replace(training.SCALES["full"], data=str(data), weights=weights, device="cpu")
    found = evaluation.evaluate_published(cfg)
    assert set(found) == {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert found["image_to_text_r5"] == found["text_to_image_r5"] == 100
    paths[1].unlink()
    with pytest.raises(UserError, match="is missing"):
        evaluation.karpathy(data / name)
    (data / name).write_text("[]")
    with pytest.raises(UserError, match="not one of Karpathy"):
        evaluation.karpathy(data / name)


@pytest.mark.parametrize("variant", ["filip_25", "declip", "clip"])
def test_training_on_pairs_leaves_weights_that_are_evaluated(variant, tmp_path, monkeypatch):
    for module in (training, evaluation):
        monkeypatch.setattr(module, "towers", fake_towers)
    write_csv(tmp_path)
    cfg = replace(
        training.SCALES["full"], data=str(tmp_path), out=tmp_path / "run", variant=variant, steps=2, batch=2, workers=0, device="cpu", embed=6
    )
    training.train(cfg)
    (tmp_path / "val/red").mkdir(parents=True)
    (tmp_path / "val/red/0.png").write_bytes(jpeg("red"))
    weights = tmp_path / f"run/{variant}/0/step-00000002.safetensors"
    assert evaluation.evaluate_published(replace(cfg, weights=weights)) == {"images": 1, "top1": 100}


def test_half_precision_meets_only_the_products():
    """The scores of bfloat16 tokens are those of the rounded tokens, up to the rounding of the products."""
    image, text, mask = (t.bfloat16() if t.is_floating_point() else t for t in tokens())
    exact = similarities(image.double(), text.double(), mask)
    for rough, fine in zip(similarities(image, text, mask), exact, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough.double(), fine, rtol=0, atol=2**-9)


def test_claims_are_not_judged_on_other_data():
    with pytest.raises(UserError, match="without --data"):
        evaluation.evaluate(replace(training.SCALES["small"], data="x"))
