"""MoH against the authors' code (goldens), brute force over tokens and heads, closed forms and the published sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common.attention import STAGES, MultiHeadAttention, controlled
from common.data import text
from common.errors import UserError
from common.gpu import count_params
from common.loop import load_weights
from papers.moh import eval as evaluation
from papers.moh import model as moh
from papers.moh.model import (
    AggregatedAttention,
    Budget,
    CosineAttention,
    DiT,
    DotAttention,
    LlamaAttention,
    LlamaForCausalLM,
    balance_loss,
    load_balance,
    run_sparse,
)
from papers.moh.train import DITS, TRANSNEXT, Config, TransNeXt, heads, published
from tests.goldens import Case, cases

CASES = cases("moh")
ATTENTION = [(case, name) for case in CASES for name in case.meta.get("cases", ())]  # one file holds several layers
LLAMAS = [case for case in CASES if case.meta.get("cls", "").startswith("Llama")]
DITS_FULL = [case for case in CASES if case.meta.get("cls") == "DiT"]
EXECUTION = pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
BITS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


def build_attention(meta: dict, cls: str) -> moh.MoHAttention:
    """From the constructor arguments of the authors' classes."""
    kwargs = meta["kwargs"]
    budget = Budget(kwargs["num_heads"], kwargs["shared_head"], kwargs["routed_head"])
    if cls == "MoHAttention":
        return DotAttention(meta["dim"], budget, kwargs.get("head_dim"), qkv_bias=kwargs.get("qkv_bias", False), qk_norm=kwargs.get("qk_norm", False))
    if cls == "Attention":
        return CosineAttention(meta["dim"], budget, tuple(meta["input_resolution"]))
    return AggregatedAttention(meta["dim"], budget, tuple(meta["input_resolution"]), kwargs.get("sr_ratio", 1), window=kwargs.get("window_size", 3))


@pytest.mark.parametrize(("case", "name"), ATTENTION, ids=lambda x: x if isinstance(x, str) else x.name)
@BITS
@EXECUTION
def test_golden_attention(case: Case, name: str, dtype, sparse):
    meta, t = case.meta["cases"][name], case.state(f"{name}/")
    layer = build_attention(meta, meta.get("cls") or case.meta["cls"])
    layer.load_state_dict(case.state(f"{name}/param/"))
    run_sparse(layer.to(dtype), sparse)
    bits = f"f{torch.finfo(dtype).bits}"
    tolerance = case.meta["tolerance"][bits]
    x = t["x"].to(dtype).requires_grad_()
    out = layer(x)
    close(out, t[f"out_{bits}"], tolerance)
    (gradient,) = torch.autograd.grad((out * t["gout"].to(dtype)).sum(), x)
    close(gradient, t[f"grad_x_{bits}"], tolerance)
    assert (layer.routing is None) == ("selected_routed" not in t)
    if layer.routing is not None:
        close(load_balance(layer.routing), t[f"l_aux_{bits}"].squeeze(), tolerance)
        assert torch.equal(chosen_heads(layer), t["selected_routed"])


def chosen_heads(layer: moh.MoHAttention) -> torch.Tensor:
    """(b n, K) ascending indices."""
    return layer.routing.chosen.flatten(0, 1).nonzero()[:, 1].reshape(-1, layer.budget.routed)


@pytest.mark.parametrize(("case", "name"), [(c, n) for c, n in ATTENTION if f"{n}/relative_coords_table" in c.tensors], ids=str)
def test_golden_position_offsets(case, name):
    layer = build_attention(case.meta["cases"][name], case.meta["cases"][name]["cls"])
    expected = case.tensors[f"{name}/relative_coords_table"][case.tensors[f"{name}/relative_pos_index"]]
    close(layer.offsets[layer.offset_index].flatten(0, 1), expected, 1e-6)


def llama_budget(meta: dict) -> Budget:
    return Budget(meta["config"]["num_attention_heads"], meta["derived"]["shared_head"], meta["derived"]["routed_head"], router="norm")


@pytest.mark.parametrize("case", LLAMAS, ids=lambda c: c.name)
@EXECUTION
def test_golden_llama_attention(case, sparse):
    c, t = case.meta["config"], case.state("attn/")
    kv, options = c["num_key_value_heads"], {"rope_theta": c["rope_theta"], "bias": c["attention_bias"]}
    layer = run_sparse(LlamaAttention(c["hidden_size"], llama_budget(case.meta), kv, **options).eval(), sparse)
    layer.load_state_dict(case.state("attn/param/"))
    x = t["x"].requires_grad_()
    out = layer(x)
    close(out, t["out_f32"], case.meta["tolerance"]["f32"])
    (gradient,) = torch.autograd.grad((out * t["gout"]).sum(), x)
    close(gradient, t["grad_x_f32"], case.meta["tolerance"]["f32"])
    assert torch.equal(chosen_heads(layer), t["selected_routed"])


