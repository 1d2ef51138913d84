"""tiny-wan: a text-to-video transformer, the codec of its latents, and the network that judges its clips.

Data: a shape of one of four colours moves in one of four directions over eight frames of 32 x 32. As in Wan, four frames make one of the
latents, here of 2 x 8 x 8, so that a single token shows a motion. Rectified flow with the shift 3 that Wan has at its smallest size:
x_σ = (1-σ) x + σ ε, v = ε - x, σ = 3u/(1 + 2u) with u uniform; one caption in ten is the null prompt.
"""

import itertools
import math
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
from common.layers import frequencies, init_by_fan_in
from common.loop import fit
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.results import content_hash
from common.tiny_wan import FRAMES, SIZE, sample
from common.video_metrics import VideoNet, VideoNetConfig, metrics, stored


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 3600
    batch: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    ema: float | None = 0.995
    clips: int = 4096  # rendered in advance
    latent_channels: int = 32  # of the 192 values of 4 frames x 4 x 4 pixels
    heads: int = 3  # one for each way in which `look_around` starts them
    head_dim: int = 36  # of it 12 channels for time, rows and columns each: they turn by 1, 0.22, 0.05 ... a token, and there are 8 x 8
    layers: int = 4
    ffn: int = 256
    judge_steps: int = 1000
    judge_batch: int = 32
    judge_lr: float = 4e-3
    judge_clips: int = 8192


SCALES = {
    "smoke": Config(
        steps=3, batch=2, clips=16, layers=1, head_dim=12, ffn=24, ema=0.5,
        judge_steps=2, judge_batch=4, judge_clips=16,
    ),
    "small": Config(),
}  # fmt: skip
COMPONENTS = {"transformer": WanTransformer3DModel, "codec": PatchCodec, "judge": VideoNet}

TRAIN, TRAIN_JUDGE, TEST = 0, 1, 2  # seeds of the clips


# ---- data -----------------------------------------------------------------------------------------------------------------------------


def clips(cfg: Config) -> MovingShapes:
    """What the transformer learns."""
    return moving_shapes(cfg.clips, TRAIN, SIZE, FRAMES)


def judge_clips(cfg: Config) -> list[MovingShapes]:
    """What its judge learns: more than the transformer can show, so that it reads clips of any of moving_shapes' looks."""
    n, looks = cfg.judge_clips // 4, itertools.product((False, True), repeat=2)
    return [moving_shapes(n, TRAIN_JUDGE, SIZE, FRAMES, (1.0, 2.2), False, *look, start=i * n) for i, look in enumerate(looks)]


def held_out() -> MovingShapes:
    """One clip for each of the 48 captions."""
    labels = torch.cartesian_prod(*(torch.arange(len(kinds)) for kinds in (COLOURS, SHAPES, DIRECTIONS)))
    return moving_shapes(len(labels), TEST, SIZE, FRAMES, labels=labels)


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
            patch_size=(1, 1, 1), num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, in_channels=channels, out_channels=channels,
            text_dim=len(VOCABULARY), freq_dim=64, ffn_dim=cfg.ffn, num_layers=cfg.layers,
        )
    )  # fmt: skip
    conditions = init_by_fan_in(model.condition_embedder)
    nn.init.normal_(conditions.text_embedder.linear_1.weight)  # word vectors, for its input is one-hot
    nn.init.zeros_(conditions.time_proj.weight)  # blocks begin near the identity
    look_around(model)
    return model


@torch.no_grad()
def look_around(model: WanTransformer3DModel) -> None:
    """Self-attention starts with one head in three at the tokens around it, one at those of other times, and one free.

    A key with the bias (4, 0) in a plane that turns by f a token, and a query with that bias turned by f δ, add 16 cos(f (δ - p)) to the
    logit before the norm, p being the key's distance: most at p = δ. Half a turn of the fastest plane away is every other time.
    """
    shifts = (0.0, 0.0, 0.0), (math.pi, 0.0, 0.0), ()  # δ in time, rows, columns
    for block in model.blocks:
        attention, size = block.attn1, model.config.attention_head_dim
        space = 2 * (size // 6)
        starts, widths = (0, size - 2 * space, size - space), (size - 2 * space, space, space)
        for norm in (attention.norm_q, attention.norm_k):
            nn.init.constant_(norm.weight, 1.5)
        for head in range(attention.heads):
            for start, width, delta in zip(starts, widths, shifts[head % 3], strict=False):
                for plane, speed in enumerate(frequencies(width)[:2].tolist()):
                    at = slice(head * size + start + 2 * plane, head * size + start + 2 * plane + 2)
                    attention.to_k.bias[at] = torch.tensor([4.0, 0.0])
                    attention.to_q.bias[at] = 4 * torch.tensor([math.cos(speed * delta), math.sin(speed * delta)])


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
    codec = PatchCodec(PatchCodecConfig(latent_channels=cfg.latent_channels, frames=4)).fit(pool.video[:600])
    seed_everything(seed)
    dataset = TensorDataset(codec.encode(pool.video), tokenize(pool.captions))
    return {"transformer": fit(build(cfg, codec), flow_loss, Batches(dataset, cfg.batch, seed), cfg, "transformer"), "codec": codec, "judge": judge}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def samples(models: dict[str, nn.Module], captions: list[str], steps: int = 16, **options) -> Tensor:
    codec, side = models["codec"].config, SIZE // models["codec"].config.patch
    grid = (FRAMES // codec.frames, side, side)
    noise = torch.randn(len(captions), codec.latent_channels, *grid, generator=torch.Generator().manual_seed(TEST))
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
    """Two clips a row."""
    real = held_out()
    chosen = (5 * torch.arange(16) % 48).sort().values
    captions = [real.captions[i] for i in chosen]
    video = samples(models, captions, 20)
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, clip, text in zip(figure.subplots(8, 2).ravel(), video, captions, strict=True):
        axes.imshow(np.hstack(((clip.permute(1, 2, 3, 0) + 1) / 2).numpy()))
        axes.set_title(text, fontsize=8, pad=2)
        axes.axis("off")
    return figure
