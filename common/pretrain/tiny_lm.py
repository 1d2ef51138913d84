"""tiny-lm: a small Llama, and its tokenizer, that has read the docstrings of Python's standard library.

    L = -mean log p(w_i | w_0 ... w_{i-1})                     nats a token
    bits per byte = L / ln 2 / (bytes of a token, on average)  comparable between tokenizers

measured on the documents that were held out (common/data/text.py), in windows whose first tokens have little to go by. The floors have
learnt the same training tokens by counting, and see the whole text before a token: unigrams, and modified Kneser-Ney 5-grams, which predict
the last tenth of the training text from the rest of it better than shorter ones do.

Heads of use to papers on attention, on random tokens a_0 ... a_{L-1} that come twice (Olsson et al. 2022):

    induction        weight of token L+i on token i+1, which followed a_i the first time
    previous token   weight of token i on token i-1

of the best head, against even weights; and how often the model predicts the second copy, against chance.
"""

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.attention import controlled
from common.backbones import pretrained
from common.backbones.llama import Llama, LlamaConfig
from common.config import RunConfig
from common.data import Batches, text
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import fit
from common.ngrams import KneserNey, ngrams
from common.results import write


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 1200
    batch: int = 8
    lr: float = 8e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    vocab: int = 2048  # tokens of the byte-level BPE
    context: int = 256  # tokens
    width: int = 128
    hidden: int = 384  # of the MLP
    depth: int = 4
    heads: int = 4


SCALES = {
    "smoke": Config(steps=4, batch=2, vocab=512, context=64, width=32, hidden=64, depth=1, heads=2),
    "small": Config(),
}
COMPONENTS = {"": Llama}
FOLDER = "tiny-lm"
WINDOW = 256  # tokens of the validation windows
ORDER = 5  # of the n-grams


def train(cfg: Config) -> dict[str, nn.Module]:
    corpus = text.corpus(vocab=cfg.vocab, context=cfg.context)
    seed_everything(cfg.seeds[0])
    model = Llama(LlamaConfig(cfg.vocab, cfg.width, cfg.hidden, cfg.depth, cfg.heads))
    init_by_fan_in(model)
    fit(model, loss, Batches(corpus, cfg.batch, cfg.seeds[0]), cfg, "lm")
    write(pretrained.CHECKPOINTS / FOLDER / "tokenizer.json", corpus.tokenizer.to_str())
    return {"": model}


def loss(model: Llama, batch: tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]) -> Tensor:
    """L."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def data(cfg: Config) -> dict[str, str]:
    return {"text: stdlib": text.corpus(vocab=cfg.vocab, context=cfg.context).hash}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    model = models[""]
    corpus = text.corpus(context=WINDOW, tokenizer=text.tokenizer(FOLDER))
    windows, targets = corpus.val_windows()
    with torch.no_grad():
        nats = [loss(model, window).item() for window in zip(windows.split(1), targets.split(1), strict=True)]
    bits = math.log(2) * corpus.bytes_per_token
    return {
        "bits_per_byte": np.mean(nats).item() / bits,
        "bits_per_byte_ngrams": by_counting(corpus, ORDER, targets.numel()) / bits,
        "bits_per_byte_unigrams": by_counting(corpus, 1, targets.numel()) / bits,
    } | heads(model)


def by_counting(corpus: text.Corpus, order: int, targets: int) -> float:
    """L of n-grams for the targets of the validation windows."""
    grams = ngrams(np.concatenate([corpus.train[-order:], corpus.val]), order)[-len(corpus.val) :]
    return float(-KneserNey(ngrams(corpus.train, order), corpus.vocab_size).log_prob(grams[1 : targets + 1]).mean())


def heads(model: Llama) -> dict[str, float]:
    """The best heads on tokens that come twice, and how well the second copy is predicted."""
    tokens = repeated(model.config.vocab_size)
    maps, logits = attention(model, tokens)
    guesses, copy = logits.argmax(-1)[:, :-1], tokens.shape[1] // 2
    even = torch.ones(maps.shape[-2:]).tril()
    even /= even.sum(-1, keepdim=True)
    return {
        "induction": induction(maps).max().item(),
        "induction_even": induction(even).item(),
        "previous_token": previous_token(maps).max().item(),
        "previous_token_even": previous_token(even).item(),
        "copied": (guesses == tokens[:, 1:])[:, copy:].float().mean().item(),
        "copied_first_time": (guesses == tokens[:, 1:])[:, : copy - 1].float().mean().item(),
    }


def repeated(vocab: int) -> Int[Tensor, "b n"]:
    """Rows of 32 random tokens that come twice."""
    once = torch.randint(vocab, (32, 32), generator=torch.Generator().manual_seed(1))
    return torch.cat([once, once], 1)


class Maps(list):
    """A control that keeps the weights of every layer."""

    def weights(self, site, p):
        self.append(p)


@torch.no_grad()
def attention(model: Llama, tokens: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "layers h n n"], Float[Tensor, "b n vocab"]]:
    """The weights, averaged over the rows, and the logits."""
    with controlled(model, Maps()) as maps:
        logits = model(tokens)
    return torch.stack(maps).mean(1), logits


def induction(maps: Float[Tensor, "*heads n n"]) -> Float[Tensor, "*heads"]:
    """Mean weight of the tokens of the second copy on the token after their first occurrence."""
    return maps.diagonal(1 - maps.shape[-1] // 2, -2, -1)[..., 1:].mean(-1)


def previous_token(maps: Float[Tensor, "*heads n n"]) -> Float[Tensor, "*heads"]:
    return maps.diagonal(-1, -2, -1).mean(-1)


# ---- to look at -----------------------------------------------------------------------------------------------------------------------

PROMPTS = ("Return a new", "This module provides", "If the file does not exist,")


def sheet(models: dict[str, nn.Module]) -> Figure:
    """Continuations, and the two heads."""
    model, tokenizer = models[""], text.tokenizer(FOLDER)
    figure = Figure((11, 6.5), layout="constrained")
    written, *panels = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    written.axis("off")
    written.text(0, 1, "\n\n".join(continuations(model, tokenizer)), va="top", fontsize=7, family="monospace", parse_math=False)
    maps, _ = attention(model, repeated(model.config.vocab_size))
    for panel, name, score in zip(panels, ("induction", "previous token"), (induction, previous_token), strict=True):
        scores = score(maps)
        layer, head = divmod(scores.argmax().item(), maps.shape[1])
        panel.imshow(maps[layer, head].numpy(), vmin=0)
        panel.set(title=f"best {name} head: {scores.max():.2f}\nlayer {layer}, head {head}", xlabel="key", ylabel="query")
    return figure


def continuations(model: Llama, tokenizer: text.Tokenizer) -> list[str]:
    """Each prompt continued greedily and at temperature 0.8."""
    found = []
    for prompt in PROMPTS:
        tokens, generator = torch.tensor([tokenizer.encode(prompt).ids]), torch.Generator().manual_seed(0)
        for temperature in (0.0, 0.8):
            new = model.generate(tokens, max_new_tokens=60, temperature=temperature, generator=generator)
            kind = "sampled" if temperature else "greedy"
            said = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in tokenizer.decode(new[0].tolist()))
            lines = f"{prompt}|{said}".splitlines()
            found.append("\n".join([f"[{kind}]", *(wrapped for line in lines for wrapped in textwrap.wrap(line, 70) or [""])]))
    return found
