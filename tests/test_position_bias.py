"""The position-bias networks against the authors' code (goldens), closed forms and brute force."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from common.attention import controlled
from common.backbones.llama import Llama, LlamaConfig
from common.errors import UserError
from papers.position_bias import eval as evaluation
from papers.position_bias.model import (
    SAN,
    attention_maps,
    causal_walk,
    concentration_bound,
    decay_bounds,
    decay_walk,
    equal_scores,
    least_weight,
    log_mask,
    rollout,
    rope_bounds,
    sink,
    window_hops,
)
from papers.position_bias.train import FIRST, LAST, MIDDLE, Config, Net, Task, build, nets
from tests.goldens import Case, cases

CASES = cases("position_bias")
VARIANTS = [(case, name.removesuffix("/logits_f32")) for case in CASES for name in case.tensors if name.endswith("/logits_f32")]
BITS = {"f32": torch.float32, "f64": torch.float64}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


def mask_options(ctor: dict) -> dict:
    return {"gamma": ctor["gamma"], "window": ctor["window_size"], "prefix": ctor["num_prefixes"]}


def golden_network(case: Case, key: str) -> SAN:
    c, (mask, position, residual) = case.meta["ctor"], key.split("_")
    model = SAN(
        c["in_channels"], c["hidden_channels"], c["out_channels"], c["num_attn_layers"], c["num_mlp_layers"], mask=mask, position=position,
        residual=residual == "res", base=c["base"], bias=c["bias"], **mask_options(c),
    )  # fmt: skip
    for layer in model.attn_layers[1:]:  # in the authors' code the argument reaches only the first layer
        layer.base = 10_000.0
    # the authors' log M has numpy's rounding of float32; what `log_mask` gives is compared below
    with np.errstate(divide="ignore"):
        rounded = torch.from_numpy(np.log(case.tensors[f"mask/{mask}"].numpy()))
    model.log_mask = lambda n: rounded
    model.load_state_dict(case.state("param/"))
    return model


@pytest.mark.parametrize(("case", "key"), VARIANTS, ids=lambda x: x if isinstance(x, str) else x.name)
@torch.no_grad()
def test_golden_network(case, key):
    model, t, tolerance = golden_network(case, key), case.state(f"{key}/"), case.meta["tolerance"]
    maps = attention_maps(model, case.tensors["x"])
    close(maps, t["attn_f32"], tolerance["f32"])
    close(rollout(maps)[:, -1], t["rollout_f32"], tolerance["f32"])
    for bits, dtype in BITS.items():
        if f"logits_{bits}" in t:
            close(model.to(dtype)(case.tensors["x"].to(dtype)), t[f"logits_{bits}"], tolerance[bits])


@pytest.mark.parametrize(("case", "kind"), [(c, n.removeprefix("mask/")) for c in CASES for n in c.tensors if n.startswith("mask/")], ids=str)
def test_golden_masks(case, kind):
    expected = case.tensors[f"mask/{kind}"]
    close(log_mask(kind, len(expected), **mask_options(case.meta["ctor"])).exp(), expected, 1e-6)


# ---- the network ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal", "decay", "window", "prefix"])
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
@torch.no_grad()
def test_a_layer_token_by_token(mask, rope):
    """Sums over visible tokens written out; RoPE as complex numbers."""
    n, d = 6, 8
    model = SAN(d, d, 3, 1, mask=mask, position="rope" if rope else "none", gamma=0.7, window=3, prefix=2).double()
    x, layer = torch.randn(1, n, d, dtype=torch.float64), model.attn_layers[0]
    q, k, v = (x[0] @ w.weight.T for w in (layer.query_projection, layer.key_projection, layer.value_projection))
    if rope:
        turn = torch.polar(torch.ones(n, d // 2), torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d))
        q, k = (torch.view_as_real(torch.view_as_complex(y.reshape(n, d // 2, 2)) * turn).flatten(1) for y in (q, k))
    m = {
        "full": lambda i, j: 1.0, "causal": lambda i, j: j <= i, "decay": lambda i, j: 0.7 ** (i - j) if j <= i else 0.0,
        "window": lambda i, j: i - 3 < j <= i, "prefix": lambda i, j: j < 2 if i < 2 else j <= i,
    }[mask]  # fmt: skip
    expected = torch.zeros(n, d, dtype=torch.float64)
    for i in range(n):
        weight = [float(m(i, j)) * math.exp(q[i] @ k[j] / d**0.5) for j in range(n)]
        expected[i] = sum(w * v[j] for j, w in enumerate(weight)) / sum(weight)
    close(layer(x, model.log_mask(n))[0], expected, 1e-6 if rope else 1e-12)


def test_a_network_without_mask_and_positions_sees_a_set():
    """The order of the tokens before the last changes nothing; a causal mask or sinusoids make it matter."""
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    shuffled = torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)
    change = lambda **options: (lambda m: (m(x) - m(shuffled)).abs().max().item())(SAN(8, 8, 5, 2, **options).double())
    assert change(mask="full") < 1e-14
    assert change(mask="causal") > 1e-5 and change(mask="full", position="sin") > 1e-5 and change(mask="full", position="rope") > 1e-5


def test_wrong_arguments_are_named():
    for arguments, message in [({"mask": "prefx"}, "take full, causal"), ({"position": "alibi"}, "take none, sin or rope")]:
        with pytest.raises(ValueError, match=message):
            SAN(8, 8, 2, 1, **arguments)(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="in_channels = hidden_channels"):
        SAN(8, 4, 2, 1, residual=True)


def test_a_control_can_move_attention():
    """Put all weight on token 3 of the only layer: the logits are those of its value."""

    class OnThird:
        def weights(self, site, p):
            assert (site.kind, site.layer, site.heads) == ("self", 0, 1)
            return torch.zeros_like(p).index_fill(-1, torch.tensor([2]), 1.0)

    model, x = SAN(8, 8, 4, 1), torch.randn(2, 5, 8)
    with controlled(model, OnThird()):
        found = model(x)
    y = model.attn_layers[0].value_projection(x[:, 2])
    for linear in model.mlp_layers:
        y = linear(y).relu()
    close(found, model.lin(y), 1e-6)


# ---- walks and theorems -----------------------------------------------------------------------------------------------------------------


def random_maps(mask: torch.Tensor, layers: int, sharpness: float) -> torch.Tensor:
    return (sharpness * torch.randn(layers, *mask.shape, dtype=torch.float64) + mask).softmax(-1)


def test_rollout_is_the_sum_over_all_walks():
    maps = random_maps(log_mask("causal", 4), 3, 2.0)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, a, b, j in product(range(4), repeat=4):
        expected[i, j] += maps[2, i, a] * maps[1, a, b] * maps[0, b, j]
    close(rollout(maps)[-1], expected, 1e-14)
    close(rollout(maps).sum(-1), torch.ones(3, 4), 1e-14)


@pytest.mark.parametrize("layers", [1, 2, 5, 16])
def test_closed_form_under_a_causal_mask(layers):
    walks = rollout(equal_scores(log_mask("causal", 20), layers))
    assert (walks[-1] - causal_walk(20, layers)).abs().max() < 1e-12


@pytest.mark.parametrize("gamma", [0.4, 0.8])
@pytest.mark.parametrize("layers", [1, 3, 12])
def test_closed_form_under_a_decay_mask(gamma, layers):
    """By counting: the share of compositions of x into t + 1 parts, each step weighted; far from the first token."""
    last = rollout(equal_scores(log_mask("decay", 240, gamma=gamma), layers))[-1, -1].flip(0)
    assert (last[:60].log() - decay_walk(60, layers - 1, -math.log(gamma))).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("mask", "options", "centre", "hops"), [("causal", {}, 1, 1), ("window", {"window": 4}, 1, 4), ("prefix", {"prefix": 3}, 3, 1)], ids=str
)
@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0])
def test_bounds_of_theorems_1_to_3(mask, options, centre, hops, sharpness):
    """They hold, and bind all nodes but the centre."""
    n = 13
    assert mask != "window" or window_hops(n, 4) == hops
    maps = random_maps(log_mask(mask, n, **options), 20, sharpness)
    bound = concentration_bound(least_weight(maps, log_mask(mask, n, **options)), 20, n, centre=centre, hops=hops)
    assert (rollout(maps) <= bound + 1e-12).all() and bound.shape == (20, 1, n)
    assert (bound[-1, 0, centre:] < 1).all() and (bound[..., :centre] == 1).all()


def test_the_causal_bound_is_reached():
    """All queries put the least weight on the tokens before j and the rest on themselves: P decays as fast as the bound says, no faster."""
    n, e = 5, 0.1
    a = torch.tril(torch.full((n, n), e, dtype=torch.float64), -1)
    a += torch.diag(1 - a.sum(1))
    walks = rollout(a.expand(7, n, n))
    close(walks.diagonal(dim1=1, dim2=2), concentration_bound(e, 7, n)[:, 0], 1e-14)


def test_decay_bounds_hold_and_are_reached_with_equal_scores():
    mask, n = log_mask("decay", 9, gamma=0.6), 9
    assert evaluation.decay_violation(random_maps(mask, 4, 2.0), mask) <= 1e-12
    distance = (torch.arange(n)[:, None] - torch.arange(n)).double()
    low, high = decay_bounds(distance, -math.log(0.6), 0.0)
    a = mask.softmax(-1)
    close(a[1, 1], high[1, 1], 1e-14)  # the sum of two terms is the least there is
    assert (a - low)[mask > -math.inf].min() > 0 and (a - low)[-1, -1] < 0.6**n


def test_a_violated_theorem_would_show():
    """The measures of eval.py on maps that break the mask's promise."""
    causal, decay = log_mask("causal", 9), log_mask("decay", 9, gamma=0.6)
    assert evaluation.excess(random_maps(causal, 20, 1.0), causal) <= 0
    assert evaluation.excess(equal_scores(log_mask("full", 9), 20), causal) > 0.01  # walks go forward
    assert evaluation.decay_violation(decay.softmax(-1)[None], decay) <= 1e-12
    assert evaluation.decay_violation(3 * decay.softmax(-1)[None], decay) > 0.1  # rows that sum to 3


