"""Measure the claims on clips read from mp4 files, the cost of long videos, and published models on MVBench, MLVU and Video-MME."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from common import gpu
from common.attention import controlled
from common.backbones.llama import Llama, LlamaConfig
from common.errors import UserError
from common.loop import load_run
from common.pictures import as_png, from_png
from common.results import Measured, content_hash
from common.video import VideoError, read_video, safe_scale, write_video
from papers.video_ccam import model as ccam
from papers.video_ccam.model import CCAMProjector, ProjectorConfig, VideoCCAM, frame_mask, last_frames, normalized, tokenizer_of
from papers.video_ccam.train import KINDS, QUESTIONS, TEST, VARIANTS, Clips, Config, ask, ask_image, build, full_model, order_clips

IN_A_SET = {
    "first": 1 / 3,
    "second": 1 / 3,
    "last": 1 / 3,
    "after": 1 / 2,
    "before": 1 / 2,
}  # best accuracy of who knows the colours, not their order
BLIP = [i for i, (_, _, asked) in enumerate(QUESTIONS) if asked == 1]  # the questions about the second segment


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; for a benchmark give a model: `just eval video_ccam --weights DIR --data DIR`")
    order, blip = Film(cfg, "order", TEST), Film(cfg, "blip", TEST + 1)
    images = order_clips(TEST + 2, range(2 * cfg.test_clips), 1, cfg.size)
    models = {variant: [load_run(build(cfg, variant), cfg, f"{variant}/{seed}") for seed in cfg.seeds] for variant in VARIANTS}
    found = {v: [quality(model, order, blip, images, cfg.lengths) for model in models[v]] for v in models if v != "images"}
    alone = [image_accuracy(model, images) for model in models["images"]]
    get = lambda variant, name, length: [run[name][str(length)] for run in found[variant]]
    gain = lambda a, b: [100 * (x - y) for x, y in zip(a, b, strict=True)]
    short, long = cfg.lengths[0], cfg.lengths[-1]
    moved = {variant: [shuffled_change(model, order, short) for model in models[variant]] for variant in ("naive", "ccam")}
    operations = (cost := long_cost(cfg))["operations"]
    values = {
        "C1": moved["naive"],
        "C1b": moved["ccam"],
        "C1c": gain(get("ccam", "order", short), get("naive", "order", short)),
        "C2": gain(get("ccam", "order", long), get("ccam", "order", short)),
        "C2b": gain(get("ccam", "blip", long), get("ccam", "blip", short)),
        "C4": cost["prefill"]["96"] / cost["prefill"]["16"],
        "C4b": cost["concat"]["96"] / cost["ccam"]["96"],
        "C4c": (operations["96"] - operations["64"]) / (operations["64"] - operations["32"]),
        "C5": gain(get("ccam", "order", long), get("pooled", "order", long)),
        "C7": gain([fmean(run["image"].values()) for run in found["ccam"]], [fmean(run.values()) for run in alone]),
    }
    details = {
        "quality": found,
        "images_alone": alone,
        "lengths": list(cfg.lengths),
        "size": cfg.size,
        "in_a_set": IN_A_SET,
        "cost": cost,
        "mask": frame_mask(last_frames(torch.tensor([short]), cfg.queries), short, 1)[0].int().tolist(),
        "maps": {v: attention_map(models[v][0], order, short) for v in ("ccam", "naive")},
        "strip": as_png(rearrange(order.video[short][0], "t c h w -> (t h) w c").numpy()),
    }
    return Measured(values, details, {"order clips": order.hash, "blip clips": blip.hash, "images": content_hash(images.video)})


# ---- quality ----------------------------------------------------------------------------------------------------------------------------


class Film:
    """Test clips, written to mp4 files and read back by decord: `video` has the uniformly sampled frames by their number."""

    def __init__(self, cfg: Config, name: str, seed: int):
        drawn = [order_clips(seed, [i], cfg.lengths[-1], cfg.size, blip=name == "blip") for i in range(cfg.test_clips)]
        self.colours, self.hash = torch.cat([clip.colours for clip in drawn]), content_hash(*(clip.video for clip in drawn))
        files = [Path(cfg.out) / f"clips/{name}/{i:05}.mp4" for i in range(cfg.test_clips)]
        for file, clip in zip(files, drawn, strict=True):
            write_video(file, clip.video[0].permute(0, 2, 3, 1), scale=safe_scale(cfg.size))
        read = lambda frames: torch.stack([read_video(file, num=frames, size=cfg.size) for file in files])
        self.video: dict[int, UInt8[Tensor, "n T 3 S S"]] = {frames: read(frames).permute(0, 1, 4, 2, 3) for frames in cfg.lengths}


@torch.inference_mode()
def visual_tokens(model: VideoCCAM, video: UInt8[Tensor, "n T 3 S S"]) -> Float[Tensor, "n N D"]:
    """z, a few clips at a time."""
    on = next(model.parameters()).device
    parts = [normalized(part.to(on)) for part in video.split(50)]
    return torch.cat([model.visual(part, torch.full((len(part),), part.shape[1], device=on)) for part in parts])


@torch.inference_mode()
def answered(model: VideoCCAM, z: Float[Tensor, "n N D"], prompt: Int[Tensor, "n 3"], answer: Int[Tensor, "n"]) -> float:
    """The share of right answers: the likeliest token is the answer."""
    logits = model.language_model(model.embed(prompt.to(z.device), z))[:, -1]
    return (logits.argmax(-1).cpu() == answer).double().mean().item()


def asked(model: VideoCCAM, film: Film, frames: int, questions: list[int]) -> dict[str, float]:
    """Accuracy by kind of question."""
    z = visual_tokens(model, film.video[frames])
    right = {i: answered(model, z, *ask(film.colours, torch.full((len(z),), i))) for i in questions}
    return {kind: fmean(right[i] for i in questions if QUESTIONS[i][0] == kind) for kind in dict.fromkeys(QUESTIONS[i][0] for i in questions)}


def image_accuracy(model: VideoCCAM, images: Clips) -> dict[str, float]:
    """Of colours and of shapes, for videos of one frame."""
    z = visual_tokens(model, images.video)
    return {name: answered(model, z, *ask_image(images, torch.full((len(z),), i))) for i, name in enumerate(("colour", "shape"))}


def quality(model: VideoCCAM, order: Film, blip: Film, images: Clips, lengths: tuple[int, ...]) -> dict[str, dict]:
    """Accuracy by number of frames, and by kind of question where they are about the order; kinds count the same."""
    kinds = {str(length): asked(model, order, length, list(range(len(QUESTIONS)))) for length in lengths}
    brief = {str(length): asked(model, blip, length, BLIP) for length in lengths}
    mean = lambda table: {length: fmean(row.values()) for length, row in table.items()}
    return {"order": mean(kinds), "kinds": kinds, "blip": mean(brief), "image": image_accuracy(model, images)}


@torch.inference_mode()
def shuffled_change(model: VideoCCAM, film: Film, frames: int) -> float:
    """The largest change of z when the frames of each clip are shuffled, over the deviation of z."""
    video = film.video[frames][:50]
    order = np.random.default_rng(0).permuted(np.tile(np.arange(frames), (len(video), 1)), axis=1)
    shuffled = video[torch.arange(len(video))[:, None], torch.from_numpy(order)]
    z = visual_tokens(model, video)
    return ((visual_tokens(model, shuffled) - z).abs().max() / z.std()).item()


class Watch:
    """Keeps the last attention weights."""

    def weights(self, site, p: Float[Tensor, "b h n m"]) -> None:
        self.p = p


@torch.inference_mode()
def attention_map(model: VideoCCAM, film: Film, frames: int) -> list[list[float]]:
    """Of the first clip, the mean over heads: queries x frames."""
    with controlled(model.projector, Watch()) as watch:
        visual_tokens(model, film.video[frames][:1])
    return watch.p[0].mean(0).unflatten(-1, (frames, -1)).sum(-1).tolist()


# ---- cost -------------------------------------------------------------------------------------------------------------------------------


def timed_parts(width: int, queries: int, tokens_width: int, layers: int = 4) -> tuple[CCAMProjector, nn.Module, Llama]:
    """Projector, LLaVA's MLP on every token, and a language model, of random weights."""
    heads = max(1, width // 64)
    c = ProjectorConfig(queries, width, tokens_width, heads, heads, 4 * width, width, dropout=0)
    llama = LlamaConfig(32, width, 2 * width, layers, heads)
    return CCAMProjector(c).eval(), nn.Sequential(nn.Linear(tokens_width, width), nn.GELU(), nn.Linear(width, width)).eval(), Llama(llama).eval()


@torch.inference_mode()
def long_cost(cfg: Config, lengths: tuple[int, ...] = (16, 32, 64, 96), tokens: int = 16, queries: int = 64, question: int = 8) -> dict[str, dict]:
    """Seconds up to the first token of an answer, from encoded frames of 16 tokens: with 64 queries, and with every token; and the language
    model's own with queries ("prefill"); peak bytes of the first two, and the projector's operations."""
    on = gpu.device(cfg)
    projector, mlp, llama = (part.to(on) for part in timed_parts(cfg.timed_dim, queries, cfg.timed_dim))
    words = torch.randn(1, question, cfg.timed_dim, device=on)
    read = lambda z: llama.model(torch.cat([z, words], 1))
    functions: dict[tuple[str, str], Callable] = {}
    for length in lengths:
        x, frames = torch.randn(1, length, tokens, cfg.timed_dim, device=on), torch.tensor([length], device=on)
        z = projector(x, frames)
        functions["ccam", str(length)] = lambda x=x, frames=frames: read(projector(x, frames))
        functions["concat", str(length)] = lambda x=x: read(mlp(x.flatten(1, 2)))
        functions["prefill", str(length)] = partial(read, z)
        functions["projector", str(length)] = partial(projector, x, frames)
    seconds = gpu.alternate(functions, cfg.repeats, seconds=0.03)
    found = {name: {str(n): seconds[name, str(n)] for n in lengths} for name in ("ccam", "concat", "prefill", "projector")}
    operations = {str(n): gpu.count_flops(functions["projector", str(n)]) for n in lengths}
    peak = {name: {str(n): gpu.peak_memory(functions[name, str(n)]) for n in lengths} for name in ("ccam", "concat")}
    return found | {"bytes": peak, "operations": operations}


def bench() -> dict:
    """Milliseconds to the first token and peak MB by frames, queries beside all tokens, on the CPU with one thread, and on a GPU if there is
    one; and of the published projector alone."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for on in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        cost = long_cost(Config(device=on))
        for name in ("ccam", "concat", "prefill"):
            found |= {f"{on}, {name}, {n} frames [ms]": 1e3 * s for n, s in cost[name].items()}
        for name, peak in cost["bytes"].items():
            found |= {f"{on}, {name}, {n} frames [MB]": b / 1e6 for n, b in peak.items()}
        projector = CCAMProjector(ProjectorConfig()).to(on).eval()
        read = torch.inference_mode()(lambda n, p=projector, on=on: p(torch.zeros(1, n, 729, 1152, device=on), torch.tensor([n], device=on)))
        times = gpu.alternate({f"{on}, projector of 7B-v1.2, {n} frames [ms]": partial(read, n) for n in (1, 16, 96)}, 3)
        found |= {name: 1e3 * s for name, s in times.items()}
    torch.set_num_threads(threads)
    return found


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

LABELS = {"ccam": "causal masks", "naive": "no mask", "timed": "no mask, frame numbers", "pooled": "mean pooling"}


def figure(details: dict) -> Figure:
    """A clip and what each query reads of it; what that is worth by length and kind of question; what length costs."""
    fig = Figure(figsize=(13, 7), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.1))
    strip, *maps = top.subplots(1, 4, width_ratios=(1.6, 1, 1, 1))
    lengths, found = details["lengths"], details["quality"]
    frames = from_png(details["strip"]).reshape(lengths[0], details["size"], details["size"], 3)
    rows = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    half = len(rows) // 2
    strip.imshow(np.concatenate([np.concatenate(list(part), 1) for part in (rows[:half], rows[half:])]))
    strip.set(xticks=[], yticks=[], title=f"A clip at {len(frames)} frames")
    pictures = {"The mask": details["mask"], "Weights with it": details["maps"]["ccam"], "Weights without": details["maps"]["naive"]}
    for axis, (title, picture) in zip(maps, pictures.items(), strict=True):
        axis.imshow(np.array(picture), cmap="viridis", aspect="auto", vmin=0)
        axis.set(title=title, xlabel="frame", ylabel="query")
    kinds, length, brief, cost = bottom.subplots(1, 4, width_ratios=(1.6, 1, 1, 1))
    for i, (variant, runs) in enumerate(found.items()):
        rows = np.array([[100 * run["kinds"][str(lengths[0])][kind] for kind in KINDS] for run in runs])
        kinds.bar(np.arange(len(KINDS)) + 0.2 * (i - 1.5), rows.mean(0), 0.19, color=f"C{i}", label=LABELS[variant])
        kinds.plot((np.arange(len(KINDS)) + 0.2 * (i - 1.5))[None].repeat(len(rows), 0), rows, "k.", markersize=2)
        for axis, name in ((length, "order"), (brief, "blip")):
            curve = [[100 * run[name][str(n)] for n in lengths] for run in runs]
            axis.plot(lengths, np.mean(curve, 0), f"C{i}o-", label=LABELS[variant])
            axis.plot(lengths, np.transpose(curve), f"C{i}.", markersize=3)
    for i, kind in enumerate(KINDS):
        kinds.plot([i - 0.42, i + 0.42], [100 * details["in_a_set"][kind]] * 2, "k--", linewidth=1, label="set of frames" if i == 0 else None)
    kinds.set_xticks(range(len(KINDS)), KINDS)
    kinds.set(ylabel="accuracy [%]", ylim=(0, 125), title=f"Order questions at {lengths[0]} frames; a dot per seed")
    kinds.legend(fontsize=7, ncols=2, loc="upper center")
    for axis, title in ((length, "Order questions"), (brief, f"Events that {lengths[0]} frames miss")):
        axis.set(xlabel="frames", title=title, ylim=(0, 105), xscale="log")
        axis.set_xticks(lengths, lengths, minor=False)
        axis.set_xticks([], minor=True)
    for name, label in (("concat", "all tokens"), ("ccam", "queries"), ("prefill", "of which language model")):
        seconds = details["cost"][name]
        cost.plot([int(n) for n in seconds], [1e3 * s for s in seconds.values()], "o-", label=label)
    cost.set(xlabel="frames", ylabel="milliseconds", title="To the first token of an answer", ylim=(0, None))
    cost.legend(fontsize=8, loc="upper left")
    return fig


# ---- published models -------------------------------------------------------------------------------------------------------------------

MVBENCH = {  # task -> folder of its videos, below root/video
    **dict.fromkeys(("action_sequence", "action_prediction", "object_interaction"), "star/Charades_v1_480"),
    **dict.fromkeys(("object_existence", "moving_direction", "moving_count", "moving_attribute"), "clevrer/video_validation"),
    **dict.fromkeys(("object_shuffle", "action_count", "state_change", "character_order"), "perception/videos"),
    "counterfactual_inference": "clevrer/video_validation", "action_antonym": "ssv2_video", "unexpected_action": "FunQA_test/test",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "action_localization": "sta/sta_video", "scene_transition": "scene_qa/video",
    "fine_grained_pose": "nturgbd", "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A multiple-choice question; bound: the seconds it is about."""

    task: str
    video: Path
    question: str
    candidates: list[str]
    answer: int
    bound: tuple[float, float] | None = None


def items(root: Path, benchmark: str) -> list[Item]:
    """The questions of a benchmark in its published layout. Raises UserError."""
    readers = {"mvbench": _mvbench, "mlvu": _mlvu, "videomme": _videomme}
    if benchmark not in readers:
        raise UserError(f"--benchmark {benchmark}: take one of {', '.join(readers)}")
    try:
        found = list(readers[benchmark](root))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{root} is not {benchmark} in its published layout ({error!r}): fetch its json or parquet files again") from None
    if not found:
        raise UserError(f"{root} holds no questions of {benchmark}: data/README.md or papers/video_ccam/README.md has the layout")
    return found


def _mvbench(root: Path) -> Iterator[Item]:
    for file in sorted((root / "json").glob("*.json")):
        for row in json.loads(file.read_text()):
            bound = (row["start"], row["end"]) if "start" in row else None
            video = root / "video" / MVBENCH[file.stem] / row["video"]
            yield Item(file.stem, video, row["question"], row["candidates"], row["candidates"].index(row["answer"]), bound)


def _mlvu(root: Path) -> Iterator[Item]:
    """The tasks with choices; those with free answers need a judge."""
    for file in sorted((root / "json").glob("*.json")):
        for row in json.loads(file.read_text()):
            if "candidates" in row:
                video = root / "video" / file.stem / row["video"]
                yield Item(file.stem, video, row["question"], row["candidates"], row["candidates"].index(row["answer"]))


def _videomme(root: Path) -> Iterator[Item]:
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise UserError("Video-MME comes as parquet, which pyarrow reads: pip install pyarrow") from None
    for file in sorted((root / "videomme").glob("*.parquet")):
        for row in read_table(file).to_pylist():
            candidates = [option.partition(". ")[2] for option in row["options"]]
            yield Item(row["duration"], root / "video" / f"{row['videoID']}.mp4", row["question"], candidates, "ABCD".index(row["answer"]))


def frames_of(item: Item, n: int, middles: bool) -> UInt8[Tensor, "T h w 3"]:
    """The benchmark's choice of frames of a file, or of a folder of jpgs at 3 frames a second. middles: MVBench's."""
    if item.video.is_dir():
        files = sorted(item.video.glob("*.jpg"))
        chosen = [Image.open(files[i - 1]) for i in ccam.middle_indices(len(files), 3, n, item.bound, first=1)]
        return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in chosen])
    if not middles:
        return read_video(item.video, num=n)
    rate = lambda fps: 25 if item.video.suffix == ".gif" else fps
    return read_video(item.video, lambda total, fps: ccam.middle_indices(total - 1, rate(fps), n, item.bound))


