"""Low-rank adaptation (Hu et al. 2021) of a model's linear layers, several adapters side by side, with peft's parameter names.

    y = W x + b + (α/r) B A x        A: r x in, at the start N(0, 1/r²);  B: out x r, at the start zero

    add_lora(model, "style", r".*attn1\\.to_[qkv]", rank=4)      # <module>.lora_A.style.weight, <module>.lora_B.style.weight
    with adapter("style"):                                      # outside, the model is the base model, bit for bit
        model(...)

The base parameters keep their names, so published checkpoints load before or after. `merge` puts an adapter into W, which costs nothing at
inference.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import UserError

_active: ContextVar[tuple[str | None, ...]] = ContextVar("active adapters", default=())


@contextmanager
def adapter(*names: str | None):
    """Inside, the adapters of these names are active, and no others; None is the name of none."""
    token = _active.set(names)
    try:
        yield
    finally:
        _active.reset(token)


class LoraLinear(nn.Linear):
    """A linear layer, with its parameters, and the adapters added to it."""

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}  # α/r
        self.merged: set[str] = set()

    def add(self, name: str, rank: int, alpha: float) -> None:
        like = {"bias": False, "device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A[name], self.lora_B[name] = nn.Linear(self.in_features, rank, **like), nn.Linear(rank, self.out_features, **like)
        self.scaling[name] = alpha / rank
        nn.init.normal_(self.lora_A[name].weight, std=1 / rank)
        nn.init.zeros_(self.lora_B[name].weight)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = F.linear(x, self.weight, self.bias)
        for name in _active.get():
            if name in self.scaling and name not in self.merged:
                y = y + self.lora_B[name](self.scaling[name] * self.lora_A[name](x))
        return y

    def delta(self, name: str) -> Float[Tensor, "o i"]:
        """(α/r) B A."""
        return self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight


def add_lora(model: nn.Module, name: str, targets: str, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Add an adapter to the linear layers whose whole module name matches the regular expression `targets`; returns its parameters.

    alpha: default rank, so that α/r = 1. The model computes the same as before until the adapter is trained.
    """
    layers = {path: layer for path, layer in model.named_modules() if re.fullmatch(targets, path)}
    if not layers:
        raise ValueError(f"no module of {type(model).__name__} is called like {targets!r}")
    for path, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{path} is a {type(layer).__name__}: low-rank adaptation is for linear layers, make {targets!r} leave it out")
        if isinstance(layer, LoraLinear) and name in layer.scaling:
            raise ValueError(f"{path} already has an adapter {name!r}: choose another name")
    for path, layer in layers.items():
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(layer)
            model.set_submodule(path, layer)
        layer.add(name, rank, rank if alpha is None else alpha)
    return [parameter for path, parameter in model.named_parameters() if _owner(path) == name]


def merge(model: nn.Module, name: str) -> None:
    """W ← W + (α/r) B A: from now on the adapter acts always, whatever `adapter` says."""
    for layer in _adapted(model, name):
        if name not in layer.merged:
            layer.weight.data += layer.delta(name)
            layer.merged.add(name)


def unmerge(model: nn.Module, name: str) -> None:
    """W ← W - (α/r) B A, which restores W up to rounding."""
    for layer in _adapted(model, name):
        if name in layer.merged:
            layer.weight.data -= layer.delta(name)
            layer.merged.remove(name)


def lora_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's parameters under the names of its file, which leave out the adapter: `<module>.lora_A.weight`."""
    return {re.sub(r"(\.lora_[AB])\..*\.", r"\1.", path): tensor for path, tensor in model.state_dict().items() if _owner(path) == name}


def load_lora(model: nn.Module, name: str, state: dict[str, Tensor], alpha: float | None = None) -> list[nn.Parameter]:
    """Add an adapter from the tensors of a file, which says where it goes and its rank; returns its parameters.

    alpha: of the training, default the rank. Prefixes that name the model in a pipeline (transformer., unet., base_model.model.) are cut.
    """
    state = {re.sub(r"^(base_model\.model|transformer|unet)\.", "", path): tensor for path, tensor in state.items()}
    targets = [path.removesuffix(".lora_A.weight") for path in state if path.endswith(".lora_A.weight")]
    ranks = {len(state[f"{path}.lora_A.weight"]) for path in targets}
    if len(ranks) != 1 or set(state) != {f"{path}.lora_{matrix}.weight" for path in targets for matrix in "AB"}:
        raise UserError("this file is no low-rank adapter: it must hold pairs <module>.lora_A.weight, <module>.lora_B.weight of one rank.")
    [rank], modules = ranks, dict(model.named_modules())
    for path in targets:
        layer = modules.get(path)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"the adapter is for another model: it adapts {path}, which {type(model).__name__} lacks.")
        for matrix, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            found = tuple(state[f"{path}.lora_{matrix}.weight"].shape)
            if found != shape:
                raise UserError(
                    f"the adapter is for another model: its {path}.lora_{matrix}.weight is {found}, {type(model).__name__} needs {shape}."
                )
    parameters = add_lora(model, name, "|".join(map(re.escape, targets)), rank, alpha)
    with torch.no_grad():
        for path, tensor in state.items():
            model.get_parameter(f"{path.removesuffix('.weight')}.{name}.weight").copy_(tensor)
    return parameters


def _adapted(model: nn.Module, name: str) -> Iterator[LoraLinear]:
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear) and name in layer.scaling]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}")
    yield from layers


def _owner(path: str) -> str | None:
    """The adapter to which a parameter belongs."""
    match = re.search(r"\.lora_[AB]\.([^.]+)\.weight$", path)
    return match and match[1]
