"""Measure PKA's claims on conditioned scenes and on single layers; adapters of FLUX.1 on SubjectSpatial200K's test part."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from safetensors.torch import save_file
from skimage.feature import canny
from skimage.metrics import structural_similarity
from skimage.segmentation import find_boundaries
from torch import Tensor

from common import gpu
from common.attention import controlled
from common.backbones.flux import Cached, Conditioning, FluxAttention, FluxTransformer2DModel, Stream, Visible, image_ids, rotary_table
from common.diffusion import resolution_shift
from common.errors import UserError
from common.loop import each, load_run, read_safetensors
from common.reader import Reader, read, truth
from common.results import Measured, content_hash
from common.tiny_flux import encode
from papers.pka import train as training
from papers.pka.model import PKA, AdditivePKA, ConditionedFlux, Encoders, WindowPKA, load_adapters, mix_of, pixels, sample
from papers.pka.train import ARMS, SAMPLERS, SPATIAL, SUBJECT, TEST, TRAIN, ConditionedScenes, Config, base, build, run_name, scene_set

MEASURES = ("edge F1", "mask IoU", "subject match", "text accuracy")
EPSILONS = (0.0, 0.2, 0.6)
SHOWN = 4  # scenes in the figure


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; for FLUX.1 give adapters: `just eval pka --weights DIR --flux DIR --data DIR`")
    test, cost = scene_set(cfg.test_scenes, TEST), layer_costs(cfg)
    final = [(arm, "csas", 2) for arm in ARMS]
    runs = final + [(arm, "csas", 1) for arm in ARMS] + [("joint", sampler, 1) for sampler in SAMPLERS if sampler != "csas"]
    wanted = [(*run, cfg.epsilon) for run in runs] + [("joint", "csas", 2, e) for e in EPSILONS if e != cfg.epsilon]
    each(draw_one, [(*picture, seed) for picture in wanted for seed in cfg.seeds], cfg)
    found = {picture: [read_safetensors(picture_file(cfg, *picture, seed))[0] for seed in cfg.seeds] for picture in wanted}
    scores = {picture: [quality(one["images"], test) | {"kept": one["kept"].item()} for one in drawn] for picture, drawn in found.items()}
    final, half = ({arm: scores[arm, "csas", number, cfg.epsilon] for arm in ARMS} for number in (2, 1))
    sampling = {name: scores["joint", name, 1, cfg.epsilon] for name in SAMPLERS}
    thresholds = {str(e): scores["joint", "csas", 2, e] for e in EPSILONS}
    looks = [attention_of(cfg, load(cfg, "concat", "csas", 2, seed), test) for seed in cfg.seeds]
    last, pka = cost["conditions"].index(max(cost["conditions"])), ("joint", "additive")
    at_most = lambda what, arm: cost[what][arm][last] / max(cost[what][name][last] for name in pka)
    growth = exponents(cost)
    difference = lambda a, b, name: [x[name] - y[name] for x, y in zip(a, b, strict=True)]
    worst = lambda a, b: [min(x[name] - y[name] for name in MEASURES) for x, y in zip(a, b, strict=True)]
    kept = np.array([[run["kept"] for run in runs] for runs in thresholds.values()])
    values = {
        "E1": at_most("seconds", "concat"),
        "E1b": at_most("seconds", "cached"),
        "E2": at_most("bytes", "concat"),
        "E3": max(growth[arm] for arm in pka),
        "E3b": max(growth[arm] for arm in pka) - growth["concat"],
        "Q1": worst(final["joint"], final["concat"]),
        "Q1b": worst(final["additive"], final["concat"]),
        "A1": [look["diagonal"] for look in looks],
        "A1b": [look["on the object"] for look in looks],
        "A2b": min(
            cost["seconds"]["window"][last] / cost["seconds"]["joint"][last], cost["seconds"]["cached"][last] / cost["seconds"]["window"][last]
        ),
        "A3": np.diff(kept, axis=0).max(0).tolist(),
        "A3b": difference(thresholds["0.6"], thresholds["0.2"], "subject match"),
        "A4": difference(sampling["csas"], sampling["standard"], "edge F1"),
        "A4b": difference(sampling["csas"], sampling["reversed"], "edge F1"),
    }
    alone = draw(cfg, ConditionedFlux(deepcopy(base()), (), (), Visible(), 0), test, conditions=())
    shown = {"depth": test.depth, "subject": test.subject, "scene": test.images, "no condition": alone}
    shown |= {arm: found[arm, "csas", 2, cfg.epsilon][0]["images"] for arm in ARMS}
    details = {
        "final": final, "half": half, "samplers": sampling, "thresholds": thresholds, "attention": looks, "base": quality(alone, test),
        "renders": quality(test.images, test), "steps": 2 * cfg.steps, "costs": cost, "exponents": growth,
        "examples": {"captions": test.captions[:SHOWN]} | {name: images[:SHOWN].permute(0, 2, 3, 1).tolist() for name, images in shown.items()},
    }  # fmt: skip
    data = {"scenes train": content_hash(*pictures_of(scene_set(cfg.train_scenes, TRAIN))), "scenes test": content_hash(*pictures_of(test))}
    return Measured(values, details, data)


def load(cfg: Config, arm: str, sampler: str, number: int, seed: int) -> ConditionedFlux:
    return load_run(build(cfg, arm), cfg, run_name(arm, sampler, number, seed))


def pictures_of(s: ConditionedScenes) -> tuple[Tensor, ...]:
    return s.images, s.depth, s.subject, s.keywords


# ---- pictures ---------------------------------------------------------------------------------------------------------------------------


def told(test: ConditionedScenes, conditions: Sequence[str], on: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model is told of the scenes, and the null prompt."""
    images = {name: pixels(getattr(test, name)) for name in conditions}
    null = encode([""] * len(test.scenes)) | {"keywords": torch.zeros_like(test.keywords)}
    given = encode(test.captions) | {"keywords": test.keywords} | images
    return tuple({name: t.to(on) for name, t in part.items()} for part in (given, null))


