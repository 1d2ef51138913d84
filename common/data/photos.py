"""Real photographs and textures out of the scikit-image and scikit-learn packages. Nothing of them is stored in this repository."""

from functools import cache

import numpy as np
import skimage.data
from jaxtyping import UInt8
from PIL import Image

from common.results import content_hash

# author and licence, as the packages state them: to be named where a picture is shown
ATTRIBUTION = {
    "astronaut": "NASA (flic.kr/p/r9qvLn), public domain",
    "cat": "Stefan van der Walt, CC0",
    "coffee": "Rachel Michetti, CC0",
    "rocket": "SpaceX (flickr.com/photos/spacexphotos/16511594820), public domain",
    "hubble_deep_field": "NASA (hubblesite.org, release 2012/37), public domain",
    "retina": "Mikael Häggström (commons.wikimedia.org, Fundus photograph of normal left eye), CC0",
    "china": "danielbuechele (flickr.com/photos/danielbuechele/6061409035), CC BY 2.0",
    "flower": "vultilion (flickr.com/photos/vultilion/6056698931), CC BY 2.0",
    "brick": "CC0Textures (Bricks25), CC0",
    "grass": "linolafett (deviantart.com, Grass 01), CC0",
    "gravel": "CC0Textures (Gravel04), CC0",
}
PHOTOS = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina", "china", "flower")
TEXTURES = ("brick", "grass", "gravel")


@cache
def photos() -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Eight colour photographs of various sizes."""
    from sklearn.datasets import load_sample_images  # a second of imports that only this function needs

    found = {name: getattr(skimage.data, name)() for name in PHOTOS[:6]}
    return found | dict(zip(PHOTOS[6:], load_sample_images().images, strict=True))


@cache
def textures() -> dict[str, UInt8[np.ndarray, "512 512"]]:
    """Three grey texture photographs."""
    return {name: getattr(skimage.data, name)() for name in TEXTURES}


def crops(n: int, seed: int, size: int, start: int = 0, names: tuple[str, ...] = PHOTOS) -> UInt8[np.ndarray, "n 3 size size"]:
    """Crops start..start+n-1, each a function of (seed, its index): a random square of one of the photographs `names`, half of them
    mirrored. Its side is log-uniform between `size` and the photograph's shorter side, and is shrunk to `size`.

    Crops of one photograph overlap: train and test on different `names`.
    """
    return np.stack([_crop(np.random.default_rng((seed, i)), size, names) for i in range(start, start + n)])


def _crop(rng: np.random.Generator, size: int, names: tuple[str, ...]) -> UInt8[np.ndarray, "3 size size"]:
    image = Image.fromarray(photos()[names[rng.integers(len(names))]])
    side = round(np.exp(rng.uniform(np.log(size), np.log(min(image.size)))))
    left, top = rng.integers(0, np.array(image.size) - side + 1)
    crop = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop.transpose(2, 0, 1)


def hashes() -> dict[str, str]:
    return {name: content_hash(image) for name, image in (photos() | textures()).items()}
