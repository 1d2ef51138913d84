"""Train the projector with and without causal masks, and pooling, jointly with a small encoder and a small Llama, on rendered clips and images.

With --data DIR, train it between a published SigLIP and a published language model on instructions about images and videos.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common.backbones.llama import Llama, LlamaConfig
from common.config import RunConfig
from common.data import Batches
from common.data.scenes import coverage, shape_distance
from common.errors import UserError
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import each, fit, load_weights
from common.video import read_video
from papers.video_ccam import model as ccam
from papers.video_ccam.model import IGNORED, PLACEHOLDER, PROJECTORS, PatchEncoder, ProjectorConfig, VideoCCAM, normalized


@dataclass
class Config(RunConfig):
    frames: int = 8  # of a clip in training; a batch is of clips, and a third as many images come with them
    lengths: tuple[int, ...] = (8, 16, 48)  # frames of the test; the last is what the files hold
    size: int = 32  # pixels a side
    patch: int = 8
    queries: int = 16  # N
    dim: int = 64  # width of encoder, projector and language model
    depth: int = 2  # layers of the language model
    heads: int = 4
    test_clips: int = 200  # of which every question is asked
    timed_dim: int = 256  # width of the timed projector and language model
    repeats: int = 5  # of each timing
    encoder: str = ""  # directory of SigLIP SO400M/14 at 384 pixels, for --data and for v1.0 of --weights
    llm: str = ""  # directory of the language model, likewise
    stage: Literal[1, 2] = 1  # of the training with --data; 1: the projector learns alone, 2: the language model with it
    context: int = 512  # tokens of an instruction, for --data
    benchmark: str = "mvbench"  # for --weights: mvbench, mlvu or videomme
    test_frames: int = 32  # of its videos


SCALES = {
    "smoke": Config(seeds=(0,), steps=2, batch=3, dim=16, depth=1, heads=2, queries=4, test_clips=2, timed_dim=16, repeats=1, processes=1),
    "small": Config(steps=600, batch=24, lr=8e-3),
    "full": Config(seeds=(0,), steps=5_000, batch=256, accumulate=32, lr=1e-4, clip=1.0, precision="bf16", workers=8, frames=16, size=384),
}
VARIANTS = (*PROJECTORS, "images")  # the last: CCAM, on images alone

# ---- clips ------------------------------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1), "purple": (0.6, 0.1, 0.8), "cyan": (0.1, 0.85, 0.9),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
TEST = 1_000_000  # the seeds of the test sets begin here


@dataclass(frozen=True)
class Clips:
    """Clips of three segments of distinct colours; every frame shows one shape in its segment's colour, so that colours alone have an order."""

    video: UInt8[Tensor, "n T 3 S S"]
    colours: Int[Tensor, "n 3"]  # of the segments
    segments: Int[Tensor, "n T"]
    shapes: Int[Tensor, "n T"]


def order_clips(seed: int, indices: Sequence[int], frames: int, size: int, blip: bool = False) -> Clips:
    """Clip i is a function of (seed, i). The segments' lengths are uniform among those above 1/8.

    blip: the second segment lasts 2 to 4 of the frames, which must be 48, and none of the 8 that a short sampling takes.
    """
    drawn = [_draw(np.random.default_rng((seed, i)), frames, size, blip) for i in indices]
    colours, segment, shapes, place, noise = (np.stack(part) for part in zip(*drawn, strict=True))
    grid = np.arange(size, dtype=np.float32) + 0.5
    x, y, radius = grid - place[..., 0, None, None], grid[:, None] - place[..., 1, None, None], place[..., 2, None, None]
    inside = np.empty(noise.shape, np.float32)
    for k, shape in enumerate(SHAPES):
        those = shapes == k
        inside[those] = coverage(shape_distance(shape, x[those], y[those], radius[those]))
    paint = np.array(list(COLOURS.values()), np.float32)[np.take_along_axis(colours, segment, 1)][..., None, None]
    ground = (0.5 + 0.05 * noise)[:, :, None]
    canvas = ground + inside[:, :, None] * (paint - ground)
    video = torch.from_numpy((255 * canvas.clip(0, 1)).round().astype(np.uint8))
    return Clips(video, *map(torch.from_numpy, (colours, segment, shapes)))


