"""A run small enough to be killed, damaged and repeated; `python -m tests.toy OUT [field=value ...]` trains it in a process of its own."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from common import gpu
from common.config import RunConfig
from common.data import Batches
from common.loop import fit


@dataclass
class Config(RunConfig):
    width: int = 16
    dropout: float = 0.1
    noise: float = 0.01  # drawn by the loss from the global generator, as diffusion losses do


class Toy(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.first, self.blocks = nn.Linear(8, width), nn.ModuleList([nn.Linear(width, width)])
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.dropout(self.blocks[0](self.first(x).relu()).relu()))


def model(cfg: Config) -> nn.Module:
    gpu.seed_everything(0)
    return Toy(cfg.width, cfg.dropout)


def data() -> TensorDataset:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))


def config(out: Path, **fields) -> Config:
    return Config(**{"out": Path(out), "steps": 20, "batch": 12, "device": "cpu"} | fields)


def train(cfg: Config) -> nn.Module:
    def loss(model, batch):
        x, y = batch
        return {"ce": F.cross_entropy(model(x + cfg.noise * torch.randn_like(x)), y), "l2": 1e-3 * model.last.weight.square().mean()}

    return fit(model(cfg), loss, Batches(data(), cfg.batch, seed=0), cfg, "toy/0")


def main() -> None:
    torch.set_num_threads(1)
    with gpu.process_group():
        train(config(Path(sys.argv[1]), **{k: ast.literal_eval(v) for k, v in (a.split("=") for a in sys.argv[2:])}))


if __name__ == "__main__":
    from tests import toy  # under its own name, which the checkpoints record

    toy.main()
