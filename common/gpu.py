"""Device, seeding, processes and measuring: all that depends on the machine."""

import contextlib
import gc
import math
import os
import random
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common.config import RunConfig
from common.errors import UserError

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler behind peak_memory would print every start and stop

# ---- device and precision -------------------------------------------------------------------------------------------------------------


def device(cfg: RunConfig) -> torch.device:
    """The device of this rank. Raises UserError if the one asked for is not there."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no usable GPU here; take --device cpu, or check the driver with nvidia-smi")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: torch knows no such device; try auto, cpu or cuda") from None


def autocast(cfg: RunConfig, on: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(on.type, torch.bfloat16, enabled=cfg.precision == "bf16")


# ---- seeding --------------------------------------------------------------------------------------------------------------------------


def seed_everything(*seed: int) -> None:
    """Seed torch, numpy and random from one or several integers (their number counts: SeedSequence ignores trailing zeros)."""
    word = int(np.random.SeedSequence((len(seed), *seed)).generate_state(1, np.uint64)[0])
    torch.manual_seed(word % 2**63)
    np.random.seed(word % 2**32)
    random.seed(word)


@contextlib.contextmanager
def seeded(*seed: int):
    """Draws inside depend on the seed alone, and leave the generators outside where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_everything(*seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


# ---- several processes ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group():
    """Join the process group that torchrun announces; without torchrun, do nothing."""
    if "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: list[float], on: torch.device) -> list[float]:
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64 if on.type == "cpu" else torch.float32, device=on)
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def distribute(module: nn.Module, shard: bool) -> nn.Module:
    """Wrap for the running process group: DDP, or FSDP2 with every block of a ModuleList as a unit of its own."""
    if world_size() == 1:
        return module
    if not shard:
        return DistributedDataParallel(module)
    for blocks in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    return fully_shard(module)


# ---- measuring ------------------------------------------------------------------------------------------------------------------------


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills parameters: on "meta" there is nothing to fill, and torch takes longer to find that out than to build the module."""

    FILLING = frozenset({"kaiming_uniform_", "trunc_normal_", "normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta():
    """Modules built inside have shapes but no numbers: the largest model costs no memory."""
    with torch.device("meta"), _Unfilled():
        yield


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in one call; a multiply-add counts two."""
    # the counter does not know the fused attention of the CPU, so attention runs as two products and a softmax
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes by which the tensors alive during one call exceed, at the peak, those alive before it; kernels' own scratch included."""
    function()  # caches and lazy initialisation are not the call's
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = sorted((e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def alternate(functions: dict[str, Callable[[], object]], repeats: int = 5, seconds: float = 0.2) -> dict[str, float]:
    """Median seconds per call of each function, measured in turns so that a change of the machine's load meets all of them.

    seconds: how long a turn takes at least.
    """
    from torch.utils.benchmark import Timer  # its import looks for a CUDA toolkit, aloud

    timers = {name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in functions.items()}
    for function in functions.values():
        function()
    calls = {name: math.ceil(seconds / timer.timeit(1).mean) for name, timer in timers.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]).mean)
    return {name: statistics.median(t) for name, t in times.items()}


def scalar(x: Tensor) -> float:
    """The value of a one-element tensor, gathered if it is sharded."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)