def evaluate_published(cfg: Config) -> dict[str, float]:
    """Accuracy in percent by task, and their mean. --weights: a directory of the hub, or a file of a training run with --data."""
    found = items(Path(cfg.data), cfg.benchmark)
    model = full_model(cfg).eval() if cfg.weights.is_file() else ccam.load_published(cfg.weights, cfg.encoder, cfg.llm)
    model, tokenizer = model.to(gpu.device(cfg)), tokenizer_of(Path(cfg.llm or cfg.weights))
    right: dict[str, list[bool]] = {}
    for item in found:
        try:
            video = ccam.resized(frames_of(item, cfg.test_frames, cfg.benchmark == "mvbench"), cfg.size)
            said = model.answer(tokenizer, normalized(video.to(gpu.device(cfg))), ccam.choice_question(item.question, item.candidates))
        except VideoError as error:  # the hours of the others are at stake
            warnings.warn(f"{error}: counted as a wrong answer", stacklevel=2)
            said = ""
        wanted = f"({chr(ord('A') + item.answer)}) {item.candidates[item.answer]}"
        right.setdefault(item.task, []).append(ccam.is_right(said, wanted))
    accuracy = {task: 100 * fmean(answers) for task, answers in right.items()}
    return accuracy | {"mean of tasks": fmean(accuracy.values()), "questions": len(found)}
