"""The small checkpoints that ship in data/checkpoints, each trained from scratch by `just pretrain NAME`.

A recipe is a module common/pretrain/tiny_x.py with

    Config(RunConfig), SCALES                      "smoke" and "small", as in a paper's train.py
    COMPONENTS = {"unet": UNet2DConditionModel}    folder below data/checkpoints/tiny-x -> class; "" for the folder itself
    train(cfg) -> {"unet": model}                  all training runs go through fit()
    measure({"unet": model}) -> {"accuracy": ...}  quality: a function of the weights alone, in at most a minute
    data(cfg) -> {"scenes": hash}
    sheet({"unet": model}) -> Figure               optional: samples to look at

The json beside a checkpoint says how it came about and how good it is (shipping.py). This file imports no torch.
"""

import importlib
from pathlib import Path
from types import ModuleType

from common.errors import UserError

HERE = Path(__file__).parent


def names() -> list[str]:
    """As in `just pretrain NAME`."""
    return sorted(path.stem.replace("_", "-") for path in HERE.glob("tiny_*.py"))


def file_of(name: str) -> Path:
    """The recipe's module. Raises UserError for a name that has none."""
    if name not in names():
        raise UserError(f"there is no recipe {name!r}: `just pretrain` takes one of {', '.join(names())}")
    return HERE / f"{name.replace('-', '_')}.py"


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"common.pretrain.{file_of(name).stem}")
