"""Train MoH beside multi-head attention at equal steps and rates: a ViT and a DiT on digits, a Llama on English text and its conversion.

With --data DIR, train a published MoH-ViT on ImageNet instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.config import RunConfig
from common.data import Batches, digits, images, text
from common.diffusion import Schedule
from common.errors import UserError
from common.gpu import seed_everything
from common.layers import init_by_fan_in
from common.loop import each, fit, load_run
from papers.moh.model import AggregatedAttention, Block, Budget, CosineAttention, DiT, LlamaForCausalLM, balance_loss, initialise, vit


@dataclass
class Config(RunConfig):
    """steps, batch and lr are those of the digits; the text runs have their own."""

    variant: str = "vit_b_75"  # published model, for --data and --weights
    beta: float = 0.01  # weight of the load-balance loss
    dim: int = 48  # width of the ViT and the DiT on digits
    depth: int = 3  # their layers, of 8 heads like those of the text model
    text_dim: int = 96  # width of the text model
    text_depth: int = 3  # its layers
    context: int = 128  # tokens
    text_steps: int = 250
    text_batch: int = 8
    text_lr: float = 1e-2
    vocab: int = 512  # of the byte-level BPE
    few_seeds: int = 3  # the first of the seeds, for the text and the diffusion runs
    tune: float = 0.15  # share of text_steps after the conversion
    lengths: tuple[int, int, int, int] = (128, 256, 512, 1024)  # tokens of the timed layers
    timed_head_dim: int = 64  # their head width
    repeats: int = 9  # of each timing


SCALES = {
    "smoke": Config(
        seeds=(0,), steps=2, batch=8, dim=16, depth=2, text_dim=16, text_depth=1, context=16, text_steps=2,
        text_batch=2, tune=1.0, lengths=(2, 4, 8, 16), timed_head_dim=2, repeats=1, processes=1,
    ),
    "small": Config(seeds=(0, 1, 2, 3), steps=400, batch=32, lr=8e-3),
    "full": Config(seeds=(0,), steps=375_300, batch=1024, lr=1e-3, lr_min=1e-5, warmup=5 / 300, clip=1.0, workers=8, save_every=1 / 300),
}  # fmt: skip

VISION = {
    "mha": Budget(8),
    "moh_75": Budget(8, 2, 4),
    "moh_50": Budget(8, 2, 2),
    "no_shared": Budget(8, 0, 6),
    "single_stage": Budget(8, 2, 4, two_stage=False),
    **{f"shared_{s}": Budget(8, s, 6 - s) for s in (1, 3, 4)},
    "unbalanced": Budget(8, 2, 4),  # beta 0
}
DIFFUSION = {"mha": Budget(8), "moh_90": Budget(8, 4, 3), "moh_75": Budget(8, 2, 3)}  # the last layer keeps all heads, as in DiT-S/2
TEXT = {"mha": Budget(8), "moh_75": Budget(8, 2, 4), "moh_50": Budget(8, 2, 2)}
CONVERTED = Budget(8, 4, 2, router="norm")  # LLaMA3-8B's proportions
NOISE = Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def heads(*runs: tuple[int, int | None, int, int]) -> list[Budget]:
    """One budget a layer from (layers, heads, shared, routed)."""
    return [Budget(h, shared, routed) for layers, h, shared, routed in runs for _ in range(layers)]


TRANSNEXT = {  # layers, heads, shared, routed of the four stages; the width is 24 a head
    "vit_b_75": [(5, 4, 4, 0), (5, 8, 8, 0), (23, 16, 4, 8), (5, 32, 5, 16)],
    "vit_b_50": [(5, 4, 2, 2), (5, 8, 2, 4), (23, 16, 2, 6), (5, 32, 4, 8)],
    "vit_s_80": [(5, 3, 3, 0), (5, 6, 6, 0), (22, 12, 3, 6), (5, 24, 8, 12)],
    "vit_s_75": [(5, 3, 3, 0), (5, 6, 6, 0), (22, 12, 3, 6), (5, 24, 4, 12)],
}
DITS = {  # width, head width, budgets
    "dit_xl_90": (1152, 72, heads((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3))),
    "dit_xl_75": (1152, 72, heads((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2))),
    "dit_l_90": (1024, 64, heads((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3))),
    "dit_l_75": (1024, 64, heads((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4))),
    "dit_b_90": (768, 64, heads((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0))),
    "dit_b_75": (768, 64, heads((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0))),
    "dit_s_90": (384, 64, heads((8, 6, 3, 2), (4, 6, 6, 0))),
    "dit_s_75": (384, 64, heads((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0))),
}


# ---- models -----------------------------------------------------------------------------------------------------------------------------


class ConvGLU(nn.Module):
    """fc2(gelu(dwconv(u)) · v), [u, v] = fc1(x), with a depthwise 3x3 convolution over the map."""

    def __init__(self, dim: int, hidden: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        u, v = self.fc1(x).chunk(2, -1)
        u = self.dwconv["dwconv"](rearrange(u, "b (y x) c -> b c y x", y=self.grid[0]))
        return self.fc2(F.gelu(rearrange(u, "b c y x -> b (y x) c")) * v)


class TransNeXt(nn.Module):
    """MoH-ViT: TransNeXt with MoH in every stage. Four stages of 1/4, 1/8, 1/16 and 1/32 of the image's size; the last attends to all tokens."""

    def __init__(self, dims: Sequence[int], budgets: Sequence[Sequence[Budget]], classes: int = 1000, size: int = 224, drop_path: float = 0.0):
        super().__init__()
        depth, done = sum(map(len, budgets)), 0
        for s, (dim, stage, ratio, sr) in enumerate(zip(dims, budgets, (8, 8, 4, 4), (8, 4, 2, 1), strict=True), 1):
            channels, kernel, stride = (3, 7, 4) if s == 1 else (dims[s - 2], 3, 2)
            size = (size + stride - 1) // stride
            grid, blocks = (size, size), nn.ModuleList()
            for budget in stage:
                attn = CosineAttention(dim, budget, grid, done) if sr == 1 else AggregatedAttention(dim, budget, grid, sr, done)
                blocks.append(Block(dim, attn, ConvGLU(dim, int(2 * int(dim * ratio) / 3), grid), drop_path * done / max(1, depth - 1)))
                done += 1
            embed = {"proj": nn.Conv2d(channels, dim, kernel, stride, kernel // 2), "norm": nn.LayerNorm(dim)}
            setattr(self, f"patch_embed{s}", nn.ModuleDict(embed))
            setattr(self, f"block{s}", blocks)
            setattr(self, f"norm{s}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], classes)
        initialise(self, partial(nn.init.normal_, std=0.02))

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b classes"]:
        for s in range(1, 5):
            embed, norm = getattr(self, f"patch_embed{s}"), getattr(self, f"norm{s}")
            x = embed["proj"](x)
            height = x.shape[2]
            x = embed["norm"](rearrange(x, "b c y x -> b (y x) c"))
            for block in getattr(self, f"block{s}"):
                x = block(x)
            x = rearrange(norm(x), "b (y x) c -> b c y x", y=height)
        return self.head(x.mean((2, 3)))


def published(variant: str, classes: int = 1000, drop_path: float = 0.0) -> nn.Module:
    """A published size, with random weights."""
    if variant in TRANSNEXT:
        stages = TRANSNEXT[variant]
        return TransNeXt([24 * stage[1] for stage in stages], [heads(stage) for stage in stages], classes, drop_path=drop_path)
    if variant in DITS:
        dim, head_dim, budgets = DITS[variant]
        return DiT(32, 4, 2, dim, budgets, head_dim=head_dim)
    if variant == "llama3_8b":
        return LlamaForCausalLM(160_896, 4096, 14_336, [Budget(32, 16, 8, router="norm")] * 32, 8, rope_theta=500_000.0)
    raise UserError(f"--variant {variant}: take one of {', '.join([*TRANSNEXT, *DITS, 'llama3_8b'])}")


def build(cfg: Config, task: str, variant: str) -> nn.Module:
    """A small model."""
    if task == "vision":
        return init_by_fan_in(vit(8, 1, 2, cfg.dim, [VISION[variant]] * cfg.depth, 10, mlp_ratio=2))
    if task == "diffusion":
        budgets = [DIFFUSION[variant]] * (cfg.depth - 1) + [Budget(8) if variant == "mha" else Budget(8, 8)]
        return DiT(8, 1, 2, cfg.dim, budgets, classes=10, mlp_ratio=2, learn_sigma=False)
    budget = CONVERTED if variant == "converted" else TEXT["mha" if variant == "continued" else variant]
    return init_by_fan_in(LlamaForCausalLM(corpus(cfg).vocab_size, cfg.text_dim, 8 * cfg.text_dim // 3, [budget] * cfg.text_depth))


# ---- data and losses --------------------------------------------------------------------------------------------------------------------


def corpus(cfg: Config) -> text.Corpus:
    return text.corpus(vocab=cfg.vocab, context=cfg.context)


@cache
def digit_set(split: str) -> TensorDataset:
    """The 1200 training or 597 test digits, from -1 to 1, and their labels."""
    d = digits.digits()
    image, label = (d.train_images, d.train_labels) if split == "train" else (d.test_images, d.test_labels)
    return TensorDataset(2 * image - 1, label)


def objective(beta: float, task_loss: Callable[[nn.Module, tuple], Tensor]) -> Callable[[nn.Module, tuple], dict[str, Tensor]]:
    """The task's loss and β times the load balance."""
    return lambda model, batch: {"task": task_loss(model, batch), "balance": beta * balance_loss(model)}


def classify(model: nn.Module, batch: tuple[Float[Tensor, "b c H W"], Int[Tensor, "b"]]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def denoise(model: nn.Module, batch: tuple[Float[Tensor, "b c H W"], Int[Tensor, "b"]]) -> Tensor:
    """Squared error of the predicted noise at random steps of DiT's schedule."""
    image, label = batch
    t, noise = torch.randint(len(NOISE.alphas_cumprod), label.shape, device=label.device), torch.randn_like(image)
    return F.mse_loss(model(NOISE.add_noise(image, noise, t), t, label), noise)


def predict(model: nn.Module, batch: tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]) -> Tensor:
    """Nats a token."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


TASKS = {"vision": classify, "diffusion": denoise, "text": predict}


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    if cfg.data:
        return each(train_imagenet, [(seed,) for seed in cfg.seeds], cfg)
    few = cfg.seeds[: cfg.few_seeds]
    jobs = [(task, variant, seed) for task, variants in (("text", TEXT), ("diffusion", DIFFUSION)) for variant in variants for seed in few]
    jobs += [("vision", variant, seed) for variant in VISION for seed in cfg.seeds]
    each(train_one, jobs, cfg)
    each(train_one, [("text", variant, seed) for variant in ("continued", "converted") for seed in few], cfg)


def train_one(cfg: Config, task: str, variant: str, seed: int) -> None:
    seed_everything(seed)
    model, data_seed = build(cfg, task, variant), seed
    if variant in ("continued", "converted"):
        load_run(model, run_config(cfg, "text", "mha"), f"text/mha/{seed}")  # no parameter is new
        data_seed = 1000 + seed  # windows in an order they have not been seen in
    loss = objective(0.0 if variant == "unbalanced" else cfg.beta, TASKS[task])
    dataset = corpus(cfg) if task == "text" else digit_set("train")
    cfg = run_config(cfg, task, variant)
    fit(model, loss, Batches(dataset, cfg.batch, data_seed), cfg, f"{task}/{variant}/{seed}")


def run_config(cfg: Config, task: str, variant: str) -> Config:
    """Steps, batch and rate of one run."""
    if task != "text":
        return cfg
    tuned = variant in ("continued", "converted")
    steps, lr = (round(cfg.tune * cfg.text_steps), cfg.text_lr / 3) if tuned else (cfg.text_steps, cfg.text_lr)
    return replace(cfg, steps=steps, lr=lr, batch=cfg.text_batch)


def train_imagenet(cfg: Config, seed: int) -> None:
    """MoH-ViT with mixup 0.8, cutmix 1, label smoothing 0.1 and drop path."""
    seed_everything(seed)
    dataset = images.image_folder(cfg.data, "train", images.train_transform())
    model = published(cfg.variant, len(dataset.classes), drop_path=0.45 if "_s_" in cfg.variant else 0.6)
    loss = objective(cfg.beta, images.mixup_cross_entropy(len(dataset.classes)))
    fit(model, loss, Batches(dataset, cfg.batch, seed, cfg.workers), cfg, f"imagenet/{cfg.variant}/{seed}")
