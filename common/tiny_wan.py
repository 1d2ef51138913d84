"""Prompts and sampling for the small Wan, whose latents are those of a PatchCodec.

Its text encoder is the one-hot code of a caption's five words: with that as input, the first layer of the model's own prompt embedding is
a table of word vectors.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from common.backbones.wan import WanTransformer3DModel
from common.data.videos import VOCABULARY, tokenize
from common.diffusion import flow_sample, flow_sigmas, guided
from common.patch_codec import PatchCodec

FRAMES, SIZE = 8, 32  # of the clips it has learnt; it takes others
WORDS = 5  # in a caption


def prompt_states(captions: list[str]) -> Float[Tensor, "n words vocabulary"]:
    """Captions as in common.data.videos; "" is the null prompt of classifier-free guidance."""
    null = " ".join(["<null>"] * WORDS)
    return F.one_hot(tokenize([text or null for text in captions]), len(VOCABULARY)).float()


@torch.no_grad()
def sample(
    model: WanTransformer3DModel,
    codec: PatchCodec,
    captions: list[str],
    noise: Float[Tensor, "n l t h w"],
    steps: int = 20,
    guidance: float = 3.0,
    shift: float = 3.0,
) -> Float[Tensor, "n 3 frames H W"]:
    """Clips in [-1, 1] from noise, by Euler steps."""
    condition, null = ({"encoder_hidden_states": prompt_states(texts).to(noise)} for texts in (captions, [""] * len(captions)))
    velocity = guided(model, condition, null if guidance != 1 else None, guidance)
    return codec.decode(flow_sample(velocity, noise, flow_sigmas(steps, shift))).clamp(-1, 1)
