"""English text for language models: Python's own documentation, a text file, or token files in nanoGPT's layout."""

import ast
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from common.backbones import pretrained
from common.errors import UserError
from common.results import content_hash, write


@dataclass(frozen=True)
class Corpus:
    """Token ids to learn from and, of other documents, to validate on.

    As a dataset, example i is the window of `context` tokens that starts at token i · max(1, context // 8): windows overlap, so a small
    corpus is seen at many offsets, and a large one has few enough windows for their order to be shuffled in memory.
    """

    vocab_size: int
    train: Int[np.ndarray, "n"]
    val: Int[np.ndarray, "m"]
    context: int  # tokens a window
    bytes_per_token: float  # of the validation text: bits per byte = nats per token / ln 2 / bytes_per_token; nan for files of token ids
    hash: str  # of the text, or of the validation ids
    tokenizer: Tokenizer | None = None  # that cut the text; None for files of token ids

    def __post_init__(self):
        if (tokens := min(len(self.train), len(self.val))) <= self.context:
            raise UserError(f"training or validation text has {tokens} tokens, but a window takes {self.context + 1}: give a longer text")

    @property
    def stride(self) -> int:
        return max(1, self.context // 8)

    def __len__(self) -> int:
        return (len(self.train) - self.context - 1) // self.stride + 1

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Int[Tensor, "b context"], Int[Tensor, "b context"]]:
        """Inputs, and the same tokens one later as targets."""
        return _windows(self.train, indices.numpy() * self.stride, self.context)

    def val_windows(self) -> tuple[Int[Tensor, "n context"], Int[Tensor, "n context"]]:
        """The validation text cut into windows that share no target."""
        return _windows(self.val, np.arange(0, len(self.val) - self.context, self.context), self.context)


def _windows(ids: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def corpus(name: str = "stdlib", vocab: int = 1024, context: int = 128, tokenizer: Tokenizer | None = None) -> Corpus:
    """name: "stdlib" (docstrings of the standard library), "topics" (the language reference), a text file, or token ids in nanoGPT's
    layout: a directory with train.bin and val.bin, or one .bin file. Text is cut by `tokenizer`, or else by a byte-level BPE of `vocab`
    tokens learnt from its training part; the ids of a .bin file are below `vocab`, of 16 bits where that suffices and of 32 otherwise.

    Validation is on a tenth: of the documents of the first two, and the end of a single file. Raises UserError for missing or bad files.
    """
    path = Path(name)
    if name in _EMBEDDED:
        return _tokenized(*_embedded(name), vocab, context, tokenizer)
    if not path.exists():
        kinds = f"a text file, a directory with nanoGPT's train.bin and val.bin, or one of {', '.join(_EMBEDDED)}"
        raise UserError(f"--data {name}: no such file; give {kinds} (data/README.md)")
    if path.is_dir() or path.suffix == ".bin":
        return _token_files(path, vocab, context)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it, or name it .bin if it holds token ids") from None
    cut = len(text) * 9 // 10
    return _tokenized(text[:cut], text[cut:], vocab, context, tokenizer)


# ---- sources --------------------------------------------------------------------------------------------------------------------------


@cache
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


@cache
def _stdlib() -> dict[str, str]:
    """Docstrings of every module of the standard library; parsing them all takes seconds, so the result is kept."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_modules(root))
    listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in files)
    kept = cache_directory() / f"stdlib-{content_hash(listing.encode())}.json"
    if not kept.exists():
        documents = {path.relative_to(root).as_posix(): _docstrings(path.read_bytes()) for path in files}
        write(kept, json.dumps({name: text for name, text in documents.items() if text}))
    return json.loads(kept.read_text())


def _modules(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = set(below) - {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(source: bytes) -> str:
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):  # the standard library ships a few files that are wrong on purpose
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node)))


_EMBEDDED = {"stdlib": _stdlib, "topics": _topics}


@cache
def _embedded(name: str) -> tuple[str, str]:
    """Training and validation text."""
    return _by_document(_EMBEDDED[name]())


def _by_document(documents: dict[str, str]) -> tuple[str, str]:
    """Training and validation text. Held out are, in the order of their names' hashes, all documents that still fit into a tenth of the
    text. Paragraphs they share with others (chapters of the language reference repeat each other) are dropped from the training text.
    """
    room = sum(map(len, documents.values())) // 10
    held_out = set()
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(documents[name]) <= room:
            held_out.add(name)
            room -= len(documents[name])
    val = [paragraph for name in sorted(held_out) for paragraph in _paragraphs(documents[name])]
    seen = {paragraph for paragraph in val if len(paragraph) >= 40}  # shorter ones are phrases of the language, not copies
    train = [paragraph for name in sorted(documents.keys() - held_out) for paragraph in _paragraphs(documents[name]) if paragraph not in seen]
    return "\n\n".join(train), "\n\n".join(val)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n{2,}", text.strip("\n"))


def _token_files(path: Path, vocab: int, context: int) -> Corpus:
    if path.is_dir():
        train, val = (_token_file(path / name, vocab) for name in ("train.bin", "val.bin"))
    else:
        ids = _token_file(path, vocab)
        train, val = np.split(ids, [len(ids) * 9 // 10])
    if (largest := int(val.max())) >= vocab:
        raise UserError(f"{path} holds token {largest}, but the vocabulary has {vocab}: set the vocabulary size of its tokenizer (50257 for GPT-2)")
    return Corpus(vocab, train, val, context, float("nan"), content_hash(val))


def _token_file(path: Path, vocab: int) -> np.ndarray:
    kind = np.dtype("<u2" if vocab <= 2**16 else "<u4")
    if not path.is_file():
        raise UserError(f"{path} is missing: put nanoGPT's train.bin and val.bin (flat token ids, {kind}) into {path.parent}")
    if (size := path.stat().st_size) == 0 or size % kind.itemsize:
        raise UserError(f"{path} has {size} bytes, which are no {kind} token ids (the type for {vocab} tokens): write it again")
    return np.memmap(path, kind, "r")


# ---- tokens ---------------------------------------------------------------------------------------------------------------------------


def byte_level_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-pair encoding over bytes: every text can be written in it, and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def tokenizer(source: str | Path) -> Tokenizer:
    """That of a checkpoint: a directory with tokenizer.json, or the name of a small one that ships, as "tiny-lm". Raises UserError."""
    file = (Path(source) if Path(source).is_dir() else pretrained.CHECKPOINTS / source) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a directory with a tokenizer.json, or the name of a checkpoint in {pretrained.CHECKPOINTS}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{file} is not a tokenizer of the tokenizers library ({error}): fetch it again") from None


@cache
def _tokenized(train: str, val: str, vocab: int, context: int, tokenizer: Tokenizer | None) -> Corpus:
    key = content_hash(train.encode(), val.encode())
    if tokenizer is None:
        kept = cache_directory() / f"bpe-{key}-{vocab}.json"
        if not kept.exists():
            write(kept, byte_level_bpe([train], vocab).to_str())
        tokenizer = Tokenizer.from_file(str(kept))
    size = tokenizer.get_vocab_size()
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16 if size <= 2**16 else np.uint32) for text in (train, val)]
    return Corpus(size, *ids, context, len(val.encode()) / len(ids[1]), key, tokenizer)


def cache_directory() -> Path:
    """Where derived data is kept: $ATLAS_CACHE or ~/.cache/attention-atlas."""
    return Path(os.environ.get("ATLAS_CACHE", Path.home() / ".cache/attention-atlas"))


def hashes() -> dict[str, str]:
    return {f"text: {name}": content_hash(*(text.encode() for text in _embedded(name))) for name in _EMBEDDED}
