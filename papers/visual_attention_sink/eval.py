"""Measure the claims of paper.toml: sinks in the small model as it is, and with sinks implanted; what VAR does to both."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from common import gpu
from common.attention import Site, controlled
from common.backbones.llava import Llava
from common.data import dialogues, text
from common.data.dialogues import IDS, NAMES, Album, pixels
from common.loop import each, load_run
from common.results import Measured, content_hash, write
from papers.visual_attention_sink import train as task
from papers.visual_attention_sink.model import RECEIVERS, TAU, VAR, KnockOut, Observe, first_token, redistributing, sink_channels, sink_value
from papers.visual_attention_sink.train import HELD_OUT, IMAGE, Config, Setting, backbone, background, build, exam, plain, run_name

IMPLANTED = "implanted: "
TOP = 8  # image tokens with the largest φ that stand for sinks in the model as it is: an eighth

# ---- looking ----------------------------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What `Observe` tells of the image tokens of each scene, asked for a caption."""

    phi: Float[Tensor, "layers n 64"]
    attention: Float[Tensor, "layers n 64"]
    contribution: Float[Tensor, "layers n 64"]


@torch.inference_mode()
def observe(llava: Llava, channels: tuple[int, ...], album: Album, setting: Setting, batch: int = 64) -> Seen:
    ids, parts = torch.tensor(dialogues.prompt(dialogues.question("caption"))), []
    for scenes in torch.arange(len(album)).split(batch):
        with setting(scenes), controlled(llava.language_model, Observe(llava.language_model, IMAGE, channels)) as seen:
            llava(ids.expand(len(scenes), -1), pixels(album.images[scenes]))
        parts.append([torch.stack(part) for part in (seen.phi, seen.attention, seen.contribution)])
    return Seen(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def largest(values: Float[Tensor, "layers n 64"], k: int) -> Bool[Tensor, "layers n 64"]:
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, -1).indices, True)


