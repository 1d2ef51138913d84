"""What the small image and video models have in place of a variational autoencoder.

    z = s Vᵀ(p - μ),   p ≈ μ + V z / s         p: the pixels of a patch, in a video of some frames; V: their first principal components

Neighbouring pixels agree: a quarter of the components holds 96% of a scene's variance, and of white noise a network would spend itself on
the rest. V is orthonormal, so that white noise in z is white noise in those components, and s makes the mean variance of z one.
"""

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from common.backbones.pretrained import Pretrained


@dataclass
class PatchCodecConfig:
    patch: int = 4  # pixels a side
    latent_channels: int = 12  # components kept
    frames: int = 1  # of a video to a latent


class PatchCodec(Pretrained, nn.Module):
    """Images (b, 3, H, W) or videos (b, 3, T, H, W) in [-1, 1] and their latents (b, l, H/patch, W/patch), (b, l, T/frames, ...)."""

    config_class = PatchCodecConfig

    def __init__(self, config: PatchCodecConfig):
        super().__init__()
        self.config = config
        pixels = 3 * config.frames * config.patch**2
        self.mean = nn.Parameter(torch.zeros(pixels), requires_grad=False)  # μ
        self.basis = nn.Parameter(torch.eye(pixels, config.latent_channels), requires_grad=False)  # V
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)  # s

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "b 3 *T H W"]) -> Self:
        """μ, V and s of these images."""
        p = self._patches(images).flatten(0, -2)
        variance, vectors = torch.linalg.eigh(torch.cov(p.T))  # in ascending order
        self.mean.copy_(p.mean(0))
        self.basis.copy_(vectors.flip(1)[:, : self.basis.shape[1]])
        self.scale.copy_(variance.flip(0)[: self.basis.shape[1]].mean().rsqrt())
        return self

    def _patches(self, images: Float[Tensor, "b 3 *T H W"]) -> Float[Tensor, "b *t h w pixels"]:
        if images.ndim == 4:
            return self._patches(images[:, :, None])[:, 0]
        return rearrange(images, "b c (t f) (h i) (w j) -> b t h w (c f i j)", **self._sizes)

    def encode(self, images: Float[Tensor, "b 3 *T H W"]) -> Float[Tensor, "b l *t h w"]:
        return rearrange(self.scale * (self._patches(images) - self.mean) @ self.basis, "b ... h w l -> b l ... h w")

    def decode(self, z: Float[Tensor, "b l *t h w"]) -> Float[Tensor, "b 3 *T H W"]:
        if z.ndim == 4:
            return self.decode(z[:, :, None])[:, :, 0]
        p = self.mean + rearrange(z, "b l t h w -> b t h w l") @ self.basis.T / self.scale
        return rearrange(p, "b t h w (c f i j) -> b c (t f) (h i) (w j)", **self._sizes)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"f": self.config.frames, "i": self.config.patch, "j": self.config.patch}
