"""CLIP's byte-pair encoding of prompts, for text towers with the whole table of 49 408 tokens or with a compact one.

    "a red ring"  ->  <start> a red ring <end> <pad> ... <pad>          n rows of the token table

A published tokenizer/ directory says which row a token has (vocab.json) and what pads (special_tokens_map.json): Stable Diffusion 1 pads
with the end of text, 2 with "!". A compact table has a row for the tokens of a few words only.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from common.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def _bpe():
    from open_clip.tokenizer import SimpleTokenizer  # four seconds, and it needs no network

    return SimpleTokenizer()


class Tokenizer:
    """Prompts to the rows of a token table.

    vocab: token -> row, with START and END. length: n. pad: the token behind the end of text.
    """

    def __init__(self, vocab: dict[str, int], length: int, pad: str = END):
        self.vocab, self.length, self.pad = vocab, length, pad

    @classmethod
    def compact(cls, words: Iterable[str], length: int) -> "Tokenizer":
        """A table of the tokens of `words` alone, in the order of the whole one: the end of text is the last."""
        ids = sorted({i for word in words for i in _bpe().encode(word)})
        tokens = [*(_bpe().decoder[i] for i in ids), START, END]
        return cls({token: row for row, token in enumerate(tokens)}, length)

    @classmethod
    def whole(cls, length: int) -> "Tokenizer":
        """The published table of 49,408 tokens: the end of text is the last."""
        *tokens, _, _ = _bpe().decoder.values()  # the last two have other names there
        return cls({token: row for row, token in enumerate([*tokens, START, END])}, length)

    @classmethod
    def from_pretrained(cls, directory: Path, length: int) -> "Tokenizer":
        """Of a published directory. Raises UserError if it lacks a file."""
        specials = _json(directory / "special_tokens_map.json")
        pad = specials.get("pad_token", END)
        return cls(_json(directory / "vocab.json"), length, pad["content"] if isinstance(pad, dict) else pad)

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "vocab.json").write_text(json.dumps(self.vocab) + "\n")
        (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": self.pad}) + "\n")

    def __call__(self, prompts: list[str]) -> Int[Tensor, "b n"]:
        """Raises UserError for a word without a row and for a prompt that is too long."""
        rows = torch.full((len(prompts), self.length), self.vocab[self.pad])
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.ids(prompt)
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def ids(self, prompt: str) -> list[int]:
        """From the start to the end of text, without padding."""
        tokens = [START, *self.tokens(prompt), END]
        if len(tokens) > self.length:
            raise UserError(f"the prompt {prompt!r} has {len(tokens) - 2} tokens, this model takes {self.length - 2}: shorten it")
        return [self.vocab[token] for token in tokens]

    def tokens(self, prompt: str) -> list[str]:
        tokens = [_bpe().decoder[i] for i in _bpe().encode(prompt)]
        if any(token not in self.vocab for token in tokens):
            words = [word for word in prompt.split() if any(_bpe().decoder[i] not in self.vocab for i in _bpe().encode(word))]
            raise UserError(f"this model does not know {', '.join(map(repr, words))} in the prompt {prompt!r}: its words are {' '.join(self.words)}")
        return tokens

    def at(self, prompt: str, word: str) -> list[int]:
        """The places of a word's tokens in the row of a prompt, all its occurrences. Raises ValueError if it has none."""
        tokens, part = self.tokens(prompt), self.tokens(word)
        starts = [i for i in range(len(tokens) - len(part) + 1) if tokens[i : i + len(part)] == part]
        if not starts:
            raise ValueError(f"{word!r} is not in the prompt {prompt!r}")
        return [1 + i + j for i in starts for j in range(len(part))]

    @property
    def words(self) -> list[str]:
        """The whole words that have a row of their own, sorted."""
        return sorted(token.removesuffix("</w>") for token in self.vocab if token.endswith("</w>"))


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}: give the directory of a published model") from None
