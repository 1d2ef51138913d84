"""Every test runs on one thread, for xdist gives each core a worker, and from the same seed."""

import pytest
import torch

from common import gpu

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    gpu.seed_everything(0)
