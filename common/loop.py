"""The training loop.

    for variant in variants, seed in seeds:
        seed_everything(seed); model = build(variant)
        fit(model, loss, Batches(dataset, batch, seed), cfg, name=f"{variant}/{seed}")

A run lives in cfg.out/name: `step-N.safetensors` (the weights, those that are evaluated), `step-N.pt` (optimizer and the rest) and
`metrics.jsonl`. A checkpoint is the pair: the weights are written first and the older pair is deleted last, so that a process killed at
any moment leaves a whole one. All randomness of step k is seeded from (seed, k): a resumed run repeats an uninterrupted one.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from common import gpu
from common.config import RunConfig
from common.data import Batches, to_device
from common.errors import Interrupted, UserError

Loss = Callable[[nn.Module, object], Tensor | dict[str, Tensor]]


# ---- one run --------------------------------------------------------------------------------------------------------------------------


class _Step(nn.Module):
    """The loss as a forward pass, so that DDP and FSDP see the call whichever method of the model the loss uses."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch) -> dict[str, Tensor]:
        terms = self.loss(self.model, batch)
        return terms if isinstance(terms, dict) else {"loss": terms}


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    cfg: RunConfig,
    name: str,
    lr_scale: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
) -> nn.Module:
    """Train `model` for cfg.steps, or finish the run that an earlier process began; returns it in eval mode (the average if cfg.ema).

    loss(model, batch) gives a scalar or a dict of terms whose sum is the loss. lr_scale(name, parameter): the factor on cfg.lr for one
    parameter. Raises UserError on a non-finite loss and on checkpoints that are damaged or of another run, Interrupted after Ctrl-C or
    SIGTERM.
    """
    if cfg.ema and cfg.shard:
        raise UserError("--ema and --shard do not go together: the average would need a whole second copy on every rank")
    run, on = _Run(cfg, name), gpu.device(cfg)
    model.to(on).train()
    ema = ModelEmaV3(model, decay=cfg.ema) if cfg.ema else None
    step_module = _Step(model, loss)
    module = gpu.distribute(step_module, cfg.shard)
    if cfg.compile:
        module.compile()
    optimizer = torch.optim.AdamW(_groups(model, cfg.weight_decay, lr_scale), cfg.lr, cfg.betas, fused=True)
    schedule = CosineLRScheduler(
        optimizer, cfg.steps, lr_min=cfg.lr_min, warmup_t=round(cfg.warmup * cfg.steps), warmup_prefix=True, t_in_epochs=False
    )  # fmt: skip
    start = run.restore(model, ema, optimizer)
    progress = _Progress(run, start)
    save_every = max(1, round(cfg.save_every * cfg.steps))
    stream = batches.stream(start, cfg.steps, gpu.rank(), gpu.world_size(), cfg.accumulate)
    with _stop_signals() as signalled:
        for step in range(start, cfg.steps):
            schedule.step_update(step + 1)
            terms = _backward(module, next(stream), (batches.seed, step), cfg, on)
            total = sum(terms.values())
            if not math.isfinite(total):
                raise UserError(f"{run.directory}: the loss is {total} at step {step} ({_words(terms)}). {run.last_good()}")
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip) if cfg.clip else None
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model)
            progress.log(step, total, terms, optimizer.param_groups[0]["lr"], norm)
            stop = signalled() or _interrupt_at == step + 1
            stop = gpu.mean_over_ranks([float(stop)], on)[0] > 0  # all ranks leave at the same step
            if stop or (step + 1) % save_every == 0 or step + 1 == cfg.steps:
                run.save(step + 1, model, ema, optimizer)
            if stop:
                raise Interrupted(f"stopped after step {step + 1} of {cfg.steps}, saved in {run.directory}", 128 + (signalled() or signal.SIGINT))
    progress.close()
    return (ema.module if ema else model).eval()


