"""`just new PAPER`: a paper directory that runs and passes the structure tests, to be filled in.

It compares attention with a mean over the tokens on 8x8 digits, so that every script has something real to do from the first minute.
"""

import re
from pathlib import Path

from common.errors import UserError
from common.papers import PAPERS

FILES = {
    "paper.toml": """
title = "TITLE"
authors = "AUTHORS"
venue = "VENUE"
year = 2000
arxiv = "0000.00000"
family = "FAMILY"
idea = "One sentence: what the mechanism is."
official_code = ""
weights = ""

[[claims]]
id = "C1"
text = "Attention over the patches classifies better than their mean."
paper = "the paper's own figures, with the table they stand in"
metric = "test accuracy in points: attention - mean"
rule = "> 0"
""",
    "model.py": '''
"""TITLE (AUTHORS, arXiv 0000.00000).

    O = softmax(Q Kᵀ / √d) V        (1)   b h n d
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.attention import MultiHeadAttention
from common.layers import PatchEmbed


class Classifier(nn.Module):
    """Patches of an 8x8 image -> eq. 1 (or nothing) -> mean -> classes."""

    def __init__(self, dim: int, heads: int, classes: int = 10, attention: bool = True):
        super().__init__()
        self.embed = PatchEmbed(1, dim, 2)
        self.position = nn.Parameter(torch.randn(16, dim) * 0.02)
        self.attention = MultiHeadAttention(dim, heads) if attention else None  # (1)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b classes"]:
        x = self.embed(image) + self.position
        if self.attention is not None:
            x = x + self.attention(x)
        return self.head(x.mean(1))
''',
    "train.py": '''
"""Train the classifier with attention and its baseline without."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch.utils.data import TensorDataset

from common.config import RunConfig
from common.data import Batches
from common.data.digits import digits
from common.gpu import seed_everything
from common.loop import each, fit
from papers.SLUG.model import Classifier

VARIANTS = ("attention", "mean")


@dataclass
class Config(RunConfig):
    dim: int = 32  # model width
    heads: int = 4


SCALES = {
    "smoke": Config(steps=4, dim=8, heads=2, seeds=(0,), processes=1),
    "small": Config(steps=200),
    "full": Config(steps=2000, dim=128),
}


def build(cfg: Config, variant: str) -> Classifier:
    return Classifier(cfg.dim, cfg.heads, attention=variant == "attention")


def train(cfg: Config) -> None:
    each(train_one, [(variant, seed) for variant in VARIANTS for seed in cfg.seeds], cfg)


def train_one(cfg: Config, variant: str, seed: int) -> None:
    seed_everything(seed)
    dataset = TensorDataset(digits().train_images, digits().train_labels)
    fit(build(cfg, variant), lambda m, b: F.cross_entropy(m(b[0]), b[1]), Batches(dataset, cfg.batch, seed), cfg, f"{variant}/{seed}")
''',
    "eval.py": '''
"""Measure the claims of paper.toml."""

import torch
from matplotlib.figure import Figure

from common import gpu
from common.data.digits import digits
from common.loop import load_run
from common.results import Measured, content_hash
from papers.SLUG.train import VARIANTS, Config, build


@torch.inference_mode()
def accuracy(cfg: Config, variant: str, seed: int) -> float:
    """Test accuracy of one run, in points."""
    test, on = digits(), gpu.device(cfg)
    model = load_run(build(cfg, variant), cfg, f"{variant}/{seed}")
    return 100 * (model(test.test_images.to(on)).argmax(1).cpu() == test.test_labels).float().mean().item()


def evaluate(cfg: Config) -> Measured:
    accuracies = {variant: [accuracy(cfg, variant, seed) for seed in cfg.seeds] for variant in VARIANTS}
    gain = [a - b for a, b in zip(accuracies["attention"], accuracies["mean"], strict=True)]
    test = digits()
    return Measured({"C1": gain}, {"accuracy": accuracies}, {"digits test": content_hash(test.test_images, test.test_labels)})


def figure(details: dict) -> Figure:
    fig = Figure(figsize=(4, 3))
    axes = fig.subplots()
    for i, (variant, values) in enumerate(details["accuracy"].items()):
        axes.bar(i, sum(values) / len(values), color="0.8")
        axes.plot([i] * len(values), values, "ko", markersize=4)
    axes.set_xticks(range(len(details["accuracy"])), details["accuracy"])
    axes.set_ylabel("test accuracy [%]")
    return fig
''',
    "README.md": """
# TITLE

What the idea is, in three sentences.

| equation | where |
|---|---|
| (1) attention | [model.py:MHALINE `MultiHeadAttention`](model.py#LMHALINE) |

## What the paper claims and what we measured

<!-- report -->
not recorded yet
<!-- /report -->

## Run it

`just repro SLUG` at small scale; `just train SLUG --scale full` at the paper's.

## Where we differ from the paper, and why

## Where the authors' code and the paper disagree
""",
}


def scaffold(slug: str) -> Path:
    """Write papers/<slug>/. Raises UserError for a name that is no Python identifier or is taken."""
    directory = PAPERS / slug
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise UserError(f"{slug!r} cannot be a paper's name: use lower case letters, digits and _, as in style_injection")
    if directory.exists():
        raise UserError(f"{directory} exists already: choose another name")
    model = FILES["model.py"].lstrip().splitlines()
    line = next(i for i, text in enumerate(model, 1) if "= MultiHeadAttention(" in text)
    directory.mkdir(parents=True)
    for name, text in FILES.items():
        (directory / name).write_text(text.lstrip().replace("SLUG", slug).replace("MHALINE", str(line)))
    return directory
