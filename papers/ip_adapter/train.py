"""Train IP-Adapter beside its baselines on a small frozen Stable Diffusion; with --data LIST, on images and captions for a published one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2 as transforms

from common import gpu
from common.backbones.clip import CLIPVisionWithProjection
from common.config import RunConfig
from common.data import Batches, scenes
from common.errors import UserError
from common.loop import each, fit
from common.stable_diffusion import StableDiffusion
from papers.ip_adapter.model import (
    Features,
    FineTuned,
    FullProjection,
    ImageProjection,
    IPAdapter,
    Resampler,
    SimpleAdapter,
    image_features,
    load_adapter,
    no_image,
    shortened,
    training_loss,
)


@dataclass
class Config(RunConfig):
    """Four models a seed on scenes, and a base of another style; --data LIST trains one adapter with --projection for --base instead."""

    base: str = "tiny"  # Stable Diffusion, of any version: directory or hub id
    encoder: str = "tiny"  # CLIP's image tower with projection: directory or hub id, as h94/IP-Adapter/models/image_encoder
    judge: str = "openai/clip-vit-large-patch14"  # CLIP that scores samples, for --weights
    projection: str = "global"  # for --data: global, plus or full
    images: str = ""  # for --data: directory of its files, default that of the list
    size: int = 512  # for --data: pixels a side
    queries: int = 8  # tokens of plus
    depth: int = 2  # layers of plus
    train_scenes: int = 4_096  # to learn from
    prompts: int = 48  # images to prompt with; for --weights: 0 is all
    draws: int = 2  # samples of each image alone
    ddim: int = 12  # steps of the sampler
    guidance: float = 3.0  # w


SCALES = {
    "smoke": Config(steps=4, batch=4, seeds=(0,), processes=1, save_every=0.5, depth=1, queries=2, train_scenes=8, prompts=3, draws=2, ddim=2),
    "small": Config(steps=300, batch=16, lr=1e-3, weight_decay=0.01),
    "full": Config(
        seeds=(0,), steps=1_000_000, batch=64, lr=1e-4, lr_min=1e-4, warmup=0.0, weight_decay=0.01, precision="bf16", workers=8, save_every=0.01,
        base="stable-diffusion-v1-5/stable-diffusion-v1-5", encoder="h94/IP-Adapter/models/image_encoder", queries=16, depth=4,
        prompts=0, draws=4, ddim=50, guidance=7.5,
    ),
}  # fmt: skip

VARIANTS = ("finetuned", "plus", "decoupled", "simple")  # the longest first
RATES = {"decoupled": 3.0, "simple": 3.0, "finetuned": 3.0, "plus": 0.3, "restyled": 1.0}  # times --lr

# ---- what is frozen ---------------------------------------------------------------------------------------------------------------------


@cache
def base(name: str) -> StableDiffusion:
    return StableDiffusion.from_pretrained(name, dtype=torch.float32).requires_grad_(False)


@cache
def tower(name: str) -> CLIPVisionWithProjection:
    return CLIPVisionWithProjection.from_pretrained(name, dtype=torch.float32).requires_grad_(False)


def clip_pixels(name: str, size: int) -> Callable[[Float[Tensor, "*b 3 H W"]], Float[Tensor, "*b 3 h w"]]:
    """What a tower takes, of images in [0, 1]: the shorter side to its size, the centre, and its mean and deviation."""
    mean, std = ((0.5,) * 3, (0.5,) * 3) if name == "tiny" else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.Normalize(mean, std)])


# ---- scenes -----------------------------------------------------------------------------------------------------------------------------

FRAME, WIDTH = (0.85, 0.10, 0.60), 4  # colour and pixels


@cache
def scene_set(n: int, seed: int) -> scenes.Captioned:
    """One thing each, without styles. The captions name its shape, mostly its place and sometimes the background; never its colour or texture."""
    return scenes.captioned(n, seed, styled=0.0, under_specified=1.0, single=1.0)


def framed(images: UInt8[Tensor, "b 3 H W"]) -> UInt8[Tensor, "b 3 H W"]:
    """In a frame of a colour that nothing else has."""
    picture = images.clone()
    colour = (255 * torch.tensor(FRAME)).round().to(torch.uint8)[:, None, None]
    for edge in (picture[..., :WIDTH, :], picture[..., -WIDTH:, :], picture[..., :WIDTH], picture[..., -WIDTH:]):
        edge[:] = colour
    return picture


@cache
@torch.no_grad()
def features(name: str, n: int, seed: int, fine: bool) -> Features:
    """Those of a scene set, of the tower `name`."""
    encoder, images = tower(name).cpu(), scene_set(n, seed).images
    pixels = clip_pixels(name, encoder.config.image_size)
    return torch.cat([image_features(encoder, pixels(part / 255), fine) for part in images.split(256)])


class Prompted(Dataset):
    """Images, their features, and captions."""

    def __init__(self, images: UInt8[Tensor, "n 3 H W"], e: Features, captions: list[str]):
        self.images, self.e, self.captions = images, e, captions

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Float[Tensor, "b 3 H W"], Features, list[str]]:
        return self.images[indices] / 255, self.e[indices], [self.captions[i] for i in indices.tolist()]


def dataset(cfg: Config, variant: str) -> Prompted:
    made, e = scene_set(cfg.train_scenes, 1), features(cfg.encoder, cfg.train_scenes, 1, fine=variant == "plus")
    if variant == "restyled":
        return Prompted(framed(made.images), e, [scenes.full_caption(scene) for scene in made.scenes])
    return Prompted(made.images, e, made.captions)


# ---- models -----------------------------------------------------------------------------------------------------------------------------


class Restyled(FineTuned):
    """A base of another style: the U-Net tuned to framed pictures, by text alone."""

    def __init__(self, unet: nn.Module):
        super().__init__(None, unet)

    def prompt(self, text: Tensor, e: Features) -> Tensor:
        return text


def projection(cfg: Config, kind: str) -> nn.Module:
    """A fresh one, of the published size where base and encoder are. Raises UserError for an unknown kind."""
    c, dim = tower(cfg.encoder).config, base(cfg.base).unet.config.cross_attention_dim
    if kind == "global":
        return ImageProjection(c.projection_dim, dim)
    if kind == "plus":
        inner = min(dim, 1280)
        return Resampler(c.hidden_size, dim, inner, depth=cfg.depth, heads=max(1, inner // 64), queries=cfg.queries)
    if kind == "full":
        return FullProjection(c.hidden_size, dim, 1 + (c.image_size // c.patch_size) ** 2)
    raise UserError(f"--projection {kind}: take one of global, plus, full")


def build(cfg: Config, variant: str) -> SimpleAdapter:
    unet = base(cfg.base).unet
    return {
        "decoupled": lambda: IPAdapter(projection(cfg, "global"), unet),
        "plus": lambda: IPAdapter(projection(cfg, "plus"), unet),
        "simple": lambda: SimpleAdapter(projection(cfg, "global")),
        "finetuned": lambda: FineTuned(projection(cfg, "global"), unet),
        "restyled": lambda: Restyled(unet),
    }[variant]()


# ---- images and captions on disk --------------------------------------------------------------------------------------------------------


class ImageTextList(Dataset):
    """(image in [0, 1], the tower's pixels, caption) of the official list, a json of [{"image_file": ..., "text": ...}]. Raises UserError."""

    def __init__(self, path: Path, root: Path, size: int, pixels: Callable):
        try:
            self.rows = [(root / row["image_file"], row["text"]) for row in json.loads(path.read_text(encoding="utf-8"))]
        except OSError as error:
            raise UserError(f'--data {path}: {error.strerror}; give a json of [{{"image_file": ..., "text": ...}}]') from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path} is not a json of [{{"image_file": ..., "text": ...}}] ({error!r}): mend it') from None
        self.crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "3 h w"], str]:
        path, text = self.rows[index]
        image = read_image(path)
        return self.crop(image), self.pixels(image), text


