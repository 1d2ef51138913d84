"""Video-CCAM against the authors' evaluation code (goldens), loops over queries and frames, transformers' SigLIP, and files in published layouts."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from common.attention import controlled
from common.backbones.llama import Llama, LlamaConfig
from common.backbones.pretrained import read_config
from common.errors import UserError
from common.video import fps_indices, uniform_indices, write_video
from papers.video_ccam import eval as evaluation
from papers.video_ccam import model as ccam
from papers.video_ccam import train as training
from papers.video_ccam.model import (
    IGNORED,
    PLACEHOLDER,
    CCAMProjector,
    NaiveProjector,
    PatchEncoder,
    PooledProjector,
    ProjectorConfig,
    SiglipConfig,
    TimedProjector,
    VideoCCAM,
    frame_mask,
    last_frames,
)
from tests.controls import Identity, Record
from tests.goldens import cases

CASES = cases("video_ccam")
SMALL = ProjectorConfig(8, 12, 10, 3, 3, 20, 16, dropout=0.0)
LLAMA = LlamaConfig(23, 16, 20, 1, 2)

# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.meta["cases"], dict)], ids=lambda c: c.name)
def test_golden_uniform_and_fps(case):
    for want in case.meta["cases"]["uniform"]:
        assert uniform_indices(want["total_frames"], want["num_frames"]) == case.tensors[want["key"]].tolist()
    for want in case.meta["cases"]["fps"]:
        most = want["max_num_frames"] if want["max_num_frames"] > 0 else None
        assert fps_indices(want["total_frames"], want["input_fps"], want["output_fps"], most) == case.tensors[want["key"]].tolist()


@pytest.mark.parametrize("case", [c for c in CASES if "check_answer" in c.meta], ids=lambda c: c.name)
def test_golden_mvbench(case):
    for want in case.meta["cases"]:
        bound = tuple(want["bound"]) if want["bound"] else None
        found = ccam.middle_indices(want["max_frame"], want["fps"], want["num_frames"], bound, want["first_idx"])
        assert found == case.tensors[want["key"]].tolist()
    for want in case.meta["check_answer"]:
        assert ccam.is_right(want["predict"], want["answer"]) == want["correct"], want


# ---- the mask ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "frames"), [(16, 8), (16, 16), (16, 48), (16, 1), (7, 3), (5, 12), (1024, 96), (1, 4)])
def test_the_staircase_by_loops(queries, frames):
    """ceil(i T / N) with exact fractions; every query sees the first frame, the last sees all, and equal steps where N is a multiple of T."""
    mask = frame_mask(last_frames(torch.tensor([frames]), queries), frames, 2)[0]
    assert mask.shape == (queries, 2 * frames)
    for i in range(1, queries + 1):
        seen = next(t for t in range(frames + 1) if t * queries >= i * frames)
        assert mask[i - 1].tolist() == [t <= seen for t in range(1, frames + 1) for _ in range(2)]
    assert mask[:, :2].all() and mask[-1].all()
    if queries % frames == 0:
        assert torch.equal(mask[:, ::2].sum(1).bincount()[1:], torch.full((frames,), queries // frames))


def test_an_image_is_seen_whole():
    assert frame_mask(last_frames(torch.tensor([1]), 9), 1, 5).all()


def test_padding_is_never_seen():
    mask = frame_mask(last_frames(torch.tensor([2, 5]), 4), 5, 3)
    assert not mask[0, :, 6:].any() and mask[1, -1].all()


# ---- the projector ----------------------------------------------------------------------------------------------------------------------


def projector(kind=CCAMProjector, c: ProjectorConfig = SMALL) -> CCAMProjector:
    torch.manual_seed(0)
    made = kind(c).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def tokens(frames: int, batch: int = 1, per_frame: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, frames, per_frame, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(p: CCAMProjector, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    """The docstring's equations query by query and head by head; x: one video."""
    norm = lambda layer, value: F.layer_norm(value, value.shape[-1:], layer.weight, layer.bias, layer.eps)
    a, out = p.attention, []
    for i, frames in enumerate(seen):
        context = norm(p.context_norm, x[:frames].flatten(0, 1))
        q, k, v = a.q_proj(norm(p.query_norm, p.query[i])), a.k_proj(context), a.v_proj(context)
        heads = []
        for h in range(3):
            cut = slice(4 * h, 4 * h + 4)
            weights = torch.exp(k[:, cut] @ q[cut] / 2)
            heads.append(weights @ v[:, cut] / weights.sum())
        h = p.query[i] + a.out_proj(torch.cat(heads))
        u = norm(p.mlp_norm, h)
        h = h + p.mlp.fc2(F.silu(p.mlp.fc1_g(u)) * p.mlp.fc1_x(u))
        out.append(p.output(norm(p.output_norm, h)))
    return torch.stack(out)


