"""Measure the claims of paper.toml, the growth of the operator up to 4K, and the published checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import gpu
from common.attention import MultiHeadAttention
from common.data import stereo
from common.errors import UserError
from common.loop import load_run, load_weights
from common.pictures import as_png, from_png
from common.results import Measured, content_hash
from papers.match_attention.model import SIZES, MatchAttention, Matched, MatchStereo, consistent, match_attention, positions, window
from papers.match_attention.train import STEREO, Config, build, published, rendered

SEED = 1_000_000  # of the test scenes; the training scenes have 0


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; to judge published weights: `just eval match_attention --weights FILE --data DIR`")
    test, moving = (rendered(cfg.test_pairs, SEED, size, motion, "test") for size, motion in ((cfg.crop, "stereo"), (cfg.flow_size, "flow")))
    real = stereo.motorcycle(4)
    models = {variant: [load_run(build(cfg, variant), cfg, f"{variant}/{seed}") for seed in cfg.seeds] for variant in (*STEREO, "flow")}
    found = {variant: [score(model, test) | {"motorcycle": real_error(model, real)} for model in models[variant]] for variant in STEREO}
    flow = [score(model, moving, stereo_pair=False) for model in models["flow"]]
    growth, network = grow(cfg), network_cost(cfg)
    operations = {name: count_operations(models[name][0], cfg.crop) for name in ("full", "row")}
    gate, loss = (ratio(found, "occluded", "full", other) for other in ("ungated", "unconstrained"))
    values = {
        "M1": max(exponent(growth["tokens"], growth[what]["ours"]) for what in ("seconds", "bytes")),
        "M1b": exponent(growth["tokens"], growth["seconds"]["global"]) - exponent(growth["tokens"], growth["seconds"]["ours"]),
        "M2": ratio(found, "all", "full", "rounded"),
        "M2b": discontinuity(),
        "M3": gate,
        "M3b": loss,
        "M3c": [max(pair) for pair in zip(ratio(found, "all", "full", "ungated"), ratio(found, "all", "full", "unconstrained"), strict=True)],
        "M4": ratio(found, "all", "full", "row"),
        "M4b": ratio(found, "bad1", "full", "row"),
        "M4c": operations["full"] / operations["row"],
        "M4d": ratio(found, "motorcycle", "full", "row"),
        "M7": 1e3 * network["seconds"],
        "M7b": exponent(network["pixels"], network["bytes"]),
        "M8": [run["all"] / run["curve"][0] for run in flow],
    }
    details = {
        "stereo": found, "flow": flow, "growth": growth, "network": network, "operations": operations,
        "curve_labels": curve_labels(cfg), "example": example(models["full"][0], models["row"][0], test),
    }  # fmt: skip
    return Measured(
        values, details, {"rendered stereo": content_hash(*test), "rendered flow": content_hash(*moving), "motorcycle": content_hash(*real)}
    )


def ratio(found: dict[str, list[dict]], what: str, method: str, baseline: str) -> list[float]:
    """One value per seed."""
    return [a[what] / b[what] for a, b in zip(found[method], found[baseline], strict=True)]


# ---- accuracy ---------------------------------------------------------------------------------------------------------------------------


def end_point_error(field: Float[Tensor, "*n 2"], target: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n"]:
    """Distance in pixels, NaN where the target is unknown; its mean over pixels is the EPE, the share above N pixels "bad-N"."""
    return (field - target).norm(dim=-1)


@torch.inference_mode()
def score(model: nn.Module, pairs: stereo.Pairs, stereo_pair: bool = True) -> dict:
    """EPE of the left views on all, visible and occluded pixels, share of pixels off by more than 1, and the EPE of every field on the way."""
    on, errors, curve = next(model.parameters()).device, [], []
    for left, right, fields in zip(*(part.split(20) for part in pairs[:3]), strict=True):
        out = model(left.to(on).float(), right.to(on).float(), stereo_pair)
        target = fields[:, 0].to(on)
        errors.append(end_point_error(out.field_up[: len(left)], target).cpu())
        curve.append([coarse_error(field[: len(left)], target) for field in on_the_way(out)])
    error, visible = torch.cat(errors), pairs.visible[:, 0]
    found = {"all": error, "visible": error[visible], "occluded": error[~visible], "bad1": (error > 1).float()}
    return {name: e.mean().item() for name, e in found.items()} | {"curve": np.mean(curve, 0).tolist()}


def on_the_way(out: Matched) -> list[Float[Tensor, "b h w 2"]]:
    return [out.init_flow, *(field for both in out.field_all for field in both.values()), out.field_up]


def coarse_error(field: Float[Tensor, "b h w 2"], target: Float[Tensor, "b H W 2"]) -> float:
    """EPE in full-resolution pixels, at the pixels in the middle of the coarse ones."""
    step = target.shape[1] // field.shape[1]
    return end_point_error(step * field, target[:, step // 2 :: step, step // 2 :: step]).mean().item()


def curve_labels(cfg: Config) -> list[str]:
    """Of the points of MatchStereo's curve: where a scale begins."""
    labels = ["first"]
    for s, layers in enumerate(cfg.layers):
        labels += [f"1/{2 ** (len(cfg.layers) + 1 - s)}" if s else ""] * bool(s) + ["self", "cross"] * layers
    return [*labels, "1/1"]