@pytest.mark.parametrize("case", LLAMAS, ids=lambda c: c.name)
@EXECUTION
@torch.no_grad()
def test_golden_llama(case, sparse):
    c = case.meta["config"]
    model = LlamaForCausalLM(
        c["vocab_size"], c["hidden_size"], c["intermediate_size"], [llama_budget(case.meta)] * c["num_hidden_layers"], c["num_key_value_heads"],
        rope_theta=c["rope_theta"], eps=c["rms_norm_eps"], attention_bias=c["attention_bias"],
    )  # fmt: skip
    model.load_state_dict(case.state("lm/param/"))
    logits = run_sparse(model.eval(), sparse)(case.tensors["lm/input_ids"])
    close(logits, case.tensors["lm/logits_f32"], case.meta["tolerance"]["f32"])


def build_dit(kwargs: dict) -> DiT:
    depth = kwargs["depth"]
    per_layer = [kwargs[name] if isinstance(kwargs[name], list) else [kwargs[name]] * depth for name in ("num_heads", "shared_head", "routed_head")]
    budgets = [Budget(h, shared, routed) if kwargs["moh"] else Budget(h) for h, shared, routed in zip(*per_layer, strict=True)]
    return DiT(
        kwargs["input_size"], kwargs["in_channels"], kwargs["patch_size"], kwargs["hidden_size"], budgets, kwargs["num_classes"],
        head_dim=kwargs.get("head_dim"), mlp_ratio=kwargs.get("mlp_ratio", 4.0), label_dropout=kwargs["class_dropout_prob"],
        learn_sigma=kwargs["learn_sigma"],
    )  # fmt: skip


@pytest.mark.parametrize("case", DITS_FULL, ids=lambda c: c.name)
@EXECUTION
@torch.no_grad()
def test_golden_dit(case, sparse):
    model, t = build_dit(case.meta["kwargs"]), case.tensors
    close(model.pos_embed, t["param/pos_embed"], 1e-6)
    model.load_state_dict(case.state("param/"))
    out = run_sparse(model.eval(), sparse)(t["x"], t["t"], t["y"])
    close(out, t["out_f32"], case.meta["tolerance"]["f32"])


# ---- the two executions -----------------------------------------------------------------------------------------------------------------

BUDGETS = {
    "two_stage": Budget(8, 2, 3), "one_shared": Budget(8, 1, 2), "none_shared": Budget(8, 0, 3), "single_stage": Budget(8, 2, 3, two_stage=False),
    "shared_only": Budget(8, 8, 0), "every_head": Budget(8, 3, 5), "norm": Budget(8, 4, 2, router="norm"),
}  # fmt: skip
FAMILIES = {
    "dot": lambda budget: DotAttention(32, budget, qk_norm=True),
    "dot, wide": lambda budget: DotAttention(32, budget, 6, qkv_bias=False),
    "cosine": lambda budget: CosineAttention(32, budget, (3, 4)),
    "aggregated": lambda budget: AggregatedAttention(32, budget, (4, 6), 2),
    "llama": lambda budget: LlamaAttention(32, budget, 8),
    "llama, grouped": lambda budget: LlamaAttention(32, budget, 2, bias=True),
}


def random_layer(family: str, budget: Budget) -> tuple[moh.MoHAttention, torch.Tensor]:
    """In float64, with every parameter random, and an input for it."""
    torch.manual_seed(0)
    layer = FAMILIES[family](budget).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    n = layer.grid[0] * layer.grid[1] if layer.grid else 11
    return layer, torch.randn(3, n, 32, dtype=torch.float64, requires_grad=True)


