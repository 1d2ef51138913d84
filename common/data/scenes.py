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
    """Signed distance in pixels to a shape centred at 0; y points down. The circle, the triangle and the cross are 2 radius wide and high;
    the square has the circle's area. Outside a corner it is the distance to the nearer side's line, an underestimate."""
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
    """n images of the 16 classes coarse pattern x fine pattern."""

    images: UInt8[Tensor, "n 3 size size"]
    labels: Int[Tensor, "n"]  # 4 · coarse + fine
    masks: Int[Tensor, "n size size"]  # 0 background, 1 + fine on the object


CLASSES = tuple(f"coarse {coarse}, fine {fine}" for coarse in FILLS for fine in FILLS)


def scale_mix(n: int, seed: int, size: int = 48, start: int = 0) -> ScaleMix:
    """Images start..start+n-1 of a task that needs the coarse and the fine at once.

    A texture photograph (brick, grass, gravel) or pink noise, overlaid by a coarse pattern with a period of 20-28 pixels, which spans many
    patches of 4, and one object (a shape of radius 10-17) with a fine pattern of 4-6 pixels, about the size of one. The class is
    coarse x fine; the object's mask is labelled with the fine pattern. Two to four small plain shapes a 48x48 area distract; shapes, colours,
    phases, contrasts and a tilt of up to 10 degrees carry nothing.

    All sizes are in pixels whatever the size of the image: a larger one shows more, not bigger, so that a network trained at 48 meets at 72
    nothing new but positions. Labels follow the index, so any 16 consecutive images hold all classes. size: 36-511 pixels. Image i does not
    depend on n or start.
    """
    if not 36 <= size <= 511:
        raise ValueError(f"size {size}: the object needs 36 pixels, the background photographs have 512")
    parts = [_scale_mix(np.arange(first, min(first + 256, start + n)), seed, size) for first in range(start, start + n, 256)]
    images, labels, masks = (np.concatenate(p) for p in zip(*parts, strict=True))
    return ScaleMix(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks))


def _scale_mix(indices: np.ndarray, seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rngs = [np.random.default_rng((seed, int(i))) for i in indices]
    coarse, fine = np.divmod(indices % 16, 4)
    canvas = np.stack([_background(rng, size) for rng in rngs])
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5

    period, contrast, *tint = _uniforms(rngs, 5)
    wave = (0.03 + 0.06 * contrast) * _patterns(coarse, x, y, 20 + 8 * period, _uniforms(rngs, 3))
    canvas = canvas + wave[:, None] * (0.6 + 0.8 * np.stack(tint, 1))

    (count,) = _uniforms(rngs, 1)
    most = round(4 * (size / 48) ** 2)
    few = np.floor(most / 2 + count * (most / 2 + 1))
    for k, (cx, cy, radius, kind, *plain) in enumerate(_uniforms(rngs, 7 * most).reshape(most, 7, len(rngs), 1, 1)):
        shown = coverage(_distances(np.floor(4 * kind.ravel()), x - cx * size, y - cy * size, 2.5 + radius)) * (k < few)
        canvas = canvas + shown[:, None] * (np.stack(plain, 1) - canvas)

    kind, scale, across, down, period, contrast, *colour = _uniforms(rngs, 9)
    radius = 10 + 7 * scale
    room = size / 2 - radius - 1
    dx, dy = x - size / 2 - room * (2 * across - 1), y - size / 2 - room * (2 * down - 1)
    distance = _distances(np.floor(4 * kind.ravel()), dx, dy, radius)
    wave = (0.15 + 0.15 * contrast) * _patterns(fine, dx, dy, 4 + 2 * period, _uniforms(rngs, 3))
    canvas = canvas + coverage(distance)[:, None] * (wave[:, None] + 0.3 * np.stack(colour, 1) - 0.15)
    masks = np.where(distance < 0, 1 + fine[:, None, None], 0)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8), (4 * coarse + fine).astype(np.int64), masks.astype(np.int64)


def _uniforms(rngs: list[np.random.Generator], n: int) -> Float[np.ndarray, "n images 1 1"]:
    return np.stack([rng.random(n, np.float32) for rng in rngs], 1)[..., None, None]


def _distances(kinds: np.ndarray, x: Map, y: Map, radius: Map) -> Map:
    """shape_distance with a shape of its own for every image."""
    x, y, radius = np.broadcast_arrays(x, y, radius)
    distance = np.empty_like(x)
    for i, shape in enumerate(SHAPES):
        distance[kinds == i] = shape_distance(shape, x[kinds == i], y[kinds == i], radius[kinds == i])
    return distance


def _patterns(kinds: np.ndarray, x: Map, y: Map, period: Map, draw: np.ndarray) -> Map:
    """fill_pattern with a kind of its own for every image; draw: tilt and two phases, each in [0, 1]."""
    tilt = np.deg2rad(20 * draw[0] - 10)
    u = 2 * np.pi * ((np.cos(tilt) * x + np.sin(tilt) * y) / period + draw[1])
    v = 2 * np.pi * ((np.cos(tilt) * y - np.sin(tilt) * x) / period + draw[2])
    pattern = np.empty_like(u)
    for i, fill in enumerate(FILLS):
        pattern[kinds == i] = fill_pattern(fill, u[kinds == i], v[kinds == i])
    return pattern


def _background(rng: np.random.Generator, size: int) -> Float[np.ndarray, "3 size size"]:
    kind, gain, level = rng.integers(4), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.75)
    if kind == 3:
        relief = 0.15 * pink_noise(rng, size)
    else:
        photo = list(textures().values())[kind]
        top, left = rng.integers(0, np.array(photo.shape) - size)
        relief = photo[top : top + size, left : left + size].astype(np.float32) / 255 - 0.5
    tint = rng.uniform(-0.15, 0.15, 3).astype(np.float32)[:, None, None]
    return level + tint + np.float32(gain) * relief
