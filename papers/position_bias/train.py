"""Train self-attention networks to look up a label in their context, with every mask, position encoding, depth and bias of the data compared."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.config import RunConfig
from common.data import Batches
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import each, fit
from papers.position_bias.model import SAN


@dataclass
class Config(RunConfig):
    """The paper's networks and data, fewer steps."""

    dim: int = 64  # width of tokens and layers
    deep: int = 4  # layers of the deep networks without residual; the paper has 6 too
    residual_depths: tuple[int, ...] = ()  # more networks with residual, causal, on unbiased data
    classes: int = 2048  # in training; the tests have new ones
    labels: int = 32
    copies: int = 4  # of each of the two classes in a sequence
    noise: float = 0.75  # of an item around its class, in units of scale
    scale: float = 0.125  # deviation of all Gaussians: vectors of length 1 at width 64; the authors' code has 1/64
    sequences: int = 131_072  # arrangements of classes to train on; the noise is always new
    test_sequences: int = 2048  # for each of the three pairs of tests, and for the accuracy
    walks: int = 256  # sequences of which attention maps are followed


SCALES = {
    "smoke": Config(
        steps=4, batch=8, dim=16, deep=3, classes=64, sequences=256, test_sequences=32, walks=8, seeds=(0,), weight_decay=1e-6, processes=1
    ),
    "small": Config(steps=400, batch=64, lr=6e-3, weight_decay=1e-6, save_every=0.5),
    "full": Config(
        steps=100_000, batch=128, deep=6, lr_min=1e-3, warmup=0.0, weight_decay=1e-6, save_every=0.02,
        scale=1 / 64, test_sequences=10_000, residual_depths=(2, 6, 10),
    ),
}  # fmt: skip

FIRST, MIDDLE, LAST = "first", "middle", "last"  # items
PAIRS = ((FIRST, MIDDLE), (FIRST, LAST), (MIDDLE, LAST))


class Net(NamedTuple):
    """One network and the data it learns from."""

    mask: str = "causal"
    position: str = "none"
    depth: int = 2
    residual: bool = False
    favoured: tuple[str, ...] = ()  # items that the query may ask for; () all


def nets(cfg: Config) -> dict[str, Net]:
    """All networks to compare, the longest to train first."""
    found = {}
    for depth, name in ((cfg.deep, "deep"), (2, "shallow")):  # C5, C6
        found |= {f"{name} none": Net(depth=depth), f"{name} decay": Net("decay", depth=depth), f"{name} rope": Net(position="rope", depth=depth)}
    for mask in ("full", "causal"):  # C7
        found |= {f"{mask} {p}": Net(mask, p, residual=True, favoured=(FIRST, LAST)) for p in ("none", "sin", "rope")}
    for favoured in ((), (FIRST,), (MIDDLE,), (LAST,)):  # C8, with "causal rope"
        found[f"rope {''.join(favoured) or 'unbiased'}"] = Net(position="rope", residual=True, favoured=favoured)
    found |= {mask: Net(mask) for mask in ("window", "prefix")}  # C9, with "shallow none"
    return found | {f"residual {depth}": Net(depth=depth, residual=True) for depth in cfg.residual_depths}  # C10


def build(cfg: Config, net: Net) -> nn.Module:
    """torch's own initialisation shrinks vectors by √3 a layer, and without residual nothing makes up for it: all networks get 1/√fan-in."""
    return init_by_fan_in(SAN(cfg.dim, cfg.dim, cfg.labels, net.depth, mask=net.mask, position=net.position, residual=net.residual))


# ---- data -------------------------------------------------------------------------------------------------------------------------------


