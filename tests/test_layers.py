"""The standard layers against torch, transformers, closed forms and loops."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from common.layers import (
    GatedMlp,
    Mlp,
    PatchEmbed,
    RMSNorm,
    frequencies,
    rotary,
    rotate_half,
    rotate_pairs,
    sinusoidal,
    sinusoidal_2d,
    time_waves,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- norms, MLPs, patches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rms_norm_is_torchs(dtype, tolerance, eps):
    norm, x = RMSNorm(6, eps), (0.3 * torch.randn(2, 3, 6)).to(dtype)
    torch.nn.init.normal_(norm.weight)
    norm.to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.rms_norm(x, (6,), norm.weight, eps), rtol=tolerance, atol=tolerance)


def test_rms_norm_squares_in_float32():
    x = torch.tensor([[300.0, -400.0]], dtype=torch.float16)  # squares beyond float16
    torch.testing.assert_close(RMSNorm(2).half()(x).float(), x.float() / math.sqrt((300**2 + 400**2) / 2), rtol=1e-3, atol=0)


def test_mlp_against_the_formula():
    x = randn(2, 3, 4)
    for act, formula in [({}, lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2), ({"act": torch.tanh}, torch.tanh)]:
        mlp = Mlp(4, 7, **act).double()
        hidden = torch.einsum("hc,bnc->bnh", mlp.fc1.weight, x) + mlp.fc1.bias
        torch.testing.assert_close(mlp(x), torch.einsum("ch,bnh->bnc", mlp.fc2.weight, formula(hidden)) + mlp.fc2.bias, **EXACT)


def test_gated_mlp_against_the_formula():
    mlp, x = GatedMlp(4, 7).double(), randn(2, 3, 4)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "gate_proj.weight": (7, 4), "up_proj.weight": (7, 4), "down_proj.weight": (4, 7),
    }  # fmt: skip
    gate, up = (torch.einsum("hc,bnc->bnh", p.weight, x) for p in (mlp.gate_proj, mlp.up_proj))
    torch.testing.assert_close(mlp(x), torch.einsum("ch,bnh->bnc", mlp.down_proj.weight, gate / (1 + torch.exp(-gate)) * up), **EXACT)


def test_patch_embed_is_a_linear_map_of_unfolded_patches():
    embed, image = PatchEmbed(3, 5, 4).double(), randn(2, 3, 8, 12)
    patches = F.unfold(image, 4, stride=4).mT  # b n (c p p)
    torch.testing.assert_close(embed(image), patches @ embed.proj.weight.flatten(1).T + embed.proj.bias, **EXACT)


# ---- sinusoids -------------------------------------------------------------------------------------------------------------------------


def test_frequencies():
    expected = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)], dtype=torch.float64)
    torch.testing.assert_close(frequencies(6, 100.0, dtype=torch.float64), expected, **EXACT)
    assert frequencies(8).dtype == torch.float32


@pytest.mark.parametrize("cos_first", [False, True])
@pytest.mark.parametrize("positions", [torch.tensor([0, 3, 17]), torch.tensor([[0.25, 3.0, 999.0]], dtype=torch.float64)], ids=["whole", "float64"])
def test_sinusoidal_against_the_closed_form(positions, cos_first):
    expected = torch.zeros(*positions.shape, 6, dtype=torch.float64)
    for index in product(*(range(size) for size in positions.shape)):
        angles = [float(positions[index]) / 50 ** (2 * i / 6) for i in range(3)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected[index] = torch.tensor(cos + sin if cos_first else sin + cos, dtype=torch.float64)
    table = sinusoidal(positions, 6, 50.0, cos_first=cos_first)
    assert table.dtype == (torch.float64 if positions.is_floating_point() else torch.float32)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-12 if positions.is_floating_point() else 2e-6)


def test_sinusoidal_2d_against_loops():
    rows, columns, dim = 3, 4, 8
    table = sinusoidal_2d(dim, (rows, columns))
    assert table.dtype == torch.float32 and table.shape == (rows * columns, dim)
    for y, x in product(range(rows), range(columns)):
        waves = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in (x, y)]  # 10000^(-2/4) = 1/100
        torch.testing.assert_close(table[y * columns + x], torch.tensor(waves[0] + waves[1]), rtol=0, atol=1e-6)


# ---- rotary ----------------------------------------------------------------------------------------------------------------------------

LAYOUTS = {  # rotation, and the planes of a head of width 6
    "half": (rotate_half, [(0, 3), (1, 4), (2, 5)]),
    "pairs": (lambda x, cos, sin: rotate_pairs(x, torch.complex(cos, sin)), [(0, 1), (2, 3), (4, 5)]),
}
BOTH = pytest.mark.parametrize("rotate, planes", LAYOUTS.values(), ids=LAYOUTS)


def test_rotary_is_the_angle_of_each_plane():
    positions = torch.tensor([[0.0, 1.0, 5.5], [-2.0, 100.0, 7.0]])
    cos, sin = rotary(positions, 6, 500.0)
    angle = positions[..., None].double() * torch.tensor([1.0, 500 ** (-1 / 3), 500 ** (-2 / 3)], dtype=torch.float64)
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=1e-5)


@BOTH
def test_rotation_is_multiplication_by_a_unit_complex_number(rotate, planes):
    x, angle = randn(2, 4, 5, 6), randn(5, 3)
    y = rotate(x, angle.cos(), angle.sin())
    assert y.shape == x.shape
    for plane, (re, im) in enumerate(planes):
        z = torch.complex(x[..., re], x[..., im]) * torch.polar(torch.ones_like(angle), angle)[:, plane]
        torch.testing.assert_close(torch.complex(y[..., re], y[..., im]), z, **EXACT)


@BOTH
def test_dot_products_depend_on_the_distance_alone(rotate, planes):
    q, k = randn(1, 1, 1, 6), randn(1, 1, 1, 6)
    at = lambda x, position: rotate(x, *(t.double() for t in rotary(torch.tensor([float(position)]), 6, 30.0)))
    product_at = lambda i, j: (at(q, i) * at(k, j)).sum().item()
    assert product_at(9, 4) == pytest.approx(product_at(5, 0), abs=1e-5) == pytest.approx(product_at(2, -3), abs=1e-5)
    assert product_at(4, 9) != pytest.approx(product_at(9, 4), abs=1e-3)
    assert product_at(7, 7) == pytest.approx((q * k).sum().item(), abs=1e-6)


@BOTH
def test_positions_of_each_sample(rotate, planes):
    """Tables of shape b 1 n d, or b h n d where heads differ in their rows."""
    x, angle = randn(2, 4, 5, 6), randn(2, 4, 5, 3)
    y, shared = rotate(x, angle.cos(), angle.sin()), rotate(x, angle[:, :1].cos(), angle[:, :1].sin())
    for b, h in product(range(2), range(4)):
        alone = lambda a, b=b, h=h: rotate(x[b : b + 1, h : h + 1], a.cos(), a.sin())[0, 0]
        torch.testing.assert_close(y[b, h], alone(angle[b, h]), **EXACT)
        torch.testing.assert_close(shared[b, h], alone(angle[b, 0]), **EXACT)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rotation_keeps_the_type(rotate, planes, dtype):
    """Else a converted model's rotated keys would no longer fit its values."""
    x = torch.randn(1, 2, 5, 6).to(dtype)
    y = rotate(x, *rotary(torch.arange(5.0), 6))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), rotate(x.float(), *rotary(torch.arange(5.0), 6)), rtol=0, atol=0.02)


def test_rotate_half_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="the reference is transformers")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    q, k, positions = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.arange(3, 10)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions[None])
    table = rotary(positions.float(), 8)
    for ours, theirs in zip((rotate_half(q, *table), rotate_half(k, *table)), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_time_waves():
    """By the formula in float64; the angles go up to 1000, so float32 leaves an error of about 1e-4."""
    t = torch.tensor([[0.0, 999.0], [1.0, 20.0]])
    j = torch.arange(160, dtype=torch.float64)
    angle = t.double()[..., None] * 10_000 ** (-j / 160)
    torch.testing.assert_close(time_waves(t, 320).double(), torch.cat([angle.cos(), angle.sin()], -1), rtol=0, atol=2e-4)
