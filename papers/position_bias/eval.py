"""Measure the claims of paper.toml: theorems on exact, random and trained attention maps, position bias of the trained networks."""

import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import gpu
from common.backbones.llama import Llama
from common.data import text
from common.errors import UserError
from common.loop import load_run
from common.results import Measured, content_hash
from papers.position_bias.model import (
    SAN,
    attention_maps,
    causal_walk,
    concentration_bound,
    decay_bounds,
    decay_peak,
    decay_walk,
    equal_scores,
    last_rows,
    least_weight,
    log_mask,
    rollout,
    rope_bounds,
    rope_scores,
    sink,
    window_hops,
)
from papers.position_bias.train import FIRST, LAST, MIDDLE, PAIRS, Config, Task, build, nets, run_name

N = 32  # tokens, unless said otherwise
MASKS = {"causal": {}, "window": {"window": 8}, "prefix": {"prefix": 3}, "decay": {"gamma": 0.8}}
WINDOWS = (2, 4, 8, 16, 32)
RATES = (0.1, 0.2, -math.log(0.8), 0.4, 0.8, 1.2)  # m
ROPE = {"s": 320.0, "thetas": (0.015, 0.0075), "layers": (1, 2, 4, 6, 10, 16), "tokens": 200}
SINKS = {"causal": ("shallow none", 1), "window": ("window", 1), "prefix": ("prefix", 3)}  # network and its number of centre nodes

# ---- the theory with equal scores: deterministic ----------------------------------------------------------------------------------------


def causal_error() -> float:
    """C1b: of products of 1 to 16 maps, against exact fractions."""
    walks = rollout(equal_scores(log_mask("causal", N), 16))
    return max((walks[layers - 1] - causal_walk(N, layers)).abs().max().item() for layers in (1, 2, 4, 8, 16))


def slope_error() -> float:
    """C1c: relative, of the slope of log P(z_N = j) between 100 and 200 layers against -log j, j = 2..8."""
    rows, j = last_rows(log_mask("causal", N).softmax(-1), 200).log(), torch.arange(2, 9)
    slope = (rows[199] - rows[99])[1:8] / 100
    return (slope / -j.log() - 1).abs().max().item()


def depths_by_window() -> list[int]:
    """C2: layers until P(z_N = 1) > 0.99, the narrowest window first."""
    walks = [last_rows(log_mask("window", N, window=w).softmax(-1), 256)[:, 0] for w in WINDOWS]
    return [int((first > 0.99).nonzero()[0]) + 1 for first in walks]


def decay_peaks() -> dict[str, list[list[float]]]:
    """C3: by m, pairs (x*, distance of the largest P) for 2 to 24 layers of 800 tokens."""
    found = {}
    for m in RATES:
        rows = last_rows(log_mask("decay", 800, gamma=math.exp(-m)).softmax(-1), 24).flip(1)
        found[f"{m:.3g}"] = [[decay_peak(t, m), int(rows[t].argmax())] for t in range(1, 24)]
    return found


def decay_error() -> float:
    """C3b: of log P, over all distances for which the rows in between have whole sums."""
    worst = 0.0
    for m in RATES[1:]:
        rows = last_rows(log_mask("decay", 200, gamma=math.exp(-m)).softmax(-1), 16).flip(1)
        far = 200 - math.ceil(32 / m)
        worst = max([worst, *((rows[t, :far].log() - decay_walk(far, t, m)).abs().max().item() for t in range(16))])
    return worst


def rope_fit() -> float:
    """C4: R² of log A of the last query against the squared distance."""
    weights = rope_scores(N, 0.05, 8.0).softmax(-1)[-1].flip(0)
    return float(np.corrcoef(np.arange(N) ** 2, weights.log())[0, 1] ** 2)


