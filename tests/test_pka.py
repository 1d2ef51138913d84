"""PKA against one dense masked attention, loops, closed forms and OminiControl's forward (goldens)."""

import io
import math
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import gpu
from common.attention import at_step, attend, controlled
from common.backbones.flux import FluxAttention, FluxConfig, FluxTransformer2DModel, Visible, image_ids
from common.backbones.sd_vae import AutoencoderConfig, AutoencoderKL
from common.data.scenes import COLOURS, SHAPES
from common.errors import UserError
from common.lora import merge
from common.reader import truth
from papers.pka import eval as evaluation
from papers.pka import model as pka
from papers.pka import train as training
from papers.pka.model import (
    DENOISER,
    NEVER,
    PKA,
    AdditivePKA,
    ConditionedFlux,
    WindowPKA,
    csas,
    keyword_mask,
    ksa,
    mix_of,
    paa,
    save_adapters,
)
from tests.goldens import cases

CASES = [case for case in cases("pka") if "out64/concat_attend" in case.tensors]
MAIN = ("text", "image")
GRID, HEADS, DIM = (3, 4), 2, 6
N = GRID[0] * GRID[1]


def heads(count: int, batch: int = 2, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, HEADS, count, DIM, dtype=dtype, requires_grad=True) for _ in range(3))


def branches(spatial: int = 3, subjects: tuple[int, ...] = (5, 7), text: int = 4) -> dict:
    named = {"text": heads(text), "image": heads(N)} | {f"spatial {i}": heads(N) for i in range(spatial)}
    return named | {f"subject {i}": heads(count) for i, count in enumerate(subjects)}


def layer() -> FluxAttention:
    return FluxAttention(HEADS * DIM, HEADS, 0)


def scoped(mix: PKA, masks: list[torch.Tensor]) -> PKA:
    """A mix whose subjects have these masks, whatever the keywords say."""
    mix.keywords = {f"subject {i}": torch.zeros(2, 4, dtype=torch.bool) for i in range(len(masks))}
    mix.scope = lambda attention, subject, q, k_text: masks[int(subject.split()[1])]
    return mix


def random_masks(count: int = 2) -> list[torch.Tensor]:
    return [torch.rand(2, N) < 0.4 for _ in range(count)]


def dense(named: dict, see) -> dict:
    """One attention of text and image over all keys; see(query, key) of (branch, position) pairs gives Bool[b] or bool."""
    places = {name: [(name, i) for i in range(h[1].shape[2])] for name, h in named.items()}
    queries, keys = [*places["text"], *places["image"]], [key for listed in places.values() for key in listed]
    mask = torch.stack([torch.stack([torch.as_tensor(see(a, b)).expand(2) for b in keys], 1) for a in queries], 1)
    q, k, v = torch.cat([named[name][0] for name in MAIN], 2), *(torch.cat([h[i] for h in named.values()], 2) for i in (1, 2))
    o = attend(q, k, v, mask=mask[:, None])
    return dict(zip(MAIN, o.split([len(places[name]) for name in MAIN], 2), strict=True))


def visible(masks: list[torch.Tensor], near):
    """What image token i sees: text, image, spatial conditions near i, the subjects whose mask has i."""

    def see(a, b):
        if b[0] in MAIN:
            return True
        if a[0] == "text":
            return False
        return near(a[1], b[1]) if b[0].startswith("spatial") else masks[int(b[0].split()[1])][:, a[1]]

    return see


