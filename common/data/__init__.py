"""Batches: an endless shuffled stream in which batch k is a function of (seed, k) alone, so that resuming and ranks need no state."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from common.errors import UserError
from common.gpu import seeded


class Batches:
    """Batches of `batch` examples from `dataset`, every epoch in a new order.

    dataset: a TensorDataset, or an object with `__len__` and `batch(indices)` (int64 tensor -> tuple of tensors), or any map-style
    Dataset, whose random transforms are seeded for each example. workers: processes that load the examples of a map-style Dataset.
    """

    def __init__(self, dataset, batch: int, seed: int, workers: int = 0):
        if len(dataset) == 0:
            raise UserError("the dataset is empty: check the directory given with --data")
        self.dataset, self.batch, self.seed, self.workers = dataset, batch, seed, workers
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(dataset)))

    def indices(self, step: int) -> list[int]:
        """The examples of step `step`, over all ranks."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        return [int(self._order(p // len(self.dataset))[p % len(self.dataset)]) for p in positions]

    def stream(self, start: int, steps: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[list]:
        """The micro-batches of each step start..steps-1 that belong to `rank`. A step's examples are cut into world · accumulate parts;
        micro-batch i of rank r is part i · world + r."""
        parts = world * accumulate
        if self.batch % parts:
            raise UserError(f"--batch {self.batch} does not divide into {world} rank(s) x {accumulate} accumulation step(s)")

        def requests():
            size = self.batch // parts
            for step in range(start, steps):
                indices = self.indices(step)
                for part in range(rank, parts, world):
                    first = step * self.batch + part * size
                    yield list(enumerate(indices[part * size : (part + 1) * size], first))

        source = _Source(self.dataset, self.seed)
        if self.workers and not hasattr(self.dataset, "batch"):
            # a forked child would share the video reader's threads with its parent and hang
            loaded = iter(DataLoader(source, batch_sampler=requests(), num_workers=self.workers, multiprocessing_context="forkserver", timeout=300))
        else:
            loaded = map(source.load, requests())
        for _ in range(start, steps):
            yield [next(loaded) for _ in range(accumulate)]


class _Source(Dataset):
    """Loads examples by (position in the stream, index in the dataset)."""

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        position, index = key
        with seeded(self.seed, position):
            return self.dataset[index]

    def load(self, keys: list[tuple[int, int]]):
        indices = torch.tensor([index for _, index in keys])
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        if isinstance(self.dataset, TensorDataset):
            return self.dataset[indices]
        return default_collate([self[key] for key in keys])


def to_device(batch, device: torch.device):
    """A batch's tensors on `device`, whatever tuples, lists and dicts hold them."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(v, device) for v in batch)
    return batch