def test_rope_bounds():
    x = torch.arange(0, math.pi / 0.1)
    low, high = rope_bounds(x.double(), 0.1, 8.0)
    exact = (8 * ((0.1 * x.double()).cos() - 1)).exp()
    assert (low <= exact).all() and (exact <= high).all() and low[0] == high[0] == 1


def test_known_depths_and_peaks():
    """P(first) and peaks that follow by hand from powers of small matrices."""
    first = rollout(equal_scores(log_mask("causal", 32), 16))[:, -1, 0]
    assert [round(first[t - 1].item(), 3) for t in (1, 2, 4, 8, 16)] == [0.031, 0.127, 0.463, 0.917, 1.0]
    peaks = dict(map(tuple, evaluation.decay_peaks()["0.223"]))
    assert [peaks[min(peaks, key=lambda x, t=t: abs(x - 4 * t))] in (4 * t, 4 * t - 1) for t in (1, 5, 15)] == [True] * 3
    assert evaluation.slope_error() < 1e-4 and evaluation.depths_by_window()[0] > 31


def test_sinks_are_column_means():
    maps = torch.tensor([[[1.0, 0, 0], [0.6, 0.4, 0], [0.2, 0.3, 0.5]]])[None]
    close(torch.tensor(sink(maps)), torch.tensor([0.6, 0.35, 0.5]), 1e-6)
    assert evaluation.sink_margin([0.6, 0.35, 0.5], 1) == pytest.approx(0.1)