def real_error(model: nn.Module, real: tuple) -> float:
    """EPE where the real pair's disparity is known."""
    left, right, field = real
    error = end_point_error(match(model, left, right, multiple=16)[0][0].cpu(), field)
    return error[error.isfinite()].mean().item()


def pad_to(image: Float[Tensor, "b c H W"], multiple: int, least: int = 0) -> tuple[Float[Tensor, "b c h w"], tuple[slice, slice]]:
    """Repeat the first row and the last column until both sides are multiples, `least` or more; and the slices that undo it.

    least: itself a multiple.
    """
    height, width = image.shape[-2:]
    above, beside = (max(-size % multiple, least - size) for size in (height, width))
    return F.pad(image, (0, beside, above, 0), mode="replicate"), (slice(above, above + height), slice(0, width))


@torch.inference_mode()
def match(
    model: nn.Module, left: Tensor, right: Tensor, stereo_pair: bool = True, low_res_init: bool = False, multiple: int = 32
) -> tuple[Float[Tensor, "2 H W 2"], Bool[Tensor, "2 H W"]]:
    """Fields of two views "3 H W" of any size, and where they agree within 8 pixels. low_res_init: start from the field at half the size."""
    on = next(model.parameters()).device
    side = 2 * multiple if low_res_init else multiple
    views, (rows, columns) = pad_to(torch.stack([left, right]).to(on).float(), side, 6 * side)  # a window of radius 2 at the coarsest scale
    first = ()
    if low_res_init:
        half = model(*F.interpolate(views, scale_factor=0.5, mode="bilinear", antialias=True).split(1), stereo_pair).field_up
        coarse = F.interpolate(rearrange(half, "b y x t -> b t y x"), scale_factor=2 / multiple, mode="bilinear", antialias=True)
        first = (rearrange(coarse, "b t y x -> b y x t") * 2 / multiple,)
    field = model(*views.split(1), stereo_pair, *first).field_up
    return field[:, rows, columns], consistent(field, 8.0)[:, rows, columns]


