"""Rendered scenes with known content. Image i of a set is a function of (seed, i) alone.

Shapes are signed distances in pixels (negative inside), so that edges are anti-aliased and masks exact. `render` draws any `Scene`;
`captioned` samples scenes of one or two things with a caption; `scale_mix` is a task of coarse and fine patterns.
"""

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from common.data.photos import textures

SHAPES = ("circle", "square", "triangle", "cross", "ring")
FILLS = ("dots", "horizontal stripes", "vertical stripes", "checker")

Map = Float[np.ndarray, "*n h w"]

# ---- shapes and fills -----------------------------------------------------------------------------------------------------------------


def shape_distance(shape: str, x: Map, y: Map, radius: Map) -> Map:
    """Signed distance in pixels to a shape centred at 0; y points down. All are 2 radius wide and high but the square, which
    has the circle's area. Outside a corner it is the distance to the nearer side's line, an underestimate."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.89 * radius
    if shape == "triangle":  # two slanted sides and the base
        return np.maximum((2 * abs(x) - y - radius) / np.sqrt(np.float32(5)), y - radius)
    if shape == "cross":
        thick, long = 0.38 * radius, radius
        return np.minimum(np.maximum(abs(x) - thick, abs(y) - long), np.maximum(abs(y) - thick, abs(x) - long))
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
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


# ---- scenes ---------------------------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (0.88, 0.15, 0.15), "green": (0.15, 0.68, 0.22), "blue": (0.15, 0.30, 0.90),
    "yellow": (0.93, 0.85, 0.15), "purple": (0.58, 0.20, 0.72), "orange": (0.95, 0.52, 0.10),
}  # fmt: skip
BACKGROUNDS = {"black": (0.06, 0.06, 0.06), "white": (0.94, 0.94, 0.94), "gray": (0.50, 0.50, 0.50), "teal": (0.10, 0.45, 0.45)}
TEXTURES = ("plain", "striped", "dotted")  # those that captions name
CONCEPT_FILLS = ("halves", "diagonals", "checks", "rings")  # of two colours, for things that no caption describes
STYLES = ("sketch", "mosaic", "neon", "engraving")

RGB = tuple[float, float, float]


class Thing(NamedTuple):
    """One object; x, y and radius are shares of the image's side, y points down."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    texture: str = "plain"  # of TEXTURES, or of CONCEPT_FILLS with `second`
    second: str = ""  # colour
    jitter: RGB = (0.0, 0.0, 0.0)  # added to the colour
    opacity: float = 1.0


class Scene(NamedTuple):
    """What `render` draws: things, the later ones in front. Tint, jitter and hue are seen but never told by a caption."""

    things: tuple[Thing, ...]
    background: str
    tint: RGB = (0.0, 0.0, 0.0)  # added to the background
    style: str = ""  # of STYLES, or photographic
    hue: float = 0.0  # of the style's ink or paper, in [0, 1]


class Picture(NamedTuple):
    image: UInt8[np.ndarray, "3 size size"]
    instances: UInt8[np.ndarray, "size size"]  # 0 background, 1 + k where thing k is in front
    depth: Float[np.ndarray, "size size"]  # 0 background, up to 1 for the thing in front


def render(scene: Scene, size: int = 32) -> Picture:
    """Drawn with the edges of its shapes smoothed over a pixel; the masks are where a thing covers at least half of it."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    canvas = np.broadcast_to(_rgb(BACKGROUNDS[scene.background], scene.tint), (3, size, size))
    instances, depth = np.zeros((size, size), np.uint8), np.zeros((size, size), np.float32)
    for k, thing in enumerate(scene.things, 1):
        dx, dy, radius = x - thing.x * size, y - thing.y * size, np.float32(thing.radius * size)
        covered = coverage(shape_distance(thing.shape, dx, dy, radius))
        canvas = canvas + thing.opacity * covered * (_paint(thing, dx, dy, size / 32) - canvas)
        instances[covered >= 0.5] = k
        depth[covered >= 0.5] = 0.4 + 0.6 * k / len(scene.things)
    if scene.style:
        canvas = _STYLES[scene.style](canvas, instances, scene.hue)
    return Picture((255 * canvas.clip(0, 1)).round().astype(np.uint8), instances, depth)


def _rgb(colour: RGB, shift: RGB = (0.0, 0.0, 0.0)) -> Float[np.ndarray, "3 1 1"]:
    return (np.array(colour, np.float32) + np.array(shift, np.float32)).clip(0, 1)[:, None, None]


def _paint(thing: Thing, x: Map, y: Map, unit: float) -> Float[np.ndarray, "3 size size"]:
    """The thing's fill; periods are in pixels of an image of 32."""
    first, x, y = _rgb(COLOURS[thing.colour], thing.jitter), x / unit, y / unit
    if thing.texture == "plain":
        return np.broadcast_to(first, (3, *x.shape))
    if thing.texture == "striped":
        return np.where(np.floor(y / 2) % 2 == 0, first, 0.35 * first)
    if thing.texture == "dotted":
        return np.where((np.floor(x) % 4 < 2) & (np.floor(y) % 4 < 2), np.float32(0.97), first)
    regions = {
        "halves": lambda: x < 0,
        "diagonals": lambda: np.floor((x + y) / 3) % 2 == 0,
        "checks": lambda: (np.floor(x / 3) + np.floor(y / 3)) % 2 == 0,
        "rings": lambda: np.floor(np.hypot(x, y) / 2.5) % 2 == 0,
    }
    return np.where(regions[thing.texture](), first, _rgb(COLOURS[thing.second]))


