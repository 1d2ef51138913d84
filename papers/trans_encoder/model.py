"""Trans-Encoder (Liu et al., ICLR 2022, arXiv 2109.13059): two ways to compare sentences that teach each other, without labels.

    e(s) = h[CLS]  of  [CLS] s [SEP]                                    bi-encoder: sentences apart            d
    x(a, b) = cos(e(a), e(b))                                           in [-1, 1]
    z(a, b) = W pooled(h[CLS])  of  [CLS] a [SEP] b [SEP]               cross-encoder: sentences together
    σ(z)                                                                in (0, 1)

Unsupervised SimCSE, where all begins, tells a sentence from the m - 1 others of a batch across two dropout masks (u = tanh(W_u e)):

    L_SimCSE = -1/m Σ_i log softmax_j(cos(u_i, u'_j) / τ)_i

A cycle goes from bi to cross and back. Labels y are scores of the teachers, taken as they are and averaged over the PLMs taking part
(one: self-distillation; several: mutual distillation). Every student starts from the same weights in every cycle:

    y = mean of x(a, b)       L_cross = mean softplus(z) - y z          cross from the PLM; (a, b) and (b, a) have one label
    y = mean of σ(z(a, b))    L_bi = mean (x - y)²                      bi from SimCSE
"""

import copy
import csv
import gzip
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn

from common.backbones.bert import Bert, BertEncoder, CrossEncoder
from common.backbones.bert_pretraining import BertPretraining
from common.data import scenes
from common.errors import UserError
from common.gpu import seeded
from common.layers import init_by_fan_in

Tokens = tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b n"]]  # ids, 0 where padding, token types
Scores = Float[Tensor, "b"]
BI_LENGTH, CROSS_LENGTH = 32, 64  # tokens
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 3 of the small PLMs
MASKED = 0.3  # share of the words to tell

# ---- scores -----------------------------------------------------------------------------------------------------------------------------


def similarity(bi: BertEncoder, a: Tokens, b: Tokens) -> Scores:
    """x(a, b)."""
    return F.cosine_similarity(bi.embed(*a[:2]), bi.embed(*b[:2]))


def logits(cross: CrossEncoder, ab: Tokens) -> Scores:
    """z(a, b)."""
    return cross(*ab)[:, 0]


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def cross_entropy(z: Scores, y: Scores) -> Tensor:
    """L_cross: -y log σ(z) - (1 - y) log(1 - σ(z)), gradient σ(z) - y. A label below 0 pushes z down for ever."""
    return (F.softplus(z) - y * z).mean()


def squared_error(x: Scores, y: Scores) -> Tensor:
    """L_bi."""
    return F.mse_loss(x, y)


def swapped_cross(z: Scores, y: Scores) -> Tensor:
    """The cross-encoder with the bi-encoder's loss."""
    return squared_error(z.sigmoid(), y)


def swapped_bi(x: Scores, y: Scores) -> Tensor:
    """The bi-encoder with the cross-encoder's loss: (1 + x)/2 is a probability, and its logit is 2 artanh x."""
    return cross_entropy(2 * x.clamp(-1 + 1e-6, 1 - 1e-6).atanh(), y)


LOSSES = {"cross": {"bce": cross_entropy, "mse": swapped_cross}, "bi": {"mse": squared_error, "bce": swapped_bi}}  # the paper's come first


def contrastive(u: Float[Tensor, "m d"], v: Float[Tensor, "m d"], temperature: float = 0.05) -> Tensor:
    """L_SimCSE."""
    cosine = F.cosine_similarity(u[:, None], v[None], dim=-1)
    return F.cross_entropy(cosine / temperature, torch.arange(len(u), device=u.device))


class SimCSE(nn.Module):
    """A bi-encoder in unsupervised contrastive training; the head W_u is dropped afterwards."""

    def __init__(self, encoder: BertEncoder):
        super().__init__()
        self.encoder = encoder
        self.head = init_by_fan_in(nn.Linear(encoder.config.hidden_size, encoder.config.hidden_size))

    def loss(self, sentences: Tokens) -> Tensor:
        """L_SimCSE of two passes with different dropout masks."""
        u, v = (self.head(self.encoder.embed(*sentences[:2])).tanh() for _ in range(2))
        return contrastive(u, v)


