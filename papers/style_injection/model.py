"""Style injection in diffusion, StyleID (Chung et al. 2023, arXiv 2312.09008).

Content c and style s go to noise by DDIM inversion, without text; at every step t the injected layers' Q_t^c, K_t^s, V_t^s are kept.

    z_T^cs = σ(z_T^s) (z_T^c - μ(z_T^c)) / σ(z_T^c) + μ(z_T^s)     initial latent AdaIN; μ, σ of each channel over the map        b l h w
    Q̃_t = γ Q_t^c + (1-γ) Q_t^cs                                   query preservation, γ = 0.75; Q_t^cs is the running query      b h n d
    O_t = softmax(τ Q̃_t K_t^sᵀ / √d) V_t^s                         injection with temperature τ = 1.5, in place of plain attention  b h n d
    z_0^cs = DDIM from z_T^cs without text, O_t in the self-attentions of the decoder that are nearest to the image (6 of 9)

Nothing is trained. How the result is measured:

    ArtFID = (1 + LPIPS) (1 + FID)                                 to the content image; to the set of style images
    CFSD = Σ S^c (log S^c - log S^cs),  S = softmax(F Fᵀ / C²)     self-similarity of a network's features F                      n n
    H(u, v, j) ∝ Σ_x |I(x)| k(u - u_j(x)) k(v - v_j(x)),  k(r) = 1 / (1 + (r/0.02)²)     colour histogram of an image I           64 64 3
    histogram loss = ‖√H^s - √H^cs‖ / √2                           u_R, v_R = log R/G, log R/B, and so on round
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common import diffusion
from common.attention import Attention, Site, controlled
from common.backbones.clip import CLIPText, CLIPTextConfig
from common.backbones.sd_unet import UNet2DConditionModel, UNetConfig
from common.backbones.sd_vae import AutoencoderConfig, AutoencoderKL
from common.diffusion import Guided, Schedule, guided
from common.errors import UserError
from common.loop import load_named, read_safetensors, read_torch
from common.prompts import Tokenizer
from common.stable_diffusion import StableDiffusion

Features = dict[tuple[str, int], dict[str, Float[Tensor, "b h n d"]]]  # of a layer's name and a step's number: its "q", "k", "v"

# ---- the method -----------------------------------------------------------------------------------------------------------------------


def adain(content: Float[Tensor, "b l h w"], style: Float[Tensor, "b l h w"]) -> Float[Tensor, "b l h w"]:
    """The content with the style's mean and (unbiased) deviation in every channel."""
    (mean_c, mean_s), (std_c, std_s) = ([stat(z, (2, 3), keepdim=True) for z in (content, style)] for stat in (torch.mean, torch.std))
    return std_s * (content - mean_c) / std_c + mean_s


class Record:
    """A control that keeps what each call projects, or of "qkv" only the parts named."""

    def __init__(self, parts: str = "qkv"):
        self.parts = parts
        self.features: Features = {}

    def qkv(self, site: Site, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]) -> None:
        self.features[site.name, site.step] = {part: x for part, x in zip("qkv", (q, k, v), strict=True) if part in self.parts}


class Inject:
    """A control that makes plain attention O_t. pairs: of each sample in the batch, which of the recorded contents and styles it has."""

    def __init__(self, content: Features, style: Features, pairs: Int[Tensor, "b two"], gamma: float = 0.75, tau: float = 1.5):
        self.content, self.style, self.gamma, self.tau = content, style, gamma, tau
        self.contents, self.styles = pairs.unbind(1)

    def qkv(self, site: Site, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]) -> tuple[Tensor, Tensor, Tensor]:
        content, style = self.content[site.name, site.step], self.style[site.name, site.step]
        q = self.gamma * content["q"][self.contents] + (1 - self.gamma) * q
        return self.tau * q, style["k"][self.styles], style["v"][self.styles]


@dataclass(frozen=True)
class Inversion:
    """Where images come from: z_T, and what the injected layers projected on the way there."""

    z: Float[Tensor, "b l h w"]
    features: Features


