"""Measure FILIP's claims on captioned scenes; a published checkpoint by zero-shot classification or by retrieval."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common import gpu
from common.backbones.clip import CLIPEncoder, CLIPVisionConfig
from common.data import images, scenes
from common.errors import UserError
from common.loop import load_run
from common.results import Measured, content_hash
from papers.filip.model import FILIP, GlobalCLIP, contrastive_loss, load_published, matches, similarities, towers
from papers.filip.train import COMPARED, SCALES, Config, build, normalized, scene_set, tokenizer, transform

SHOWN = 2  # scenes of the figure
CLASSES = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; for benchmarks give a checkpoint: `just eval filip --weights FILE --data DIR`")
    test, single = scene_set(cfg.test_scenes, 2, cfg.size), single_things(cfg)
    found = {variant: [quality(cfg, load(cfg, variant, seed), test, single) for seed in cfg.seeds] for variant in COMPARED}
    table = {name: {variant: [run[name] for run in runs] for variant, runs in found.items()} for name in found["filip"][0]}
    gain = lambda name, method, baseline: [a - b for a, b in zip(table[name][method], table[name][baseline], strict=True)]
    filip = load(cfg, "filip", cfg.seeds[0])
    cost, iteration, query = loss_cost(cfg), iteration_cost(cfg), query_cost(cfg, filip, test)
    values = {
        "C1": list(map(min, gain("image_to_text", "filip", "clip"), gain("text_to_image", "filip", "clip"))),
        "C1b": gain("zero_shot", "filip", "clip"),
        "C2": gain("alignment", "filip", "clip"),
        "C3": min(cost["filip"] / cost["filip_50"], cost["filip_50"] / cost["filip_25"]),
        "C3b": iteration["seconds"]["filip_25"] / iteration["seconds"]["clip"],
        "C3c": iteration["bytes"]["filip_25"] / iteration["bytes"]["filip"],
        "C3d": gain("zero_shot", "filip_25", "filip"),
        "C4": query["together"] / query["stored"],
        "C4b": stored_difference(filip, test),
        "C7": gain("recall", "filip", "unmasked"),
        "C7b": gain("alignment", "filip", "unmasked"),
        "C8": gain("recall", "filip", "summed"),
    }
    examples = [example(cfg, test, i) for i in range(len(test.scenes)) if len(test.scenes[i].things) == 2][:SHOWN]
    details = table | {"loss_seconds": cost, "iteration": iteration, "query": query, "examples": examples}
    trained = scene_set(cfg.train_scenes, 1, cfg.size)
    return Measured(values, details, {"scenes train": content_hash(trained.images), "scenes test": content_hash(test.images, *single)})


def load(cfg: Config, variant: str, seed: int) -> FILIP:
    return load_run(build(cfg, variant), cfg, f"{variant}/{seed}")


# ---- quality ----------------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def quality(cfg: Config, model: FILIP, test: scenes.Captioned, single: tuple[Tensor, Tensor]) -> dict[str, float]:
    """R@1 in both directions, their mean, and zero-shot accuracy, in percent; the share of patches that find the right word, and by chance."""
    on = gpu.device(cfg)
    s_image, s_text = (s.cpu() for s in model(normalized(test.images).to(on), tokenizer()(test.captions).to(on)))
    same = torch.tensor([[a == b for b in test.captions] for a in test.captions])
    ways = recall(s_image, same, 1), recall(s_text.T, same, 1)
    asked = model.text_tokens(tokenizer()(prompts(CLASSES)).to(on))
    score = model.class_scores(model.image_tokens(normalized(single[0]).to(on)), *asked, len(CLASSES))
    right, chance = alignment(cfg, model, test)
    return {
        "image_to_text": ways[0],
        "text_to_image": ways[1],
        "recall": fmean(ways),
        "zero_shot": 100 * (score.argmax(1).cpu() == single[1]).double().mean().item(),
        "alignment": right,
        "alignment_chance": chance,
    }


def single_things(cfg: Config, ground: str = "gray") -> tuple[UInt8[Tensor, "n 3 H W"], Int[Tensor, "n"]]:
    """Images and classes of scenes with one thing, on one ground, which the prompts can tell."""
    drawn = scene_set(4 * cfg.test_scenes, 3, cfg.size, single=1.0)
    kept = [i for i, scene in enumerate(drawn.scenes) if scene.background == ground]
    things = [drawn.scenes[i].things[0] for i in kept]
    return drawn.images[kept], torch.tensor([CLASSES.index(f"{thing.colour} {thing.shape}") for thing in things])


def prompts(classes: list[str], ground: str = "gray") -> list[str]:
    """Six of each class, class by class: without a place and with each."""
    places = ["", *(f" at the {place}" for place in scenes.PLACES)]
    return [f"a{'n' if name[0] == 'o' else ''} {name}{place} on a {ground} background" for name in classes for place in places]


def recall(scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"], k: int) -> float:
    """Share of the queries with something relevant among the k best, in percent."""
    best = scores.topk(min(k, scores.shape[1])).indices
    return 100 * relevant.take_along_dim(best, 1).any(1).double().mean().item()


@torch.inference_mode()
def found_words(model: FILIP, test: scenes.Captioned) -> tuple[Int[Tensor, "i n1"], Bool[Tensor, "i n2"]]:
    """The word that each patch finds in its own caption, and the mask; CLIP's patches are projected like its class token."""
    on, tokens = next(model.parameters()).device, FILIP if isinstance(model, GlobalCLIP) else type(model)
    image = tokens.image_tokens(model, normalized(test.images).to(on))
    text, mask = tokens.text_tokens(model, tokenizer()(test.captions).to(on))
    return matches(image, text, mask).cpu(), mask.cpu()


