"""Attention against loops and torch's own layer; masks and groups against their definitions; the control stage by stage."""

import copy
import itertools

import pytest
import torch
from torch import nn

from common import attention
from common.attention import (
    STAGES,
    Attention,
    MultiHeadAttention,
    at_step,
    attend,
    causal_mask,
    controlled,
    decay_bias,
    group,
    merge_heads,
    prefix_mask,
    sliding_window_mask,
    ungroup,
)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- the arithmetic ---------------------------------------------------------------------------------------------------------------------


def by_loops(q, k, v, mask=None, bias=None, causal=False, scale=None):
    """One query, one head, one key at a time."""
    b, h, n, d = q.shape
    m, out = k.shape[2], torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for i, j, row in itertools.product(range(b), range(h), range(n)):
        key_head = j * k.shape[1] // h
        scores = {}
        for key in range(m):
            seen = mask is None or mask.expand(b, h, n, m)[i, j, row, key]
            if seen and (not causal or key <= row + m - n):
                score = (q[i, j, row] * k[i, key_head, key]).sum() * (d**-0.5 if scale is None else scale)
                scores[key] = score + (0 if bias is None else bias.expand(b, h, n, m)[i, j, row, key])
        total = sum(s.exp() for s in scores.values())
        for key, s in scores.items():
            out[i, j, row] += s.exp() / total * v[i, key_head, key]
    return out


CALLS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"causal": True},
    "masked": {"mask": torch.rand(2, 1, 3, 5) > 0.3},
    "biased": {"bias": randn(1, 4, 3, 5)},
    "all": {"mask": torch.rand(2, 1, 3, 5) > 0.3, "bias": randn(4, 3, 5)[None], "causal": True, "scale": 0.5},
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("call", CALLS)
def test_attend_by_loops(call, kv_heads):
    q, k, v = randn(2, 4, 3, 6), randn(2, kv_heads, 5, 6), randn(2, kv_heads, 5, 7)
    close(attend(q, k, v, **CALLS[call]), by_loops(q, k, v, **CALLS[call]))


