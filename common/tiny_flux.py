"""Prompts, sampling and a simple score for the small Flux, whose latents are the pixels of 32 x 32 scenes in [-1, 1].

Its text encoder is fixed: a word is a vector drawn from its letters, the state of word i adds a vector drawn for its position, and the
pooled vector is the words' mean.

    c_i = w(word_i) + u_i,   w ~ N(0, 1),  u ~ N(0, 1/4)           i < 18, zero behind the last word
    p = mean_i w(word_i)
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from common.backbones.flux import FluxTransformer2DModel, image_ids, pack, unpack
from common.data.scenes import BACKGROUNDS, COLOURS, Scene
from common.diffusion import flow_sample, flow_sigmas, guided

PATCH = 4  # pixels a side of what a token packs
WORDS = 18  # the longest caption of common.data.scenes
WIDTH = 64


# ---- text -----------------------------------------------------------------------------------------------------------------------------


def words(caption: str) -> list[str]:
    """Punctuation apart; "" is the null prompt of classifier-free guidance, of the one word <null>."""
    return caption.replace(",", " ").split() or ["<null>"]


@lru_cache(maxsize=4096)
def _vector(name: str) -> Float[np.ndarray, "width"]:
    return np.random.default_rng(list(name.encode())).standard_normal(WIDTH, dtype=np.float32)


def encode(captions: list[str]) -> dict[str, Tensor]:
    """The text inputs of `OnPixels`: states (n, 18, 64) and pooled (n, 64). ValueError for more than 18 words."""
    states, pooled = np.zeros((len(captions), WORDS, WIDTH), np.float32), np.zeros((len(captions), WIDTH), np.float32)
    for i, caption in enumerate(captions):
        listed = words(caption)
        if len(listed) > WORDS:
            raise ValueError(f"{caption!r} has {len(listed)} words: the small Flux reads {WORDS}")
        vectors = np.stack([_vector(word) for word in listed])
        states[i, : len(listed)] = vectors + 0.5 * np.stack([_vector(f"position {k}") for k in range(len(listed))])
        pooled[i] = vectors.mean(0)
    return {"states": torch.from_numpy(states), "pooled": torch.from_numpy(pooled)}


# ---- images ---------------------------------------------------------------------------------------------------------------------------


class OnPixels(nn.Module):
    """The velocity of whole images, for the samplers; t in [0, 1]."""

    def __init__(self, model: FluxTransformer2DModel):
        super().__init__()
        self.model = model

    def forward(
        self, z: Float[Tensor, "b 3 h w"], t: Float[Tensor, "b"], states: Float[Tensor, "b m joint"], pooled: Float[Tensor, "b p"]
    ) -> Float[Tensor, "b 3 h w"]:
        grid = (z.shape[2] // PATCH, z.shape[3] // PATCH)
        text_ids = torch.zeros(states.shape[1], 3, device=z.device)
        return unpack(self.model(pack(z, PATCH), states, pooled, t, image_ids(grid, device=z.device), text_ids), grid, PATCH)


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel, captions: list[str], noise: Float[Tensor, "n 3 h w"], steps: int = 12, guidance: float = 3.0
) -> Float[Tensor, "n 3 h w"]:
    """Images in [-1, 1] from noise, by Euler steps."""
    told, null = ({name: t.to(noise) for name, t in encode(texts).items()} for texts in (captions, [""] * len(captions)))
    velocity, sigmas = guided(OnPixels(model), told, null if guidance != 1 else None, guidance), flow_sigmas(steps)
    return flow_sample(velocity, noise, sigmas, timesteps=sigmas).clamp(-1, 1)


# ---- a score that needs no network ----------------------------------------------------------------------------------------------------


def colours_seen(images: UInt8[Tensor, "n 3 h w"], scenes: list[Scene]) -> list[tuple[str, ...]]:
    """For each image the colour at the place of each of the scene's things, and the background's.

    A thing's: the most frequent of COLOURS in a window of a third of the image, pixels going to the nearest of all colours; the
    background's: the nearest of BACKGROUNDS to the corners' median.
    """
    palette, grounds = (torch.tensor(list(table.values())) for table in (COLOURS | BACKGROUNDS, BACKGROUNDS))
    pixels = images.permute(0, 2, 3, 1) / 255
    nearest = torch.cdist(pixels.flatten(1, 2), palette).argmin(-1).unflatten(1, pixels.shape[1:3])
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].median(1).values
    ground = torch.cdist(corners, grounds).argmin(-1)
    half = images.shape[-1] // 6
    found = []
    for i, scene in enumerate(scenes):
        seen = []
        for thing in scene.things:
            y, x = (int(share * images.shape[-1]) for share in (thing.y, thing.x))
            window = nearest[i, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
            seen.append(list(COLOURS)[window.flatten().bincount(minlength=len(palette))[: len(COLOURS)].argmax()])
        found.append((*seen, list(BACKGROUNDS)[ground[i]]))
    return found


def colour_accuracy(images: UInt8[Tensor, "n 3 h w"], scenes: list[Scene]) -> dict[str, float]:
    """The share of things, and of backgrounds, whose colour is the scene's."""
    things, grounds = [], []
    for seen, scene in zip(colours_seen(images, scenes), scenes, strict=True):
        things += [colour == thing.colour for colour, thing in zip(seen[:-1], scene.things, strict=True)]
        grounds.append(seen[-1] == scene.background)
    return {"colour at its place": float(np.mean(things)), "background at the corners": float(np.mean(grounds))}