def masked_words(model: BertPretraining, tokens: Tokens) -> Tensor:
    """BERT's pretraining, nats a word: of a share of the words 80% are masked, 10% become another, 10% stay, and all are to be told."""
    ids, mask, types = tokens
    lots = torch.rand(2, *ids.shape, device=ids.device)
    chosen, lot = (lots[0] < MASKED) & (ids >= len(SPECIAL)), lots[1]
    other = torch.randint(len(SPECIAL), model.config.vocab_size, ids.shape, device=ids.device)
    changed = torch.where(lot < 0.8, SPECIAL.index("[MASK]"), torch.where(lot < 0.9, other, ids))
    states = model.bert(torch.where(chosen, changed, ids), mask, types)
    return F.cross_entropy(model.words(states[chosen]), ids[chosen])


# ---- sentence pairs as tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs; gold: similarities or classes 0 and 1, nan where there are none."""

    a: list[str]
    b: list[str]
    gold: Float[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.a)


def encode(tokenizer: Tokenizer, sentences: Sequence[str], second: Sequence[str] | None = None, length: int = BI_LENGTH) -> Tokens:
    """Sentences, or pairs of them, of at most `length` tokens: the longer one of a pair is cut first. Padded to the longest."""
    tokenizer.enable_truncation(length)
    a = [sentence.strip() for sentence in sentences]
    found = tokenizer.encode_batch(a if second is None else list(zip(a, (sentence.strip() for sentence in second), strict=True)))
    return tuple(torch.tensor([getattr(encoding, field) for encoding in found]) for field in ("ids", "attention_mask", "type_ids"))


def rows(tokens: Tokens, indices: Int[Tensor, "b"]) -> Tokens:
    """Some of the sentences, without padding that none of them needs."""
    longest = int(tokens[1][indices].sum(1).max())
    return tuple(t[indices, :longest] for t in tokens)


class Examples:
    """Tokenised inputs with labels, as a dataset: batches are ((Tokens, ...), y)."""

    def __init__(self, inputs: tuple[Tokens, ...], y: Scores):
        self.inputs, self.y = inputs, y.float()

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[tuple[Tokens, ...], Scores]:
        """Examples by index."""
        return tuple(rows(tokens, indices) for tokens in self.inputs), self.y[indices]


def bi_examples(tokenizer: Tokenizer, pairs: Pairs, y: Scores) -> Examples:
    """Each pair once, its sentences apart."""
    return Examples((encode(tokenizer, pairs.a), encode(tokenizer, pairs.b)), y)


def cross_examples(tokenizer: Tokenizer, pairs: Pairs, y: Scores, both_orders: bool = True) -> Examples:
    """Each pair as one input, in both orders where the order means nothing."""
    a, b = (pairs.a + pairs.b, pairs.b + pairs.a) if both_orders else (pairs.a, pairs.b)
    return Examples((encode(tokenizer, a, b, CROSS_LENGTH),), torch.cat([y, y]) if both_orders else y)


@torch.no_grad()
def scored(model: BertEncoder | CrossEncoder, tokenizer: Tokenizer, pairs: Pairs, length: int = CROSS_LENGTH, size: int = 256) -> Scores:
    """x or σ(z) of every pair, in eval mode and without a gradient. length: of a cross-encoder's input."""
    training, on = model.training, next(model.parameters()).device
    model.eval()
    cross = isinstance(model, CrossEncoder)
    inputs = [encode(tokenizer, pairs.a, pairs.b, length)] if cross else [encode(tokenizer, sentences) for sentences in (pairs.a, pairs.b)]
    found = []
    for part in torch.arange(len(pairs)).split(size):
        tokens = [tuple(t.to(on) for t in rows(batch, part)) for batch in inputs]
        found.append((logits(model, *tokens).sigmoid() if cross else similarity(model, *tokens)).cpu())
    model.train(training)
    return torch.cat(found)