@pytest.mark.parametrize(("kind", "seen"), [(CCAMProjector, [1, 2, 2, 3, 4, 4, 5, 5]), (NaiveProjector, [5] * 8)])
def test_equations_by_hand(kind, seen):
    p, x = projector(kind), tokens(5)
    torch.testing.assert_close(p(x, torch.tensor([5])), by_hand(p, x[0], seen)[None], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frames", [3, 8, 20])
def test_a_query_depends_on_its_own_frames_alone(frames):
    p, x = projector(), tokens(frames)
    z, seen = p(x, torch.tensor([frames]))[0], last_frames(torch.tensor([frames]), 8)[0]
    for t in range(1, frames + 1):
        other = x.clone()
        other[0, t - 1] = torch.randn(3, 10, dtype=torch.float64)
        changed = (p(other, torch.tensor([frames]))[0] - z).abs().amax(1) > 1e-9
        assert changed.tolist() == (seen >= t).tolist()


def test_without_a_mask_the_order_of_frames_is_nothing():
    x, order = tokens(6), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled, frames = x[:, order], torch.tensor([6])
    for kind, sees in ((NaiveProjector, False), (CCAMProjector, True), (TimedProjector, True), (PooledProjector, True)):
        p = projector(kind)
        assert torch.allclose(p(x, frames), p(shuffled, frames), rtol=1e-9, atol=1e-9) != sees, kind.__name__


def test_tokens_of_a_frame_have_no_order():
    x, p = tokens(4), projector()
    torch.testing.assert_close(p(x.flip(2), torch.tensor([4])), p(x, torch.tensor([4])))


@pytest.mark.parametrize("kind", [CCAMProjector, NaiveProjector, TimedProjector, PooledProjector])
def test_a_padded_batch_equals_single_runs(kind):
    p, x, frames = projector(kind), tokens(7, batch=3), torch.tensor([7, 1, 4])
    together = p(x, frames)
    assert together.shape == (3, 8, 16)
    for i, t in enumerate(frames.tolist()):
        torch.testing.assert_close(together[i : i + 1], p(x[i : i + 1, :t], frames[i : i + 1]), rtol=1e-10, atol=1e-10)


def test_repeating_every_frame_changes_nothing():
    """The average over a share of the video, which is why more frames need no training: here N/T is whole before and after."""
    p, x = projector(), tokens(4)
    torch.testing.assert_close(p(x.repeat_interleave(2, 1), torch.tensor([8]))[:, 1::2], p(x, torch.tensor([4]))[:, 1::2])


def test_pooling_averages_equal_stretches_in_order():
    p, x = projector(PooledProjector), tokens(4, per_frame=4)
    means = x[0].reshape(8, 2, 10).mean(1)
    h = p.input(means)
    h = h + p.mlp(p.mlp_norm(h))
    torch.testing.assert_close(p(x, torch.tensor([4]))[0], p.output(p.output_norm(h)))


def test_a_control_sees_the_attention():
    p, x, frames = projector(), tokens(4), torch.tensor([4])
    with controlled(p, Identity()) as identity:
        torch.testing.assert_close(p(x, frames), p(x, frames))
    assert {stage for stage, _ in identity.calls} == {"hidden", "context", "qkv", "logits", "weights", "heads", "output"}
    with controlled(p, Record()) as record:
        p(x, frames)
    assert record.maps[0].shape == (1, 3, 8, 12)
    assert torch.equal(record.maps[0][0, 0] > 0, frame_mask(last_frames(frames, 8), 4, 3)[0])


def test_the_published_size():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in CCAMProjector(ProjectorConfig()).state_dict().items()}
    assert shapes["query"] == (1024, 1024) and shapes["attention.k_proj.weight"] == (1024, 1152) and shapes["attention.k_proj.bias"] == (1024,)
    assert shapes["mlp.fc1_g.weight"] == (4096, 1024) and shapes["mlp.fc2.weight"] == (1024, 4096) and shapes["output.weight"] == (3584, 1024)
    with pytest.raises(UserError, match="hidden_act = 'gelu' is not supported"):
        ProjectorConfig(hidden_act="gelu")


