"""Stable Diffusion, put together (Rombach et al. 2022; XL: Podell et al. 2023): prompts, U-Net, sampler and codec.

    c = T(prompt)                                                text tower after its last norm                          b m e
        XL: [T₁(prompt)₋₂, T₂(prompt)₋₂], with the pooled T₂ and six sizes beside it
    z = E(2x - 1),   x = (D(z) + 1) / 2                          images x in [0, 1], latents z                            b l h w
    e = ε(z, t, c_∅) + w (ε(z, t, c) - ε(z, t, c_∅))             guidance; c_∅ is the empty prompt, in XL zeros

A published directory has a folder for each part. The small model that ships has the same layout with a codec in place of the vae: a
linear one, so that white noise in z is white noise in x.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common import diffusion
from common.backbones import pretrained
from common.backbones.clip import CLIPText, CLIPTextWithProjection
from common.backbones.sd_unet import UNet2DConditionModel
from common.backbones.sd_vae import AutoencoderKL
from common.diffusion import After, Guided, Schedule, guided
from common.errors import UserError
from common.patch_codec import PatchCodec
from common.prompts import Tokenizer

CODECS = {"vae": AutoencoderKL, "codec": PatchCodec}  # by folder


class StableDiffusion(nn.Module):
    """One model of the family: `sample` draws prompts, `invert` finds the noise of images, `denoiser` is for everything in between.

    text_encoders, tokenizers: one of each, or the two of XL. codec: AutoencoderKL or PatchCodec.
    """

    def __init__(
        self, unet: UNet2DConditionModel, text_encoders: Sequence[CLIPText], tokenizers: Sequence[Tokenizer], codec: nn.Module, schedule: Schedule
    ):
        super().__init__()
        self.unet, self.text_encoders, self.codec = unet, nn.ModuleList(text_encoders), codec
        self.tokenizers, self.schedule = tokenizers, schedule

    # ---- conditions -------------------------------------------------------------------------------------------------------------------

    def condition(self, prompts: list[str]) -> dict[str, Tensor]:
        """The keyword arguments of the U-Net that stand for the prompts. Raises UserError for words that the model does not know."""
        ids = [tokenizer(prompts).to(self.unet.conv_in.weight.device) for tokenizer in self.tokenizers]
        if len(ids) == 1:
            return {"encoder_hidden_states": self.text_encoders[0].text_model.last(ids[0])}
        states = [encoder(tokens, state=-2) for encoder, tokens in zip(self.text_encoders, ids, strict=True)]
        side = self.unet.config.sample_size * self.factor
        return {
            "encoder_hidden_states": torch.cat(states, -1),
            "text_embeds": self.text_encoders[1].feature(ids[1]),
            "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), dtype=states[0].dtype, device=states[0].device),
        }

    def unconditional(self, n: int) -> dict[str, Tensor]:
        """c_∅ for n images."""
        empty = self.condition([""] * n)
        if len(self.text_encoders) == 2:
            empty |= {name: torch.zeros_like(empty[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return empty

    def denoiser(self, prompts: list[str], guidance: float = 1.0) -> Guided:
        """e as a model(z, t) for the samplers of common.diffusion."""
        null = None if guidance == 1 else self.unconditional(len(prompts))
        return guided(self.unet, self.condition(prompts), null, guidance)

    # ---- images -----------------------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels of an image along one of a latent."""
        c = self.codec.config
        return c.patch if isinstance(self.codec, PatchCodec) else 2 ** (len(c.block_out_channels) - 1)

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b l h w"]:
        """z of images in [0, 1]."""
        return self.codec.encode(2 * images - 1)

    def decode(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b 3 H W"]:
        """x, which may leave [0, 1] a little."""
        return (self.codec.decode(z) + 1) / 2

    def noise(self, n: int, seed: int) -> Float[Tensor, "n l h w"]:
        """Drawn on the CPU, so that a seed gives the same on every device."""
        c, like = self.unet.config, self.unet.conv_in.weight
        drawn = torch.randn(n, c.out_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(seed))
        return drawn.to(like.device, like.dtype)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        *,
        steps: int = 50,
        guidance: float = 5.0,
        seed: int = 0,
        noise: Float[Tensor, "b l h w"] | None = None,
        after: After | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Images in [0, 1] by DDIM, from `noise` or that of the seed. after: see common.diffusion."""
        z = self.noise(len(prompts), seed) if noise is None else noise
        return self.decode(diffusion.sample(self.denoiser(prompts, guidance), z, self.schedule, steps, after=after)).clamp(0, 1)

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "b 3 H W"], prompts: list[str], *, steps: int = 50, guidance: float = 1.0, after: After | None = None
    ) -> Float[Tensor, "b l h w"]:
        """The noise from which `sample` with the same prompts, steps and guidance comes back to about the images."""
        return diffusion.invert(self.denoiser(prompts, guidance), self.encode(images), self.schedule, steps, after=after)

    # ---- files ------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path = "tiny", *, dtype: torch.dtype | None = None) -> Self:
        """source: a directory, a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5", or "tiny" for the small one that ships, in
        float32. Raises UserError."""
        if source == "tiny":
            source, dtype = pretrained.CHECKPOINTS / "tiny-sd", dtype or torch.float32
        directory = Path(source) if Path(source).is_dir() else _download(str(source))
        schedule = directory / "scheduler" / "scheduler_config.json"
        if not schedule.is_file():
            raise UserError(f"{source} has no scheduler/scheduler_config.json: give the directory of a whole published model")
        towers = {"text_encoder": CLIPText} | ({"text_encoder_2": CLIPTextWithProjection} if (directory / "text_encoder_2").is_dir() else {})
        encoders = [tower.from_pretrained(f"{source}/{part}", dtype=dtype) for part, tower in towers.items()]
        tokenizers = [
            Tokenizer.from_pretrained(directory / part.replace("text_encoder", "tokenizer"), encoder.config.max_position_embeddings)
            for part, encoder in zip(towers, encoders, strict=True)
        ]
        unet = UNet2DConditionModel.from_pretrained(f"{source}/unet", dtype=dtype)
        part = next((part for part in CODECS if (directory / part).is_dir()), None)
        if part is None:
            raise UserError(f"{source} has no vae, which decodes its latents: fetch the whole model")
        codec = CODECS[part].from_pretrained(f"{source}/{part}", dtype=dtype)
        whole = cls(unet, encoders, tokenizers, codec, Schedule.from_config(json.loads(schedule.read_text())))
        return whole.to(memory_format=torch.channels_last).eval()  # convolutions in half the time on a CPU

    def save_pretrained(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory that from_pretrained reads."""
        self.unet.save_pretrained(directory / "unet", dtype)
        for number, encoder, tokenizer in zip(("", "_2"), self.text_encoders, self.tokenizers, strict=False):
            encoder.save_pretrained(directory / f"text_encoder{number}", dtype)
            tokenizer.save_pretrained(directory / f"tokenizer{number}")
        self.codec.save_pretrained(directory / ("codec" if isinstance(self.codec, PatchCodec) else "vae"), dtype)
        (directory / "scheduler").mkdir(exist_ok=True)
        (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(asdict(self.schedule), indent=1) + "\n")


def _download(name: str) -> Path:
    """The configurations of a hub id; its weights are fetched part by part."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except Exception as error:  # one of a dozen, of the hub, of the connection, or of the name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is no directory here and cannot be had from the hub ({reason}): download it and give its directory") from None
