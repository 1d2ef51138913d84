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


def hashes() -> dict[str, str]:
    d = digits()
    return {"digits": content_hash(d.train_images, d.train_labels, d.test_images, d.test_labels)}