# ---- the task ---------------------------------------------------------------------------------------------------------------------------

SMALL = Config(dim=16, classes=50, noise=0.0, scale=0.25)


def test_sequences_are_pairs_of_item_and_label():
    task = Task(SMALL, seed=3)
    classes, asked = task.arrangements(200, (), seed=4)
    assert (classes.sort(1).values.view(-1, 2, 4).diff(dim=2) == 0).all() and (classes.amin(1) < classes.amax(1)).all()
    assert asked.unique().tolist() == list(range(8))
    tokens, label = task.training(classes, asked)
    assert tokens.shape == (200, 17, 16)
    close(tokens[:, 0:16:2], task.means[classes], 1e-6)
    close(tokens[:, 1::2], task.labels[task.label_of[classes]], 1e-6)
    close(tokens[:, -1], task.means[classes[torch.arange(200), asked]], 1e-6)
    assert torch.equal(label, task.label_of[classes[torch.arange(200), asked]])


@pytest.mark.parametrize(("favoured", "items"), [((FIRST,), [0]), ((MIDDLE,), [4]), ((LAST,), [7]), ((FIRST, LAST), [0, 7])])
def test_biased_data_asks_for_the_favoured_items(favoured, items):
    assert Task(SMALL, 0).arrangements(500, favoured, 0)[1].unique().tolist() == items


