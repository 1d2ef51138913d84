"""StyleID trains nothing. What is fitted here is a baseline, a prompt for each style image; then every method draws every pair of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common import diffusion, gpu
from common.config import RunConfig
from common.data import Batches, scenes
from common.diffusion import ddim_timesteps, guided
from common.loop import atomically, each, fit
from common.stable_diffusion import StableDiffusion
from papers.style_injection.model import Setting, StyleID


@dataclass
class Config(RunConfig):
    """The method as published, on small images."""

    contents: int = 5  # content images of a seed
    styles: int = 12  # style images of a seed, as many of each kind
    sampling: int = 50  # DDIM steps, inversion and sampling alike
    original: bool = True  # the steps of the authors' first code; else those of their diffusers code
    layers: int | None = None  # how many of the decoder's self-attentions to inject; default two in three
    level: int = 600  # timestep from which the baselines redraw the content
    guidance: float = 3.0  # theirs
    gamma: float = 0.75  # with --weights; 0.3 for more style
    tau: float = 1.5  # with --weights
    vgg: Path | None = None  # with --weights: torchvision's VGG-19, to measure CFSD


SCALES = {
    "smoke": Config(steps=4, batch=4, lr=0.02, weight_decay=0.0, contents=3, styles=4, sampling=2, seeds=(0,), processes=1),
    "small": Config(steps=200, batch=12, lr=0.02, weight_decay=0.0, seeds=(0, 1, 2, 3)),
    "full": Config(steps=1000, batch=40, lr=0.02, weight_decay=0.0, contents=20, styles=40, seeds=tuple(range(8))),
}

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTENT, STYLE = 3000, 4000  # seeds of the scenes, plus the run's


STYLE_ID, FLAT, NO_ADAIN, ADAIN, SWAP = "γ 0.75", "τ 1", "no AdaIN", "AdaIN alone", "K/V swap"
SDEDIT, PROMPT, BACK = "SDEdit", "learnt prompt", "there and back"
SETTINGS = {f"γ {gamma:g}": Setting(gamma) for gamma in GAMMAS} | {
    FLAT: Setting(tau=1.0),
    NO_ADAIN: Setting(adain=False),
    ADAIN: Setting(inject=False),
    SWAP: Setting(gamma=0.0, tau=1.0, adain=False),
}


# ---- images -----------------------------------------------------------------------------------------------------------------------------


class Material(NamedTuple):
    """What a seed is about. Pair i of all contents x styles takes row pairs[i, 0] of the contents, pairs[i, 1] of the styles."""

    contents: scenes.Captioned
    styles: scenes.Captioned
    pairs: Int[Tensor, "p two"]


def material(cfg: Config, seed: int) -> Material:
    """Contents without a style; styles of the four kinds in turn, each with a hue of its own."""
    contents, drawn = scenes.captioned(cfg.contents, CONTENT + seed, styled=0.0), scenes.captioned(cfg.styles, STYLE + seed, styled=1.0)
    styled = [scene._replace(style=scenes.STYLES[i % len(scenes.STYLES)]) for i, scene in enumerate(drawn.scenes)]
    styles = scenes.Captioned(*_rendered(styled))
    return Material(contents, styles, torch.cartesian_prod(torch.arange(cfg.contents), torch.arange(cfg.styles)))


def _rendered(depicted: list[scenes.Scene]) -> tuple:
    images, instances, depth = scenes.render_all(depicted)
    return images, [scenes.full_caption(scene) for scene in depicted], depicted, instances, depth


def backbone(cfg: Config) -> StableDiffusion:
    """The small model that ships, on the run's device, and not to be trained."""
    return StableDiffusion.from_pretrained("tiny").to(gpu.device(cfg)).requires_grad_(False)


@torch.no_grad()
def encoded(model: StableDiffusion, images: UInt8[Tensor, "n 3 H W"]) -> Float[Tensor, "n l h w"]:
    return model.encode(images.to(model.unet.conv_in.weight) / 255)


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    each(train_one, [(seed,) for seed in cfg.seeds], cfg)


