"""The autoencoder of latent diffusion (Rombach et al. 2022), with the parameter names of diffusers' AutoencoderKL.

    [μ, log σ²] = E(image)                      one latent per 2^(levels-1) pixels square, log σ² within [-30, 20]        b l h w each
    z = scale (μ + σ ε - shift)                 ε ~ N(0, 1), or 0 for the mode
    image = D(z / scale + shift)

    E: conv, levels of R … with a convolution of stride 2 between them, R A R, conv silu norm
    D: conv, R A R, levels of R … with an enlarging convolution between them, conv silu norm
    R(h) = s h + conv(silu(norm(conv(silu(norm h)))))
    A(h) = h + W_o softmax(q kᵀ/√c) v,  q, k, v = W norm h + b, one head over all pixels

SD and XL have 4 latent channels and a 1x1 convolution behind E and before D; Flux has 16, without these convolutions but with a shift.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones.pretrained import Pretrained
from common.backbones.sd_unet import ResnetBlock2D, Upsample2D


@dataclass
class AutoencoderConfig:
    """The fields of the published vae/config.json; the defaults are those of SD 1 and 2."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


class PixelAttention(Attention):
    """A."""

    def __init__(self, channels: int, groups: int, layer: int):
        super().__init__(1, "self", layer)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, h: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        self.grid = (h.shape[2], h.shape[3])
        x = self.hidden(h.flatten(2).mT)
        y = self.group_norm(x.mT).mT
        context = self.context(y, y)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(y), self.to_k(context), self.to_v(context)))
        x = x + self.output(self.to_out(merge_heads(self.attend(q, k, v))))
        return x.mT.unflatten(2, self.grid)


class PaddedDownsample2D(nn.Module):
    """Convolution with stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks from one width to another."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int):
        super().__init__()
        widths = [in_channels] + [channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock2D(*width, groups, eps=1e-6) for width in pairwise(widths))

    def forward(self, h: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d H W"]:
        for resnet in self.resnets:
            h = resnet(h)
        return h


class Middle(Level):
    """R A R."""

    def __init__(self, channels: int, groups: int, layer: int):
        super().__init__(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups, layer)])

    def forward(self, h: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


class Encoder(nn.Module):
    """E, but for the 1x1 convolution."""

    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        channels, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, dim in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], dim, c.layers_per_block, groups)
            level.downsamplers = nn.ModuleList([PaddedDownsample2D(dim)] if i < len(channels) - 1 else [])
            self.down_blocks.append(level)
        self.mid_block = Middle(channels[-1], groups, 0)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b two_l h w"]:
        h = self.conv_in(image)
        for level in self.down_blocks:
            h = level(h)
            for downsampler in level.downsamplers:
                h = downsampler(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """D, but for the 1x1 convolution."""

    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        channels, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups, 1)
        self.up_blocks = nn.ModuleList()
        for i, dim in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], dim, c.layers_per_block + 1, groups)
            level.upsamplers = nn.ModuleList([Upsample2D(dim)] if i < len(channels) - 1 else [])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b c H W"]:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
            for upsampler in level.upsamplers:
                h = upsampler(h, (2 * h.shape[2], 2 * h.shape[3]))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(Pretrained, nn.Module):
    """Images to latents of about unit variance, and back."""

    config_class = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1) if c.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.use_post_quant_conv else nn.Identity()

    def moments(self, image: Float[Tensor, "b c H W"]) -> tuple[Float[Tensor, "b l h w"], Float[Tensor, "b l h w"]]:
        """μ and log σ², before shift and scale."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Float[Tensor, "b c H W"], sample: torch.Generator | None = None) -> Float[Tensor, "b l h w"]:
        """Latents of an image in [-1, 1], whose sides are multiples of 2^(levels-1): the mode, or a sample drawn with the generator."""
        z, logvar = self.moments(image)
        if sample is not None:
            noise = torch.randn(z.shape, generator=sample, device=sample.device, dtype=z.dtype)
            z = z + (logvar / 2).exp() * noise.to(z.device)
        return self.config.scaling_factor * (z - (self.config.shift_factor or 0))

    def decode(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b c H W"]:
        """The image, about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor + (self.config.shift_factor or 0)))

    def forward(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The image through the mode of its latents."""
        return self.decode(self.encode(image))

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if re.match(OTHER_PARTS, name) else published_name(name)


OTHER_PARTS = r"(model|cond_stage_model|conditioner|model_ema|loss)\.|[^.]+$"  # of a file that holds the whole system

ORIGINAL_NAMES = (  # pattern in the original release (LDM's, Flux's) or in old files of diffusers -> replacement
    (r"^first_stage_model\.", ""),
    (r"^(encoder\.down)\.(\d)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(encoder\.down)\.(\d)\.downsample\.", r"\1_blocks.\2.downsamplers.0."),
    (r"^(decoder\.up)\.(\d)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(decoder\.up)\.(\d)\.upsample\.", r"\1_blocks.\2.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(attentions\.0)\.norm\.", r".\1.group_norm."),
    (r"\.(attentions\.0)\.(?:q|query)\.", r".\1.to_q."),
    (r"\.(attentions\.0)\.(?:k|key)\.", r".\1.to_k."),
    (r"\.(attentions\.0)\.(?:v|value)\.", r".\1.to_v."),
    (r"\.(attentions\.0)\.(?:proj_out|proj_attn)\.", r".\1.to_out.0."),
)


def published_name(name: str, levels: int = 4) -> str:
    """The name here (diffusers') of a parameter of the original release; names that are already diffusers' stay.

    The original counts the decoder's levels from the image, diffusers from the latents.
    """
    name = re.sub(r"(decoder\.up)\.(\d)\.", lambda match: f"{match[1]}.{levels - 1 - int(match[2])}.", name)
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
