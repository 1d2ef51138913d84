"""tiny-clip: CLIP's two towers, trained from scratch on the captioned scenes of common/data/scenes.py.

    L = ½ mean_i CE(S_i·, i) + ½ mean_j CE(S_·j, j),   S = exp(s) cos(image features, text features)

over the pairs of a batch. Tokens are those of tiny-sd; pixel values are 2 image - 1.
"""

import textwrap
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.backbones.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from common.config import RunConfig
from common.data import Batches, scenes
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import fit
from common.pretrain.tiny_sd import WORDS
from common.prompts import Tokenizer
from common.results import content_hash


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 800
    batch: int = 64
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    pairs: int = 24_000  # to learn from
    width: int = 96
    depth: int = 4  # of the image tower; the text tower has half


SCALES = {
    "smoke": Config(steps=2, batch=8, pairs=16, width=32, depth=2),
    "small": Config(),
}
COMPONENTS = {"": CLIP}
TRAINING, HELD_OUT = 210, 211  # seeds of scenes
LENGTH = 24  # tokens of a caption


def train(cfg: Config) -> dict[str, CLIP]:
    seed_everything(cfg.seeds[0])
    return {"": fit(build(cfg), loss, Batches(pairs(cfg), cfg.batch, cfg.seeds[0]), cfg, "clip")}


def tokenizer() -> Tokenizer:
    return Tokenizer.compact(WORDS, LENGTH)


def build(cfg: Config) -> CLIP:
    vision = CLIPVisionConfig(cfg.width, 4 * cfg.width, cfg.depth, 4, 32, 4, hidden_act="gelu", projection_dim=64)
    rows = len(tokenizer().vocab)
    text = CLIPTextConfig(rows, cfg.width, 4 * cfg.width, cfg.depth // 2, 4, LENGTH, hidden_act="gelu", projection_dim=64, eos_token_id=rows - 1)
    model = init_by_fan_in(CLIP(CLIPConfig(vision, text, projection_dim=64)))
    for tower in (model.vision_model, model.text_model):  # with positions as loud as tokens, all features agree for hundreds of steps
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.2)
    return model


def pairs(cfg: Config) -> TensorDataset:
    made = scenes.captioned(cfg.pairs, TRAINING, under_specified=0.2)
    return TensorDataset(made.images, tokenizer()(made.captions))


def loss(model: CLIP, batch: tuple[UInt8[Tensor, "b 3 32 32"], Int[Tensor, "b n"]]) -> Tensor:
    images, rows = batch
    similar, own = model(pixels(images), rows), torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


def pixels(images: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return images / 127.5 - 1


def data(cfg: Config) -> dict[str, str]:
    return {"captioned scenes": content_hash(*pairs(cfg).tensors)}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def held_out(n: int) -> tuple[UInt8[Tensor, "n 3 32 32"], list[str]]:
    """n pairs whose captions leave nothing open and are all different."""
    made = scenes.captioned(2 * n, HELD_OUT)
    first = {scenes.full_caption(scene): i for i, scene in reversed(list(enumerate(made.scenes)))}
    chosen = sorted(first.values())[:n]
    return made.images[chosen], [scenes.full_caption(made.scenes[i]) for i in chosen]


@torch.no_grad()
def measure(models: dict[str, CLIP], n: int = 256) -> dict[str, float]:
    """Retrieval among n pairs, and 30 captions as the classes of scenes with one thing. Chance is the floor; the ceiling is 1."""
    model, (images, captions) = models[""], held_out(n)
    similar, found = model(pixels(images), tokenizer()(captions)), {}
    for direction, scores in (("image to text", similar), ("text to image", similar.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(1)
        found |= {f"{direction}: recall@{k}": (rank < k).float().mean().item() for k in (1, 5)}
    found |= {f"recall@{k}, chance": k / n for k in (1, 5)}
    classes = list(product(scenes.COLOURS, scenes.SHAPES))
    made = scenes.captioned(n, HELD_OUT + 1, styled=0.0, single=1.0)
    texts = [f"a{'n' if colour == 'orange' else ''} {colour} {shape}" for colour, shape in classes]
    chosen = [classes[k] for k in model(pixels(made.images), tokenizer()(texts)).argmax(1)]
    for part, options in enumerate((scenes.COLOURS, scenes.SHAPES)):
        name = ("colour", "shape")[part]
        right = [pair[part] == getattr(scene.things[0], name) for pair, scene in zip(chosen, made.scenes, strict=True)]
        found |= {f"zero-shot {name}: accuracy": sum(right) / n, f"zero-shot {name}: accuracy, chance": 1 / len(options)}
    return found


@torch.no_grad()
def sheet(models: dict[str, CLIP]) -> Figure:
    """Held-out images with the caption that is nearest of 256, in brackets if it is another's, and below it its own."""
    images, captions = held_out(256)
    nearest = models[""](pixels(images), tokenizer()(captions)).argmax(1)
    figure = Figure(figsize=(16, 10), layout="constrained")
    for i, axis in enumerate(figure.subplots(4, 6).flat):
        axis.imshow(images[i].permute(1, 2, 0).numpy())
        told = captions[nearest[i]]
        axis.set_title(textwrap.fill(told if nearest[i] == i else f"[{told}]\n{captions[i]}", 38), fontsize=8)
        axis.axis("off")
    return figure