def _groups(model: nn.Module, weight_decay: float, lr_scale: Callable[[str, nn.Parameter], float]) -> list[dict]:
    """Parameters by learning rate (timm's schedules read `lr_scale`), and by whether they decay: not those with one axis."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[lr_scale(name, parameter), parameter.ndim > 1].append(parameter)
    return [{"params": p, "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0} for (scale, decays), p in groups.items()]


def _backward(module: nn.Module, micro_batches: list, seed: tuple[int, int], cfg: RunConfig, on: torch.device) -> dict[str, float]:
    """Accumulate the gradient of one step; the mean of each loss term over micro-batches and ranks."""
    world, rank = gpu.world_size(), gpu.rank()
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        gpu.seed_everything(*seed, i * world + rank)
        last = i + 1 == len(micro_batches)
        skip_sync = module.no_sync() if not last and hasattr(module, "no_sync") else contextlib.nullcontext()
        with skip_sync:
            with gpu.autocast(cfg, on):
                terms = module(to_device(batch, on))
            (sum(terms.values()) / len(micro_batches)).backward()
        for key, term in terms.items():
            sums[key] = sums.get(key, 0) + term.detach() / len(micro_batches)
    return dict(zip(sums, gpu.mean_over_ranks([gpu.scalar(t) for t in sums.values()], on), strict=True))


def each(function: Callable, jobs: Sequence[tuple], cfg: RunConfig) -> None:
    """function(cfg, *job) for every job: on CPU several at a time, one process and one thread each; else one after the other.

    Small models leave a second core idle when two threads share one run, and keep it busy with a second run.
    """
    processes = min(cfg.processes or len(os.sched_getaffinity(0)), len(jobs))
    if processes < 2 or gpu.world_size() > 1 or gpu.device(cfg).type != "cpu":
        for job in jobs:
            function(cfg, *job)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker) as pool, _stop_signals(_pass_on) as signalled:
        futures = [pool.submit(_work, function, cfg, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            if not isinstance(error, Interrupted):
                _pass_on(signal.SIGTERM)  # the other runs save what they have
            pool.shutdown(cancel_futures=True)
            if signalled() and not isinstance(error, Interrupted):  # a worker that was not in fit() dies of the signal
                raise Interrupted("stopped between runs", 128 + signalled()) from None
            raise


_stopped = False


def _work(function: Callable, cfg: RunConfig, job: tuple) -> None:
    """One job in a worker. The pool hands out one job ahead, which no longer can be cancelled when a run has been told to stop."""
    global _stopped
    if _stopped:
        raise Interrupted("stopped between runs", 128 + signal.SIGINT)
    try:
        function(cfg, *job)
    except Interrupted:
        _stopped = True
        raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    # a worker whose parent was killed must not write beside the rerun
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _pass_on(number: int) -> None:
    """Ctrl-C reaches the workers by itself, SIGTERM does not."""
    if number == signal.SIGTERM:
        for worker in active_children():
            worker.terminate()


def load_run(model: nn.Module, cfg: RunConfig, name: str) -> nn.Module:
    """The weights that a finished `fit(..., name)` left, in eval mode. Raises UserError if there are none."""
    run = _Run(cfg, name)
    step = run.latest()
    if step is None:
        raise UserError(f"{run.directory} holds no checkpoint: train first, with `just train {cfg.paper}`")
    if step < cfg.steps:
        raise UserError(f"{run.directory} stopped at step {step} of {cfg.steps}: rerun `just train {cfg.paper}` to finish it")
    weights, meta = run.read(step)
    run.check(meta)
    load_named(model, weights, run.path(step, "safetensors"))
    return model.to(gpu.device(cfg)).eval()


# ---- checkpoints ----------------------------------------------------------------------------------------------------------------------


class _Run:
    """The directory of one run."""

    def __init__(self, cfg: RunConfig, name: str):
        self.cfg, self.name = cfg, name
        self.directory = Path(cfg.out or f"runs/{cfg.paper}") / name

    def path(self, step: int, suffix: str) -> Path:
        return self.directory / f"step-{step:08d}.{suffix}"

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint: the .pt is written after the weights."""
        return max((int(p.stem.split("-")[1]) for p in self.directory.glob("step-*.pt")), default=None)

    def last_good(self) -> str:
        step = self.latest()
        return f"The last good checkpoint is {self.path(step, 'safetensors')}" if step is not None else "No checkpoint had been saved yet"

    def restore(self, model: nn.Module, ema: ModelEmaV3 | None, optimizer) -> int:
        """Load the newest checkpoint; the step to go on from, 0 if there is none."""
        step = self.latest()
        if step is None or not self.cfg.resume:
            if gpu.rank() == 0:
                for old in self.directory.glob("step-*"):
                    old.unlink()
            gpu.barrier()
            return 0
        weights, meta = self.read(step)
        self.check(meta)
        rest = read_torch(self.path(step, "pt"))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, rest["model"] if ema else weights, options=options)
        if step < self.cfg.steps:
            set_optimizer_state_dict(model, optimizer, rest["optimizer"], options=options)
        if ema:
            load_named(ema.module, weights, self.path(step, "safetensors"))
        return step

    def save(self, step: int, model: nn.Module, ema: ModelEmaV3 | None, optimizer) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        raw = get_model_state_dict(model, options=options)
        rest = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)} | ({"model": raw} if ema else {})
        weights = ema.module.state_dict() if ema else raw
        if gpu.rank() == 0:
            meta = {"paper": self.cfg.paper, "name": self.name, "step": str(step), "config": json.dumps(self.cfg.fingerprint())}
            self.directory.mkdir(parents=True, exist_ok=True)
            weights, aliases = _without_aliases(weights)
            atomically(self.path(step, "safetensors"), lambda path: save_file(weights, path, meta | {"aliases": json.dumps(aliases)}))
            atomically(self.path(step, "pt"), lambda path: torch.save(rest, path))
            for old in self.directory.glob("step-*"):
                if not old.name.startswith(self.path(step, "").stem):
                    old.unlink()
        gpu.barrier()

    def read(self, step: int) -> tuple[dict[str, Tensor], dict]:
        return read_safetensors(self.path(step, "safetensors"))

    def check(self, meta: dict) -> None:
        """Refuse the checkpoint of another paper, run or configuration."""
        where, advice = self.directory, "give another --out, or --no-resume to start over"
        if meta.get("paper") != self.cfg.paper:
            raise UserError(f"{where} holds a checkpoint of {meta.get('paper') or 'something else'}, not of {self.cfg.paper}: {advice}")
        if meta["name"] != self.name:
            raise UserError(f"{where} holds a checkpoint of the run {meta['name']}, not of {self.name}: {advice}")
        theirs, ours = json.loads(meta["config"]), self.cfg.fingerprint()
        differ = [f"{k} {theirs.get(k)} there, {ours.get(k)} here" for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
        if differ:
            raise UserError(f"{where} holds a checkpoint of another configuration ({'; '.join(differ[:3])}): {advice}")


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then replace `path` by it; on an error the old file stays. UserError if the disk refuses."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({_first_line(error)}): free some space or give another --out; older files are untouched"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _without_aliases(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """safetensors stores no tensor twice: tied parameters are kept under their first name and listed as {alias: first name}."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in weights.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in aliases}, aliases


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UserError for a missing or damaged file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, "pt") as file:
            weights, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({_first_line(error)}): delete it or fetch it again") from None
    for alias, name in json.loads(meta.get("aliases", "{}")).items():
        weights[alias] = weights[name]
    return weights, meta


def read_torch(path: Path):
    """A torch file of tensors and plain containers; nothing else is ever unpickled. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here
        raise UserError(f"{path} is not a torch checkpoint of plain tensors ({_first_line(error)}): delete it or fetch it again") from None


def load_weights(model: nn.Module, path: Path, rename: Callable[[str], str | None] = lambda name: name, key: str | None = None) -> nn.Module:
    """Load a published checkpoint, safetensors or torch file, in place.

    rename: published name -> ours, None to drop the tensor. key: where a torch file holds the state dict, if it has that key. Names and
    shapes are checked before anything is loaded; raises UserError with the first mismatches.
    """
    path = Path(path)
    weights = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    if key and isinstance(weights, dict) and key in weights:
        weights = weights[key]
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path} holds no state dict" + (f" (looked under the key {key!r} too)" if key else "") + ": give the published weights file")
    renamed = {rename(name): tensor for name, tensor in weights.items()}
    renamed.pop(None, None)
    return load_named(model, renamed, path)


def load_named(model: nn.Module, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """load_state_dict with all names and shapes checked first."""
    ours = model.state_dict()
    problems = [f"{name} is missing" for name in ours if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in ours]
    problems += [f"{n} is {tuple(weights[n].shape)}, not {tuple(t.shape)}" for n, t in ours.items() if n in weights and weights[n].shape != t.shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}. Is it a checkpoint of this model and size?")
    model.load_state_dict(weights)
    return model


# ---- stopping and telling -------------------------------------------------------------------------------------------------------------

_interrupt_at: int | None = None


@contextlib.contextmanager
def interrupt_at(step: int):
    """Every `fit` inside stops after `step`, also if that is its last, as if Ctrl-C had been pressed then."""
    global _interrupt_at
    _interrupt_at = step
    try:
        yield
    finally:
        _interrupt_at = None


@contextlib.contextmanager
def _stop_signals(also: Callable[[int], None] = lambda number: None):
    """Hold back the first Ctrl-C or SIGTERM and yield a function that returns its number, or 0; the second one is immediate."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        also(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Progress:
    """metrics.jsonl, and a bar on a terminal or one line per tenth elsewhere."""

    def __init__(self, run: _Run, start: int):
        self.run, self.steps, self.started, self.first = run, run.cfg.steps, time.monotonic(), start
        self.silent = gpu.rank() != 0 or start == self.steps
        self.bar = tqdm(total=self.steps, initial=start, desc=run.name, disable=self.silent or not sys.stderr.isatty(), leave=False)
        self.file = None
        if gpu.rank() == 0:
            run.directory.mkdir(parents=True, exist_ok=True)
            self.file = _cut(run.directory / "metrics.jsonl", start)

    def log(self, step: int, total: float, terms: dict[str, float], lr: float, norm: Tensor | None) -> None:
        if gpu.rank():
            return
        row = (
            {"step": step, "loss": total, "lr": lr}
            | (terms if len(terms) > 1 else {})
            | ({"grad_norm": gpu.scalar(norm)} if norm is not None else {})
        )
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.bar.update()
        self.bar.set_postfix(loss=f"{total:.4f}", refresh=False)
        tenth = max(1, self.steps // 10)
        if self.bar.disable and not self.silent and (step + 1) % tenth == 0:
            pace = (time.monotonic() - self.started) / (step + 1 - self.first)
            print(f"{self.run.name:<24} {step + 1:>7}/{self.steps}  {_words({'loss': total} | row)}  {1000 * pace:.0f} ms/step", flush=True)

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def _cut(path: Path, steps: int):
    """Open a metrics file for appending after its first `steps` rows: what a killed process logged beyond its checkpoint comes again."""
    rows = path.read_text().splitlines(keepends=True)[:steps] if path.exists() else []
    atomically(path, lambda aside: aside.write_text("".join(rows)))
    return path.open("a")


def _words(terms: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in terms.items() if k != "step")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
