"""MatchAttention (Yan et al. 2025, arXiv 2510.14260).

A pixel p of one view attends to a small window of the other, centred at p + F(p): its field F (stereo: minus the disparity; flow) is a part of
the features, read as the centre of the window and refined by the layer's own residual.

    c = p + r                                     centre (x, y), in pixels, inside the map; r = F, or a head's own relative position   b h n 2
    W = ⌊c⌋ + {-R..R+1}²                          (2R+2)² = M keys, row-major
    s_j = -‖q - k_j‖₁ / √d,   j ∈ W               logits                                                                              b h n M
    α_j = Σ_t b_t softmax_{W_t}(s)_j              BilinearSoftmax over the four (2R+1)² sub-windows t = nw, ne, sw, se of W           b h n M
    b = ((1-f_x)(1-f_y), f_x(1-f_y), (1-f_x)f_y, f_x f_y),   f = c - ⌊c⌋      the only way a gradient reaches r                       b h n 4
    o = Σ_j α_j v_j                                                                                                                   b h n d

One layer, for both views at once (b = left views, then right views; the other view is the other half of the batch):

    noc = 1[‖F(p) + F'(p + F(p))‖₁ < 2]           where the views agree, F' being the other view's field
    [x; F; r] += Self([LN[x; F; r]; noc])         centres p + r: carries matches into occlusions
    [x; F]    += W_o[SiLU(W_g y) ⊙ o; α]          gated Cross, y = LN[x; F], centres p + F
    x         += ConvGLU(LN x)                    the field stays out of the MLP

The decoder starts from the expected disparity of a global correlation at the coarsest scale and runs such layers from there to 1/4 of the image,
the field going from scale to scale by convex upsampling. All maps are channels-last.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads

SIZES = {"tiny": (32, 64, 128, 160), "small": (64, 128, 160, 320), "base": (128, 256, 320, 512)}  # widths at 1/4, 1/8, 1/16, 1/32


# ---- the operator -----------------------------------------------------------------------------------------------------------------------


def subwindows(radius: int, like: Tensor) -> Float[Tensor, "M 4"]:
    """1 where a cell of the (2R+2)² window belongs to the sub-window nw, ne, sw or se."""
    i = torch.arange(2 * radius + 2, device=like.device)
    first_last = torch.stack([i <= 2 * radius, i > 0], 1).to(like.dtype)
    return torch.kron(first_last, first_last)


def bilinear_softmax(s: Float[Tensor, "*n M"], b: Float[Tensor, "*n 4"], member: Float[Tensor, "M 4"]) -> tuple[Tensor, Tensor, Tensor]:
    """α, e = exp(s - max s) and Z_t = Σ_{W_t} e: one exponential per cell, as the four softmaxes differ only in their sums.

    A sub-window 87 nats below the best cell weighs nothing.
    """
    e = (s - s.amax(-1, keepdim=True)).exp()
    total = (e @ member).clamp_min(torch.finfo(e.dtype).tiny)
    return e * ((b / total) @ member.T), e, total


def window(
    centre: Float[Tensor, "b h n 2"], grid: tuple[int, int], radius: int
) -> tuple[Int[Tensor, "b h n"], Int[Tensor, "M"], Float[Tensor, "b h n 4"]]:
    """W and b: the window's first key as a row of all keys "(b h m)", the offsets from there to its M keys, and the sub-windows' shares.

    The offsets are the same for all queries, as clamping the centres keeps the windows inside the map. Raises ValueError for a smaller map.
    """
    height, width = grid
    if min(grid) < 2 * radius + 2:
        raise ValueError(f"a map of {height} x {width} is smaller than a window of radius {radius}: give it at least {2 * radius + 2} on each side")
    most = centre.new_tensor([width, height]) - (1 + radius + 1e-3)
    c = centre.clamp(torch.full_like(most, radius), most)
    first = c.detach().floor()
    x, y = (first - radius).long().unbind(-1)
    maps = torch.arange(centre[..., 0, 0].numel(), device=centre.device).view(*centre.shape[:2], 1)
    i = torch.arange(2 * radius + 2, device=centre.device)
    fx, fy = (c - first).unbind(-1)
    b = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], -1)
    return (maps * height + y) * width + x, (i[:, None] * width + i).flatten(), b


class _Match(torch.autograd.Function):
    """The operator on rows, a chunk of queries at a time. The backward pass gathers and scores again, so that memory holds no window:

    ∂b_t = Σ_{W_t} softmax_{W_t}(s) ∂α,   ∂s_j = α_j ∂α_j - e_j Σ_{t∋j} b_t / Z_t ∂b_t,   ∂q = Σ_j ∂s_j sign(k_j - q) / √d = -Σ_j ∂k_j
    """

    @staticmethod
    def forward(ctx, q, k, v, b, corner, offsets, member, keep):
        ctx.save_for_backward(q, k, v, b, corner, offsets, member)
        o, weights = torch.empty_like(q), q.new_empty(len(q), len(offsets)) if keep else None
        for rows in chunks(q, offsets):
            taps = corner[rows, None] + offsets
            alpha = bilinear_softmax(_logits(q[rows], F.embedding(taps, k)), b[rows], member)[0]
            o[rows] = F.embedding_bag(taps, v, per_sample_weights=alpha, mode="sum")
            if keep:
                weights[rows] = alpha
        return o, weights

    @staticmethod
    def backward(ctx, do, dweights):
        q, k, v, b, corner, offsets, member = ctx.saved_tensors
        dq, dk, dv, db = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(b)
        for rows in chunks(q, offsets):
            taps = corner[rows, None] + offsets
            keys = F.embedding(taps, k)
            alpha, e, total = bilinear_softmax(_logits(q[rows], keys), b[rows], member)
            dalpha = (F.embedding(taps, v) @ do[rows, :, None])[..., 0] + (0 if dweights is None else dweights[rows])
            db[rows] = (e * dalpha) @ member / total
            ds = alpha * dalpha - e * ((b[rows] / total * db[rows]) @ member.T)
            pull = (ds * q.shape[1] ** -0.5)[..., None] * (keys - q[rows, None]).sign()
            dq[rows] = pull.sum(1)
            dk.index_add_(0, taps.flatten(), pull.flatten(0, 1), alpha=-1)
            dv.index_add_(0, taps.flatten(), (alpha[..., None] * do[rows, None]).flatten(0, 1))
        return dq, dk, dv, db, None, None, None, None


def chunks(q: Float[Tensor, "n d"], offsets: Int[Tensor, "M"]) -> Iterator[slice]:
    """Rows of q whose windows together stay in a CPU's cache, or fill a GPU."""
    step = max(1, (2**19 if q.device.type == "cpu" else 2**26) // (len(offsets) * q.shape[1]))
    return (slice(i, i + step) for i in range(0, len(q), step))


def _logits(q, keys):
    """s of the queries "n d" over their own keys "n M d"; cdist never holds the differences."""
    return torch.cdist(q[:, None], keys, p=1)[:, 0] * -(q.shape[-1] ** -0.5)


def match_attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], centre: Float[Tensor, "b h n 2"],
    grid: tuple[int, int], radius: int, keep: bool = True,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n M"] | None]:  # fmt: skip
    """o and, if asked to keep them, α. O(n M d) time; memory O(n d), and n M for α. Computed in the centres' precision."""
    with torch.autocast(q.device.type, enabled=False):
        corner, offsets, b = window(centre, grid, radius)
        rows = (t.to(centre.dtype).flatten(0, 2) for t in (q, k, v, b))
        o, weights = _Match.apply(*rows, corner.flatten(), offsets, subwindows(radius, centre), keep)
    return o.view(q.shape), weights.view(*q.shape[:3], -1) if keep else None


