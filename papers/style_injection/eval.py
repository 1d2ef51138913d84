"""Judge the images of all methods with a scene reader, look into the injected attention maps, and run the authors' 800 pairs on real weights."""

import math
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.models import vgg19
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image

from common import gpu
from common.attention import attention_logits
from common.data import scenes
from common.errors import UserError
from common.loop import load_weights, read_safetensors
from common.pictures import as_png, from_png
from common.reader import Reader, fid, lpips, read, truth
from common.results import Measured, content_hash
from common.stable_diffusion import StableDiffusion
from papers.style_injection.model import Setting, StyleID, art_fid, cfsd, colour_histogram, from_original, histogram_loss
from papers.style_injection.train import (
    ADAIN,
    BACK,
    FLAT,
    GAMMAS,
    NO_ADAIN,
    PROMPT,
    SDEDIT,
    SETTINGS,
    STYLE_ID,
    SWAP,
    Config,
    LearntPrompts,
    Material,
    backbone,
    encoded,
    images_of,
    material,
    prompt_loss,
    redrawn,
)

BASELINES = (ADAIN, SDEDIT, SWAP, PROMPT)
FACTORS, KINDS = list(scenes.FACTORS), list(scenes.FACTORS["style"])
CONTENT = [FACTORS.index(name) for name in ("layout", "shape", "second shape")]

# ---- claims -----------------------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; give --weights too to stylise real images: `just eval style_injection --help`")
    made = [material(cfg, seed) for seed in cfg.seeds]
    images = [read_safetensors(images_of(cfg, seed))[0] for seed in cfg.seeds]
    reader = Reader.from_pretrained("tiny")
    methods = [*SETTINGS, SDEDIT, PROMPT]
    found = {name: [judged(reader, images[i][name], made[i]) for i in range(len(made))] for name in methods}
    model = backbone(cfg)
    maps = [attention(cfg, model, m) for m in made]
    times, kept = seconds(cfg, model, made[0]), kept_for_backward(cfg, model, made[0])

    each_seed = lambda key, name: [run[key] for run in found[name]]
    less = lambda key, a, b: [x - y for x, y in zip(each_seed(key, a), each_seed(key, b), strict=True)]
    over = lambda key, a, b: [x / y for x, y in zip(each_seed(key, a), each_seed(key, b), strict=True)]
    best = [min(found[name][i]["art_fid"] for name in BASELINES) for i in range(len(made))]
    sweep = lambda key: [rank_correlation(GAMMAS, [found[f"γ {gamma:g}"][i][key] for gamma in GAMMAS]) for i in range(len(made))]
    values = {
        "C1": [a / b for a, b in zip(each_seed("art_fid", STYLE_ID), best, strict=True)],
        "C2": less("content", STYLE_ID, SWAP),
        "C2b": over("lpips", STYLE_ID, SWAP),
        "C3": sweep("content"),
        "C3b": sweep("style"),
        "C4": [np.mean(np.array(m["spread"]) > 1) for m in maps],
        "C4b": [abs(m["entropy τ 1.5"] - m["entropy own"]) - abs(m["entropy τ 1"] - m["entropy own"]) for m in maps],
        "C4c": less("content", STYLE_ID, FLAT),
        "C5": [100 * (1 - ratio) for ratio in over("histogram", STYLE_ID, NO_ADAIN)],
        "C6": float(kept),
        "C6b": times["StyleID"] / (cfg.steps * times["a step of fitting a prompt"] + times["sampling with it"]),
        "C7": [m["edges"] for m in maps],
    }
    values = {claim: [float(v) for v in value] if isinstance(value, list) else value for claim, value in values.items()}
    details = {
        "methods": found,
        "limits": [limits(reader, images[i][BACK], made[i]) for i in range(len(made))],
        "maps": maps,
        "seconds": times,
        "pictures": pictures(images[0], made[0]),
    }
    return Measured(values, details, {"scenes": content_hash(*(part.images for m in made for part in m[:2]))})


def rank_correlation(x: tuple[float, ...], y: list[float]) -> float:
    return 0.0 if len(set(y)) == 1 else round(float(spearmanr(x, y).statistic), 12)  # -0.9 is not -0.8999999999999998


# ---- what the images are worth ------------------------------------------------------------------------------------------------------------