def _edges(instances: UInt8[np.ndarray, "h w"]) -> np.ndarray:
    """Where the thing in front differs from that of the right or lower pixel."""
    padded = np.pad(instances, ((0, 1), (0, 1)), "edge")
    return (padded[:-1, :-1] != padded[1:, :-1]) | (padded[:-1, :-1] != padded[:-1, 1:])


def _hue(hue: float, saturation: float, value: float) -> Float[np.ndarray, "3 1 1"]:
    return _rgb(colorsys.hsv_to_rgb(hue, saturation, value))


def _sketch(canvas: np.ndarray, instances: np.ndarray, hue: float) -> np.ndarray:
    """Dark outlines and a faint colour on tinted paper."""
    paper = _hue(hue, 0.25, 0.95)
    return np.where(_edges(instances), 0.25 * paper, paper * (0.75 + 0.25 * canvas))


def _mosaic(canvas: np.ndarray, instances: np.ndarray, hue: float) -> np.ndarray:
    """Tiles of an eighth of the image in its mean colour, and tinted joints."""
    size = canvas.shape[-1]
    tile = size // 8
    mean = canvas[:, : 8 * tile, : 8 * tile].reshape(3, 8, tile, 8, tile).mean((2, 4))
    row = np.minimum(np.arange(size) // tile, 7)
    joint = np.arange(size) % tile == 0
    return np.where(joint[:, None] | joint, _hue(hue, 0.5, 0.45), mean[:, row[:, None], row])


def _neon(canvas: np.ndarray, instances: np.ndarray, hue: float) -> np.ndarray:
    """A dark image whose outlines shine."""
    glow = _hue(hue, 0.6, 0.2)
    return np.where(_edges(instances), np.minimum(1, 1.3 * canvas + 0.15), glow + 0.25 * canvas)


def _engraving(canvas: np.ndarray, instances: np.ndarray, hue: float) -> np.ndarray:
    """Hatching in two tones, the denser the darker; a quarter of the colour remains."""
    y, x = np.mgrid[: canvas.shape[1], : canvas.shape[2]]
    light = canvas.mean(0)
    ink, paper = _hue(hue, 0.7, 0.3), _hue(hue, 0.15, 0.95)
    return 0.75 * np.where((x + y) % 4 < 4 * (1 - light), ink, paper) + 0.25 * canvas


_STYLES = {"sketch": _sketch, "mosaic": _mosaic, "neon": _neon, "engraving": _engraving}

# ---- captioned scenes -----------------------------------------------------------------------------------------------------------------

PLACES = {"center": (0.5, 0.5), "left": (0.3, 0.5), "right": (0.7, 0.5), "top": (0.5, 0.3), "bottom": (0.5, 0.7)}
LAYOUTS = (*PLACES, "beside", "stacked")
RELATIONS = {"beside": ("left of", "right of"), "stacked": ("above", "below")}
NEAR = 0.25  # of the image's side: how far from the middle the two things of a pair are


@dataclass(frozen=True)
class Captioned:
    """n scenes of one or two things, from left to right or from top to bottom."""

    images: UInt8[Tensor, "n 3 size size"]
    captions: list[str]
    scenes: list[Scene]
    instances: UInt8[Tensor, "n size size"]
    depth: Float[Tensor, "n size size"]


def captioned(
    n: int, seed: int, size: int = 32, start: int = 0, *, styled: float = 0.4, under_specified: float = 0.4, single: float = 0.35
) -> Captioned:
    """Scenes start..start+n-1, each with a caption. Scene i depends on neither n nor start.

    styled: the share of scenes in one of STYLES. under_specified: the share of captions that name shapes only, so that the colour has to
    come from elsewhere. single: the share of scenes with one thing, at one of PLACES; the others have two beside or above each other.
    """
    scenes, captions = [], []
    for i in range(start, start + n):
        rng = np.random.default_rng((seed, i))
        scenes.append(sample_scene(rng, styled, single))
        captions.append(sample_caption(scenes[-1], rng, under_specified))
    images, instances, depth = render_all(scenes, size)
    return Captioned(images, captions, scenes, instances, depth)


def render_all(
    scenes: Iterable[Scene], size: int = 32
) -> tuple[UInt8[Tensor, "n 3 size size"], UInt8[Tensor, "n size size"], Float[Tensor, "n size size"]]:
    """Images, instances and depth."""
    parts = zip(*(render(scene, size) for scene in scenes), strict=True)
    return tuple(torch.from_numpy(np.stack(part)) for part in parts)


def sample_scene(rng: np.random.Generator, styled: float = 0.4, single: float = 0.35) -> Scene:
    alone = rng.random() < single
    layout = LAYOUTS[rng.integers(5)] if alone else LAYOUTS[5 + (rng.random() < 0.46)]
    if alone:
        centers, low, high = [PLACES[layout]], 6.0, 8.5
    else:
        step = np.array([NEAR, 0.0] if layout == "beside" else [0.0, NEAR])
        centers, low, high = [0.5 - step, 0.5 + step], 5.2, 6.6
    things = tuple(_sample_thing(rng, center, rng.uniform(low, high) / 32) for center in centers)
    style, hue = (_pick(rng, STYLES), rng.random()) if rng.random() < styled else ("", 0.0)
    return Scene(things, _pick(rng, tuple(BACKGROUNDS)), tuple(rng.uniform(-0.05, 0.05, 3)), style, hue)


def _sample_thing(rng: np.random.Generator, center: Sequence[float], radius: float) -> Thing:
    x, y = np.asarray(center) + rng.uniform(-0.02, 0.02, 2)
    texture = TEXTURES[max(0, rng.integers(4) - 1)]  # half of them plain
    return Thing(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), x, y, radius, texture, jitter=tuple(rng.uniform(-0.07, 0.07, 3)))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[rng.integers(len(options))]


