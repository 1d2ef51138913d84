"""tiny-bert: a small BERT, and its tokenizer, pretrained on the docstrings of Python's standard library as BERT was (Devlin et al. 2019).

    L = -mean log p(w_i | corrupted text), i in C  -  mean log p(b follows a)                       nats
    C: 40% of the tokens; of them 80% become [MASK], 10% a random token, 10% stay

BERT hides 15%; in a run this short a step must teach more (Wettig et al. 2023).

An input is [CLS] a [SEP], or [CLS] a [SEP] b [SEP] of token types 0 and 1 where b goes on from a or comes from elsewhere, a third each;
a step's inputs have 32, 64 or 128 tokens. The tokenizer (BPE, the four special tokens, template, padding) writes such inputs itself:

    tokenizer = text.tokenizer("tiny-bert"); batch = tokenizer.encode_batch([(a, b), ...]): .ids, .type_ids, .attention_mask of each

Measured on held-out text of which 15% is [MASK]. The floors are unigrams, and the best guess of a Markov chain from what both
sides of the gap show, p(w|l,r) ∝ p(w|l) p(r|w); a neighbour that is masked too drops out. p: Kneser-Ney bigrams of the training text.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from common.backbones import pretrained
from common.backbones.bert import BertConfig
from common.backbones.bert_pretraining import BertPretraining
from common.config import RunConfig
from common.data import Batches, text
from common.gpu import seed_everything, seeded
from common.layers import init_by_fan_in, sinusoidal
from common.loop import fit
from common.ngrams import KneserNey, ngrams
from common.results import write


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 4500
    batch: int = 16  # windows of `context` tokens; more, shorter inputs where a step's are short
    lr: float = 5e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    vocab: int = 1024  # tokens of the byte-level BPE, without the special ones
    context: int = 128  # tokens
    width: int = 128
    hidden: int = 512  # of the MLP
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0


SCALES = {
    "smoke": Config(steps=4, batch=4, vocab=512, width=32, hidden=64, depth=1, heads=2),
    "small": Config(),
}
COMPONENTS = {"": BertPretraining}
FOLDER = "tiny-bert"
WINDOW = 128  # tokens of the validation inputs
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # the last ids of the vocabulary


def train(cfg: Config) -> dict[str, nn.Module]:
    corpus = text.corpus(vocab=cfg.vocab, context=cfg.context)
    tokenizer = for_sentences(corpus.tokenizer)
    seed_everything(cfg.seeds[0])
    model = BertPretraining(
        BertConfig(
            tokenizer.get_vocab_size(), cfg.width, cfg.depth, cfg.heads, cfg.hidden, cfg.context,
            pad_token_id=tokenizer.token_to_id("[PAD]"), hidden_dropout_prob=cfg.dropout,
        )
    )  # fmt: skip
    initialize(model)
    words = tokenizer.get_vocab_size() - len(SPECIAL)
    model.cls["predictions"].bias.data[:words] = unigrams(corpus.train, words)
    fit(model, lambda model, batch: loss(model, batch[0]), Batches(corpus, cfg.batch, cfg.seeds[0]), cfg, "bert")
    write(pretrained.CHECKPOINTS / FOLDER / "tokenizer.json", tokenizer.to_str())
    return {"": model}


def for_sentences(bpe: Tokenizer) -> Tokenizer:
    """The same tokens and the special ones; encodes one sentence or two as BERT reads them, and pads a batch."""
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", list(ids.items()))
    tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    return tokenizer


@torch.no_grad()
def initialize(model: BertPretraining) -> None:
    """What a network that normalises after its branches needs to learn within minutes: branches that add little to the stream at first, logits
    of unit variance, and a first layer that already looks at the tokens beside.
    """
    init_by_fan_in(model)
    layers, embeddings = model.bert.encoder.layer, model.bert.embeddings
    for table in (embeddings.word_embeddings, embeddings.token_type_embeddings):
        nn.init.normal_(table.weight, std=model.config.hidden_size**-0.5)  # the decoder's too, which is tied to it
    for layer in layers:
        for branch in (layer.attention.output.dense, layer.output.dense):
            branch.weight.mul_(0.3)
    look_beside(model)


@torch.no_grad()
def look_beside(model: BertPretraining) -> None:
    """Heads 0, 1, 2, ... of the first layer look at the tokens -1, +1, -2, ... places away.

    The last d channels, d the width of a head, hold waves of the place, and nothing else until training says so. There a shift by δ is a
    rotation R_δ: with W_q = 1.5 I and W_k = 1.5 R_δ the product of query i and key j is largest where j = i + δ.
    """
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention.self
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    positions = embeddings.position_embeddings.weight
    waves = lambda places: sinusoidal(2.0 * places, size, 20.0)  # of two radians a token to a tenth of one
    nn.init.zeros_(positions)
    positions[:, -size:] = waves(torch.arange(len(positions))) * (2 / model.config.hidden_size) ** 0.5
    for table in (embeddings.word_embeddings, embeddings.token_type_embeddings):
        table.weight[:, -size:] = 0
    for layer in model.bert.encoder.layer:
        for branch in (layer.attention.output.dense, layer.output.dense):
            branch.weight[-size:] = 0
    for head in range(heads):
        rows, shift = slice(head * size, (head + 1) * size), (-1) ** (head + 1) * (head // 2 + 1)
        sine, cosine = (wave.diag() for wave in waves(torch.tensor(shift)).chunk(2))
        turn = torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])
        for projection, rotation in ((attention.query, torch.eye(size)), (attention.key, turn)):
            projection.weight[rows] *= 0.1
            projection.weight[rows, -size:] += 1.5 * rotation


def data(cfg: Config) -> dict[str, str]:
    return {"text: stdlib": text.corpus(vocab=cfg.vocab, context=cfg.context).hash}


# ---- the objective --------------------------------------------------------------------------------------------------------------------


def loss(model: BertPretraining, windows: Int[Tensor, "b context"]) -> dict[str, Tensor]:
    """L."""
    words = model.config.vocab_size - len(SPECIAL)
    ids, types, follows = inputs(windows, windows.shape[1] >> torch.randint(3, ()).item(), words)
    corrupted, chosen = corrupt(ids, words)
    x = model.bert(corrupted, None, types)
    return {
        "masked": F.cross_entropy(model.words(x[chosen]), ids[chosen]),
        "follows": F.cross_entropy(model.follows(x), follows, ignore_index=ALONE),
    }


FOLLOWS, ELSEWHERE, ALONE = range(3)


def inputs(windows: Int[Tensor, "b context"], length: int, words: int) -> tuple[Int[Tensor, "r n"], Int[Tensor, "r n"], Int[Tensor, "r"]]:
    """Ids, token types, and whether b FOLLOWS a, is from ELSEWHERE, or there is none: a is ALONE."""
    _, cls, sep, _ = range(words, words + len(SPECIAL))
    rows = windows.reshape(-1, length)
    kind = torch.arange(len(rows)) % 3
    cut = torch.randint(length // 4, 3 * length // 4, (len(rows), 1))  # tokens of a
    cut[kind == ALONE] = length - 2
    place = torch.arange(length)
    types = (place > cut + 1).long()
    source = (place - 1 - types).clamp(min=0)  # of each place, in the text without special tokens
    elsewhere = rows.roll(windows.shape[1] // length, 0)  # the same place of another window
    ids = torch.where((types == 1) & (kind == ELSEWHERE)[:, None], elsewhere.gather(1, source), rows.gather(1, source))
    ids[:, 0], ids[:, -1], ids[place == cut + 1] = cls, sep, sep
    return ids, types, kind


def corrupt(ids: Int[Tensor, "b n"], words: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """The text with 40% of its words hidden, changed or left, and which."""
    chosen = (torch.rand(ids.shape) < 0.4) & (ids < words)
    lot = torch.rand(ids.shape)
    hidden = torch.where(lot < 0.8, mask_id(words), torch.where(lot < 0.9, torch.randint(words, ids.shape), ids))
    return torch.where(chosen, hidden, ids), chosen


def mask_id(words: int) -> int:
    return words + SPECIAL.index("[MASK]")


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    model = models[""]
    corpus = text.corpus(context=WINDOW - 2, tokenizer=text.tokenizer(FOLDER))
    words = model.config.vocab_size - len(SPECIAL)
    windows, _ = corpus.val_windows()
    chosen = torch.rand(windows.shape, generator=torch.Generator().manual_seed(1)) < 0.15
    hidden, truth = windows.masked_fill(chosen, mask_id(words)), windows[chosen]
    with torch.no_grad():
        logits = torch.cat([model(framed(part, words))[:, 1:-1][where] for part, where in zip(hidden.split(32), chosen.split(32), strict=True)])
    quality = scores(logits, truth, "")
    quality |= scores(chain(corpus.train, framed(hidden, words), F.pad(chosen, (1, 1)), words), truth, "_bigrams")
    quality |= scores(unigrams(corpus.train, words).expand(len(truth), -1), truth, "_unigrams")
    return quality | {"follows": following(model, windows, words), "follows_chance": 0.5}


def framed(windows: Int[Tensor, "b n"], words: int) -> Int[Tensor, "b m"]:
    """[CLS] a [SEP]."""
    return F.pad(F.pad(windows, (1, 0), value=words + SPECIAL.index("[CLS]")), (0, 1), value=words + SPECIAL.index("[SEP]"))


def scores(logits: Float[Tensor, "m vocab"], truth: Int[Tensor, "m"], name: str) -> dict[str, float]:
    """Nats a masked token, and how often the likeliest one is right."""
    return {f"loss{name}": F.cross_entropy(logits, truth).item(), f"accuracy{name}": (logits.argmax(-1) == truth).float().mean().item()}


def unigrams(train: Int[np.ndarray, "n"], words: int) -> Float[Tensor, "words"]:
    """log p(w)."""
    return torch.from_numpy(KneserNey(ngrams(train, 1), words).log_prob(np.arange(words)[:, None])).float()


def chain(train: Int[np.ndarray, "n"], ids: Int[Tensor, "b n"], chosen: Bool[Tensor, "b n"], words: int) -> Float[Tensor, "m words"]:
    """log p(w|l) + log p(r|w) at the chosen places, log p(w) for the first term and 0 for the second where l or r is no word."""
    pairs = np.stack(np.divmod(np.arange(words * words), words), 1)
    p = torch.from_numpy(KneserNey(ngrams(train, 2), words).log_prob(pairs)).float().view(words, words)
    after, before = torch.cat([p, unigrams(train, words)[None]]), F.pad(p, (0, 1))
    left, right = (ids.roll(shift, 1)[chosen].clamp(max=words) for shift in (1, -1))
    return after[left] + before[:, right].T


def following(model: BertPretraining, windows: Int[Tensor, "b n"], words: int) -> float:
    """How often the model tells whether b follows a, over as many that do as do not."""
    with seeded(1), torch.no_grad():
        ids, types, kind = inputs(windows, windows.shape[1], words)
        guess = torch.cat([model.follows(model.bert(part, None, t)) for part, t in zip(ids.split(32), types.split(32), strict=True)]).argmax(-1)
    return (guess == kind)[kind != ALONE].float().mean().item()
