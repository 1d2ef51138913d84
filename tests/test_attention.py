"""Attention against loops and torch's own layer; the control against what its stages promise."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.attention import (
    STAGES,
    Attention,
    MultiHeadAttention,
    at_step,
    attend,
    attention_logits,
    causal_mask,
    controlled,
    decay_bias,
    group,
    masked_softmax,
    merge_heads,
    prefix_mask,
    sliding_window_mask,
    split_heads,
    ungroup,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# ---- a model with every kind of call, and controls ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, layer, dim=8, heads=2, context_dim=6):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn1 = MultiHeadAttention(dim, heads, layer=layer)
        self.attn2 = MultiHeadAttention(dim, heads, context_dim=context_dim, layer=layer)
        self.attn1.grid = (1, 5 + layer)

    def forward(self, x, context):
        x = self.attn1.hidden(x)
        x = x + self.attn1(self.norm(x), causal=True)
        x = self.attn2.hidden(x)
        return x + self.attn2(self.norm(x), context)


class Model(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer) for layer in range(depth))

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture
def model():
    return Model().double()


@pytest.fixture
def inputs():
    return randn(2, 5, 8), randn(2, 3, 6)


def control(**stages):
    """A control with these functions of (site, ...) as its stages."""
    without_self = lambda function: lambda self, site, *values: function(site, *values)
    return type("Control", (), {name: without_self(function) for name, function in stages.items()})()


def unchanged(*stages):
    """A control whose stages return what they should: what they get."""
    returned = {"context": lambda site, x, ctx: ctx, "qkv": lambda site, *qkv: qkv, "heads": lambda site, o, q: o}
    return control(**{stage: returned.get(stage, lambda site, x: x) for stage in stages})


def silent(*stages):
    """A control whose stages return None."""
    return control(**{stage: lambda site, *values: None for stage in stages})


ROUTES = pytest.mark.parametrize("route", ["fused", "explicit"])


def attend_by(route, *tensors, **options):
    """`attend`, or the same through a layer whose control has the weights formed."""
    if route == "fused":
        return attend(*tensors, **options)
    layer = Attention(heads=tensors[0].shape[1])
    with controlled(layer, unchanged("weights")):
        return layer.attend(*tensors, **options)


# ---- attend --------------------------------------------------------------------------------------------------------------------------


def loops(q, k, v, *, visible=lambda b, h, i, j: True, bias=None, scale=None):
    """Attention one number at a time; query i of head h of batch b sees key j where visible(b, h, i, j)."""
    (batch, heads, n, d), (kv, m) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=torch.float64)
    for b, h, i in product(range(batch), range(heads), range(n)):
        keys, g = [j for j in range(m) if visible(b, h, i, j)], h * kv // heads
        logits = [scale * sum(float(q[b, h, i, c]) * float(k[b, g, j, c]) for c in range(d)) for j in keys]
        if bias is not None:
            logits = [s + float(bias[b, h, i, j]) for s, j in zip(logits, keys, strict=True)]
        powers = [math.exp(s) for s in logits]
        for j, power in zip(keys, powers, strict=True):
            out[b, h, i] += power / sum(powers) * v[b, g, j].double()
    return out


def random_mask(*shape):
    mask = torch.rand(shape) < 0.6
    mask[..., 0, :] = False  # a query without keys
    return mask


B, H, D, E = 2, 4, 3, 5
CASES = {  # n, m, kv and what the call says
    "plain": (3, 5, 4, {}),
    "one key": (3, 1, 4, {}),
    "scale": (3, 5, 4, {"scale": 1.7}),
    "grouped": (3, 5, 2, {}),
    "one key head": (3, 5, 1, {}),
    "mask": (4, 5, 4, {"mask": (B, H)}),
    "mask per batch": (4, 5, 4, {"mask": (B, 1)}),
    "mask per head": (4, 5, 4, {"mask": (1, H)}),
    "bias": (4, 5, 4, {"bias": (B, H)}),
    "bias per head": (4, 5, 2, {"bias": (1, H)}),
    "mask and bias": (4, 5, 4, {"mask": (B, 1), "bias": (1, H)}),
    "causal": (5, 5, 4, {"causal": True}),
    "causal grouped": (5, 5, 2, {"causal": True}),
    "causal, last queries": (3, 5, 4, {"causal": True}),
    "causal, last query": (1, 5, 4, {"causal": True}),
    "causal, more queries than keys": (5, 3, 4, {"causal": True}),
    "causal, mask": (4, 5, 4, {"causal": True, "mask": (B, H)}),
    "causal, bias": (5, 5, 4, {"causal": True, "bias": (1, H)}),
    "all": (4, 5, 2, {"causal": True, "mask": (B, 1), "bias": (1, H), "scale": 0.3}),
}


@ROUTES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attend_against_loops(case, route):
    n, m, kv, options = case
    q, k, v = randn(B, H, n, D), randn(B, kv, m, D), randn(B, kv, m, E)
    options = options | {name: make(*options[name], n, m) for name, make in (("mask", random_mask), ("bias", randn)) if name in options}
    everywhere = (B, H, n, m)
    mask = options["mask"].expand(everywhere) if "mask" in options else torch.ones(everywhere, dtype=torch.bool)
    visible = lambda b, h, i, j: mask[b, h, i, j] and (j <= i + m - n or "causal" not in options)
    bias = options["bias"].expand(everywhere) if "bias" in options else None
    expected = loops(q, k, v, visible=visible, bias=bias, scale=options.get("scale"))
    torch.testing.assert_close(attend_by(route, q, k, v, **options), expected, **EXACT)


@ROUTES
def test_the_mask_builders_fit_attend_without_reshaping(route):
    q, k, v = randn(2, 2, 4, 3), randn(2, 2, 4, 3), randn(2, 2, 4, 3)
    mask = causal_mask(torch.arange(4), 4)
    torch.testing.assert_close(attend_by(route, q, k, v, mask=mask), attend(q, k, v, causal=True), **EXACT)


@ROUTES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_a_query_without_keys_gets_zeros_and_finite_gradients(route, dtype, biased):
    leaves = [randn(2, 2, 3, 4, dtype=dtype).requires_grad_() for _ in range(3)]
    bias = randn(1, 2, 3, 3, dtype=dtype).requires_grad_() if biased else None
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])[None, None]
    o = attend_by(route, *leaves, mask=mask, bias=bias)
    assert torch.equal(o[:, :, 1], torch.zeros_like(o[:, :, 1])) and (o[:, :, 0] != 0).all()
    gradients = torch.autograd.grad(o.square().sum(), [*leaves, *([bias] if biased else [])])
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients)
    assert (gradients[0][:, :, 1] == 0).all()  # the query without keys


def test_the_logits_and_weights_are_the_formulas():
    q, k, bias = randn(2, 4, 3, 5), randn(2, 2, 6, 5), randn(1, 4, 3, 6)
    s = torch.einsum("bhnd,bhmd->bhnm", q, k[:, [0, 0, 1, 1]])
    torch.testing.assert_close(attention_logits(q, k), s / math.sqrt(5), **EXACT)
    torch.testing.assert_close(attention_logits(q, k, bias=bias, scale=2.0), 2 * s + bias, **EXACT)
    torch.testing.assert_close(masked_softmax(s), s.exp() / s.exp().sum(-1, keepdim=True), **EXACT)
    mask = random_mask(2, 1, 3, 6)
    seen = s.exp() * mask
    torch.testing.assert_close(masked_softmax(s, mask), seen / seen.sum(-1, keepdim=True).clamp_min(1e-300), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_half_precision_is_rounded_once(dtype):
    s, mask = (4 * torch.randn(1, 2, 5, 700)).to(dtype), random_mask(1, 1, 5, 700)
    last_bit = torch.finfo(dtype).eps
    for p, exact in [(masked_softmax(s), s.double()), (masked_softmax(s, mask)[:, :, 1:], s.double().masked_fill(~mask, -math.inf)[:, :, 1:])]:
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), exact.softmax(-1), rtol=0.51 * last_bit, atol=1e-7)


# ---- without a control, the kernel alone -----------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch):
    """The keyword arguments of the calls of the fused kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that come into being."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)}
        return out


