"""Train a small MatchStereo on rendered pairs beside its ablations and a row-attention network, at equal steps and rates.

With --data DIR, train a published size on a dataset that has the disparities of both views.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.attention import MultiHeadAttention
from common.config import RunConfig
from common.data import Batches, stereo
from common.errors import UserError
from common.gpu import seed_everything
from common.layers import init_by_fan_in, sinusoidal
from common.loop import each, fit
from papers.match_attention.model import (
    SIZES,
    ConvFormer,
    ConvGLU,
    MatchAttention,
    Matched,
    MatchStereo,
    UpConv,
    consistent,
    convex_upsample,
    convolve,
    mask_head,
    match_attention,
    other_view,
)


@dataclass
class Config(RunConfig):
    """Of the small network and its data; a published size has its own."""

    variant: str = "tiny"  # published size, for --data and --weights: tiny, small, base, or flow_base
    dataset: str = "sceneflow"  # layout of --data: kitti2012, kitti2015, middlebury, middlebury2014, eth3d, sceneflow, spring, sintel
    low_res_init: bool = False  # with --weights: start from the field at half the resolution
    crop: tuple[int, int] = (64, 128)  # rendered images, and training crops of --data
    flow_size: tuple[int, int] = (80, 112)  # rendered images of the flow network
    pairs: int = 600  # rendered for training
    test_pairs: int = 100  # and to be judged on
    dims: tuple[int, ...] = (16, 24, 32)  # of the encoder at 1/4, 1/8, 1/16
    depths: tuple[int, ...] = (1, 1, 1)  # its blocks
    layers: tuple[int, ...] = (1, 2, 1)  # of the decoder at 1/16, 1/8, 1/4
    heads: int = 2
    row_dim: int = 32  # width of the row-attention network at 1/4
    row_layers: int = 2  # its layers
    heights: tuple[int, ...] = (16, 32, 64, 128)  # of the timed layers' maps, which are twice as wide
    image_heights: tuple[int, ...] = (192, 256, 384)  # of the images in which the tiny network's memory is measured, also twice as wide
    tiny_layers: tuple[int, ...] = (8, 8, 8, 2)  # of that network's decoder
    image: tuple[int, int] = (384, 1248)  # in which it is timed: KITTI's
    repeats: int = 2  # of each timing


SCALES = {
    "smoke": Config(
        seeds=(0,), steps=2, batch=1, pairs=2, test_pairs=1, layers=(1, 1, 1), dims=(4, 4, 8), crop=(64, 80), flow_size=(80, 80),
        row_dim=8, row_layers=1, heights=(4, 8), image_heights=(192, 224), image=(192, 192), tiny_layers=(1, 1, 1, 1), repeats=1,
        processes=1,
    ),
    "small": Config(steps=250, batch=2, lr=3e-3, warmup=0.1, weight_decay=1e-4, clip=1.0),
    "full": Config(
        seeds=(0,), steps=200_000, batch=8, lr=4e-4, warmup=0.02, weight_decay=1e-4, clip=1.0, crop=(320, 736), workers=8, save_every=0.01
    ),
}  # fmt: skip

STEREO = ("full", "rounded", "ungated", "unconstrained", "row")


# ---- ablations and the baseline ---------------------------------------------------------------------------------------------------------


def rounded(q, k, v, centre, grid, radius, keep):
    """Windows around whole pixels: no gradient reaches the centres."""
    return match_attention(q, k, v, centre.detach().round(), grid, radius, keep)


class Open(nn.Module):
    """A gate that is always 1."""

    def forward(self, x: Tensor) -> float:
        return 1.0


class RowLayer(nn.Module):
    """A transformer layer over the rows of both views: self-attention, cross-attention, ConvGLU."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attend_self, self.attend_cross = MultiHeadAttention(dim, heads), MultiHeadAttention(dim, heads, context_dim=dim)
        self.mlp = ConvGLU(dim, 2 * dim)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        height = x.shape[1]
        y = rearrange(x, "b y x c -> (b y) x c")
        y = y + self.attend_self(self.norms[0](y))
        z = self.norms[1](y)
        y = y + self.attend_cross(z, other_view(z))
        x = rearrange(y, "(b y) x c -> b y x c", y=height)
        return x + self.mlp(self.norms[2](x))