def discontinuity() -> float:
    """Of the operator in float64, as claim M2b has it: of random queries around centres that cross whole pixels, and between them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, direction = (torch.randn(1, 2, 80, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    whole = torch.randint(2, 6, (1, 2, 80, 2), generator=generator).double()
    at = lambda centre: match_attention(q, k, v, centre, (8, 10), 1)[0]
    jump = (at(whole + 1e-9) - at(whole - 1e-9)).abs().max()
    centre = (whole + torch.rand(whole.shape, generator=generator, dtype=torch.float64) * 0.98 + 0.01).requires_grad_()
    (slope,) = torch.autograd.grad((at(centre) * direction).sum(), centre)
    steps = [torch.tensor(axis, dtype=torch.float64) * 1e-6 for axis in ((1, 0), (0, 1))]
    rise = torch.stack([((at(centre + step) - at(centre - step)) * direction).sum(-1) / 2e-6 for step in steps], -1)
    return max(jump.item(), ((slope - rise).abs().max() / slope.abs().max()).item())


# ---- cost -------------------------------------------------------------------------------------------------------------------------------


def exponent(size: list, cost: list) -> float:
    """Slope of log cost over log size."""
    return float(np.polyfit(np.log(size), np.log(cost), 1)[0])


def count_operations(model: nn.Module, size: tuple[int, int]) -> int:
    """Of one pair. The counter sees no windows: per query, head and cell 3d of the L1 distance and 2d of the sum of values."""
    image = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    total = gpu.count_flops(lambda: model(image, image))
    for layer in model.modules():
        if isinstance(layer, MatchAttention):
            total += 2 * layer.grid[0] * layer.grid[1] * layer.q.out_features * (2 * layer.radius + 2) ** 2 * 5
    return total


@torch.inference_mode()
def grow(cfg: Config, dim: int = 32, heads: int = 2) -> dict:
    """Seconds and peak bytes of one cross-attention over maps of cfg.heights: ours, to the whole other view, and within rows."""
    on = gpu.device(cfg)
    torch.manual_seed(0)
    ours, whole = MatchAttention("cross", dim, dim, heads, dim // heads, 1).to(on), MultiHeadAttention(dim, heads, context_dim=dim).to(on)
    found = {"tokens": [], "seconds": {}, "bytes": {}}
    for height in cfg.heights:
        grid = height, 2 * height
        x, y = torch.randn(2, 1, *grid, dim, device=on)
        field = 4 * torch.randn(1, *grid, 2, device=on)
        calls = {
            "ours": partial(ours, x, y, field), "global": partial(whole, x.flatten(1, 2), y.flatten(1, 2)), "rows": partial(whole, x[0], y[0])
        }  # fmt: skip
        found["tokens"].append(grid[0] * grid[1])
        for name, seconds in gpu.alternate(calls, cfg.repeats, seconds=0.05).items():
            found["seconds"].setdefault(name, []).append(seconds)
            found["bytes"].setdefault(name, []).append(gpu.peak_memory(calls[name]))
    return found


@torch.inference_mode()
def network_cost(cfg: Config) -> dict:
    """Of the tiny size's forward pass: peak bytes by pixels of one view, and the seconds for an image of cfg.image."""
    on, found = gpu.device(cfg), []
    model = MatchStereo(SIZES["tiny"], layers=cfg.tiny_layers).to(on).eval()
    call = lambda height, width: partial(model, *torch.zeros(2, 1, 3, height, width, device=on))
    for height in cfg.image_heights:
        found.append(gpu.peak_memory(call(height, 2 * height)))
    seconds = gpu.alternate({"tiny": call(*cfg.image)}, repeats=1)["tiny"]
    return {"pixels": [2 * height**2 for height in cfg.image_heights], "bytes": found, "seconds": seconds}