def rope_violation() -> float:
    """C4b: of Lemma 4.6, where x θ < π."""
    worst = -math.inf
    for theta, s, n in ((0.05, 8.0, 62), (0.1, 8.0, 31), *((theta, ROPE["s"], ROPE["tokens"]) for theta in ROPE["thetas"])):
        weights = rope_scores(n, theta, s).softmax(-1)[-1].flip(0)
        low, high = rope_bounds(torch.arange(n, dtype=torch.float64), theta, s)
        ratio = weights / weights[0]
        worst = max(worst, (low - ratio).max().item(), (ratio - high).max().item())
    return worst


def rope_peaks() -> list[list[int]]:
    """C4c: distance of the largest P by θ and number of layers."""
    maps = [rope_scores(ROPE["tokens"], theta, ROPE["s"]).softmax(-1) for theta in ROPE["thetas"]]
    return [[int(last_rows(a, layers)[-1].flip(0).argmax()) for layers in ROPE["layers"]] for a in maps]


def least_step(peaks: list[list[int]]) -> int:
    deeper = [b - a for row in peaks for a, b in pairwise(row)]
    slower = [b - a for a, b in list(zip(*peaks, strict=True))[1:]]  # one layer peaks at 0 for any θ
    return min(deeper + slower)


# ---- the theory with content: random and trained weights --------------------------------------------------------------------------------


@torch.no_grad()
def random_maps(mask: str, layers: int, seed: int) -> Float[Tensor, "1 t n n"]:
    """Of Gaussian W_Q, W_K of deviation 1/√d, orthogonal W_V and Gaussian tokens, d = 16, in float64."""
    with gpu.seeded(seed, layers):
        model = SAN(16, 16, 1, layers, mask=mask, **MASKS[mask]).double()
        for layer in model.attn_layers:
            nn.init.normal_(layer.query_projection.weight, std=0.25)
            nn.init.normal_(layer.key_projection.weight, std=0.25)
            nn.init.orthogonal_(layer.value_projection.weight)
        return attention_maps(model, torch.randn(1, N, 16, dtype=torch.float64))


@torch.no_grad()
def trained_maps(cfg: Config, name: str, seed: int) -> tuple[Float[Tensor, "b t n n"], Float[Tensor, "n n"]]:
    """The maps of a trained network on new sequences, in float64, and its log M."""
    task, model = Task(cfg, seed), load(cfg, name, seed)
    with gpu.seeded(seed, 2):
        tokens, _ = task.training(*task.arrangements(cfg.walks, nets(cfg)[name].favoured, seed + 1000))
    maps = attention_maps(model.double(), tokens.double().to(next(model.parameters()).device)).cpu()
    return maps, model.log_mask(maps.shape[-1])


def excess(maps: Float[Tensor, "*b t n n"], mask: Float[Tensor, "n n"], centre: int = 1, hops: int = 1) -> float:
    """Largest P(z_i = j) minus its bound by Theorems 4.1-4.3, outside the centre, where it is 1."""
    bound = concentration_bound(least_weight(maps, mask), maps.shape[-3], maps.shape[-1], centre=centre, hops=hops)
    return (rollout(maps) - bound)[..., centre:].max().item()


def decay_violation(maps: Float[Tensor, "*b t n n"], mask: Float[Tensor, "n n"]) -> float:
    """Of Lemma 4.4 for i > 1. The scores are recovered from the maps: log A - log M is a score up to a constant of its row."""
    scores, allowed, n = maps.log() - mask, mask > -math.inf, len(mask)
    score_range = (scores.masked_fill(~allowed, -math.inf).amax(-1) - scores.masked_fill(~allowed, math.inf).amin(-1)).max().item()
    distance = torch.arange(n)[:, None] - torch.arange(n)
    low, high = decay_bounds(distance.double(), -mask[1, 0].item(), score_range)
    below, above = (low - maps)[..., 1:, :], (maps - high)[..., 1:, :]
    return max(below[..., allowed[1:]].max().item(), above[..., allowed[1:]].max().item())


