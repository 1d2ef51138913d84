"""The scene reader: a small convolutional classifier that says what a picture of data/scenes.py shows. It judges every image generator here.

    h_s = stage_s(h_{s-1})             h₀ = 2 image - 1; convolution, batch norm, relu; each stage after the first halves the map   b c_s H_s W_s
    e   = W [h₄]                       the embedding, of the flattened last map                                                    b e
    logits_f = W_f relu(e)             one head for every factor f of scenes.FACTORS                                               b options

    lpips(a, b) = Σ_s mean over positions |ĥ_s(a) - ĥ_s(b)|²,   ĥ = h/|h| over channels           perceptual distance of two images
    fid(A, B)   = |μ_A - μ_B|² + tr(S_A + S_B - 2 (S_A S_B)^½)                                     Fréchet distance of two sets' embeddings

Images are floats in [0, 1], 32 x 32 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.backbones.pretrained import Pretrained
from common.data import scenes

Images = Float[Tensor, "b 3 32 32"]


@dataclass
class ReaderConfig:
    channels: tuple[int, ...] = (24, 48, 72, 96)  # c_s
    embedding: int = 192  # e


class Reader(Pretrained, nn.Module):
    """The network of the module's docstring. A method that conditions on a reader's features must be judged by another one."""

    config_class, tiny = ReaderConfig, "tiny-reader"

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = c = config
        widths = [3, *c.channels]
        self.stages = nn.ModuleList(_stage(widths[s], widths[s + 1], halves=s > 0) for s in range(len(c.channels)))
        side = 32 // 2 ** (len(c.channels) - 1)
        self.embed = nn.Linear(c.channels[-1] * side**2, c.embedding)
        self.heads = nn.ModuleDict({factor: nn.Linear(c.embedding, len(options)) for factor, options in scenes.FACTORS.items()})

    def forward(self, images: Images) -> dict[str, Float[Tensor, "b options"]]:
        """The logits of every factor. Raises ValueError for images of another size."""
        e = F.relu(self.embedding(images))
        return {factor: head(e) for factor, head in self.heads.items()}

    def embedding(self, images: Images) -> Float[Tensor, "b e"]:
        return self.embed(self.features(images)[-1].flatten(1))

    def features(self, images: Images) -> list[Float[Tensor, "b c H W"]]:
        """h₁ ... h₄."""
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"the reader sees images of 3 x 32 x 32, not {' x '.join(map(str, images.shape[1:]))}")
        h, maps = 2 * images - 1, []
        for stage in self.stages:
            maps.append(h := stage(h))
        return maps


def _stage(inputs: int, channels: int, halves: bool) -> nn.Sequential:
    """One convolution at full size; two after halving."""
    layers = [nn.Conv2d(inputs, channels, 3, 1 + halves, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    if halves:
        layers += [nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


# ---- what the judge says --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(reader: Reader, images: Images) -> Int[Tensor, "b factors"]:
    """The position of each factor's likeliest value in scenes.FACTORS."""
    parts = [torch.stack([logits.argmax(1) for logits in reader(part).values()], 1) for part in images.split(256)]
    return torch.cat(parts)


def truth(depicted: Sequence[scenes.Scene]) -> Int[Tensor, "b factors"]:
    """What a perfect reader would say; -1 for a second thing that is not there."""
    return torch.tensor([scenes.factors(scene) for scene in depicted])


def accuracy(found: Int[Tensor, "b factors"], asked: Int[Tensor, "b factors"]) -> dict[str, float]:
    """The share of right answers for each factor, among the scenes that have it."""
    known = asked >= 0
    right = ((found == asked) & known).sum(0) / known.sum(0)
    return dict(zip(scenes.FACTORS, right.tolist(), strict=True))


# ---- distances ------------------------------------------------------------------------------------------------------------------------


def lpips(reader: Reader, a: Images, b: Images) -> Float[Tensor, "b"]:
    """Perceptual distance of pairs; 0 for equal images, differentiable."""
    pairs = zip(reader.features(a), reader.features(b), strict=True)
    return sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2)) for x, y in pairs)


@torch.no_grad()
def fid(reader: Reader, a: Float[Tensor, "n 3 32 32"], b: Float[Tensor, "m 3 32 32"]) -> float:
    """Fréchet distance of two sets of images; either set should have many more images than e."""
    return frechet(*(torch.cat([reader.embedding(part) for part in images.split(256)]) for images in (a, b)))


def frechet(a: Float[Tensor, "n e"], b: Float[Tensor, "m e"]) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of vectors."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # S_A S_B has the eigenvalues of a positive matrix; the trace of its root is the sum of theirs
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()