# ---- the model --------------------------------------------------------------------------------------------------------------------------


def small_model(chunk: int = 1024) -> VideoCCAM:
    torch.manual_seed(0)
    model = VideoCCAM(PatchEncoder(10, 8, 4), CCAMProjector(SMALL), Llama(LLAMA), chunk).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_z_stands_in_the_place_of_the_video():
    model, z = small_model(), torch.randn(2, 8, 16, dtype=torch.float64)
    x = model.embed(torch.tensor([[3, 4, PLACEHOLDER, 5], [6, 7, PLACEHOLDER, 8]]), z)
    table = model.language_model.model.embed_tokens.weight
    for row, (before, after) in enumerate((([3, 4], [5]), ([6, 7], [8]))):
        torch.testing.assert_close(x[row], torch.cat([table[before], z[row], table[after]]))


@pytest.mark.parametrize("prompt", [[[1, 2], [1, 2]], [[PLACEHOLDER, 1], [1, PLACEHOLDER]], [[PLACEHOLDER] * 2] * 2, [[PLACEHOLDER, 1], [1, 1]]])
def test_one_video_a_prompt(prompt):
    with pytest.raises(ValueError, match="one PLACEHOLDER"):
        small_model().embed(torch.tensor(prompt), torch.zeros(2, 8, 16, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_frames_are_encoded_alone_and_padding_not_at_all(chunk):
    model, video, frames = small_model(chunk), torch.randn(3, 5, 3, 8, 8, dtype=torch.float64), torch.tensor([2, 5, 1])
    video[0, 2:] = video[2, 1:] = torch.nan
    x = model.encode(video, frames)
    assert x.shape == (3, 5, 4, 10)
    for i, t in enumerate(frames.tolist()):
        torch.testing.assert_close(x[i, :t], model.encoder(video[i, :t]))
        assert not x[i, t:].any()


def test_the_loss_is_that_of_the_labelled_tokens():
    model, video, frames = small_model(), torch.randn(2, 3, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 2])
    prompt = torch.tensor([[1, PLACEHOLDER, 2, 9, 4], [1, PLACEHOLDER, 3, 8, 7]])
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED, 9, 4], [IGNORED, IGNORED, IGNORED, 8, IGNORED]])
    logp = model(video, frames, prompt).log_softmax(-1)  # places: 1, eight of z, then three words; a token is told at the place before it
    expected = -(logp[0, 9, 9] + logp[0, 10, 4] + logp[1, 9, 8]) / 3
    torch.testing.assert_close(model.loss(video, frames, prompt, labels), expected)


def test_greedy_answers_follow_the_logits():
    model, words = small_model(), word_tokenizer()
    video, question = torch.randn(3, 3, 8, 8, dtype=torch.float64), "Question: red"
    said = model.answer(words, video, question, most=1)
    prompt = torch.tensor([ccam.chat(words, [(question, "")])[0]])
    assert words.encode(said).ids == [int(model(video[None], torch.tensor([3]), prompt)[0, -1].argmax())]