def compare(actual: dict, expected: dict, named: dict) -> None:
    """Outputs, and gradients of all q, k, v."""
    probes = {name: torch.randn_like(actual[name]) for name in MAIN}
    grads = []
    for outputs in (actual, expected):
        for name in MAIN:
            torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-10)
        loss = sum((outputs[name] * probes[name]).sum() for name in MAIN)
        leaves = [t for name, h in named.items() for t in (h if name in MAIN else h[1:])]
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- one softmax over what may be read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spatial", "subjects"), [(3, (5, 7)), (1, ()), (2, ()), (0, (5,)), (0, (5, 3)), (1, (4,))], ids=str)
def test_joint_is_dense_attention_with_a_mask(spatial, subjects):
    named, masks = branches(spatial, subjects), random_masks(len(subjects))
    compare(scoped(PKA(), masks)(layer(), named), dense(named, visible(masks, lambda i, j: i == j)), named)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_window_is_dense_attention_with_a_mask(window):
    named, masks = branches(2, (5,)), random_masks(1)
    near = lambda i, j: max(abs(i // GRID[1] - j // GRID[1]), abs(i % GRID[1] - j % GRID[1])) <= window // 2
    compare(scoped(WindowPKA(GRID, window), masks)(layer(), named), dense(named, visible(masks, near)), named)


def test_joint_where_conditions_outweigh_the_rest_and_where_they_do_not():
    """Logits of ±200 neither overflow nor lose the smaller side."""
    for factor in (1e2, -1e2):
        named = branches(1, ())
        q, k = named["image"][0].detach(), named["spatial 0"]
        named["spatial 0"] = (k[0], factor * q, k[2])
        named["image"] = (q, *named["image"][1:])
        actual, expected = PKA()(layer(), named)["image"], dense(named, visible([], lambda i, j: i == j))["image"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_additive_is_a_sum_of_attentions():
    named, masks, mix = branches(3, (5,)), random_masks(1), AdditivePKA(1, HEADS).double()
    for gate in mix.parameters():
        nn.init.normal_(gate)
    actual = scoped(mix, masks)(layer(), named)
    o = dense(named, lambda a, b: b[0] in MAIN)
    q, (g_paa, g_ksa) = named["image"][0], (mix.gates[0][name][:, None, None] for name in ("paa", "ksa"))
    aligned = torch.zeros_like(q)
    for i in range(N):
        k, v = (torch.stack([named[f"spatial {c}"][part][:, :, i] for c in range(3)], 2) for part in (1, 2))
        aligned[:, :, i] = attend(q[:, :, i : i + 1], k, v)[:, :, 0]
    subject = attend(q, *named["subject 0"][1:]) * masks[0][:, None, :, None]
    torch.testing.assert_close(actual["image"], o["image"] + g_paa * aligned + g_ksa * subject)
    torch.testing.assert_close(actual["text"], o["text"])


def test_additive_starts_as_the_base():
    named, mix = branches(2, (5,)), scoped(AdditivePKA(1, HEADS).double(), random_masks(1))
    expected = dense(named, lambda a, b: b[0] in MAIN)
    for name in MAIN:
        torch.testing.assert_close(mix(layer(), named)[name], expected[name])


@pytest.mark.parametrize("mix", [PKA(), AdditivePKA(1, HEADS), WindowPKA(GRID)], ids=lambda mix: type(mix).__name__)
def test_without_conditions_it_is_the_plain_call(mix):
    named, attention = branches(0, ()), layer()
    expected = Visible()(attention, named)
    assert all(torch.equal(mix(attention, named)[name], expected[name]) for name in MAIN)


def test_conditions_read_only_themselves():
    named = branches(2, (5,))
    outputs = scoped(PKA(), random_masks(1))(layer(), named)
    assert list(outputs) == ["spatial 0", "spatial 1", "subject 0", "text", "image"]
    for name in list(outputs)[:3]:
        torch.testing.assert_close(outputs[name], attend(*named[name]))


# ---- PAA --------------------------------------------------------------------------------------------------------------------------------


def test_paa_of_one_condition_is_its_values():
    (q, k, v) = heads(N)
    o, lse = paa(q, [k], [v])
    assert torch.equal(o, v)
    torch.testing.assert_close(lse, (q * k).sum(-1) / math.sqrt(DIM))


def test_paa_by_loops():
    (q, k1, v1), (_, k2, v2) = ([t.detach() for t in heads(N)] for _ in range(2))
    o, lse = paa(q, [k1, k2], [v1, v2])
    for h in range(HEADS):
        for i in range(N):
            logits = [float(q[1, h, i] @ k[1, h, i]) / math.sqrt(DIM) for k in (k1, k2)]
            total = sum(map(math.exp, logits))
            expected = sum(math.exp(s) / total * v[1, h, i] for s, v in zip(logits, (v1, v2), strict=True))
            torch.testing.assert_close(o[1, h, i], expected)
            assert lse[1, h, i].item() == pytest.approx(math.log(total))


def test_paa_never_holds_the_logits_of_all_pairs():
    """32 conditions of 400 tokens: all pairs would be 32 · 400² logits; PAA needs a few times its values."""
    n, c = 400, 32
    q, ks, vs = torch.randn(1, 1, n, 8), *([torch.randn(1, 1, n, 8) for _ in range(c)] for _ in range(2))
    assert gpu.peak_memory(lambda: paa(q, ks, vs)) < 0.1 * 4 * c * n**2


def test_the_products_of_matrices_do_not_grow_with_spatial_conditions():
    cached = lambda c: {name: h if name in MAIN else (None, *h[1:]) for name, h in branches(c, ()).items()}
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        flops = {mix: [gpu.count_flops(lambda c=c, mix=mix: mix()(layer(), cached(c))) for c in (1, 8)] for mix in (PKA, Visible)}
    assert flops[PKA][0] == flops[PKA][1] > 0 and flops[Visible][1] > 2 * flops[Visible][0]


# ---- KSA --------------------------------------------------------------------------------------------------------------------------------


def test_ksa_of_a_full_mask_is_cross_attention():
    q, (_, k, v) = heads(N)[0], heads(5)
    o, lse = ksa(q, k, v, torch.ones(2, N, dtype=torch.bool))
    torch.testing.assert_close(o, attend(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / math.sqrt(DIM)).logsumexp(-1))


@pytest.mark.parametrize("counts", [(3, 7), (0, 5), (0, 0), (N, 1)])
def test_ksa_computes_the_rows_of_the_mask(counts):
    """Samples with unequally many rows; the literal form with Q ⊙ M has the mean of V in the others, which no query asked for."""
    q, (_, k, v) = heads(N)[0], heads(5)
    mask = torch.stack([torch.isin(torch.arange(N), torch.randperm(N)[:count]) for count in counts])
    o, lse = ksa(q, k, v, mask)
    literal = attend(q * mask[:, None, :, None], k, v)
    inside = mask[:, None].expand(2, HEADS, N)
    torch.testing.assert_close(o[inside], literal[inside])
    assert not o[~inside].any() and (lse[~inside] == NEVER).all()
    torch.testing.assert_close(literal[~inside], v.mean(2, keepdim=True).expand_as(o)[~inside])


def test_ksa_computes_no_more_rows():
    q, (_, k, v) = heads(N)[0], heads(5)
    mask = lambda rows: (torch.arange(N) < rows).expand(2, N)
    flops = [gpu.count_flops(lambda rows=rows: ksa(q, k, v, mask(rows))) for rows in (3, 6, 12)]
    assert flops[1] == 2 * flops[0] and flops[2] == 4 * flops[0] > 0


def test_keyword_mask_by_loops():
    q, k = heads(N)[0].detach(), heads(4)[1].detach()
    keyword = torch.tensor([[False, True, False, True], [True, False, False, False]])
    found, shares = keyword_mask(q, k, keyword, 0.3), torch.zeros(2, N, dtype=torch.float64)
    for b in range(2):
        for i in range(N):
            share = 0.0
            for h in range(HEADS):
                weights = [math.exp(float(q[b, h, i] @ k[b, h, j]) / math.sqrt(DIM)) for j in range(4)]
                share += sum(w for w, named in zip(weights, keyword[b], strict=True) if named) / sum(weights) / HEADS
            assert found[b, i].item() == (share >= 0.3)
            shares[b, i] = share
    low, high = shares.amin(1, keepdim=True), shares.amax(1, keepdim=True)
    assert torch.equal(keyword_mask(q, k, keyword, 0.6, relative=True), shares >= low + 0.6 * (high - low))
    assert keyword_mask(q, k, torch.zeros(2, 4, dtype=torch.bool), 0.9).all()  # nothing named: everything in scope


def test_a_sampler_uses_the_mask_of_the_step_before(monkeypatch):
    """M = 1 at first; an empty mask is replaced by the one before it."""
    now = [torch.rand(2, N) < 0.5 for _ in range(3)]
    now[1][1] = False  # the second sample finds nothing at step 1
    given = iter(now + now[:1])
    monkeypatch.setattr(pka, "keyword_mask", lambda *args: next(given))
    mix, attention = PKA(), layer()
    mix.keywords = {"subject": torch.ones(2, 4, dtype=torch.bool)}
    used = []
    for step in range(3):
        attention.step = step
        used.append(mix.scope(attention, "subject", None, None))
    assert used[0].all() and torch.equal(used[1], now[0])
    assert torch.equal(used[2][0], now[1][0]) and torch.equal(used[2][1], now[0][1])
    attention.step = None
    assert torch.equal(mix.scope(attention, "subject", None, None), now[0])


# ---- the model --------------------------------------------------------------------------------------------------------------------------

SMALL = FluxConfig(
    in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=10,
    pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 4, 4),
)  # fmt: skip
CONDITIONS, SUBJECTS = ("edges", "depth", "subject"), ("subject",)


def random_model(arm="joint", rank=2, trained=True) -> ConditionedFlux:
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(SMALL)
    for p in flux.parameters():
        nn.init.normal_(p, std=0.2)
    model = ConditionedFlux(flux, CONDITIONS, SUBJECTS, mix_of(arm, SMALL, GRID), rank)
    for p in model.parameters():
        if p.requires_grad and trained:
            nn.init.normal_(p, std=0.3)
    return model


def inputs(conditions=CONDITIONS, batch=2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    h, w = 2 * GRID[0], 2 * GRID[1]
    sizes = {"edges": (h, w), "depth": (h, w), "subject": (4, 6)}
    keywords = torch.zeros(batch, 1, 5, dtype=torch.bool)
    keywords[:, 0, 2] = True
    told = {"z": torch.randn(batch, 3, h, w), "t": torch.linspace(0.3, 0.8, batch), "states": torch.randn(batch, 5, 10)}
    told |= {"pooled": torch.randn(batch, 8), "keywords": keywords}
    return told | {name: torch.randn(batch, 3, *sizes[name]) for name in conditions}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_omini_control(case, dtype):
    """The baseline, with and without what conditions see of text and image, cached and not; and no condition in every form."""
    flux = FluxTransformer2DModel.from_config(case.meta["constructor"]).to(dtype)
    flux.load_state_dict(case.state("param/"))
    t = {name: tensor.to(dtype) for name, tensor in case.state("in/").items()}
    names = [name.removeprefix("cond_") for name in t if name.startswith("cond_")]
    subjects = [name for name in names if t[f"{name}_ids"].min() < 0]
    model = ConditionedFlux(flux, names, subjects, Visible(), 2).to(dtype)

    def latents(name, ids):
        rows, columns = (int(n) for n in (ids.amax(0) - ids.amin(0) + 1)[1:])
        return t[name].mT.unflatten(2, (rows, columns))

    z, shown = latents("image", t["image_ids"]), {name: latents(f"cond_{name}", t[f"{name}_ids"]) for name in names}
    for name in names:
        assert torch.equal(model.ids(name, shown[name], 1), t[f"{name}_ids"].float())
    told = {"states": t["text"], "pooled": t["pooled"], "guidance": torch.ones_like(t["timestep"]) if flux.config.guidance_embeds else None}
    tolerance, kind = case.meta["tolerance"][str(dtype).removeprefix("torch.")], {torch.float32: "out32", torch.float64: "out64"}[dtype]
    tokens = lambda v: v.flatten(2).mT
    close = lambda v, name: torch.testing.assert_close(tokens(v), case.tensors[f"{kind}/{name}"], rtol=0, atol=tolerance)
    with torch.no_grad():
        independent = model(z, t["timestep"], **told, **shown)
        close(independent, "concat_attend_independent")
        for step in range(2):
            at_step(model, step)
            torch.testing.assert_close(model(z, t["timestep"], **told, **shown), independent, rtol=0, atol=1e-12 if kind == "out64" else 1e-5)
        at_step(model, None)
        if dtype == torch.float64:
            for place, name in [(0, "double_block0"), (flux.config.num_layers, "single_block0")]:
                for condition in names:
                    for part, letter in enumerate("kv", 1):
                        expected = case.tensors[f"cache64/{name}_{condition}_{letter}"]
                        torch.testing.assert_close(model.cache[place][condition][part], expected, rtol=0, atol=tolerance)
        model.pka = Visible(lambda reader, source: reader in MAIN or source in MAIN or reader == source)
        close(model(z, t["timestep"], **told, **shown), "concat_attend")
        grid = z.shape[2:]
        for arm in ("concat", "joint", "additive", "window"):
            model.pka = mix_of(arm, flux.config, grid)
            if dtype == torch.float64:
                close(model(z, t["timestep"], **told), "no_conditions")
        images = [v for name, v in shown.items() if name not in subjects]
        assert images and subjects  # PKA reads fewer of the conditions than concatenation, and differs
        model.pka, keywords = mix_of("joint", flux.config, grid), torch.zeros(len(z), 1, t["text"].shape[1], dtype=torch.bool)
        assert (model(z, t["timestep"], keywords=keywords, **told, **shown) - independent).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ["joint", "window", "concat", "additive"])
def test_without_conditions_the_model_is_plain_flux(arm):
    """With its denoiser's adapter in the weights."""
    model, given = random_model(arm), inputs(())
    found, tokens = model(**given), pka.pack(given["z"], 2)
    merge(model.flux, DENOISER)
    plain = model.flux(tokens, given["states"], given["pooled"], given["t"], image_ids(GRID), torch.zeros(5, 3))
    torch.testing.assert_close(found, pka.unpack(plain, GRID, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["joint", "additive", "concat", "window"])
def test_the_cache_is_exact_at_every_step(arm):
    model, given = random_model(arm), inputs()
    given["keywords"] = torch.zeros_like(given["keywords"])  # M = 1, at all steps
    with torch.no_grad():
        for step, t in enumerate((0.9, 0.4, 0.1)):
            given["t"], given["z"] = torch.full((2,), t), torch.randn_like(given["z"])
            at_step(model, None)
            expected = model(**given)
            at_step(model, step)
            torch.testing.assert_close(model(**given), expected, rtol=1e-5, atol=1e-5)


def test_a_sampler_computes_conditions_once(monkeypatch):
    model, given, calls = random_model(), inputs(), []
    whole = model.flux.condition_cache
    monkeypatch.setattr(model.flux, "condition_cache", lambda shown: calls.append([branch.name for branch in shown]) or whole(shown))
    noise, _ = given.pop("z"), given.pop("t")
    null = {"states": torch.zeros_like(given["states"]), "keywords": torch.zeros_like(given["keywords"])}
    drawn = pka.sample(model, noise, given, null, steps=4, scale=2.0)
    assert calls == [list(CONDITIONS)] and drawn.shape == noise.shape and model.step is None
    assert {mask.shape for mask in model.pka.masks.values()} == {(4, N)} and len(model.pka.masks) == 3


def test_guidance_keeps_the_conditions():
    """v_null + w (v - v_null), where the null half differs in its text alone."""
    model, given = random_model("concat"), inputs()
    noise, _ = given.pop("z"), given.pop("t")
    null = {"states": torch.zeros_like(given["states"])}
    drawn, one = pka.sample(model, noise, given, null, steps=1, scale=3.0), torch.ones(2)
    with torch.no_grad():
        v, v_null = (model(noise, one, **told) for told in (given, given | null))
    torch.testing.assert_close(drawn, noise - (v_null + 3 * (v - v_null)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ["joint", "additive", "concat", "window"])
def test_only_adapters_and_gates_learn(arm):
    model, given = random_model(arm), inputs()
    pka.flow_loss(model, given.pop("z"), given.pop("t"), **given).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("pka.gates.") for name in learning)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == learning  # a resumed run asks for the state of all
    assert all(any(f".{name}." in found for found in learning) for name in (*CONDITIONS, DENOISER))
    assert {name for name in learning if name.startswith("pka.")} == (
        {f"pka.gates.{i}.{part}" for i in range(3) for part in ("paa", "ksa")} if arm == "additive" else set()
    )


def test_an_untrained_adapter_changes_nothing():
    given, a, b = inputs(), random_model(rank=2, trained=False), random_model(rank=4, trained=False)
    assert torch.equal(a(**given), b(**given))


def test_a_control_meets_the_conditions_as_one_more_key():
    class Watcher:
        def __init__(self):
            self.seen = []

        def weights(self, site, p):
            self.seen.append(p)

    model, given = random_model(), inputs(("edges",))
    plain = model(**given)
    with controlled(model.flux, Watcher()) as watcher:
        torch.testing.assert_close(model(**given), plain, rtol=1e-4, atol=1e-5)
    assert [p.shape[-2:] for p in watcher.seen] == [(N, N), (5 + N, 5 + N + 1)] * 3
    joint = watcher.seen[1]
    assert (joint[:, :, :5, -1] == 0).all() and (joint[:, :, 5:, -1] > 0).all()


def test_half_precision():
    model, given = random_model(), inputs()
    exact = model(**given)
    half = {name: t.bfloat16() if t.is_floating_point() and name != "t" else t for name, t in given.items()}
    found = model.bfloat16()(**half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.06 * exact.abs().max().item())


def test_published_size():
    """FLUX.1-dev with two adapters of rank 4 on OminiControl's targets, counted by hand; nothing is allocated."""
    with torch.device("meta"):
        model = ConditionedFlux(FluxTransformer2DModel(FluxConfig()), ("canny",), (), PKA(), 4)
        d = 3072
        shapes = [(64, d)] + 19 * [(d, 6 * d), (d, d), (d, d), (d, d), (d, d), (4 * d, d)]
        shapes += 38 * [(d, 3 * d), (d, d), (d, d), (d, d), (d, 4 * d), (5 * d, d)]
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters, unread = (4 * sum(i + o for i, o in part) for part in (2 * shapes, [(d, d), (d, 4 * d), (5 * d, d)]))
    assert gpu.count_params(model) == 11_901_408_320 + adapters and learning == adapters - unread


def test_csas_is_logit_normal():
    """Quantiles in closed form; t = 1 is noise, so the median is above one half."""
    for (mu, sigma), args in {(0.5, 1.5): (), (0.0, 1.0): (0.0, 1.0), (-0.5, 1.5): (-0.5, 1.5)}.items():
        t = csas(200_000, *args).double()
        for quantile in (0.1, 0.5, 0.9):
            expected = 1 / (1 + math.exp(-(mu + sigma * norm.ppf(quantile))))
            assert np.quantile(t.numpy(), quantile) == pytest.approx(expected, abs=0.005)


def test_flow_loss_in_closed_form():
    """A model that says v = ε - z from z_t and t has no loss where z is known to be zero: v = z_t / t."""

    class Oracle(nn.Module):
        def forward(self, z, t):
            return z / t[:, None, None, None]

    z, t = torch.zeros(3, 3, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    assert pka.flow_loss(Oracle(), z, t).item() == pytest.approx(0, abs=1e-10)
    assert pka.flow_loss(Oracle(), z + 1, t).item() > 0.1


# ---- published adapters ------------------------------------------------------------------------------------------------------------------


def omini_names() -> dict[str, tuple[int, int]]:
    """OminiControl's adapter of a FLUX as large as SMALL, by hand: module -> (in, out)."""
    d, double, single = 24, "transformer_blocks.0.", "single_transformer_blocks."
    found = {"x_embedder": (12, d), f"{double}norm1.linear": (d, 6 * d), f"{double}ff.net.2": (4 * d, d), f"{double}attn.to_out.0": (d, d)}
    found |= {f"{double}attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
    for i in range(2):
        found |= {f"{single}{i}.norm.linear": (d, 3 * d), f"{single}{i}.proj_mlp": (d, 4 * d), f"{single}{i}.proj_out": (5 * d, d)}
        found |= {f"{single}{i}.attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
    return found


def omini_file(rank=3) -> dict[str, torch.Tensor]:
    state = {}
    for module, (i, o) in omini_names().items():
        state |= {f"transformer.{module}.lora_A.weight": torch.randn(rank, i), f"transformer.{module}.lora_B.weight": torch.randn(o, rank)}
    return state


def test_adapters_load_under_peft_s_names(tmp_path):
    for name in CONDITIONS:
        save_file(omini_file(), tmp_path / f"{name}.safetensors")
    base = random_model().flux.state_dict()
    flux = FluxTransformer2DModel(SMALL)
    flux.load_state_dict({name: t for name, t in base.items() if "lora" not in name})
    model, given = pka.load_adapters(flux, tmp_path, CONDITIONS, SUBJECTS, PKA()), inputs()
    expected = random_model(rank=3)
    for name, matrix in expected.flux.named_parameters():
        if DENOISER in name:  # of which OminiControl has none
            nn.init.zeros_(matrix)
    for name in CONDITIONS:
        for path, tensor in load_file(tmp_path / f"{name}.safetensors").items():
            module, part, _ = path.removeprefix("transformer.").rsplit(".", 2)
            expected.flux.get_submodule(module).get_submodule(f"{part}.{name}").weight.data = tensor
    assert torch.equal(model(**given), expected(**given))


@pytest.mark.parametrize("arm", ["joint", "additive"])
def test_saved_adapters_come_back(arm, tmp_path):
    model, given = random_model(arm), inputs()
    save_adapters(model, tmp_path)
    assert {f"transformer.{module}.lora_{x}.weight" for module in omini_names() for x in "AB"} == set(load_file(tmp_path / "edges.safetensors"))
    flux = FluxTransformer2DModel(SMALL)
    flux.load_state_dict({name: t for name, t in model.flux.state_dict().items() if "lora" not in name})
    again = pka.load_adapters(flux, tmp_path, CONDITIONS, SUBJECTS, mix_of(arm, SMALL, GRID))
    assert torch.equal(model(**given), again(**given))


def test_hostile_adapters(tmp_path):
    load = lambda: pka.load_adapters(FluxTransformer2DModel(SMALL), tmp_path, ("edges",), (), PKA())
    with pytest.raises(UserError, match="edges.safetensors is missing"):
        load()
    (tmp_path / "edges.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load()
    save_file({name: t[:, :1].contiguous() for name, t in omini_file().items()}, tmp_path / "edges.safetensors")
    with pytest.raises(UserError, match="for another model"):
        load()


def test_wrong_calls():
    model, given = random_model(), inputs()
    with pytest.raises(ValueError, match="no adapter for pose"):
        model(**given, pose=given["edges"])
    with pytest.raises(ValueError, match="a spatial condition has the size of the image"):
        model(**given | {"edges": given["edges"][..., :4]})
    with pytest.raises(UserError, match="--variant both: take one of concat, joint"):
        mix_of("both", SMALL, GRID)
    cfg = training.SCALES["smoke"]
    with pytest.raises(UserError, match="judged without --data"):
        evaluation.evaluate(replace(cfg, data="x"))


# ---- scenes and scores ------------------------------------------------------------------------------------------------------------------


def test_scenes_say_and_show_what_they_should():
    s = training.scene_set(40, 7)
    for scene, text, keyword in zip(s.scenes, s.captions, s.keywords, strict=True):
        first, *others = scene.things
        listed = text.split()
        assert keyword.sum() == 1 and listed[place := int(keyword[0].int().argmax())] == first.shape and listed[place - 1] == "a"
        assert f"on a {scene.background} background" in text and not set(listed) & {"left", "right", "at", "above", "below"}
        assert len(set(listed) & set(COLOURS)) == len(others) and all(thing.colour in listed[place + 2 :] for thing in others)
        assert all(thing.texture in ("plain", "striped") for thing in scene.things)
    shades = torch.tensor([[0, 255, 255], [0, 178, 255]])[torch.tensor([len(scene.things) - 1 for scene in s.scenes])]
    depth = shades.gather(1, s.instances.flatten(1).long()).view_as(s.instances)  # the last thing is in front
    assert torch.equal(s.depth, depth[:, None].expand_as(s.depth).to(torch.uint8))
    middle = s.subject[:, :, 8, 8].float() / 255
    solid = torch.tensor([scene.things[0].texture == "plain" and scene.things[0].shape != "ring" for scene in s.scenes])
    named = torch.tensor([np.clip(np.add(COLOURS[scene.things[0].colour], scene.things[0].jitter), 0, 1).tolist() for scene in s.scenes])
    torch.testing.assert_close(middle[solid], named[solid].float(), rtol=0, atol=0.01)
    assert {scene.things[0].shape for scene in s.scenes} == set(SHAPES)


def test_outline_by_loops():
    instances = torch.randint(0, 3, (2, 5, 6), dtype=torch.uint8)
    found = evaluation.outline(instances)
    for b in range(2):
        for y in range(5):
            for x in range(6):
                near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                expected = any(0 <= v < 5 and 0 <= u < 6 and instances[b, v, u] != instances[b, y, x] for v, u in near)
                assert found[b, y, x].item() == expected


def test_scenes_themselves_score_high_and_shifted_ones_do_not():
    s = training.scene_set(40, 7)
    own = evaluation.quality(s.images, s)
    assert min(own.values()) > 85, own  # smoothed edges make the mask a little larger
    moved = evaluation.quality(s.images.roll(8, 3), s)
    assert moved["edge F1"] < 60 and moved["mask IoU"] < 60
    swapped = evaluation.quality(s.images.flip(1), s)  # red for blue
    assert swapped["subject match"] < 60 and swapped["text accuracy"] < 90 and swapped["mask IoU"] == pytest.approx(own["mask IoU"], abs=1)
    assert set(own) == set(evaluation.MEASURES)


def test_truth_is_of_the_scene_s_own_factors():
    s = training.scene_set(4, 7)
    assert torch.equal(truth(s.scenes)[:, 1], torch.tensor([SHAPES.index(scene.things[0].shape) for scene in s.scenes]))


def test_exponents_in_closed_form():
    c = [1, 2, 4, 8, 16]
    seconds = {"none": [3.0] * 5, "line": [3 + 0.5 * n for n in c], "square": [3 + 0.1 * n**2 for n in c]}
    assert evaluation.exponents({"conditions": c, "seconds": seconds}) == pytest.approx({"line": 1, "square": 2})


def test_costs_count_what_is_cached():
    cfg = training.SCALES["smoke"]
    cost = evaluation.layer_costs(cfg, text=4, heads=2, head_dim=16)
    assert cost["conditions"] == [1, 2] and set(cost["bytes"]) == {"concat", "cached", "joint", "additive", "window"}
    assert cost["stored"] == [2 * 4 * c * 16 * 32 for c in (1, 2)]  # K and V, four bytes, 16 tokens of 32 channels
    assert all(b > a for a, b in pairwise(cost["bytes"]["concat"]))


def test_where_concatenation_looks():
    """Attention made to fall on the own position, and on the subject from its object alone."""
    cfg = training.SCALES["smoke"]
    test = training.scene_set(4, 7)
    on = F.max_pool2d((test.instances == 1).float()[:, None], 4).flatten(1) > 0

    class Forced:
        def logits(self, site, s):
            text, n = 18, 64
            if s.shape[2] != text + n:
                return None
            s = torch.full_like(s, -50.0)
            s[:, :, text:, text + n : text + 2 * n] = torch.where(torch.eye(n, dtype=torch.bool), 0.0, -50.0)
            s[:, :, text:, text + 2 * n] = torch.where(on, 0.0, -50.0)[:, None]
            return s

    model = training.build(cfg, "concat")
    with controlled(model.flux, Forced()):
        look = evaluation.attention_of(cfg, model, test, times=(0.5,))
    assert look["diagonal"] == pytest.approx(64, rel=1e-3) and look["on the object"] == pytest.approx(1, rel=1e-3)
    assert look["object"] == pytest.approx(on.float().mean().item())
    free = evaluation.attention_of(cfg, model, test, times=(0.5,))
    assert 0 < free["on the object"] < 1 and 0 < free["diagonal"] < 64 and np.array(free["map"]).shape == (64, 64)


# ---- SubjectSpatial200K ------------------------------------------------------------------------------------------------------------------


def marks(composite, consistency=5, quality=5):
    return {"compositeStructure": composite, "objectConsistency": consistency, "imageQuality": quality}


@pytest.mark.parametrize(
    ("given", "part"),
    [(marks(5), "train"), (marks(4), "test"), (marks(3), "test"), (marks(2), "neither"), (marks(5, 4), "neither"), (marks(4, 5, 4), "neither")],
)
def test_the_split_of_unicombine(given, part):
    assert training.belongs(given) == part


def encoded(*colours) -> dict:
    """Squares of these colours side by side, as the files store an image."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate([np.full((8, 8, 3), colour, np.uint8) for colour in colours], 1)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def row(mark, colour=(200, 0, 0)) -> dict:
    description = {"item": "Garden Chair", "description_0": "A chair on a lawn.", "description_1": "Another."}
    shown = {"image": encoded(colour, (0, 0, 200)), "canny": encoded((255, 255, 255)), "depth": encoded((90, 90, 90))}
    return shown | {"description": description, "quality_assessment": mark, "bbox": [0.1, 0.1, 0.2, 0.2], "collection": "collection_2"}


def parquet_folder(tmp_path, rows):
    arrow = pytest.importorskip("pyarrow", reason="the dataset's files are parquet")
    from pyarrow import parquet

    (tmp_path / "data_labeled").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data_labeled/train-00000.parquet", row_group_size=2)
    return tmp_path


def test_subject_spatial_reads(tmp_path):
    rows = [row(marks(4)), row(marks(5), (10, 20, 30)), row(None), row(marks(2)), row(marks(5), (40, 50, 60))]
    found = training.SubjectSpatial(parquet_folder(tmp_path, rows), "train", ("canny", "subject"), 16)
    assert len(found) == 2
    shown, caption, item = found[1]
    assert list(shown) == ["image", "canny", "subject"] and {t.shape for t in shown.values()} == {(3, 16, 16)}
    assert [t[:, 0, 0].tolist() for t in shown.values()] == [[40, 50, 60], [255] * 3, [0, 0, 200]]
    assert (caption, item) == ("A chair on a lawn.", "Garden Chair")
    assert len(training.SubjectSpatial(tmp_path, "test", ("depth",), 16)) == 1


def test_hostile_datasets(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no row for train in its \*.parquet files"):
        training.SubjectSpatial(tmp_path, "train", ("canny",), 16)
    with pytest.raises(UserError, match="holds an image that cannot be read"):
        training.opened({"bytes": b"no image"}, tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    training.parquet.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="`pip install pyarrow` reads them"):
            training.SubjectSpatial(tmp_path, "train", ("canny",), 16)
    pytest.importorskip("pyarrow", reason="the dataset's files are parquet")
    with pytest.raises(UserError, match="not a whole parquet file"):
        training.SubjectSpatial(tmp_path, "train", ("canny",), 16)


# ---- FLUX.1's directory ------------------------------------------------------------------------------------------------------------------


def flux_folder(directory):
    """A published directory of a small FLUX: the files and layout of diffusers' pipeline."""
    transformers = pytest.importorskip("transformers", reason="FLUX.1's T5 comes from it")
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = replace(SMALL, in_channels=64, joint_attention_dim=16, pooled_projection_dim=16)
    flux = FluxTransformer2DModel(config)
    for p in flux.parameters():
        nn.init.normal_(p, std=0.1)
    flux.save_pretrained(directory / "transformer")
    vae = AutoencoderConfig(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=16, norm_num_groups=2, scaling_factor=0.36, shift_factor=0.12,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    AutoencoderKL(vae).save_pretrained(directory / "vae")
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, eos_token_id=49407)).save_pretrained(directory / "text_encoder")
    t5 = transformers.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(t5).save_pretrained(directory / "text_encoder_2")
    table = {word: i for i, word in enumerate(["<pad>", "<unk>", "A", "chair", "on", "a", "lawn", "."])}
    words = Tokenizer(models.WordLevel(table, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("tokenizer", "tokenizer_2"):
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(directory / name)
    return directory


def test_flux_trains_and_is_evaluated(tmp_path, monkeypatch):
    """The path of the full scale on a small FLUX in the published layout; where there is no pyarrow, on the same rows without files."""
    directory = flux_folder(tmp_path / "flux")

    class Rows(training.Dataset):
        def __init__(self, root, part, conditions, size):
            self.size = size

        def __len__(self):
            return 2

        def __getitem__(self, index):
            images = {name: torch.randint(0, 255, (3, self.size, self.size), dtype=torch.uint8) for name in ("image", "canny", "subject")}
            return images, "A chair on a lawn.", "Garden Chair"

    monkeypatch.setattr(training, "SubjectSpatial", Rows)
    cfg = replace(training.SCALES["full"], data="x", flux=str(directory), out=tmp_path / "run", steps=2, batch=2, size=32, workers=0)
    training.train(cfg)
    weights = tmp_path / "run/flux/joint/0"
    assert {path.name for path in weights.glob("*.safetensors")} >= {"canny.safetensors", "subject.safetensors"}
    assert any(t.abs().sum() > 0 for name, t in load_file(weights / "canny.safetensors").items() if "lora_B" in name)
    found = evaluation.evaluate_published(replace(cfg, weights=weights, test_scenes=2))
    assert found["images"] == 2 and set(found) == {"images", "ssim", "canny_f1"} and all(map(math.isfinite, found.values()))


def test_keywords_are_the_item_s_last_word(tmp_path):
    encoders = pka.Encoders(str(flux_folder(tmp_path)), torch.device("cpu"), torch.float32)
    told = encoders.text(["A chair on a lawn .", "A chair on a lawn ."], ["Garden Chair", "Red Ball"], length=8)
    assert told["keywords"].squeeze(1).tolist() == [[False, True] + 6 * [False], 8 * [False]]
    assert told["states"].shape == (2, 8, 16) and told["pooled"].shape == (2, 16)
    images = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8)
    assert encoders.latents(images).shape == (1, 16, 4, 4) and encoders.pixels(encoders.latents(images)).shape == images.shape


def test_likeness_of_a_picture_with_itself():
    image = (torch.arange(64 * 64).reshape(64, 64) % 64 > 31).to(torch.uint8).mul(255).expand(3, 64, 64)
    edges = torch.from_numpy(255 * evaluation.canny(image.permute(1, 2, 0).numpy().mean(2) / 255)).to(torch.uint8).expand(3, 64, 64)
    same = evaluation.likeness(image, {"image": image, "canny": edges})
    assert same["ssim"] == pytest.approx(1) and same["canny_f1"] == pytest.approx(1)
    other = evaluation.likeness(255 - image.roll(9, 2), {"image": image, "canny": edges})
    assert other["ssim"] < 0.9 and other["canny_f1"] < 0.5
