"""Golden cases: tensors computed by an independent implementation, with a json that says how to build the model that must reproduce them.

They are read from `tests/golden/<name>/`, or from `$GOLDEN_DIR/<name>/` where that exists.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One json with its tensors."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def meta(self) -> dict:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it: a state dict."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def cases(name: str) -> list[Case]:
    """All cases of `name`, for `pytest.mark.parametrize("case", cases(...), ids=str)`."""
    given = Path(os.environ.get("GOLDEN_DIR", HERE)) / name
    return [Case(path) for path in sorted((given if given.is_dir() else HERE / name).glob("*.json"))]
