"""A small Stable Diffusion: a U-Net trained with captioned scenes in the latents of PatchCodec, under a text tower that stays as it is.

    loss = mean of |v - v_θ(z_t, t, T(caption))|²,   v = √ā ε - √(1-ā) z₀          t uniform

One caption in ten is empty, for guidance. The residual branches start at zero, as in the original U-Net. v, as in Stable Diffusion 2,
learns the captions far sooner than ε: at high noise, where they matter most, ε is nearly known from z_t. And a schedule that ends in pure
noise, for 64 like-coloured patches show the background through the last level of the usual one. The text tower is tiny-clip's and frozen, as
Stable Diffusion's is CLIP's: trained along at the U-Net's rate it forgot colours sooner than it learnt to tell them.
"""

import textwrap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.backbones.clip import CLIP, CLIPText
from common.backbones.sd_unet import ResnetBlock2D, Transformer2DModel, UNet2DConditionModel, UNetConfig
from common.config import RunConfig
from common.data import Batches, scenes
from common.diffusion import Schedule
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import fit
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.prompts import Tokenizer
from common.reader import Reader, accuracy, read, truth
from common.results import content_hash
from common.stable_diffusion import StableDiffusion


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 6500
    batch: int = 16
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float | None = 1.0
    ema: float | None = 0.995
    images: int = 24_000  # training renders


SCALES = {
    "smoke": Config(steps=3, batch=4, images=16),
    "small": Config(),
}
COMPONENTS = {"": StableDiffusion}
TRAIN, TEST = 200, 201  # seeds of the scenes

GRAMMAR = "a an at the of and on background photo style , above below striped dotted"
SPARE = "sks pll"  # for what no caption names
WORDS = (*f"{GRAMMAR} {SPARE}".split(), *scenes.SHAPES, *scenes.COLOURS, *scenes.PLACES, *scenes.BACKGROUNDS, *scenes.STYLES)


# ---- training -------------------------------------------------------------------------------------------------------------------------


def build() -> StableDiffusion:
    """The smallest model with all that the published ones have: two levels with attention. Its text tower is tiny-clip's, as theirs is CLIP's."""
    clip = CLIP.from_pretrained("tiny")
    text = CLIPText(clip.config.text_config)
    text.load_state_dict({name: clip.state_dict()[name] for name in text.state_dict()})
    tokenizer = Tokenizer.compact(WORDS, text.config.max_position_embeddings)
    codec = PatchCodecConfig()
    unet = UNetConfig(
        sample_size=8, in_channels=codec.latent_channels, out_channels=codec.latent_channels, block_out_channels=(64, 64),
        layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text.config.hidden_size, norm_num_groups=8,
    )  # fmt: skip
    schedule = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return StableDiffusion(UNet2DConditionModel(unet), [text], [tokenizer], PatchCodec(codec), schedule)


def initialise(unet: UNet2DConditionModel) -> None:
    """Kernels of variance 1/fan-in; biases and the last layer of every residual branch, and of the whole, at zero."""
    for module in init_by_fan_in(unet).modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)


def scene_pool(n: int, seed: int) -> scenes.Captioned:
    """More single things and more whole captions than by default, for a model this small to learn from in minutes."""
    return scenes.captioned(n, seed, styled=0.3, under_specified=0.2, single=0.5)


def train(cfg: Config) -> dict[str, nn.Module]:
    seed_everything(cfg.seeds[0])
    model = build()
    initialise(model.unet)
    model.text_encoders.requires_grad_(False)
    made, tokenizer = scene_pool(cfg.images, TRAIN), model.tokenizers[0]
    model.codec.fit(made.images[:3000] / 127.5 - 1)
    batches = Batches(TensorDataset(made.images, tokenizer(made.captions)), cfg.batch, cfg.seeds[0])
    return {"": fit(model.to(memory_format=torch.channels_last), loss, batches, cfg, "model")}


def loss(model: StableDiffusion, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, ids = batch
    dropped = torch.rand(len(ids), 1, device=ids.device) < 0.1
    ids = torch.where(dropped, model.tokenizers[0]([""]).to(ids.device), ids)
    z = model.encode(images / 255)
    t = torch.randint(model.schedule.num_train_timesteps, (len(z),), device=z.device)
    noise = torch.randn_like(z)
    predicted = model.unet(model.schedule.add_noise(z, noise, t), t, model.text_encoders[0].text_model.last(ids))
    return F.mse_loss(predicted, model.schedule.target(z, noise, t))


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    """What the reader finds of the captions in samples; its ceiling are renders of the same scenes, its floor samples of the empty prompt.
    And the PSNR in dB of renders that went to noise and back; its floor are samples of their captions, its ceiling is infinite."""
    model, reader = models[""], Reader.from_pretrained("tiny")
    made = scene_pool(128, TEST)
    asked, captions, real = truth(made.scenes), [scenes.full_caption(scene) for scene in made.scenes], made.images / 255
    drawn = model.sample(captions, steps=20, seed=TEST)
    kinds = {"": drawn, ", ceiling": real, ", floor": model.sample([""] * 64, steps=20, guidance=1, seed=TEST)}
    found = {factor + kind: value for kind, images in kinds.items() for factor, value in accuracy(read(reader, images), asked[: len(images)]).items()}
    back = model.sample(captions[:16], guidance=1, noise=model.invert(real[:16], captions[:16]))
    return found | {"inversion": psnr(back, real[:16]), "inversion, floor": psnr(drawn[:16], real[:16])}


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pairs of images in [0, 1], in dB."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10().mean().item()


def data(cfg: Config) -> dict[str, str]:
    made = scene_pool(cfg.images, TRAIN)
    return {"scenes": content_hash(made.images, *(caption.encode() for caption in made.captions))}


def sheet(models: dict[str, nn.Module]) -> Figure:
    """Samples of held-out captions, one caption in every style, and renders before and after inversion."""
    model, made = models[""], scene_pool(24, TEST)
    captions = [scenes.full_caption(scene) for scene in made.scenes[:16]]
    pair = "a red circle left of a dotted blue square on a white background"
    styled = [pair, *(f"{pair}, {style} style" for style in scenes.STYLES), "a ring", "a circle above a square", ""]
    real, told = made.images[16:] / 255, [scenes.full_caption(scene) for scene in made.scenes[16:]]
    back = model.sample(told, guidance=1, noise=model.invert(real, told))
    rows = [*zip(model.sample(captions, seed=TEST), captions, strict=True), *zip(model.sample(styled, seed=TEST), styled, strict=True)]
    rows += [*zip(real, ["render: " + caption for caption in told], strict=True), *zip(back, ["inverted and back"] * 8, strict=True)]
    figure = Figure(figsize=(20, 14), layout="constrained")
    for axis, (image, title) in zip(figure.subplots(5, 8).flat, rows, strict=True):
        axis.imshow(rearrange(image, "c h w -> h w c").numpy())
        axis.set_title("\n".join(textwrap.wrap(title, 34)) or "(empty prompt)", fontsize=8)
        axis.axis("off")
    return figure