def gathered(q, k, v, centre, grid, radius) -> tuple[Tensor, Tensor]:
    """The operator written straight down, as the authors' PyTorch path has it: all windows gathered through one expanded index, then four
    softmaxes."""
    corner, offsets, b = window(centre, grid, radius)
    side, n = 2 * radius + 2, corner.numel()
    index = (corner[..., None] + offsets).view(n, -1, 1).expand(-1, -1, q.shape[-1])
    keys, values = (t.flatten(0, 2).unsqueeze(1).expand(-1, index.shape[1], -1).gather(0, index) for t in (k, v))
    s = (-(q.reshape(n, 1, -1) - keys).abs().sum(-1) * q.shape[-1] ** -0.5).view(n, side, side)
    alpha = torch.zeros_like(s)
    for t, share in enumerate(b.reshape(n, 4).unbind(-1)):
        y, x = divmod(t, 2)
        rows, columns = slice(y, y + side - 1), slice(x, x + side - 1)
        alpha[:, rows, columns] += share[:, None, None] * s[:, rows, columns].flatten(1).softmax(-1).view(n, side - 1, side - 1)
    alpha = alpha.flatten(1)
    return (alpha[..., None] * values).sum(1).view(q.shape), alpha.view(*q.shape[:3], -1)


@torch.inference_mode()
def bench() -> dict:
    """One cross-attention of the tiny size (4 heads of 8, radius 1) at 1/4 of images from 270p to 4K: seconds and peak MiB of our operator,
    of the gather form, and of fused attention to the whole other view, whose time is that of 1024 queries times what they are of all.
    """
    on = gpu.device(Config())
    torch.manual_seed(0)
    found: dict[str, dict] = {name: {} for name in ("match_attention", "gather_form", "global", "global_logits_mib")}
    tokens = []
    for name, grid in {"270p": (68, 120), "540p": (136, 240), "1080p": (272, 480), "4K": (544, 960)}.items():
        n = grid[0] * grid[1]
        tokens.append(n)
        q, k, v = torch.randn(3, 1, 4, n, 8, device=on)
        centre = positions(*grid, q).flatten(0, 1) + 8 * torch.randn(1, 4, n, 2, device=on)
        calls = {"match_attention": partial(match_attention, q, k, v, centre, grid, 1), "gather_form": partial(gathered, q, k, v, centre, grid, 1)}
        calls["global"] = partial(F.scaled_dot_product_attention, q[:, :, :1024].contiguous(), k, v)
        for form, seconds in gpu.alternate(calls, 3, seconds=0.1).items():
            scale = n / 1024 if form == "global" else 1
            found[form][name] = {"seconds": seconds * scale} | ({} if form == "global" else {"peak_mib": gpu.peak_memory(calls[form]) / 2**20})
        found["global_logits_mib"][name] = 4 * n * n * 4 / 2**20
    for form in ("match_attention", "gather_form", "global"):
        for what in list(found[form]["4K"]):
            found[form][f"exponent of {what}"] = exponent(tokens, [found[form][name][what] for name in ("270p", "540p", "1080p", "4K")])
    return {"device": str(on), "threads": torch.get_num_threads()} | found


# ---- the figure -------------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def example(ours: nn.Module, row: nn.Module, test: stereo.Pairs) -> dict[str, str]:
    """One test pair, as PNG: the left view, and disparities in tenths of a pixel."""
    views = [part[:1].to(next(ours.parameters()).device).float() for part in (test.left, test.right)]
    maps = {"true": test.fields[:1, 0], "ours": ours(*views).field_up[:1].cpu(), "row": row(*views).field_up[:1].cpu()}
    tenths = {name: as_png((-10 * field[0, ..., 0]).clamp(0, 255).round().to(torch.uint8).numpy()) for name, field in maps.items()}
    occluded = as_png((~test.visible[0, 0]).numpy().astype(np.uint8))
    return {"left": as_png(test.left[0].permute(1, 2, 0).numpy()), "occluded": occluded} | tenths


