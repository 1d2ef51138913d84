"""Train self- and mutual distillation on captions of scenes, from two small PLMs of their own; with --data, from published PLMs and pairs.

plm/FAMILY, simcse/FAMILY/SEED          masked words, then sentences under two dropout masks
VARIANT/SEED/FAMILY/KIND-CYCLE          the students, of KIND cross or bi
swaps/SEED/CROSS[-BI], gold/SEED/KIND   students of the first cycle with other losses, and of gold labels
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from tokenizers.implementations import BertWordPieceTokenizer
from torch import nn

from common.backbones.bert import Bert, BertConfig, BertEncoder, CrossEncoder
from common.backbones.bert_pretraining import BertPretraining
from common.config import RunConfig
from common.data import Batches, text
from common.errors import UserError
from common.gpu import say, seed_everything
from common.loop import each, fit, load_run, load_weights
from common.pretrain.tiny_bert import initialize
from common.results import write
from papers.trans_encoder import model as te
from papers.trans_encoder.model import CROSS_LENGTH, LOSSES, SPECIAL, Examples, Family, Pairs, SimCSE, caption_pairs, encode, scored


@dataclass
class Config(RunConfig):
    """steps, batch, lr and warmup are those of the PLMs; the other stages have their own."""

    plms: tuple[str, ...] = ()  # folders of published PLMs, for --data; two or more: mutual distillation
    simcse: tuple[str, ...] = ()  # folders of their SimCSE encoders
    task: str = "sts"  # of --data: sts, qqp, qnli, mrpc
    transductive: bool = False  # learn from the texts of the test pairs too
    clamp: bool = False  # labels of the cross-encoders to [0, 1]
    cycles: int = 2  # or more; the paper has 3
    captions: int = 8_000  # scenes that the PLMs read about, each told twice
    pairs: int = 1_500  # sentence pairs to distil on
    test_pairs: int = 1_000  # with labels; half as many choose among the cycles
    simcse_steps: int = 200
    simcse_lr: float = 3e-4
    cross_epochs: int = 4
    cross_batch: int = 32
    cross_lr: float = 1e-3
    bi_epochs: int = 4
    bi_batch: int = 64  # SimCSE's too
    bi_lr: float = 1e-3
    timed: tuple[int, ...] = (10, 20, 40)  # sentences that are compared with each other, for the cost


SCALES = {
    "smoke": Config(
        seeds=(0,), steps=2, batch=4, captions=16, pairs=16, test_pairs=16, simcse_steps=2, cross_epochs=1, cross_batch=8, bi_epochs=1,
        bi_batch=4, timed=(2, 4), save_every=0.5, processes=1,
    ),
    "small": Config(steps=4000, batch=32, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0, save_every=0.5),
    "full": Config(
        seeds=(2021,), transductive=True, cycles=3, weight_decay=0.01, clip=1.0, precision="bf16",
        cross_epochs=1, cross_batch=32, cross_lr=2e-5, bi_epochs=10, bi_batch=128, bi_lr=5e-5,
    ),
}  # fmt: skip

CORPUS, DEV, TEST, TRAIN = 101, 102, 103, 1000  # seeds of captions; a run's own pairs have TRAIN + its seed
VARIANTS = {"mutual": ("bert", "roberta"), "bert": ("bert",), "roberta": ("roberta",), "continued": ("bert",)}

# ---- the small PLMs ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {"bert": "[CLS] $A [SEP] $B:1 [SEP]:1", "roberta": "[CLS] $A [SEP] [SEP] $B [SEP]"}  # how a pair is read


@cache
def tokenizer(family: str) -> Tokenizer:
    """A token a word."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *te.WORDS])}
    found = Tokenizer(models.WordLevel(vocab, "[PAD]"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", FAMILIES[family], [(s, vocab[s]) for s in ("[CLS]", "[SEP]")])
    found.enable_padding(pad_token="[PAD]")
    return found


def config(family: str, dropout: float = 0.1) -> BertConfig:
    width, layers, heads, words = 64, 3, 4, tokenizer(family).get_vocab_size()
    return BertConfig(words, width, layers, heads, 2 * width, CROSS_LENGTH + 1, model_type=family, hidden_dropout_prob=dropout)


def plm(family: str) -> BertPretraining:
    model = BertPretraining(config(family, dropout=0.0))
    initialize(model)
    nn.ModuleList([model.bert.pooler, model.cls["seq_relationship"]]).requires_grad_(False)  # there is no next-sentence task
    return model


def family_of(cfg: Config, name: str, seed: int) -> Family:
    """From the runs of both stages."""
    encoder = load_run(SimCSE(BertEncoder(config(name))), stage(cfg, "simcse"), f"simcse/{name}/{seed}").encoder
    return Family(tokenizer(name), load_run(plm(name), cfg, f"plm/{name}").bert, encoder, seed)


# ---- published PLMs ---------------------------------------------------------------------------------------------------------------------


def load_folder(kind: type[nn.Module], folder: Path) -> nn.Module:
    """A model from config.json and *.safetensors or pytorch_model.bin. Raises UserError."""
    if any(folder.glob("*.safetensors")) or not (folder / "pytorch_model.bin").is_file():
        return kind.from_pretrained(folder, dtype=torch.float32)
    return load_weights(kind.from_config(read_json(folder / "config.json")), folder / "pytorch_model.bin", kind.rename).eval()


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, vocab.txt (WordPiece) or vocab.json with merges.txt (byte-level BPE). Raises UserError."""
    try:
        found = text.tokenizer(folder) if (folder / "tokenizer.json").is_file() else _from_vocabulary(folder)
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"the vocabulary in {folder} cannot be read ({error}): fetch the tokenizer's files again") from None
    pad = next((token for token in ("[PAD]", "<pad>") if found.token_to_id(token) is not None), None)
    if pad is None:
        raise UserError(f"the vocabulary in {folder} has neither [PAD] nor <pad>: is it that of BERT or RoBERTa?")
    found.enable_padding(pad_id=found.token_to_id(pad), pad_token=pad)
    return found


def _from_vocabulary(folder: Path) -> Tokenizer:
    if (folder / "vocab.txt").is_file():
        file = folder / "tokenizer_config.json"
        lower = not file.is_file() or read_json(file).get("do_lower_case", True)
        return Tokenizer.from_str(BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lower).to_str())
    bpe = Tokenizer.from_str(ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).to_str())
    bpe.add_special_tokens(["<s>", "<pad>", "</s>"])
    bpe.post_processor = processors.RobertaProcessing(("</s>", bpe.token_to_id("</s>")), ("<s>", bpe.token_to_id("<s>")), add_prefix_space=False)
    return bpe


def read_json(file: Path) -> dict:
    """Raises UserError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give the folder of a published model") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} holds no json object ({error}): fetch it again") from None


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def stage(cfg: Config, kind: str, examples: int = 0) -> Config:
    """What SimCSE, or a student with so many examples, does otherwise."""
    if kind == "simcse":
        return replace(cfg, steps=cfg.simcse_steps, batch=cfg.bi_batch, lr=cfg.simcse_lr)
    bi, cross = (cfg.bi_epochs, cfg.bi_batch, cfg.bi_lr, 0.0), (cfg.cross_epochs, cfg.cross_batch, cfg.cross_lr, 0.1)
    epochs, batch, lr, warmup = cross if kind == "cross" else bi
    return replace(cfg, steps=epochs * math.ceil(examples / batch), batch=batch, lr=lr, warmup=warmup)


def train(cfg: Config) -> None:
    if cfg.data:
        return each(distil_published, [(seed,) for seed in cfg.seeds], cfg)
    each(pretrain, [(family,) for family in FAMILIES], cfg)
    each(contrast, [(family, seed) for seed in cfg.seeds for family in FAMILIES], cfg)
    each(distil, [(variant, seed) for variant in VARIANTS for seed in cfg.seeds], cfg)
    each(compare, [(seed,) for seed in cfg.seeds], cfg)


def pretrain(cfg: Config, family: str) -> None:
    """Most batches are two captions of a scene as one input: words of one can be told from the other."""
    seed_everything(0)
    told, words = caption_pairs(cfg.captions, CORPUS, 0), tokenizer(family)
    dataset = Examples((encode(words, told.a), encode(words, told.a, told.b, CROSS_LENGTH)), told.gold)
    loss = lambda model, batch: te.masked_words(model, batch[0][int(torch.rand(()) < 0.85)])
    fit(plm(family), loss, Batches(dataset, cfg.batch, 0), cfg, f"plm/{family}")


def contrast(cfg: Config, family: str, seed: int) -> None:
    """The PLM's weights, without its heads, and SimCSE."""
    seed_everything(seed)
    model, start = SimCSE(BertEncoder(config(family))), load_run(plm(family), cfg, f"plm/{family}").bert.state_dict()
    model.encoder.load_state_dict({name: start[name] for name in model.encoder.state_dict()})
    told, cfg = caption_pairs(cfg.captions, CORPUS, 0), stage(cfg, "simcse")
    dataset = Examples((encode(tokenizer(family), told.a),), told.gold)
    fit(model, lambda model, batch: model.loss(*batch[0]), Batches(dataset, cfg.batch, seed), cfg, f"simcse/{family}/{seed}")


def training_pairs(cfg: Config, seed: int) -> Pairs:
    """Their gold is for the supervised bound alone."""
    own, test = caption_pairs(cfg.pairs, TRAIN + seed), caption_pairs(cfg.test_pairs, TEST)
    return Pairs(own.a + test.a, own.b + test.b, torch.cat([own.gold, test.gold])) if cfg.transductive else own


def fit_student(cfg: Config, kind: str, loss: str, seed: int, model: nn.Module, examples: Examples, name: str) -> nn.Module:
    score, cfg = te.logits if kind == "cross" else te.similarity, stage(cfg, kind, len(examples))
    return fit(model, lambda m, batch: LOSSES[kind][loss](score(m, *batch[0]), batch[1]), Batches(examples, cfg.batch, seed), cfg, name)


def cycles(cfg: Config, families: list[Family], names: tuple[str, ...], pairs: Pairs, seed: int, run: str, fresh: bool = True) -> Iterator:
    """All cycles, each student by its kind's first loss."""
    train = lambda kind, cycle, i, *given: fit_student(cfg, kind, next(iter(LOSSES[kind])), seed, *given, f"{run}/{names[i]}/{kind}-{cycle}")
    return te.trans_encoder(families, pairs, cfg.cycles, train, fresh=fresh, both_orders=cfg.task != "qnli", clamp=cfg.clamp)


def distil(cfg: Config, variant: str, seed: int) -> None:
    families = [family_of(cfg, name, seed) for name in VARIANTS[variant]]
    list(cycles(cfg, families, VARIANTS[variant], training_pairs(cfg, seed), seed, f"{variant}/{seed}", fresh=variant != "continued"))


def compare(cfg: Config, seed: int) -> None:
    """The first cycle with other losses, and gold labels."""
    family, pairs = family_of(cfg, "bert", seed), training_pairs(cfg, seed)
    score = lambda teacher: scored(teacher, family.tokenizer, pairs)
    cross = lambda y, *loss: (cfg, "cross", *loss, seed, family.cross(), te.cross_examples(family.tokenizer, pairs, y))
    bi = lambda y, *loss: (cfg, "bi", *loss, seed, family.bi(), te.bi_examples(family.tokenizer, pairs, y))
    teachers = {"bce": load_student(cfg, family, "cross", pairs, f"bert/{seed}/bert/cross-1")}
    teachers["mse"] = fit_student(*cross(score(family.simcse), "mse"), f"swaps/{seed}/mse")
    for teacher, loss in (("bce", "bce"), ("mse", "mse"), ("mse", "bce")):
        fit_student(*bi(score(teachers[teacher]), loss), f"swaps/{seed}/{teacher}-{loss}")
    fit_student(*cross(pairs.gold, "bce"), f"gold/{seed}/cross")
    fit_student(*bi(pairs.gold, "mse"), f"gold/{seed}/bi")


def load_student(cfg: Config, family: Family, kind: str, pairs: Pairs, name: str) -> BertEncoder | CrossEncoder:
    """A trained student."""
    start, examples = (family.cross(), 2 * len(pairs)) if kind == "cross" else (family.bi(), len(pairs))
    return load_run(start, stage(cfg, kind, examples), name)


def distil_published(cfg: Config, seed: int) -> None:
    """All cycles of published PLMs; each model is left as a folder that `just eval --weights` and transformers read."""
    if not cfg.plms or len(cfg.plms) != len(cfg.simcse):
        raise UserError("--data needs --plms FOLDER ... and --simcse FOLDER ..., as many: each PLM and its SimCSE encoder")
    seed_everything(seed)
    plms, encoders = map(Path, cfg.plms), [load_folder(BertEncoder, Path(folder)) for folder in cfg.simcse]
    kinds = [Bert if encoder.config.model_type == "bert" else BertEncoder for encoder in encoders]  # RoBERTa's heads need no pooler
    families = [Family(load_tokenizer(plm), load_folder(kind, plm), e, seed) for plm, kind, e in zip(plms, kinds, encoders, strict=True)]
    names = tuple(f"{i}-{Path(plm).name}" for i, plm in enumerate(cfg.plms))
    pairs = te.unlabelled(Path(cfg.data), cfg.task, cfg.transductive)
    for cycle, found in enumerate(cycles(cfg, families, names, pairs, seed, f"published/{seed}"), 1):
        for (kind, head), group in zip((("cross", "ForSequenceClassification"), ("bi", "Model")), found, strict=True):
            for name, family, model in zip(names, families, group, strict=True):
                folder = Path(cfg.out) / f"published/{seed}/{name}/{kind}-{cycle}-model"
                model.save_pretrained(folder)
                about = read_json(folder / "config.json") | {"architectures": [model.config.model_type.capitalize() + head]}
                write(folder / "config.json", json.dumps(about, indent=1))
                write(folder / "tokenizer.json", family.tokenizer.to_str())
        say(f"wrote the models of cycle {cycle} to {folder.parent.parent}")
