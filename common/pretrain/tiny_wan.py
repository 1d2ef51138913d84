"""tiny-wan: a text-to-video transformer, the codec of its latents, and the network that judges its clips.

Data: a shape of one of four colours, striped, moves in one of four directions over six frames of 32 x 32, or 8 x 8 latents. Rectified flow
with the shift 3 that Wan has at its smallest size: x_σ = (1-σ) x + σ ε, v = ε - x, σ = 3u/(1 + 2u) with u uniform; one caption in ten is the
null prompt.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.backbones.wan import WanConfig, WanTransformer3DModel
from common.config import RunConfig
from common.data import Batches
from common.data.videos import COLOURS, DIRECTIONS, SHAPES, VOCABULARY, MovingShapes, moving_shapes, tokenize
from common.diffusion import shifted
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import fit
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.results import content_hash
from common.tiny_wan import FRAMES, SIZE, sample
from common.video_metrics import VideoNet, VideoNetConfig, metrics, stored


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 2800
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    ema: float | None = 0.995
    clips: int = 4096  # rendered in advance
    heads: int = 3
    head_dim: int = 32  # of it 10 channels for rows and columns each: they turn by 1, 0.16, 0.03 ... a token, and there are 4 x 4
    layers: int = 4
    ffn: int = 256
    judge_steps: int = 1500
    judge_batch: int = 32
    judge_lr: float = 4e-3
    judge_clips: int = 8192


SCALES = {
    "smoke": Config(
        steps=3, batch=2, clips=16, layers=1, head_dim=12, heads=2, ffn=24, ema=0.5,
        judge_steps=2, judge_batch=4, judge_clips=16,
    ),
    "small": Config(),
}  # fmt: skip
COMPONENTS = {"transformer": WanTransformer3DModel, "codec": PatchCodec, "judge": VideoNet}

TRAIN, TRAIN_JUDGE, TEST = 0, 1, 2  # seeds of the clips


# ---- data -----------------------------------------------------------------------------------------------------------------------------


def clips(cfg: Config) -> MovingShapes:
    """What the transformer learns."""
    return moving_shapes(cfg.clips, TRAIN, SIZE, FRAMES, texture=True)


def judge_clips(cfg: Config) -> list[MovingShapes]:
    """What its judge learns: more than the transformer can show, so that it reads clips of any of moving_shapes' looks."""
    n, looks = cfg.judge_clips // 4, itertools.product((False, True), repeat=2)
    return [moving_shapes(n, TRAIN_JUDGE, SIZE, 8, (1.0, 2.2), False, *look, start=i * n) for i, look in enumerate(looks)]


def held_out() -> MovingShapes:
    """One clip for each of the 48 captions."""
    labels = torch.cartesian_prod(*(torch.arange(len(kinds)) for kinds in (COLOURS, SHAPES, DIRECTIONS)))
    return moving_shapes(len(labels), TEST, SIZE, FRAMES, texture=True, labels=labels)


def data(cfg: Config) -> dict[str, str]:
    return {
        "moving shapes": content_hash(_bytes(clips(cfg).video)),
        "moving shapes, judge": content_hash(*(_bytes(c.video) for c in judge_clips(cfg))),
    }


