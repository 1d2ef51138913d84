"""Measure CrossFormer's claims on scale-mix scenes, or a published checkpoint's accuracy on ImageNet."""

from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import gpu
from common.data import images
from common.loop import load_run, load_weights
from common.results import Measured, content_hash
from papers.crossformer.model import VARIANTS, CrossFormer, GroupAttention, published_name
from papers.crossformer.train import DENSE, MICRO, SCALES, Config, Segmenter, build, dense, normalized, scene_set

POSITIONS = ("crossformer", "rpb", "ape")
SIZES = (40, 60, 72)  # pixels, none of them trained on: 10 and 15 tokens need padding, 18 do not


# ---- accuracies -------------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor) -> Tensor:
    on = next(model.parameters()).device
    return torch.cat([model(normalized(part.to(on))).argmax(1).cpu() for part in image.split(256)])


def accuracy(cfg: Config, model: nn.Module, size: int) -> float:
    """In percent; at other sizes than the one trained on, of half as many images."""
    image, label, _ = scene_set(cfg.test_images if size == cfg.size else cfg.test_images // 2, 2, size).tensors
    return 100 * (predict(model, image) == label).float().mean().item()


def mean_iou(predicted: Tensor, mask: Tensor, classes: int = 5) -> float:
    """Intersection over union, averaged over the classes, in percent."""
    counts = torch.bincount((classes * mask + predicted).flatten(), minlength=classes**2).view(classes, classes).double()
    hits = counts.diagonal()
    return 100 * (hits / (counts.sum(0) + counts.sum(1) - hits).clamp(min=1)).mean().item()


# ---- cost -------------------------------------------------------------------------------------------------------------------------------


def cost(sides: tuple[int, ...]) -> dict[str, list[float]]:
    """Operations and seconds of one attention layer (width 64, 2 heads, no bias) on maps of side x side tokens: in groups of 7 x 7, and over
    the whole map with the fused kernel."""
    layer, measured = GroupAttention(64, 2, None).eval(), {"lsda_flops": [], "full_flops": [], "lsda_seconds": [], "full_seconds": []}
    with torch.inference_mode():
        for side in sides:
            x = torch.randn(1, side * side, 64)
            calls = {
                "lsda": lambda x=x, side=side: layer(x, (side, side), (7, 7), side // 7),
                "full": lambda x=x, side=side: layer(x, (side, side), (side, side), 1),
            }
            seconds = gpu.alternate(calls, repeats=3, seconds=0.1)
            for name, call in calls.items():
                measured[f"{name}_flops"].append(gpu.count_flops(call))
                measured[f"{name}_seconds"].append(seconds[name])
    return measured


def exponent(sides: tuple[int, ...], values: list[float]) -> float:
    """Of a power law in the number of tokens."""
    return float(np.polyfit(np.log(np.square(sides)), np.log(values), 1)[0])


def score_flops(side: int, group: int, width: int = 64) -> int:
    """Operations of Q Kᵀ and its product with V alone, counted."""
    q = torch.randn(side * side // group**2, 2, group**2, width // 2)
    return gpu.count_flops(lambda: (q @ q.transpose(-1, -2)) @ q)


# ---- claims -----------------------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> Measured:
    load = lambda variant, seed: load_run(build(cfg, variant), cfg, f"classify/{variant}/{seed}")
    top1 = {v: [accuracy(cfg, load(v, seed), cfg.size) for seed in cfg.seeds] for v in MICRO}
    other, wide = ({v: [] for v in POSITIONS} for _ in range(2))
    for variant in POSITIONS:
        for seed in cfg.seeds:
            model = load(variant, seed)
            other[variant].append([accuracy(cfg, model, size) for size in SIZES])
            model.regroup((2 * cfg.group, 2 * cfg.group - 1), (3, 2), "interval")
            wide[variant].append(accuracy(cfg, model, SIZES[-1]))
    miou, (image, _, mask) = {v: [] for v in DENSE}, scene_set(cfg.test_images, 2, cfg.size).tensors
    for variant in DENSE:
        for seed in cfg.seeds:
            model = load_run(Segmenter(build(cfg, variant), cfg.dim), dense(cfg), f"segment/{variant}/{seed}")
            miou[variant].append(mean_iou(predict(model, image), mask))

    measured = cost(cfg.sides)
    gain = lambda table, *rivals: [min(table["crossformer"][i] - table[r][i] for r in rivals) for i in range(len(cfg.seeds))]
    wide_drop = {v: [top1[v][i] - wide[v][i] for i in range(len(cfg.seeds))] for v in POSITIONS}
    size_drop = {v: [top1[v][i] - fmean(other[v][i]) for i in range(len(cfg.seeds))] for v in POSITIONS}
    less = lambda drop, *rivals: [min(drop[r][i] - drop["crossformer"][i] for r in rivals) for i in range(len(cfg.seeds))]
    values = {
        "C1": gain(top1, "swin", "pvt"),
        "C2": gain(top1, "no_cel"),
        "C3": gain(top1, "sda_only", "shifted_windows"),
        "C4": less(wide_drop, "rpb", "ape"),
        "C4b": gain(top1, "rpb"),
        "C5": exponent(cfg.sides, measured["lsda_flops"]),
        "C5b": score_flops(56, 56) / score_flops(56, 7),
        "C5c": exponent(cfg.sides, measured["full_seconds"]) - exponent(cfg.sides, measured["lsda_seconds"]),
        "C6": gain(miou, "swin_dense"),
        "C6b": [dense_gain - gain for dense_gain, gain in zip(gain(miou, "swin_dense"), gain(top1, "swin"), strict=True)],
        "C7": less(size_drop, "rpb"),
    }
    details = {
        "top1": top1,
        "parameters": {v: gpu.count_params(build(cfg, v)) for v in MICRO},
        "macs": {v: macs(cfg, v) for v in MICRO},
        "sizes": list(SIZES),
        "top1_at_sizes": other,
        "top1_wide_groups": wide,
        "miou": miou,
        "sides": list(cfg.sides),
        "cost": measured,
        "bias": position_bias(load("crossformer", cfg.seeds[0])),
    }
    train_set, test_set = scene_set(cfg.train_images, 1, cfg.size), scene_set(cfg.test_images, 2, cfg.size)
    return Measured(values, details, {"scale-mix train": content_hash(*train_set.tensors), "scale-mix test": content_hash(*test_set.tensors)})


def macs(cfg: Config, variant: str) -> int:
    """Multiply-adds of one image."""
    model = build(cfg, variant).eval()
    return gpu.count_flops(lambda: model(torch.zeros(1, 1, cfg.size, cfg.size))) // 2


@torch.inference_mode()
def position_bias(model: CrossFormer) -> list:
    """The learnt bias of each head of the first block, over offsets of up to 6 tokens, twice as far as it was trained for."""
    offsets = torch.stack(torch.meshgrid(*[torch.arange(-6.0, 7.0)] * 2, indexing="ij"), -1).flatten(0, 1)
    return model.layers[0].blocks[0].attn.pos.table(offsets).T.reshape(-1, 13, 13).tolist()


@torch.inference_mode()
def evaluate_published(cfg: Config) -> dict[str, float]:
    """ImageNet top-1 of a published checkpoint: the paper reports T 81.5, S 82.5, B 83.4, L 84.0."""
    dataset = images.image_folder(cfg.data, "val", images.eval_transform())
    model = load_weights(CrossFormer(**VARIANTS[cfg.variant], num_classes=len(dataset.classes)), cfg.weights, published_name, key="model")
    on = gpu.device(cfg)
    model.to(on).eval()
    hits = [(model(x.to(on)).argmax(1).cpu() == y).sum().item() for x, y in DataLoader(dataset, 64, num_workers=cfg.workers)]
    return {"images": len(dataset), "top1": 100 * sum(hits) / len(dataset)}


# ---- figure and bench -------------------------------------------------------------------------------------------------------------------


def figure(details: dict) -> Figure:
    """Accuracy of the variants; accuracy at sizes never trained on; cost over tokens; the learnt bias."""
    fig = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right, inset = fig.subplots(1, 4, width_ratios=(1.5, 1.1, 1.1, 0.9))
    for i, (variant, values) in enumerate(details["top1"].items()):
        left.barh(i, fmean(values), color="C0" if variant == "crossformer" else "0.8")
        left.plot(values, [i] * len(values), "k.", markersize=5)
    left.set_yticks(range(len(details["top1"])), [name.replace("_", " ") for name in details["top1"]])
    left.invert_yaxis()
    left.set(xlabel="top-1 [%]", title="one part exchanged at a time")
    for variant, label in zip(POSITIONS, ("DPB", "RPB, resized", "APE, resized"), strict=True):
        rows = np.array(details["top1_at_sizes"][variant])
        sizes = np.array([48, *details["sizes"]])
        order, values = np.argsort(sizes), np.concatenate([np.array(details["top1"][variant])[:, None], rows], 1)
        middle.plot(sizes[order], values.mean(0)[order], "o-", label=label)
    middle.axvline(48, color="0.8", zorder=0)
    middle.set(xlabel="image side [pixels], trained at 48", ylabel="top-1 [%]", title="sizes never trained on")
    middle.legend()
    tokens = np.square(details["sides"])
    for name, label in (("full", "full attention"), ("lsda", "LSDA, 7 x 7")):
        right.loglog(tokens, 1e3 * np.array(details["cost"][f"{name}_seconds"]), "o-", label=label)
    right.set(xlabel="tokens", ylabel="milliseconds", title="one layer, forward")
    right.set_xticks(tokens, tokens)
    right.set_xticks([], minor=True)
    right.legend()
    bias = np.array(details["bias"])[0]
    shown = inset.imshow(bias, extent=(-6.5, 6.5, 6.5, -6.5), cmap="RdBu", vmin=-abs(bias).max(), vmax=abs(bias).max())
    fig.colorbar(shown, ax=inset, shrink=0.7)
    inset.plot([-2.5, 2.5, 2.5, -2.5, -2.5], [-2.5, -2.5, 2.5, 2.5, -2.5], "k-", linewidth=0.8)
    inset.set(xlabel="dx", ylabel="dy", title="DPB of head 1,\ntrained in the square")
    return fig


def bench() -> dict:
    """Images a second and peak memory of T and S beside timm's Swin-T at 224, and attention in groups beside full attention."""
    import timm

    models = {name: timm.create_model(name) for name in ("crossformer_tiny", "crossformer_small", "swin_tiny_patch4_window7_224")}
    image, found = torch.randn(4, 3, 224, 224), {"batch": 4}

    def forward(model):
        with torch.inference_mode():
            model(image)

    def backward(model):
        model(image).sum().backward()
        model.zero_grad()

    for label, run, mode in (("forward", forward, False), ("forward_backward", backward, True)):
        calls = {name: lambda m=m, run=run: run(m) for name, m in models.items() if m.train(mode)}
        for name, seconds in gpu.alternate(calls, repeats=3, seconds=1).items():
            found[f"{name}_{label}"] = {"images_per_second": 4 / seconds, "peak_mib": gpu.peak_memory(calls[name]) / 2**20}
    sides = SCALES["small"].sides
    return found | {"sides": list(sides)} | cost(sides)
