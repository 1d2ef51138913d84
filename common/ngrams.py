"""N-gram models: what counting alone predicts, the baseline of every small language model.

Interpolated Kneser-Ney with three discounts (Chen & Goodman 1999), for w after the k-1 tokens h, and h' = h without its first token:

    p_k(w|h) = (c_k(hw) - D_k(c_k(hw)) + γ_k(h) p_{k-1}(w|h')) / c_k(h),     p_0 = 1/V
    c_K(hw): how often hw occurs;  c_k(hw), k < K: how many different tokens come before it;  c_k(h) = Σ_w c_k(hw)
    D_k(i) = i - (i+1) n_{i+1}/n_i · n_1/(n_1 + 2n_2),  i = 1, 2, 3 and D(i) = D(3) beyond;  n_i: how many hw have c_k = i
    γ_k(h) = Σ_w D_k(c_k(hw)):  what the discounts leave for the shorter history

So that nothing is impossible, D_k(i) >= 0.1, and 1/2 where an n_i is 0 (the unigrams of a long text: no token is rare).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class _Level:
    """c_k, D_k and γ_k, by the keys of hw and of h in ascending order."""

    grams: Int[np.ndarray, "g"]
    kept: Float[np.ndarray, "g"]  # c_k(hw) - D_k
    histories: Int[np.ndarray, "h"]
    totals: Float[np.ndarray, "h"]  # c_k(h)
    left: Float[np.ndarray, "h"]  # γ_k(h)


class KneserNey:
    """p_K, learnt from n-grams: rows of K token ids, the last of which is predicted from those before it, nearest last."""

    def __init__(self, grams: Int[np.ndarray, "n k"], vocab: int):
        self.vocab, self.order = vocab, grams.shape[1]
        if vocab**self.order >= 2**63:
            raise ValueError(f"{self.order}-grams of {vocab} tokens do not fit into 64 bits: lower the order")
        self.levels, keys = [], _keys(grams, vocab)
        for k in range(self.order, 0, -1):
            distinct, counts = np.unique(keys, return_counts=True)
            self.levels.insert(0, _level(distinct, counts, vocab))
            keys = distinct % vocab ** (k - 1)

    def log_prob(self, grams: Int[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
        """log p_K of the last token of each row."""
        p = np.full(len(grams), 1 / self.vocab)
        for k, level in enumerate(self.levels, 1):
            keys = _keys(grams[:, -k:], self.vocab)
            kept = _find(level.grams, level.kept, keys)
            total, left = (_find(level.histories, values, keys // self.vocab) for values in (level.totals, level.left))
            p = np.where(total > 0, (kept + left * p) / np.maximum(total, 1), p)  # an unseen history: what the shorter one says
        return np.log(p)


def ngrams(ids: Int[np.ndarray, "n"], order: int) -> Int[np.ndarray, "m order"]:
    """All runs of `order` tokens."""
    return np.lib.stride_tricks.sliding_window_view(ids, order).astype(np.int64)


def _keys(grams: Int[np.ndarray, "n k"], vocab: int) -> Int[np.ndarray, "n"]:
    """Each row as one number: k digits to the base `vocab`."""
    return grams @ vocab ** np.arange(grams.shape[1])[::-1]


def _level(grams: Int[np.ndarray, "g"], counts: Int[np.ndarray, "g"], vocab: int) -> _Level:
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    i = np.arange(1, 4)
    found = i - (i + 1) * n[1:] / n[:3] * n[0] / (n[0] + 2 * n[1]) if n.all() else np.full(3, 0.5)
    taken = np.clip(found, 0.1, i)[np.minimum(counts, 3) - 1]
    histories, starts = np.unique(grams // vocab, return_index=True)
    return _Level(grams, counts - taken, histories, *(np.add.reduceat(values, starts) for values in (counts.astype(float), taken)))


def _find(keys: Int[np.ndarray, "g"], values: Float[np.ndarray, "g"], wanted: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The value of each wanted key, 0 for one that is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
