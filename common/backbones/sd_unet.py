"""The U-Net of Stable Diffusion 1, 2 and XL (Rombach et al. 2022), with the parameter names of diffusers' UNet2DConditionModel.

    e = MLP(waves(t)) [+ MLP([pooled, waves(sizes)])]          time; XL adds the pooled prompt and six sizes      b 4C₀
    R(h) = s h + conv(silu(norm(conv(silu(norm h)) + W e)))    residual block, s a 1x1 convolution if widths differ
    A(h) = h + W_out B(… B(W_in norm h))                       transformer on the map's tokens
    B(x):  x ← x + A₁(LN x),   x ← x + A₂(LN x, c),   x ← x + W₂ (a · gelu(b)),  [a, b] = W₁ LN x
    A₁(x) = W_o softmax(q kᵀ/√d) v,  q, k, v = W_q x, W_k x, W_v x;   A₂ takes k, v from the prompt c

    h = conv z, pushed                                         the skips
    down  { h = A(R(h)), pushed } · layers;   h = conv h with stride 2, pushed, but at the last level
    mid   h = R(A(R(h)))
    up    { h = A(R([h, popped])) } · (layers + 1);   h = conv of h enlarged, but at the last level
    output = conv silu norm h                                  noise, velocity or sample, as the model was trained

The site of an attention call has as `layer` the number of its transformer block in the order of the calls (SD 1 and 2: 0-5 down, 6 mid,
7-15 up), shared by A₁ ("self") and A₂ ("cross"), and the size of its map as `grid`.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones.pretrained import Pretrained
from common.layers import time_waves


@dataclass
class UNetConfig:
    """The fields of the published unet/config.json; the defaults are SD 1.5's. Inpainting models have in_channels = 9."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads, in spite of its name
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # W_in, W_out: linear on tokens instead of a 1x1 convolution
    norm_num_groups: int = 32
    addition_embed_type: str | None = None  # "text_time" for XL
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads at each level."""
        return self.per_level(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks in each transformer of a level."""
        return self.per_level(self.transformer_layers_per_block)

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)


# ---- the transformer -----------------------------------------------------------------------------------------------------------------


class TokenAttention(Attention):
    """A₁, or with a context width A₂."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__(heads, "self" if context_dim is None else "cross")
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"] | None = None) -> Float[Tensor, "b n c"]:
        context = self.context(x, x if context is None else context)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.output(self.to_out(merge_heads(self.attend(q, k, v))))


class GEGLU(nn.Module):
    """a · gelu(b), [a, b] = W₁ x."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b hidden"]:
        a, b = self.proj(x).chunk(2, -1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    """W₂ (a · gelu(b)); `net.1` is the place of a dropout."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """B."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1, self.attn2 = TokenAttention(dim, heads), TokenAttention(dim, heads, context_dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        self.attn1.grid = self.attn2.grid = grid
        x = self.attn1.hidden(x)
        x = x + self.attn1(self.norm1(x))
        x = self.attn2.hidden(x)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A: `depth` blocks on the tokens of a map, row-major."""

    def __init__(self, dim: int, heads: int, depth: int, c: UNetConfig):
        super().__init__()
        self.linear = c.use_linear_projection
        projection = nn.Linear if self.linear else lambda *widths: nn.Conv2d(*widths, 1)
        self.norm = nn.GroupNorm(c.norm_num_groups, dim, eps=1e-6)
        self.proj_in = projection(dim, dim)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(dim, heads, c.cross_attention_dim) for _ in range(depth))
        self.proj_out = projection(dim, dim)

    def forward(self, h: Float[Tensor, "b c H W"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b c H W"]:
        grid = (h.shape[2], h.shape[3])
        tokens = lambda y: y.flatten(2).mT
        unflat = lambda x: x.mT.unflatten(2, grid)
        x = self.proj_in(tokens(self.norm(h))) if self.linear else tokens(self.proj_in(self.norm(h)))
        for block in self.transformer_blocks:
            x = block(x, context, grid)
        return h + (unflat(self.proj_out(x)) if self.linear else self.proj_out(unflat(x)))


# ---- the convolutional parts ---------------------------------------------------------------------------------------------------------


class ResnetBlock2D(nn.Module):
    """R; without an embedding where emb_channels is None."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, emb_channels: int | None = None, *, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if emb_channels is None else nn.Linear(emb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c H W"], emb: Float[Tensor, "#b e"] | None = None) -> Float[Tensor, "b d H W"]:
        """emb: silu(e)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        return self.conv(h)


class Upsample2D(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c H W"]:
        return self.conv(F.interpolate(h, size, mode="nearest"))


class TimestepEmbedding(nn.Module):
    """W₂ silu(W₁ x)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b e"]:
        return self.linear_2(F.silu(self.linear_1(x)))


