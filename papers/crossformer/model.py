"""CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (Wang et al., ICLR 2022, arXiv 2108.00154).

A pyramid of four stages, stage s with H/2^(s+1) x W/2^(s+1) tokens of width 2^(s-1) D. Tokens that mix several patch sizes:

    CEL-1      x = LN [Conv_4 z, Conv_8 z, Conv_16 z, Conv_32 z]       every convolution of stride 4, with D/2, D/4, D/8, D/8 channels
    CEL-s      x = [Conv_2 LN x, Conv_4 LN x]                          of stride 2, with half of the 2^(s-1) D channels each

Attention only inside groups of G x G tokens, which are neighbours (SDA) and lie I apart (LDA) in alternate blocks:

    SDA        (a, b) ~ (a', b')  iff  floor(a/G) = floor(a'/G), floor(b/G) = floor(b'/G)
    LDA        (a, b) ~ (a', b')  iff  a = a' mod I, b = b' mod I
    LSDA       softmax(Q Kᵀ / √d + B) V,  B_ij = DPB(dy_ij, dx_ij)      dy, dx counted inside the group
    DPB        L3 L2 L1 W_0,  L(e) = W relu(LN(e)) + b                  any group size with one set of weights
    block      u = x + LSDA(LN x),  y = u + MLP(LN u)
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from common.attention import Attention, group, merge_heads, ungroup
from common.layers import Mlp

Pair = tuple[int, int]

# ---- cross-scale embedding --------------------------------------------------------------------------------------------------------------


def split_channels(channels: int, kernels: int) -> list[int]:
    """Halved for every larger kernel, whose cost grows with its area; the last two share a size: D/2, D/4, D/8, D/8."""
    halves = [channels // 2 ** (i + 1) for i in range(kernels)]
    return [*halves[:-1], channels - sum(halves[:-1])]


class PatchEmbed(nn.Module):
    """CEL-1. (b, 3, H, W) -> tokens (b, H/4 · W/4, dim) and their grid."""

    def __init__(self, patch_size: Sequence[int], in_chans: int, dim: int):
        super().__init__()
        self.stride = patch_size[0]
        self.projs = nn.ModuleList(
            nn.Conv2d(in_chans, c, k, stride=self.stride, padding=(k - self.stride) // 2)
            for k, c in zip(patch_size, split_channels(dim, len(patch_size)), strict=True)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Float[Tensor, "b c H W"]) -> tuple[Float[Tensor, "b n d"], Pair]:
        grid = image.shape[2] // self.stride, image.shape[3] // self.stride
        x = torch.cat([self.project(proj, image, grid) for proj in self.projs], 1)
        return self.norm(rearrange(x, "b d h w -> b (h w) d")), grid

    def project(self, proj: nn.Conv2d, image: Float[Tensor, "b c H W"], grid: Pair) -> Float[Tensor, "b d h w"]:
        """proj(image). A large kernel over few channels leaves the processor idle, so where stride x stride blocks of the image line up with
        blocks of the kernel, they become channels of a small kernel: the same sum, 3 to 5 times faster for k = 32 on a CPU."""
        offset, blocks = proj.padding[0] % self.stride, proj.kernel_size[0] // self.stride
        if blocks < 4 or proj.kernel_size[0] % self.stride:
            return proj(image)
        bottom, right = (-(extent + offset) % self.stride for extent in image.shape[2:])
        image = F.pixel_unshuffle(F.pad(image, (offset, right, offset, bottom)), self.stride)
        x = F.conv2d(image, F.pixel_unshuffle(proj.weight, self.stride), proj.bias, padding=proj.padding[0] // self.stride)
        return x[:, :, : grid[0], : grid[1]]


class PatchMerging(nn.Module):
    """CEL-2 to CEL-4. (b, H · W, c) -> (b, H/2 · W/2, 2 c); an odd H or W is padded by one row of zeros."""

    def __init__(self, dim: int, patch_size: Sequence[int] = (2, 4)):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, c, k, stride=2, padding=(k - 2) // 2) for k, c in zip(patch_size, split_channels(2 * dim, len(patch_size)), strict=True)
        )

    def forward(self, x: Float[Tensor, "b n c"], grid: Pair) -> tuple[Float[Tensor, "b m d"], Pair]:
        x = rearrange(self.norm(x), "b (h w) c -> b c h w", h=grid[0])
        x = F.pad(x, (0, grid[1] % 2, 0, grid[0] % 2))
        x = torch.cat([reduction(x) for reduction in self.reductions], 1)
        return rearrange(x, "b c h w -> b (h w) c"), tuple(x.shape[2:])


# ---- long short distance attention ------------------------------------------------------------------------------------------------------


def group_offsets(size: Pair) -> Float[Tensor, "t 2"]:
    """All offsets (dy, dx) between two tokens of a group of size[0] x size[1], dy-major: (2·size[0]-1)(2·size[1]-1) rows."""
    dy, dx = (torch.arange(1 - n, n) for n in size)
    return torch.stack(torch.meshgrid(dy, dx, indexing="ij"), -1).flatten(0, 1).float()


def offset_index(size: Pair) -> Int[Tensor, "n n"]:
    """Row of `group_offsets` that holds the offset (query - key) of each pair of row-major tokens."""
    rows, columns = size
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what an evaluation caches, training must be able to use
def _offsets(size: Pair, device: torch.device) -> tuple[Float[Tensor, "t 2"], Int[Tensor, "n n"]]:
    return group_offsets(size).to(device), offset_index(size).to(device)


class DynamicPositionBias(nn.Module):
    """DPB: an MLP from the offset (dy, dx), in tokens, to one bias per head. The published width is c/16 for tokens of width c."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        layer = lambda out: nn.Sequential(nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, out))
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = layer(width), layer(width), layer(heads)

    def table(self, offsets: Float[Tensor, "t 2"]) -> Float[Tensor, "t h"]:
        """The bias of each offset."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))

    def forward(self, size: Pair) -> Float[Tensor, "h n n"]:
        """B for a group of size[0] x size[1] tokens; the MLP runs once per offset, not per pair."""
        offsets, index = _offsets(size, self.pos_proj.weight.device)
        return self.table(offsets.to(self.pos_proj.weight.dtype)).T[:, index]


class GroupAttention(Attention):
    """LSDA: attention among the tokens of each group, with the bias of `pos`."""

    def __init__(self, dim: int, heads: int, pos: nn.Module | None, layer: int = 0):
        super().__init__(heads, "self", layer)
        self.pos = pos
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Pair, size: Pair, interval: int, shift: int = 0) -> Float[Tensor, "b n c"]:
        """Groups of size[0] x size[1] tokens, `interval` apart. The map is padded at the bottom and the right to whole groups, and keys in
        the padding are masked. shift: roll the map by so much first (Swin's windows)."""
        x = rearrange(x, "b (h w) c -> b h w c", h=grid[0])
        bottom, right = (-extent % (s * interval) for extent, s in zip(grid, size, strict=True))
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        padded = tuple(x.shape[1:3])
        spacing = (interval, interval)
        q, k, v = rearrange(group(self.qkv(x), size, spacing), "g n (three h d) -> three g h n d", three=3, h=self.heads)
        bias = None if self.pos is None else self.pos(size)[None]
        mask = _visible(grid, padded, size, interval, shift, x.device) if padded != grid or shift else None
        o = self.attend(q, k, v, mask=mask if mask is None else mask.repeat(len(x), 1, 1, 1), bias=bias)
        o = ungroup(merge_heads(o), size, padded, spacing)
        if shift:
            o = o.roll((shift, shift), (1, 2))
        return self.output(self.proj(o[:, : grid[0], : grid[1]].flatten(1, 2)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what an evaluation caches, training must be able to use
def _visible(grid: Pair, padded: Pair, size: Pair, interval: int, shift: int, device: torch.device) -> Bool[Tensor, "g 1 n m"]:
    """Which keys a group's queries see: those in the image and, after a shift, those of the same side of the seam."""
    area = torch.zeros(padded, dtype=torch.long)
    if shift:  # Swin's regions: the rolled-over strips are no neighbours of what they now touch
        for axis in (0, 1):
            strip = torch.arange(padded[axis])
            strip = (strip >= padded[axis] - size[axis]).long() + (strip >= padded[axis] - shift)
            area = 3 * area + (strip[:, None] if axis == 0 else strip)
    inside = torch.zeros(padded, dtype=torch.bool)
    inside[: grid[0], : grid[1]] = True
    area, inside = (group(m[None, ..., None], size, (interval, interval))[..., 0] for m in (area, inside.roll((-shift, -shift), (0, 1))))
    visible = inside[:, None] & (area[:, :, None] == area[:, None]) if shift else inside[:, None]
    return visible[:, None].to(device)


class CrossFormerBlock(nn.Module):
    """u = x + LSDA(LN x), y = u + MLP(LN u).

    lsda_flag: 0 short distance, 1 long distance. Two definitions of the long distance for maps that are not (G · I) x (G · I), where both
    coincide: lda "interval" (the paper's, and its code for dense tasks) makes a group of all tokens with equal (row, column) mod I, however
    many; "group" (its code for classification) cuts the map into regions of (G · I)² first, so that groups always have G² tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int,
        interval: int,
        lsda_flag: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        lda: str = "group",
        layer: int = 0,
    ):
        super().__init__()
        if lda not in ("group", "interval"):
            raise ValueError(f"lda = {lda!r}: either 'group' or 'interval'")
        self.group_size, self.interval, self.lsda_flag, self.lda = group_size, interval, lsda_flag, lda
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, DynamicPositionBias(dim // 4 // 4, num_heads), layer)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def grouping(self, grid: Pair) -> dict:
        """Group size and interval on a map of `grid`; a map no larger than G is one group."""
        smallest = min(grid)
        if smallest <= self.group_size:
            return {"size": (smallest, smallest), "interval": 1}
        if not self.lsda_flag:
            return {"size": (self.group_size, self.group_size), "interval": 1}
        if self.lda == "interval":
            return {"size": tuple(-(-extent // self.interval) for extent in grid), "interval": self.interval}
        return {"size": (self.group_size, self.group_size), "interval": self.interval}

    def forward(self, x: Float[Tensor, "b n c"], grid: Pair) -> Float[Tensor, "b n c"]:
        self.attn.grid = grid
        x = self.attn.hidden(x)
        x = x + self.drop_path(self.attn(self.norm1(x), grid, **self.grouping(grid)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ---- the pyramid ------------------------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Blocks that alternate short and long distance, then the embedding of the next stage."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Float[Tensor, "b n c"], grid: Pair) -> Float[Tensor, "b n c"]:
        for block in self.blocks:
            x = block(x, grid)
        return x


class CrossFormer(nn.Module):
    """The classifier, (b, in_chans, H, W) -> (b, num_classes), with the parameter names of the published checkpoints.

    Arguments as the authors name them: group_size G and crs_interval I per stage, patch_size the kernels of CEL-1, merge_size those of
    CEL-2 to CEL-4. H and W are free; parameters depend on neither them nor G nor I.
    """

    block = CrossFormerBlock

    def __init__(
        self,
        patch_size: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: Sequence[int] = (7, 7, 7, 7),
        crs_interval: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        drop_path_rate: float = 0.0,
        lda: str = "group",
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        stages, layer = [], 0
        for s, depth in enumerate(depths):
            dim, blocks = embed_dim * 2**s, []
            for i in range(depth):
                drop = drop_path_rate * layer / max(sum(depths) - 1, 1)
                blocks.append(self.block(dim, num_heads[s], group_size[s], crs_interval[s], i % 2, mlp_ratio[s], drop, lda, layer))
                layer += 1
            stages.append(Stage(blocks, PatchMerging(dim, merge_size[s]) if s + 1 < len(depths) else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    def stages(self, image: Float[Tensor, "b c H W"]):
        """Yields the tokens and the grid of each stage, before the embedding of the next."""
        x, grid = self.patch_embed(image)
        for stage in self.layers:
            x = stage(x, grid)
            yield x, grid
            if stage.downsample is not None:
                x, grid = stage.downsample(x, grid)

    def forward_features(self, image: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b d h w"]]:
        """One map per stage, as the heads of dense tasks take them: no norm after the last block."""
        return [rearrange(x, "b (h w) c -> b c h w", h=grid[0]) for x, grid in self.stages(image)]

    def forward(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b classes"]:
        *_, (x, _) = self.stages(image)
        return self.head(self.norm(x).mean(1))

    def regroup(self, group_size: Sequence[int], crs_interval: Sequence[int], lda: str) -> None:
        """Other groups for the same weights, as for another image size."""
        for stage, size, interval in zip(self.layers, group_size, crs_interval, strict=True):
            for block in stage.blocks:
                block.group_size, block.interval, block.lda = size, interval, lda


# ---- the baselines of the paper's ablations: one part exchanged, all else equal ----------------------------------------------------------


class ShiftedWindowBlock(CrossFormerBlock):
    """Swin's attention: windows of G x G neighbours, in odd blocks shifted by half a window, instead of the long distance."""

    def grouping(self, grid: Pair) -> dict:
        groups = {"size": (min(*grid, self.group_size),) * 2, "interval": 1}
        return groups | {"shift": self.group_size // 2 if self.lsda_flag and min(grid) > self.group_size else 0}


class ShortDistanceBlock(CrossFormerBlock):
    """SDA in every block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lsda_flag = 0


class PooledAttention(GroupAttention):
    """PVT's attention: every token to the whole map, pooled by I x I."""

    def forward(self, x: Float[Tensor, "b n c"], grid: Pair, size: Pair, interval: int) -> Float[Tensor, "b n c"]:
        q, k, v = self.qkv(x).chunk(3, -1)
        pool = lambda t: F.avg_pool2d(rearrange(t, "b (h w) c -> b c h w", h=grid[0]), interval, ceil_mode=True)
        k, v = (rearrange(pool(t), "b (heads d) h w -> b heads (h w) d", heads=self.heads) for t in (k, v))
        o = self.attend(rearrange(q, "b n (heads d) -> b heads n d", heads=self.heads), k, v)
        return self.output(self.proj(rearrange(o, "b heads n d -> b n (heads d)")))


class PooledBlock(CrossFormerBlock):
    """A block with PVT's attention, which has no relative position: use it with `AbsolutePosition`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attn = PooledAttention(self.attn.proj.in_features, self.attn.heads, None, self.attn.layer)

    def grouping(self, grid: Pair) -> dict:
        return {"size": grid, "interval": min(self.interval, *grid)}


class PositionTable(nn.Module):
    """RPB: a learnt bias for each offset of a size x size group, resized bicubically for other groups."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, 2 * size - 1, 2 * size - 1))
        trunc_normal_(self.bias, std=0.02)

    def forward(self, size: Pair) -> Float[Tensor, "h n n"]:
        bias, wanted = self.bias, tuple(2 * s - 1 for s in size)
        if bias.shape[1:] != wanted:
            bias = F.interpolate(bias[None], wanted, mode="bicubic")[0]
        return bias.flatten(1)[:, _offsets(size, bias.device)[1]]


class AbsolutePosition(nn.Module):
    """APE: the patch embedding plus a learnt vector for each place of a grid x grid map, resized bicubically for other maps."""

    def __init__(self, patch_embed: PatchEmbed, grid: int):
        super().__init__()
        self.patch_embed, self.position = patch_embed, nn.Parameter(torch.zeros(1, patch_embed.norm.weight.numel(), grid, grid))
        trunc_normal_(self.position, std=0.02)

    def forward(self, image: Float[Tensor, "b c H W"]) -> tuple[Float[Tensor, "b n d"], Pair]:
        x, grid = self.patch_embed(image)
        position = self.position if self.position.shape[2:] == grid else F.interpolate(self.position, grid, mode="bicubic")
        return x + rearrange(position, "b d h w -> b (h w) d"), grid


BLOCKS = {"lsda": CrossFormerBlock, "sda": ShortDistanceBlock, "swin": ShiftedWindowBlock, "pvt": PooledBlock}


def ablation(attention: str, position: str, grid: int, **kwargs) -> CrossFormer:
    """A CrossFormer with other attention ("lsda", "sda", "swin", "pvt") or position ("dpb", "rpb", "ape"); grid: tokens a side, for ape."""
    model = type("Ablation", (CrossFormer,), {"block": BLOCKS[attention]})(**kwargs)
    for stage, heads in zip(model.layers, kwargs["num_heads"], strict=True):
        for block in stage.blocks:
            if position != "dpb":
                block.attn.pos = PositionTable(block.group_size, heads) if position == "rpb" else None
    if position == "ape":
        model.patch_embed = AbsolutePosition(model.patch_embed, grid)
    return model


# ---- the published models ---------------------------------------------------------------------------------------------------------------


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def published_name(name: str) -> str | None:
    """Checkpoint name -> ours, for `load_weights`: the first releases stored buffers that follow from the group size."""
    return None if name.rsplit(".", 1)[-1] in ("biases", "relative_position_index", "attn_mask") else name


VARIANTS = {
    "T": {"embed_dim": 64, "depths": (1, 1, 8, 6), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.1},
    "S": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "B": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3},
    "L": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
}


@register_model
def crossformer_tiny(pretrained: bool = False, **kwargs) -> CrossFormer:
    """CrossFormer-T. Weights are not on a hub: load a published file with `common.loop.load_weights`."""
    return _named("T", pretrained, kwargs)


@register_model
def crossformer_small(pretrained: bool = False, **kwargs) -> CrossFormer:
    """CrossFormer-S."""
    return _named("S", pretrained, kwargs)


@register_model
def crossformer_base(pretrained: bool = False, **kwargs) -> CrossFormer:
    """CrossFormer-B."""
    return _named("B", pretrained, kwargs)


@register_model
def crossformer_large(pretrained: bool = False, **kwargs) -> CrossFormer:
    """CrossFormer-L."""
    return _named("L", pretrained, kwargs)


def _named(variant: str, pretrained: bool, kwargs: dict) -> CrossFormer:
    if pretrained:
        raise ValueError("the authors' weights are files to download (see the README): build without `pretrained`, then load_weights(model, file)")
    known = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}  # what timm.create_model adds
    return CrossFormer(**VARIANTS[variant] | {k: v for k, v in kwargs.items() if k not in known})