def with_content(cfg: Config, seed: int) -> dict:
    """Everything of the theory that depends on a seed."""
    maps = {mask: random_maps(mask, 24, seed) for mask in MASKS}
    masks = {mask: log_mask(mask, N, **options) for mask, options in MASKS.items()}
    trained = {name: trained_maps(cfg, name, seed) for name in ("deep none", "shallow none", "deep decay", "shallow decay", "window", "prefix")}
    n, first = len(trained["window"][1]), rollout(maps["causal"])[0, :, -1, 0]
    hops, prefix = {"hops": window_hops(N, 8)}, [equal_scores(masks["prefix"], 64), random_maps("prefix", 64, seed)]
    kept = [rollout(m)[..., -1, -1, :3] for m in prefix]
    return {
        "causal_excess": max(
            excess(equal_scores(masks["causal"], 24), masks["causal"]),
            excess(maps["causal"], masks["causal"]),
            *(excess(*trained[f"{depth} none"]) for depth in ("deep", "shallow")),
        ),
        "graph_excess": max(
            excess(equal_scores(masks["window"], 24), masks["window"], **hops),
            excess(maps["window"], masks["window"], **hops),
            excess(*trained["window"], hops=window_hops(n, 9)),
            *(excess(m, masks["prefix"], centre=3) for m in prefix),
            excess(*trained["prefix"], centre=3),
        ),
        "decay_violation": max(
            decay_violation(maps["decay"], masks["decay"]), *(decay_violation(*trained[f"{depth} decay"]) for depth in ("deep", "shallow"))
        ),
        "random_first": first.tolist(),
        "trained_first": rollout(trained["deep none"][0])[:, :, -1, 0].mean(0).tolist(),
        "prefix_mass": min(k.sum(-1).min().item() for k in kept),
        "prefix_share": min(k.min().item() for k in kept),
        "sinks": {mask: sink(trained[name][0]) for mask, (name, _) in SINKS.items()},
    }


# ---- trained networks: which of two items wins ------------------------------------------------------------------------------------------


def load(cfg: Config, name: str, seed: int) -> nn.Module:
    return load_run(build(cfg, nets(cfg)[name]), cfg, run_name(name, seed))


@torch.inference_mode()
def behaviour(cfg: Config, name: str, seed: int) -> dict:
    """Loss and accuracy on new sequences like those of training, and the three gaps: accuracy with the right item first - with it second.

    All networks of a seed meet the same tests. Both sides of a gap are the same sequences with the two items exchanged.
    """
    task, model = Task(cfg, seed), load(cfg, name, seed)
    on = next(model.parameters()).device
    logits = lambda tokens: torch.cat([model(part.to(on)).cpu() for part in tokens.split(512)])
    right = lambda tokens, label: (logits(tokens).argmax(1) == label).double().mean().item()
    with gpu.seeded(seed, 1):
        tokens, label = task.training(*task.arrangements(cfg.test_sequences, nets(cfg)[name].favoured, seed + 1000))
        found, gaps = logits(tokens), []
        for a, b in PAIRS:
            tokens, mirrored, answer = task.conflict(cfg.test_sequences, a, b)
            gaps.append(right(tokens, answer) - right(mirrored, answer))
    return {"loss": F.cross_entropy(found, label).item(), "accuracy": (found.argmax(1) == label).double().mean().item(), "gaps": gaps}


def early(gaps: list[float]) -> float:
    """Bias to the first item against the two others."""
    return (gaps[0] + gaps[1]) / 2


def u_shape(gaps: list[float]) -> float:
    """Positive where the middle loses to both ends."""
    return min(gaps[0], -gaps[2])