def judged(reader: Reader, images: UInt8[Tensor, "p 3 H W"], made: Material) -> dict[str, float]:
    """Content: layout and shapes read rightly, in %. Style: the reader's probability of its kind, in %. The others are distances."""
    images, (c, s) = images / 255, made.pairs.unbind(1)
    contents, styles = made.contents.images[c] / 255, made.styles.images[s] / 255
    kind = torch.tensor([KINDS.index(scene.style) for scene in made.styles.scenes])[s]
    with torch.no_grad():
        probability = reader(images)["style"].softmax(1).gather(1, kind[:, None])
        distance = lpips(reader, images, contents).mean().item()
        structure = cfsd(reader.features(contents)[1], reader.features(images)[1]).mean().item()
    frechet = fid(reader, images, styles)
    return {
        "content": right(reader, images, truth(made.contents.scenes)[c]),
        "style": 100 * probability.mean().item(),
        "lpips": distance,
        "fid": frechet,
        "art_fid": art_fid(distance, frechet),
        "cfsd": structure,
        "histogram": histogram_loss(colour_histogram(images), colour_histogram(styles)).mean().item(),
        "mean colour": (images.mean((2, 3)) - styles.mean((2, 3))).norm(dim=1).mean().item(),
    }


def right(reader: Reader, images: Float[Tensor, "n 3 H W"], asked: Int[Tensor, "n factors"]) -> float:
    """Layout and shapes, in %."""
    found, asked = read(reader, images)[:, CONTENT], asked[:, CONTENT]
    return 100 * (found == asked)[asked >= 0].double().mean().item()


def limits(reader: Reader, back: UInt8[Tensor, "n 3 H W"], made: Material) -> dict[str, float]:
    """The measures on the contents themselves, on their inversion and back, and on the style images."""
    contents, asked = made.contents.images / 255, truth(made.contents.scenes)
    psnr = -10 * (back / 255 - contents).square().mean((1, 2, 3)).log10()
    kind = torch.tensor([KINDS.index(scene.style) for scene in made.styles.scenes])
    with torch.no_grad():
        probability = reader(made.styles.images / 255)["style"].softmax(1).gather(1, kind[:, None])
    return {
        "content of the contents": right(reader, contents, asked),
        "content there and back": right(reader, back / 255, asked),
        "psnr there and back": psnr.mean().item(),
        "style of the styles": 100 * probability.mean().item(),
    }


# ---- inside the maps ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention(cfg: Config, model: StableDiffusion, made: Material) -> dict:
    """The content's queries on its own keys and on the styles', all pairs, in every injected layer and step.

    spread: standard deviation of the logits over the keys, own / style, by layer and step from the noisiest. Entropies in nats. edges: see C7.
    """
    method = StyleID.of(model, cfg.layers, steps=cfg.sampling, original=cfg.original)
    content, style = (method.invert(encoded(model, part.images)).features for part in made[:2])
    c, s = made.pairs.unbind(1)
    spread, entropies, edges = {}, {"own": [], "τ 1": [], "τ 1.5": []}, []
    for at in sorted(content):
        q, own, other = content[at]["q"][c], content[at]["k"][c], style[at]["k"][s]
        own, other = attention_logits(q, own), attention_logits(q, other)
        spread.setdefault(at[0], []).append((own.std(-1).mean() / other.std(-1).mean()).item())
        for name, logits in {"own": own, "τ 1": other, "τ 1.5": 1.5 * other}.items():
            entropies[name].append(torch.special.entr(logits.softmax(-1)).sum(-1).mean().item())
        side = math.isqrt(q.shape[2])
        edged_c, edged_s = (has_edge(part.instances, side)[which].to(q.device) for part, which in zip(made[:2], (c, s), strict=True))
        weight = ((1.5 * other).softmax(-1) * edged_s[:, None, None]).sum(-1).mean(1)  # on the style's edges, of each query
        edges.append((weight[edged_c].mean() - weight[~edged_c].mean()).item())
    return {"spread": list(spread.values()), "edges": fmean(edges)} | {f"entropy {name}": fmean(e) for name, e in entropies.items()}


def has_edge(instances: UInt8[Tensor, "n H W"], side: int) -> Bool[Tensor, "n tokens"]:
    """Which tokens of a map of side x side see more than one thing, the background being one."""
    size = instances.shape[-1] // side
    most, least = F.max_pool2d(instances[:, None].float(), size), -F.max_pool2d(-instances[:, None].float(), size)
    return (most != least).flatten(1)


