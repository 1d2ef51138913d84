"""Measure the claims on captions that no model has read; published models on STS, SICK, QQP, QNLI and MRPC."""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor

from common import gpu
from common.backbones.bert import BertEncoder, CrossEncoder
from common.errors import UserError
from common.loop import load_run
from common.results import Measured, content_hash
from papers.trans_encoder import model as te
from papers.trans_encoder.model import BINARY, CROSS_LENGTH, SPECIAL, STS, Family, Pairs, Scores, caption_pairs, encode, scored, spearman
from papers.trans_encoder.train import (
    CORPUS,
    DEV,
    FAMILIES,
    TEST,
    VARIANTS,
    Config,
    family_of,
    load_folder,
    load_student,
    load_tokenizer,
    plm,
    read_json,
    tokenizer,
    training_pairs,
)

KINDS = ("cross", "bi")
SHOWN = 300  # pairs of the figure


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; for STS give a model: `just eval trans_encoder --weights FOLDER --data DIR`")
    dev, test = caption_pairs(cfg.test_pairs // 2, DEV), caption_pairs(cfg.test_pairs, TEST)
    runs = [quality(cfg, seed, dev, test) for seed in cfg.seeds]
    cost = {name: times(cfg, name) for name in FAMILIES}
    ratios = [fmean(cost[name]["cross"][i] / cost[name]["bi"][i] for name in FAMILIES) for i in (0, -1)]
    values = {claim: [run["claims"][claim] for run in runs] for claim in runs[0]["claims"]}
    values["C7"] = math.log(ratios[1] / ratios[0]) / math.log(cfg.timed[-1] / cfg.timed[0])
    details = {
        "runs": runs,
        "masked_words": {name: masked_words(cfg, name) for name in FAMILIES},
        "seconds": cost,
        "timed": list(cfg.timed),
        "labels": example_labels(cfg, cfg.seeds[0]),
    }
    hashes = {f"captions {name}": content_hash(*encode(tokenizer("bert"), p.a, p.b, CROSS_LENGTH)) for name, p in (("dev", dev), ("test", test))}
    return Measured(values, details, hashes)


# ---- quality ----------------------------------------------------------------------------------------------------------------------------


def quality(cfg: Config, seed: int, dev: Pairs, test: Pairs) -> dict:
    """Spearman and AUC of all models of one seed, on dev and test, and what the claims ask of them."""
    families = {name: family_of(cfg, name, seed) for name in FAMILIES}
    pairs, scores = training_pairs(cfg, seed), {}
    load = lambda name, kind, run: load_student(cfg, families[name], kind, pairs, run)
    for name, family in families.items():
        scores["simcse", name] = both(family, family.simcse, dev, test)
    for variant, names in VARIANTS.items():
        for name, kind, cycle in product(names, KINDS, range(1, cfg.cycles + 1)):
            model = load(name, kind, f"{variant}/{seed}/{name}/{kind}-{cycle}")
            scores[variant, name, kind, cycle] = both(families[name], model, dev, test)
    others = {"mse": "cross", "bce-bce": "bi", "mse-mse": "bi", "mse-bce": "bi"}
    for run, kind in others.items():
        scores["swaps", run] = both(families["bert"], load("bert", kind, f"swaps/{seed}/{run}"), dev, test)
    for kind in KINDS:
        scores["gold", kind] = both(families["bert"], load("bert", kind, f"gold/{seed}/{kind}"), dev, test)
    table = {key: {"dev": spearman(d, dev.gold), "test": spearman(t, test.gold), "auc": auc(t, test.gold == 1)} for key, (d, t) in scores.items()}
    ensemble = spearman(torch.stack([scores[name, name, "bi", cfg.cycles][1] for name in FAMILIES]).mean(0), test.gold)
    found = {" ".join(map(str, key)): row for key, row in table.items()}
    return {"claims": claims(cfg, table, ensemble), "models": found, "ensemble": ensemble}


def both(family: Family, model: BertEncoder | CrossEncoder, dev: Pairs, test: Pairs) -> tuple[Scores, Scores]:
    return scored(model, family.tokenizer, dev), scored(model, family.tokenizer, test)


def auc(scores: Scores, same: Tensor) -> float:
    """In points: how often a pair of one class scores higher than one of the other."""
    return 100 * float(roc_auc_score(same, scores))


def claims(cfg: Config, table: dict, ensemble: float) -> dict[str, float]:
    """The values of one seed."""
    last, test = cfg.cycles, lambda *key: table[key]["test"]
    chosen = lambda variant, name, kind: test(
        variant, name, kind, max(range(1, last + 1), key=lambda cycle: table[variant, name, kind, cycle]["dev"])
    )
    self_gain = lambda kind: min(chosen(name, name, kind) - test("simcse", name) for name in FAMILIES)
    mutual_gain = lambda kind: fmean(chosen("mutual", name, kind) - chosen(name, name, kind) for name in FAMILIES)
    course = [fmean(test("simcse", name) for name in FAMILIES)]
    course += [fmean(test(name, name, kind, cycle) for name in FAMILIES for kind in KINDS) for cycle in range(1, last + 1)]
    gains = [after - before for before, after in pairwise(course)]
    area = lambda kind: fmean(table[name, name, kind, last]["auc"] - table["simcse", name]["auc"] for name in FAMILIES)
    return {
        "C1": self_gain("bi"),
        "C2": self_gain("cross"),
        "C3": gains[0] - max(gains[1:]),
        "C3b": course[-1] - max(course[1:]),
        "C4": mutual_gain("bi"),
        "C4b": mutual_gain("cross"),
        "C5": fmean(test("mutual", name, "bi", last) for name in FAMILIES) - ensemble,
        "C6": test("bert", "bert", "cross", 1) - test("swaps", "mse"),
        "C6b": (test("bert", "bert", "bi", 1) - test("swaps", "bce-bce") + test("swaps", "mse-mse") - test("swaps", "mse-bce")) / 2,
        "C6c": fmean(test("bert", "bert", kind, last) - test("continued", "bert", kind, last) for kind in KINDS),
        "C8": min(map(area, KINDS)),
    }


def example_labels(cfg: Config, seed: int) -> dict[str, list[float]]:
    """Gold and the labels that SimCSE and the last cross-encoder give to some of the training pairs."""
    family, pairs = family_of(cfg, "bert", seed), training_pairs(cfg, seed)
    cross = load_student(cfg, family, "cross", pairs, f"bert/{seed}/bert/cross-{cfg.cycles}")
    found = {"gold": pairs.gold} | {name: scored(model, family.tokenizer, pairs) for name, model in (("simcse", family.simcse), ("cross", cross))}
    return {name: values[:SHOWN].tolist() for name, values in found.items()} | {"negative": (found["simcse"] < 0).double().mean().item()}


# ---- what the PLMs have learnt ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_words(cfg: Config, family: str) -> dict[str, float]:
    """Nats a masked word of unread captions, alone and beside another caption of the scene; by counts of words; and by counts of neighbours,
    p(w|l, r) ∝ p(w|l) p(r|w), none of which is masked."""
    model, words, found = load_run(plm(family), cfg, f"plm/{family}"), tokenizer(family), {}
    read, told = caption_pairs(cfg.captions, CORPUS, 0), caption_pairs(cfg.test_pairs, TEST, 0)
    for name, second in (("alone", None), ("in pairs", told.b)):
        tokens = tuple(t.to(gpu.device(cfg)) for t in encode(words, told.a, second, CROSS_LENGTH))
        with gpu.seeded(0):
            found[name] = te.masked_words(model, tokens).item()
    counted, unread = encode(words, read.a)[0], encode(words, told.a)[0]
    vocab = words.get_vocab_size()
    pairs = torch.full((vocab, vocab), 0.1)
    pairs.index_put_((counted[:, :-1].flatten(), counted[:, 1:].flatten()), torch.ones(()), accumulate=True)
    follows = (pairs / pairs.sum(1, keepdim=True)).log()
    single = (counted[counted >= len(SPECIAL)].bincount(minlength=vocab) + 0.1).log().log_softmax(0)
    left, word, right = unread[:, :-2], unread[:, 1:-1], unread[:, 2:]
    known = word >= len(SPECIAL)
    found["by words"] = F.cross_entropy(single.expand(int(known.sum()), -1), word[known]).item()
    found["by neighbours"] = F.cross_entropy(follows[left[known]] + follows[:, right[known]].T, word[known]).item()
    return found


# ---- cost -------------------------------------------------------------------------------------------------------------------------------


def times(cfg: Config, family: str) -> dict[str, list[float]]:
    """Seconds to score all n² pairs of n sentences, from their texts, for each n of cfg.timed."""
    starts, found = family_of(cfg, family, cfg.seeds[0]), {kind: [] for kind in KINDS}
    cross, bi = starts.cross().to(gpu.device(cfg)), starts.bi()
    for n in cfg.timed:
        sentences = caption_pairs(n, TEST).a
        a, b = zip(*product(sentences, sentences), strict=True)
        every = Pairs(list(a), list(b), torch.zeros(n * n))
        functions = {"cross": lambda every=every: scored(cross, starts.tokenizer, every), "bi": lambda s=sentences: all_cosines(bi, starts, s)}
        for kind, seconds in gpu.alternate(functions, repeats=3, seconds=0.01).items():
            found[kind].append(seconds)
    return found


@torch.no_grad()
def all_cosines(bi: BertEncoder, family: Family, sentences: Sequence[str]) -> Float[Tensor, "n n"]:
    """x of every sentence with every other: each is encoded once."""
    on = next(bi.parameters()).device
    e = F.normalize(bi.embed(*(t.to(on) for t in encode(family.tokenizer, sentences)[:2])), dim=-1)
    return e @ e.T


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

STYLES = {
    ("bert", "bert"): ("C0", "-", "self, BERT-like"), ("roberta", "roberta"): ("C1", "-", "self, RoBERTa-like"),
    ("mutual", "bert"): ("C0", "--", "mutual, BERT-like"), ("mutual", "roberta"): ("C1", "--", "mutual, RoBERTa-like"),
    ("continued", "bert"): ("0.5", ":", "continued, BERT-like"),
}  # fmt: skip


def figure(details: dict) -> Figure:
    """Agreement with gold over the half-cycles; the labels at the start and at the end; the losses; the cost."""
    fig = Figure(figsize=(13, 7), layout="constrained")
    axes = fig.subplot_mosaic([["course", "course", "course", "start"], ["losses", "cost", "masked", "end"]])
    draw_course(axes["course"], details["runs"])
    gold = details["labels"]["gold"]
    for place, name, title in (("start", "simcse", "Labels at the start"), ("end", "cross", "Labels at the end")):
        axes[place].plot(gold, details["labels"][name], ".", markersize=3, alpha=0.5)
        axes[place].set(xlabel="gold", ylabel={"start": "x of SimCSE", "end": "σ(z) of the last cross-encoder"}[place], title=title)
    draw_losses(axes["losses"], details["runs"])
    for kind, marker in zip(KINDS, "so", strict=True):
        axes["cost"].plot(details["timed"], [1e3 * s for s in details["seconds"]["bert"][kind]], marker=marker, label=f"{kind}-encoder")
    axes["cost"].set(xscale="log", yscale="log", xlabel="sentences", ylabel="milliseconds", title="Scores of all pairs")
    axes["cost"].set_xticks(details["timed"], details["timed"])
    axes["cost"].minorticks_off()
    axes["cost"].legend(fontsize=8)
    for i, (name, found) in enumerate(details["masked_words"].items()):
        axes["masked"].bar([j + 0.4 * i - 0.2 for j in range(len(found))], found.values(), 0.38, label=f"{name}-like")
    axes["masked"].set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize=8)
    axes["masked"].set(ylabel="nats", title="Masked words")
    axes["masked"].legend(fontsize=8)
    return fig