def alignment(cfg: Config, model: FILIP, test: scenes.Captioned) -> tuple[float, float]:
    """Share of the patches at least half covered by a thing that find a word of its phrase; and of a random word of the caption."""
    word, mask = found_words(model, test)
    right, chance = [], []
    for i, scene in enumerate(test.scenes):
        for k, thing in enumerate(scene.things, 1):
            mine = word[i][patches_of(test.instances[i] == k, cfg.patch)]
            phrase = torch.tensor(phrase_of(thing, test.captions[i]))
            right.append(torch.isin(mine, phrase).double())
            chance.append(torch.full_like(right[-1], len(phrase) / mask[i].sum()))
    return torch.cat(right).mean().item(), torch.cat(chance).mean().item()


def patches_of(mask: Bool[Tensor, "h w"], patch: int) -> Bool[Tensor, "n1"]:
    """The patches of which the mask covers at least half."""
    return F.avg_pool2d(mask.float()[None], patch).flatten() >= 0.5


def phrase_of(thing: scenes.Thing, caption: str) -> list[int]:
    """The places of "striped red circle" among the caption's tokens, without the article."""
    return tokenizer().at(caption, scenes.describe(thing).split(" ", 1)[1])


@torch.inference_mode()
def example(cfg: Config, test: scenes.Captioned, i: int) -> dict:
    """A scene, its words, and for each patch the word it finds and the places of the words it should find."""
    one = scenes.Captioned(test.images[i : i + 1], test.captions[i : i + 1], test.scenes[i : i + 1], test.instances[i : i + 1], test.depth[i : i + 1])
    wanted = [[] for _ in range((cfg.size // cfg.patch) ** 2)]
    for k, thing in enumerate(one.scenes[0].things, 1):
        for patch in patches_of(one.instances[0] == k, cfg.patch).nonzero().flatten().tolist():
            wanted[patch] = phrase_of(thing, one.captions[0])
    words = ["(start)", *one.captions[0].split(), "(end)"]
    found = {variant: found_words(load(cfg, variant, cfg.seeds[0]), one)[0][0].tolist() for variant in ("filip", "clip")}
    return {"image": one.images[0].permute(1, 2, 0).tolist(), "patch": cfg.patch, "words": words, "wanted": wanted} | found


# ---- cost -------------------------------------------------------------------------------------------------------------------------------

RATIOS = {"filip": 1.0, "filip_50": 0.5, "filip_25": 0.25}


def loss_cost(cfg: Config, patches: int = 49, words: int = 16, embed: int = 64, on: str = "cpu") -> dict[str, float]:
    """Seconds of the loss of given tokens, forward and backward, with the selection of tokens; texts have half to all of the words."""
    seeded = torch.Generator().manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(cfg.timed_batch, n, embed, generator=seeded), dim=-1).to(on).requires_grad_()
    lengths = torch.randint(words // 2, words + 1, (cfg.timed_batch, 1), generator=seeded)
    tokens = unit(patches), unit(words), (torch.arange(words) < lengths).to(on)
    model = build(cfg, "filip").to(on)

    def step(ratio: float, image: Tensor, text: Tensor, mask: Tensor) -> None:
        model.ratio = ratio
        contrastive_loss(*model.across_workers(image, text, mask), model.scale).backward()

    alone = tuple(t[:, :1] for t in tokens)
    functions = {"clip": partial(step, 1.0, *(t.detach().requires_grad_(t.is_floating_point()) for t in alone))}
    functions |= {name: partial(step, ratio, *tokens) for name, ratio in RATIOS.items()}
    return gpu.alternate(functions, cfg.repeats, seconds=0.05)


def iteration_cost(cfg: Config) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of a forward and backward pass of one batch of the training."""
    on, trained = gpu.device(cfg), scene_set(cfg.train_scenes, 1, cfg.size)
    image, ids = normalized(trained.images[: cfg.batch]).to(on), tokenizer()(trained.captions[: cfg.batch]).to(on)
    models = {variant: build(cfg, variant).to(on) for variant in ("clip", *RATIOS)}
    functions = {variant: lambda model=model: model.loss(image, ids).backward() for variant, model in models.items()}
    seconds = gpu.alternate(functions, cfg.repeats, seconds=0.05)
    return {"seconds": seconds, "bytes": {variant: gpu.peak_memory(function) for variant, function in functions.items()}}


@torch.inference_mode()
def query_cost(cfg: Config, model: FILIP, test: scenes.Captioned) -> dict[str, float]:
    """Seconds to find a caption's image: from stored tokens of the images, the query's text tower included; and by layers like those of the
    image tower over patches and words of each pair together, their embeddings given."""
    on = gpu.device(cfg)
    stored, ids = model.image_tokens(normalized(test.images).to(on)), tokenizer()(test.captions[:1]).to(on)
    reader = CLIPEncoder(model.config.vision_config).to(on).eval()
    together = torch.randn(len(stored), stored.shape[1] + int(ids.argmax()) + 1, cfg.dim, device=on)
    functions = {"stored": lambda: similarities(stored, *model.text_tokens(ids)), "together": lambda: reader(together, -1, causal=False)}
    return gpu.alternate(functions, cfg.repeats, seconds=0.05) | {"images": len(stored), "stored_floats": stored[0].numel()}


@torch.inference_mode()
def stored_difference(model: FILIP, test: scenes.Captioned, pairs: int = 32) -> float:
    """The largest difference between a score from tokens computed for all, and that of an image and a text alone."""
    on = next(model.parameters()).device
    image, ids = normalized(test.images).to(on), tokenizer()(test.captions).to(on)
    stored = model(image, ids)
    places = torch.randint(len(ids), (pairs, 2), generator=torch.Generator().manual_seed(0)).tolist()
    alone = [model(image[i : i + 1], ids[j : j + 1]) for i, j in places]
    return max(abs(a.item() - s[i, j].item()) for (i, j), pair in zip(places, alone, strict=True) for a, s in zip(pair, stored, strict=True))


def bench() -> dict:
    """Milliseconds at ViT-B/32's 49 patches, on the CPU and on a GPU if there is one, and their ratios: of the loss, to that of all tokens; and of
    one query among stored features, to that with tokens, beside what twelve layers over patches and words need for each pair."""
    cfg, timed = SCALES["small"], {}
    for on in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        for embed in (256, 512):
            cost = {LABELS[name]: seconds for name, seconds in loss_cost(cfg, 49, 32, embed, on).items()}
            timed[f"{on}, loss of {cfg.timed_batch} pairs, width {embed}", "FILIP"] = cost
        timed |= {(f"{on}, query among {stored} images", "tokens"): search(stored, on) for stored in (1_000, 10_000)}
    milliseconds = {f"{what}, {name}, milliseconds": 1e3 * s for (what, _), seconds in timed.items() for name, s in seconds.items()}
    ratios = {f"{what}, {name} / {base}": s / seconds[base] for (what, base), seconds in timed.items() for name, s in seconds.items() if name != base}
    return milliseconds | ratios


@torch.inference_mode()
def search(images: int, on: str, words: int = 12, pairs: int = 8) -> dict[str, float]:
    """Seconds of one query: late interaction, a product per image as CLIP has it, and ViT-B/32's layers over all pairs, timed on a few."""
    unit = lambda *shape: F.normalize(torch.randn(*shape, 256, device=on), dim=-1)
    stored, query, mask, one = unit(images, 49), unit(1, words), torch.ones(1, words, dtype=torch.bool, device=on), unit(images)
    reader, together = CLIPEncoder(CLIPVisionConfig()).to(on).eval(), torch.randn(pairs, 49 + words, 768, device=on)
    functions = {
        "tokens": lambda: similarities(stored, query, mask),
        "global": lambda: one @ query[0, 0],
        "read together": lambda: reader(together, -1, causal=False),
    }
    seconds = gpu.alternate(functions, 3)
    return seconds | {"read together": seconds["read together"] * images / pairs}


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

LABELS = {"clip": "CLIP", "filip": "FILIP", "filip_50": "50% of tokens", "filip_25": "25% of tokens", "unmasked": "no mask", "summed": "sums"}


def figure(details: dict) -> Figure:
    """What each patch finds in its caption, for FILIP and CLIP; what that is worth; what it costs."""
    fig = Figure(figsize=(13, 6.4), layout="constrained")
    pictures, plots = fig.subfigures(1, 2, width_ratios=(1.25, 1))
    for row, shown in zip(pictures.subplots(len(details["examples"]), 2, squeeze=False), details["examples"], strict=True):
        words = " ".join(f"{i}:{word}" for i, word in enumerate(shown["words"]))
        for axis, variant in zip(row, ("filip", "clip"), strict=True):
            draw_words(axis, shown, variant)
        half = words.find(" ", len(words) // 2)
        row[0].set_xlabel(words[:half], fontsize=6.5, loc="left")
        row[1].set_xlabel(words[half + 1 :], fontsize=6.5, loc="left")
    quality, cost = plots.subplots(2, 1)
    names = {"image_to_text": "R@1 image to text", "text_to_image": "R@1 text to image", "zero_shot": "zero-shot", "alignment": "alignment"}
    for i, (variant, label) in enumerate((v, LABELS[v]) for v in LABELS if v in details["alignment"]):
        for j, name in enumerate(names):
            runs = [run * (100 if name == "alignment" else 1) for run in details[name][variant]]
            place = j + 0.13 * (i - 2.5)
            quality.bar(place, fmean(runs), 0.12, color=f"C{i}", label=label if j == 0 else None)
            quality.plot([place] * len(runs), runs, "k.", markersize=3)
    quality.set_xticks(range(len(names)), names.values(), fontsize=8)
    quality.set(ylabel="%", ylim=(0, 115), title="Captioned scenes; a dot per seed")
    quality.legend(fontsize=7, ncols=6, loc="upper center", columnspacing=0.8, handlelength=1)
    timed = ["clip", *RATIOS]
    costs = {"the loss, at --timed-batch": details["loss_seconds"], "an iteration, at --batch": details["iteration"]["seconds"]}
    for k, (name, seconds) in enumerate(costs.items()):
        places = [i + 0.4 * k - 0.2 for i in range(len(timed))]
        bars = cost.bar(places, [1e3 * seconds[v] for v in timed], 0.38, color=f"C{7 + k}", label=name)
        cost.bar_label(bars, fmt="%.3g", fontsize=7)
    cost.set_xticks(range(len(timed)), [LABELS[v] for v in timed])
    cost.set(yscale="log", ylabel="milliseconds", title="Forward and backward, selection included")
    cost.margins(y=0.2)
    cost.legend(fontsize=8, loc="upper center", ncols=2)
    return fig


def draw_words(axis, shown: dict, variant: str) -> None:
    """The number of the word that each patch finds: green where it names the thing there, red where it does not, grey on the ground."""
    axis.imshow(np.array(shown["image"], np.uint8))
    patch, side = shown["patch"], round(len(shown["wanted"]) ** 0.5)
    hits = total = 0
    for k, (word, wanted) in enumerate(zip(shown[variant], shown["wanted"], strict=True)):
        hits, total = hits + (word in wanted), total + bool(wanted)
        face = ("#137333" if word in wanted else "#c5221f") if wanted else "0.45"
        box = {"boxstyle": "round,pad=0.15", "facecolor": face, "edgecolor": "none", "alpha": 0.85}
        at = (k % side + 0.5) * patch - 0.5, (k // side + 0.5) * patch - 0.5
        axis.text(*at, word, color="white", fontsize=7, ha="center", va="center", bbox=box)
    axis.set(xticks=[], yticks=[], title=f"{LABELS[variant]}: {hits} of {total} patches of the things")


# ---- published checkpoints --------------------------------------------------------------------------------------------------------------


def evaluate_published(cfg: Config) -> dict[str, float]:
    """Retrieval where DATA holds dataset_flickr30k.json or dataset_coco.json, else zero-shot top-1 on DATA/val."""
    import open_clip

    model = load_published(towers(cfg.arch), cfg.weights, GlobalCLIP if cfg.variant == "clip" else FILIP).to(gpu.device(cfg))
    tokenize, root = open_clip.get_tokenizer(cfg.arch), Path(cfg.data)
    splits = [root / name for name in ("dataset_flickr30k.json", "dataset_coco.json") if (root / name).is_file()]
    return retrieval(model, tokenize, splits[0]) if splits else zero_shot(model, tokenize, cfg)


@torch.inference_mode()
def zero_shot(model: FILIP, tokenize: Callable, cfg: Config) -> dict[str, float]:
    """Top-1 in percent with open_clip's seven prompts a class. Directories n01440764 ... have ImageNet's names, others are names themselves."""
    import open_clip

    on, size = gpu.device(cfg), model.config.vision_config.image_size
    dataset = images.image_folder(cfg.data, "val", transform(size, train=False))
    names = [name.replace("_", " ") for name in dataset.classes]
    if len(names) == 1000 and all(name[0] == "n" and name[1:].isdigit() for name in names):
        names = open_clip.IMAGENET_CLASSNAMES
    asked = [template(name) for name in names for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    parts = [model.text_tokens(part.to(on)) for part in tokenize(asked).split(256)]
    text, mask = (torch.cat(part) for part in zip(*parts, strict=True))
    right = [
        (model.class_scores(model.image_tokens(image.to(on)), text, mask, len(names)).argmax(1).cpu() == label).sum().item()
        for image, label in DataLoader(dataset, 64, num_workers=cfg.workers)
    ]
    return {"images": len(dataset), "top1": 100 * sum(right) / len(dataset)}


def karpathy(file: Path) -> tuple[list[Path], list[list[str]]]:
    """Images and captions of the test split of Karpathy's json, beside which lie flickr30k-images/, or COCO's val2014/."""
    try:
        rows = [row for row in json.loads(file.read_text())["images"] if row["split"] == "test"]
        paths = [file.parent / row.get("filepath", "flickr30k-images") / row["filename"] for row in rows]
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not one of Karpathy's splits ({error!r}): fetch it again") from None
    missing = next((path for path in paths if not path.is_file()), None)
    if missing or not paths:
        raise UserError(f"{missing or file} is missing or empty: {file.name} needs its images beside it, in flickr30k-images/ or val2014/")
    return paths, captions


@torch.inference_mode()
def retrieval(model: FILIP, tokenize: Callable, file: Path) -> dict[str, float]:
    """R@1, 5 and 10 in percent; an image has several captions, of which one must be found."""
    on, (paths, captions) = next(model.parameters()).device, karpathy(file)
    prepare = transform(model.config.vision_config.image_size, train=False)
    image = torch.cat([model.image_tokens(prepare(Image.open(path).convert("RGB"))[None].to(on)) for path in paths])
    parts = [model.text_tokens(part.to(on)) for part in tokenize([text for texts in captions for text in texts]).split(256)]
    s_image, s_text = (s.cpu() for s in model.compare(image, *(torch.cat(part) for part in zip(*parts, strict=True))))
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    own = owner == torch.arange(len(paths))[:, None]
    found = {f"image_to_text_r{k}": recall(s_image, own, k) for k in (1, 5, 10)}
    return found | {f"text_to_image_r{k}": recall(s_text.T, own.T, k) for k in (1, 5, 10)}