def train_one(cfg: Config, seed: int) -> None:
    """Fit the prompts of a seed, and leave the images of all methods in its directory."""
    gpu.seed_everything(seed)
    model, made = backbone(cfg), material(cfg, seed)
    dataset = TensorDataset(encoded(model, made.styles.images).cpu(), torch.arange(cfg.styles))
    prompts = fit(LearntPrompts(model, cfg.styles), prompt_loss(model), Batches(dataset, cfg.batch, seed), cfg, f"prompts/{seed}")
    images = draw(cfg, model, prompts, made, seed)
    if gpu.rank() == 0:
        atomically(images_of(cfg, seed), lambda path: save_file(images, path))


def images_of(cfg: Config, seed: int) -> Path:
    return cfg.out / f"prompts/{seed}/images.safetensors"


class LearntPrompts(nn.Module):
    """What stands in for the text tower's output, one for each style image; at first that of the empty prompt."""

    def __init__(self, model: StableDiffusion, n: int):
        super().__init__()
        with torch.no_grad():
            self.context = nn.Parameter(model.unconditional(n)["encoder_hidden_states"].clone())


def prompt_loss(model: StableDiffusion):
    """The diffusion loss of the frozen model under the prompt of each image."""

    def loss(prompts: LearntPrompts, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
        z, which = batch
        t = torch.randint(model.schedule.num_train_timesteps, (len(z),), device=z.device)
        noise = torch.randn_like(z)
        predicted = model.unet(model.schedule.add_noise(z, noise, t), t, prompts.context[which])
        return F.mse_loss(predicted, model.schedule.target(z, noise, t))

    return loss


# ---- every method on every pair -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(cfg: Config, model: StableDiffusion, prompts: LearntPrompts, made: Material, seed: int) -> dict[str, UInt8[Tensor, "p 3 H W"]]:
    """Images by method; and the contents there and back, which shows what inversion loses."""
    method = StyleID.of(model, cfg.layers, steps=cfg.sampling, original=cfg.original)
    z_c, z_s = encoded(model, made.contents.images), encoded(model, made.styles.images)
    content, style = method.invert(z_c, "q"), method.invert(z_s, "kv")
    own = torch.arange(cfg.contents)[:, None] * torch.tensor([1, 0])
    z = {BACK: method.stylise(content, style, own, Setting(inject=False, adain=False))}
    for name, setting in SETTINGS.items():
        z[name] = torch.cat([method.stylise(content, style, part, setting) for part in made.pairs.split(64)])
    told = [scenes.full_caption(made.contents.scenes[c]._replace(style=made.styles.scenes[s].style)) for c, s in made.pairs.tolist()]
    noise, chunks = model.noise(len(told), seed), torch.arange(len(told)).split(64)
    redraw = lambda i, condition: redrawn(cfg, model, z_c[made.pairs[i, 0]], noise[i], condition)
    z[SDEDIT] = torch.cat([redraw(i, model.condition([told[k] for k in i])) for i in chunks])
    z[PROMPT] = torch.cat([redraw(i, {"encoder_hidden_states": prompts.context[made.pairs[i, 1]]}) for i in chunks])
    return {name: (255 * model.decode(latents).clamp(0, 1)).round().byte().cpu().contiguous() for name, latents in z.items()}


def redrawn(
    cfg: Config, model: StableDiffusion, z0: Float[Tensor, "b l h w"], noise: Float[Tensor, "b l h w"], condition: dict[str, Tensor]
) -> Float[Tensor, "b l h w"]:
    """SDEdit (Meng et al. 2022): noise to the first timestep that is not above cfg.level, and back under a condition."""
    timesteps = ddim_timesteps(model.schedule, cfg.sampling)
    start = next((i for i, t in enumerate(timesteps) if t <= cfg.level), cfg.sampling - 1)
    z = model.schedule.add_noise(z0, noise, timesteps[start])
    toward = guided(model.unet, condition, model.unconditional(len(z)), cfg.guidance)
    return diffusion.sample(toward, z, model.schedule, cfg.sampling, start=start)
