"""Stereo and flow pairs: rendered ones with exact fields and occlusions, a real pair, and readers of the published datasets.

A field is what must be added to a pixel's position (x, y) to reach its match in the other view, in pixels: (-disparity, 0) in the left view
of a stereo pair, (disparity, 0) in the right one, the flow in the first of two frames. NaN where unknown.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.data import photos
from common.errors import UserError

# ---- rendered pairs -------------------------------------------------------------------------------------------------------------------

LAYERS = 7  # a background and three to six shapes
SIDE = 128  # of a texture crop
TEXTURES = {
    "train": (("astronaut", "coffee", "china", "retina", "hubble_deep_field"), ("brick", "grass")),
    "test": (("cat", "flower", "rocket"), ("gravel",)),
}


class Pairs(NamedTuple):
    """n pairs; index 0 of `fields` and `visible` is the left view, 1 the right one."""

    left: UInt8[Tensor, "n 3 H W"]
    right: UInt8[Tensor, "n 3 H W"]
    fields: Float[Tensor, "n 2 H W 2"]
    visible: Bool[Tensor, "n 2 H W"]  # whose match is neither covered nor outside the other view


class _Layers(NamedTuple):
    """Textured planes, the nearest last. Maps "2 3" take a position (x, y, 1) of the left view."""

    field: Float[Tensor, "n l 2 3"]  # to the displacement there
    shape: Float[Tensor, "n l 2 3"]  # to the shape's own coordinates (u, v)
    box: Bool[Tensor, "n l"]  # u⁸ + v⁸ < 1, else u² + v² < 1
    paint: Float[Tensor, "n l 2 3"]  # to the texture's coordinates
    texture: Int[Tensor, "n l"]
    colour: Float[Tensor, "n l 2 3"]  # gain and offset of red, green and blue


def render(indices: Int[Tensor, "n"], seed: int, size: tuple[int, int], motion: Literal["stereo", "flow"] = "stereo", split: str = "train") -> Pairs:
    """Slanted shapes in front of a slanted background, each with a crop of a photograph; pair i is a function of (seed, i).

    Disparities grow with the width: at 128 columns 1 to 3 pixels for the background and 3 to 20 for the shapes; flow goes up to 8 either way.
    Views differ in gain, offset and noise.
    """
    pool = _pool(split)
    rngs = [np.random.default_rng((seed, int(i))) for i in indices]
    layers = _Layers(*(torch.from_numpy(np.stack(parts)) for parts in zip(*(_draw(rng, size, motion, len(pool)) for rng in rngs), strict=True)))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    grid = torch.stack([x, y], -1).expand(len(rngs), *size, 2)
    identity, inverse = torch.eye(2, 3).expand_as(layers.field), _inverse(layers.field + torch.eye(2, 3))
    images, fields, visible = [], [], []
    for to_left, other_to_left, to_other in ((identity, inverse, layers.field + torch.eye(2, 3)), (inverse, identity, inverse)):
        top = _top(layers, to_left, grid)
        match = _pick(_affine(to_other, grid), top)
        column_inside, row_inside = ((match >= 0) & (match <= grid.new_tensor([size[1] - 1, size[0] - 1]))).unbind(-1)
        visible.append(column_inside & row_inside & (_top(layers, other_to_left, match) == top))
        fields.append(match - grid)
        images.append(_develop(_paint(layers, to_left, grid, top, pool), rngs))
    return Pairs(*images, torch.stack(fields, 1), torch.stack(visible, 1))


def _draw(rng: np.random.Generator, size: tuple[int, int], motion: str, textures: int) -> tuple[np.ndarray, ...]:
    """The fields of `_Layers` for one pair."""
    height, width = size
    unit, is_shape = width / 128, np.arange(LAYERS) > 0
    centre = rng.uniform([0, 0], [width, height], (LAYERS, 2))
    if motion == "stereo":
        disparity = np.where(is_shape, np.sort(rng.uniform(3, 20, LAYERS)), rng.uniform(1, 3))
        slope = rng.uniform(-1, 1, (LAYERS, 1, 2)) * np.where(is_shape, 0.06, 0.01)[:, None, None]
        field = _around(np.concatenate([slope, 0 * slope], 1), centre, np.stack([-unit * disparity, 0 * disparity], -1))
    else:
        field = _around(rng.uniform(-0.05, 0.05, (LAYERS, 2, 2)), centre, unit * rng.uniform(-8, 8, (LAYERS, 2)))
    half, turn = unit * rng.uniform(8, 26, (LAYERS, 2, 1)), rng.uniform(0, 2 * np.pi, (2, LAYERS))
    shape = _around(_rotation(turn[0]) / half, centre, 0)
    shape[0] = 0  # the background is everywhere,
    shape[int(rng.integers(4, LAYERS + 1)) :] = 2  # and these layers nowhere
    paint = _around(_rotation(turn[1]) * rng.uniform(0.6, 1.1, (LAYERS, 1, 1)), centre, rng.uniform(0, SIDE, (LAYERS, 2)))
    colour = np.stack([rng.uniform(0.7, 1.3, (LAYERS, 3)), rng.uniform(-30, 30, (LAYERS, 3))], 1)
    box, texture = rng.random(LAYERS) < 0.5, rng.integers(textures, size=LAYERS)
    return *(m.astype(np.float32) for m in (field, shape)), box, paint.astype(np.float32), texture, colour.astype(np.float32)


def _rotation(angle: Float[np.ndarray, "l"]) -> Float[np.ndarray, "l 2 2"]:
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def _around(matrix: Float[np.ndarray, "l 2 2"], centre: Float[np.ndarray, "l 2"], value) -> Float[np.ndarray, "l 2 3"]:
    """x -> matrix (x - centre) + value."""
    return np.concatenate([matrix, (value - (matrix @ centre[..., None])[..., 0])[..., None]], -1)


def _inverse(maps: Float[Tensor, "n l 2 3"]) -> Float[Tensor, "n l 2 3"]:
    linear = torch.linalg.inv(maps[..., :2])
    return torch.cat([linear, -linear @ maps[..., 2:]], -1)


def _after(maps: Float[Tensor, "n l 2 3"], first: Float[Tensor, "n l 2 3"]) -> Float[Tensor, "n l 2 3"]:
    """x -> maps(first(x))."""
    return maps[..., :2] @ first + F.pad(maps[..., 2:], (2, 0))


def _affine(maps: Float[Tensor, "n l 2 3"], at: Float[Tensor, "n H W 2"]) -> tuple[Float[Tensor, "n H W l"], Float[Tensor, "n H W l"]]:
    """x and y of positions under the maps of all layers, in one product."""
    flat = F.pad(at, (0, 1), value=1.0).flatten(1, 2) @ maps.permute(0, 3, 2, 1).flatten(2)
    return flat.view(*at.shape[:3], 2, -1).unbind(3)


def _top(layers: _Layers, to_left: Float[Tensor, "n l 2 3"], at: Float[Tensor, "n H W 2"]) -> Int[Tensor, "n H W"]:
    """The nearest layer at any position of a view, exact between pixels too."""
    u, v = (t.square() for t in _affine(_after(layers.shape, to_left), at))
    inside = torch.where(layers.box[:, None, None], u**4 + v**4, u + v) < 1
    return (inside * torch.arange(1, inside.shape[-1] + 1)).argmax(-1)


def _pick(xy: tuple[Float[Tensor, "n H W l"], Float[Tensor, "n H W l"]], top: Int[Tensor, "n H W"]) -> Float[Tensor, "n H W 2"]:
    """The values of the layer that owns the pixel."""
    return torch.cat([t.gather(3, top[..., None]) for t in xy], -1)


def _paint(layers: _Layers, to_left, at: Float[Tensor, "n H W 2"], top: Int[Tensor, "n H W"], pool: Float[Tensor, "p s s 3"]):
    """The owning layer's texture, bilinear, repeated as in a mirror, in its colours: "n 3 H W"."""
    uv = _pick(_affine(_after(layers.paint, to_left), at), top).remainder(2 * SIDE - 2)
    uv = (SIDE - 1) - (uv - (SIDE - 1)).abs()
    corner = uv.floor().clamp(0, SIDE - 2)
    (fx, fy), (x, y) = (uv - corner).split(1, -1), corner.long().unbind(-1)
    index, rows = (layers.texture.gather(1, top.flatten(1)).view(top.shape) * SIDE + y) * SIDE + x, pool.flatten(0, 2)
    upper, lower = (torch.lerp(F.embedding(i, rows), F.embedding(i + 1, rows), fx) for i in (index, index + SIDE))
    number = top + len(layers.shape[0]) * torch.arange(len(top))[:, None, None]
    gain, offset = F.embedding(number, layers.colour.flatten(2).flatten(0, 1)).chunk(2, -1)
    return (torch.lerp(upper, lower, fy) * gain + offset).permute(0, 3, 1, 2)