# ---- the cycles -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A PLM, its tokenizer and its SimCSE encoder: what the students start from. seed: of the one new layer, the cross-encoder's last."""

    tokenizer: Tokenizer
    plm: Bert | BertEncoder  # with the pooler, if the cross-encoder has one
    simcse: BertEncoder
    seed: int = 0

    def cross(self, start: BertEncoder | None = None) -> CrossEncoder:
        """A cross-encoder from the PLM; start: continue from this encoder instead."""
        with seeded(self.seed):
            cross = CrossEncoder(self.simcse.config)
            init_by_fan_in(cross.classifier)
        body = encoder_of(cross)
        kept = body.state_dict().keys()
        state = self.plm.state_dict() | (start.state_dict() if start else {})
        body.load_state_dict({name: tensor for name, tensor in state.items() if name in kept})
        return cross

    def bi(self, start: BertEncoder | None = None) -> BertEncoder:
        """A bi-encoder from SimCSE; start: continue from this encoder instead."""
        bi = copy.deepcopy(self.simcse)
        if start:
            bi.load_state_dict({name: start.state_dict()[name] for name in bi.state_dict()})
        return bi


def encoder_of(cross: CrossEncoder) -> BertEncoder:
    """The encoder inside, with its pooler if it has one."""
    return getattr(cross, cross.config.model_type)


Train = Callable[[str, int, int, nn.Module, Examples], nn.Module]  # (kind, cycle, family, student, examples) -> the trained student
Models = list[nn.Module]


def trans_encoder(
    families: Sequence[Family], pairs: Pairs, cycles: int, train: Train, *, fresh: bool = True, both_orders: bool = True, clamp: bool = False
) -> Iterator[tuple[Models, Models]]:
    """The cross-encoders and the bi-encoders of every cycle, one of each for every family. `train` fits a student of kind "cross" or "bi".

    fresh: False lets each student go on from its teacher's weights. clamp: the labels of the cross-encoders to [0, 1].
    """
    bis = [family.bi() for family in families]
    for cycle in range(1, cycles + 1):
        y = averaged(families, bis, pairs)
        y = y.clamp(0, 1) if clamp else y
        students = [family.cross(None if fresh else bi) for family, bi in zip(families, bis, strict=True)]
        examples = [cross_examples(family.tokenizer, pairs, y, both_orders) for family in families]
        crosses = [train("cross", cycle, i, *given) for i, given in enumerate(zip(students, examples, strict=True))]
        y = averaged(families, crosses, pairs)
        students = [family.bi(None if fresh else encoder_of(cross)) for family, cross in zip(families, crosses, strict=True)]
        examples = [bi_examples(family.tokenizer, pairs, y) for family in families]
        bis = [train("bi", cycle, i, *given) for i, given in enumerate(zip(students, examples, strict=True))]
        yield crosses, bis


def averaged(families: Sequence[Family], teachers: Models, pairs: Pairs) -> Scores:
    """y: the mean of the teachers' scores."""
    return torch.stack([scored(teacher, family.tokenizer, pairs) for family, teacher in zip(families, teachers, strict=True)]).mean(0)


# ---- agreement with gold ----------------------------------------------------------------------------------------------------------------


def spearman(scores: Scores, gold: Scores) -> float:
    """Rank correlation in points: Pearson's of the ranks, ties sharing their mean rank, times 100."""
    return 100 * float(spearmanr(scores, gold).statistic)


# ---- sentence pairs: captions of scenes -----------------------------------------------------------------------------------------------

SIZES, COLOURS, SHAPES, GROUNDS = ("big", "small"), tuple(scenes.COLOURS), scenes.SHAPES, tuple(scenes.BACKGROUNDS)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SYNONYMS = {
    "big": ("big", "large", "huge"), "small": ("small", "little", "tiny"),
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle", "wedge"), "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "left": ("left", "west"), "right": ("right", "east"), "above": ("above", "over"), "below": ("below", "under"),
}  # fmt: skip
THINGS = ("{size} {colour} {shape}", "{colour} {size} {shape}")
SENTENCES = ("{a} {relation} {b} on {ground}", "on {ground} {relation} {b} {a}")
WORDS = sorted({"on", *COLOURS, *GROUNDS, *(word for synonyms in SYNONYMS.values() for word in synonyms)})

Thing = tuple[str, str, str]  # size, colour, shape
Scene = tuple[Thing, Thing, str, str]  # two things of different shapes, how the first lies to the second, the ground


