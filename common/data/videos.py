"""Captioned videos: rendered moving shapes, and directories of video files with a table of captions.

Clip i of a rendered set is a function of (seed, i) alone.
"""

import csv
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from common.data.scenes import coverage, shape_distance
from common.errors import UserError
from common.results import write
from common.video import Size, VideoError, read_video, safe_scale, write_video

COLOURS = {"red": (0.90, 0.15, 0.15), "green": (0.15, 0.80, 0.20), "blue": (0.20, 0.30, 0.95), "yellow": (0.95, 0.85, 0.20)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
VOCABULARY = ("<null>", "a", "moving", *COLOURS, *SHAPES, *DIRECTIONS)

# ---- moving shapes --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MovingShapes:
    """n clips of one moving object each. Coordinates are (x, y) in pixels from the upper left corner of the image."""

    video: Float[Tensor, "n 3 frames size size"]  # in [-1, 1]
    captions: list[str]
    labels: Int[Tensor, "n 3"]  # colour, shape, direction
    masks: Float[Tensor, "n frames size size"]  # the share of the pixel that the object covers
    centers: Float[Tensor, "n frames 2"]  # along the straight path, even where the object wraps
    radius: Float[Tensor, "n"]


def caption(colour: int, shape: int, direction: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"


def tokenize(captions: list[str]) -> Int[Tensor, "n 5"]:
    """The words of such captions as positions in VOCABULARY; 0 is left for the null caption of classifier-free guidance."""
    return torch.tensor([[VOCABULARY.index(word) for word in text.split()] for text in captions])


def moving_shapes(
    n: int,
    seed: int,
    size: int = 32,
    frames: int = 8,
    speed: tuple[float, float] = (2.0, 2.0),
    wrap: bool = False,
    texture: bool = False,
    light: bool = False,
    labels: Int[Tensor, "n 3"] | None = None,
    start: int = 0,
) -> MovingShapes:
    """Clips start..start+n-1: a circle, square or triangle of one of four colours on a grey ramp moves in one of four directions.

    Lengths scale with the image: in one of 32 pixels the radius is 5-7 pixels, and `speed` a range in pixels a frame. The whole path lies
    in the image; with `wrap` it may lead out of it, and what leaves on one side enters on the other. texture: stripes with a period of
    size/8 pixels that move with the object. light: a brightness for every clip, 0.45-1.3, that drifts by up to 10% within it. labels:
    colour, shape and direction of every clip, instead of random ones. Clip i depends on neither n nor start, and an option changes
    only what it is about.

    Raises ValueError if the object has no room for its path.
    """
    if not wrap and 2 * (7 + 1) + (frames - 1) * max(speed) > 32:
        raise ValueError(f"{frames} frames at speed {max(speed)} lead out of the image: take fewer, a lower speed, or wrap=True")
    draws = np.stack([np.random.default_rng((seed, i)).random(11) for i in range(start, start + n)])  # 3 labels, 4 for the path, 4 for the picture
    if labels is None:
        labels = torch.from_numpy((draws[:, :3] * (len(COLOURS), len(SHAPES), len(DIRECTIONS))).astype(np.int64))
    path = _path(draws[:, 3:7].T, labels[:, 2].numpy(), size, frames, speed, wrap)
    chunks = [slice(first, first + 64) for first in range(0, n, 64)]
    pictures = [_render(draws[c, 7:].T, labels[c].numpy(), path[0][c], path[1][c], size, wrap, texture, light) for c in chunks]
    video, masks = (torch.from_numpy(np.concatenate(p)) for p in zip(*pictures, strict=True))
    centers, radius = (torch.from_numpy(p.astype(np.float32)) for p in path)
    return MovingShapes(video, [caption(*label) for label in labels.tolist()], labels, masks, centers, radius)


def _path(draws: np.ndarray, direction: np.ndarray, size: int, frames: int, speed: tuple[float, float], wrap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, frames, 2) and radii (n)."""
    unit = size / 32
    radius = (5 + 2 * draws[0]) * unit
    step = (speed[0] + (speed[1] - speed[0]) * draws[1]) * unit
    room = np.full_like(radius, size / 2) if wrap else size / 2 - radius - unit  # to either side of the middle
    length = np.zeros_like(step) if wrap else (frames - 1) * step
    along = -room + (2 * room - length) * draws[2]
    across = room * (2 * draws[3] - 1)
    along = along[:, None] + step[:, None] * np.arange(frames)
    forward = np.array(list(DIRECTIONS.values()))[direction][:, None]
    return size / 2 + along[..., None] * forward + across[:, None, None] * (forward == 0), radius


def _render(
    draws: np.ndarray, labels: np.ndarray, centers: np.ndarray, radius: np.ndarray, size: int, wrap: bool, texture: bool, light: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Video and masks."""
    grey, slope, gain, phase = draws.astype(np.float32)[..., None, None, None, None]
    grid = np.arange(size, dtype=np.float32) + 0.5
    x, y = (grid - centers[..., [k]].astype(np.float32) for k in (0, 1))
    if wrap:
        x, y = ((d + size / 2) % size - size / 2 for d in (x, y))
    x, y, radius = x[:, :, None, :], y[:, :, :, None], radius.astype(np.float32)[:, None, None, None]

    masks = np.empty((*centers.shape[:2], size, size), np.float32)
    for k, shape in enumerate(SHAPES):
        those = labels[:, 1] == k
        masks[those] = coverage(shape_distance(shape, x[those], y[those], radius[those]))

    ground = 0.15 + 0.25 * grey + (0.2 * slope - 0.1) * (grid / size - 0.5)
    paint = np.array(list(COLOURS.values()), np.float32)[labels[:, 0]][..., None, None, None]
    if texture:
        paint = paint * (0.75 + 0.25 * np.cos(2 * np.pi * 8 / size * x))[:, None]
    canvas = ground + masks[:, None] * (paint - ground)
    if light:
        time = np.arange(centers.shape[1], dtype=np.float32)[:, None, None] / centers.shape[1]
        canvas = canvas * (0.45 + 0.85 * gain) * (1 + 0.1 * np.sin(2 * np.pi * (time + phase)))
    return (2 * canvas - 1).clip(-1, 1), masks


def export(clips: MovingShapes, root: str | Path, fps: float = 8) -> None:
    """Write root/clips/00000.mp4 ... and root/metadata.csv, as VideoFolder reads them. Small clips are enlarged by a whole factor, which
    reading at their own size undoes."""
    root, table = Path(root), io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "caption"])
    for i, (video, text) in enumerate(zip(clips.video, clips.captions, strict=True)):
        frames = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
        write_video(root / f"clips/{i:05}.mp4", frames, fps, safe_scale(frames.shape[2]))
        rows.writerow([f"clips/{i:05}.mp4", text])
    write(root / "metadata.csv", table.getvalue())