def _draw(rng: np.random.Generator, frames: int, size: int, blip: bool) -> tuple[np.ndarray, ...]:
    """Colours (3), segment of each frame (T), its shape (T), its place and radius (T, 3), noise (T, S, S)."""
    colours = rng.permutation(len(COLOURS))[:3]
    first, length, _ = 1 / 8 + 5 / 8 * rng.dirichlet((1, 1, 1))
    if blip:
        gap, frame_count = 3 + 6 * int(rng.integers(1, 6)), int(rng.integers(2, 5))  # a frame that 8 of 48 take, and six on the next
        first, length = (gap + 1 + int(rng.integers(0, 6 - frame_count))) / 48, frame_count / 48
    time = (np.arange(frames) + 0.5) / frames
    segment = (time > first).astype(np.int64) + (time > first + length)
    radius = rng.uniform(5, 6, frames) * size / 32
    centre = radius + 1 + rng.random((2, frames)) * (size - 2 * radius - 2)
    place = np.stack([*centre, radius], 1).astype(np.float32)
    return colours, segment, rng.integers(0, len(SHAPES), frames), place, rng.standard_normal((frames, size, size), np.float32)


# ---- questions --------------------------------------------------------------------------------------------------------------------------

KINDS = ("first", "second", "last", "after", "before")
WORDS = ("?", *KINDS, "colour", "shape", *COLOURS, *SHAPES)
FIRST_COLOUR, FIRST_SHAPE = WORDS.index("red"), WORDS.index("circle")
QUESTIONS = (  # kind, the segment it names, the segment it asks for
    ("first", None, 0), ("second", None, 1), ("last", None, 2), ("after", 0, 1), ("after", 1, 2), ("before", 1, 0), ("before", 2, 1),
)  # fmt: skip
SHARES = np.array([2, 2, 2, 1, 1, 1, 1]) / 10  # every kind is as frequent


