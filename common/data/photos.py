"""Real photographs and textures out of the scikit-image and scikit-learn packages. Nothing of them is stored in this repository."""

from functools import cache

import numpy as np
import skimage.data
from jaxtyping import UInt8
from sklearn.datasets import load_sample_images

from common.results import content_hash

# to be named where a picture is shown
ATTRIBUTION = {
    "astronaut": "NASA, public domain",
    "cat": "Stefan van der Walt, CC0",
    "coffee": "Rachel Michetti, CC0",
    "rocket": "SpaceX, public domain",
    "hubble_deep_field": "NASA, public domain",
    "retina": "CC0",
    "china": "danielbuechele, CC BY 2.0",
    "flower": "vultilion, CC BY 2.0",
    "brick": "CC0",
    "grass": "CC0",
    "gravel": "CC0",
}


@cache
def photos() -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Eight colour photographs."""
    found = {name: getattr(skimage.data, name)() for name in ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina")}
    return found | dict(zip(("china", "flower"), load_sample_images().images, strict=True))


@cache
def textures() -> dict[str, UInt8[np.ndarray, "512 512"]]:
    """Three grey texture photographs."""
    return {name: getattr(skimage.data, name)() for name in ("brick", "grass", "gravel")}


def hashes() -> dict[str, str]:
    return {name: content_hash(image) for name, image in (photos() | textures()).items()}