def layout_of(scene: Scene) -> str:
    """Of LAYOUTS: where the only thing is, or how the two lie."""
    if len(scene.things) == 1:
        thing = scene.things[0]
        return min(PLACES, key=lambda place: np.hypot(thing.x - PLACES[place][0], thing.y - PLACES[place][1]))
    first, second = scene.things
    return "beside" if abs(first.x - second.x) > abs(first.y - second.y) else "stacked"


def describe(thing: Thing, full: bool = True) -> str:
    """ "a striped red circle", or with its shape alone "a circle"."""
    words = [thing.texture if thing.texture != "plain" else "", thing.colour] if full else []
    words = [word for word in [*words, thing.shape] if word]
    return f"a{'n' if words[0] == 'orange' else ''} {' '.join(words)}"


def sample_caption(scene: Scene, rng: np.random.Generator, under_specified: float = 0.4) -> str:
    """A description: with the place (70%) or the relation (75%), which may start from either thing, and always with the style."""
    full, layout = rng.random() >= under_specified, layout_of(scene)
    told, swapped, ground = rng.random(), rng.random() < 0.5, rng.random()
    things = [describe(thing, full) for thing in scene.things]
    if len(things) == 1:
        text = things[0] + (f" at the {layout}" if told < 0.7 else "")
    elif told < 0.75:
        text = f" {RELATIONS[layout][swapped]} ".join(things[::-1] if swapped else things)
    else:
        text = "a photo of " + " and ".join(things[::-1] if swapped else things)
    return text + _setting(scene, full or ground < 0.5)


def full_caption(scene: Scene) -> str:
    """The description that leaves nothing open which a caption can tell."""
    layout, things = layout_of(scene), [describe(thing) for thing in scene.things]
    text = f"{things[0]} at the {layout}" if len(things) == 1 else f" {RELATIONS[layout][0]} ".join(things)
    return text + _setting(scene, True)


def _setting(scene: Scene, background: bool) -> str:
    return (f" on a {scene.background} background" if background else "") + (f", {scene.style} style" if scene.style else "")


FACTORS = {  # what a scene reader is asked about each image
    "layout": LAYOUTS,
    "shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES,
    "second shape": SHAPES, "second colour": tuple(COLOURS), "second texture": TEXTURES,
    "background": tuple(BACKGROUNDS), "style": ("", *STYLES),
}  # fmt: skip


def factors(scene: Scene) -> list[int]:
    """The position of each factor's value in FACTORS; -1 for a second thing that is not there."""
    values = [layout_of(scene)]
    for thing in (*scene.things, None)[:2]:
        values += [thing.shape, thing.colour, thing.texture] if thing else [None] * 3
    values += [scene.background, scene.style]
    return [-1 if value is None else options.index(value) for value, options in zip(values, FACTORS.values(), strict=True)]


def concept(k: int) -> Thing:
    """One of 16 things outside the captions' vocabulary, of one of CONCEPT_FILLS in two fixed colours, in the middle of the image."""
    colours = list(COLOURS)
    shape, fill = SHAPES[(k + 2 * (k // 4)) % 5], CONCEPT_FILLS[k % 4]
    return Thing(shape, colours[k % 6], 0.5, 0.5, 0.24, fill, colours[(k + 1 + k // 6) % 6])


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
    for i, shape in enumerate(SHAPES[:4]):
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