def test_other_answers_than_the_goldens():
    assert ccam.is_right("(d)", "(D) up") and ccam.is_right("The answer is (b) the cat.", "(B) the cat")
    assert not ccam.is_right("  ", "(A) a") and not ccam.is_right("C", "(A) c")


# ---- clips and questions ----------------------------------------------------------------------------------------------------------------


def hues(video: torch.Tensor) -> torch.Tensor:
    """The colour of which most pixels of each frame are."""
    paint = 255 * torch.tensor(list(training.COLOURS.values()))
    near = (video.float()[:, :, None] - paint[None, None, :, :, None, None]).abs().amax(3) < 25
    return near.sum((-1, -2)).argmax(-1)


def test_the_frames_show_the_colours_of_their_segments():
    clips = training.order_clips(5, range(40), 16, 32)
    assert torch.equal(hues(clips.video), clips.colours.gather(1, clips.segments))
    assert (clips.segments.diff(dim=1) >= 0).all() and torch.equal(clips.segments[:, [0, -1]], torch.tensor([[0, 2]]).expand(40, 2))
    assert all(len(set(row)) == 3 for row in clips.colours.tolist())
    again = training.order_clips(5, [7], 16, 32)
    assert torch.equal(again.video[0], clips.video[7])


def test_sampling_8_of_48_frames_meets_every_segment_and_no_blip():
    order, blip = (training.order_clips(6, range(60), 48, 32, blip=b).segments for b in (False, True))
    sampled = uniform_indices(48, 8)
    assert all(set(row.tolist()) == {0, 1, 2} for row in order[:, sampled])
    assert all(set(row.tolist()) == {0, 2} for row in blip[:, sampled])
    brief = (blip == 1).sum(1)
    assert set(brief.tolist()) == {2, 3, 4}


def test_answers_by_hand():
    colours = torch.tensor([[2, 0, 5]]).expand(7, 3)  # blue, red, cyan
    prompt, answer = training.ask(colours, torch.arange(7))
    words = [[training.WORDS[i] for i in row] + [training.WORDS[a]] for row, a in zip(prompt[:, 1:].tolist(), answer.tolist(), strict=True)]
    assert words == [
        ["first", "?", "blue"], ["second", "?", "red"], ["last", "?", "cyan"], ["after", "blue", "red"], ["after", "red", "cyan"],
        ["before", "red", "blue"], ["before", "cyan", "red"],
    ]  # fmt: skip
    assert (prompt[:, 0] == PLACEHOLDER).all()


def test_questions_about_images_by_hand():
    images = training.order_clips(3, range(12), 1, 32)
    for shape, words in ((0, list(training.COLOURS)), (1, training.SHAPES)):
        _, answer = training.ask_image(images, torch.full((12,), shape))
        expected = hues(images.video)[:, 0] if shape == 0 else images.shapes[:, 0]
        assert [training.WORDS[a] for a in answer] == [words[i] for i in expected]


def test_a_set_of_frames_answers_no_better_than_stated():
    """Who knows the three colours and the one in the question, but not the order, picks among two or three equally likely ones."""
    asked = {kind: [named is not None for k, named, _ in training.QUESTIONS if k == kind] for kind in training.KINDS}
    for kind, named in asked.items():
        assert evaluation.IN_A_SET[kind] == 1 / (2 if all(named) else 3)
    counts = torch.tensor(training.SHARES).sum()
    assert counts.item() == pytest.approx(1)


def test_batches_are_functions_of_the_index():
    data = training.ClipsAndImages(training.SCALES["smoke"], 0)
    one, two = data.batch(torch.tensor([4, 9, 2, 8])), data.batch(torch.tensor([4, 1, 0, 8]))
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        assert torch.equal(a[0], b[0]), i
    assert one[0].shape == (4, 8, 3, 32, 32) and one[3].shape == (2, 1, 3, 32, 32)


