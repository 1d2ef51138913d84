"""Measuring and devices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import gpu
from common.config import RunConfig
from common.errors import UserError


def test_flops_of_a_product_are_counted_exactly():
    assert gpu.count_flops(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7


def test_count_flops_sees_fused_attention():
    q, k, v = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 20, 4), torch.randn(2, 3, 20, 6)
    scores, sums = 2 * 6 * 10 * 20 * 4, 2 * 6 * 10 * 20 * 6  # Q Kᵀ and P V of 2 x 3 heads
    assert gpu.count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == scores + sums


def test_peak_memory_is_that_of_the_live_tensors():
    megabyte = 2**18  # floats
    two_then_one = lambda: (torch.ones(megabyte) + torch.ones(megabyte)).sum()
    assert gpu.peak_memory(two_then_one) == pytest.approx(3 * 2**20, rel=0.01)
    held = torch.ones(megabyte)
    assert gpu.peak_memory(lambda: held.sum()) < 2**12


def test_alternate_orders_the_fast_and_the_slow():
    small, large = torch.randn(16, 16), torch.randn(400, 400)
    times = gpu.alternate({"small": lambda: small @ small, "large": lambda: large @ large}, repeats=3, seconds=0.01)
    assert list(times) == ["small", "large"] and 0 < times["small"] < times["large"]


def test_count_params():
    assert gpu.count_params(nn.Linear(3, 4)) == 16


def test_devices():
    assert gpu.device(RunConfig(device="cpu")).type == "cpu"
    with pytest.raises(UserError, match="torch knows no such device"):
        gpu.device(RunConfig(device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no usable GPU"):
            gpu.device(RunConfig(device="cuda"))


def test_seeds_are_words_not_sums():
    draws = set()
    for seed in [(0, 1), (1, 0), (1,), (0, 1, 0)]:
        gpu.seed_everything(*seed)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


def test_on_meta_gives_shapes_without_numbers():
    with gpu.on_meta():
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.Embedding(7, 3), nn.LayerNorm(3))
        nn.init.trunc_normal_(model[0].weight, std=0.02)
        assert torch.ones(2, device="cpu").mul_(3).tolist() == [3, 3]  # tables that are computed on the way stay right
    assert [tuple(p.shape) for p in model.parameters()] == [(10**6, 10**6), (10**6,), (7, 3), (3,), (3,)]
    assert all(p.is_meta for p in model.parameters())
    assert nn.Linear(2, 2).weight.any()  # outside, parameters are filled
