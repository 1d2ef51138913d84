"""Train CrossFormer, its ablations and its rivals on scale-mix scenes, or CrossFormer on ImageNet."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.config import RunConfig
from common.data import Batches, images, scenes
from common.gpu import seed_everything
from common.loop import each, fit
from papers.crossformer.model import VARIANTS, CrossFormer, ablation


@dataclass
class Config(RunConfig):
    """The micro models of the scenes; --data DIR trains the published --variant on ImageNet instead."""

    variant: str = "S"  # of the published models, for --data and --weights: T, S, B or L
    size: int = 48  # pixels a side
    train_images: int = 8_192  # scenes to learn from
    test_images: int = 1_024
    dim: int = 48  # width of the first of two stages
    heads: tuple[int, int] = (3, 6)
    group: int = 3  # tokens a side
    interval: tuple[int, int] = (4, 2)
    mlp_ratio: float = 2.0
    segment_steps: int = 160  # of the dense task
    sides: tuple[int, ...] = (14, 28, 56, 84)  # tokens a side, for the cost of attention


SCALES = {
    "smoke": Config(steps=2, batch=4, train_images=16, test_images=8, dim=16, heads=(1, 2), seeds=(0,), segment_steps=2, sides=(14, 28), processes=1),
    "small": Config(steps=256, batch=16, clip=5.0),
    "full": Config(steps=375_300, batch=1024, lr=1e-3, lr_min=5e-6, warmup=20 / 300, clip=5.0, size=224, seeds=(0,), workers=8, save_every=1 / 300),
}

# what is compared: (attention, position, cross-scale embedding)
MICRO = {
    "crossformer": ("lsda", "dpb", True),
    "no_cel": ("lsda", "dpb", False),
    "shifted_windows": ("swin", "dpb", True),
    "sda_only": ("sda", "dpb", True),
    "rpb": ("lsda", "rpb", True),
    "ape": ("lsda", "ape", True),
    "pvt": ("pvt", "ape", False),
    "swin": ("timm's SwinTransformer", "rpb", False),
}
DENSE = ("crossformer", "no_cel", "swin_dense")  # the last is Swin's attention and embedding in our pyramid, which gives maps


# ---- models -----------------------------------------------------------------------------------------------------------------------------


def build(cfg: Config, variant: str) -> nn.Module:
    """One of MICRO, with 16 classes. The published std of 0.02 suits widths of 64 and more; these narrow models get 1/√fan-in, all alike."""
    model = _untrained(cfg, variant)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    return model


def _untrained(cfg: Config, variant: str) -> nn.Module:
    if variant == "swin":
        widths = {"embed_dim": cfg.dim, "depths": (2, 2), "num_heads": cfg.heads, "window_size": cfg.group, "mlp_ratio": 1.45 * cfg.mlp_ratio}
        return SwinTransformer(cfg.size, 4, in_chans=1, num_classes=16, drop_path_rate=0, **widths)  # the wider MLP makes up for smaller embeddings
    attention, position, cross_scale = MICRO.get(variant, ("swin", "rpb", False))
    return ablation(
        attention,
        position,
        grid=cfg.size // 4,
        patch_size=(4, 8, 16, 32) if cross_scale else (4,),
        merge_size=((2, 4),) if cross_scale else ((2,),),
        in_chans=1,
        num_classes=16,
        embed_dim=cfg.dim,
        depths=(2, 2),
        num_heads=cfg.heads,
        group_size=(cfg.group, cfg.group),
        crs_interval=cfg.interval,
        mlp_ratio=(cfg.mlp_ratio, cfg.mlp_ratio),
        lda="interval",
    )


class Segmenter(nn.Module):
    """The least dense head: a 1x1 convolution on every stage's map, summed at the finest grid (a quarter of the image)."""

    def __init__(self, backbone: CrossFormer, dim: int, classes: int = 5):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Conv2d(dim * 2**s, classes, 1) for s in range(len(backbone.layers)))

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b classes h w"]:
        maps = [head(m) for head, m in zip(self.heads, self.backbone.forward_features(image), strict=True)]
        return sum(F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps)


# ---- data -------------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def scene_set(n: int, seed: int, size: int) -> TensorDataset:
    """(uint8 images, labels, masks at a quarter of the resolution)."""
    mix = scenes.scale_mix(n, seed, size)
    return TensorDataset(mix.images, mix.labels, mix.masks[:, 2::4, 2::4])


def normalized(image: Tensor) -> Tensor:
    """Grey, every image to mean 0 and deviation 1. Colour and brightness carry nothing here; and a grey patch of 4x4 has 16 numbers, as many
    as the embedding has channels for it (D/2), like the paper's 48 channels for 48 numbers."""
    grey = image.float().mean(1, keepdim=True)
    deviation, mean = torch.std_mean(grey, (2, 3), keepdim=True)
    return (grey - mean) / deviation


# ---- losses and runs --------------------------------------------------------------------------------------------------------------------


def classify(model: nn.Module, batch: tuple[Tensor, Int[Tensor, "b"], Tensor]) -> Tensor:
    return F.cross_entropy(model(normalized(batch[0])), batch[1])


def segment(model: nn.Module, batch: tuple[Tensor, Tensor, Int[Tensor, "b h w"]]) -> Tensor:
    return F.cross_entropy(model(normalized(batch[0])), batch[2])


def train(cfg: Config) -> None:
    if cfg.data:
        jobs = [("imagenet", cfg.variant, seed) for seed in cfg.seeds]
    else:
        jobs = [("classify", variant, seed) for variant in MICRO for seed in cfg.seeds]
        jobs += [("segment", variant, seed) for variant in DENSE for seed in cfg.seeds]
    each(train_one, jobs, cfg)


def train_one(cfg: Config, task: str, variant: str, seed: int) -> None:
    seed_everything(seed)
    name = f"{task}/{variant}/{seed}"
    if task == "imagenet":
        dataset = images.image_folder(cfg.data, "train", images.train_transform(cfg.size))
        model = CrossFormer(**VARIANTS[variant], num_classes=len(dataset.classes))
        fit(model, images.mixup_cross_entropy(len(dataset.classes)), Batches(dataset, cfg.batch, seed, cfg.workers), cfg, name)
        return
    batches = Batches(scene_set(cfg.train_images, 1, cfg.size), cfg.batch, seed)
    if task == "classify":
        fit(build(cfg, variant), classify, batches, cfg, name, by_fan_in)
    else:
        fit(Segmenter(build(cfg, variant), cfg.dim), segment, batches, dense(cfg), name, by_fan_in)


def by_fan_in(name: str, parameter: nn.Parameter) -> float:
    """Learning rate of the patch embedding's kernels relative to a 4x4 one. Adam moves all weights alike, so a unit's response moves by the
    number of its inputs: kernels of 32x32 would jump where those of 4x4 walk, and drown them."""
    return 16 / parameter[0].numel() if "patch_embed" in name and parameter.ndim == 4 else 1.0


def dense(cfg: Config) -> Config:
    """The configuration of the segmentation runs."""
    return replace(cfg, steps=cfg.segment_steps)