@pytest.mark.parametrize("call", CALLS)
def test_both_executions_agree(call):
    """The fused kernel, and the logits and weights that a control sees."""
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 5, 6), randn(2, 2, 5, 6)
    layer = Attention(4)
    fused = layer.attend(q, k, v, **CALLS[call])
    with controlled(layer, Spy("weights")):
        close(layer.attend(q, k, v, **CALLS[call]), fused)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_query_without_keys_gets_zeros_and_a_finite_gradient(dtype):
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    for spy in ("output", "weights"):  # fused, and explicit
        q, k, v = (randn(1, 2, n, 4).to(dtype).requires_grad_() for n in (3, 5, 5))
        layer = Attention(2)
        with controlled(layer, Spy(spy)):
            o = layer.attend(q, k, v, mask=mask)
        assert (o[:, :, 1] == 0).all() and (o[:, :, 0] != 0).any()
        o.float().square().sum().backward()
        assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_is_torchs(cross):
    ours = MultiHeadAttention(12, 3, context_dim=8 if cross else None).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, kdim=8 if cross else None, vdim=8 if cross else None).double()
    with torch.no_grad():
        weights = [ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]
        if cross:
            for name, weight in zip("qkv", weights, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(weight)
        else:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, context = randn(2, 4, 12), randn(2, 6, 8)
    close(ours(x, context if cross else None), theirs(x, context if cross else x, context if cross else x)[0])


def test_wrong_head_counts_are_refused():
    with pytest.raises(ValueError, match="must divide heads"):
        MultiHeadAttention(12, 4, kv_heads=3)
    with pytest.raises(ValueError, match="give head_dim"):
        MultiHeadAttention(10, 4)


# ---- masks and groups -------------------------------------------------------------------------------------------------------------------


def test_masks_by_definition():
    rows, m = torch.tensor([[0, 3, 4], [2, 2, 6]]), 7  # subsets of the rows, one for each of two heads, say
    for i, j, key in itertools.product(range(2), range(3), range(m)):
        row = rows[i, j]
        assert causal_mask(rows, m)[i, j, key] == (key <= row)
        assert prefix_mask(rows, m, 4)[i, j, key] == (key <= row or key < 4)
        assert sliding_window_mask(rows, m, 3)[i, j, key] == (row - 3 < key <= row)
        assert decay_bias(rows, m, 0.5)[i, j, key] == (-0.5 * (row - key) if key <= row else float("-inf"))


def test_decay_gives_a_geometric_series():
    n, rate = 9, 0.7
    q, v = torch.zeros(1, 1, n, 4, dtype=torch.float64), torch.eye(n, dtype=torch.float64)[None, None]
    weights = attend(q, q, v, bias=decay_bias(torch.arange(n), n, torch.tensor(rate, dtype=torch.float64))[None, None])[0, 0]
    powers = torch.exp(torch.tensor(-rate, dtype=torch.float64)) ** torch.arange(n)
    for i in range(n):
        close(weights[i, : i + 1], powers[: i + 1].flip(0) / powers[: i + 1].sum())


@pytest.mark.parametrize(("size", "interval"), [((2, 3), (1, 1)), ((2, 3), (2, 1)), ((4, 2), (1, 3)), ((4, 6), (1, 1))])
def test_groups_by_definition(size, interval):
    grid = (4, 6)
    x = torch.arange(2 * 24.0).reshape(2, 4, 6, 1)
    groups = group(x, size, interval)
    (gh, gw), (ih, iw) = size, interval
    expected = [
        [x[b, (r * gh + i) * ih + o, (s * gw + j) * iw + p, 0] for i in range(gh) for j in range(gw)]
        for b in range(2)
        for r in range(4 // (gh * ih))
        for s in range(6 // (gw * iw))
        for o in range(ih)
        for p in range(iw)
    ]
    assert groups[..., 0].tolist() == [[float(t) for t in row] for row in expected]
    assert torch.equal(ungroup(groups, size, grid, interval), x)


# ---- the control ------------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Self- and cross-attention with every stage called."""

    def __init__(self, layer: int):
        super().__init__()
        self.attn1, self.attn2 = MultiHeadAttention(8, 2, layer=layer), MultiHeadAttention(8, 2, context_dim=6, layer=layer)

    def forward(self, x, context):
        x = x + self.attn1(self.attn1.hidden(x))
        return x + self.attn2(self.attn2.hidden(x), context)


class Net(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(layers))

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture
def net():
    return Net().double()


@pytest.fixture
def inputs():
    return randn(2, 5, 8), randn(2, 4, 6)


def Spy(*stages, change=None):
    """A control with these stages alone; it notes (stage, site, shapes) and returns what `change` makes of the tensors."""

    def stage(name):
        def call(self, site, *tensors):
            self.seen.append((name, site, [tuple(t.shape) for t in tensors]))
            return None if change is None else change(*tensors)

        return call

    return type("Spy", (), {name: stage(name) for name in stages} | {"seen": []})()


def test_without_a_control_the_call_is_the_plain_one(net, inputs, monkeypatch):
    calls = []
    kernel = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, k, v, **kwargs: calls.append(kwargs) or kernel(q, k, v, **kwargs))
    monkeypatch.setattr(attention, "attention_logits", None)  # would fail if called
    net(*inputs)
    assert calls == [{"attn_mask": None, "scale": None, "enable_gqa": False}] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_identity_changes_nothing(net, inputs, dtype):
    identity = {"qkv": lambda q, k, v: (q, k, v), "context": lambda x, ctx: ctx, "heads": lambda o, q: o}
    net, inputs = net.to(dtype), [t.to(dtype) for t in inputs]
    plain = net(*inputs)
    for stage in STAGES:
        with controlled(net, Spy(stage, change=identity.get(stage, lambda x: x))):
            watched = net(*inputs)
        if stage in ("logits", "weights"):
            close(watched, plain, 1e-6 if dtype == torch.float32 else 1e-12)
        else:
            assert torch.equal(watched, plain), stage
    with controlled(net, Spy(*STAGES)):  # None leaves things as they are, too
        close(net(*inputs), plain, 1e-6)
    assert torch.equal(net(*inputs), plain)


def test_stages_come_in_order_with_their_shapes(net, inputs):
    spy = Spy(*STAGES)
    with controlled(net, spy, where=lambda site: site.layer == 1):
        net(*inputs)
    cross = [(name, shapes) for name, site, shapes in spy.seen if site.kind == "cross"]
    assert cross == [
        ("hidden", [(2, 5, 8)]),
        ("context", [(2, 5, 8), (2, 4, 6)]),
        ("qkv", [(2, 2, 5, 4), (2, 2, 4, 4), (2, 2, 4, 4)]),
        ("logits", [(2, 2, 5, 4)]),
        ("weights", [(2, 2, 5, 4)]),
        ("heads", [(2, 2, 5, 4), (2, 2, 5, 4)]),
        ("output", [(2, 5, 8)]),
    ]


def test_sites_and_where(net, inputs):
    net.blocks[0].attn1.grid = (1, 5)
    at_step(net, 7)
    everywhere, some = Spy("output"), Spy("output")
    where = lambda site: site.kind == "self" and site.layer < 1 and site.grid == (1, 5) and site.step == 7
    with controlled(net, everywhere), controlled(net, some, where):
        net(*inputs)
    sites = [site for _, site, _ in everywhere.seen]
    assert [(s.name, s.kind, s.layer, s.heads, s.step) for s in sites] == [
        ("blocks.0.attn1", "self", 0, 2, 7),
        ("blocks.0.attn2", "cross", 0, 2, 7),
        ("blocks.1.attn1", "self", 1, 2, 7),
        ("blocks.1.attn2", "cross", 1, 2, 7),
    ]
    assert [site for _, site, _ in some.seen] == sites[:1]
    at_step(net, None)
    with controlled(net, some, where):
        net(*inputs)
    assert len(some.seen) == 1


def test_stages_have_their_effect(inputs):
    layer, (x, _) = MultiHeadAttention(8, 2).double(), inputs
    v = attention.split_heads(layer.v_proj(x), 2)
    with controlled(layer, Spy("logits", change=lambda s: 0 * s)):
        uniform = layer(x)
    close(uniform, layer.out_proj(merge_heads(v.mean(2, keepdim=True).expand_as(v))))
    with controlled(layer, Spy("weights", change=lambda p: torch.eye(5, dtype=p.dtype).expand_as(p))):
        own = layer(x)
    close(own, layer.out_proj(merge_heads(v)))
    with controlled(layer, Spy("heads", change=lambda o, q: 0 * o)):
        close(layer(x), layer.out_proj.bias.expand(2, 5, 8))
    with controlled(layer, Spy("context", change=lambda x, ctx: torch.cat([ctx, ctx], 1))):
        close(layer(x), layer(x))
    with controlled(layer, Spy("output", change=lambda y: 2 * y)):
        doubled = layer(x)
    close(doubled, 2 * layer(x))


def test_controls_nest_and_the_outer_one_acts_first(net, inputs):
    add, double = Spy("output", change=lambda y: y + 1), Spy("output", change=lambda y: 2 * y)
    layer, x = net.blocks[0].attn1, inputs[0]
    plain = layer(x)
    with controlled(net, add), controlled(net, double):
        close(layer(x), 2 * (plain + 1))
    with controlled(net, double), controlled(net, add):
        close(layer(x), 2 * plain + 1)
    with controlled(net, add), controlled(net, add):
        close(layer(x), plain + 2)
    assert torch.equal(layer(x), plain)


def test_controls_are_removed_by_exceptions_and_in_any_order(net, inputs):
    plain = net(*inputs)
    with pytest.raises(ZeroDivisionError), controlled(net, Spy("output", change=lambda y: 1 / 0)):
        net(*inputs)
    assert torch.equal(net(*inputs), plain)
    first, second = controlled(net, Spy("output", change=lambda y: y + 1)), controlled(net, Spy("output", change=lambda y: 2 * y))
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    layer, x = net.blocks[0].attn1, inputs[0]
    after = layer(x)
    second.__exit__(None, None, None)
    close(after, 2 * layer(x))
    assert all(m.controls == () for m in net.modules() if isinstance(m, Attention))


def test_gradients_reach_through_the_weights(inputs):
    """The gradient of a function of P with respect to W_q, against finite differences."""
    layer, (x, _), kept = MultiHeadAttention(8, 2).double(), inputs, []
    keep = Spy("weights", change=lambda p: kept.append(p))

    def loss(weight):
        kept.clear()
        with controlled(layer, keep):
            torch.func.functional_call(layer, {"q_proj.weight": weight}, (x,))
        return kept[0][..., 0].square().sum()

    assert torch.autograd.gradcheck(loss, layer.q_proj.weight.detach().clone().requires_grad_())


def test_appended_keys_are_visible_to_all(inputs):
    layer, (x, _), extra = MultiHeadAttention(8, 2).double(), inputs, randn(2, 2, 3, 4)
    append = lambda q, k, v: (q, torch.cat([k, extra], 2), torch.cat([v, extra], 2))
    for also in ((), ("weights",)):
        spy = Spy("qkv", *also)
        type(spy).qkv = lambda self, site, q, k, v: append(q, k, v)
        with controlled(layer, spy):
            found = layer(x, causal=True)
        q, k, v = (attention.split_heads(p(x), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        mask = torch.cat([causal_mask(torch.arange(5), 5), torch.ones(5, 3, dtype=torch.bool)], 1)[None, None]
        close(found, layer.out_proj(merge_heads(by_loops(*append(q, k, v), mask=mask))))
    drop = Spy("qkv", change=lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]))
    with controlled(layer, drop):
        layer(x)
        with pytest.raises(ValueError, match="mask keys in `logits` instead"):
            layer(x, causal=True)


class Adapter(nn.Module):
    """A control that learns, with submodules called like stages."""

    def __init__(self, names):
        super().__init__()
        self.gains = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(torch.zeros(1, dtype=torch.float64)) for name in names})
        self.heads, self.weights = nn.Linear(2, 2), nn.Identity()

    def output(self, site, y):
        return y + self.gains[site.name.replace(".", "/")]


def test_a_control_may_learn(net, inputs):
    adapter = Adapter(name for name, m in net.named_modules() if isinstance(m, Attention))
    with controlled(net, adapter):
        net(*inputs).sum().backward()
    assert all(g.grad is not None and g.grad != 0 for g in adapter.gains.values())


def test_a_copy_of_a_controlled_model_is_its_own(net, inputs):
    with controlled(net, Spy("output", change=lambda y: 0 * y)):
        twin = copy.deepcopy(net)
    with controlled(net, Spy("output", change=lambda y: 2 * y)):
        close(twin(*inputs), inputs[0])


def test_senseless_controls_are_refused(net):
    with pytest.raises(ValueError, match="defines none of the stages"), controlled(net, object()):
        pass
    with pytest.raises(ValueError, match="Linear has no attention layer"), controlled(nn.Linear(2, 2), Spy("output")):
        pass