def sample_scene(rng: random.Random) -> Scene:
    """Uniformly."""
    a, b = ((rng.choice(SIZES), rng.choice(COLOURS), shape) for shape in rng.sample(SHAPES, 2))
    return a, b, rng.choice([*OPPOSITE]), rng.choice(GROUNDS)


def facts(scene: Scene) -> set[tuple[str, ...]]:
    """Eight: each shape, with its size, with its colour; who lies how to whom, whichever is named first; the ground."""
    a, b, relation, ground = scene
    told = {(shape, *about) for size, colour, shape in (a, b) for about in ((), (size,), (colour,))}
    lies = (a[2], relation, b[2]) if relation in ("left", "above") else (b[2], OPPOSITE[relation], a[2])
    return told | {lies, (ground,)}


def edit(scene: Scene, rng: random.Random) -> Scene:
    """One change: colours trade places, or things do, which bags of words cannot tell; or another ground, size, colour or thing."""
    a, b, relation, ground = scene
    kind = rng.choice(("trade", "turn", "ground", "size", "colour", "thing"))
    if kind == "trade":
        return (a[0], b[1], a[2]), (b[0], a[1], b[2]), relation, ground
    if kind == "turn":
        return a, b, OPPOSITE[relation], ground
    if kind == "ground":
        return a, b, relation, rng.choice(GROUNDS)
    if rng.random() < 0.5:  # the other thing comes first
        a, b, relation = b, a, OPPOSITE[relation]
    size, colour, shape = a
    size = size if kind == "colour" else rng.choice(SIZES)
    colour = colour if kind == "size" else rng.choice(COLOURS)
    return (size, colour, rng.choice([s for s in SHAPES if s != b[2]]) if kind == "thing" else shape), b, relation, ground


def caption(scene: Scene, rng: random.Random) -> str:
    """One way to say it: from either thing, with synonyms, in another order."""
    a, b, relation, ground = scene
    if rng.random() < 0.5:
        a, b, relation = b, a, OPPOSITE[relation]
    say = lambda word: rng.choice(SYNONYMS[word])
    a, b = (rng.choice(THINGS).format(size=say(size), colour=colour, shape=say(shape)) for size, colour, shape in (a, b))
    return rng.choice(SENTENCES).format(a=a, b=b, relation=say(relation), ground=ground)


@cache
def caption_pairs(n: int, seed: int, edits: int = 4) -> Pairs:
    """Captions of a scene and of the same after 0 to `edits` changes; gold: the share of facts in common. Pair i does not depend on n."""
    a, b, gold = [], [], []
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        first = second = sample_scene(rng)
        for _ in range(rng.randint(0, edits)):
            second = edit(second, rng)
        a.append(caption(first, rng))
        b.append(caption(second, rng))
        gold.append(len(facts(first) & facts(second)) / 8)
    return Pairs(a, b, torch.tensor(gold))


# ---- sentence pairs: published --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A tab-separated file, and where in it the pairs are. No header: the columns are score, sentence1, sentence2."""

    file: str
    a: str = "sentence1"
    b: str = "sentence2"
    score: str = "score"
    split: str = ""  # column
    splits: dict[str, str] | None = None  # train, dev, test -> its value there, or the name of the split's file
    scores: dict[str, float] | None = None  # of classes with names


QUORA, SICK = "quora-IR-dataset/classification/{}_pairs.tsv", {"train": "TRAIN", "dev": "TRIAL", "test": "TEST"}
SPLITS = {name: name for name in ("train", "dev", "test")}
MRPC = {"train": "train.tsv", "dev": "dev.tsv", "test": "msr_paraphrase_test.txt"}
STS = {f"sts{year}": Source(f"STS_data/en/20{year}.test.tsv") for year in range(12, 17)}
STS["stsb"] = Source("stsbenchmark.tsv.gz", split="split", splits=SPLITS)
STS["sickr"] = Source("STS_data/en/SICK_annotated.txt", "sentence_A", "sentence_B", "relatedness_score", "SemEval_set", SICK)
BINARY = {
    "qqp": Source(QUORA, "question1", "question2", "is_duplicate", splits=SPLITS),
    "qnli": Source("QNLI/{}.tsv", "question", "sentence", "label", "", SPLITS | {"test": "dev"}, {"entailment": 1.0, "not_entailment": 0.0}),
    "mrpc": Source("MRPC/{}", "#1 String", "#2 String", "Quality", splits=MRPC),
}
RANGES = {("qqp", "train"): slice(10_000), ("qqp", "dev"): slice(1_000), ("qqp", "test"): slice(10_000)}  # the authors' parts of the files
RANGES |= {("qnli", "dev"): slice(1_000), ("qnli", "test"): slice(1_000, None)}  # GLUE's test has no labels
HOSTS = "fangyuliu.me/data/STS_data.zip, sbert.net/datasets (stsbenchmark.tsv.gz, quora-IR-dataset.zip) and gluebenchmark.com have them"