# ---- cost ---------------------------------------------------------------------------------------------------------------------------------


def one_image(cfg: Config, model: StableDiffusion, made: Material) -> Float[Tensor, "1 l h w"]:
    """The whole method on one pair."""
    method = StyleID.of(model, cfg.layers, steps=cfg.sampling, original=cfg.original)
    content, style = (method.invert(encoded(model, part.images[:1]), kept) for part, kept in zip(made[:2], ("q", "kv"), strict=True))
    return method.stylise(content, style)


def kept_for_backward(cfg: Config, model: StableDiffusion, made: Material) -> int:
    """Tensors that autograd would keep if the model's parameters could be trained."""
    kept = []
    model.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        one_image(cfg, model, made)
    model.requires_grad_(False)
    return len(kept)


def seconds(cfg: Config, model: StableDiffusion, made: Material) -> dict[str, float]:
    """For one pair, measured in turns."""
    prompts = LearntPrompts(model, 1)
    optimizer = torch.optim.AdamW(prompts.parameters(), cfg.lr, fused=True)
    z_c, z_s = (encoded(model, part.images[:1]) for part in made[:2])
    first, noise = torch.zeros(1, dtype=torch.long), model.noise(1, 0)

    def fit_a_step() -> None:
        prompt_loss(model)(prompts, (z_s, first)).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sample_with_it() -> None:
        redrawn(cfg, model, z_c, noise, {"encoder_hidden_states": prompts.context})

    calls = {"StyleID": lambda: one_image(cfg, model, made), "a step of fitting a prompt": fit_a_step, "sampling with it": sample_with_it}
    return gpu.alternate(calls, repeats=3, seconds=0.02)


# ---- figure -------------------------------------------------------------------------------------------------------------------------------


def pictures(images: dict[str, UInt8[Tensor, "p 3 H W"]], made: Material) -> dict:
    """Two sheets: contents x styles; and the methods, a pair of each kind a row."""
    contents, styles = made.contents.images, made.styles.images
    at = lambda name, c, s: images[name][c * len(styles) + s]
    blank = torch.full_like(contents[0], 255)
    few_c, few_s = range(min(4, len(contents))), range(min(8, len(styles)))
    grid = [[blank, *(styles[s] for s in few_s)]] + [[contents[c], *(at(STYLE_ID, c, s) for s in few_s)] for c in few_c]
    methods = [STYLE_ID, FLAT, "γ 0", NO_ADAIN, SWAP, ADAIN, SDEDIT, PROMPT]
    rows = [[contents[k % len(contents)], styles[k]] + [at(name, k % len(contents), k) for name in methods] for k in range(4)]
    return {"grid": sheet(grid), "methods": sheet(rows), "names": ["content", "style", "StyleID", *methods[1:]]}


def sheet(rows: list[list[UInt8[Tensor, "3 H W"]]], gap: int = 2) -> str:
    cells = [torch.cat([F.pad(cell, (gap,) * 4, value=255) for cell in row], 2) for row in rows]
    return as_png(torch.cat(cells, 1).permute(1, 2, 0).numpy())