def draw(
    cfg: Config, model: ConditionedFlux, test: ConditionedScenes, conditions: Sequence[str] = (SPATIAL, SUBJECT), after=None
) -> UInt8[Tensor, "n 3 32 32"]:
    """One picture of every scene, from the same noise for every model."""
    noise = torch.randn(len(test.scenes), 3, 32, 32, generator=torch.Generator().manual_seed(TEST))
    on = gpu.device(cfg)
    z = sample(model.to(on), noise.to(on), *told(test, conditions, on), steps=cfg.draw_steps, scale=cfg.guidance, after=after)
    return ((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def quality(images: UInt8[Tensor, "n 3 32 32"], test: ConditionedScenes) -> dict[str, float]:
    """MEASURES in percent. Things are where a pixel is not the background, which the corners tell; text tells it and the second thing's look."""
    seen, asked = foreground(images), test.instances > 0
    found, wanted = outline(seen), outline(test.instances)
    near = lambda edges: F.max_pool2d(edges[:, None].float(), 3, 1, 1)[:, 0] > 0  # a pixel's tolerance
    precision, recall = (found & near(wanted)).sum() / found.sum().clamp(min=1), (wanted & near(found)).sum() / wanted.sum()
    iou = (seen & asked).sum((1, 2)) / (seen | asked).sum((1, 2))
    reader = Reader.from_pretrained("tiny")
    factors, true = list(reader.heads), truth(test.scenes)
    right = read(reader, images / 255) == true
    look, told = ([factors.index(name) for name in names] for names in (("colour", "texture"), ("background", "second colour", "second texture")))
    values = {
        "edge F1": 2 * precision * recall / (precision + recall).clamp(min=1e-9),
        "mask IoU": iou.mean(),
        "subject match": right[:, look].all(1).float().mean(),
        "text accuracy": right[:, told][true[:, told] >= 0].float().mean(),
    }
    return {name: 100 * value.item() for name, value in values.items()}


def outline(instances: Tensor) -> Bool[Tensor, "n h w"]:
    """Where a pixel differs from one of its four neighbours."""
    return torch.from_numpy(np.stack([find_boundaries(one, connectivity=1, mode="thick") for one in instances.numpy()]))


def foreground(images: UInt8[Tensor, "n 3 h w"]) -> Bool[Tensor, "n h w"]:
    x = images / 255
    ground = x[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(2).values
    return (x - ground[..., None, None]).abs().amax(1) > 0.15


def draw_one(cfg: Config, arm: str, sampler: str, number: int, epsilon: float, seed: int) -> None:
    """Leave the pictures of a trained model in its run's directory, and the share of image tokens that read the subject after the first step."""
    test, model, kept = scene_set(cfg.test_scenes, TEST), load(cfg, arm, sampler, number, seed), [1.0]
    if isinstance(model.pka, PKA):
        model.pka.epsilon = epsilon
        collect = lambda i, z: kept.append(fmean(mask[len(z) :].float().mean().item() for mask in model.pka.masks.values()))
    images = draw(cfg, model, test, after=collect if isinstance(model.pka, PKA) else None)
    save_file({"images": images, "kept": torch.tensor(fmean(kept[1:] or kept))}, picture_file(cfg, arm, sampler, number, epsilon, seed))


def picture_file(cfg: Config, arm: str, sampler: str, number: int, epsilon: float, seed: int) -> Path:
    return Path(cfg.out) / run_name(arm, sampler, number, seed) / f"pictures-{epsilon}.safetensors"


# ---- where concatenate-and-attend looks -------------------------------------------------------------------------------------------------


class Looks:
    """Collects the attention weights of the calls with this many queries, those in which text and image read everything."""

    def __init__(self, queries: int):
        self.queries, self.seen = queries, []

    def weights(self, site, p: Float[Tensor, "b h n m"]) -> None:
        if p.shape[2] == self.queries:
            self.seen.append(p)


@torch.no_grad()
def attention_of(cfg: Config, model: ConditionedFlux, test: ConditionedScenes, times: Sequence[float] = (0.25, 0.5, 0.75)) -> dict:
    """Of image tokens' attention to the depth map: the share on their own position over the uniform share, and all of it, averaged; of that to the
    subject: the share that the first thing's tokens pay, and their share of all tokens."""
    given, _ = told(test, (SPATIAL, SUBJECT), gpu.device(cfg))
    z, text, n = pixels(test.images).to(gpu.device(cfg)), given["states"].shape[1], 64
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(TEST)).to(z)
    with controlled(model.flux, Looks(text + n)) as looks:
        for t in times:
            model((1 - t) * z + t * noise, torch.full((len(z),), t, device=z.device), **given)
    p = torch.stack(looks.seen).mean((0, 2)).cpu()[:, text:]  # layers, times and heads averaged:  b n m
    depth, subject = p[:, :, text + n : text + 2 * n], p[:, :, text + 2 * n :].sum(2)
    on = F.max_pool2d((test.instances == 1).float()[:, None], 4).flatten(1) > 0
    return {
        "diagonal": (n * depth.diagonal(0, 1, 2).sum() / depth.sum()).item(),
        "on the object": (subject[on].sum() / subject.sum()).item(),
        "object": on.float().mean().item(),
        "map": depth.mean(0).tolist(),
    }


# ---- cost -------------------------------------------------------------------------------------------------------------------------------


def layer_costs(
    cfg: Config, text: int = 64, heads: int = 8, head_dim: int = 64, on: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> dict:
    """Seconds and peak bytes of one attention layer of a single block with random weights, by number of spatial conditions.

    concat: all tokens read all. cached: text and image read the cached keys and values of all conditions. The others are PKA with the same
    cache. The bytes are those above what lies in memory before the call: inputs, weights and cache, of which `stored` is the cache.
    """
    on, grid = on or gpu.device(cfg), (cfg.timed_grid, cfg.timed_grid)
    dim, n, axes = heads * head_dim, cfg.timed_grid**2, (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
    layer = FluxAttention(dim, heads, 0).to(on, dtype).requires_grad_(False)
    table = rotary_table(torch.cat([torch.zeros(text, 3), image_ids(grid)]), axes).to(on, torch.complex64)
    nothing = Conditioning(torch.zeros(1), torch.zeros(1, 1))
    tokens = lambda count: torch.randn(1, count, dim, device=on, dtype=dtype)
    main = tokens(text + n), Stream({"text": text, "image": n}, nothing, None, tokens(1), table)
    pka = {"joint": PKA(), "additive": AdditivePKA(1, heads).to(on, dtype), "window": WindowPKA(grid)}
    run = lambda streams, mix: layer([x for x, _ in streams], [stream for _, stream in streams], mix)
    found = {"conditions": list(cfg.timed_conditions), "tokens": n, "seconds": {}, "bytes": {}, "stored": []}
    for c in cfg.timed_conditions:
        names = [f"condition {i}" for i in range(c)]
        stream = Stream(dict.fromkeys(names, n), nothing, None, tokens(1), table[text:].repeat(c, 1))
        beside = tokens(c * n), stream
        cache = {0: {name: (None, k.clone(), v.clone()) for name, (_, k, v) in layer.project(stream, *[beside[0]] * 2).items()}}
        functions = {"concat": partial(run, [main, beside], Visible(lambda reader, source: True))}
        functions |= {name: partial(run, [main], Cached(cache, mix)) for name, mix in {"cached": Visible(), **pka}.items()}
        found["stored"].append(sum(t.numel() * t.element_size() for heads in cache[0].values() for t in heads[1:]))
        with torch.no_grad():
            seconds = gpu.alternate(functions | {"none": partial(run, [main], Visible())}, cfg.repeats, seconds=0.05)
            for name, time in seconds.items():
                found["seconds"].setdefault(name, []).append(time)
            for name, function in functions.items():
                found["bytes"].setdefault(name, []).append(gpu.peak_memory(function))
    return found


def exponents(cost: dict) -> dict[str, float]:
    """Slope of log(time with c conditions - time with none) over log c, of every arm."""
    seconds = {name: np.array(times) for name, times in cost["seconds"].items()}
    none = seconds.pop("none")
    extra = {name: np.maximum(times - none, 1e-3 * none) for name, times in seconds.items()}
    return {name: float(np.polyfit(np.log(cost["conditions"]), np.log(more), 1)[0]) for name, more in extra.items()}


def bench() -> dict:
    """Time and memory of a layer, all tokens reading all and cached concatenation over PKA, by the number of conditions."""
    sizes = {"cpu, 8 heads x 64, 256 tokens a condition": (torch.device("cpu"), 16, 8, 64, torch.float32, 5)}
    sizes["cpu, 8 heads x 64, 1024 tokens a condition"] = (torch.device("cpu"), 32, 8, 64, torch.float32, 1)
    if torch.cuda.is_available():
        sizes["gpu, FLUX.1's 24 heads x 128, bfloat16, 1024 tokens a condition"] = (torch.device("cuda"), 32, 24, 128, torch.bfloat16, 20)
    found = {}
    for where, (on, grid, heads, head_dim, dtype, repeats) in sizes.items():
        cost = layer_costs(Config(timed_grid=grid, repeats=repeats), 512 if on.type == "cuda" else 64, heads, head_dim, on, dtype)
        for arm in ("joint", "additive", "window"):
            for baseline in ("concat", "cached"):
                for what in ("seconds", "bytes"):
                    ratios = [a / b for a, b in zip(cost[what][baseline], cost[what][arm], strict=True)]
                    found[f"{where}, {what}, {baseline} / {arm}"] = dict(zip(map(str, cost["conditions"]), ratios, strict=True))
        found[f"{where}, cache in MiB"] = dict(zip(map(str, cost["conditions"]), (b / 2**20 for b in cost["stored"]), strict=True))
        found[f"{where}, milliseconds"] = {name: [1e3 * s for s in seconds] for name, seconds in cost["seconds"].items()}
        found[f"{where}, exponents"] = exponents(cost)
    return found


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

LABELS = {
    "concat": "all read all", "cached": "concatenated, cached", "joint": "PKA joint", "additive": "PKA additive", "window": "PKA joint, 3x3",
}  # fmt: skip
COLOURS = dict(zip(LABELS, ("C3", "C1", "C0", "C2", "C4"), strict=True))


def figure(details: dict) -> Figure:
    """What conditions cost; where concatenation looks; what the arms reach and how soon; pictures."""
    fig = Figure(figsize=(15, 8.4), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.1))
    seconds, memory, diagonal = top.subplots(1, 3)
    cost, steps = details["costs"], details["steps"]
    for name, label in LABELS.items():
        line = {"color": COLOURS[name], "marker": "o", "markersize": 3}
        seconds.loglog(cost["conditions"], [1e3 * s for s in cost["seconds"][name]], **line, label=f"{label}: c^{details['exponents'][name]:.2f}")
        memory.loglog(cost["conditions"], [b / 2**20 for b in cost["bytes"][name]], **line, label=label)
    seconds.loglog(cost["conditions"], [1e3 * s for s in cost["seconds"]["none"]], color="0.6", linestyle=":", label="no condition")
    title = f"One attention layer, {cost['tokens']} tokens a condition"
    seconds.set(xlabel="conditions c", ylabel="milliseconds", title=f"{title}: time")
    memory.set(xlabel="conditions c", ylabel="MiB", title="peak memory of the call")
    memory.loglog(cost["conditions"], [b / 2**20 for b in cost["stored"]], color="0.6", linestyle=":", label="the layer's cache")
    memory.legend(fontsize=7)
    seconds.legend(fontsize=7, title="growth above no condition", title_fontsize=7)
    shown = diagonal.imshow(np.array(details["attention"][0]["map"]), cmap="magma")
    diagonal.set(xlabel="token of the depth map", ylabel="image token", title="Concatenated: mean attention to the depth map")
    top.colorbar(shown, ax=diagonal, shrink=0.8)
    curves, drawn = bottom.subfigures(1, 2, width_ratios=(1.25, 1))
    for axis, name in zip(curves.subplots(2, 2).ravel(), MEASURES, strict=True):
        for arm in ARMS:
            runs = np.array(
                [[details["base"][name]] * len(details["final"][arm]), *([run[name] for run in details[k][arm]] for k in ("half", "final"))]
            )
            axis.plot([0, steps // 2, steps], runs, ".", color=COLOURS[arm], markersize=4)
            label = "concatenated" if arm == "concat" else LABELS[arm]
            axis.plot([0, steps // 2, steps], runs.mean(1), color=COLOURS[arm], label=label)
        axis.axhline(details["renders"][name], color="0.6", linestyle=":")
        axis.set(title=name, ylabel="%", xticks=[0, steps // 2, steps])
    axis.legend(fontsize=7)
    curves.supxlabel("steps; 0: the base without conditions; dotted: the scenes themselves", fontsize=8)
    columns = ("depth", "subject", "scene", "no condition", "concat", "joint", "additive")
    for row, axes in enumerate(drawn.subplots(len(details["examples"]["captions"]), len(columns), squeeze=False)):
        for axis, name in zip(axes, columns, strict=True):
            axis.imshow(np.array(details["examples"][name][row], np.uint8))
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name, fontsize=8)
        axes[0].set_xlabel(details["examples"]["captions"][row], fontsize=6.5, loc="left")
    return fig


# ---- FLUX.1 -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_published(cfg: Config) -> dict[str, float]:
    """Adapters of --weights DIR on the test part of --data: structural similarity, and F1 of Canny edges where they are a condition."""
    on, side = gpu.device(cfg), cfg.size // 16
    rows = training.SubjectSpatial(Path(cfg.data), "test", cfg.conditions, cfg.size)
    flux = FluxTransformer2DModel.from_pretrained(f"{cfg.flux}/transformer", dtype=torch.bfloat16)
    mix = mix_of(cfg.variant, flux.config, (side, side), cfg.epsilon, cfg.relative)
    model = load_adapters(flux, cfg.weights, cfg.conditions, (SUBJECT,), mix).to(on, torch.bfloat16)
    encoders, found = Encoders(cfg.flux, on), []
    for index in range(min(cfg.test_scenes, len(rows))):
        shown, caption, item = rows[index]
        given = encoders.text([caption], [item]) | {name: encoders.latents(image[None].to(on)) for name, image in shown.items() if name != "image"}
        if flux.config.guidance_embeds:
            given["guidance"] = torch.full((1,), 3.5, device=on)
        noise = torch.randn(1, 16, cfg.size // 8, cfg.size // 8, generator=torch.Generator().manual_seed(index)).to(on, torch.bfloat16)
        z = sample(model, noise, given, steps=28 if flux.config.guidance_embeds else 4, shift=resolution_shift(side**2))
        found.append(likeness(encoders.pixels(z)[0], shown))
    return {"images": len(found)} | {name: fmean(one[name] for one in found) for name in found[0]}


def likeness(image: UInt8[Tensor, "3 H W"], shown: dict[str, UInt8[Tensor, "3 H W"]]) -> dict[str, float]:
    """SSIM of a picture and the scene, and the F1 of its Canny edges where canny was a condition."""
    arrays = {name: t.permute(1, 2, 0).numpy() for name, t in (shown | {"drawn": image}).items()}
    values = {"ssim": structural_similarity(arrays["drawn"], arrays["image"], channel_axis=2)}
    if "canny" in shown:
        found, wanted = canny(arrays["drawn"].mean(2) / 255), arrays["canny"].mean(2) > 127
        values["canny_f1"] = 2 * float((found & wanted).sum()) / max(1.0, float(found.sum() + wanted.sum()))
    return values