FUSED = [stage for stage in STAGES if stage not in ("logits", "weights")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("watch", [None, silent(*FUSED), unchanged(*FUSED)], ids=["no control", "None", "same"])
def test_the_plain_call_bit_for_bit(kernel_calls, watch, causal):
    """Also under controls that define neither logits nor weights and change nothing."""
    layer, x = MultiHeadAttention(32, 4), torch.randn(2, 7, 32)
    q, k, v = (p(x).view(2, 7, 4, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    plain = layer.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(2, 7, 32))
    kernel_calls.clear()
    with controlled(layer, watch) if watch else nullcontext(), Shapes() as shapes:
        y = layer(x, causal=causal)
    assert torch.equal(y, plain)
    (call,) = kernel_calls
    assert call.get("is_causal", False) == causal and call.get("attn_mask") is None and call["scale"] is None
    assert (2, 7, 4, 8) in shapes.seen and not any(shape[-2:] == (7, 7) for shape in shapes.seen)


def test_the_spy_sees_logits_where_a_control_wants_them(kernel_calls):
    layer = MultiHeadAttention(32, 4)
    for stage in ("logits", "weights"):
        with controlled(layer, silent(stage)), Shapes() as shapes:
            layer(torch.randn(2, 7, 32))
        assert (2, 4, 7, 7) in shapes.seen and not kernel_calls


def test_a_mask_reaches_the_kernel_as_it_is(kernel_calls):
    layer, x, mask, bias = MultiHeadAttention(32, 4), torch.randn(2, 7, 32), random_mask(2, 1, 7, 7), torch.randn(1, 4, 7, 7)
    layer(x, mask=mask)
    layer(x, bias=bias)
    assert kernel_calls[0]["attn_mask"] is mask and kernel_calls[1]["attn_mask"] is bias


# ---- the standard layer ----------------------------------------------------------------------------------------------------------------


def torch_twin(layer, dim, context_dim):
    """torch.nn.MultiheadAttention with the same weights, key and value heads repeated."""
    twin = nn.MultiheadAttention(dim, layer.heads, batch_first=True, kdim=context_dim, vdim=context_dim).double()
    size, repeats = dim // layer.heads, layer.heads // layer.kv_heads
    spread = lambda w: w.unflatten(0, (-1, size))[[h // repeats for h in range(layer.heads)]].flatten(0, 1)
    weights = [layer.q_proj.weight, spread(layer.k_proj.weight), spread(layer.v_proj.weight)]
    state = {f"{name}_proj_weight": w for name, w in zip("qkv", weights, strict=True)}
    if context_dim == dim:
        state = {"in_proj_weight": torch.cat(weights)}
    state["in_proj_bias"] = torch.cat([layer.q_proj.bias, spread(layer.k_proj.bias), spread(layer.v_proj.bias)])
    twin.load_state_dict(state | {f"out_proj.{name}": p for name, p in layer.out_proj.named_parameters()})
    return twin


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("context_dim", [None, 6])
def test_the_layer_is_torchs(kv_heads, context_dim):
    layer = MultiHeadAttention(12, 4, kv_heads=kv_heads, context_dim=context_dim).double()
    twin = torch_twin(layer, 12, context_dim or 12)
    x = randn(2, 5, 12)
    context = x if context_dim is None else randn(2, 7, 6)
    mask = torch.rand(5, context.shape[1]) < 0.7
    mask[:, 0] = True
    given = () if context_dim is None else (context,)
    torch.testing.assert_close(layer(x, *given), twin(x, context, context)[0], **EXACT)
    torch.testing.assert_close(layer(x, *given, mask=mask[None, None]), twin(x, context, context, attn_mask=~mask)[0], **EXACT)
    bias = randn(5, context.shape[1])
    torch.testing.assert_close(layer(x, *given, bias=bias[None, None]), twin(x, context, context, attn_mask=bias)[0], **EXACT)
    if context_dim is None:
        after = torch.ones(5, 5, dtype=torch.bool).triu(1)
        torch.testing.assert_close(layer(x, causal=True), twin(x, x, x, attn_mask=after)[0], **EXACT)


def test_head_width_of_its_own_and_bad_sizes():
    layer = MultiHeadAttention(10, 4, head_dim=3, kv_heads=2, bias=False)
    assert [tuple(p.shape) for p in layer.parameters()] == [(12, 10), (6, 10), (6, 10), (10, 12)]
    assert layer(torch.randn(2, 5, 10)).shape == (2, 5, 10)
    assert (layer.kind, MultiHeadAttention(4, 2, context_dim=4).kind) == ("self", "cross")
    with pytest.raises(ValueError, match="kv_heads = 3 must divide heads = 4"):
        MultiHeadAttention(8, 4, kv_heads=3)
    with pytest.raises(ValueError, match="dim = 10 is not a multiple of heads = 4: give head_dim"):
        MultiHeadAttention(10, 4)


def test_heads_are_split_in_order():
    x = randn(2, 3, 8)
    heads = split_heads(x, 4)
    for b, n, h, d in product(range(2), range(3), range(4), range(2)):
        assert heads[b, h, n, d] == x[b, n, 2 * h + d]
    assert torch.equal(merge_heads(heads), x)


# ---- masks ---------------------------------------------------------------------------------------------------------------------------

MASKS = {
    "causal": (lambda rows: causal_mask(rows, 6), lambda i, j: j <= i),
    "prefix": (lambda rows: prefix_mask(rows, 6, 3), lambda i, j: j <= i or j < 3),
    "no prefix": (lambda rows: prefix_mask(rows, 6, 0), lambda i, j: j <= i),
    "window": (lambda rows: sliding_window_mask(rows, 6, 2), lambda i, j: i - 2 < j <= i),
    "wide window": (lambda rows: sliding_window_mask(rows, 6, 9), lambda i, j: j <= i),
}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 1, 5], [[0, 3], [5, 5], [2, 1]]], ids=["all", "some", "per batch"])
@pytest.mark.parametrize("build, seen", MASKS.values(), ids=MASKS)
def test_masks_against_loops(build, seen, rows):
    rows = torch.tensor(rows)
    mask = build(rows)
    assert mask.dtype == torch.bool and mask.shape == (*rows.shape, 6)
    for index in product(*(range(size) for size in rows.shape)):
        assert mask[index].tolist() == [seen(int(rows[index]), j) for j in range(6)]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 1]])