def draw_course(axis, runs: list[dict]) -> None:
    """Half-cycle 0 is SimCSE; cross-encoders are at the halves, bi-encoders at the whole numbers. A thin line per seed."""
    cycles = max(int(key.split()[-1]) for key in runs[0]["models"] if key.startswith("bert"))
    for (variant, name), (colour, line, label) in STYLES.items():
        keys = [f"simcse {name}", *(f"{variant} {name} {kind} {cycle}" for cycle in range(1, cycles + 1) for kind in KINDS)]
        courses = [[run["models"][key]["test"] for key in keys] for run in runs]
        at = [i / 2 for i in range(len(keys))]
        for course in courses:
            axis.plot(at, course, line, color=colour, linewidth=0.5, alpha=0.5)
        axis.plot(at, [fmean(values) for values in zip(*courses, strict=True)], line, marker="o", color=colour, markersize=4, label=label)
    for kind, line in zip(KINDS, ("-.", ":"), strict=True):
        axis.axhline(
            fmean(run["models"][f"gold {kind}"]["test"] for run in runs), color="k", linestyle=line, linewidth=1, label=f"gold labels, {kind}"
        )
    axis.set(xlabel="cycle: cross-encoders at the halves, bi-encoders at the ends", ylabel="Spearman on test pairs", title="Agreement with gold")
    axis.legend(fontsize=8, ncols=2)


