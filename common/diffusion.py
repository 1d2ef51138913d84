"""Noise schedules and samplers: diffusion (DDPM, DDIM and its inversion), flow matching (Euler, UniPC), classifier-free guidance.

Diffusion: z_t = √ā_t x₀ + √(1-ā_t) ε, ā_t = Π (1 - β). The model predicts ε, or x₀, or v = √ā_t ε - √(1-ā_t) x₀. DDIM moves from t to t':

    z' = √ā' x₀ + √(1-ā'-σ²) ε + σ n,   σ² = η² (1-ā')/(1-ā) (1 - ā/ā')       η = 0: deterministic; η = 1: the ancestral step of DDPM

Flow matching: x_σ = (1-σ) x₀ + σ ε, the model predicts the velocity v = ε - x₀, and dx/dσ = v. Shifting spends more of the steps where it
is noisy: σ ← s σ / (1 + (s-1) σ).

Guidance: e_u + w (e_c - e_u).

A sampler takes any model(z, t), t one per sample. If it is a module, its attention sites are told the running step (`Site.step`, 0 the
noisiest). `after(i, z)` is called with the result of step i and may return another z to go on with. Samplers are differentiable: use them
under torch.no_grad() if no gradient is wanted.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.attention import at_step

Model = Callable[[Tensor, Tensor], Tensor]
After = Callable[[int, Tensor], Tensor | None]


# ---- the diffusion schedule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """ā_t for t = 0 ... T-1, and what the model predicts. The fields are those of the published scheduler_config.json; the defaults are
    Stable Diffusion's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    rescale_betas_zero_snr: bool = False  # ā_{T-1} = 0: the last level is pure noise
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    clip_sample: bool = False  # x₀ within [-1, 1]
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    steps_offset: int = 1  # added to a leading grid
    set_alpha_to_one: bool = False  # ā before step 0: 1, or ā_0

    def __post_init__(self):
        choices = {
            "beta_schedule": ("linear", "scaled_linear"),
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "timestep_spacing": ("leading", "trailing"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported: choose one of {', '.join(known)}")

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """From a scheduler_config.json; what does not concern the schedule is left out."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, "T"]:
        """ā, in float32 like the tables the published models were trained with."""
        if self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float32)
        else:
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps, dtype=torch.float32) ** 2
        if self.rescale_betas_zero_snr:
            root = torch.cumprod(1 - betas, 0).sqrt()
            table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            betas = 1 - torch.cat([table[:1], table[1:] / table[:-1]])  # back to β, which rounds like the published tables
        return torch.cumprod(1 - betas, 0)

    def alpha(self, t: int | Int[Tensor, "b"], like: Float[Tensor, "b *n"] | None = None) -> float | Float[Tensor, "b *#n"]:
        """ā_t as a number, or for one t per sample as a tensor that broadcasts against `like`. Below 0 the level before the first step,
        above T-1 the last."""
        if isinstance(t, int):
            before = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0].item()
            return before if t < 0 else self.alphas_cumprod[min(t, self.num_train_timesteps - 1)].item()
        a = self.alphas_cumprod.to(t.device)[t]
        return a.to(torch.promote_types(like.dtype, a.dtype)).reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Float[Tensor, "b *n"], noise: Float[Tensor, "b *n"], t: int | Int[Tensor, "b"]) -> Float[Tensor, "b *n"]:
        """z_t."""
        a = self.alpha(t, x0)
        return (a**0.5 * x0 + (1 - a) ** 0.5 * noise).to(x0.dtype)

    def velocity(self, x0: Float[Tensor, "b *n"], noise: Float[Tensor, "b *n"], t: int | Int[Tensor, "b"]) -> Float[Tensor, "b *n"]:
        """v_t."""
        a = self.alpha(t, x0)
        return (a**0.5 * noise - (1 - a) ** 0.5 * x0).to(x0.dtype)

    def target(self, x0: Float[Tensor, "b *n"], noise: Float[Tensor, "b *n"], t: int | Int[Tensor, "b"]) -> Float[Tensor, "b *n"]:
        """What the model is trained to predict."""
        return {"epsilon": lambda: noise, "v_prediction": lambda: self.velocity(x0, noise, t), "sample": lambda: x0}[self.prediction_type]()

    def x0_and_noise(self, output: Float[Tensor, "b *n"], z: Float[Tensor, "b *n"], t: int | Int[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        """x₀ and ε according to the model's output at z_t; only x₀ is clipped."""
        a = self.alpha(t, z)
        if self.prediction_type == "epsilon":
            x0, noise = (z - (1 - a) ** 0.5 * output) / a**0.5, output
        elif self.prediction_type == "v_prediction":
            x0, noise = a**0.5 * z - (1 - a) ** 0.5 * output, a**0.5 * output + (1 - a) ** 0.5 * z
        else:
            x0, noise = output, (z - a**0.5 * output) / (1 - a) ** 0.5
        return (x0.clamp(-1, 1) if self.clip_sample else x0).to(z.dtype), noise.to(z.dtype)


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps at which the model is called, descending. The step at t goes to t - T // steps, whatever the next timestep is."""
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps = {steps} must be between 1 and num_train_timesteps = {total}")
    if schedule.timestep_spacing == "trailing":
        return [int(t) - 1 for t in np.arange(total, 0, -total / steps)[:steps].round()]  # numpy's rounding decides ties in diffusers
    return [k * (total // steps) + schedule.steps_offset for k in reversed(range(steps))]


def ddim_step(
    schedule: Schedule,
    output: Float[Tensor, "b *n"],
    z: Float[Tensor, "b *n"],
    t: int,
    to: int,
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "b *n"] | None = None,
) -> Float[Tensor, "b *n"]:
    """From z_t to z_to, given the model's output at z_t. noise: n, needed where η > 0."""
    x0, e = schedule.x0_and_noise(output, z, t)
    a, a_to = schedule.alpha(t), schedule.alpha(to)
    variance = eta**2 * (1 - a_to) / (1 - a) * (1 - a / a_to)
    z = a_to**0.5 * x0 + (1 - a_to - variance) ** 0.5 * e
    return z if eta == 0 else z + variance**0.5 * noise


def sample(
    model: Model,
    z: Float[Tensor, "b *n"],
    schedule: Schedule,
    steps: int,
    *,
    start: int = 0,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    after: After | None = None,
) -> Float[Tensor, "b *n"]:
    """DDIM (η = 1: DDPM) from noise to x₀. start: the number of the first step, whose timestep z belongs to."""
    stride, timesteps = schedule.num_train_timesteps // steps, ddim_timesteps(schedule, steps)
    for i in _told(model, range(start, steps)):
        t = timesteps[i]
        noise = None if eta == 0 else _noise_like(z, generator)
        z = _edited(after, i, ddim_step(schedule, model(z, _per_sample(t, z)), z, t, t - stride, eta=eta, noise=noise))
    return z


def invert(
    model: Model,
    z: Float[Tensor, "b *n"],
    schedule: Schedule,
    steps: int,
    *,
    at: Literal["current", "next"] = "next",
    refine: int = 0,
    after: After | None = None,
) -> Float[Tensor, "b *n"]:
    """DDIM backwards, from x₀ to the noise from which `sample` returns to it. The steps are numbered like the sampler's: at the same number
    the model is called at the same timestep.

    The exact step from t-c to t needs ε(z_t, t), but z_t is what it computes. Three conventions:
    at = "next", the usual one: ε(z_{t-c}, t).
    at = "current": ε(z_t, t) for the step from t to t+c, the last of which ends at T-1.
    at = "next" with refine > 0: z_t is put into ε and recomputed `refine` times (a fixed point makes the step exact).
    """
    if refine and at == "current":
        raise ValueError("refine repeats the step with the model at its result: it belongs to at='next'")
    stride, timesteps = schedule.num_train_timesteps // steps, ddim_timesteps(schedule, steps)
    for i in _told(model, range(steps - 1, -1, -1)):
        t = timesteps[i]
        level, to = (t - stride, t) if at == "next" else (t, t + stride)
        _, e = schedule.x0_and_noise(model(z, _per_sample(t, z)), z, level)
        noisier = ddim_move(schedule, z, e, level, to)
        for _ in range(refine):
            _, e = schedule.x0_and_noise(model(noisier, _per_sample(t, z)), noisier, t)
            noisier = ddim_move(schedule, z, e, level, to)
        z = _edited(after, i, noisier)
    return z


def ddim_move(schedule: Schedule, z: Float[Tensor, "b *n"], noise: Float[Tensor, "b *n"], level: int, to: int) -> Float[Tensor, "b *n"]:
    """z from one level to any other, up or down, along the noise ε: √ā' (z - √(1-ā) ε)/√ā + √(1-ā') ε."""
    a, a_to = schedule.alpha(level), schedule.alpha(to)
    return a_to**0.5 * (z - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - a_to) ** 0.5 * noise


# ---- flow matching -------------------------------------------------------------------------------------------------------------------


def shifted(sigma: float | Float[Tensor, "*n"], shift: float) -> float | Float[Tensor, "*n"]:
    """s σ / (1 + (s-1) σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(tokens: int) -> float:
    """Flux's shift for an image of so many tokens: e^μ, μ linear through (256, 0.5) and (4096, 1.15)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def flow_sigmas(steps: int, shift: float = 1.0, grid: Literal["plain", "library", "unipc"] = "plain") -> list[float]:
    """σ_0 ... σ_steps = 0 of a sampler, shifted.

    plain: from 1 in equal steps; what pipelines pass to a scheduler.
    library: diffusers' FlowMatchEulerDiscreteScheduler left alone: from 1 to shifted(1/1000) in equal steps, all of which are then shifted,
    so that the end is shifted twice.
    unipc: Wan's, and that of UniPCMultistepScheduler with flow sigmas up to diffusers 0.35 (later ones go from 1 to 0.001): from 0.999 in
    equal steps. The model is given the integer part of 1000 σ.
    """
    if grid == "library":
        last = shifted(1 / 1000, shift)
        raw = [1 - (1 - last) * k / max(steps - 1, 1) for k in range(steps)]
    else:
        raw = [{"plain": 1.0, "unipc": 0.999}[grid] * (1 - k / steps) for k in range(steps)]
    return [shifted(sigma, shift) for sigma in raw] + [0.0]


class Euler:
    """x ← x + (σ_{i+1} - σ_i) v."""

    def __init__(self, sigmas: list[float]):
        self.sigmas = sigmas

    def step(self, i: int, v: Float[Tensor, "b *n"], x: Float[Tensor, "b *n"]) -> Float[Tensor, "b *n"]:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


class UniPC:
    """Unified predictor-corrector of order 2 (Zhao et al. 2023, B(h) = e^h - 1, predicting x₀), the default sampler of Wan.

    With α = 1-σ, λ = log α/σ, h the step in λ and m = x - σ v the prediction of x₀, both parts go from x at σ to

        (σ'/σ) x - α' (e^-h - 1) (m + c)

    where c continues m. The predictor takes c from the last two m, the corrector repeats the step before with the m it led to. The last
    step, to σ = 0, is x₀ = m. Steps are to be made in order, without gaps; the first may have any number.
    """

    def __init__(self, sigmas: list[float]):
        self.sigmas = sigmas
        self.lambdas = [math.log((1 - sigma) / sigma) if 0 < sigma < 1 else math.copysign(math.inf, 0.5 - sigma) for sigma in sigmas]
        self.history: list[Tensor] = []  # the m so far
        self.corrected: Tensor | None = None  # x at the step before
        self.order = 0  # of that step

    def step(self, i: int, v: Float[Tensor, "b *n"], x: Float[Tensor, "b *n"]) -> Float[Tensor, "b *n"]:
        m = x - self.sigmas[i] * v
        if self.order:
            x = self.correct(i, m)
        self.history = [*self.history[-1:], m]
        self.corrected, self.order = x, min(2, len(self.history), len(self.sigmas) - 1 - i)
        return self.move(i, i + 1, x, m, self.predicted(i))

    def predicted(self, i: int) -> Tensor | float:
        """c of the step from i: half the slope of m, times h."""
        if self.order == 1:
            return 0.0
        before, m = self.history
        return 0.5 * self.interval(i, i + 1) / self.interval(i - 1, i) * (m - before)

    def correct(self, i: int, m: Tensor) -> Tensor:
        """The step from i-1 to i once more: c interpolates the m at both of its ends, and at order 2 the one before."""
        last, h = self.history[-1], self.interval(i - 1, i)
        if self.order == 1:
            return self.move(i - 1, i, self.corrected, last, (m - last) / 2)
        e = math.expm1(-h)
        k1 = -e / h - 1
        k2 = -k1 / h - 0.5
        r = -self.interval(i - 2, i - 1) / h
        # a + b = k1/e, r a + b = 2 k2/e
        a = (k1 - 2 * k2) / (e * (1 - r))
        b = k1 / e - a
        return self.move(i - 1, i, self.corrected, last, a / r * (self.history[0] - last) + b * (m - last))

    def interval(self, i: int, j: int) -> float:
        return self.lambdas[j] - self.lambdas[i]

    def move(self, i: int, j: int, x: Tensor, m: Tensor, c: Tensor | float) -> Tensor:
        return self.sigmas[j] / self.sigmas[i] * x - (1 - self.sigmas[j]) * math.expm1(-self.interval(i, j)) * (m + c)


def flow_sample(
    model: Model,
    x: Float[Tensor, "b *n"],
    sigmas: list[float],
    *,
    timesteps: list[float] | None = None,
    solver: type[Euler] | type[UniPC] = Euler,
    start: int = 0,
    after: After | None = None,
) -> Float[Tensor, "b *n"]:
    """From noise to x₀. timesteps: what the model is given at each σ, default 1000 σ. start: the number of the first step, to whose σ x belongs."""
    timesteps = [1000 * sigma for sigma in sigmas] if timesteps is None else timesteps
    stepper = solver(sigmas)
    for i in _told(model, range(start, len(sigmas) - 1)):
        x = _edited(after, i, stepper.step(i, model(x, _per_sample(timesteps[i], x)), x))
    return x


# ---- guidance ------------------------------------------------------------------------------------------------------------------------


def guided(model: nn.Module, condition: dict[str, Tensor], null: dict[str, Tensor] | None = None, scale: float = 1.0) -> "Guided":
    """A model(z, t) for the samplers: `model` under its keyword arguments `condition`, guided away from those of `null`."""
    return Guided(model, condition, null, scale)


class Guided(nn.Module):
    """e_u + w (e_c - e_u), both in one call of the model: the unconditional samples first, then the conditional. See `guided`."""

    def __init__(self, model: nn.Module, condition: dict[str, Tensor], null: dict[str, Tensor] | None, scale: float):
        super().__init__()
        if null is None and scale != 1:
            raise ValueError(f"guidance with scale {scale} needs the null condition")
        self.model, self.scale, self.is_guided = model, scale, null is not None
        self.condition = {name: torch.cat([null[name], value]) for name, value in condition.items()} if self.is_guided else condition

    def forward(self, z: Float[Tensor, "b *n"], t: Tensor) -> Float[Tensor, "b *n"]:
        if not self.is_guided:
            return self.model(z, t, **self.condition)
        unconditional, conditional = self.model(torch.cat([z, z]), torch.cat([t, t]), **self.condition).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


# ---- what the samplers share ---------------------------------------------------------------------------------------------------------


def _told(model: Model, steps: Iterable[int]) -> Iterator[int]:
    """The numbers of the steps; the sites of a module hear each before it is passed on, and None after the last."""
    tell = at_step if isinstance(model, nn.Module) else lambda model, step: None
    try:
        for i in steps:
            tell(model, i)
            yield i
    finally:
        tell(model, None)


def _per_sample(t: float, z: Tensor) -> Tensor:
    """t for every sample; integers stay integers."""
    return torch.full((z.shape[0],), t, device=z.device)


def _noise_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise drawn where the generator lives, so that a seed gives the same on every device."""
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)


def _edited(after: After | None, i: int, z: Tensor) -> Tensor:
    edited = None if after is None else after(i, z)
    return z if edited is None else edited
