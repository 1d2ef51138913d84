"""Teach the small Flux two conditions, a depth map and a subject, by concatenate-and-attend and by PKA; with --data DIR --flux DIR, FLUX.1 itself."""

import io
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from common import gpu
from common.backbones.flux import FluxTransformer2DModel
from common.config import RunConfig
from common.data import Batches
from common.data.scenes import Scene, captioned, describe, render_all
from common.errors import UserError
from common.loop import each, fit
from common.tiny_flux import encode, words
from papers.pka.model import ConditionedFlux, Encoders, csas, flow_loss, mix_of, pixels, save_adapters


@dataclass
class Config(RunConfig):
    """steps are those of one round; a run has two, each with its own warm-up and cosine, so that its quality half-way is known."""

    rank: int = 8  # of the adapters
    epsilon: float = 0.2  # attention to the keyword from which an image token reads the subject
    relative: bool = True  # ε is a share of the attention's range over the image, not of the attention to text
    train_scenes: int = 4_000  # to learn from
    test_scenes: int = 64  # to draw
    draw_steps: int = 8  # Euler steps
    guidance: float = 2.0  # away from the null prompt
    timed_grid: int = 16  # tokens a side of the timed layers
    timed_conditions: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 5  # of each timing
    flux: str = "black-forest-labs/FLUX.1-dev"  # for --data: directory or hub id
    conditions: tuple[str, ...] = ("canny", "subject")  # for --data: of canny, depth, subject
    variant: str = "joint"  # for --data: joint, additive, concat
    size: int = 512  # pixels a side, for --data


SCALES = {
    "smoke": Config(
        steps=2, batch=2, seeds=(0,), rank=2, train_scenes=8, test_scenes=2, draw_steps=2, timed_grid=4, timed_conditions=(1, 2), repeats=1,
        processes=1, save_every=1.0,
    ),
    "small": Config(steps=180, batch=4, lr=8e-3, weight_decay=0.01, clip=1.0, save_every=0.5),
    "full": Config(
        seeds=(0,), steps=15_000, batch=8, lr=1e-4, weight_decay=0.01, clip=1.0, precision="bf16", rank=4, workers=4, save_every=0.05, relative=False,
    ),
}  # fmt: skip

ARMS = ("concat", "joint", "additive")
SAMPLERS = {"csas": (0.5, 1.5), "standard": (0.0, 1.0), "reversed": (-0.5, 1.5)}  # μ and σ
SPATIAL, SUBJECT = "depth", "subject"
TRAIN, TEST = 300, 301  # seeds of the scenes

# ---- scenes -----------------------------------------------------------------------------------------------------------------------------


class ConditionedScenes(NamedTuple):
    """Scenes, what is told of them, and the images that condition them. The caption names no place, and the first thing by its shape alone."""

    scenes: list[Scene]
    images: UInt8[Tensor, "n 3 32 32"]
    instances: UInt8[Tensor, "n 32 32"]
    captions: list[str]
    keywords: Bool[Tensor, "n 1 m"]  # where the caption names the first thing
    depth: UInt8[Tensor, "n 3 32 32"]  # the nearer the lighter
    subject: UInt8[Tensor, "n 3 16 16"]  # the first thing, large on white


@cache
def scene_set(n: int, seed: int) -> ConditionedScenes:
    """Photographic scenes of plain and striped things."""
    drawn = captioned(n, seed, styled=0.0, single=0.5).scenes
    scenes = [scene._replace(things=tuple(t._replace(texture=t.texture.replace("dotted", "plain")) for t in scene.things)) for scene in drawn]
    images, instances, depth = render_all(scenes)
    subjects = [Scene((scene.things[0]._replace(x=0.5, y=0.5, radius=0.35),), "white") for scene in scenes]
    captions = [caption(scene) for scene in scenes]
    keywords = torch.zeros(n, 1, encode([""])["states"].shape[1], dtype=torch.bool)
    for row, text, scene in zip(keywords, captions, scenes, strict=True):
        row[0, words(text).index(scene.things[0].shape)] = True
    shades = (255 * depth).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return ConditionedScenes(scenes, images, instances, captions, keywords, shades, render_all(subjects, 16)[0])


def caption(scene: Scene) -> str:
    """Where things are is left to the depth map, the first thing's look to the subject's image."""
    things = [describe(thing, full=k > 0) for k, thing in enumerate(scene.things)]
    return ("a photo of " if len(things) > 1 else "") + " and ".join(things) + f" on a {scene.background} background"


def dataset(cfg: Config) -> TensorDataset:
    s, text = scene_set(cfg.train_scenes, TRAIN), encode(scene_set(cfg.train_scenes, TRAIN).captions)
    return TensorDataset(s.images, text["states"], text["pooled"], s.keywords, s.depth, s.subject)


def scene_loss(model: ConditionedFlux, batch: tuple[Tensor, ...], times: tuple[float, float], drop: float = 0.1) -> Tensor:
    """Text and each condition are dropped independently: the null prompt, a grey image."""
    images, states, pooled, keywords, depth, subject = batch
    keep = lambda *shape: torch.rand(len(images), *shape, device=images.device) >= drop
    null, told = encode([""]), keep(1)
    return flow_loss(
        model, pixels(images), csas(len(images), *times, device=images.device),
        states=torch.where(told[..., None], states, null["states"].to(states)), pooled=torch.where(told, pooled, null["pooled"].to(pooled)),
        keywords=keywords & told[..., None], depth=pixels(depth) * keep(1, 1, 1), subject=pixels(subject) * keep(1, 1, 1),
    )  # fmt: skip


# ---- models -----------------------------------------------------------------------------------------------------------------------------