@dataclass(frozen=True)
class Setting:
    """The parts of the method."""

    gamma: float = 0.75
    tau: float = 1.5
    inject: bool = True
    adain: bool = True


class StyleID:
    """The method on one U-Net.

    empty: the U-Net's keyword arguments for one empty prompt. layers: names of the attentions to inject. Steps of one number have the same
    timestep in inversion and sampling, so a sampling step finds the features of its own timestep. at: the convention of
    `diffusion.invert`. skip: sampling steps to leave out at the start.
    """

    def __init__(
        self,
        unet: nn.Module,
        empty: dict[str, Tensor],
        schedule: Schedule,
        layers: Sequence[str],
        *,
        steps: int = 50,
        at: Literal["current", "next"] = "next",
        skip: int = 0,
    ):
        self.unet, self.empty, self.schedule, self.layers, self.steps, self.at, self.skip = unet, empty, schedule, layers, steps, at, skip

    @classmethod
    @torch.no_grad()
    def of(cls, model: StableDiffusion, layers: int | None = None, *, steps: int = 50, original: bool = False) -> "StyleID":
        """layers: how many of the decoder's self-attentions to inject, from the last; default two in three, as 6 of 9 in Stable Diffusion 1
        and 2. original: as the authors' first code, which inverts with ε(z_t, t) up to the last level and leaves out the first sampling
        step, so that z_T counts as less noisy than it is; else as their diffusers code. Raises UserError if there are not so many layers.
        """
        names = decoder_layers(model.unet)
        count = round(2 * len(names) / 3) if layers is None else layers
        if not 1 <= count <= len(names):
            raise UserError(f"--layers {count}: this model's decoder has {len(names)} self-attentions, give 1 to {len(names)}")
        conventions = {"at": "current", "skip": 1} if original else {}
        return cls(model.unet, model.unconditional(1), model.schedule, names[-count:], steps=steps, **conventions)

    def denoiser(self, n: int) -> Guided:
        """ε(z, t) without text for n samples."""
        return guided(self.unet, {name: value.expand(n, *value.shape[1:]) for name, value in self.empty.items()})

    def injected(self, site: Site) -> bool:
        """Whether the method acts at a site."""
        return site.name in self.layers

    @torch.no_grad()
    def invert(self, z0: Float[Tensor, "b l h w"], parts: str = "qkv") -> Inversion:
        """parts: what of "qkv" to keep. A content's "q" and a style's "kv" suffice."""
        with controlled(self.unet, Record(parts), self.injected) as record:
            z = diffusion.invert(self.denoiser(len(z0)), z0, self.schedule, self.steps, at=self.at)
        return Inversion(z, record.features)

    @torch.no_grad()
    def stylise(
        self, content: Inversion, style: Inversion, pairs: Int[Tensor, "b two"] | None = None, setting: Setting | None = None
    ) -> Float[Tensor, "b l h w"]:
        """z_0^cs of pairs (content, style), by default of the first of each. Raises ValueError for a number that is not there."""
        pairs = torch.zeros(1, 2, dtype=torch.long) if pairs is None else pairs
        setting = setting or Setting()
        if pairs.min() < 0 or (pairs.amax(0) >= torch.tensor([len(content.z), len(style.z)])).any():
            raise ValueError(f"pairs must name contents below {len(content.z)} and styles below {len(style.z)}")
        pairs = pairs.to(content.z.device)
        z = content.z[pairs[:, 0]]
        if setting.adain:
            z = adain(z, style.z[pairs[:, 1]])
        control = Inject(content.features, style.features, pairs, setting.gamma, setting.tau)
        with controlled(self.unet, control, self.injected) if setting.inject else nullcontext():
            return diffusion.sample(self.denoiser(len(z)), z, self.schedule, self.steps, start=self.skip)


def decoder_layers(unet: nn.Module) -> tuple[str, ...]:
    """Names of the self-attentions on the way up, from the coarsest map to the finest."""
    return tuple(name for name, layer in unet.named_modules() if isinstance(layer, Attention) and layer.kind == "self" and name.startswith("up_"))