# ---- claims -----------------------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> Measured:
    found = {name: [behaviour(cfg, name, seed) for seed in cfg.seeds] for name in nets(cfg)}
    content, seeds = [with_content(cfg, seed) for seed in cfg.seeds], range(len(cfg.seeds))
    windows, peaks, rope = depths_by_window(), decay_peaks(), rope_peaks()
    gaps = lambda name, i: found[name][i]["gaps"]
    amplified = lambda p: [early(gaps(f"deep {p}", i)) - early(gaps(f"shallow {p}", i)) for i in seeds]
    recency = lambda i: [early(gaps(f"shallow {p}", i)) for p in ("decay", "rope", "none")]
    encoded = [f"{mask} {p}" for mask in ("full", "causal") for p in ("sin", "rope")]
    values = {
        "C1": [c["causal_excess"] for c in content],
        "C1b": causal_error(),
        "C1c": slope_error(),
        "C1d": [c["random_first"][-1] for c in content],
        "C1e": [float(np.diff(c["random_first"]).min()) for c in content],
        "C1f": [c["trained_first"][-1] - c["trained_first"][1] for c in content],
        "C2": min(a - b for a, b in pairwise(windows)),
        "C2b": [c["graph_excess"] for c in content],
        "C2c": [c["prefix_mass"] for c in content],
        "C2d": [c["prefix_share"] for c in content],
        "C3": round(max(abs(peak - x) for pairs in peaks.values() for x, peak in pairs), 9),  # a tie is 1 and rounding
        "C3b": decay_error(),
        "C3c": [c["decay_violation"] for c in content],
        "C4": rope_fit(),
        "C4b": rope_violation(),
        "C4c": least_step(rope),
        "control": [min(runs[i]["accuracy"] for runs in found.values()) for i in seeds],
        "C5": amplified("none"),
        "C5b": amplified("decay"),
        "C5c": amplified("rope"),
        "C6": [min(np.diff(recency(i)).tolist()) for i in seeds],
        "C7": [min(gaps("causal none", i)[:2]) for i in seeds],
        "C7b": [gaps("causal none", i)[2] for i in seeds],
        "C7c": [min(u_shape(gaps(name, i)) for name in encoded) for i in seeds],
        "C7d": [max(map(abs, gaps("full none", i))) for i in seeds],
        "C8": [u_shape(gaps("causal rope", i)) for i in seeds],
        "C8b": [max(u_shape(gaps(f"rope {data}", i)) for data in ("unbiased", FIRST, MIDDLE, LAST)) for i in seeds],
        "C9": [min(sink_margin(c["sinks"][mask], centre) for mask, (_, centre) in SINKS.items()) for c in content],
    }
    details = {
        "networks": found,
        "content": content,
        "walks": {mask: last_rows(log_mask(mask, N, **options).softmax(-1), 24).tolist() for mask, options in MASKS.items()},
        "windows": dict(zip(map(str, WINDOWS), windows, strict=True)),
        "decay_peaks": peaks,
        "rope_peaks": rope,
        "equal_sinks": {mask: sink(equal_scores(log_mask(mask, 4 * cfg.copies + 1), 1)[None]) for mask in SINKS},
        "deep": cfg.deep,
    }
    task = Task(cfg, cfg.seeds[0])
    return Measured(values, details, {"class means and labels": content_hash(task.means, task.label_of, task.labels)})


def sink_margin(received: list[float], centre: int) -> float:
    return min(received[:centre]) - max(received[centre:])


# ---- the figure -------------------------------------------------------------------------------------------------------------------------