def outputs_and_gradients(layer: moh.MoHAttention, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, and the gradients of a fixed function of it, plus the load balance, to x and every parameter."""
    y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).sin()).sum() + balance_loss(layer)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, (x, *parameters), allow_unused=True)
    return {"y": y} | {name: g for name, g in zip(("x", *names), gradients, strict=True) if g is not None}


def assert_executions_agree(layer: moh.MoHAttention, x: torch.Tensor):
    masked, sparse = (outputs_and_gradients(run_sparse(layer, s), x) for s in (False, True))
    assert masked.keys() == sparse.keys() and len(masked) > 3
    for name in masked:
        torch.testing.assert_close(sparse[name], masked[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("block", [1, 2**22], ids=["head by head", "all heads"])
def test_executions_agree(family, budget, block, monkeypatch):
    monkeypatch.setattr(moh, "BLOCK", block)
    layer, x = random_layer(family, budget)
    assert_executions_agree(layer.eval(), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_executions_agree_where_heads_are_idle(family):
    """Head 2 is chosen by everybody, heads 4 and 7 by nobody, the others by a part of one sequence."""
    layer, x = random_layer(family, Budget(8, 2, 2))
    layer.wg.weight.data.zero_()
    layer.wg.weight.data[:, 0] = torch.tensor([20.0, 1, -9, 3, 2, -9])
    x.data[..., 0] = 1
    x.data[..., 1].clamp_(-1, 1)
    layer.wg.weight.data[:, 1] = torch.tensor([0.0, 5, 0, 0, 5, 0])
    assert_executions_agree(layer, x)
    load = layer.routing.chosen.sum((0, 1))
    assert load[0] == 3 * x.shape[1] and load[2] == load[5] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_skips_what_is_masked(family, monkeypatch):
    """A query row of a routed head that was not chosen is never computed: the attention is called on the chosen rows, padded, alone."""
    layer, x = random_layer(family, Budget(8, 2, 3))
    run_sparse(layer)
    rows = 0
    core = type(layer).core

    def counted(self, q, kv, heads, r):
        nonlocal rows
        rows += q.shape[0] * q.shape[1] * q.shape[2]
        return core(self, q, kv, heads, r)

    monkeypatch.setattr(type(layer), "core", counted)
    layer(x)
    busiest = layer.routing.chosen.sum(1).max().item()
    assert rows == 3 * (2 * x.shape[1] + 6 * busiest) < 3 * 8 * x.shape[1]


# ---- the equations, by brute force ------------------------------------------------------------------------------------------------------


def by_hand(layer: DotAttention, x: torch.Tensor) -> torch.Tensor:
    """Eqs. 2-6 token by token and head by head from the layer's parameters."""
    b, (h, d) = layer.budget, (layer.heads, layer.head_dim)
    wq, wk, wv = layer.qkv.weight.unflatten(0, (3, h, d))
    bq, bk, bv = layer.qkv.bias.unflatten(0, (3, h, d))
    wo, state = layer.proj.weight.unflatten(1, (h, d)), layer.state_dict()
    y = torch.zeros_like(x)
    for s in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[s, t] = layer.proj.bias
            shared = b.shared * F.softmax(state["wg_1.weight"] @ x[s, t], 0) if b.shared > 1 else torch.ones(b.shared, dtype=x.dtype)
            gate = dict(enumerate(shared.tolist()))
            if b.routed:
                p = F.softmax(state["wg.weight"] @ x[s, t], 0).tolist()
                best = sorted(range(len(p)), key=lambda i: -p[i])[: b.routed]
                alpha = (2 * F.softmax(state["wg_0.weight"] @ x[s, t], 0)).tolist() if b.shared and b.two_stage else (1.0, 1.0)
                gate = {i: alpha[0] * g for i, g in gate.items()}
                gate |= {b.shared + i: alpha[1] * b.routed * p[i] / sum(p[j] for j in best) for i in best}
            assert len(gate) == b.shared + b.routed
            for i, g in gate.items():
                q = wq[i] @ x[s, t] + bq[i]
                p = F.softmax((x[s] @ wk[i].T + bk[i]) @ q / d**0.5, 0)
                y[s, t] += g * wo[:, i] @ (p @ (x[s] @ wv[i].T + bv[i]))
    return y


@pytest.mark.parametrize("name", [n for n in BUDGETS if n != "norm"])
@EXECUTION
@torch.no_grad()
def test_equations_by_hand(name, sparse):
    torch.manual_seed(0)
    layer = DotAttention(24, BUDGETS[name]).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    close(run_sparse(layer, sparse)(x), by_hand(layer, x), 1e-10)
    gates = layer.gates(x, None)
    assert ((gates != 0).sum(1) == layer.budget.shared + layer.budget.routed).all()


@pytest.mark.parametrize("budget", [Budget(4), Budget(4, 4, 0), Budget(4, 2, 2), Budget(4, 1, 3), Budget(4, 0, 4)], ids=str)
@EXECUTION
def test_zero_routers_and_all_heads_are_multi_head_attention(budget, sparse):
    torch.manual_seed(0)
    reference, layer = MultiHeadAttention(16, 4).double(), run_sparse(DotAttention(16, budget).double(), sparse)
    layer.qkv.weight.data = torch.cat([reference.q_proj.weight, reference.k_proj.weight, reference.v_proj.weight]).detach()
    layer.qkv.bias.data = torch.cat([reference.q_proj.bias, reference.k_proj.bias, reference.v_proj.bias]).detach()
    layer.proj.load_state_dict(reference.out_proj.state_dict())
    for name, p in layer.named_parameters():
        if name.startswith("wg"):
            p.data.zero_()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(layer(x), reference(x), 1e-12)


def test_renaming_routed_heads_changes_nothing():
    layer, x = random_layer("dot", Budget(8, 2, 3))
    order = torch.tensor([0, 1, *(2 + torch.randperm(6)).tolist()])
    renamed = copy.deepcopy(layer)
    renamed.wg.weight.data = layer.wg.weight.data[order[2:] - 2]
    renamed.qkv.weight.data = layer.qkv.weight.data.unflatten(0, (3, 8, 4))[:, order].flatten(0, 2)
    renamed.qkv.bias.data = layer.qkv.bias.data.unflatten(0, (3, 8, 4))[:, order].flatten()
    renamed.proj.weight.data = layer.proj.weight.data.unflatten(1, (8, 4))[:, order].flatten(1)
    close(renamed(x), layer(x), 1e-12)


# ---- load balance -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_balance_is_k_when_balanced_and_grows_with_imbalance(k):
    tokens = torch.arange(12)
    chosen = torch.stack([(tokens + i) % 6 for i in range(k)], -1)
    chosen = torch.zeros(1, 12, 6, dtype=torch.bool).scatter(-1, chosen[None], True)
    uniform = torch.full((1, 12, 6), 1 / 6)
    close(load_balance(moh.Routing(uniform, chosen)), torch.tensor(float(k)), 1e-6)
    collapsed = torch.zeros_like(chosen)
    collapsed[..., :k] = True
    close(load_balance(moh.Routing(collapsed / k, collapsed)), torch.tensor(6.0), 1e-6)


def test_balance_loss_is_of_the_last_pass_and_of_the_routing_layers_alone():
    """Micro-batches and recomputation in the backward pass add nothing to it."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(DotAttention(16, b) for b in (Budget(4), Budget(4, 4, 0), Budget(4, 1, 2), Budget(4, 2, 1))))
    first, second = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    layers(first)
    assert balance_loss(layers).requires_grad
    layers(second)
    expected = (load_balance(layers[2].routing) + load_balance(layers[3].routing)) / 2
    assert torch.equal(balance_loss(layers), expected)
    torch.utils.checkpoint.checkpoint(layers, second, use_reentrant=False).sum().backward()
    close(balance_loss(layers), expected, 1e-6)
    assert balance_loss(layers[:2]) == 0


# ---- continuing a trained model ---------------------------------------------------------------------------------------------------------


def test_conversion_needs_no_parameter_and_starts_from_the_shared_and_chosen_heads():
    torch.manual_seed(0)
    mha, converted = (LlamaForCausalLM(20, 16, 24, [b] * 2, 2) for b in (Budget(4), Budget(4, 2, 1, router="norm")))
    converted.load_state_dict(mha.state_dict())
    attn, x = converted.model["layers"][0]["self_attn"], torch.randn(2, 6, 16)
    attn.train()(x)
    norms = attn.queries(x).norm(dim=-1)[:, 2:]
    assert torch.equal(attn.routing.chosen.long().argmax(-1), norms.argmax(1))
    gates = attn.gates(x, attn.queries(x))
    assert set(gates.flatten().tolist()) == {0.0, 1.0} and (gates[:, :2] == 1).all() and (gates.sum(1) == 3).all()


@pytest.mark.parametrize("training", [True, False])
def test_straight_through(training):
    """Eq. 10: in training the gradient that reaches a hard gate reaches p as it is, for heads that were not chosen too; else nothing does."""
    torch.manual_seed(0)
    layer, x = LlamaAttention(16, Budget(4, 1, 2, router="norm"), 4).double().train(training), torch.randn(1, 5, 16, dtype=torch.float64)
    q = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 4, 5, 1, dtype=torch.float64)
    gates = layer.gates(x, q)
    if not training:
        assert not gates.requires_grad
        return
    (found,) = torch.autograd.grad((gates * upstream).sum(), q)
    norms = q[:, 1:].norm(dim=-1)
    soft = (norms / norms.std(1, keepdim=True)).softmax(1)
    (expected,) = torch.autograd.grad((soft * upstream[:, 1:, :, 0]).sum(), q)
    close(found, expected, 1e-12)


# ---- controls ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@EXECUTION
def test_a_control_sees_all_heads_and_an_identity_changes_nothing(family, sparse):
    seen = {}

    class Identity:
        def weights(self, site, p):
            seen[site.name] = p.shape

    for stage in set(STAGES) - {"weights"}:
        setattr(Identity, stage, lambda self, site, *tensors: None)
    layer, x = random_layer(family, Budget(8, 2, 3))
    plain = run_sparse(layer, sparse)(x)
    with controlled(layer, Identity()):
        close(layer(x), plain, 1e-10)
    assert seen[""][:3] == (3, 8, x.shape[1])


# ---- published sizes and names ----------------------------------------------------------------------------------------------------------

SIZES = {"vit_b_75": 89.7, "vit_b_50": 89.7, "vit_s_80": 49.7, "vit_s_75": 49.7}  # TransNeXt's, in millions, without routers
ACTIVE = {"vit_b_75": (441, 588), "vit_s_80": (343, 429), "dit_xl_90": (403, 448), "dit_l_90": (344, 384), "dit_s_90": (64, 72)}


@pytest.mark.parametrize("variant", [*TRANSNEXT, *DITS, "llama3_8b"])
def test_published_sizes(variant):
    with torch.device("meta"):
        model = published(variant)
    routers = sum(p.numel() for name, p in model.named_parameters() if ".wg" in name)
    if variant in SIZES:
        assert round((count_params(model) - routers) / 1e6, 1) == SIZES[variant]
    if variant == "dit_xl_90":
        assert (round((count_params(model) - routers) / 1e6), round(count_params(model) / 1e6)) == (675, 676)  # Table 2
    budgets = [m.budget for m in model.modules() if isinstance(m, moh.MoHAttention)]
    active, every = sum(b.shared + b.routed for b in budgets), sum(b.heads for b in budgets)
    if variant in ACTIVE:
        assert (active, every) == ACTIVE[variant]
    assert round(100 * active / every, 1) == pytest.approx(75 if variant == "llama3_8b" else int(variant[-2:]), abs=1.2)


@pytest.mark.parametrize("variant", ["vit", "dit"])
def test_published_layouts_load(variant, tmp_path):
    """Files with the authors' names and wrapping; a wrong one is refused with its first mismatches."""
    build = {
        "vit": lambda: TransNeXt((24, 48, 48, 72), [heads((1, 1, 1, 0)), heads((1, 2, 1, 1)), heads((2, 2, 2, 0)), heads((1, 3, 1, 1))], 7, 64),
        "dit": lambda: DiT(8, 4, 2, 32, [Budget(3, 3, 0), Budget(6, 4, 1)], 5, head_dim=8),
    }[variant]
    source, target = build(), build()
    key = {"vit": "model", "dit": "ema"}[variant]
    torch.save({key: source.state_dict(), "epoch": 299}, tmp_path / "published.pth")
    load_weights(target, tmp_path / "published.pth", key=key)
    inputs = {"vit": (torch.randn(2, 3, 64, 64),), "dit": (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900]), torch.tensor([0, 4]))}[variant]
    assert torch.equal(target.eval()(*inputs), source.eval()(*inputs))
    with pytest.raises(UserError, match="does not fit DiT"):
        load_weights(DiT(8, 4, 2, 32, [Budget(6, 4, 1)] * 2, 5), tmp_path / "published.pth", key=key)