# ---- measures -------------------------------------------------------------------------------------------------------------------------


def art_fid(lpips: float, fid: float) -> float:
    """Content and style taken together; lower is better."""
    return (1 + lpips) * (1 + fid)


def cfsd(content: Float[Tensor, "b c h w"], output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Divergence of the self-similarities of two images' features; the paper takes VGG-19's after conv3_1."""
    log_s, log_o = (self_similarity(features) for features in (content, output))
    return (log_s.exp() * (log_s - log_o)).sum((1, 2))


def self_similarity(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n n"]:
    """log S."""
    f = features.flatten(2).mT / features.shape[1]
    return (f @ f.mT).log_softmax(-1)


def colour_histogram(images: Float[Tensor, "b 3 H W"], bins: int = 64, eps: float = 1e-6) -> Float[Tensor, "b 3 u v"]:
    """H of images in [0, 1], u and v in [-3, 3]; all entries sum to 1 (HistoGAN, Afifi et al. 2021). Up to 256 pixels a side are meant."""
    x = images.flatten(2)
    centres = torch.linspace(-3, 3, bins, dtype=x.dtype, device=x.device)
    kernel = lambda ratio: 1 / (1 + ((ratio[..., None] - centres) / 0.02).square())  # b n bins
    brightness, log = (x.square().sum(1) + eps).sqrt(), (x + eps).log()
    planes = []
    for j, (first, second) in enumerate(((1, 2), (0, 2), (0, 1))):  # R/G, R/B;  G/R, G/B;  B/R, B/G
        u, v = kernel(log[:, j] - log[:, first]), kernel(log[:, j] - log[:, second])
        planes.append((brightness[..., None] * u).mT @ v)
    h = torch.stack(planes, 1)
    return h / h.sum((1, 2, 3), keepdim=True)


def histogram_loss(a: Float[Tensor, "b 3 u v"], b: Float[Tensor, "b 3 u v"]) -> Float[Tensor, "b"]:
    """Hellinger distance of colour histograms, in [0, 1]."""
    return (a.sqrt() - b.sqrt()).square().sum((1, 2, 3)).sqrt() / 2**0.5


# ---- the original file of Stable Diffusion 1 --------------------------------------------------------------------------------------------

SD1_TEXT = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)


def from_original(
    path: Path, unet: UNetConfig = UNetConfig(), vae: AutoencoderConfig = AutoencoderConfig(), text: CLIPTextConfig = SD1_TEXT
) -> StableDiffusion:
    """Stable Diffusion 1 from the one file of its first release, sd-v1-4.ckpt or the same as .safetensors. Raises UserError."""
    state = _read(path)
    parts = {
        UNet2DConditionModel(unet): UNet2DConditionModel.rename,
        AutoencoderKL(vae): AutoencoderKL.rename,
        CLIPText(text): lambda name: CLIPText.rename(name.removeprefix("cond_stage_model.transformer.")),
    }
    for part, rename in parts.items():
        weights = {rename(name): tensor for name, tensor in state.items()}
        weights.pop(None, None)
        shapes = {name: tensor.shape for name, tensor in part.state_dict().items()}
        # the autoencoder's attention is written there as 1x1 convolutions
        weights = {name: t.flatten(1) if t.shape[2:] == (1, 1) and len(shapes.get(name, ())) == 2 else t for name, t in weights.items()}
        load_named(part, weights, path)
    unet, vae, text = parts
    return StableDiffusion(unet, [text], [Tokenizer.whole(text.config.max_position_embeddings)], vae, Schedule()).eval()


class _TrainersCallback:
    """What sd-v1-4.ckpt holds besides tensors; it is read and thrown away."""


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    known = (_TrainersCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    with torch.serialization.safe_globals([known]):
        whole = read_torch(path)
    try:
        return whole["state_dict"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the original file of Stable Diffusion 1 ({error}): fetch sd-v1-4.ckpt again") from None
