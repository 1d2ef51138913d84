"""The scene reader, trained on labelled renders to judge image generators.

    loss = mean over factors of the cross-entropy; what concerns a thing that is not there does not count

White noise of up to 0.1 is added to the images, for what a generator draws is never as clean as a render.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.config import RunConfig
from common.data import Batches, scenes
from common.gpu import seed_everything
from common.loop import fit
from common.reader import Reader, ReaderConfig, accuracy, read, truth
from common.results import content_hash


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 1300
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.02
    images: int = 30_000  # training renders


SCALES = {
    "smoke": Config(steps=3, batch=16, images=64),
    "small": Config(),
}
COMPONENTS = {"": Reader}
TRAIN, TEST = 100, 101  # seeds of the scenes
TESTS = 3000  # scenes in `measure`


def renders(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and what is to be read from them."""
    made = scenes.captioned(n, seed)
    return made.images, truth(made.scenes)


def train(cfg: Config) -> dict[str, nn.Module]:
    seed_everything(cfg.seeds[0])
    model = Reader(ReaderConfig())
    initialise(model)
    batches = Batches(TensorDataset(*renders(cfg.images, TRAIN)), cfg.batch, cfg.seeds[0])
    return {"": fit(model.to(memory_format=torch.channels_last), loss, batches, cfg, "reader")}


def initialise(model: Reader) -> None:
    """Kernels of variance 2/fan_in, heads at 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)


def loss(model: Reader, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, asked = batch
    images = images / 255
    images = images + 0.1 * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(images)
    answers = zip(model(images).items(), asked.unbind(1), strict=True)
    return {factor: F.cross_entropy(logits, answer, ignore_index=-1) / len(scenes.FACTORS) for (factor, logits), answer in answers}


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    """Accuracy on held-out renders, and on those without a style; chance: always the commonest answer."""
    images, asked = renders(TESTS, TEST)
    found = read(models[""], images / 255)
    plain = asked[:, list(scenes.FACTORS).index("style")] == 0
    common = torch.stack([column[column >= 0].mode().values for column in asked.T])
    parts = {"": accuracy(found, asked), ", unstyled": accuracy(found[plain], asked[plain]), ", chance": accuracy(common.expand_as(asked), asked)}
    return {factor + part: round(value, 4) for part, values in parts.items() for factor, value in values.items()}


def data(cfg: Config) -> dict[str, str]:
    return {"scenes": content_hash(*renders(cfg.images, TRAIN))}


def sheet(models: dict[str, nn.Module]) -> Figure:
    """Held-out renders with what the reader says, its mistakes in red."""
    images, asked = renders(40, TEST)
    found = read(models[""], images / 255)
    figure = Figure(figsize=(20, 12), layout="constrained")
    for axis, image, said, right in zip(figure.subplots(5, 8).flat, images, found, asked, strict=True):
        values = [options[i] or "unstyled" for options, i in zip(scenes.FACTORS.values(), said, strict=True)]
        lines = [" ".join(values[a:b]) for a, b in ((0, 1), (1, 4), (4, 7), (7, 9)) if right[a] >= 0]
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title("\n".join(lines), fontsize=8, color="black" if torch.equal(said[right >= 0], right[right >= 0]) else "red")
        axis.axis("off")
    return figure
