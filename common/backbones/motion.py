"""Motion modules (AnimateDiff, Guo et al. 2023): a video U-Net from an image U-Net, with the parameter names of diffusers' UNetMotionModel.

    video (b c F H W) -> b·F images; every layer of the image U-Net runs on each frame alone, followed by a motion module on all of them:

    M(h) = h + W_out T(W_in norm h)                             the tokens are the F frames of one pixel                 b·H·W F c
    T(x):  x ← x + A₁(LN x + p),   x ← x + A₂(LN x + p),   x ← x + W₂ (a · gelu(b)),  [a, b] = W₁ LN x
    A₁, A₂: self-attention;   p: [sin, cos] of the frame's number, neighbouring channels

W_out starts at zero, so that an untrained video U-Net is the image U-Net on every frame. The statistics of M's norm are those of the whole
video; AnimateDiff's and AnimateAnyone's own code takes them of each frame alone: `norm_per_frame`.

The sites of the image layers keep their `layer` numbers. The motion modules' count from 0 again, and A₁ and A₂ share theirs; they are told
apart by name ("motion_modules"). Their `grid` is the (H, W) whose b·H·W pixels are the batch of the call; the queries are frames.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.backbones.sd_unet import Block, DownBlock, FeedForward, MidBlock, TokenAttention, UNet2DConditionModel, UNetConfig, UpBlock
from common.layers import sinusoidal


@dataclass
class UNetMotionConfig(UNetConfig):
    """The fields of the published config.json: the image U-Net's, except that the heads have their right name, and the motion modules'."""

    down_block_types: tuple[str, ...] = ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",)
    up_block_types: tuple[str, ...] = ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3
    num_attention_heads: int | tuple[int, ...] = 8
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_max_seq_length: int = 32  # frames
    temporal_transformer_layers_per_block: int | tuple[int, ...] = 1
    temporal_transformer_layers_per_mid_block: int = 1
    use_motion_mid_block: bool = True
    norm_per_frame: bool = False

    @property
    def heads(self) -> tuple[int, ...]:
        return self.per_level(self.num_attention_heads)


# ---- the motion module ---------------------------------------------------------------------------------------------------------------


class FramePositions(nn.Module):
    """p, as a buffer that the published files contain."""

    def __init__(self, frames: int, dim: int):
        super().__init__()
        halves = sinusoidal(torch.arange(frames, dtype=torch.float32), dim).chunk(2, -1)
        self.register_buffer("pe", torch.stack(halves, -1).flatten(-2)[None])


class TemporalTransformerBlock(nn.Module):
    """T."""

    def __init__(self, dim: int, heads: int, max_frames: int):
        super().__init__()
        self.pos_embed = FramePositions(max_frames, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1, self.attn2 = TokenAttention(dim, heads), TokenAttention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Float[Tensor, "b f c"], grid: tuple[int, int]) -> Float[Tensor, "b f c"]:
        p = self.pos_embed.pe[:, : x.shape[1]]
        if p.shape[1] < x.shape[1]:
            raise ValueError(f"{x.shape[1]} frames, but the motion modules know {p.shape[1]} (motion_max_seq_length): pass shorter clips")
        for attention, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):
            attention.grid = grid
            x = attention.hidden(x)
            x = x + attention(norm(x) + p)
        return x + self.ff(self.norm3(x))


class AnimateDiffTransformer3D(nn.Module):
    """M."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        *,
        num_layers: int = 1,
        norm_num_groups: int = 32,
        num_positional_embeddings: int = 32,
        norm_per_frame: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.norm_per_frame = norm_per_frame
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(dim, num_attention_heads, num_positional_embeddings) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, in_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, h: Float[Tensor, "bf c H W"], num_frames: int) -> Float[Tensor, "bf c H W"]:
        """The frames of one video are neighbours in the batch."""
        grid = (h.shape[2], h.shape[3])
        videos = lambda y: y.unflatten(0, (-1, num_frames)).transpose(1, 2)  # b c f H W
        y = videos(self.norm(h)) if self.norm_per_frame else self.norm(videos(h))
        x = self.proj_in(y.permute(0, 3, 4, 2, 1).flatten(0, 2))
        for block in self.transformer_blocks:
            x = block(x, grid)
        return h + self.proj_out(x).unflatten(0, (-1, *grid)).permute(0, 3, 4, 1, 2).flatten(0, 1)


# ---- the video U-Net -----------------------------------------------------------------------------------------------------------------