class MatchAttention(Attention):
    """The operator between projections. Kind "self": y attends to itself; "cross": to the other view, gated, its weights projected with it.

    inputs, outputs: widths of y and of the residual. Every query has keys of its own, so no fused kernel applies and a control finds the
    stages logits and weights over the M cells of the window; with one, all windows are gathered at once.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, heads: int, head_dim: int, radius: int, layer: int = 0):
        super().__init__(heads, kind, layer)
        self.radius, self.operator = radius, match_attention
        inner = heads * head_dim
        self.q, self.k, self.v = (nn.Linear(inputs, inner, bias=False) for _ in range(3))
        if kind == "cross":
            self.g = nn.Sequential(nn.Linear(inputs, inner, bias=False), nn.SiLU())
        self.proj = nn.Linear(inner + (heads * (2 * radius + 2) ** 2 if kind == "cross" else 0), outputs, bias=False)

    def hidden(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        self.grid = x.shape[1:3]
        return super().hidden(x.flatten(1, 2)).view(x.shape)

    def forward(self, x: Float[Tensor, "b H W c"], context: Float[Tensor, "b H W c"], r: Float[Tensor, "b H W two_h"]) -> Float[Tensor, "b H W e"]:
        """r: of each head, or one (width 2) for all."""
        self.grid = x.shape[1:3]
        centre = rearrange(positions(*self.grid, r) + r.unflatten(-1, (-1, 2)).movedim(-2, 1), "b h y x t -> b h (y x) t")
        x, context = x.flatten(1, 2), context.flatten(1, 2)
        context = self.context(x, context)
        q, k, v = (split_heads(project(t), self.heads) for project, t in ((self.q, x), (self.k, context), (self.v, context)))
        o, weights = self.attend(q, k, v, centre.expand(-1, self.heads, -1, -1))
        o = merge_heads(o)
        if self.kind == "cross":
            o = torch.cat([self.g(x) * o, merge_heads(weights)], -1)
        return self.output(self.proj(o)).unflatten(1, self.grid)

    def attend(self, q, k, v, centre):
        """o and α (None for kind "self")."""
        if not self.controls:
            return self.operator(q, k, v, centre, self.grid, self.radius, self.kind == "cross")
        q, k, v = self._edit("qkv", (q, k, v), lambda method, site, qkv: method(site, *qkv))
        corner, offsets, b = window(centre, self.grid, self.radius)
        taps = corner[..., None] + offsets
        s = -(q[..., None, :] - F.embedding(taps, k.flatten(0, 2))).abs().sum(-1) * q.shape[-1] ** -0.5
        p = self._edit("weights", bilinear_softmax(self._edit("logits", s), b, subwindows(self.radius, s))[0])
        o = torch.einsum("bhnm,bhnmd->bhnd", p, F.embedding(taps, v.flatten(0, 2)))
        return self._edit("heads", o, lambda method, site, o: method(site, o, q)), p


# ---- fields -----------------------------------------------------------------------------------------------------------------------------


def positions(height: int, width: int, like: Tensor) -> Float[Tensor, "H W 2"]:
    """p = (x, y) of every pixel; centres of pixels are integers."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in (height, width)), indexing="ij")
    return torch.stack([x, y], -1)


