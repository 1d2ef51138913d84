"""Train FILIP beside CLIP and its own ablations on captioned scenes; with --data DIR, train one of them on image-text pairs."""

import csv
import io
import json
import math
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms

from common.backbones.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from common.config import RunConfig
from common.data import Batches, scenes
from common.errors import UserError
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import each, fit
from common.prompts import Tokenizer
from papers.filip.model import FILIP, GlobalCLIP, PairedFILIP, SummedFILIP, UnmaskedFILIP, load_published, towers


@dataclass
class Config(RunConfig):
    """The small models of the scenes; --data DIR trains one --variant with the towers of --arch instead."""

    arch: str = "ViT-B-32"  # towers of open_clip, for --data and --weights; ViT-B-32-quickgelu is OpenAI's and DeCLIP's
    variant: str = "filip_25"  # for --data and --weights: clip, filip, filip_50, filip_25, declip
    embed: int = 32  # d, the width of a token's feature
    size: int = 30  # pixels a side
    patch: int = 5
    dim: int = 64  # width of both towers
    depth: int = 2  # layers of each
    heads: int = 4
    train_scenes: int = 4_096  # to learn from
    test_scenes: int = 500  # to retrieve from
    timed_batch: int = 128  # of the timed loss
    repeats: int = 5  # of each timing


SCALES = {
    "smoke": Config(
        steps=4, batch=4, seeds=(0,), embed=8, dim=16, depth=1, heads=2, train_scenes=16, test_scenes=8, timed_batch=4, repeats=1, processes=1,
        save_every=0.5,
    ),
    "small": Config(steps=400, batch=64, lr=2e-3),
    "full": Config(
        seeds=(0,), steps=95_000, batch=8192, lr=1e-3, warmup=0.03, weight_decay=0.1, clip=1.0, precision="bf16", workers=8, save_every=0.01,
        embed=256, size=224,
    ),
}  # fmt: skip

VARIANTS = {
    "clip": GlobalCLIP,
    "filip": FILIP,
    "filip_50": partial(FILIP, ratio=0.5),
    "filip_25": partial(FILIP, ratio=0.25),
    "unmasked": UnmaskedFILIP,
    "summed": SummedFILIP,
    "declip": partial(PairedFILIP, count=16),  # a public re-implementation
}
COMPARED = ("clip", "filip", "filip_25", "unmasked", "summed")  # on the scenes

# ---- scenes -----------------------------------------------------------------------------------------------------------------------------

WORDS = [*scenes.SHAPES, *scenes.COLOURS, *scenes.TEXTURES, *scenes.BACKGROUNDS, *scenes.PLACES]
WORDS += ["a", "an", "at", "the", "of", "on", "and", "photo", "background", "left", "right", "above", "below"]
LENGTH = 20  # tokens; the longest caption has 18


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.compact(WORDS, LENGTH)


@cache
def scene_set(n: int, seed: int, size: int, single: float = 0.35) -> scenes.Captioned:
    """Photographic scenes whose captions name every colour. single: the share of those with one thing."""
    return scenes.captioned(n, seed, size, styled=0.0, under_specified=0.0, single=single)


def pairs(scene: scenes.Captioned) -> TensorDataset:
    return TensorDataset(scene.images, tokenizer()(scene.captions))


def normalized(image: Tensor) -> Float[Tensor, "b 3 H W"]:
    """Bytes to -1..1."""
    return image.float() / 127.5 - 1


# ---- models -----------------------------------------------------------------------------------------------------------------------------