class WithMotion(Block):
    """A level's layers, each followed by M. `frames`, the length of the running videos, is set by the model."""

    def add_motion(self, c: UNetMotionConfig, level: int, modules: int, depth: int) -> None:
        dim, heads = c.block_out_channels[level], c.per_level(c.motion_num_attention_heads)[level]
        self.motion_modules = nn.ModuleList(
            AnimateDiffTransformer3D(
                heads,
                dim // heads,
                dim,
                num_layers=depth,
                norm_num_groups=c.norm_num_groups,
                num_positional_embeddings=c.motion_max_seq_length,
                norm_per_frame=c.norm_per_frame,
            )
            for _ in range(modules)
        )

    def layer(self, j: int, h: Float[Tensor, "bf c H W"], emb: Float[Tensor, "#bf e"], context: Float[Tensor, "bf m x"]) -> Float[Tensor, "bf d H W"]:
        h = super().layer(j, h, emb, context)
        return self.motion_modules[j](h, self.frames) if self.motion_modules else h


class MotionDownBlock(WithMotion, DownBlock):
    """DownBlock with M."""

    def __init__(self, c: UNetMotionConfig, level: int, widths: list[tuple[int, int]]):
        super().__init__(c, level, widths)
        self.add_motion(c, level, len(widths), c.per_level(c.temporal_transformer_layers_per_block)[level])


class MotionMidBlock(WithMotion, MidBlock):
    """R, A, M, R."""

    def __init__(self, c: UNetMotionConfig):
        super().__init__(c)
        self.add_motion(c, len(c.block_out_channels) - 1, int(c.use_motion_mid_block), c.temporal_transformer_layers_per_mid_block)


class MotionUpBlock(WithMotion, UpBlock):
    """UpBlock with M."""

    def __init__(self, c: UNetMotionConfig, level: int, widths: list[tuple[int, int]]):
        super().__init__(c, level, widths)
        self.add_motion(c, level, len(widths), c.per_level(c.temporal_transformer_layers_per_block)[level])


class UNetMotionModel(UNet2DConditionModel):
    """The U-Net for videos."""

    config_class = UNetMotionConfig
    blocks = MotionDownBlock, MotionMidBlock, MotionUpBlock

    def __init__(self, config: UNetMotionConfig):
        super().__init__(config)
        for layer, block in enumerate(module for module in self.modules() if isinstance(module, TemporalTransformerBlock)):
            block.attn1.layer = block.attn2.layer = layer

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, motion: dict[str, Tensor] | None = None, **fields) -> "UNetMotionModel":
        """The image U-Net with motion modules: those of a state dict, such as a published MotionAdapter's, or new ones, which do nothing
        until they are trained. fields: what UNetMotionConfig says of the motion modules, where it is not the default."""
        image = {name: value for name, value in vars(unet.config).items() if name not in ("down_block_types", "up_block_types")}
        kinds = {name: tuple(kind.replace("2D", "Motion") for kind in getattr(unet.config, name)) for name in ("down_block_types", "up_block_types")}
        model = cls(UNetMotionConfig(**image, **kinds, num_attention_heads=unet.config.attention_head_dim, **fields))
        motion = model.motion_state() if motion is None else {cls.rename(name): tensor for name, tensor in motion.items()}
        model.load_state_dict(unet.state_dict() | motion)
        return model.to(unet.conv_in.weight)

    def motion_state(self) -> dict[str, Tensor]:
        """The motion modules' part of the state dict: what a MotionAdapter's file holds."""
        return {name: tensor for name, tensor in self.state_dict().items() if ".motion_modules." in name}

    def forward(
        self,
        sample: Float[Tensor, "b c f H W"],
        timestep: Float[Tensor, "*b"] | Int[Tensor, "*b"],
        encoder_hidden_states: Float[Tensor, "bf m e"],
        text_embeds: Float[Tensor, "bf p"] | None = None,
        time_ids: Float[Tensor, "bf six"] | None = None,
    ) -> Float[Tensor, "b d f H W"]:
        """timestep: one for all or one per video. The prompts are one per frame, those of one video neighbours in the batch."""
        videos, frames = sample.shape[0], sample.shape[2]
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.frames = frames
        images = sample.transpose(1, 2).flatten(0, 1)
        timestep = timestep.reshape(-1).expand(videos).repeat_interleave(frames)
        output = super().forward(images, timestep, encoder_hidden_states, text_embeds, time_ids)
        return output.unflatten(0, (videos, frames)).transpose(1, 2)

    @classmethod
    def rename(cls, name: str) -> str | None:
        return published_name(name) if ".motion_modules." in name else super().rename(name)


ORIGINAL_NAMES = (  # pattern in AnimateDiff's own files -> replacement
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.[01]\.pos_encoder\.pe$", ".pos_embed.pe"),  # the same table twice
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
)


def published_name(name: str) -> str:
    """The name here (diffusers') of a parameter of an original motion module; names that are already diffusers' stay."""
    name = name.removeprefix("module.")
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