def draw_losses(axis, runs: list[dict]) -> None:
    """A bar per loss, a dot per seed."""
    models = {
        "cross: BCE": "bert bert cross 1", "cross: MSE": "swaps mse", "BCE, bi: MSE": "bert bert bi 1", "BCE, bi: BCE": "swaps bce-bce",
        "MSE, bi: MSE": "swaps mse-mse", "MSE, bi: BCE": "swaps mse-bce",
    }  # fmt: skip
    found = [[run["models"][name]["test"] for run in runs] for name in models.values()]
    axis.barh(list(models), [fmean(values) for values in found], color=["C2"] * 2 + ["C4"] * 4)
    for row, values in enumerate(found):
        axis.plot(values, [row] * len(values), "k.", markersize=3)
    axis.invert_yaxis()
    axis.set(xlabel="Spearman", title="Losses, first cycle")


# ---- published models -------------------------------------------------------------------------------------------------------------------


def load_published(folder: Path) -> BertEncoder | CrossEncoder:
    """The model of a folder of the hub: a cross-encoder if config.json says that it classifies. Raises UserError."""
    cross = any(name.endswith("ForSequenceClassification") for name in read_json(folder / "config.json").get("architectures") or ())
    model = load_folder(CrossEncoder if cross else BertEncoder, folder)
    if cross and len(model.config.id2label or [0]) != 1:
        raise UserError(f"{folder} tells {len(model.config.id2label)} classes apart: give a cross-encoder with one label, a similarity")
    return model