class Task:
    """In-context classification: items x_1, y_1, ..., x_n, y_n and a query x. Two classes take turns in random order, each with its label.

    An item is (class mean + noise · η) / √(1 + noise²), all Gaussians of deviation `scale`. Two items have the same class with probability
    3/7, so a network can answer from the content of the sequence or from what it has learnt of the training classes.
    """

    def __init__(self, cfg: Config, seed: int):
        self.cfg, self.items = cfg, 2 * cfg.copies
        self.index = {FIRST: 0, MIDDLE: self.items // 2, LAST: self.items - 1}
        draw = torch.Generator().manual_seed(seed)
        self.means = cfg.scale * torch.randn(cfg.classes, cfg.dim, generator=draw)
        self.label_of = torch.randint(cfg.labels, (cfg.classes,), generator=draw)
        self.labels = cfg.scale * torch.randn(cfg.labels, cfg.dim, generator=draw)

    def arrangements(self, n: int, favoured: tuple[str, ...], seed: int) -> tuple[Int[Tensor, "n items"], Int[Tensor, "n"]]:
        """Which class each item has, and the item asked for."""
        draw = torch.Generator().manual_seed(seed)
        first = torch.randint(self.cfg.classes, (n,), generator=draw)
        second = (first + torch.randint(1, self.cfg.classes, (n,), generator=draw)) % self.cfg.classes
        pairs = torch.stack([first, second], 1).repeat(1, self.cfg.copies)
        classes = pairs.gather(1, torch.rand(pairs.shape, generator=draw).argsort(1))
        allowed = torch.tensor([self.index[name] for name in favoured] or list(range(self.items)))
        return classes, allowed[torch.randint(len(allowed), (n,), generator=draw)]

    def sequences(
        self, means: Float[Tensor, "n items d"], label_of: Int[Tensor, "n items"], asked: Int[Tensor, "n"], copy_to: int | None = None
    ) -> tuple[Float[Tensor, "n s d"], Int[Tensor, "n"]]:
        """Tokens and the right label, with fresh noise. copy_to: an item whose content the one asked for replaces."""
        rows = torch.arange(len(means))
        centres = torch.cat([means, means[rows, asked][:, None]], 1)
        x = (centres + self.cfg.noise * self.cfg.scale * torch.randn(centres.shape)) / (1 + self.cfg.noise**2) ** 0.5
        if copy_to is not None:
            x[:, copy_to] = x[rows, asked]
        labelled = torch.stack([x[:, :-1], self.labels[label_of]], 2).flatten(1, 2)
        return torch.cat([labelled, x[:, -1:]], 1), label_of[rows, asked]

    def training(self, classes: Int[Tensor, "n items"], asked: Int[Tensor, "n"]) -> tuple[Float[Tensor, "n s d"], Int[Tensor, "n"]]:
        return self.sequences(self.means[classes], self.label_of[classes], asked)

    def conflict(self, n: int, right: str, wrong: str) -> tuple[Float[Tensor, "n s d"], Float[Tensor, "n s d"], Int[Tensor, "n"]]:
        """Two items look alike but keep the labels of their classes; that of the item `right` counts. New classes in every sequence.

        Also the mirror image: the same tokens with both items, and so their labels, exchanged.
        """
        means, label_of = self.cfg.scale * torch.randn(n, 2, self.cfg.dim), torch.randint(self.cfg.labels, (n, 2))
        member = torch.arange(2).repeat(self.cfg.copies).expand(n, -1).gather(1, torch.rand(n, self.items).argsort(1))
        rows, a, b = torch.arange(n)[:, None], self.index[right], self.index[wrong]
        tokens, label = self.sequences(means[rows, member], label_of[rows, member], torch.full((n,), a), copy_to=b)
        order = torch.arange(tokens.shape[1])
        order[[2 * a, 2 * a + 1, 2 * b, 2 * b + 1]] = torch.tensor([2 * b, 2 * b + 1, 2 * a, 2 * a + 1])
        return tokens, tokens[:, order], label


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    each(train_one, [(name, seed) for name in nets(cfg) for seed in cfg.seeds], cfg)


def run_name(name: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}/{seed}"


def train_one(cfg: Config, name: str, seed: int) -> None:
    seed_everything(seed)
    net = nets(cfg)[name]
    task, model = Task(cfg, seed), build(cfg, net)
    dataset = TensorDataset(*task.arrangements(cfg.sequences, net.favoured, seed))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, label = task.training(*batch)
        return F.cross_entropy(model(tokens), label)

    fit(model, loss, Batches(dataset, cfg.batch, seed), cfg, run_name(name, seed))