def shuffled(tokens: Bool[Tensor, "layers n 64"], seed: int) -> Bool[Tensor, "layers n 64"]:
    """As many tokens of each image in each layer at random places; those that were the same in two layers still are."""
    order = torch.rand(tokens.shape[1:], generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return tokens.gather(-1, order.expand_as(tokens))


class Counting(VAR):
    """Keeps what share of the rows after the image it changed, for each map in turn."""

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        new = super().weights(site, a)
        self.changed = [*getattr(self, "changed", []), (new != a)[:, :, IMAGE.stop :].any(-1).float().mean().item()]
        return new


def portrait(seen: Seen, patches: Int[Tensor, "n 64"], tau: float) -> dict:
    """C1, C3 and the figure: of the layers from 2 on."""
    phi, attention, contribution = (part[2:] for part in seen)
    top, empty = largest(phi, TOP), patches == len(NAMES)
    mean = lambda values, where: (values * where).sum() / where.sum()
    pairs = zip(phi.flatten(0, 1).numpy(), attention.flatten(0, 1).numpy(), strict=True)
    return {
        "sinks_per_image": {f"{share:.4g}": (phi >= share / TAU * tau).float().sum(-1).mean(1).tolist() for share in (0.2, TAU, 0.4)},
        "outlier": (phi.amax(-1) / phi.median(-1).values).mean(1).tolist(),
        "phi_histogram": torch.histc(phi, 40, 0, 10).tolist(),
        "correlation": fmean(float(spearmanr(*pair).statistic) for pair in pairs),
        "attention_ratio": fmean((mean(a, t) / a.mean()).item() for a, t in zip(attention, top, strict=True)),
        "contribution_ratio": fmean((mean(c, t) / mean(c, ~t)).item() for c, t in zip(contribution, top, strict=True)),
        "top_3_attention": fmean((a.topk(3, -1).values.sum(-1) / a.sum(-1)).mean().item() for a in attention),
        "top_on_background": mean(empty.float(), top).item(),
        "background": empty.float().mean().item(),
    }


# ---- one seed ---------------------------------------------------------------------------------------------------------------------------


def measure(cfg: Config, seed: int) -> None:
    """Everything that depends on a seed, into the run directory."""
    llava = backbone(torch.device("cpu"))
    llama, test = llava.language_model, exam(cfg, seed)
    exists, implant = task.Existence(llava, test), load_run(build(cfg, llama), cfg, run_name(seed)).cpu()
    channels, places, patches = implant.channels, background(test.album, cfg.implants, seed), test.album.patches
    root = llama.config.hidden_size**0.5

    def var(**options) -> Setting:
        options = {"rho": cfg.rho, "p": cfg.p} | options
        return lambda scenes: redistributing(llama, VAR(IMAGE, channels, **options))

    def knocked_out(tokens: Bool[Tensor, "layers n 64"], layers: range = range(llama.config.num_hidden_layers)) -> Setting:
        return lambda scenes: controlled(llama, KnockOut(IMAGE, F.pad(tokens[:, scenes], (IMAGE.start, 0))), where=lambda site: site.layer in layers)

    def implanting(setting: Setting) -> Setting:
        @contextmanager
        def both(scenes: Int[Tensor, "b"]) -> Iterator[None]:
            implant.places = places[scenes]
            with controlled(llama, implant), setting(scenes):
                yield

        return both

    seen, again = (observe(llava, channels, test.album, setting) for setting in (plain, implanting(plain)))
    top = largest(torch.cat([seen.phi[2:3].expand(2, -1, -1), seen.phi[2:]]), TOP)  # sinks arise after layer 1
    implanted = torch.zeros_like(top).scatter(-1, (places - IMAGE.start).expand(len(top), -1, -1), True)
    found, changed = {}, {}
    for world, inside, sinks, options in (("", lambda setting: setting, top, {}), (IMPLANTED, implanting, implanted, {"tau": cfg.tau * root})):
        everywhere = options | {"rho": 0.0, "mass": 0.0}
        variants = {"greedy": plain, "VAR": var(**options), "all heads": var(**everywhere), "all heads, p = 1": var(**everywhere, p=1.0)}
        variants |= {f"to {who}": var(**options, receivers=who) for who in RECEIVERS[1:]} | {"without sinks": knocked_out(sinks)}
        found |= {world + name: exists(inside(setting)) for name, setting in variants.items()}
        draws = [exists(inside(knocked_out(shuffled(sinks, 100 * seed + i)))) for i in range(cfg.draws)]
        found[f"{world}without random tokens"] = {name: fmean(draw[name] for draw in draws) for name in draws[0]}
        counting = Counting(IMAGE, channels, rho=cfg.rho, **options)
        exists(inside(lambda scenes, counting=counting: redistributing(llama, counting)))
        changed[f"{world}VAR"] = np.reshape(counting.changed, (-1, len(top) - 1)).mean(0).tolist()
    things = torch.rand(patches.shape, generator=torch.Generator().manual_seed(seed)) - (patches == len(NAMES)).float()
    found["without things"] = exists(knocked_out(largest(things, TOP).expand_as(top)))
    for name, layers in (("blind in layer 0", range(1)), ("blind after layer 0", range(1, len(top)))):
        found[name] = exists(knocked_out(torch.ones_like(top), layers))
    detected, true = again.phi[:-1] >= cfg.tau * root, implanted[:-1]
    answers = {
        "existence": found,
        "changed_rows": changed,
        "what": {name: task.what(llava, test, setting) for name, setting in (("greedy", plain), ("VAR", var(rho=cfg.rho_general)))},
        "captions": {name: task.captions(llava, test, setting) for name, setting in (("greedy", plain), ("VAR", var()))},
        "portrait": portrait(seen, patches, TAU * root),
        "precision": ((detected & true).sum() / detected.sum().clamp(min=1)).item(),
        "recall": detected[true].float().mean().item(),
        "implant_share": [(a[t].sum() / a.sum()).item() for a, t in zip(again.attention, implanted, strict=True)],
        "implant_phi": torch.histc(again.phi[2:][implanted[2:]], 40, 0, 10).tolist(),
        "first_token_phi": sink_value(first_token(llama, IDS[dialogues.BOS]), channels).tolist(),
        "channels": list(channels),
        "tau": [TAU * root, cfg.tau * root],
    }
    write(cfg.out / f"measured-{seed}.json", json.dumps(answers))


# ---- claims -----------------------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> Measured:
    each(measure, [(seed,) for seed in cfg.seeds], cfg)
    runs = [json.loads((cfg.out / f"measured-{seed}.json").read_text()) for seed in cfg.seeds]
    over = lambda measured: [measured(run) for run in runs]
    portrayed = lambda name: over(lambda run: run["portrait"][name])

    def gain(better: str, worse: str, unit: str = "belief") -> Callable[[dict], float]:
        return lambda run: run["existence"][better][unit] - run["existence"][worse][unit]

    def harmless(run: dict) -> float:
        """C2: positive if random tokens are missed, and sinks less than half as much."""
        random, sinks = (gain("greedy", f"without {name}")(run) for name in ("random tokens", "sinks"))
        return min(random, random / 2 - sinks)

    def recovered(name: str) -> Callable[[dict], float]:
        """Share of what implants change that a variant undoes."""
        change = lambda run, name: run["existence"][IMPLANTED + name]["change"]
        return lambda run: 1 - change(run, name) / change(run, "greedy")

    def surplus(*others: str, of: str = "VAR") -> Callable[[dict], float]:
        return lambda run: recovered(of)(run) - max(recovered(name)(run) for name in others)

    llava = backbone(torch.device("cpu"))
    seconds = decoding_time(llava, tuple(runs[0]["channels"]), cfg.timed)
    values = {
        "C1": over(lambda run: max(run["portrait"]["outlier"])),
        "C1b": portrayed("correlation"),
        "C1c": portrayed("attention_ratio"),
        "C1d": portrayed("contribution_ratio"),
        "C2": over(harmless),
        "C3": portrayed("top_on_background"),
        "C4": over(lambda run: run["what"]["VAR"] - run["what"]["greedy"]),
        "C5": over(gain("VAR", "greedy", "adversarial")),
        "C5b": over(lambda run: run["captions"]["VAR"]["chair_i"] - run["captions"]["greedy"]["chair_i"]),
        "C6": over(gain("VAR", "all heads", "accuracy")),
        "C6b": over(gain("VAR", "all heads, p = 1", "accuracy")),
        "C7": over(lambda run: min(gain("VAR", f"to {who}")(run) for who in RECEIVERS[1:])),
        "C8": seconds["VAR"] / seconds["greedy"],
        "S1": over(lambda run: min(run["precision"], run["recall"])),
        "S2": over(recovered("VAR")),
        "S3": over(surplus("without random tokens", of="without sinks")),
        "S4": over(surplus("all heads")),
        "S5": over(surplus(*(f"to {who}" for who in RECEIVERS[1:]))),
    }
    first = exam(cfg, cfg.seeds[0]).album
    details = {"runs": runs, "seconds_per_token": seconds, "example": example(cfg, llava)}
    return Measured(values, details, {"scenes": content_hash(first.images, first.cells)})


# ---- time -------------------------------------------------------------------------------------------------------------------------------


class HeadByHead(VAR):
    """The same redistribution as a Python loop over heads."""

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        return torch.cat([super(HeadByHead, self).weights(site, head) for head in a.split(1, 1)], 1)


def decoding_time(llava: Llava, channels: tuple[int, ...], tokens: int, repeats: int = 7) -> dict[str, float]:
    """Seconds per token, the prompt's pass included: the tokens after a prompt of about 80, one at a time, measured in turns."""
    llama, ends = llava.language_model, llava.language_model.config.end_tokens
    x = llava.embed(torch.tensor([dialogues.prompt(dialogues.question("caption"))]), pixels(dialogues.album(1, HELD_OUT).images))
    settings = {
        "greedy": nullcontext,
        "VAR": lambda: redistributing(llama, VAR(IMAGE, channels)),
        "VAR head by head": lambda: redistributing(llama, HeadByHead(IMAGE, channels)),
    }

    def decode(setting: Callable[[], AbstractContextManager]) -> None:
        with setting():
            llama.generate(x, max_new_tokens=tokens)

    llama.config.end_tokens = []  # all of them say as much
    try:
        found = gpu.alternate({name: lambda setting=setting: decode(setting) for name, setting in settings.items()}, repeats, seconds=0.05)
    finally:
        llama.config.end_tokens = ends
    return {name: seconds / tokens for name, seconds in found.items()}


def bench() -> dict:
    """Time per token of greedy decoding in which attention is redistributed, over plain greedy decoding's."""
    llava = Llava.from_pretrained("tiny")
    seconds = decoding_time(llava, sink_channels(first_token(llava.language_model, IDS[dialogues.BOS])), 32, repeats=15)
    return {f"{name} / greedy": seconds[name] / seconds["greedy"] for name in seconds if name != "greedy"}


# ---- the figure -------------------------------------------------------------------------------------------------------------------------


class LastRow:
    """A control that keeps how the last token looks at the image, in each head of each layer."""

    def __init__(self):
        self.rows: list[Float[Tensor, "h 64"]] = []

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> None:
        self.rows.append(a[0, :, -1, IMAGE])


@torch.inference_mode()
def example(cfg: Config, llava: Llava) -> dict:
    """One implanted scene: the head in which VAR moves most, before and after."""
    llama, seed = llava.language_model, cfg.seeds[0]
    test, implant = exam(cfg, seed), load_run(build(cfg, llama), cfg, run_name(seed)).cpu()
    question = test.existence["yes"][0]
    implant.places = background(test.album, cfg.implants, seed)[[question.scene]]
    before, after, var = LastRow(), LastRow(), VAR(IMAGE, implant.channels, tau=cfg.tau * llama.config.hidden_size**0.5, rho=cfg.rho, p=cfg.p)
    with controlled(llama, implant), controlled(llama, before), redistributing(llama, var), controlled(llama, after):
        llava(torch.tensor([dialogues.prompt(question.text)]), pixels(test.album.images[[question.scene]]))
    moved = torch.stack([(b - a).abs().sum(-1) for b, a in zip(before.rows, after.rows, strict=True)])
    layer, head = divmod(int(moved.argmax()), moved.shape[1])
    return {
        "image": test.album.images[question.scene].tolist(),
        "question": question.text,
        "layer": layer,
        "head": head,
        "before": before.rows[layer][head].tolist(),
        "after": after.rows[layer][head].tolist(),
        "places": (implant.places[0] - IMAGE.start).tolist(),
    }


def figure(details: dict) -> Figure:
    """Above: what VAR does to one map, and how large φ is. Below: belief of the model as it is and with implants, a dot per seed."""
    fig = Figure(figsize=(14, 8), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.1))
    scene, before, after, sizes = top.subplots(1, 4, width_ratios=(1, 1.2, 1.2, 1.7))
    shown, side, runs = details["example"], dialogues.SIDE, details["runs"]
    scene.imshow(np.array(shown["image"]).transpose(1, 2, 0).astype(np.uint8))
    scene.set(xticks=[], yticks=[], title=shown["question"], xlabel="red in the maps: implants")
    for axis, name in ((before, "before"), (after, "after")):
        drawn = axis.imshow(np.reshape(shown[name], (side, side)), vmin=0, vmax=max(shown["before"] + shown["after"]))
        axis.scatter(*np.divmod(shown["places"], side)[::-1], 160, facecolors="none", edgecolors="r", marker="s", linewidths=2)
        axis.set(xticks=[], yticks=[], title=f"layer {shown['layer']}, head {shown['head']}: {name}")
    top.colorbar(drawn, ax=after)
    for key, label in (("phi_histogram", "image tokens as they are"), ("implant_phi", "implanted")):
        counts = sum(np.array(r["portrait"][key] if key in r["portrait"] else r[key]) for r in runs)
        sizes.stairs(counts / counts.sum(), np.linspace(0, 10, 41), label=label, fill=True, alpha=0.6)
    for tau, style in zip(runs[0]["tau"], ("--", ":"), strict=True):
        sizes.axvline(tau, color="k", linestyle=style, label=f"τ = {tau:.3g}")
    sizes.axvline(np.mean(runs[0]["first_token_phi"]), color="C3", label="first token of the text")
    sizes.set(xlabel="sink value φ, layers from 2 on", ylabel="share of tokens")
    sizes.legend(fontsize=8)
    panels = (("", "belief", "As it is: belief in the right answer [%]"), (IMPLANTED, "change", "With implants: |Δ log-odds of yes|"))
    for axis, (world, unit, title) in zip(bottom.subplots(1, 2), panels, strict=True):
        names = [name for name in runs[0]["existence"] if name.startswith(IMPLANTED) == bool(world)]
        for i, name in enumerate(names):
            dots = [run["existence"][name][unit] for run in runs]
            axis.bar(i, fmean(dots), 0.7, color="0.6" if "greedy" in name else "C2" if name == f"{world}VAR" else "C0", alpha=0.7)
            axis.plot([i] * len(dots), dots, "k.", markersize=4)
        axis.set_xticks(range(len(names)), [name.removeprefix(IMPLANTED) for name in names], rotation=30, ha="right", fontsize=8)
        axis.set(ylim=(0 if world else 40, None), title=title)
    return fig