def test_names_of_the_published_vit():
    budgets = [[Budget(1, 1, 0)], [Budget(2, 1, 1)], [Budget(2, 2, 0)] * 2, [Budget(3, 2, 1)]]
    routers = [[], ["wg", "wg_0"], ["wg_1"], ["wg", "wg_0", "wg_1"]]
    both = lambda *names: {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    expected = both("head")
    for s, stage in enumerate(budgets, 1):
        expected |= both(f"patch_embed{s}.proj", f"patch_embed{s}.norm", f"norm{s}")
        attn = both("attn.cpb_fc1", "attn.cpb_fc2", "attn.proj") | {"attn.temperature", "attn.query_embedding"}
        attn |= {f"attn.{name}.weight" for name in routers[s - 1]}
        if s == 4:
            attn |= both("attn.qkv")
        else:
            attn |= both("attn.q", "attn.kv", "attn.sr", "attn.norm")
            attn |= {"attn.relative_pos_bias_local", "attn.learnable_tokens", "attn.learnable_bias"}
        block = attn | both("norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.dwconv.dwconv")
        expected |= {f"block{s}.{i}.{name}" for i in range(len(stage)) for name in block}
    assert set(TransNeXt((24, 48, 48, 72), budgets, 7, 64).state_dict()) == expected


def test_a_published_llama_loads_from_its_shards_and_its_loss_is_the_text_s(tmp_path):
    torch.manual_seed(0)
    document = "many heads make light work " * 20
    tokenizer = text.byte_level_bpe([document], 270)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "document.txt").write_text(document)
    build = lambda: LlamaForCausalLM(tokenizer.get_vocab_size(), 16, 24, [Budget(4, 2, 1, router="norm")] * 2, 2)
    source = build().eval()
    names = sorted(source.state_dict())
    assert "model.layers.1.self_attn.q_proj.weight" in names and not any("wg" in name for name in names)
    for i, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: source.state_dict()[name] for name in part}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    target = evaluation.load_published(build(), tmp_path).eval()
    ids = torch.tensor(tokenizer.encode(document).ids)[:33]
    expected = F.cross_entropy(source(ids[None, :-1])[0], ids[1:]).item()
    cfg = Config(data=str(tmp_path / "document.txt"), weights=tmp_path, device="cpu")
    (tmp_path / "document.txt").write_text(tokenizer.decode(ids.tolist()))
    assert evaluation.document_loss(target, cfg, window=32) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        evaluation.load_published(build(), tmp_path.parent)