def build(cfg: Config, variant: str) -> FILIP:
    """A small model. Summed similarities are n1 or n2 times as large as means, so its 1/τ starts lower by the factor between."""
    layers = {"hidden_size": cfg.dim, "intermediate_size": 2 * cfg.dim, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads}
    vision = CLIPVisionConfig(**layers, image_size=cfg.size, patch_size=cfg.patch)
    text = CLIPTextConfig(**layers, vocab_size=len(tokenizer().vocab), max_position_embeddings=LENGTH)
    model = init_by_fan_in(VARIANTS[variant](CLIPConfig(vision, text, cfg.embed)))
    if variant == "summed":
        words = sum(len(tokenizer().ids(caption)) for caption in scene_set(cfg.train_scenes, 1, cfg.size).captions) / cfg.train_scenes
        model.logit_scale.data -= math.log(words * (cfg.size // cfg.patch) ** 2) / 2
    return model


def full_model(cfg: Config) -> FILIP:
    """A model of the published size, from scratch or with the towers of --weights."""
    if cfg.variant not in VARIANTS:
        raise UserError(f"--variant {cfg.variant}: take one of {', '.join(VARIANTS)}")
    config = towers(cfg.arch)
    config.projection_dim = cfg.embed
    model = VARIANTS[cfg.variant](config)
    if cfg.weights:
        given = load_published(towers(cfg.arch), cfg.weights).state_dict()
        model.load_state_dict({name: t for name, t in given.items() if "_projection." not in name}, strict=False)
    return model


# ---- image-text pairs on disk -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A file, or a part of a tar, and its captions."""

    path: Path
    start: int
    length: int  # -1: to the end
    captions: list[str]


def find_pairs(root: Path) -> list[Pair]:
    """Of a directory with train.csv (CC3M, CC12M: columns image_path and caption), or with *.json of one object a line (YFCC15M: filename,
    and caption, one or several), both with paths relative to it, or with img2dataset's *.tar shards. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such directory; it must hold train.csv, a .json of one object a line, or .tar shards")
    for pattern, reader in (("train.csv", _from_csv), ("*.json", _from_json), ("*.tar", _from_tar)):
        found = [pair for file in sorted(root.glob(pattern)) for pair in reader(file)]
        if found:
            return found
    raise UserError(f"{root} has no pairs: it must hold train.csv, a .json of one object a line, or .tar shards")


def _from_csv(file: Path) -> Iterator[Pair]:
    with file.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        if not {"image_path", "caption"} <= set(table.fieldnames or ()):
            raise UserError(f"{file} needs the columns image_path and caption, its first line is {','.join(table.fieldnames or ())!r}")
        for row in table:
            yield Pair(file.parent / row["image_path"], 0, -1, [row["caption"] or ""])


def _from_json(file: Path) -> Iterator[Pair]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            captions = row["caption"]
            yield Pair(file.parent / row["filename"], 0, -1, captions if isinstance(captions, list) else [captions])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}, line {number}: expected an object with filename and caption, as in yfcc15m_clean_open_data.json") from None


def _from_tar(file: Path) -> Iterator[Pair]:
    """KEY.jpg and KEY.txt lie behind one another."""
    try:
        with tarfile.open(file) as tar:
            images, texts = {}, {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("jpg", "jpeg", "png", "webp"):
                    images[key] = member
                elif suffix == "txt":
                    texts[key] = tar.extractfile(member).read().decode("utf-8", "replace")
    except tarfile.TarError as error:
        raise UserError(f"{file} is not a whole tar file ({error}): fetch the shard again") from None
    for key in images.keys() & texts.keys():
        yield Pair(file, images[key].offset_data, images[key].size, [texts[key]])


class ImageText(Dataset):
    """(image, token ids) with a random one of the captions. A broken image is replaced by a random other one, with a warning."""

    def __init__(self, root: Path, transform: Callable, tokenize: Callable):
        self.pairs, self.transform, self.tokenize = find_pairs(root), transform, tokenize

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], Int[Tensor, "n2"]]:
        for _ in range(11):
            path, start, length, captions = self.pairs[index]
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    image = Image.open(io.BytesIO(file.read(length))).convert("RGB")
                return self.transform(image), self.tokenize(captions[int(torch.randint(len(captions), ()))])[0]
            except (OSError, SyntaxError) as error:  # Pillow's for what is no image
                warnings.warn(f"skipped {path} ({error})", stacklevel=2)
                index = int(torch.randint(len(self), ()))
        raise UserError(f"11 images in a row could not be read; the last is {path}: check the directory given with --data")


def transform(size: int, train: bool) -> Callable:
    """AutoAugment as in the paper; bicubic; CLIP's mean and deviation."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    bicubic = transforms.InterpolationMode.BICUBIC
    crop = [transforms.RandomResizedCrop(size, (0.9, 1.0), interpolation=bicubic), transforms.RandomHorizontalFlip(), transforms.AutoAugment()]
    centre = [transforms.Resize(size, bicubic), transforms.CenterCrop(size)]
    return transforms.Compose([*(crop if train else centre), transforms.ToTensor(), transforms.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)])


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def faster_temperature(name: str, parameter: nn.Parameter) -> float:
    """A single number among matrices has the farthest to go: ten times their rate, for all variants."""
    return 10.0 if name == "logit_scale" else 1.0


def train(cfg: Config) -> None:
    if cfg.data:
        each(train_pairs, [(seed,) for seed in cfg.seeds], cfg)
    else:
        each(train_one, [(variant, seed) for variant in COMPARED for seed in cfg.seeds], cfg)


def train_one(cfg: Config, variant: str, seed: int) -> None:
    seed_everything(seed)
    batches = Batches(pairs(scene_set(cfg.train_scenes, 1, cfg.size)), cfg.batch, seed)
    loss = lambda model, batch: model.loss(normalized(batch[0]), batch[1])
    fit(build(cfg, variant), loss, batches, cfg, f"{variant}/{seed}", faster_temperature)


def train_pairs(cfg: Config, seed: int) -> None:
    import open_clip

    seed_everything(seed)
    dataset = ImageText(Path(cfg.data), transform(cfg.size, train=True), open_clip.get_tokenizer(cfg.arch))
    batches = Batches(dataset, cfg.batch, seed, cfg.workers)
    fit(full_model(cfg), lambda model, batch: model.loss(*batch), batches, cfg, f"{cfg.variant}/{seed}")
