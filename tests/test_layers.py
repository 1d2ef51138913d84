"""The standard layers against torch, complex numbers and loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.layers import (
    GatedMlp,
    Mlp,
    PatchEmbed,
    RMSNorm,
    relative_index,
    relative_offsets,
    rotary,
    rotate_half,
    rotate_pairs,
    sinusoidal,
    sinusoidal_2d,
)


def test_rms_norm_is_torchs():
    norm, x = RMSNorm(6, 1e-5).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-5))
    low = RMSNorm(6)(x.bfloat16())
    torch.testing.assert_close(low.double(), F.rms_norm(x.bfloat16().double(), (6,)), rtol=1e-2, atol=1e-2)


def test_mlps_by_formula():
    x, gated, plain = torch.randn(2, 3, 4), GatedMlp(4, 6), Mlp(4, 6)
    gate, up = x @ gated.gate_proj.weight.T, x @ gated.up_proj.weight.T
    torch.testing.assert_close(gated(x), (gate * gate.sigmoid() * up) @ gated.down_proj.weight.T)
    inner = x @ plain.fc1.weight.T + plain.fc1.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(plain(x), gelu @ plain.fc2.weight.T + plain.fc2.bias)


def test_patches_are_cut_row_by_row():
    embed, image = PatchEmbed(3, 5, 2), torch.randn(2, 3, 4, 6)
    patches = F.unfold(image, 2, stride=2).transpose(1, 2)
    torch.testing.assert_close(embed(image), patches @ embed.proj.weight.flatten(1).T + embed.proj.bias)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs])
def test_rotations_are_products_of_complex_numbers(rotate):
    d, positions = 8, torch.tensor([0.0, 1.0, 5.0, 2.5])
    x, (cos, sin) = torch.randn(2, 3, 4, d), rotary(positions, d, base=100.0)
    split = (lambda t: t.unflatten(-1, (2, d // 2)).unbind(-2)) if rotate is rotate_half else (lambda t: t.unflatten(-1, (d // 2, 2)).unbind(-1))
    angle = torch.tensor([[p * 100.0 ** (-2 * i / d) for i in range(d // 2)] for p in positions.tolist()])
    turned = torch.complex(*split(x)) * torch.polar(torch.ones_like(angle), angle)
    found = torch.complex(*split(rotate(x, cos, sin)))
    torch.testing.assert_close(found, turned)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs])
def test_rotated_products_depend_on_the_distance_alone(rotate):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotate(x, *(t.double() for t in rotary(torch.tensor([float(p)]), 8)))
    products = [(at(q, p + 3) * at(k, p)).sum().item() for p in (0, 1, 10)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-5)
    assert (at(q, 4) * at(k, 0)).sum().item() != pytest.approx(products[0], abs=1e-3)


def test_llama_rotates_as_transformers_does():
    reference = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is in the extra `reference`")
    q, k = torch.randn(2, 1, 2, 5, 8)
    cos, sin = rotary(torch.arange(5), 8)
    expected, _ = reference.apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])
    torch.testing.assert_close(rotate_half(q, cos, sin), expected)


def test_sinusoids_by_formula():
    for p, (i, cos_first) in itertools.product((0.0, 3.0, 17.5), itertools.product(range(3), (False, True))):
        row = sinusoidal(torch.tensor([p], dtype=torch.float64), 6, cos_first=cos_first)[0]
        angle = p * 10_000 ** (-2 * i / 6)
        halves = (math.cos(angle), math.sin(angle)) if cos_first else (math.sin(angle), math.cos(angle))
        assert (row[i].item(), row[i + 3].item()) == pytest.approx(halves, abs=1e-12)


def test_the_table_of_an_image_holds_columns_then_rows():
    table = sinusoidal_2d(8, (2, 3))
    for row, column in itertools.product(range(2), range(3)):
        for half, position in ((0, column), (4, row)):
            for i in range(2):
                angle = position * 10_000 ** (-2 * i / 4)
                found = table[3 * row + column, [half + i, half + 2 + i]]
                assert found.tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 5)])
def test_relative_positions_by_loops(size):
    offsets, index = relative_offsets(size), relative_index(size)
    tokens = list(itertools.product(range(size[0]), range(size[1])))
    assert len(offsets) == (2 * size[0] - 1) * (2 * size[1] - 1)
    for (i, a), (j, b) in itertools.product(enumerate(tokens), enumerate(tokens)):
        assert offsets[index[i, j]].tolist() == [a[0] - b[0], a[1] - b[1]]
