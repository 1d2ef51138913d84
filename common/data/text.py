"""English text for language models: Python's own documentation, a text file, or token files in nanoGPT's layout."""

import ast
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from common.errors import UserError
from common.results import content_hash, write


@dataclass(frozen=True)
class Corpus:
    """Token ids to learn from and, of other documents, to validate on. As a dataset, example i is the window that starts at token i."""

    vocab_size: int
    train: np.ndarray
    val: np.ndarray
    context: int  # tokens a window
    bytes_per_token: float  # of the validation text: bits per byte = nats per token / ln 2 / bytes_per_token
    hash: str

    def __len__(self) -> int:
        return len(self.train) - self.context

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Int[Tensor, "b context"], Int[Tensor, "b context"]]:
        """Inputs, and the same tokens one later as targets."""
        windows = self.train[indices.numpy()[:, None] + np.arange(self.context + 1)]
        return _split(windows)

    def val_windows(self) -> tuple[Int[Tensor, "n context"], Int[Tensor, "n context"]]:
        """The validation text cut into windows that share no target."""
        starts = np.arange(0, len(self.val) - self.context, self.context)
        return _split(self.val[starts[:, None] + np.arange(self.context + 1)])


def _split(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def corpus(name: str = "stdlib", vocab: int = 1024, context: int = 128) -> Corpus:
    """name: "stdlib" (docstrings of the standard library), "topics" (the language reference), a .txt file, or a directory with train.bin
    and val.bin (flat uint16 token ids below `vocab`). Text is cut by a byte-level BPE of `vocab` tokens learnt from its training part.
    """
    if name in _EMBEDDED:
        train, val = _by_document(_EMBEDDED[name]())
    elif Path(name).is_dir():
        return _token_files(Path(name), vocab, context)
    elif Path(name).is_file():
        text = Path(name).read_text()
        cut = len(text) * 9 // 10
        train, val = text[:cut], text[cut:]
    else:
        raise UserError(f"--data {name}: give a .txt file, a directory with train.bin and val.bin, or one of {', '.join(_EMBEDDED)}")
    return _tokenized(train, val, vocab, context)


# ---- sources --------------------------------------------------------------------------------------------------------------------------


@cache
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


@cache
def _stdlib() -> dict[str, str]:
    """Docstrings of every module of the standard library; parsing them all takes seconds, so the result is kept."""
    kept = cache_directory() / f"stdlib-{platform.python_version()}.json"
    if not kept.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p.relative_to(root) for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.relative_to(root).parts))
        documents = {str(path): _docstrings((root / path).read_bytes()) for path in files}
        write(kept, json.dumps({name: text for name, text in documents.items() if text}))
    return json.loads(kept.read_text())


def _docstrings(source: bytes) -> str:
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):  # the standard library ships a few files that are wrong on purpose
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node)))


_EMBEDDED = {"stdlib": _stdlib, "topics": _topics}


def _by_document(documents: dict[str, str]) -> tuple[str, str]:
    """Training and validation text: a tenth of the documents, chosen by the hash of their names."""
    held_out = lambda name: hashlib.sha256(name.encode()).digest()[0] < 26
    parts = ([text for name, text in sorted(documents.items()) if held_out(name) == val] for val in (False, True))
    train, val = ("\n\n".join(part) for part in parts)
    return train, val


def _token_files(root: Path, vocab: int, context: int) -> Corpus:
    for name in ("train.bin", "val.bin"):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}: put nanoGPT's train.bin and val.bin (flat uint16 token ids) there")
    train, val = (np.memmap(root / name, np.uint16, "r") for name in ("train.bin", "val.bin"))
    if (largest := int(val.max())) >= vocab:
        raise UserError(f"{root}/val.bin holds token {largest}, but the vocabulary has {vocab}: set the vocabulary size of the files' tokenizer")
    return Corpus(vocab, train, val, context, float("nan"), content_hash(val))


# ---- tokens ---------------------------------------------------------------------------------------------------------------------------


def byte_level_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-pair encoding over bytes: every text can be written in it, and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


@cache
def _tokenized(train: str, val: str, vocab: int, context: int) -> Corpus:
    key = content_hash(train.encode(), val.encode())
    kept = cache_directory() / f"bpe-{key}-{vocab}.json"
    if not kept.exists():
        write(kept, byte_level_bpe([train], vocab).to_str())
    tokenizer = Tokenizer.from_file(str(kept))
    ids = [np.array(tokenizer.encode(text).ids, np.uint16 if vocab <= 2**16 else np.uint32) for text in (train, val)]
    if len(ids[1]) <= context:
        raise UserError(f"the validation text has {len(ids[1])} tokens, fewer than one window of {context}: give a longer text")
    return Corpus(tokenizer.get_vocab_size(), *ids, context, len(val.encode()) / len(ids[1]), key)


def cache_directory() -> Path:
    """Where derived data is kept: $ATLAS_CACHE or ~/.cache/attention-atlas."""
    return Path(os.environ.get("ATLAS_CACHE", Path.home() / ".cache/attention-atlas"))


def hashes() -> dict[str, str]:
    return {f"text: {name}": content_hash(*(text.encode() for text in _by_document(documents()))) for name, documents in _EMBEDDED.items()}
