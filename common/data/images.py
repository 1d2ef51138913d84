"""Image classification datasets in the ImageFolder layout: root/{train,val}/<class>/*.JPEG, as ImageNet is usually unpacked."""

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode

from common.errors import UserError


def image_folder(root: str | Path, split: str, transform: Callable | None = None) -> ImageFolder:
    """(image, label) pairs of one split, labels in the order of the sorted class names. "val" may be called "validation" on disk.

    Raises UserError for a missing directory, a split without classes, and, on access, for an unreadable image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such directory; it must hold train/<class>/*.JPEG and val/<class>/*.JPEG (see data/README.md)")
    names = (split, "validation") if split == "val" else (split,)
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise UserError(f"{root} has no directory {' or '.join(names)}: it must hold train/<class>/*.JPEG and val/<class>/*.JPEG")
    try:
        return ImageFolder(str(found), transform, loader=_load)
    except FileNotFoundError as error:  # torchvision's for a directory without classes and for a class without images
        raise UserError(f"{found}: {str(error).splitlines()[0]} Each class is a directory of .JPEG, .jpg or .png files") from None


def _load(path: str):
    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # Pillow's for what is no image, and for a broken PNG
        raise UserError(f"{path} cannot be read as an image ({error}): delete it or fetch it again") from None


def eval_transform(size: int = 224, resize: int = 256) -> Callable:
    """Shorter side to `resize` (bicubic), centre crop, ImageNet's mean and deviation."""
    return transforms.Compose(
        [
            transforms.Resize(resize, InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def train_transform(size: int = 224) -> Callable:
    """timm's recipe for vision transformers: random resized crop and flip, RandAugment m9-mstd0.5-inc1, random erasing 0.25. Its colour
    jitter of 0.4 acts only where RandAugment is off: timm never applies both.
    """
    return create_transform(
        size, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel", interpolation="bicubic"
    )


def mixup_cross_entropy(classes: int) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """The loss of the same recipe, loss(model, (image, label)): mixup 0.8 or cutmix 1.0, label smoothing 0.1."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, target = mixup(*batch)
        return F.cross_entropy(model(image), target)

    return loss