def test_films_are_read_from_files(tmp_path):
    cfg = replace(training.SCALES["smoke"], out=tmp_path, test_clips=2)
    film = evaluation.Film(cfg, "order", 11)
    drawn = training.order_clips(11, [0, 1], 48, 32)
    assert (film.video[48].float() - drawn.video.float()).abs().mean() < 2
    assert torch.equal(film.video[8], film.video[48][:, uniform_indices(48, 8)])
    assert torch.equal(hues(film.video[16]), drawn.colours.gather(1, drawn.segments)[:, uniform_indices(48, 16)])
    (tmp_path / "clips/order/00001.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="00001.mp4"):
        evaluation.read_video(tmp_path / "clips/order/00001.mp4", num=8)


def test_the_answers_that_are_counted():
    """A model that always says red is right where red is the answer."""
    model = small_model()
    model.language_model.model.norm.weight.data.zero_()
    z, prompt = torch.zeros(3, 8, 16, dtype=torch.float64), torch.tensor([[PLACEHOLDER, 1, 2]] * 3)
    assert evaluation.answered(model, z, prompt, torch.tensor([0, 0, 4])) == pytest.approx(2 / 3)  # equal logits: the first token


def test_claims_are_not_judged_on_other_data():
    with pytest.raises(UserError, match="without --data"):
        evaluation.evaluate(replace(training.SCALES["small"], data="x"))


# ---- published weights ------------------------------------------------------------------------------------------------------------------

PHRASES = ["<|im_start|>user", "<|im_end|>", "<|im_start|>assistant", "A", "B", "red", "blue", "Question:", "[UNK]"]
VISION = SiglipConfig(10, 16, 3, 2, 8, 4)


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(PHRASES)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def siglip_state(c: SiglipConfig = VISION) -> dict[str, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**asdict(c))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    siglip_state.model = model
    return {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in model.state_dict().items()}


def llama_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return Llama(LLAMA).state_dict()


NAMES = {  # a guess at the hub's names, one of many that PARTS allows
    "query": "query", "query_norm": "q_norm", "context_norm": "kv_norm", "attention.out_proj": "attn.o_proj", "mlp_norm": "mlp_norm",
    "mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc2": "mlp.down_proj", "output_norm": "norm", "output": "output_proj",
    **{f"attention.{p}_proj": f"attn.{p}_proj" for p in "qkv"},
}  # fmt: skip


def hub_name(name: str) -> str:
    part, _, leaf = name.rpartition(".") if name != "query" else (name, "", "")
    return NAMES[part] + (f".{leaf}" if leaf else "")


def projector_state() -> dict[str, torch.Tensor]:
    state = {hub_name(name): t.float() for name, t in projector().state_dict().items()}
    return state | {"query": state["query"][None]}


def save(directory: Path, state: dict[str, torch.Tensor], config: dict, name: str = "model.safetensors") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state.items()}, directory / name)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(tmp_path) -> Path:
    """v1.2's layout: shards and one configuration."""
    root = tmp_path / "hub"
    config = {"projector_config": asdict(SMALL), "vision_config": asdict(VISION), "llm_config": llama_config()}
    save(root, {f"llm.{n}": t for n, t in llama_state().items()}, config, "model-00001-of-00002.safetensors")
    rest = {f"vision_encoder.{n}": t for n, t in siglip_state().items()} | {f"projector.{n}": t for n, t in projector_state().items()}
    save(root, rest, config, "model-00002-of-00002.safetensors")
    word_tokenizer().save(str(root / "tokenizer.json"))
    return root


def llama_config() -> dict:
    return {k: v for k, v in asdict(LLAMA).items() if v is not None}


def bases(root: Path) -> tuple[Path, Path]:
    save(root / "siglip", siglip_state(), {"vision_config": asdict(VISION)})
    save(root / "llm", llama_state(), llama_config())
    word_tokenizer().save(str(root / "llm/tokenizer.json"))
    return root / "siglip", root / "llm"


def check_loaded(model: VideoCCAM) -> None:
    expected = projector().float()
    x, frames = tokens(4).float(), torch.tensor([4])
    torch.testing.assert_close(model.projector(x, frames), expected(x, frames))
    ids = torch.tensor([[3, 1, 7]])
    reference = Llama(LLAMA)
    reference.load_state_dict(llama_state())
    torch.testing.assert_close(model.language_model(ids), reference(ids))


