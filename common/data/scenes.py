"""Rendered scenes with known content. Image i of a set is a function of (seed, i) alone.

Shapes are signed distances in pixels (negative inside), so that edges are anti-aliased and masks exact.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from common.data.photos import textures

SHAPES = ("circle", "square", "triangle", "cross")
FILLS = ("dots", "horizontal stripes", "vertical stripes", "checker")

Map = Float[np.ndarray, "*n h w"]

# ---- shapes and fills -----------------------------------------------------------------------------------------------------------------


def shape_distance(shape: str, x: Map, y: Map, radius: Map) -> Map:
    """Signed distance to a shape centred at 0 whose extent is 2 radius; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.89 * radius
    if shape == "triangle":  # two slanted sides and the base
        return np.maximum((2 * abs(x) - y - radius) / np.sqrt(np.float32(5)), y - radius)
    if shape == "cross":
        thick, long = 0.38 * radius, radius
        return np.minimum(np.maximum(abs(x) - thick, abs(y) - long), np.maximum(abs(y) - thick, abs(x) - long))
    raise ValueError(f"no shape {shape!r}: one of {', '.join(SHAPES)}")


def coverage(distance: Map) -> Map:
    """The share of a pixel that lies inside."""
    return np.clip(0.5 - distance, 0, 1)


def fill_pattern(fill: str, u: Map, v: Map) -> Map:
    """A texture in [-1, 1] with mean 0; u (to the right) and v (down) are phases, 2π a period."""
    if fill == "dots":
        return (np.cos(u) + np.cos(v)) / 2
    if fill == "horizontal stripes":
        return np.cos(v)
    if fill == "vertical stripes":
        return np.cos(u)
    if fill == "checker":
        return np.cos(u) * np.cos(v)
    raise ValueError(f"no fill {fill!r}: one of {', '.join(FILLS)}")


def pink_noise(rng: np.random.Generator, size: int) -> Float[np.ndarray, "size size"]:
    """Noise whose amplitude falls as 1/frequency, mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) / frequency, s=(size, size))
    return (noise / noise.std()).astype(np.float32)


# ---- scale-mix ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleMix:
    """n images of the 16 classes shape x fill."""

    images: UInt8[Tensor, "n 3 size size"]
    labels: Int[Tensor, "n"]  # 4 · shape + fill
    masks: Int[Tensor, "n size size"]  # 0 background, 1 + shape on the large shape


CLASSES = tuple(f"{shape}, {fill}" for shape in SHAPES for fill in FILLS)


def scale_mix(n: int, seed: int, size: int = 48, start: int = 0) -> ScaleMix:
    """Images start..start+n-1 of a task that needs the coarse and the fine at once: the class is that of one large shape (20-34 pixels,
    so its outline spans many patches) times the fill of its inside (a texture with a period of 2.6-4 pixels, inside one patch).

    Texture photographs (brick, grass, gravel) or pink noise lie behind, 2-4 plain small shapes a 48x48 area distract, colours carry
    nothing. Shapes and fills keep their size in pixels whatever the size of the image: a larger image shows more, not bigger.
    """
    parts = [_scale_mix(np.arange(first, min(first + 256, start + n)), seed, size) for first in range(start, start + n, 256)]
    images, labels, masks = (np.concatenate(p) for p in zip(*parts, strict=True))
    return ScaleMix(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks))


def _scale_mix(indices: np.ndarray, seed: int, size: int):
    rngs = [np.random.default_rng((seed, int(i))) for i in indices]
    labels = indices % 16
    canvas = np.stack([_background(rng, size) for rng in rngs])
    draw = np.stack([rng.random(12) for rng in rngs]).astype(np.float32)[..., None, None]
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5

    most = round(4 * (size / 48) ** 2)
    small = np.stack([rng.random((most, 7)) for rng in rngs]).astype(np.float32)[..., None, None]
    for k in range(most):
        cx, cy, radius, kind, r, g, b = np.moveaxis(small[:, k], 1, 0)
        distance = _distance_of((kind * 4).astype(int).ravel(), x - cx * size, y - cy * size, 2.5 + radius)
        shown = coverage(distance) * (k < most / 2 + draw[:, 11] * (most / 2 + 1))
        canvas = _paint(canvas, shown, np.stack([r, g, b], 1))

    radius = 10 + 7 * draw[:, 0]
    room = size / 2 - radius - 1
    dx, dy = x - size / 2 - room * (2 * draw[:, 1] - 1), y - size / 2 - room * (2 * draw[:, 2] - 1)
    distance = _distance_of(labels // 4, dx, dy, radius)
    tilt, period = np.deg2rad(20 * draw[:, 3] - 10), 2.6 + 1.4 * draw[:, 4]
    u = 2 * np.pi * ((np.cos(tilt) * dx + np.sin(tilt) * dy) / period + draw[:, 5])
    v = 2 * np.pi * ((np.cos(tilt) * dy - np.sin(tilt) * dx) / period + draw[:, 6])
    pattern = np.empty_like(u)
    for i, fill in enumerate(FILLS):
        rows = labels % 4 == i
        pattern[rows] = fill_pattern(fill, u[rows], v[rows])
    colour = (0.3 + 0.4 * draw[:, 7:10, 0])[:, :, None] + ((0.12 + 0.18 * draw[:, 10]) * pattern)[:, None]
    canvas = _paint(canvas, coverage(distance), colour)
    masks = np.where(distance < 0, 1 + labels[:, None, None] // 4, 0)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8), labels.astype(np.int64), masks.astype(np.int64)


def _distance_of(kinds: np.ndarray, x: Map, y: Map, radius: Map) -> Map:
    """shape_distance with a shape of its own for every image."""
    x, y, radius = np.broadcast_arrays(x, y, radius)
    distance = np.empty_like(x)
    for i, shape in enumerate(SHAPES):
        rows = kinds == i
        distance[rows] = shape_distance(shape, x[rows], y[rows], radius[rows])
    return distance


def _paint(canvas: np.ndarray, alpha: Map, colour: np.ndarray) -> np.ndarray:
    return canvas + alpha[:, None] * (colour - canvas)


def _background(rng: np.random.Generator, size: int) -> Float[np.ndarray, "3 size size"]:
    kind, gain, level = rng.integers(4), rng.uniform(0.3, 1), rng.uniform(0.3, 0.7)
    if kind == 3:
        relief = 0.15 * pink_noise(rng, size)
    else:
        photo = list(textures().values())[kind]
        top, left = rng.integers(0, np.array(photo.shape) - size)
        relief = photo[top : top + size, left : left + size].astype(np.float32) / 255 - 0.5
    tint = rng.uniform(-0.15, 0.15, 3).astype(np.float32)[:, None, None]
    return level + tint + np.float32(gain) * relief