def figure(details: dict) -> Figure:
    """Above: walks of the last token under four masks. Below: where they peak, and what the trained networks prefer."""
    fig = Figure(figsize=(14, 7), layout="constrained")
    top, bottom = fig.subfigures(2, 1)
    for axis, (mask, rows) in zip(top.subplots(1, 4, sharey=True), details["walks"].items(), strict=True):
        shown = axis.imshow(np.log10(np.maximum(rows, 1e-4)), aspect="auto", origin="lower", extent=(0.5, 32.5, 0.5, 24.5), vmin=-4, vmax=0)
        axis.set(title=", ".join([mask, *(f"{k} = {v}" for k, v in MASKS[mask].items())]), xlabel="token j")
    top.axes[0].set_ylabel("layers")
    top.colorbar(shown, ax=top.axes, label="log10 P(z_32 = j), equal scores")
    peaks, depth, biased, sinks = bottom.subplots(1, 4, width_ratios=(1, 1, 1.4, 1))
    for i, (m, pairs) in enumerate(details["decay_peaks"].items()):
        peaks.plot(*zip(*pairs, strict=True), "o", markersize=3, color=f"C{i}", label=f"m = {m}")
    peaks.axline((1, 1), slope=1, color="0.6", linewidth=0.8, zorder=0)
    peaks.set(xscale="symlog", yscale="symlog", xlabel="x* = t / (e^m - 1)", ylabel="peak of P [tokens before]", title="Decay mask: where walks end")
    peaks.legend(fontsize=7)
    runs = details["networks"]
    layers = {"shallow": 2, "deep": details["deep"]}
    bars(depth, runs, {f"{d} {p}": f"{p}, {layers[d]}" for p in ("none", "decay", "rope") for d in layers})
    depth.set(ylabel="gap in accuracy", title="Unbiased data: encoding, layers")
    bars(biased, runs, {f"{mask} {p}": f"{mask}, {p}" for mask in ("full", "causal") for p in ("none", "sin", "rope")})
    biased.set(title="Answers at the first or last item")
    biased.legend(fontsize=7)
    for i, mask in enumerate(SINKS):
        received = np.mean([c["sinks"][mask] for c in details["content"]], 0)
        sinks.plot(range(1, len(received) + 1), received, f"C{i}o-", markersize=3, label=mask)
        sinks.plot(range(1, len(received) + 1), details["equal_sinks"][mask], f"C{i}:", linewidth=1)
    sinks.set(xlabel="token", ylabel="mean weight received", title="Sinks (dotted: equal scores)")
    sinks.legend(fontsize=7)
    return fig


def bars(axis, runs: dict, names: dict[str, str]) -> None:
    """The three gaps of each network {name: label}, mean over seeds, with a dot per seed."""
    for k, (first, second) in enumerate(PAIRS):
        at = np.arange(len(names)) + 0.27 * (k - 1)
        axis.bar(at, [fmean(run["gaps"][k] for run in runs[name]) for name in names], 0.25, color=f"C{k}", label=f"{first} - {second}")
        for x, name in zip(at, names, strict=True):
            axis.plot([x] * len(runs[name]), [run["gaps"][k] for run in runs[name]], "k.", markersize=2)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_xticks(range(len(names)), names.values(), rotation=40, ha="right", fontsize=7)


# ---- a real model -----------------------------------------------------------------------------------------------------------------------


def evaluate_published(cfg: Config, tokens: int = 256) -> dict:
    """The walk through a Llama's own maps (mean over heads) on the first tokens of a text: --weights its directory, --data a .txt file.

    With and without the residual stream counted as half of each map.
    """
    if not Path(cfg.data).is_file():
        raise UserError(f"--data {cfg.data}: give a .txt file of {tokens} tokens or more")
    source = str(cfg.weights)
    model = Llama.from_pretrained(source).to(gpu.device(cfg)).eval()
    ids = text.tokenizer(Llama.tiny if source == "tiny" else source).encode(Path(cfg.data).read_text()).ids[:tokens]
    maps = attention_maps(model, torch.tensor(ids, device=gpu.device(cfg))[None])[0].double().cpu()
    half = (maps + torch.eye(len(ids), dtype=torch.float64)) / 2
    first = {"attention alone": rollout(maps)[:, -1, 0], "half residual": rollout(half)[:, -1, 0]}
    return {f"P(z_{len(ids)} = 1), {name}, by layer": [round(p, 4) for p in walk.tolist()] for name, walk in first.items()} | {
        "mean weight on token 1, by layer": [round(p, 4) for p in maps[:, 1:, 0].mean(1).tolist()]
    }