@torch.no_grad()
def test_a_hub_directory_loads_and_its_encoder_is_siglip(hub, capsys):
    model = ccam.load_published(hub)
    check_loaded(model)
    assert "attention.k_proj.weight <- projector.attn.k_proj.weight" in capsys.readouterr().out
    pixels = torch.randn(2, 3, 8, 8)
    theirs = siglip_state.model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.encoder(pixels), theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_load_onto_their_bases(tmp_path):
    encoder, llm = bases(tmp_path)
    root = tmp_path / "v1.0"
    save(root / "projector", projector_state(), asdict(SMALL))
    with pytest.raises(UserError, match="--encoder of SigLIP"):
        ccam.load_published(root)
    check_loaded(ccam.load_published(root, encoder, llm))
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    name = "model.layers.0.self_attn.q_proj"
    adapter = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save(root / "llm_adapter", adapter, {}, "adapter_model.safetensors")
    (root / "llm_adapter/adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    loaded = ccam.load_published(root, encoder, llm).language_model.state_dict()
    torch.testing.assert_close(loaded[f"{name}.weight"], llama_state()[f"{name}.weight"] + 3 * b @ a)
    adapter = {name.replace("layers.0", "layers.9"): t for name, t in adapter.items()}
    save(root / "llm_adapter", adapter, {}, "adapter_model.safetensors")
    with pytest.raises(UserError, match="which the base model lacks"):
        ccam.load_published(root, encoder, llm)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("q_norm.bias"), "query_norm.bias .* <- nothing"),
        (lambda s: s.update({"extra.weight": torch.zeros(2, 2)}), r"left over: extra.weight \(2, 2\)"),
        (lambda s: s.update({"query": torch.zeros(1, 9, 12)}), r"query \(8, 12\) <- nothing"),
        (lambda s: s.update({"other.q_norm.bias": torch.zeros(12)}), "query_norm.bias .* <- q_norm.bias, other.q_norm.bias"),
    ],
)
def test_an_ambiguous_projector_is_refused_with_the_table(edit, message):
    state = projector_state()
    edit(state)
    with pytest.raises(UserError, match=message):
        ccam.match_projector(projector().state_dict(), state)