@cache
def base() -> FluxTransformer2DModel:
    """The small Flux that ships."""
    return FluxTransformer2DModel.from_pretrained("tiny")


def build(cfg: Config, arm: str) -> ConditionedFlux:
    """The base with untrained adapters."""
    flux = deepcopy(base())
    return ConditionedFlux(flux, (SPATIAL, SUBJECT), (SUBJECT,), mix_of(arm, flux.config, (8, 8), cfg.epsilon, cfg.relative), cfg.rank)


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    if cfg.data:
        return each(train_flux, [(seed,) for seed in cfg.seeds], cfg)
    runs = [(arm, "csas", 2) for arm in ARMS] + [("joint", sampler, 1) for sampler in SAMPLERS if sampler != "csas"]
    each(train_one, [(*run, seed) for run in runs for seed in cfg.seeds], cfg)


def train_one(cfg: Config, arm: str, sampler: str, rounds: int, seed: int) -> None:
    """A round begins where the one before ended, with scenes in another order."""
    gpu.seed_everything(seed)
    model, loss = build(cfg, arm), partial(scene_loss, times=SAMPLERS[sampler])
    for number in range(1, rounds + 1):
        fit(model, loss, Batches(dataset(cfg), cfg.batch, 10 * seed + number), cfg, run_name(arm, sampler, number, seed))


def run_name(arm: str, sampler: str, number: int, seed: int) -> str:
    return f"{arm}/{sampler}/round-{number}/{seed}"


# ---- FLUX.1 on SubjectSpatial200K -------------------------------------------------------------------------------------------------------


class SubjectSpatial(Dataset):
    """Rows of SubjectSpatial200K's parquet files that belong to one part of UniCombine's split: {"image", conditions}, description, item.

    A row's image shows the scene on the left and the subject on the right; canny and depth are encoded images. Raises UserError.
    """

    def __init__(self, root: Path, part: str, conditions: tuple[str, ...], size: int):
        self.conditions, self.size, self.rows = conditions, size, []
        for path in sorted(Path(root).rglob("*.parquet")):
            for group in range(parquet(path).num_row_groups):
                marks = parquet(path).read_row_group(group, ["quality_assessment"]).column(0).to_pylist()
                self.rows += [(path, group, i) for i, mark in enumerate(marks) if mark and belongs(mark) == part]
        if not self.rows:
            raise UserError(f"--data {root}: no row for {part} in its *.parquet files; it must hold SubjectSpatial200K's data_labeled folders")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, UInt8[Tensor, "3 H W"]], str, str]:
        path, group, i = self.rows[index]
        spatial = [name for name in self.conditions if name != "subject"]
        [row] = parquet(path).read_row_group(group, ["image", "description", *spatial]).slice(i, 1).to_pylist()
        images = {name: opened(row[name], path) for name in ["image", *spatial]}
        half, height = images["image"].width // 2, images["image"].height
        images |= {"subject": images["image"].crop((half, 0, 2 * half, height)), "image": images["image"].crop((0, 0, half, height))}
        shown = {name: pil_to_tensor(images[name].resize((self.size, self.size), Image.Resampling.BICUBIC)) for name in ("image", *self.conditions)}
        return shown, row["description"]["description_0"], row["description"]["item"]


@cache
def parquet(path: Path):
    """Opened once in every process."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("SubjectSpatial200K lies in parquet files: `pip install pyarrow` reads them") from None
    try:
        return ParquetFile(path, memory_map=True)
    except ArrowException as error:
        raise UserError(f"{path} is not a whole parquet file ({error}): fetch it again") from None


def belongs(marks: dict[str, int]) -> str:
    """UniCombine's split by the marks from 1 to 5: train where all are 5, test where only the composite structure may be 3 or 4."""
    composite = marks["compositeStructure"]
    if composite < 3 or any(mark != 5 for name, mark in marks.items() if name != "compositeStructure"):
        return "neither"
    return "train" if composite == 5 else "test"


def opened(stored: dict, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(stored["bytes"])).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} holds an image that cannot be read ({error}): fetch it again") from None


def build_flux(cfg: Config) -> ConditionedFlux:
    """FLUX.1 of --flux with untrained adapters, in float32 beside its bfloat16."""
    flux, side = FluxTransformer2DModel.from_pretrained(f"{cfg.flux}/transformer"), cfg.size // 16
    model = ConditionedFlux(flux, cfg.conditions, (SUBJECT,), mix_of(cfg.variant, flux.config, (side, side), cfg.epsilon, cfg.relative), cfg.rank)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    return model


def flux_loss(model: ConditionedFlux, batch: tuple, encoders: Encoders) -> Tensor:
    shown, captions, items = batch
    latents = {name: encoders.latents(images) for name, images in shown.items()}
    z = latents.pop("image")
    guidance = torch.ones(len(z), device=z.device) if model.flux.config.guidance_embeds else None
    return flow_loss(model, z, csas(len(z), device=z.device), guidance=guidance, **encoders.text(list(captions), list(items)), **latents)


def train_flux(cfg: Config, seed: int) -> None:
    """The adapters end up in the run directory, for --weights."""
    gpu.seed_everything(seed)
    batches = Batches(SubjectSpatial(Path(cfg.data), "train", cfg.conditions, cfg.size), cfg.batch, seed, cfg.workers)
    encoders, name = Encoders(cfg.flux, gpu.device(cfg)), f"flux/{cfg.variant}/{seed}"
    model = fit(build_flux(cfg), partial(flux_loss, encoders=encoders), batches, cfg, name)
    if gpu.rank() == 0:
        save_adapters(model, cfg.out / name)
