"""The 1797 handwritten digits of scikit-learn (8x8 pixels, from the UCI repository), in one fixed split."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from common.results import content_hash

TRAIN = 1200


@dataclass(frozen=True)
class Split:
    """Images in [0, 1] with their labels."""

    train_images: Float[Tensor, "1200 1 8 8"]
    train_labels: Int[Tensor, "1200"]
    test_images: Float[Tensor, "597 1 8 8"]
    test_labels: Int[Tensor, "597"]


@cache
def digits() -> Split:
    """1200 images to learn from and 597 to test on, every class in the same proportion."""
    source = load_digits()
    rng = np.random.default_rng(0)
    place = np.empty(len(source.target))  # of an image within its class, from 0 to 1: cutting there keeps the proportions
    for label in range(10):
        members = np.flatnonzero(source.target == label)
        place[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(place, kind="stable")
    images = torch.from_numpy(source.images[order]).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(source.target[order]).long()
    return Split(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


def augmented(images: Float[Tensor, "m 1 h w"], labels: Int[Tensor, "m"], n: int, seed: int) -> tuple[Float[Tensor, "n 1 h w"], Int[Tensor, "n"]]:
    """n jittered copies, copy i of image i mod m: moved by up to a pixel either way, 70-110% bright, with noise of 0.08.

    Copy i does not depend on n.
    """
    draw = np.random.default_rng((seed, 0)).random((n, 3))
    noise = np.random.default_rng((seed, 1)).standard_normal((n, *images.shape[1:]), dtype=np.float32)
    source = torch.arange(n) % len(images)
    dy, dx = (torch.from_numpy(draw[:, i] * 3).long() for i in range(2))
    h, w = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns = dy[:, None, None] + torch.arange(h)[:, None], dx[:, None, None] + torch.arange(w)
    moved = padded[source[:, None, None], 0, rows, columns].unsqueeze(1)
    gain = torch.from_numpy(0.7 + 0.4 * draw[:, 2]).float()[:, None, None, None]
    return (gain * moved + 0.08 * torch.from_numpy(noise)).clamp(0, 1), labels[source]


def hashes() -> dict[str, str]:
    d = digits()
    return {"digits": content_hash(d.train_images, d.train_labels, d.test_images, d.test_labels)}