def test_hostile_weights(tmp_path, hub):
    with pytest.raises(UserError, match="has no config.json"):
        ccam.load_published(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        ccam.load_published(tmp_path)
    shard = hub / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        ccam.load_published(hub)
    shard.unlink()
    with pytest.raises(UserError, match="no SigLIP encoder"):
        ccam.load_published(hub)
    (hub / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid json"):
        ccam.load_published(hub)


# ---- benchmarks -------------------------------------------------------------------------------------------------------------------------


def write_clip(path: Path, colour: str = "red", frames: int = 12) -> None:
    paint = torch.tensor({"red": (230, 20, 20), "blue": (20, 20, 230)}[colour], dtype=torch.uint8)
    write_video(path, paint.expand(frames, 64, 64, 3).contiguous())


def write_json(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


CHOICE = {"question": "What colour?", "candidates": ["red", "blue"], "answer": "blue"}


def mvbench(root: Path) -> Path:
    write_json(root / "json/action_sequence.json", [CHOICE | {"video": "a.mp4", "start": 0.5, "end": 1.0}])
    write_clip(root / "video/star/Charades_v1_480/a.mp4")
    write_json(root / "json/episodic_reasoning.json", [CHOICE | {"video": "show", "start": 0, "end": 2}])
    (root / "video/tvqa/frames_fps3_hq/show").mkdir(parents=True)
    for i in range(1, 10):
        Image.new("RGB", (20, 12), (20 * i, 0, 0)).save(root / f"video/tvqa/frames_fps3_hq/show/{i:05}.jpg", quality=95)
    return root


def mlvu(root: Path) -> Path:
    write_json(root / "json/1_plotQA.json", [CHOICE | {"video": "a.mp4", "duration": 1.5, "question_type": "plotQA"}])
    write_json(root / "json/9_summary.json", [{"video": "b.mp4", "question": "Summarise.", "answer": "free words"}])
    write_clip(root / "video/1_plotQA/a.mp4")
    return root


def videomme(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    (root / "videomme").mkdir(parents=True)
    row = {"duration": "short", "videoID": "xyz", "question": "What colour?", "options": ["A. red", "B. blue", "C. a. b", "D. no"], "answer": "B"}
    write_table(pa.Table.from_pylist([row]), root / "videomme/test-00000-of-00001.parquet")
    write_clip(root / "video/xyz.mp4")
    return root


@pytest.mark.parametrize(("make", "tasks"), [(mvbench, ["action_sequence", "episodic_reasoning"]), (mlvu, ["1_plotQA"]), (videomme, ["short"])])
def test_a_benchmark_in_its_published_layout(make, tasks, tmp_path, hub):
    root = make(tmp_path / "data")
    found = evaluation.items(root, make.__name__)
    assert [item.task for item in found] == tasks
    assert all(item.candidates[item.answer] == "blue" and item.video.exists() for item in found)
    cfg = replace(training.SCALES["full"], data=str(root), weights=hub, benchmark=make.__name__, test_frames=4, size=8, device="cpu")
    scores = evaluation.evaluate_published(cfg)
    assert set(scores) == {*tasks, "mean of tasks", "questions"} and scores["questions"] == len(tasks)
    assert all(scores[task] in (0, 100) for task in tasks)


def test_what_the_model_says_is_judged(tmp_path, hub, monkeypatch):
    root, asked = mvbench(tmp_path / "data"), []
    cfg = replace(training.SCALES["full"], data=str(root), weights=hub, test_frames=4, size=8, device="cpu")
    for said, right in (("(B) blue", 100), ("Answer: A", 0)):
        monkeypatch.setattr(VideoCCAM, "answer", lambda self, words, video, question, said=said: asked.append((video, question)) or said)
        assert evaluation.evaluate_published(cfg)["mean of tasks"] == right
    assert asked[0][0].shape == (4, 3, 8, 8) and asked[0][0].abs().max() <= 1
    assert asked[0][1] == "Question: What colour?\nOptions:\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
    (root / "video/star/Charades_v1_480/a.mp4").write_bytes(b"broken")
    monkeypatch.setattr(VideoCCAM, "answer", lambda *_: "B")
    with pytest.warns(UserWarning, match="a.mp4.*counted as a wrong answer"):
        scores = evaluation.evaluate_published(cfg)
    assert scores["action_sequence"] == 0 and scores["episodic_reasoning"] == 100


def test_frames_of_a_folder_count_from_one(tmp_path):
    root = mvbench(tmp_path)
    item = evaluation.items(root, "mvbench")[1]
    frames = evaluation.frames_of(item, 3, middles=True)
    assert frames.shape == (3, 12, 20, 3)
    chosen = (frames[:, 0, 0, 0].float() / 20).round().int().tolist()
    assert chosen == ccam.middle_indices(9, 3, 3, (0, 2), first=1) == [1, 3, 4]
    bounded = evaluation.frames_of(replace(evaluation.items(root, "mvbench")[0]), 2, middles=True)
    assert bounded.shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
    ("name", "content", "benchmark", "message"),
    [
        (None, None, "mvbench", "holds no questions of mvbench"),
        (None, None, "quiz", "take one of mvbench, mlvu, videomme"),
        ("json/new_task.json", [CHOICE | {"video": "a.mp4"}], "mvbench", "not mvbench in its published layout .*new_task"),
        ("json/action_count.json", [{"video": "a.mp4"}], "mvbench", "not mvbench"),
        ("json/1_plotQA.json", [CHOICE | {"answer": "green", "video": "a"}], "mlvu", "not mlvu"),
        ("json/1_plotQA.json", {"a": 1}, "mlvu", "holds no questions of mlvu"),
    ],
)
def test_a_wrong_layout(name, content, benchmark, message, tmp_path):
    if name:
        write_json(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        evaluation.items(tmp_path, benchmark)


def test_video_mme_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        evaluation.items(tmp_path, "videomme")


# ---- training on instructions -----------------------------------------------------------------------------------------------------------


def instructions(root: Path) -> Path:
    talk = [{"from": "human", "value": "<video>\nQuestion: red"}, {"from": "gpt", "value": "A blue"}]
    write_json(root / "mix.json", [{"video": "a.mp4", "conversations": talk}, {"image": "b.png", "conversations": talk * 2}])
    write_clip(root / "a.mp4")
    Image.new("RGB", (30, 20), "blue").save(root / "b.png")
    return root


def test_chats_and_their_labels():
    ids, labels = ccam.chat(word_tokenizer(), [("red", "A"), ("blue", "B"), ("red", "")])
    user, end, assistant, unknown = (PHRASES.index(word) for word in ("<|im_start|>user", "<|im_end|>", "<|im_start|>assistant", "[UNK]"))
    assert ids.count(PLACEHOLDER) == 1 and ids[:2] == [user, PLACEHOLDER] and ids[-1] == assistant
    learnt = [label for label in labels if label != IGNORED]
    assert len(learnt) == 2 and all(label == ids[i] for i, label in enumerate(labels) if label != IGNORED)
    assert set(learnt) == {unknown} and end not in ids  # this tokenizer splits at blanks alone, "A<|im_end|>" is one word


def test_instructions_in_llava_s_form(tmp_path):
    cfg = replace(training.SCALES["full"], size=8, frames=4, context=12)
    data = training.Instructions(instructions(tmp_path), word_tokenizer(), cfg)
    (video, t, prompt, labels), (image, one, *_) = data[0], data[1]
    assert (len(data), t, one) == (2, 4, 1) and video.shape == image.shape == (4, 3, 8, 8) and not image[1:].any()
    assert prompt.shape == labels.shape == (12,) and (prompt == PLACEHOLDER).sum() == 1
    assert (video[:, 0] > 200).all() and (image[0, 2] > 200).all()
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png does not exist"):
        data[1]


@pytest.mark.parametrize(
    "content", [[], [{"image": "b.png"}], [{"conversations": []}], {"a": 1}, [{"image": "b", "conversations": [{"value": "x"}]}]]
)
def test_bad_instructions(content, tmp_path):
    write_json(tmp_path / "mix.json", content)
    with pytest.raises(UserError, match="has no rows|is no list of rows"):
        training.Instructions(tmp_path, word_tokenizer(), training.SCALES["full"])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_trains_what_it_says_and_leaves_weights_that_are_evaluated(stage, tmp_path, monkeypatch):
    encoder, llm = bases(tmp_path)
    monkeypatch.setattr(ccam, "read_config", lambda cls, given: read_config(cls, (asdict(SMALL) if cls is ProjectorConfig else {}) | given))
    cfg = replace(
        training.SCALES["full"], data=str(instructions(tmp_path / "data")), out=tmp_path / "run", steps=2, batch=2, accumulate=1, workers=0,
        device="cpu", precision="fp32", size=8, frames=4, context=12, encoder=str(encoder), llm=str(llm), stage=stage, lr=0.01,
    )  # fmt: skip
    training.train(cfg)
    trained = training.load_weights(training.full_model(cfg), tmp_path / f"run/stage_{stage}/0/step-00000002.safetensors").state_dict()
    before = training.full_model(cfg).state_dict()
    moved = {name.split(".")[0] for name, t in trained.items() if not torch.equal(t, before[name])}
    assert moved - {"projector"} == ({"language_model"} if stage == 2 else set()) and "projector" in moved
    weights = tmp_path / f"run/stage_{stage}/0/step-00000002.safetensors"
    found = evaluation.evaluate_published(replace(cfg, data=str(mvbench(tmp_path / "bench")), weights=weights, test_frames=4))
    assert found["questions"] == 2


def test_base_models_are_asked_for():
    with pytest.raises(UserError, match="--encoder of SigLIP"):
        training.full_model(training.SCALES["full"])