# ---- video files with captions --------------------------------------------------------------------------------------------------------


class VideoFolder(Dataset):
    """(video in [-1, 1], caption) of the files that root/metadata.csv (with a header line) or root/metadata.jsonl lists.

    Columns or keys: path (relative to root) and caption; optionally split, and start and end in seconds of the part to use.

    frames, stride: the clip is `frames` frames, every `stride`-th one, from a random start, or with random_start=False from the first.
    size: as in read_video. split: only the rows of that split.

    A file that cannot be read, or is too short for a clip, is replaced by a random other one, with a warning, and is listed in `skipped`,
    which sees what DataLoader workers skipped too. All draws come from torch's global generator.

    Raises UserError for a missing directory or table, missing columns, no rows, or when 10 replacements in a row fail.
    """

    def __init__(self, root: str | Path, frames: int = 8, stride: int = 1, size: Size = 32, split: str | None = None, random_start: bool = True):
        self.root, self.frames, self.stride, self.size, self.random_start = Path(root), frames, stride, size, random_start
        self.rows = _table(self.root)
        if split is not None:
            given = sorted({row.get("split") or "" for row in self.rows})
            self.rows = [row for row in self.rows if row.get("split") == split]
            if not self.rows:
                raise UserError(f"{self.root}: no row has the split {split!r}; its column `split` has {', '.join(map(repr, given))}")
        self._bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def skipped(self) -> list[str]:
        """Paths, so far."""
        return [row["path"] for row, bad in zip(self.rows, self._bad.tolist(), strict=True) if bad]

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 frames h w"], str]:
        for _ in range(11):
            try:
                return self._clip(index), self.rows[index]["caption"]
            except VideoError as error:
                if not self._bad[index]:
                    self._bad[index] = True
                    warnings.warn(f"skipped {error}", stacklevel=2)
                last, index = error, int(torch.randint(len(self), ()))
        raise UserError(f"{self.root}: 11 videos in a row could not be read; the last is {last}")

    def _clip(self, index: int) -> Float[Tensor, "3 frames h w"]:
        row, share = self.rows[index], float(torch.rand(()))
        path, span = self.root / row["path"], (self.frames - 1) * self.stride + 1

        def choose(total: int, fps: float) -> range:
            first, end = round(row["start"] * fps), round(min(total, row["end"] * fps))
            if end - first < span:
                raise VideoError(path, f"a clip takes {span} frames, but there are {max(end - first, 0)}")
            if self.random_start:
                first += int(share * (end - first - span + 1))
            return range(first, first + span, self.stride)

        return read_video(path, choose, size=self.size).permute(3, 0, 1, 2) / 127.5 - 1


def _table(root: Path) -> list[dict]:
    """The rows of the metadata file: path, caption, start and end in seconds, and what else it has."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such directory; it must hold videos and metadata.csv or metadata.jsonl (see data/README.md)")
    path = next((root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()), None)
    if path is None:
        raise UserError(f"{root} has no metadata.csv or metadata.jsonl: write one with the columns path and caption")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [dict(json.loads(line)) for line in file if line.strip()]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 {path.suffix[1:]} table ({error}): write one row or json object a line") from None
    if not rows:
        raise UserError(f"{path} lists no videos: give each a row with path and caption")
    for number, row in enumerate(rows, 1):
        missing = [key for key in ("path", "caption") if not row.get(key)]
        if missing:
            raise UserError(f"{path}: row {number} has no {' and no '.join(missing)}, only {', '.join(map(str, row))}")
        try:
            row["start"], row["end"] = float(row.get("start") or 0), float(row.get("end") or "inf")
        except ValueError as error:
            raise UserError(f"{path}: start and end of row {number} must be seconds ({error})") from None
    return rows