def _bytes(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().to(torch.uint8)


# ---- training -------------------------------------------------------------------------------------------------------------------------


def build(cfg: Config, codec: PatchCodec) -> WanTransformer3DModel:
    channels = codec.config.latent_channels
    model = WanTransformer3DModel(
        WanConfig(
            patch_size=(1, 2, 2), num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, in_channels=channels, out_channels=channels,
            text_dim=len(VOCABULARY), freq_dim=64, ffn_dim=cfg.ffn, num_layers=cfg.layers,
        )
    )  # fmt: skip
    conditions = init_by_fan_in(model.condition_embedder)
    nn.init.normal_(conditions.text_embedder.linear_1.weight)  # word vectors, for its input is one-hot
    nn.init.zeros_(conditions.time_proj.weight)  # blocks begin near the identity
    return model


def flow_loss(model: WanTransformer3DModel, batch: tuple[Float[Tensor, "b l t h w"], Int[Tensor, "b words"]]) -> Tensor:
    x, words = batch
    words = words * (torch.rand(len(words), 1, device=words.device) >= 0.1)  # word 0 is <null>
    sigma = shifted(torch.rand(len(x), device=x.device), 3.0)
    level, noise = sigma[:, None, None, None, None], torch.randn_like(x)
    velocity = model((1 - level) * x + level * noise, 1000 * sigma, F.one_hot(words, len(VOCABULARY)).float())
    return F.mse_loss(velocity, noise - x)


def judge_loss(judge: VideoNet, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """On four frames, which suffice and cost half, with noise, for generated clips have some."""
    video, labels = batch
    start = int(torch.randint(video.shape[2] - 3, ()))
    x = video[:, :, start : start + 4] / 127.5 - 1
    logits = judge(x + 0.2 * torch.rand(len(x), 1, 1, 1, 1, device=x.device) * torch.randn_like(x))
    return {name: F.cross_entropy(logits[name], labels[:, i]) for i, name in enumerate(logits)}


def train(cfg: Config) -> dict[str, nn.Module]:
    seed, judged = cfg.seeds[0], judge_clips(cfg)
    dataset = TensorDataset(torch.cat([_bytes(c.video) for c in judged]), torch.cat([c.labels for c in judged]))
    judge_cfg = replace(cfg, steps=cfg.judge_steps, batch=cfg.judge_batch, lr=cfg.judge_lr, ema=None)
    seed_everything(seed)
    judge = fit(VideoNet(VideoNetConfig()), judge_loss, Batches(dataset, judge_cfg.batch, seed), judge_cfg, "judge")

    pool = clips(cfg)
    codec = PatchCodec(PatchCodecConfig()).fit(pool.video[:600])
    seed_everything(seed)
    dataset = TensorDataset(codec.encode(pool.video), tokenize(pool.captions))
    return {"transformer": fit(build(cfg, codec), flow_loss, Batches(dataset, cfg.batch, seed), cfg, "transformer"), "codec": codec, "judge": judge}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def samples(models: dict[str, nn.Module], captions: list[str], steps: int = 16, **options) -> Tensor:
    codec, side = models["codec"].config, SIZE // models["codec"].config.patch
    noise = torch.randn(len(captions), codec.latent_channels, FRAMES, side, side, generator=torch.Generator().manual_seed(TEST))
    return sample(models["transformer"], models["codec"], captions, noise, steps, **options)


def measure(models: dict[str, nn.Module]) -> dict[str, float]:
    """A clip for each of the 48 captions, 16 steps; ceiling: rendered clips; floor: samples of the null prompt. All of them as mp4."""
    real = held_out()
    reference = stored(real, real.video)
    videos = {
        "": samples(models, real.captions),
        " (ceiling)": real.video,
        " (floor)": samples(models, [""] * len(real.captions), guidance=1.0),
    }
    found = {suffix: metrics(models["judge"], stored(real, video), real.labels, reference) for suffix, video in videos.items()}
    return {name + suffix: value for name in found[""] for suffix, values in found.items() for value in [values[name]]}


def sheet(models: dict[str, nn.Module]) -> Figure:
    """Two clips a row: three times six frames."""
    real = held_out()
    chosen = torch.arange(0, 48, 3)
    captions = [real.captions[i] for i in chosen]
    video = samples(models, captions, 20)
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, clip, text in zip(figure.subplots(8, 2).ravel(), video, captions, strict=True):
        axes.imshow(np.hstack(((clip.permute(1, 2, 3, 0) + 1) / 2).numpy()))
        axes.set_title(text, fontsize=8, pad=2)
        axes.axis("off")
    return figure
