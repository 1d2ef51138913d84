"""What every training run can be told. Imports no torch, so that --help answers at once."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError

# fields that change where, how fast or how often a run goes, but not which weights it ends with
_INCIDENTAL = ("out", "seeds", "device", "workers", "processes", "accumulate", "shard", "compile", "resume", "save_every", "weights")


@dataclass
class RunConfig:
    """Base of every paper's Config. A field's comment is its help text."""

    out: Path | None = None  # run directory; default runs/<paper>/<scale>
    seeds: tuple[int, ...] = (0, 1, 2)  # one run each
    steps: int = 500  # optimizer steps
    batch: int = 64  # examples per step, over all ranks and accumulation
    lr: float = 1e-3  # peak learning rate
    lr_min: float = 0.0  # where the cosine ends; equal to lr: constant
    warmup: float = 0.05  # share of the steps with a rising learning rate
    weight_decay: float = 0.05  # not on parameters with one axis
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip: float | None = None  # largest gradient norm
    accumulate: int = 1  # micro-batches per step
    ema: float | None = None  # decay of the weight average that is evaluated
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast
    device: str = "auto"  # cpu, cuda, ...; auto takes a GPU if there is one
    workers: int = 0  # data loading processes
    processes: int | None = None  # runs at a time on CPU, one thread each; default one per core
    shard: bool = False  # FSDP2 instead of DDP under torchrun
    compile: bool = False  # torch.compile
    resume: bool = True  # go on from the checkpoints in the run directory
    save_every: float = 0.1  # checkpoint interval, as a share of the steps
    data: str = ""  # dataset directory; default: data that comes with the dependencies
    weights: Path | None = None  # a published checkpoint to evaluate

    def __post_init__(self):
        """Raises UserError for values no run can have."""
        for name, least in {"steps": 1, "batch": 1, "accumulate": 1, "workers": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give at least {least}")
        if not self.seeds:
            raise UserError("--seeds needs at least one seed, as in --seeds 0 1 2")

    @property
    def paper(self) -> str:
        """Whose config this is: the paper's slug, or a small checkpoint's recipe."""
        return type(self).__module__.removeprefix("papers.").removeprefix("common.pretrain.").split(".")[0]

    def fingerprint(self) -> dict:
        """What a checkpoint must agree on to be continued."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in _INCIDENTAL}
