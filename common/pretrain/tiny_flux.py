"""tiny-flux: a text-to-image transformer on the pixels of captioned scenes.

Rectified flow: x_t = (1-t) x + t ε, v = ε - x, t = 1/(1 + e^-s) with s ~ N(1, 1); one caption in ten is the null prompt. What a caption
tells is decided at high noise: below t = 0.7 a thing of a hundred pixels is seen, and with s ~ N(0, 1) only one time in five is above. The
scenes are photographic, for patches of 4 x 4 pixels at this width cannot draw the styles too, and half of them show one thing.
"""

from dataclasses import dataclass
from textwrap import fill

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.backbones.flux import FluxConfig, FluxTransformer2DModel
from common.config import RunConfig
from common.data import Batches
from common.data.scenes import Captioned, Scene, captioned, full_caption
from common.gpu import seed_everything
from common.loop import fit
from common.reader import Reader, accuracy, read, truth
from common.results import content_hash
from common.tiny_flux import PATCH, WIDTH, OnPixels, colour_accuracy, encode, sample


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 7500
    batch: int = 16
    lr: float = 4e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    ema: float | None = 0.998
    scenes: int = 20_000  # rendered in advance
    heads: int = 2
    axes: tuple[int, int, int] = (4, 14, 14)  # channels of a head that turn with each position id; 6 lack the speeds between 1 and 0.05
    layers: int = 2  # double blocks
    single_layers: int = 3


SCALES = {
    "smoke": Config(steps=3, batch=4, scenes=32, heads=2, axes=(2, 4, 4), layers=1, single_layers=1, ema=0.5),
    "small": Config(),
}
COMPONENTS = {"transformer": FluxTransformer2DModel}

TRAIN, TEST = 200, 201  # seeds of the scenes


# ---- data and training ----------------------------------------------------------------------------------------------------------------


def scenes(cfg: Config) -> Captioned:
    return captioned(cfg.scenes, TRAIN, styled=0.0, under_specified=0.15, single=0.5)


def data(cfg: Config) -> dict[str, str]:
    pool = scenes(cfg)
    return {"captioned scenes": content_hash(pool.images, "\n".join(pool.captions).encode())}


def build(cfg: Config) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        FluxConfig(
            in_channels=3 * PATCH**2, num_layers=cfg.layers, num_single_layers=cfg.single_layers, attention_head_dim=sum(cfg.axes),
            num_attention_heads=cfg.heads, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=cfg.axes,
        )
    )  # fmt: skip


def flow_loss(model: FluxTransformer2DModel, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    images, states, pooled = batch
    x, null = images / 127.5 - 1, encode([""])
    told = torch.rand(len(x), device=x.device) >= 0.1
    states = torch.where(told[:, None, None], states, null["states"].to(x))
    pooled = torch.where(told[:, None], pooled, null["pooled"].to(x))
    t, noise = (1 + torch.randn(len(x), device=x.device)).sigmoid(), torch.randn_like(x)
    level = t[:, None, None, None]
    return F.mse_loss(OnPixels(model)((1 - level) * x + level * noise, t, states, pooled), noise - x)


def train(cfg: Config) -> dict[str, nn.Module]:
    seed = cfg.seeds[0]
    seed_everything(seed)
    pool = scenes(cfg)
    text = encode(pool.captions)
    dataset = TensorDataset(pool.images, text["states"], text["pooled"])
    return {"transformer": fit(build(cfg), flow_loss, Batches(dataset, cfg.batch, seed), cfg, "transformer")}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def samples(model: FluxTransformer2DModel, captions: list[str], **options) -> UInt8[Tensor, "n 3 32 32"]:
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(TEST))
    return ((sample(model, captions, noise, **options) + 1) * 127.5).round().to(torch.uint8)


def measure(models: dict[str, nn.Module], n: int = 256) -> dict[str, float]:
    """Held-out captions that leave nothing open, 12 steps; ceiling: their renders; floor: samples of the null prompt."""
    asked = captioned(n, TEST, styled=0.0, under_specified=0.0, single=0.5)
    model, reader = models["transformer"], Reader.from_pretrained("tiny")
    captions = [full_caption(scene) for scene in asked.scenes]
    pictures = {
        "": samples(model, captions),
        " (ceiling)": asked.images,
        " (floor)": samples(model, [""] * n, guidance=1.0),
    }
    found = {suffix: score(reader, images, asked.scenes) for suffix, images in pictures.items()}
    return {name + suffix: value[name] for name in found[""] for suffix, value in found.items()}


def score(reader: Reader, images: UInt8[Tensor, "n 3 32 32"], asked: list[Scene]) -> dict[str, float]:
    """What the reader finds as asked, and what the pixels say of the colours."""
    read_off = accuracy(read(reader, images / 255), truth(asked))
    return {name: value for name, value in read_off.items() if name != "style"} | colour_accuracy(images, asked)


def sheet(models: dict[str, nn.Module]) -> Figure:
    """Four columns of a caption, its render and three samples."""
    asked = captioned(32, TEST + 1, styled=0.0, under_specified=0.0, single=0.5)
    captions = [full_caption(scene) for scene in asked.scenes]
    drawn = samples(models["transformer"], [text for text in captions for _ in range(3)]).unflatten(0, (-1, 3))
    figure = Figure(figsize=(16, 12), layout="constrained")
    for axes, render, images, text in zip(figure.subplots(8, 4).ravel(), asked.images, drawn, captions, strict=True):
        axes.imshow(np.hstack([image.permute(1, 2, 0).numpy() for image in (render, *images)]))
        axes.set_title(fill(text, 48), fontsize=7, pad=2)
        axes.axis("off")
    return figure