def read_pairs(root: Path, name: str, split: str = "test") -> Pairs:
    """A set of STS or BINARY in the layout in which its authors publish it. STS12 to STS16 have a test split alone. Raises UserError."""
    source = (STS | BINARY)[name]
    file = root / source.file.format((source.splits or {}).get(split))
    pairs = [
        (row[source.a], row[source.b], _score(row[source.score], source, file, number))
        for number, row in _table(file, source)
        if not source.split or row[source.split] == source.splits[split]
    ][RANGES.get((name, split), slice(None))]
    if not pairs:
        raise UserError(f"{file} has no pairs of the split {split!r}: fetch it again")
    a, b, gold = (list(column) for column in zip(*pairs, strict=True))
    return Pairs(a, b, torch.tensor(gold))


def _table(file: Path, source: Source) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows by column."""
    if not file.is_file():
        raise UserError(f"{file} does not exist: {HOSTS}")
    columns = None if source.split or source.splits else ("score", "sentence1", "sentence2")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, columns, delimiter="\t", quoting=csv.QUOTE_NONE)
            wanted = [name for name in (source.a, source.b, source.score, source.split) if name]
            if missing := [name for name in wanted if name not in (table.fieldnames or ())]:
                raise UserError(f"{file} lacks the column {missing[0]}: its first line is {(table.fieldnames or [])[:5]}")
            for row in table:
                if any(row[name] is None for name in wanted):
                    raise UserError(f"{file}, line {table.line_num}: a tab-separated line has too few columns")
                yield table.line_num, row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is damaged or no tab-separated text ({error}): fetch it again") from None


def _score(value: str, source: Source, file: Path, number: int) -> float:
    """nan where none is given."""
    try:
        return source.scores[value] if source.scores else float(value or "nan")
    except (KeyError, ValueError):
        raise UserError(f"{file}, line {number}: {value!r} is no score: fetch it again") from None


def read_custom(file: Path) -> Pairs:
    """One `sentence || sentence` a line, without scores. Raises UserError."""
    try:
        lines = [line.split("||") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: convert it") from None
    if bad := next((parts for parts in lines if len(parts) != 2), None):
        raise UserError(f"{file}: expected two sentences with || between them, found {'||'.join(bad)[:60]!r}")
    if not lines:
        raise UserError(f"{file} is empty: give a file with one `sentence || sentence` a line")
    return Pairs(*(list(side) for side in zip(*lines, strict=True)), torch.full((len(lines),), float("nan")))


def unlabelled(root: Path, task: str, transductive: bool) -> Pairs:
    """The texts to learn from, without duplicates. task: "sts" or a set of BINARY. transductive: the test pairs too, as the authors do.
    A file of one's own has only one part."""
    if root.is_file():
        return read_custom(root)
    if task != "sts" and task not in BINARY:
        raise UserError(f"--task {task}: take one of sts, {', '.join(BINARY)}")
    parts = [(name, "train") for name in (("stsb", "sickr") if task == "sts" else (task,))]
    parts += [(name, "test") for name in (STS if task == "sts" else (task,)) if transductive]
    found = [read_pairs(root, *part) for part in parts]
    distinct = list(dict.fromkeys((a, b) for pairs in found for a, b in zip(pairs.a, pairs.b, strict=True)))
    return Pairs(*(list(side) for side in zip(*distinct, strict=True)), torch.full((len(distinct),), float("nan")))