def read_image(path: Path) -> Float[Tensor, "3 H W"]:
    """In [0, 1]. Raises UserError."""
    try:
        return transforms.functional.pil_to_tensor(Image.open(path).convert("RGB")) / 255
    except (OSError, SyntaxError) as error:  # Pillow's for what is no image, and for a broken PNG
        raise UserError(f"{path} cannot be read as an image ({error}): fetch it again, or take it out of the list") from None


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    if cfg.data:
        each(train_list, [(seed,) for seed in cfg.seeds], cfg)
    else:
        each(train_one, [(variant, seed) for variant in VARIANTS for seed in cfg.seeds] + [("restyled", cfg.seeds[0])], cfg)


def train_one(cfg: Config, variant: str, seed: int) -> None:
    on = gpu.device(cfg)
    sd, nothing = base(cfg.base).to(on), no_image(tower(cfg.encoder), variant == "plus").to(on)
    gpu.seed_everything(seed)  # after the loading, which draws numbers too, but only once
    model = build(cfg, variant)

    def loss(model: SimpleAdapter, batch: tuple) -> Tensor:
        images, e, captions = batch
        return training_loss(model, sd, sd.encode(images), captions, e, nothing)

    fit(model, loss, Batches(dataset(cfg, variant), cfg.batch, seed), cfg, f"{variant}/{seed}", lambda name, parameter: RATES[variant])


def train_list(cfg: Config, seed: int) -> None:
    on = gpu.device(cfg)
    sd, encoder = base(cfg.base).to(on), tower(cfg.encoder).to(on)
    gpu.seed_everything(seed)
    model = load_adapter(sd.unet, cfg.weights) if cfg.weights else IPAdapter(projection(cfg, cfg.projection), sd.unet)
    fine = model.image_proj.fine
    nothing = no_image(encoder, fine)

    def loss(model: IPAdapter, batch: tuple) -> Tensor:
        images, pixels, captions = batch
        texts = [shortened(caption, sd) for caption in captions]
        return training_loss(model, sd, sd.encode(images), texts, image_features(encoder, pixels, fine), nothing)

    path = Path(cfg.data)
    pairs = ImageTextList(path, Path(cfg.images or path.parent), cfg.size, clip_pixels(cfg.encoder, encoder.config.image_size))
    fit(model, loss, Batches(pairs, cfg.batch, seed, cfg.workers), cfg, f"{cfg.projection}/{seed}")