def test_top1_of_a_published_vit_on_an_image_folder(tmp_path, monkeypatch):
    """A head that always answers class 1 is right on that class's images."""
    for name, count in (("n01", 1), ("n02", 3)):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (300, 260), (80 * i, 40, 90)).save(folder / f"{i}.JPEG")
    budgets = [[Budget(1, 1, 0)], [Budget(2, 1, 1)], [Budget(2, 2, 0)], [Budget(3, 2, 1)]]
    model = TransNeXt((24, 48, 48, 72), budgets, 2)
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([0.0, 1.0])
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    monkeypatch.setattr(evaluation, "published", lambda variant: TransNeXt((24, 48, 48, 72), budgets, 2))
    cfg = Config(data=str(tmp_path), weights=tmp_path / "vit.pth", device="cpu")
    assert evaluation.evaluate_published(cfg) == {"top1": 75.0}


def test_unknown_variants_are_answered():
    with pytest.raises(UserError, match="vit_b_75, vit_b_50"):
        published("vit_x_75")


# ---- what eval.py measures --------------------------------------------------------------------------------------------------------------


def test_head_use():
    """Classes 0-4 choose heads {0, 1}, 5-9 heads {0, 2}: distance 1/2 between the halves, 25 of 45 pairs; loads 1/2, 1/4, 1/4, 0."""
    label = torch.arange(200) % 10
    chosen = torch.zeros(200, 3, 4, dtype=torch.bool)
    chosen[..., 0] = True
    chosen[label < 5, :, 1] = True
    chosen[label >= 5, :, 2] = True
    found = evaluation.head_use([chosen], label, shuffles=20)
    assert found["class_distance"] == pytest.approx(25 / 45 / 2)
    assert found["entropy"] == pytest.approx(1.5 / 2)
    assert 0 < found["shuffled_distance"] < 0.2
    assert found["class_loads"][7] == [0.5, 0, 0.5, 0]


def test_the_attention_that_is_timed_alone_is_the_layer_s():
    torch.manual_seed(0)
    layer, x = run_sparse(DotAttention(32, Budget(8, 2, 3))), torch.randn(1, 9, 32)
    shared, routed = evaluation.attention_alone(layer, x)()
    o = layer.core(layer.queries(x), layer.keys_values(x), slice(None), None)
    close(shared, o[:, :2], 1e-6)
    for i in range(6):
        rows = layer.routing.chosen[0, :, i].nonzero()[:, 0]
        close(routed[0, i, : len(rows)], o[0, 2 + i, rows], 1e-6)