def figure(details: dict) -> Figure:
    """A test pair; how the field is refined; what each part is worth; what it costs."""
    fig = Figure(figsize=(13, 5.6), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.5))
    pictures = {name: from_png(text) for name, text in details["example"].items()}
    panels = {"left view": "left", "true disparity (outlined: occluded)": "true", "MatchAttention": "ours", "row attention": "row"}
    axes = above.subplots(1, 4)
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        scale = {} if name == "left" else {"vmin": 0, "vmax": pictures["true"].max() / 10, "cmap": "viridis"}
        shown = axis.imshow(pictures[name] / (1 if name == "left" else 10) if scale else pictures[name], **scale)
        axis.set(title=title, xticks=[], yticks=[])
    axes[1].contour(pictures["occluded"], levels=[0.5], colors="w", linewidths=0.8)
    above.colorbar(shown, ax=axes, label="pixels", shrink=0.8)
    curve, parts, time, memory = below.subplots(1, 4, width_ratios=(1.3, 1.2, 1, 1))
    rows = np.array([run["curve"] for run in details["stereo"]["full"]])
    curve.plot(rows.T, color="C0", alpha=0.3)
    curve.plot(rows.mean(0), "o-", color="C0", markersize=4)
    curve.set_xticks(range(rows.shape[1]), details["curve_labels"], rotation=90, fontsize=8)
    curve.set(ylabel="EPE [pixels]", ylim=(0, None), title="the field, step by step", xlabel="new scales, self- and cross-attention")
    for i, runs in enumerate(details["stereo"].values()):
        for j, (what, colour) in enumerate((("visible", "C2"), ("occluded", "C3"))):
            values, y = [run[what] for run in runs], i + 0.4 * j - 0.2
            parts.barh(y, fmean(values), 0.38, color=colour, alpha=0.7, label=what if i == 0 else None)
            parts.plot(values, [y] * len(values), "k.", markersize=4)
    parts.set_yticks(range(len(details["stereo"])), details["stereo"])
    parts.invert_yaxis()
    parts.set(xlabel="EPE [pixels]", title="one part exchanged")
    parts.legend(fontsize=8)
    growth = details["growth"]
    for axis, what, unit, title in ((time, "seconds", 1e3, "time [ms]"), (memory, "bytes", 2**-20, "peak memory [MiB]")):
        for name, label in (("global", "whole view"), ("rows", "rows"), ("ours", "MatchAttention")):
            axis.loglog(growth["tokens"], unit * np.array(growth[what][name]), "o-", markersize=4, label=label)
        axis.set(xlabel="tokens", title=f"one layer: {title}")
        axis.legend(fontsize=8)
    return fig


# ---- published checkpoints --------------------------------------------------------------------------------------------------------------


def published_name(name: str) -> str | None:
    """Ours for a published parameter: the same, None for those that the published network holds and does not use."""
    return None if name.startswith("encoder.head.") or ".res_scale" in name else name


def load_published(model: MatchStereo, path: Path) -> MatchStereo:
    """One of the authors' .pth files."""
    return load_weights(model, path, published_name, key="model")


def evaluate_published(cfg: Config) -> dict[str, float]:
    """Means over the images of a dataset: EPE and shares of bad pixels in percent, over known pixels, and over those both views see (noc)."""
    if not cfg.data:
        raise UserError("--weights needs --data DIR and --dataset NAME: the pairs to match")
    model = load_published(published(cfg.variant), Path(cfg.weights)).to(gpu.device(cfg)).eval()
    return judge(lambda *views: match(model, *views, not cfg.variant.startswith("flow"), cfg.low_res_init)[0][0].cpu(), cfg)


def judge(matcher: Callable[[Tensor, Tensor], Float[Tensor, "H W 2"]], cfg: Config) -> dict[str, float]:
    rows = []
    for left, right, target, noc in stereo.StereoFolder(cfg.data, cfg.dataset):
        error = end_point_error(matcher(left, right), target)
        large = (error > 3) & (error > 0.05 * target.norm(dim=-1))
        row = {}
        for name, where in (("all", target.isfinite().all(-1)), ("noc", noc)):
            bad = {f"bad{n:g}_{name}": 100 * (error > n)[where].double().mean().item() for n in (0.5, 1, 2, 3)}
            row |= {f"epe_{name}": error[where].mean().item(), f"d1_{name}": 100 * large[where].double().mean().item()} | bad
        rows.append(row)
    return {name: fmean(row[name] for row in rows) for name in rows[0]}