def evaluate_published(cfg: Config) -> dict[str, float]:
    """Spearman on the sets of STS that lie in DATA, and their mean if all seven do; AUC on the others. In points."""
    root, folder = Path(cfg.data), Path(cfg.weights)
    model, words = load_published(folder).to(gpu.device(cfg)), load_tokenizer(folder)
    longest = model.config.max_position_embeddings - (model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0)
    present = [name for name, source in (STS | BINARY).items() if (root / source.file.format((source.splits or {}).get("test"))).is_file()]
    if not present:
        raise UserError(f"{root} has none of the test sets: {te.HOSTS}")
    found = {}
    for name in present:
        pairs = te.read_pairs(root, name)
        kept = ~pairs.gold.isnan()  # rows without a score are to learn from
        known = Pairs(*([text for text, keep in zip(side, kept, strict=True) if keep] for side in (pairs.a, pairs.b)), pairs.gold[kept])
        found[name] = (spearman if name in STS else auc)(scored(model, words, known, longest), known.gold)  # cross-encoders are not cut to 64 here
    if STS.keys() <= found.keys():
        found["sts_mean"] = fmean(found[name] for name in STS)
    return found


def best_of_similarities(encoders: Sequence[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]], gold: Scores) -> float:
    """The authors' score of an ensemble of bi-encoders: cosine, dot product, -L1 and -L2, each averaged over the encoders, and the best one."""
    kinds = (F.cosine_similarity, lambda a, b: (a * b).sum(-1), *(lambda a, b, p=p: -(a - b).norm(p, -1) for p in (1, 2)))
    return max(spearman(torch.stack([kind(a, b) for a, b in encoders]).mean(0), gold) for kind in kinds)