class RowMatcher(nn.Module):
    """The baseline, in the manner of STTR and GMStereo: all pairs of a row are compared at once, at 1/4 of the image.

    MatchStereo's encoder, skips and upsampling around transformer layers over rows; the disparity is the expectation of a softmax over the
    row, then a self-attention within the row carries it into occlusions.
    """

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], dim: int, layers: int, heads: int):
        super().__init__()
        self.encoder = ConvFormer(dims, depths)
        self.up_decoders = nn.ModuleList(UpConv(i, o) for i, o in zip(dims[:0:-1], dims[-2::-1], strict=True))
        self.widen = nn.Linear(dims[0], dim)
        self.layers = nn.ModuleList(RowLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.carry = nn.ModuleDict({"q": nn.Linear(dim, dim), "k": nn.Linear(dim, dim)})
        self.up_mask = mask_head(dim, dim, 4)

    def forward(self, left: Float[Tensor, "b 3 H W"], right: Float[Tensor, "b 3 H W"], stereo: bool = True) -> Matched:
        *skips, x = self.encoder(2 * torch.cat([left, right]) / 255 - 1)
        for up in self.up_decoders:
            x = up(x, skips.pop())
        column = torch.arange(x.shape[2], device=x.device)
        x = self.widen(x)
        x = x + sinusoidal(column, x.shape[-1])
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        corr = x @ other_view(x).transpose(-1, -2) * x.shape[-1] ** -0.5  # like features match from the first step on
        behind = column > column[:, None]  # the left view's match lies to its left, the right one's to its right
        there = torch.stack([behind, behind.T]).repeat_interleave(len(left), 0)[:, None]
        target = corr.masked_fill(there, float("-inf")).softmax(-1) @ column.to(x.dtype)
        field = F.pad((target - column)[..., None], (0, 1))
        carry = (self.carry["q"](x) @ self.carry["k"](x).transpose(-1, -2) * x.shape[-1] ** -0.5).softmax(-1)
        carried = carry @ field
        return Matched(convex_upsample(carried, convolve(self.up_mask, x), 4), [{"self": carried}], field, None, carried)


def build(cfg: Config, variant: str) -> nn.Module:
    """A small network: one of STEREO, or "flow". All start from variance 1 / fan-in, the attentions' updates of the fields from 0."""
    if variant == "row":
        return init_by_fan_in(RowMatcher(cfg.dims, cfg.depths, cfg.row_dim, cfg.row_layers, cfg.heads))
    scales = len(cfg.dims)
    model = init_by_fan_in(MatchStereo(cfg.dims, cfg.depths, [1] * scales, cfg.layers, [cfg.heads] * scales, [2] * scales))
    for layer in model.modules():
        if isinstance(layer, MatchAttention):
            nn.init.zeros_(layer.proj.weight)
            layer.operator = rounded if variant == "rounded" else match_attention
            if variant == "ungated" and layer.kind == "cross":
                layer.g = Open()
    return model


def published(variant: str) -> MatchStereo:
    """A published size, with random weights."""
    size = variant.removeprefix("flow_")
    if size not in SIZES:
        raise UserError(f"--variant {variant}: take one of {', '.join(SIZES)}, flow_base")
    return MatchStereo(SIZES[size])


# ---- the loss ---------------------------------------------------------------------------------------------------------------------------


def match_loss(out: Matched, target: Float[Tensor, "b H W 2"], constrained: bool = True, gamma: float = 0.9) -> dict[str, Float[Tensor, ""]]:
    """L1 of every field in full-resolution pixels, later ones weighing more. target: of both views, NaN where unknown.

    Consistency-constrained: what is matched, the first field and those after cross-attention, is judged only where the true fields lead
    back to the pixel (within 1 pixel); what is propagated, those after self-attention and the upsampled ones, everywhere.
    """
    known = target.isfinite().all(-1)
    visible = consistent(target, 1.0) if constrained else known
    fields = [(out.init_flow, visible)]
    fields += [(field, visible if kind == "cross" else known) for both in out.field_all for kind, field in both.items()]
    losses = [gamma**i * _l1(field, target, where) for i, (field, where) in enumerate(reversed(fields))]
    return {"final": _l1(out.field_up, target, known), "fields": 0.5 * sum(losses)}


def _l1(field: Float[Tensor, "b h w 2"], target: Float[Tensor, "b H W 2"], where: Bool[Tensor, "b H W"]) -> Float[Tensor, ""]:
    step = target.shape[1] // field.shape[1]
    target, where = (t[:, step // 2 :: step, step // 2 :: step] for t in (target, where))
    return ((step * field - target.nan_to_num()).abs().sum(-1) * where).mean()


def objective(stereo_pair: bool, constrained: bool) -> Callable[[nn.Module, tuple], dict[str, Tensor]]:
    """The loss of a batch (left, right, fields "n 2 H W 2")."""

    def loss(model: nn.Module, batch: tuple) -> dict[str, Tensor]:
        left, right, fields = batch
        return match_loss(model(left.float(), right.float(), stereo_pair), rearrange(fields, "n v y x t -> (v n) y x t"), constrained)

    return loss


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


@cache
def rendered(n: int, seed: int, size: tuple[int, int], motion: str, split: str = "train") -> stereo.Pairs:
    return stereo.pairs(n, seed, size, motion, split)


def train(cfg: Config) -> None:
    if cfg.data:
        return each(train_published, [(seed,) for seed in cfg.seeds], cfg)
    each(train_one, [(variant, seed) for variant in (*STEREO, "flow") for seed in cfg.seeds], cfg)


def train_one(cfg: Config, variant: str, seed: int) -> None:
    seed_everything(seed)
    size, motion = (cfg.flow_size, "flow") if variant == "flow" else (cfg.crop, "stereo")
    dataset = TensorDataset(*rendered(cfg.pairs, 0, size, motion)[:3])
    loss = objective(motion == "stereo", constrained=variant != "unconstrained")
    fit(build(cfg, variant), loss, Batches(dataset, cfg.batch, seed), cfg, f"{variant}/{seed}")


def train_published(cfg: Config, seed: int) -> None:
    seed_everything(seed)
    dataset = stereo.Crops(stereo.StereoFolder(cfg.data, cfg.dataset), cfg.crop)
    fit(published(cfg.variant), objective(True, True), Batches(dataset, cfg.batch, seed, cfg.workers), cfg, f"{cfg.variant}/{seed}")