def test_noise_keeps_the_length():
    task = Task(Config(), 0)
    tokens, _ = task.training(*task.arrangements(2000, (), 0))
    assert tokens.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.02)
    inside = (tokens[:, -1] - tokens[:, 0]).square().sum(-1)  # 1 / (1 + 0.75²) of the variance is shared in a class
    same = task.arrangements(2000, (), 0)
    same = same[0][:, 0] == same[0][torch.arange(2000), same[1]]
    assert inside[same].mean().item() == pytest.approx(2 * 0.5625 / 1.5625, abs=0.05) and inside[~same].mean().item() == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("right", "wrong", "a", "b"), [(FIRST, LAST, 0, 7), (MIDDLE, LAST, 4, 7), (LAST, FIRST, 7, 0)])
def test_conflicts_and_their_mirror_images(right, wrong, a, b):
    task = Task(Config(dim=16), 0)
    tokens, mirrored, answer = task.conflict(400, right, wrong)
    assert torch.equal(tokens[:, 2 * a], tokens[:, 2 * b])  # the same content twice
    close(tokens[:, 2 * a + 1], task.labels[answer], 1e-6)
    differ = (tokens[:, 2 * a + 1] != tokens[:, 2 * b + 1]).any(-1).float().mean().item()
    assert differ == pytest.approx(4 / 7 * 31 / 32, abs=0.1)
    close(mirrored[:, 2 * b + 1], task.labels[answer], 1e-6)
    others = [i for i in range(17) if i // 2 not in (a, b)]
    assert torch.equal(mirrored[:, others], tokens[:, others]) and torch.equal(mirrored[:, 2 * a + 1], tokens[:, 2 * b + 1])


def test_a_network_that_answers_from_an_end_has_the_gap_of_that_end(monkeypatch, tmp_path):
    """A reader of the first label wins wherever labels differ; its gaps are 4/7, 4/7 and about 0."""
    cfg = Config(dim=16, test_sequences=2000, out=tmp_path, noise=0.75)

    class ReadsFirst(torch.nn.Linear):
        def forward(self, tokens):
            return -torch.cdist(tokens[:, 1], Task(cfg, 5).labels)

    monkeypatch.setattr(evaluation, "load", lambda cfg, name, seed: ReadsFirst(1, 1))
    found = evaluation.behaviour(cfg, "shallow none", 5)
    assert found["gaps"][:2] == pytest.approx([4 / 7 * 31 / 32] * 2, abs=0.04) and abs(found["gaps"][2]) < 1e-12
    assert found["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert evaluation.early([0.2, 0.4, 0.0]) == pytest.approx(0.3) and evaluation.u_shape([0.2, 0.0, -0.1]) == pytest.approx(0.1)


def test_every_claim_has_its_networks():
    found = nets(Config())
    assert len(found) == 18 and list(found)[:3] == ["deep none", "deep decay", "deep rope"]
    assert found["causal rope"] == Net("causal", "rope", 2, True, (FIRST, LAST)) and found["deep decay"] == Net("decay", "none", Config().deep)
    assert build(Config(), found["window"]).log_mask(17)[16, 7] == -math.inf and build(Config(), found["window"]).log_mask(17)[16, 8] == 0
    assert set(nets(Config(residual_depths=(10,)))) - set(found) == {"residual 10"}


# ---- a real model -----------------------------------------------------------------------------------------------------------------------


def test_walk_through_a_llama(tmp_path):
    """A published directory with a tokenizer: one list per layer; the first layer's walk is its own map, and mixing keeps half at home."""
    model = Llama(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2))
    model.save_pretrained(tmp_path / "llama")
    words = {f"w{i}": i for i in range(20)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "llama/tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 20}" for i in range(50)))
    cfg = Config(weights=tmp_path / "llama", data=str(tmp_path / "text.txt"), device="cpu")
    found = evaluation.evaluate_published(cfg, tokens=12)
    alone, half = found["P(z_12 = 1), attention alone, by layer"], found["P(z_12 = 1), half residual, by layer"]
    assert len(alone) == len(half) == 3 and half[0] == pytest.approx(alone[0] / 2, abs=1e-4) and 0 < alone[-1] <= 1
    with pytest.raises(UserError, match=r"give a \.txt file"):
        evaluation.evaluate_published(Config(weights=tmp_path / "llama", data=str(tmp_path / "missing.txt"), device="cpu"))
    with pytest.raises(UserError):
        evaluation.evaluate_published(Config(weights=tmp_path / "nowhere", data=str(tmp_path / "text.txt"), device="cpu"))