def figure(details: dict) -> Figure:
    """Stylised grid; one pair of each kind through all methods; the balance of content and style; spread of the logits."""
    drawn = Figure(figsize=(13, 9), layout="constrained")
    top, bottom = drawn.subfigures(2, 1, height_ratios=(0.8, 1))
    left, right = top.subplots(1, 2, width_ratios=(0.95, 1.05))
    show(left, details["pictures"]["grid"], "StyleID: the rows' contents in the columns' styles")
    columns = show(right, details["pictures"]["methods"], "The same pairs by every method\n\n")
    for x, name in zip(columns, details["pictures"]["names"], strict=True):
        right.text(x, -2, name, rotation=30, ha="left", va="bottom", fontsize=8)
    balance, spread = bottom.subplots(1, 2, width_ratios=(1.2, 1))
    mean = {name: [fmean(run[key] for run in runs) for key in ("content", "style")] for name, runs in details["methods"].items()}
    swept = [mean[f"γ {gamma:g}"] for gamma in GAMMAS]
    balance.plot(*zip(*swept, strict=True), "o-", label="StyleID, τ = 1.5")
    for gamma, point in [*zip(GAMMAS, swept, strict=True)][::2]:
        balance.annotate(f"γ = {gamma:g}", point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    for name, marker in zip((FLAT, NO_ADAIN, SWAP, ADAIN, SDEDIT, PROMPT), "sDPX^v", strict=True):
        balance.plot(*mean[name], marker, label=name, linestyle="none")
    ceiling = fmean(run["content of the contents"] for run in details["limits"])
    balance.axvline(ceiling, color="gray", linewidth=0.8, linestyle=":", label="content images themselves")
    balance.margins(0.08)
    balance.set(xlabel="content: layout and shapes read rightly, %", ylabel="style: the reader's probability, %")
    balance.legend(fontsize=8)
    by_layer = np.mean([m["spread"] for m in details["maps"]], 0)
    for k, line in enumerate(by_layer):
        spread.plot(range(len(line)), line, ".-", label=f"injected layer {k + 1} of {len(by_layer)}")
    spread.axhline(1, color="gray", linewidth=0.8)
    spread.axhline(1.5, color="gray", linewidth=0.8, linestyle=":", label="τ")
    spread.set(xlabel="step, from noise to image", ylabel="std of logits, own keys / style keys", title="What the temperature makes up for")
    spread.legend(fontsize=8)
    return drawn


def show(axis, png: str, title: str) -> list[float]:
    """A sheet with hard pixels; the middles of its columns."""
    image = from_png(png)
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")
    return [18 + 36 * k for k in range(image.shape[1] // 36)]


# ---- real weights -------------------------------------------------------------------------------------------------------------------------


def evaluate_published(cfg: Config) -> dict:
    """Every content of DATA/cnt in every style of DATA/sty, written to OUT/stylised under the names that the authors' scripts expect.

    --weights: a directory as diffusers publishes it, the original file of Stable Diffusion 1, or "tiny". Reports the histogram loss, and
    with --vgg CFSD, both means over all pairs.
    """
    source = Path(cfg.weights)
    model = from_original(source) if source.is_file() else StableDiffusion.from_pretrained(str(source))
    model = model.to(gpu.device(cfg)).requires_grad_(False)
    size = model.unet.config.sample_size * model.factor
    contents, styles = (folder(Path(cfg.data) / part, size) for part in ("cnt", "sty"))
    method = StyleID.of(model, cfg.layers, steps=cfg.sampling, original=cfg.original)
    vgg = None if cfg.vgg is None else load_weights(vgg19(), cfg.vgg).features[:12].eval().to(gpu.device(cfg))
    target = cfg.out / "stylised"
    target.mkdir(parents=True, exist_ok=True)
    began, losses, structure = time.monotonic(), [], []
    for content_name, image in contents.items():
        content = method.invert(encoded(model, image[None]), "q")
        for style_name in styles:  # inverted once more for each content: the features of all would not fit into memory
            style = method.invert(encoded(model, styles[style_name][None]), "kv")
            z = method.stylise(content, style, setting=Setting(cfg.gamma, cfg.tau))
            with torch.no_grad():
                output = model.decode(z).clamp(0, 1).float()
            to_pil_image(output[0].cpu()).save(target / f"{content_name}_stylized_{style_name}.png")
            both = torch.cat([output.cpu(), styles[style_name][None] / 255])
            small = F.interpolate(both, size=min(256, size), mode="bilinear", antialias=True)
            losses.append(histogram_loss(*(colour_histogram(x[None]) for x in small)).item())
            if vgg is not None:
                structure.append(cfsd(*(vgg(normalised(x)) for x in (image[None].to(output) / 255, output))).item())
    found = {"images": len(losses), "seconds an image": (time.monotonic() - began) / len(losses), "histogram loss": fmean(losses)}
    return found | ({"CFSD": fmean(structure)} if structure else {}) | {"written to": str(target)}


def normalised(x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """With ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v).to(x)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / std


def folder(directory: Path, size: int) -> dict[str, UInt8[Tensor, "3 size size"]]:
    """The images of a directory by their stems: the middle square, resized by Lanczos."""
    files = sorted(p for p in directory.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{directory} holds no .png or .jpg: --data is the authors' data directory, with content images in cnt and styles in sty")
    found = {}
    for path in files:
        try:
            with Image.open(path) as image:
                square = center_crop(image.convert("RGB"), min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path} cannot be read as an image ({error}): delete it or fetch it again") from None
        found[path.stem] = pil_to_tensor(square)
    return found
