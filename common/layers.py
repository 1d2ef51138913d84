"""The standard parts around attention: norms, MLPs, position and patch embeddings. DropPath and trunc_normal_ come from timm.layers."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Real
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """w · x / √(mean(x²) + eps), the mean over the last axis; computed in float32 at least and cast back before the product with w."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, act=F.gelu):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(hidden, dim), act

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.fc2(self.act(self.fc1(x)))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)), Llama's MLP with its names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution, tokens row-major: (b, c, H, W) -> (b, H/p · W/p, dim)."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


# ---- positions ------------------------------------------------------------------------------------------------------------------------


def frequencies(dim: int, base: float = 10_000.0, *, dtype=torch.float32, device=None) -> Float[Tensor, "d"]:
    """f_i = base^(-2i/dim), i = 0..dim/2-1."""
    return base ** -(torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)


def sinusoidal(positions: Real[Tensor, "*n"], dim: int, base: float = 10_000.0, *, cos_first: bool = False) -> Float[Tensor, "*n dim"]:
    """[sin(p f), cos(p f)], two halves; the diffusion models' time embedding puts the cosines first."""
    angle = positions[..., None] * frequencies(dim, base, dtype=torch.promote_types(positions.dtype, torch.float32), device=positions.device)
    halves = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(halves, -1)


def sinusoidal_2d(dim: int, grid: tuple[int, int]) -> Float[Tensor, "n dim"]:
    """The fixed table of ViT and DiT: the first half of the width from the column index, the second from the row index; row-major tokens."""
    row, column = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    return torch.cat([sinusoidal(column.flatten(), dim // 2), sinusoidal(row.flatten(), dim // 2)], -1).float()


def time_waves(t: Real[Tensor, "*n"], dim: int) -> Float[Tensor, "*n dim"]:
    """[cos(t f), sin(t f)], f_i = 10000^(-2i/dim).

    Exponents and angles are rounded to float32, as when the checkpoints were trained: at t = 1000 it shows. The exp between them is exact,
    for its float32 versions differ between machines.
    """
    exponent = torch.arange(dim // 2, device=t.device) * (-math.log(10_000) / (dim // 2))
    angle = t[..., None].float() * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary(positions: Real[Tensor, "*n"], dim: int, base: float = 10_000.0) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"]]:
    """cos and sin of position · f for the dim/2 planes of a head, as `rotate_half` takes them."""
    angle = positions[..., None] * frequencies(dim, base, device=positions.device)
    return angle.cos(), angle.sin()


def rotate_half(x: Float[Tensor, "b h n two_d"], cos: Float[Tensor, "*n d"], sin: Float[Tensor, "*n d"]) -> Float[Tensor, "b h n two_d"]:
    """Rotary embedding whose planes are (i, i + d/2): the Llama layout."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)


def rotate_pairs(x: Float[Tensor, "b h n two_d"], turns: Complex[Tensor, "*n d"]) -> Float[Tensor, "b h n two_d"]:
    """Rotary embedding whose planes are the neighbours (2i, 2i + 1), the RoFormer and Flux layout; turns: cos + i sin.

    Complex numbers, for real arithmetic on every other channel is many times slower.
    """
    z = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turns).flatten(-2).type_as(x)


# ---- initialisation -------------------------------------------------------------------------------------------------------------------


def init_by_fan_in(model: nn.Module) -> nn.Module:
    """Draw all matrices, kernels and tables with variance 1 / fan-in; a token reads one row of a table, so that its fan-in is 1.

    The usual deviation of 0.02 suits widths of thousands and leaves a narrow model on a plateau for most of a short training.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model