# ---- a real model -----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_published(cfg: Config) -> dict:
    """A LLaVA-1.5 directory with its tokenizer.json (--weights) on question files (--data): greedily, with VAR, and how many sinks it has.

    Yes-no labels are scored as POPE, others by equality. All answers are written to the run directory, for benchmarks that another program
    or a judge scores.
    """
    on = gpu.device(cfg)
    llava, tokenizer = Llava.from_pretrained(str(cfg.weights)).to(on), text.tokenizer(Path(cfg.weights))
    vision, llama = llava.config.vision_config, llava.language_model
    patches = (vision.image_size // vision.patch_size) ** 2 + (llava.config.vision_feature_select_strategy == "full")
    channels = sink_channels(first_token(llama, tokenizer.encode("").ids[0]))
    found = {"D_sink": list(channels)}
    for category, items in task.question_files(Path(cfg.data)).items():
        said, counts = {"greedy": [], "VAR": []}, []
        for item in items[: cfg.limit]:
            ids = tokenizer.encode(f"USER: <image>\n{item.question} ASSISTANT:").ids
            start = ids.index(llava.config.image_token_index)
            ids[start : start + 1] = [llava.config.image_token_index] * patches
            x = llava.embed(torch.tensor([ids], device=on), task.picture(item.image, vision.image_size).to(on, llama.lm_head.weight.dtype))
            var = VAR(slice(start, start + patches), channels, rho=cfg.rho, p=cfg.p)
            for name, setting in (("greedy", nullcontext()), ("VAR", redistributing(llama, var))):
                with setting:
                    new = llama.generate(x, max_new_tokens=cfg.max_new_tokens)[0].tolist()
                said[name].append(tokenizer.decode(new).strip())
            counts.append([sinks[:, var.image].sum().item() for sinks in var.sinks.values()])
        found[f"{category}: image sinks per layer"] = [round(c, 1) for c in np.mean(counts, 0).tolist()]
        for name, answers in said.items():
            lines = [json.dumps({"qid": item.id, "answer": answer}) for item, answer in zip(items, answers, strict=False)]
            write(cfg.out / f"{category}-{name}.jsonl", "\n".join(lines) + "\n")
            found |= {f"{category}, {name}: {k}": v for k, v in task.score(answers, [item.label for item in items[: cfg.limit]]).items()}
    return found