def _develop(image: Float[Tensor, "n 3 H W"], rngs: list[np.random.Generator]) -> UInt8[Tensor, "n 3 H W"]:
    """A camera's own gain, offset and noise."""
    gain, offset = (torch.tensor([rng.uniform(low, high) for rng in rngs]).float()[:, None, None, None] for low, high in ((0.95, 1.05), (-5, 5)))
    noise = torch.stack([torch.from_numpy(rng.normal(0, 2, image.shape[1:])).float() for rng in rngs])
    return (image * gain + offset + noise).round().clamp(0, 255).to(torch.uint8)


@cache
def _pool(split: str) -> Float[Tensor, "p s s 3"]:
    """Crops of photographs, all of one contrast, so that every one can be matched; those of "train" and "test" share none."""
    if split not in TEXTURES:
        raise ValueError(f"no split {split!r}: one of {', '.join(TEXTURES)}")
    names, grey = TEXTURES[split]
    found = [photos.crops(16 * len(names), 0, SIDE, names=names)]
    for name in grey:
        tiles = photos.textures()[name].reshape(4, SIDE, 4, SIDE).swapaxes(1, 2).reshape(16, 1, SIDE, SIDE)
        found.append(np.broadcast_to(tiles, (16, 3, SIDE, SIDE)))
    crops = np.concatenate(found).transpose(0, 2, 3, 1).astype(np.float32)
    mean, deviation = (f(crops, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return torch.from_numpy(128 + 50 * (crops - mean) / deviation)


def pairs(n: int, seed: int, size: tuple[int, int], motion: Literal["stereo", "flow"] = "stereo", split: str = "train") -> Pairs:
    """Pairs 0..n-1, rendered a few at a time."""
    return Pairs(*map(torch.cat, zip(*(render(i, seed, size, motion, split) for i in torch.arange(n).split(32)), strict=True)))


def motorcycle(shrink: int = 1) -> tuple[UInt8[Tensor, "3 H W"], UInt8[Tensor, "3 H W"], Float[Tensor, "H W 2"]]:
    """The real pair that comes with scikit-image, Motorcycle of Middlebury 2014, at 1/shrink of its 741 x 500 pixels: left, right, left field."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    height, width = (n // shrink for n in disparity.shape)
    views = [Image.fromarray(view).resize((width, height), Image.Resampling.LANCZOS) for view in (left, right)]
    disparity = disparity[shrink // 2 :: shrink, shrink // 2 :: shrink][:height, :width] / shrink
    return *(torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy()) for view in views), disparity_field(disparity)


# ---- files ----------------------------------------------------------------------------------------------------------------------------


def disparity_field(disparity: Float[np.ndarray, "H W"]) -> Float[Tensor, "H W 2"]:
    """(-|disparity|, 0), NaN where it is not finite; Scene Flow signs the disparities of its right views."""
    d = torch.from_numpy(np.where(np.isfinite(disparity), np.abs(disparity), np.nan).astype(np.float32))
    return torch.stack([-d, torch.where(d.isnan(), d, 0.0)], -1)


def read_pfm(path: Path) -> Float[np.ndarray, "H W *c"]:
    """Portable float map: "Pf" (grey) or "PF" (colour), width and height, scale (negative: little-endian), then the rows from the bottom up."""
    data = _bytes(path)
    header = re.match(rb"(P[fF])\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", data)
    if header is None:
        raise UserError(f"{path} is not a PFM file (it begins with {data[:8]!r}): fetch it again")
    kind, width, height, scale = header[1], int(header[2]), int(header[3]), float(header[4])
    shape = (height, width, 3) if kind == b"PF" else (height, width)
    return _array(path, data[header.end() :], "<f4" if scale < 0 else ">f4", shape)[::-1].astype(np.float32)


def read_flo(path: Path) -> Float[np.ndarray, "H W 2"]:
    """Middlebury's flow format, as Sintel has it: "PIEH", width and height as int32, then (u, v) by rows, all little-endian; 1e9 is unknown."""
    data = _bytes(path)
    if data[:4] != b"PIEH" or len(data) < 12:
        raise UserError(f"{path} is not a .flo file (it begins with {data[:4]!r}): fetch it again")
    width, height = np.frombuffer(data, "<i4", 2, 4).tolist()
    flow = _array(path, data[12:], "<f4", (height, width, 2)).astype(np.float32)
    return np.where(np.abs(flow) < 1e9, flow, np.nan)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the dataset's directory") from None


def _array(path: Path, data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(data) < 4 * np.prod(shape):
        raise UserError(f"{path} ends after {len(data)} of {4 * np.prod(shape)} bytes: fetch it again")
    return np.frombuffer(data, dtype, int(np.prod(shape))).reshape(shape)


def read_image(path: Path) -> UInt8[Tensor, "3 H W"]:
    return torch.from_numpy(_open(path, "RGB").transpose(2, 0, 1).copy())


def _open(path: Path, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): fetch it again") from None


def read_field(path: Path) -> Float[Tensor, "H W 2"]:
    """Disparities from .pfm (infinite: unknown), a 16-bit grey .png (KITTI: 256 a pixel, 0 unknown) or Spring's .dsp5; flow from .flo."""
    if path.suffix == ".flo":
        return torch.from_numpy(read_flo(path))
    if path.suffix == ".pfm":
        return disparity_field(read_pfm(path))
    if path.suffix == ".dsp5":
        return disparity_field(_read_dsp5(path))
    raw = _open(path).astype(np.float32)
    if raw.ndim != 2:
        raise UserError(f"{path} is no disparity map: it has {raw.shape[-1]} channels instead of one of 16 bits")
    return disparity_field(np.where(raw > 0, raw / 256, np.nan))


def _read_dsp5(path: Path) -> Float[np.ndarray, "H W"]:
    """Spring: HDF5 with one dataset, at twice the resolution of the images, in pixels of theirs."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} is an HDF5 file: `pip install h5py` to read it") from None
    try:
        with h5py.File(path) as file:
            return file["disparity"][::2, ::2]
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a Spring disparity file ({error}): fetch it again") from None


# ---- published datasets ---------------------------------------------------------------------------------------------------------------


def _swap(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Replace the last occurrence of each old text in a path."""

    def swapped(path: str) -> str:
        for old, new in pairs:
            head, found, tail = path.rpartition(old)
            path = head + new + tail if found else path
        return path

    return swapped


def _next_frame(path: str) -> str:
    return re.sub(r"(\d+)(\.\w+)$", lambda m: f"{int(m[1]) + 1:0{len(m[1])}d}{m[2]}", path)


class Layout(NamedTuple):
    """Where a dataset keeps what. `left` is a glob under the root; the other paths are made from the left image's."""

    left: str
    right: Callable[[str], str]
    field: Callable[[str], str]
    noc: Callable[[str], str] | None = None  # image that is 255, or for KITTI not 0, where a pixel is known and seen by both views
    right_field: Callable[[str], str] | None = None
    source: str = ""


_SPRING = ("frame_left", "disp1_left"), ("frame_left", "disp1_left"), (".png", ".dsp5")  # the directory and the file
LAYOUTS = {
    "kitti2012": Layout(
        "training/colored_0/*_10.png", _swap(("colored_0", "colored_1")), _swap(("colored_0", "disp_occ")), _swap(("colored_0", "disp_noc")),
        source="cvlibs.net/datasets/kitti/eval_stereo_flow.php?benchmark=stereo",
    ),
    "kitti2015": Layout(
        "training/image_2/*_10.png", _swap(("image_2", "image_3")), _swap(("image_2", "disp_occ_0")), _swap(("image_2", "disp_noc_0")),
        source="cvlibs.net/datasets/kitti/eval_scene_flow.php?benchmark=stereo",
    ),
    "middlebury": Layout(
        "*/im0.png", _swap(("im0", "im1")), _swap(("im0.png", "disp0GT.pfm")), _swap(("im0", "mask0nocc")),
        source="vision.middlebury.edu/stereo/submit3, giving MiddEval3/trainingF, trainingH or trainingQ",
    ),
    "middlebury2014": Layout(
        "train/*/im0.png", _swap(("im0", "im1")), _swap(("im0.png", "disp0.pfm")), right_field=_swap(("im0.png", "disp1.pfm")),
        source="vision.middlebury.edu/stereo/data/scenes2014",
    ),
    "eth3d": Layout(
        "two_view_training/*/im0.png", _swap(("im0", "im1")), _swap(("im0.png", "disp0GT.pfm"), ("two_view_training", "two_view_training_gt")),
        _swap(("im0", "mask0nocc"), ("two_view_training", "two_view_training_gt")), source="www.eth3d.net/datasets (two-view)",
    ),
    "sceneflow": Layout(
        "*/frames_cleanpass/**/left/*.png", _swap(("left", "right")), _swap(("frames_cleanpass", "disparity"), (".png", ".pfm")),
        right_field=_swap(("frames_cleanpass", "disparity"), ("left", "right"), (".png", ".pfm")),
        source="lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html",
    ),
    "spring": Layout(
        "train/*/frame_left/*.png", _swap(("frame_left", "frame_right"), ("frame_left", "frame_right")), _swap(*_SPRING),
        right_field=_swap(*((old, new.replace("left", "right")) for old, new in _SPRING)), source="spring-benchmark.org",
    ),
    "sintel": Layout("training/final/*/*.png", _next_frame, _swap(("final", "flow"), (".png", ".flo")), source="sintel.is.tue.mpg.de"),
}  # fmt: skip


class StereoFolder(Dataset):
    """(left, right, field of the left view, noc: known and seen by both views) of a published dataset; views are uint8 "3 H W".

    name: one of LAYOUTS. Sintel gives consecutive frames and their flow. Where a dataset has no occlusion masks, noc is what is known.
    Raises UserError for a missing directory and, on access, for missing or damaged files.
    """

    def __init__(self, root: str | Path, name: str):
        if name not in LAYOUTS:
            raise UserError(f"there is no stereo dataset {name!r}: one of {', '.join(LAYOUTS)}")
        self.layout = LAYOUTS[name]
        files = sorted(Path(root).glob(self.layout.left))
        self.files = [path for path in files if name != "sintel" or Path(self.layout.right(str(path))).exists()]  # a last frame has no flow
        if not self.files:
            raise UserError(f"{root} holds no {self.layout.left}: get {name} from {self.layout.source} and give the directory above these files")

    def __len__(self) -> int:
        return len(self.files)

    def both_fields(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], UInt8[Tensor, "3 H W"], Float[Tensor, "2 H W 2"]]:
        """A training example as the rendered ones are: left, right, the fields of both views."""
        left, layout = str(self.files[i]), self.layout
        if layout.right_field is None:
            raise UserError(f"{left}: this dataset has no field of the right view: train on sceneflow, spring or middlebury2014")
        fields = read_field(Path(layout.field(left))), -read_field(Path(layout.right_field(left)))
        return read_image(Path(left)), read_image(Path(layout.right(left))), torch.stack(fields)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], UInt8[Tensor, "3 H W"], Float[Tensor, "H W 2"], Bool[Tensor, "H W"]]:
        left, layout = str(self.files[i]), self.layout
        field = read_field(Path(layout.field(left)))
        noc = field.isfinite().all(-1)
        if layout.noc:
            noc &= torch.from_numpy(_open(Path(layout.noc(left))) > (254 if "mask" in layout.noc(left) else 0))
        return read_image(Path(left)), read_image(Path(layout.right(left))), field, noc


class Crops(Dataset):
    """Random crops of a dataset that has the fields of both views: (left, right, fields "2 H W 2")."""

    def __init__(self, folder: StereoFolder, size: tuple[int, int]):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        left, right, fields = self.folder.both_fields(i)
        if any(have < want for have, want in zip(left.shape[1:], self.size, strict=True)):
            raise UserError(f"{self.folder.files[i]} is smaller than --crop {self.size[0]} {self.size[1]}: give a smaller one")
        y, x = (int(torch.randint(have - want + 1, ())) for have, want in zip(left.shape[1:], self.size, strict=True))
        rows, columns = slice(y, y + self.size[0]), slice(x, x + self.size[1])
        return left[:, rows, columns], right[:, rows, columns], fields[:, rows, columns]