# ---- the levels ----------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Layers of R, each followed by A where the level has attention: the common part of the levels.

    widths: (in, out) of each residual block. transformers: how many of the layers have A.
    """

    def __init__(self, c: UNetConfig, level: int, widths: list[tuple[int, int]], transformers: int):
        super().__init__()
        dim = c.block_out_channels[level]
        emb_channels = 4 * c.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock2D(*width, c.norm_num_groups, emb_channels) for width in widths)
        self.attentions = nn.ModuleList(Transformer2DModel(dim, c.heads[level], c.depths[level], c) for _ in range(transformers))

    def layer(self, j: int, h: Float[Tensor, "b c H W"], emb: Float[Tensor, "#b e"], context: Float[Tensor, "b m x"]) -> Float[Tensor, "b d H W"]:
        h = self.resnets[j](h, emb)
        return self.attentions[j](h, context) if self.attentions else h


class DownBlock(Block):
    """Appends the result of every layer to the skips."""

    def __init__(self, c: UNetConfig, level: int, widths: list[tuple[int, int]]):
        super().__init__(c, level, widths, len(widths) if "CrossAttn" in c.down_block_types[level] else 0)
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(c.block_out_channels[level])])

    def forward(self, skips: list[Tensor], emb: Float[Tensor, "#b e"], context: Float[Tensor, "b m x"]) -> Float[Tensor, "b d h w"]:
        for j in range(len(self.resnets)):
            skips.append(self.layer(j, skips[-1], emb, context))
        for downsampler in self.downsamplers:
            skips.append(downsampler(skips[-1]))
        return skips[-1]


class MidBlock(Block):
    """R, A, R at the lowest level."""

    def __init__(self, c: UNetConfig):
        dim = c.block_out_channels[-1]
        super().__init__(c, len(c.block_out_channels) - 1, [(dim, dim), (dim, dim)], 1)

    def forward(self, h: Float[Tensor, "b c H W"], emb: Float[Tensor, "#b e"], context: Float[Tensor, "b m x"]) -> Float[Tensor, "b c H W"]:
        return self.resnets[1](self.layer(0, h, emb, context), emb)


class UpBlock(Block):
    """Takes the last skip into every layer; enlarges to the size of the next."""

    def __init__(self, c: UNetConfig, level: int, widths: list[tuple[int, int]]):
        kind = c.up_block_types[len(c.block_out_channels) - 1 - level]
        super().__init__(c, level, widths, len(widths) if "CrossAttn" in kind else 0)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample2D(c.block_out_channels[level])])

    def forward(
        self, h: Float[Tensor, "b c h w"], skips: list[Tensor], emb: Float[Tensor, "#b e"], context: Float[Tensor, "b m x"]
    ) -> Float[Tensor, "b d H W"]:
        for j in range(len(self.resnets)):
            h = self.layer(j, torch.cat([h, skips.pop()], 1), emb, context)
        for upsampler in self.upsamplers:
            h = upsampler(h, skips[-1].shape[2:])
        return h


# ---- the model -----------------------------------------------------------------------------------------------------------------------


class UNet2DConditionModel(Pretrained, nn.Module):
    """Noise, velocity or sample, from noisy latents, timestep and prompt."""

    config_class, tiny = UNetConfig, "tiny-sd/unet"
    blocks = DownBlock, MidBlock, UpBlock

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        channels = c.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        if c.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type {c.addition_embed_type!r} is not supported: it must be None, or 'text_time' as in SD XL")
        if c.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, 4 * channels[0])

        down_block, mid_block, up_block = self.blocks
        width, skips = channels[0], [channels[0]]  # the widths, followed through the forward pass
        self.down_blocks = nn.ModuleList()
        for level, dim in enumerate(channels):
            self.down_blocks.append(down_block(c, level, [(width, dim)] + [(dim, dim)] * (c.layers_per_block - 1)))
            width = dim
            skips += [dim] * (c.layers_per_block + (level < len(channels) - 1))
        self.mid_block = mid_block(c)
        self.up_blocks = nn.ModuleList()
        for level, dim in reversed(list(enumerate(channels))):
            inputs = [width] + [dim] * c.layers_per_block
            self.up_blocks.append(up_block(c, level, [(below + skips.pop(), dim) for below in inputs]))
            width = dim
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)

        for layer, block in enumerate(module for module in self.modules() if isinstance(module, BasicTransformerBlock)):
            block.attn1.layer = block.attn2.layer = layer

    def forward(
        self,
        sample: Float[Tensor, "b c H W"],
        timestep: Float[Tensor, "*b"] | Int[Tensor, "*b"],
        encoder_hidden_states: Float[Tensor, "b m e"],
        text_embeds: Float[Tensor, "b p"] | None = None,
        time_ids: Float[Tensor, "b six"] | None = None,
    ) -> Float[Tensor, "b d H W"]:
        """timestep in 0 ... 999, one for all or one per sample. XL: text_embeds is the pooled prompt, time_ids are the original height
        and width, the top and left of the crop, and the target height and width in pixels. Latents may have any size."""
        emb = F.silu(self.embedding(sample.dtype, timestep, text_embeds, time_ids))
        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            h = block(skips, emb, encoder_hidden_states)
        h = self.mid_block(h, emb, encoder_hidden_states)
        for block in self.up_blocks:
            h = block(h, skips, emb, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def embedding(self, dtype: torch.dtype, timestep: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None) -> Float[Tensor, "#b e"]:
        """e."""
        e = self.time_embedding(time_waves(timestep.reshape(-1), self.config.block_out_channels[0]).to(dtype))
        if self.config.addition_embed_type is None:
            return e
        if text_embeds is None or time_ids is None:
            raise ValueError("SD XL is conditioned on sizes too: pass text_embeds (the pooled prompt) and time_ids (six sizes, see forward)")
        sizes = time_waves(time_ids, self.config.addition_time_embed_dim).flatten(1)
        return e + self.add_embedding(torch.cat([text_embeds, sizes.to(dtype)], -1))

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if re.match(OTHER_PARTS, name) else published_name(name)


# ---- names of the original releases --------------------------------------------------------------------------------------------------

OTHER_PARTS = r"(first_stage_model|cond_stage_model|conditioner|model_ema)\.|[^.]+$"  # of a file that holds the whole system

LDM_STEMS = {  # a module of the original release -> its place here
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def published_name(name: str, layers: int = 2) -> str:
    """The name here (diffusers') of a parameter of the original release (LDM's), whose file may hold the U-Net under
    `model.diffusion_model.`; names that are already diffusers' stay. layers: layers_per_block.
    """
    name = name.removeprefix("model.diffusion_model.")
    for theirs, ours in LDM_STEMS.items():
        if name.startswith(theirs + "."):
            name = ours + name.removeprefix(theirs)
    name = re.sub(r"^(input|output)_blocks\.(\d+)\.(\d)\.(conv\.|op\.)?", lambda match: _level_name(layers, *match.groups()), name)
    for theirs, ours in LDM_RESNET.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def _level_name(layers: int, side: str, index: str, part: str, sampling: str | None) -> str:
    """Both sides number their blocks through: `layers` on the way down, each followed by a block for the convolution with stride 2, and
    layers + 1 on the way up, where the enlarging convolution is the last part of a level's last block."""
    if side == "input":
        level, j = divmod(int(index) - 1, layers + 1)
        return f"down_blocks.{level}.downsamplers.0.conv." if sampling else f"down_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{j}."
    level, j = divmod(int(index), layers + 1)
    return f"up_blocks.{level}.upsamplers.0.conv." if sampling else f"up_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{j}."