def ask(colours: Int[Tensor, "n 3"], question: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n 3"], Int[Tensor, "n"]]:
    """Prompts such as [video, after, red], and the token of the answer."""
    rows = torch.arange(len(colours))
    kind, named, asked = torch.tensor([(WORDS.index(kind), -1 if named is None else named, asked) for kind, named, asked in QUESTIONS])[question].T
    told = torch.where(named < 0, WORDS.index("?"), FIRST_COLOUR + colours[rows, named])
    return torch.stack([torch.full_like(kind, PLACEHOLDER), kind, told], 1), FIRST_COLOUR + colours[rows, asked]


def ask_image(clips: Clips, shape: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n 3"], Int[Tensor, "n"]]:
    """The colour or, where `shape` is 1, the shape of the first frame."""
    kind = WORDS.index("colour") + shape
    prompt = torch.stack([torch.full_like(kind, PLACEHOLDER), kind, torch.full_like(kind, WORDS.index("?"))], 1)
    colour = clips.colours.gather(1, clips.segments[:, :1])[:, 0]
    return prompt, torch.where(shape == 1, FIRST_SHAPE + clips.shapes[:, 0], FIRST_COLOUR + colour)


@dataclass
class ClipsAndImages:
    """Clips with a question, and for every third an image with one; 100,000 of them, rendered when asked for."""

    cfg: Config
    seed: int

    def __len__(self) -> int:
        return 100_000

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, ...]:
        """Video, prompt and answer of the clips, then of the images."""
        clips = order_clips(2 * self.seed, indices.tolist(), self.cfg.frames, self.cfg.size)
        images = order_clips(2 * self.seed + 1, indices[::3].tolist(), 1, self.cfg.size)
        question = [int(np.random.default_rng((self.seed, i, 1)).choice(len(QUESTIONS), p=SHARES)) for i in indices.tolist()]
        return clips.video, *ask(clips.colours, torch.tensor(question)), images.video, *ask_image(images, indices[::3] % 2)


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def build(cfg: Config, variant: str) -> VideoCCAM:
    """A small model."""
    width = {"hidden_size": cfg.dim, "intermediate_size": 2 * cfg.dim}
    projector = ProjectorConfig(
        cfg.queries, cross_hidden_size=cfg.dim, num_heads=cfg.heads, num_key_value_heads=cfg.heads, output_size=cfg.dim, dropout=0, **width
    )
    llama = LlamaConfig(len(WORDS), num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads, **width)
    model = VideoCCAM(PatchEncoder(cfg.dim, cfg.size, cfg.patch), PROJECTORS["ccam" if variant == "images" else variant](projector), Llama(llama))
    return init_by_fan_in(model)


def question_loss(model: VideoCCAM, video: UInt8[Tensor, "n T 3 S S"], prompt: Int[Tensor, "n 3"], answer: Int[Tensor, "n"]) -> Tensor:
    """Nats an answer."""
    frames = torch.full((len(video),), video.shape[1], device=video.device)
    labels = torch.cat([torch.full_like(prompt, IGNORED), answer[:, None]], 1)
    return model.loss(normalized(video), frames, torch.cat([prompt, answer[:, None]], 1), labels)


def train(cfg: Config) -> None:
    if cfg.data:
        return each(train_instructions, [(seed,) for seed in cfg.seeds], cfg)
    each(train_one, [(variant, seed) for variant in VARIANTS for seed in cfg.seeds], cfg)


def train_one(cfg: Config, variant: str, seed: int) -> None:
    seed_everything(seed)
    parts = {"video": slice(3), "image": slice(3, 6)} if variant != "images" else {"image": slice(3, 6)}
    loss = lambda model, batch: {name: question_loss(model, *batch[part]) for name, part in parts.items()}
    fit(build(cfg, variant), loss, Batches(ClipsAndImages(cfg, seed), cfg.batch, seed), cfg, f"{variant}/{seed}")


# ---- full size --------------------------------------------------------------------------------------------------------------------------


class Instructions(Dataset):
    """(video, T, prompt, labels), padded: of root/*.json in LLaVA's form, lists of {"image" or "video": a path below root, "conversations":
    [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}. Raises UserError."""

    def __init__(self, root: Path, tokenizer: Tokenizer, cfg: Config):
        self.root, self.tokenizer, self.cfg = root, tokenizer, cfg
        try:
            self.rows = [row for file in sorted(root.glob("*.json")) for row in json.loads(file.read_text())]
            words = [[re.sub("<image>|<video>", "", turn["value"]).strip() for turn in row["conversations"]] for row in self.rows]
            self.turns = [list(zip(talk[::2], talk[1::2], strict=True)) for talk in words]
            self.paths = [root / (row.get("video") or row["image"]) for row in self.rows]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{root}: a json is no list of rows with image or video and conversations ({error!r}): mend it") from None
        if not self.rows:
            raise UserError(f"--data {root} has no rows: it must hold json files in LLaVA's form and the images and videos they name")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, Tensor]:
        cfg, path = self.cfg, self.paths[index]
        if self.rows[index].get("video"):
            frames = read_video(path, num=cfg.frames)
        elif path.is_file():
            frames = torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None]
        else:
            raise UserError(f"{path} does not exist: --data needs the images and videos that its json files name")
        video = torch.zeros(cfg.frames, 3, cfg.size, cfg.size, dtype=torch.uint8)
        video[: len(frames)] = ccam.resized(frames, cfg.size)
        prompt, labels = map(torch.tensor, ccam.chat(self.tokenizer, self.turns[index]))
        fitted = lambda row, fill: F.pad(row, (0, cfg.context - len(row)), value=fill)  # or cut
        return video, len(frames), fitted(prompt, 0), fitted(labels, IGNORED)


def full_model(cfg: Config) -> VideoCCAM:
    """Published towers and a projector, new or with all weights of a run's file; what does not learn is frozen."""
    model = ccam.load_bases(cfg.encoder, cfg.llm)
    if cfg.weights:
        load_weights(model, cfg.weights)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.language_model.requires_grad_(cfg.stage == 2)
    return model


def train_instructions(cfg: Config, seed: int) -> None:
    """One stage."""
    seed_everything(seed)
    model = full_model(cfg)
    dataset = Instructions(Path(cfg.data), ccam.tokenizer_of(Path(cfg.llm)), cfg)
    batches = Batches(dataset, cfg.batch, seed, cfg.workers)
    fit(model, lambda model, batch: model.loss(normalized(batch[0]), *batch[1:]), batches, cfg, f"stage_{cfg.stage}/{seed}")