def test_decaying_weights_are_a_geometric_series(rows):
    """softmax of -rate (i - j) over j <= i is r^(i-j) (1 - r) / (1 - r^(i+1)) with r = e^-rate."""
    r = math.exp(-0.7)
    p = decay_bias(torch.tensor(rows), 5, 0.7).double().softmax(-1)
    expected = [[r ** (i - j) * (1 - r) / (1 - r ** (i + 1)) if j <= i else 0.0 for j in range(5)] for i in rows]
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_decay_rates_per_head_can_be_learnt():
    rates = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    bias = decay_bias(torch.arange(3), 3, rates[:, None, None])
    torch.testing.assert_close(bias[:, 2], torch.tensor([[-1.0, -0.5, 0.0], [-0.5, -0.25, 0.0]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(bias[:, 2].sum(), rates)
    assert gradient.tolist() == [-3.0, -3.0]  # distances 2 + 1 + 0


# ---- groups --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [(1, 1), (2, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 1)])
def test_groups_against_loops(size, interval):
    (gh, gw), (ih, iw) = size, interval
    regions = (2, 3)
    grid = (regions[0] * gh * ih, regions[1] * gw * iw)
    x = torch.arange(2.0 * grid[0] * grid[1] * 2).view(2, *grid, 2)
    expected = [
        [x[b, (rh * gh + y) * ih + oh, (rw * gw + z) * iw + ow].tolist() for y in range(gh) for z in range(gw)]
        for b, rh, rw, oh, ow in product(range(2), range(regions[0]), range(regions[1]), range(ih), range(iw))
    ]
    groups = group(x, size, interval)
    assert torch.equal(groups, torch.tensor(expected))
    assert torch.equal(ungroup(groups, size, grid, interval), x)


def test_a_map_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="can't divide axis"):
        group(torch.zeros(1, 5, 4, 1), (2, 2))


# ---- the control: watching -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unchanged, silent])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_identity_changes_nothing(model, inputs, make, dtype, tolerance):
    model, inputs = model.to(dtype), [x.to(dtype) for x in inputs]
    with controlled(model, make(*STAGES)):
        watched = model(*inputs)
    torch.testing.assert_close(watched, model(*inputs), rtol=0, atol=tolerance)


def test_the_stages_come_in_order_with_their_site(model, inputs):
    seen = []
    record = lambda stage: lambda site, *values: seen.append((site, stage, [tuple(x.shape) for x in values]))
    with controlled(model, control(**{stage: record(stage) for stage in STAGES})):
        at_step(model, 3)
        model(*inputs)
    assert [stage for _, stage, _ in seen] == [*STAGES] * 4
    sites = [site for site, stage, _ in seen if stage == "hidden"]
    assert [site.name for site in sites] == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
    assert [(site.kind, site.layer, site.heads, site.step) for site in sites] == [(kind, i, 2, 3) for i in (0, 1) for kind in ("self", "cross")]
    assert [site.grid for site in sites] == [(1, 5), None, (1, 6), None]
    assert [shapes for site, _, shapes in seen if site.name == "blocks.0.attn2"] == [
        [(2, 5, 8)],
        [(2, 5, 8), (2, 3, 6)],
        [(2, 2, 5, 4), (2, 2, 3, 4), (2, 2, 3, 4)],
        [(2, 2, 5, 3)],
        [(2, 2, 5, 3)],
        [(2, 2, 5, 4), (2, 2, 5, 4)],
        [(2, 5, 8)],
    ]


def test_what_the_stages_see_is_the_equation():
    layer, seen = MultiHeadAttention(8, 2).double(), {}
    keep = lambda name, index: lambda site, *values: seen.update({name: values[index]})
    with controlled(layer, control(qkv=lambda site, *qkv: seen.update(qkv=qkv), **{s: keep(s, 0) for s in ("logits", "weights", "heads", "output")})):
        y = layer(randn(2, 5, 8), causal=True)
    q, k, v = seen["qkv"]
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
    torch.testing.assert_close(seen["logits"], s, **EXACT)  # before masking
    p = s.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    torch.testing.assert_close(seen["weights"], p, **EXACT)
    torch.testing.assert_close(seen["heads"], torch.einsum("bhnm,bhmd->bhnd", p, v), **EXACT)
    assert seen["output"] is y


WHERE = {
    "kind": (lambda site: site.kind == "cross", {"blocks.0.attn2", "blocks.1.attn2"}),
    "layer": (lambda site: site.layer >= 1, {"blocks.1.attn1", "blocks.1.attn2"}),
    "grid": (lambda site: site.grid == (1, 6), {"blocks.1.attn1"}),
    "step": (lambda site: site.step == 2 and site.kind == "self", {"blocks.0.attn1", "blocks.1.attn1"}),
    "never": (lambda site: site.step == 1, set()),
}


@pytest.mark.parametrize("where, names", WHERE.values(), ids=WHERE)
def test_where(model, inputs, where, names):
    seen = []
    with controlled(model, control(**{stage: lambda site, *values: seen.append(site.name) for stage in STAGES}), where):
        for step in (0, 2):
            at_step(model, step)
            model(*inputs)
    steps = 1 if where is WHERE["step"][0] else 2
    assert sorted(seen) == sorted([*names] * len(STAGES) * steps)


def test_elsewhere_the_kernel_runs(model, inputs, kernel_calls):
    with controlled(model, silent("weights"), lambda site: site.name == "blocks.1.attn2"):
        model(*inputs)
    assert len(kernel_calls) == 3


# ---- the control: changing -------------------------------------------------------------------------------------------------------------


def test_each_stage_takes_effect():
    """Edits whose results are known in closed form."""
    layer = MultiHeadAttention(8, 2).double()
    x, other = randn(2, 5, 8), randn(2, 3, 8)
    v = layer.v_proj(x)

    def under(**stages):
        with controlled(layer, control(**stages)):
            return layer(layer.hidden(x))

    close = lambda a, b: torch.testing.assert_close(a, b, **EXACT)
    close(under(hidden=lambda site, x: 2 * x), layer(2 * x))
    close(under(context=lambda site, x, ctx: other), layer(x, other))
    close(under(context=lambda site, x, ctx: torch.cat([ctx, other], 1)), layer(x, torch.cat([x, other], 1)))
    close(under(qkv=lambda site, q, k, v: (0 * q, k, v)), layer.out_proj(v.mean(1, keepdim=True).expand_as(x)))
    close(under(logits=lambda site, s: 0 * s), layer.out_proj(v.mean(1, keepdim=True).expand_as(x)))
    close(under(weights=lambda site, p: torch.eye(5, dtype=p.dtype).expand_as(p)), layer.out_proj(v))
    close(under(heads=lambda site, o, q: 0 * o), layer.out_proj.bias.expand_as(x))
    close(under(heads=lambda site, o, q: q), layer.out_proj(layer.q_proj(x)))
    close(under(output=lambda site, y: y + 1), layer(x) + 1)


def test_minus_infinity_in_the_logits_hides_a_key():
    layer, x = MultiHeadAttention(8, 2).double(), randn(2, 5, 8)
    hide = torch.tensor([False, True, False, True, False])
    mask = (~hide).expand(1, 1, 5, 5)
    for options in ({}, {"mask": torch.ones_like(mask)}):
        with controlled(layer, control(logits=lambda site, s: s.masked_fill(hide, -math.inf))):
            y = layer(x, **options)
        torch.testing.assert_close(y, layer(x, mask=mask), **EXACT)


def test_the_outer_control_acts_first():
    layer, x = MultiHeadAttention(8, 2).double(), randn(2, 5, 8)
    plain = layer(x)
    with controlled(layer, control(output=lambda site, y: 2 * y)), controlled(layer, control(output=lambda site, y: y + 1)):
        torch.testing.assert_close(layer(x), 2 * plain + 1, **EXACT)
    with controlled(layer, control(output=lambda site, y: y + 1)), controlled(layer, control(output=lambda site, y: 2 * y)):
        torch.testing.assert_close(layer(x), 2 * (plain + 1), **EXACT)


def test_controls_of_different_stages_compose():
    """One halves the logits, one halves the heads; what each does on its own, both do together."""
    layer, x = MultiHeadAttention(8, 2).double(), randn(2, 5, 8)
    softer, weaker = control(logits=lambda site, s: s / 2), control(heads=lambda site, o, q: o / 2)
    with controlled(layer, softer), controlled(layer, weaker):
        both = layer(x)
    with controlled(layer, control(qkv=lambda site, q, k, v: (q / 2, k, v / 2))):
        torch.testing.assert_close(both, layer(x), **EXACT)


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_removes_the_control(model, inputs, stage):
    plain = model(*inputs)

    def fail(site, *values):
        raise KeyError(stage)

    with pytest.raises(KeyError, match=stage), controlled(model, control(**{stage: fail})):
        model(*inputs)
    assert torch.equal(model(*inputs), plain)


def test_controls_leave_in_any_order():
    layer, x = MultiHeadAttention(8, 2).double(), randn(2, 5, 8)
    plain = layer(x)
    double, increment = control(output=lambda site, y: 2 * y), control(output=lambda site, y: y + 1)
    first, second = controlled(layer, double), controlled(layer, increment)
    assert first.__enter__() is double
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(layer(x), plain + 1)
    with controlled(layer, increment):
        assert torch.equal(layer(x), plain + 1 + 1)  # the same control twice
    assert torch.equal(layer(x), plain + 1)
    second.__exit__(None, None, None)
    assert torch.equal(layer(x), plain)


def test_what_cannot_be_controlled(model):
    with pytest.raises(ValueError, match="Linear has no attention layer"), controlled(nn.Linear(2, 2), unchanged("output")):
        pass
    for useless in (SimpleNamespace(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"{type(useless).__name__} defines none of the stages hidden, context"), controlled(model, useless):
            pass


# ---- the control: keys that come and go --------------------------------------------------------------------------------------------------


def appended(k, v):
    return control(qkv=lambda site, q, k0, v0: (q, torch.cat([k0, k], 2), torch.cat([v0, v], 2)))


@pytest.mark.parametrize("n, m, options", [
    (4, 4, {"causal": True}), (2, 4, {"causal": True}), (1, 4, {"causal": True}), (4, 4, {"mask": True}), (4, 4, {"bias": True}),
    (4, 4, {"mask": True, "bias": True, "causal": True}), (4, 4, {}), (3, 1, {"mask": True}), (3, 1, {"bias": True}),
])  # fmt: skip
@pytest.mark.parametrize("watch", [(), ("weights",)], ids=["fused", "explicit"])
def test_appended_keys_are_seen_by_every_query(n, m, options, watch):
    """Two keys more than masks and biases know of."""
    layer = Attention(2)
    q, k, v, k2, v2 = randn(2, 2, n, 3), randn(2, 2, m, 3), randn(2, 2, m, 3), randn(2, 2, 2, 3), randn(2, 2, 2, 3)
    mask = random_mask(2, 2, n, m) if "mask" in options else torch.ones(2, 2, n, m, dtype=torch.bool)
    bias = 3 * randn(2, 2, n, m) if "bias" in options else torch.zeros(2, 2, n, m)
    given = options | {name: x for name, x in (("mask", mask), ("bias", bias)) if name in options}
    with controlled(layer, appended(k2, v2)), controlled(layer, silent(*watch)) if watch else nullcontext():
        o = layer.attend(q, k, v, **given)
    visible = lambda b, h, i, j: j >= m or (mask[b, h, i, j] and (j <= i + m - n or "causal" not in options))
    expected = loops(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2), visible=visible, bias=F.pad(bias, (0, 2)))
    torch.testing.assert_close(o, expected, **EXACT)


def test_keys_may_be_exchanged_but_not_dropped_under_a_mask():
    layer, (q, k, v) = Attention(2), (randn(2, 2, 4, 3) for _ in range(3))
    with controlled(layer, control(qkv=lambda site, q, k, v: (q, k[:, :, :2], v[:, :, :2]))):
        torch.testing.assert_close(layer.attend(q, k, v), loops(q, k[:, :, :2], v[:, :, :2]), **EXACT)
        for options in ({"causal": True}, {"mask": random_mask(1, 1, 4, 4)}, {"bias": randn(1, 1, 4, 4)}):
            with pytest.raises(ValueError, match="left 2 of 4 keys of a masked attention call: mask keys in `logits`"):
                layer.attend(q, k, v, **options)
    with controlled(layer, control(qkv=lambda site, q, k, v: (q, k.flip(2), v.flip(2)))):
        visible = lambda b, h, i, j: j <= i
        torch.testing.assert_close(layer.attend(q, k, v, causal=True), loops(q, k.flip(2), v.flip(2), visible=visible), **EXACT)


# ---- the control: gradients and state ----------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_loss_on_the_weights_by_finite_differences():
    layer, x, target = MultiHeadAttention(6, 2).double(), randn(1, 4, 6), randn(1, 2, 4, 4)

    def loss():
        seen = []
        with controlled(layer, control(weights=lambda site, p: seen.append(p))):
            layer(x, causal=True)
        return (seen[0] * target).sum()

    weight, step = layer.q_proj.weight, 1e-5
    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        for i, j in product(range(6), range(6)):
            kept, values = weight[i, j].item(), []
            for sign in (1, -1):
                weight[i, j] = kept + sign * step
                values.append(loss().item())
            weight[i, j] = kept
            assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)
    assert gradient.abs().max() > 1e-3


class Branch(nn.Module):
    """A branch over other tokens at every site it has parameters for, as adapters have it; submodules are named like stages."""

    def __init__(self, sites, dim, tokens):
        super().__init__()
        self.heads = nn.ModuleDict({name.replace(".", "-"): nn.Linear(dim, dim) for name in sites})
        self.output = nn.Identity()
        self.tokens = tokens

    def qkv(self, site, q, k, v):
        extra = split_heads(self.output(self.heads[site.name.replace(".", "-")](self.tokens)), site.heads)
        return q, torch.cat([k, extra], 2), torch.cat([v, extra], 2)


def test_a_control_with_parameters_learns_and_leaves_the_model_alone(model, inputs):
    model.requires_grad_(False)
    names = [name for name, layer in model.named_modules() if isinstance(layer, Attention)]
    branch = Branch(names, 8, randn(2, 2, 8)).double()
    before, target = copy.deepcopy(model.state_dict()), model(*inputs) + 0.1 * randn(2, 5, 8)
    optimizer, losses = torch.optim.Adam(branch.parameters(), 0.03), []
    with controlled(model, branch):
        for _ in range(30):
            loss = (model(*inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all((p.grad != 0).any() for name, p in branch.named_parameters())
        assert model.state_dict().keys() == before.keys() and not any("heads." in name for name, _ in model.named_modules())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@dataclass
class Settings:
    """Some of its fields are called like stages."""

    heads: int = 4
    output: str = "maps"

    def weights(self, site, p):
        return torch.zeros_like(p)


def test_fields_that_are_called_like_stages_are_no_stages():
    layer = MultiHeadAttention(8, 2).double()
    with controlled(layer, Settings()):
        y = layer(randn(2, 5, 8))
    assert torch.equal(y, layer.out_proj.bias.expand_as(y))


def test_a_copy_of_a_controlled_model_is_not_controlled(model, inputs):
    """The end of the block could not end it: the copy would be controlled for ever, by a copy of the control."""
    plain = model(*inputs)
    with controlled(model, control(output=lambda site, y: 2 * y)):
        twin = copy.deepcopy(model)
        assert not torch.equal(model(*inputs), plain)
    assert torch.equal(twin(*inputs), plain) and torch.equal(model(*inputs), plain)
    with controlled(twin, control(output=lambda site, y: 2 * y)):
        assert torch.equal(model(*inputs), plain)


# ---- the control: half precision -----------------------------------------------------------------------------------------


def half(layer, way):
    """bfloat16 by autocast, or by converting the layer."""
    if way == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    layer.bfloat16()
    return nullcontext()


HALF = pytest.mark.parametrize("way", ["autocast", "converted"])


@HALF
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": torch.linspace(-1, 1, 25).view(1, 1, 5, 5)}], ids=["plain", "causal", "bias"])
def test_bfloat16(way, options):
    """Also with a bias in float32, which the kernel takes too."""
    layer, x = MultiHeadAttention(16, 2), torch.randn(2, 5, 16)
    wide = layer(x, **options)
    with half(layer, way), torch.no_grad():
        x = x.to(layer.q_proj.weight.dtype)
        plain = layer(x, **options)
        with controlled(layer, unchanged(*STAGES)):
            watched = layer(x, **options)
    assert plain.dtype == watched.dtype == torch.bfloat16
    for y in (plain, watched):
        torch.testing.assert_close(y.float(), wide, rtol=0, atol=0.01)


@HALF
@pytest.mark.parametrize("stage", ["logits", "weights"])
def test_a_control_may_return_float32_in_a_bfloat16_model(way, stage):
    layer, x = MultiHeadAttention(16, 2), torch.randn(2, 5, 16)
    wide = layer(x)
    with half(layer, way), torch.no_grad(), controlled(layer, control(**{stage: lambda site, x: x.float()})):
        y = layer(x.to(layer.q_proj.weight.dtype))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wide, rtol=0, atol=0.01)