def other_view(x: Tensor) -> Tensor:
    """Swap the halves of the batch."""
    return x.roll(len(x) // 2, 0)


def consistent(field: Float[Tensor, "b H W 2"], threshold: float) -> Bool[Tensor, "b H W"]:
    """Where a pixel's match leads back to it: ‖F(p) + F'(p + F(p))‖₁ < threshold. F' is zero outside the other view."""
    height, width = field.shape[1:3]
    match = 2 * (positions(height, width, field) + field) / field.new_tensor([width - 1, height - 1]) - 1
    back = F.grid_sample(rearrange(other_view(field), "b y x t -> b t y x"), match, align_corners=True)
    return (field + rearrange(back, "b t y x -> b y x t")).abs().sum(-1) < threshold


def convex_upsample(field: Float[Tensor, "b H W 2"], mask: Float[Tensor, "b H W k"], factor: int) -> Float[Tensor, "b fH fW 2"]:
    """Each fine pixel is a convex combination of the 3x3 coarse ones around it, times `factor`. mask: logits (9, factor, factor)."""
    weights = rearrange(mask, "b y x (k u v) -> b y u x v k", k=9, u=factor).softmax(-1)
    near = F.unfold(rearrange(factor * field, "b y x c -> b c y x"), 3, padding=1)
    near = rearrange(near, "b (c k) (y x) -> b y x k c", k=9, y=field.shape[1])
    return rearrange(torch.einsum("byuxvk,byxkc->byuxvc", weights, near), "b y u x v c -> b (y u) (x v) c")


class GlobalCorrelation(nn.Module):
    """The field at the coarsest scale: a softmax over all matches, then its expectation near the best one. At least 5 columns (flow: and rows)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.q, self.k = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Float[Tensor, "b H W c"], stereo: bool) -> tuple[Float[Tensor, "b H W 2"], Float[Tensor, "b ..."]]:
        """The field and the probabilities: of disparities "b D H W" (D = W), or of all target pixels "b H W (H W)"."""
        left, right = self.norm(x).chunk(2)
        return (self._stereo if stereo else self._flow)(self.q(left) * x.shape[-1] ** -0.5, self.k(right))

    def _stereo(self, q, k):
        """A disparity d is the pair (x, x - d) of the left view and (x, x + d) of the right one, which is the left one's mirror image."""
        corr = q @ k.transpose(-1, -2)
        corr = torch.cat([corr, corr.transpose(-1, -2).flip(-2, -1)])
        d = torch.arange(corr.shape[-1], device=corr.device)
        there = d[:, None] - d  # column x - d, by x and d
        index = there.clamp_min(0).expand_as(corr)
        p = torch.where(there >= 0, corr.gather(-1, index), 0).softmax(-1)
        p = p.gather(-2, torch.maximum(d[:, None], d).expand_as(p))  # what looks out of view takes the column that still sees
        blurred = F.avg_pool1d(p.flatten(1, 2), 5, 1, 2).view(p.shape)
        near = blurred.argmax(-1, keepdim=True).clamp(2, len(d) - 3) + torch.arange(-2, 3, device=d.device)
        disparity = _expectation(p.gather(-1, near), near[..., None], 1 / len(d))
        left, right = F.pad(disparity, (0, 1)).chunk(2)
        volume = torch.cat([p[: len(left)], p[len(left) :].flip(-2)])
        return torch.cat([-left, right.flip(-2)]), rearrange(volume, "b y x d -> b d y x")

    def _flow(self, q, k):
        grid = q.shape[1:3]
        corr = q.flatten(1, 2) @ k.flatten(1, 2).transpose(-1, -2)
        p = torch.cat([corr, corr.transpose(-1, -2)]).softmax(-1)
        # over the flattened indices of source and target, as the published weights were trained
        best = F.avg_pool2d(p, 5, 1, 2).argmax(-1)
        y, x = (i.clamp(2, n - 3) for i, n in zip((best // grid[1], best % grid[1]), grid, strict=True))
        dy, dx = torch.meshgrid(*[torch.arange(-2, 3, device=p.device)] * 2, indexing="ij")
        y, x = y[..., None] + dy.flatten(), x[..., None] + dx.flatten()
        target = _expectation(p.gather(-1, y * grid[1] + x), torch.stack([x, y], -1), 1 / p.shape[-1])
        return target.unflatten(1, grid) - positions(*grid, p), p.unflatten(1, grid)


def _expectation(p: Float[Tensor, "*n m"], value: Int[Tensor, "*n m e"], least: float) -> Float[Tensor, "*n e"]:
    """Mean of the values, those with a probability below `least` left out."""
    p = p * (p >= least)
    return (p[..., None] * value).sum(-2) / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


# ---- layers -----------------------------------------------------------------------------------------------------------------------------


def convolve(layer: nn.Module, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b h w e"]:
    """A channels-first module on a channels-last map."""
    return rearrange(layer(rearrange(x, "b y x c -> b c y x")), "b c y x -> b y x c")


class ConvGLU(nn.Module):
    """fc2(gelu(dwconv(u)) · v), [u, v] = fc1(x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        u, v = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(convolve(self.dwconv, u)) * v)


class MatchAttentionLayer(nn.Module):
    """Self, cross, MLP. self_rpos: r of the self-attention, head by head. Returns x, r, F and the two fields that the loss sees."""

    def __init__(self, dim: int, heads: int, radius: int, mlp_ratio: int = 2, head_dim: int | None = None, layer: int = 0):
        super().__init__()
        head_dim, with_field, with_rpos = head_dim or dim // heads, dim + 2, dim + 2 + 2 * heads
        self.field_scale = nn.Parameter(torch.full((1, 1, 1, 2), 0.1))
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for width in (with_rpos, with_field, dim))
        self.match_attention_self = MatchAttention("self", with_rpos + 1, with_rpos, heads, head_dim, radius, layer)
        self.match_attention_cross = MatchAttention("cross", with_field, with_field, heads, head_dim, radius, layer)
        self.mlp = ConvGLU(dim, mlp_ratio * dim)

    def forward(self, x: Float[Tensor, "b H W c"], self_rpos: Float[Tensor, "b H W two_h"], field: Float[Tensor, "b H W 2"], stereo: bool):
        dim = x.shape[-1]
        noc = consistent(field.detach(), 2.0)[..., None].to(x.dtype)
        x = torch.cat([x, field * self.field_scale, self_rpos], -1)
        y = torch.cat([self.norm0(self.match_attention_self.hidden(x)), noc], -1)
        x = x + self.match_attention_self(y, y, self_rpos)
        x, self_rpos = x.split([dim + 2, self_rpos.shape[-1]], -1)
        x = F.pad(x[..., :-1], (0, 1)) if stereo else x  # F_y = 0: rectified views match within a row
        after_self = x[..., dim:] / self.field_scale
        y = self.norm1(self.match_attention_cross.hidden(x))
        x = x + self.match_attention_cross(y, other_view(y), after_self)
        x = F.pad(x[..., :-1], (0, 1)) if stereo else x
        field = x[..., dim:] / self.field_scale
        x = x[..., :dim]
        return x + self.mlp(self.norm2(x)), self_rpos, field, {"self": after_self, "cross": field}


class MatchAttentionBlock(nn.Module):
    """The layers of one scale. r enters as one vector for all heads and leaves as their mean."""

    def __init__(self, dim: int, heads: int, radius: int, layers: int, mlp_ratio: int = 2, first: int = 0):
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(MatchAttentionLayer(dim, heads, radius, mlp_ratio, layer=first + i) for i in range(layers))

    def forward(self, x: Float[Tensor, "b H W c"], self_rpos: Float[Tensor, "b H W 2"], field: Float[Tensor, "b H W 2"], stereo: bool):
        self_rpos, fields = repeat(self_rpos, "b y x t -> b y x (h t)", h=self.heads), []
        for layer in self.layers:
            x, self_rpos, field, both = layer(x, self_rpos, field, stereo)
            fields.append(both)
        return x, rearrange(self_rpos, "b y x (h t) -> b y x h t", t=2).mean(-2), field, fields


# ---- the encoder ------------------------------------------------------------------------------------------------------------------------


class MetaFormerBlock(nn.Module):
    """x += pwconv2(dwconv(gelu(pwconv1(LN x)))); x += fc2(gelu(fc1(LN x)))."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6, bias=False) for _ in range(2))
        (up1, down1), (up2, down2) = ((nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)) for _ in range(2))
        depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False)
        self.token_mixer = nn.ModuleDict({"pwconv1": up1, "dwconv": depthwise, "pwconv2": down1})
        self.mlp = nn.ModuleDict({"fc1": up2, "fc2": down2})

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        mixer, mlp = self.token_mixer, self.mlp
        x = x + mixer["pwconv2"](convolve(mixer["dwconv"], F.gelu(mixer["pwconv1"](self.norm1(x)))))
        return x + mlp["fc2"](F.gelu(mlp["fc1"](self.norm2(x))))


class ConvFormer(nn.Module):
    """Images (-1 to 1) -> maps at 1/4, 1/8, ... of their size."""

    def __init__(self, dims: Sequence[int], depths: Sequence[int]):
        super().__init__()
        half, first = dims[0] // 2, dims[0]
        stem = [nn.Conv2d(3, half, 3, 2, 1), nn.InstanceNorm2d(half), nn.GELU(), nn.Conv2d(half, first, 3, 2, 1), nn.InstanceNorm2d(first), nn.GELU()]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for i, o in pairwise(dims):
            self.downsample_layers.append(nn.ModuleDict({"pre_norm": nn.LayerNorm(i, 1e-6, bias=False), "conv": nn.Conv2d(i, o, 3, 2, 1)}))
        self.stages = nn.ModuleList(nn.Sequential(*(MetaFormerBlock(dim) for _ in range(n))) for dim, n in zip(dims, depths, strict=True))

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b h w c"]]:
        stem, *rest = self.downsample_layers
        maps = [self.stages[0](rearrange(stem(image), "b c y x -> b y x c"))]
        for down, stage in zip(rest, self.stages[1:], strict=True):
            maps.append(stage(convolve(down["conv"], down["pre_norm"](maps[-1]))))
        return maps


# ---- the network ------------------------------------------------------------------------------------------------------------------------


class UpConv(nn.Module):
    """A coarse map twice as large, joined with the encoder's map of that size."""

    def __init__(self, coarse: int, dim: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(coarse, dim, 2, 2)
        self.conv = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Float[Tensor, "b h w c"], skip: Float[Tensor, "b H W e"]) -> Float[Tensor, "b H W e"]:
        return convolve(self.conv, torch.cat([skip, convolve(self.up, x)], -1))


class Matched(NamedTuple):
    """Fields are in pixels of their own resolution. field_all: coarse to fine, {"self", "cross"} of each layer, {"self"} of each upsampling."""

    field_up: Float[Tensor, "b H W 2"]
    field_all: list[dict[str, Float[Tensor, "b h w 2"]]]
    init_flow: Float[Tensor, "b h w 2"]
    init_cv: Tensor | None
    self_rpos: Float[Tensor, "b h w 2"]


class MatchStereo(nn.Module):
    """Encoder, global correlation, MatchDecoder. Two views in 0..255, sides multiples of 4·2^(scales-1) -> the fields of both.

    dims, depths: of the encoder, fine to coarse. radii, layers, heads, mlp_ratios: of the decoder, coarse to fine.
    """

    def __init__(
        self,
        dims: Sequence[int] = SIZES["tiny"],
        depths: Sequence[int] = (2, 2, 6, 2),
        radii: Sequence[int] = (2, 2, 1, 1),
        layers: Sequence[int] = (8, 8, 8, 2),
        heads: Sequence[int] = (4, 4, 4, 4),
        mlp_ratios: Sequence[int] = (2, 2, 2, 2),
    ):
        super().__init__()
        self.encoder = ConvFormer(dims, depths)
        coarse_first = list(reversed(dims))
        self.init_correlation_volume = GlobalCorrelation(coarse_first[0])
        self.match_attentions, self.up_decoders, self.up_masks = nn.ModuleList(), nn.ModuleDict(), nn.ModuleDict()
        for s, dim in enumerate(coarse_first):
            if s:
                self.up_decoders[str(s)] = UpConv(coarse_first[s - 1], dim)
                self.up_masks[str(s)] = mask_head(coarse_first[s - 1], coarse_first[s - 1], 2)
            self.match_attentions.append(MatchAttentionBlock(dim, heads[s], radii[s], layers[s], mlp_ratios[s], sum(layers[:s])))
        self.up_masks[str(len(dims))] = mask_head(dims[0], 2 * dims[0], 4)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, left: Float[Tensor, "b 3 H W"], right: Float[Tensor, "b 3 H W"], stereo: bool = True, init_flow: Float[Tensor, "b2 h w 2"] | None = None
    ) -> Matched:
        """init_flow: the coarsest field, if known, in place of the global correlation."""
        *skips, x = self.encoder(2 * torch.cat([left, right]) / 255 - 1)
        volume = None
        if init_flow is None:
            init_flow, volume = self.init_correlation_volume(x, stereo)
        field, self_rpos, field_all = init_flow, torch.zeros_like(init_flow), []
        for s, block in enumerate(self.match_attentions):
            if s:
                mask = convolve(self.up_masks[str(s)], x)
                field, self_rpos = (convex_upsample(t, mask, 2) for t in (field, self_rpos))
                x = self.up_decoders[str(s)](x, skips.pop())
                field_all.append({"self": field})
            x, self_rpos, field, fields = block(x, self_rpos, field, stereo)
            field_all += fields
        field_up = convex_upsample(field, convolve(self.up_masks[str(s + 1)], x), 4)
        return Matched(field_up, field_all, init_flow, volume, self_rpos)


def mask_head(dim: int, hidden: int, factor: int) -> nn.Sequential:
    """Logits of `convex_upsample`."""
    return nn.Sequential(nn.Conv2d(dim, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 9 * factor**2, 1))
