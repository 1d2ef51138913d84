import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from common.attention import Attention
from common.diffusion import (
    Euler,
    Schedule,
    UniPC,
    ddim_step,
    ddim_timesteps,
    flow_sample,
    flow_sigmas,
    guided,
    invert,
    resolution_shift,
    sample,
    shifted,
)
from tests.goldens import cases

SCHEDULERS = [case for name in ("_schedulers", "_tiny_sd") for case in cases(name)]
of = lambda kind: [case for case in SCHEDULERS if case.meta["reference"].startswith("diffusers") and kind in case.meta["reference"].split()]
named = lambda case: case.name
FLOWS = of("FlowMatchEulerDiscreteScheduler")
UNIPC = [case for case in cases("_wan") if "UniPC" in case.meta["module"]]
TRAJECTORIES = [case for case in of("DDIMScheduler") if "constructor" in case.meta]
FUNCTIONS = [case for case in of("DDIMScheduler") if "constructor" not in case.meta]
LIBRARY = {  # what diffusers' DDIMScheduler takes where its config is silent
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


def closeness(case, dtype):
    tolerance = case.meta["tolerance"]
    tolerance = float(tolerance.get(dtype, tolerance.get(dtype.replace("loat", ""))))

    def close(actual, name, expected=None):
        expected = case.tensors[name] if expected is None else expected
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")

    return close


class Replay(nn.Module):
    """Returns the recorded outputs one after the other, and keeps the timesteps it was given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.timesteps = list(outputs), []
        self.site = Attention(1)
        self.steps = []

    def forward(self, z, t):
        self.timesteps.append(t[0].item())
        self.steps.append(self.site.step)
        return self.outputs[len(self.timesteps) - 1]


# ---- diffusion against the goldens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRAJECTORIES, ids=named)
def test_golden_ddim(case):
    close, t = closeness(case, "float64"), case.tensors
    schedule = Schedule.from_config(LIBRARY | case.meta["constructor"])
    steps, eta = case.meta["num_inference_steps"], case.meta["eta"]
    close(schedule.alphas_cumprod, "alphas_cumprod")
    close(torch.tensor([schedule.alpha(-1)]), "final_alpha_cumprod")
    assert ddim_timesteps(schedule, steps) == t["timesteps"].tolist()

    z, stride = t["init_sample"], schedule.num_train_timesteps // steps
    for i, timestep in enumerate(t["timesteps"].tolist()):
        output = t["model_outputs"][i]
        close(schedule.x0_and_noise(output, z, timestep)[0], "pred_x0", t["pred_x0"][i])
        noise = t["variance_noise"][i] if "variance_noise" in t else None
        z = ddim_step(schedule, output, z, timestep, timestep - stride, eta=eta, noise=noise)
        close(z, "prev_samples", t["prev_samples"][i])

    if eta == 0:
        trajectory, model = [], Replay(t["model_outputs"])
        last = sample(model, t["init_sample"], schedule, steps, after=lambda i, z: trajectory.append(z))
        close(torch.stack(trajectory), "prev_samples")
        close(last, "last", t["prev_samples"][-1])
        assert model.timesteps == t["timesteps"].tolist() and model.steps == list(range(steps)) and model.site.step is None

    clean, noise, steps = (t[f"add_noise/{name}"] for name in ("clean", "noise", "timesteps"))
    close(schedule.add_noise(clean, noise, steps), "add_noise/out")
    close(schedule.velocity(clean, noise, steps), "velocity/out")


@pytest.mark.parametrize("case", of("DDIMInverseScheduler"), ids=named)
def test_golden_inversion(case):
    close, t = closeness(case, "float64"), case.tensors
    schedule = Schedule.from_config(LIBRARY | case.meta["constructor"])
    close(schedule.alphas_cumprod, "alphas_cumprod")
    close(torch.tensor([schedule.alpha(-1)]), "initial_alpha_cumprod")
    trajectory, steps, model = [], case.meta["num_inference_steps"], Replay(t["model_outputs"])
    invert(model, t["init_sample"], schedule, steps, after=lambda i, z: trajectory.append(z))
    close(torch.stack(trajectory), "prev_samples")
    assert model.timesteps == t["timesteps"].tolist() and model.steps == list(range(steps))[::-1] and model.site.step is None
    for i, z in enumerate([t["init_sample"], *trajectory[:-1]]):
        timestep = t["timesteps"][i].item()
        close(schedule.x0_and_noise(t["model_outputs"][i], z, timestep - schedule.num_train_timesteps // steps)[0], "pred_x0", t["pred_x0"][i])


@pytest.mark.parametrize("case", FUNCTIONS, ids=named)
def test_golden_ddim_of_a_function(case):
    close, t, config = closeness(case, "float32"), case.tensors, case.meta["config"]
    start, end = map(float, re.findall(r"\.\d+", config["betas"]))
    schedule = Schedule.from_config(config | {"beta_schedule": config["betas"].split()[0], "beta_start": start, "beta_end": end})
    close(schedule.alphas_cumprod, "alphas_cumprod")
    assert ddim_timesteps(schedule, config["steps"]) == t["timesteps"].tolist()
    trajectory = [t["x_T"]]
    model = lambda x, step: 0.7 * x.sin() + 0.2 * (step / 200).cos()[:, None, None, None] * x.roll(1, -1)
    sample(model, t["x_T"], schedule, config["steps"], after=lambda i, z: trajectory.append(z))
    close(torch.stack(trajectory), "trajectory")
    close(schedule.add_noise(t["x0"], t["noise"], t["t_add"]), "x_t")
    close(schedule.velocity(t["x0"], t["noise"], t["t_add"]), "velocity")


# ---- diffusion against closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_inverted(prediction):
    """A model that knows the noise: x₀ and ε come back, whatever it predicts, for one timestep or one per sample."""
    schedule = Schedule(prediction_type=prediction)
    x0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    for t in (250, torch.tensor([3, 500, 990])):
        output, z = schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t)
        for actual, expected in zip(schedule.x0_and_noise(output, z, t), (x0, noise), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        for to in (-1, 100):
            if isinstance(t, int):
                torch.testing.assert_close(ddim_step(schedule, output, z, t, to), schedule.add_noise(x0, noise, to), rtol=1e-9, atol=1e-9)


def test_zero_snr():
    """The last level is noise alone, the first stays."""
    plain, rescaled = Schedule(), Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    z, v = torch.randn(2, 1, 3)
    x0, noise = rescaled.x0_and_noise(v, z, 999)
    assert torch.equal(x0, -v) and torch.equal(noise, z)


def test_ancestral_steps_have_the_posterior_of_ddpm():
    """η = 1 between neighbours: mean and variance of q(z_{t-1} | z_t, x₀) as DDPM has them (Ho et al. 2020, eqs. 6 and 7)."""
    schedule, t = Schedule(), 300
    x0, noise, n = torch.randn(3, 1, 8, dtype=torch.float64)
    a, before = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[t - 1].item()
    beta = 1 - a / before
    z = schedule.add_noise(x0, noise, t)
    mean = before**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - before) / (1 - a) * z
    std = ((1 - before) / (1 - a) * beta) ** 0.5
    torch.testing.assert_close(ddim_step(schedule, noise, z, t, t - 1, eta=1.0, noise=n), mean + std * n, rtol=1e-9, atol=1e-9)


def gaussian(schedule, variance=0.25, mean=0.3):
    """The exact noise of Gaussian data: E[ε | z_t] = √(1-ā) (z - √ā m) / (ā s² + 1 - ā)."""

    def model(z, t):
        a = schedule.alphas_cumprod.double()[t].reshape(-1, *[1] * (z.ndim - 1))
        return (1 - a) ** 0.5 * (z - a**0.5 * mean) / (a * variance + 1 - a)

    return model


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_gaussian_data(eta):
    """Started from noise, the samples have the data's mean and variance."""
    schedule = Schedule()
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(gaussian(schedule), noise, schedule, 250, eta=eta, generator=torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.var().item() == pytest.approx(0.25, abs=0.02)


def test_seeds_repeat_samples():
    schedule = Schedule()
    draw = lambda seed: sample(gaussian(schedule), torch.ones(1, 4).double(), schedule, 10, eta=1.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def wavy(z, t):
    """A smooth noise function without closed solution."""
    t = t.reshape(-1, *[1] * (z.ndim - 1))
    return 0.7 * torch.sin(z) + 0.2 * torch.cos(t / 200) * z.roll(1, -1)


def round_trip(model, steps, **kwargs):
    """The largest error of inversion followed by sampling."""
    schedule = Schedule()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (sample(model, invert(model, x, schedule, steps, **kwargs), schedule, steps) - x).abs().max().item()


def test_round_trips():
    """The usual inversion is of first order in the step; a fixed point is exact; so is any inversion of a noise that never changes."""
    errors = [round_trip(wavy, steps) for steps in (50, 100, 200)]
    assert errors[0] < 0.3 and all(0.4 < fine / coarse < 0.6 for coarse, fine in pairwise(errors))
    refined = [round_trip(wavy, 50, refine=k) for k in (1, 3, 8, 30)]
    assert refined[0] < errors[0] / 3 and refined[1] < refined[0] / 10 and refined[3] < 1e-9
    constant = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert round_trip(lambda z, t: constant, 20) < 1e-9


def test_inversion_at_the_current_level():
    """ε(z_t, t) moves z from t to t + c, beginning at the first timestep of the grid and ending at T - 1: written out."""
    schedule = Schedule()
    a = schedule.alphas_cumprod.double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    z = x
    for t in range(1, 1000, 20):
        to = min(t + 20, 999)
        e = wavy(z, torch.tensor([t]))
        z = a[to].sqrt() * (z - (1 - a[t]).sqrt() * e) / a[t].sqrt() + (1 - a[to]).sqrt() * e
    torch.testing.assert_close(invert(wavy, x, schedule, 50, at="current"), z, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="belongs to at='next'"):
        invert(wavy, x, schedule, 50, at="current", refine=1)


@pytest.mark.parametrize("refine", [0, 2])
def test_inversion_of_a_velocity_model(refine):
    """The same noise, predicted as velocity at the state the model sees, gives the same path."""
    noise = Schedule()
    velocity = Schedule(prediction_type="v_prediction")
    x, steps = torch.randn(1, 2, 3, 3, dtype=torch.float64), 10
    stride = 1000 // steps
    calls = iter([level for t in range(1, 1000, stride) for level in (t - stride, *[t] * refine)])

    def model(z, t):
        a = velocity.alpha(next(calls))
        return (wavy(z, t) - (1 - a) ** 0.5 * z) / a**0.5  # v = (ε - √(1-ā) z) / √ā

    torch.testing.assert_close(invert(model, x, velocity, steps, refine=refine), invert(wavy, x, noise, steps, refine=refine), rtol=1e-9, atol=1e-9)


def test_starting_late_and_editing():
    schedule = Schedule()
    z = torch.randn(1, 4, dtype=torch.float64)
    middle = {}
    whole = sample(wavy, z, schedule, 10, after=lambda i, z: middle.update({i: z}))
    assert torch.equal(sample(wavy, middle[5], schedule, 10, start=6), whole)
    edited = sample(wavy, z, schedule, 10, after=lambda i, z: middle[2] * 0 if i == 2 else None)
    assert torch.equal(edited, sample(wavy, z * 0, schedule, 10, start=3))


def test_samplers_are_differentiable():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, 4, dtype=torch.float64)
    run = lambda scale: sample(lambda z, t: scale * z, z, Schedule(), 4).sum()
    assert torch.autograd.gradcheck(run, scale)


def test_wrong_schedules():
    with pytest.raises(ValueError, match="beta_schedule 'cosine' is not supported"):
        Schedule(beta_schedule="cosine")
    with pytest.raises(ValueError, match="between 1 and num_train_timesteps"):
        ddim_timesteps(Schedule(), 1001)


# ---- flow matching ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FLOWS, ids=named)
def test_golden_flow(case):
    close, t, config = closeness(case, "float32"), case.tensors, case.meta["constructor"]
    steps = case.meta["num_inference_steps"]
    dynamic = config.get("use_dynamic_shifting", False)
    shift = math.exp(case.meta["mu"]) if dynamic else config["shift"]
    sigmas = flow_sigmas(steps, shift, "plain" if case.meta["sigmas"] else "library")
    close(torch.tensor(sigmas), "sigmas")
    close(1000 * torch.tensor(sigmas[:-1]), "timesteps")
    train = torch.tensor(flow_sigmas(config["num_train_timesteps"], 1.0 if dynamic else shift)[:-1])
    close(train, "train_sigmas")
    close(1000 * train, "train_timesteps")
    trajectory, model = [], Replay(t["model_outputs"])
    flow_sample(model, t["init_sample"], sigmas, after=lambda i, x: trajectory.append(x))
    close(torch.stack(trajectory), "prev_samples")
    close(torch.tensor(model.timesteps), "timesteps")
    assert model.steps == list(range(steps)) and model.site.step is None


@pytest.mark.parametrize("case", UNIPC, ids=named)
def test_golden_unipc(case):
    meta, t = case.meta, case.tensors
    tolerance = float(meta["tolerance"]["float32"])
    sigmas = flow_sigmas(meta["n"], meta["constructor"]["flow_shift"], "unipc")
    torch.testing.assert_close(torch.tensor(sigmas), t["aux.sigmas"], rtol=0, atol=1e-6)
    timesteps = [int(1000 * sigma) for sigma in sigmas[:-1]]
    assert timesteps == t["aux.timesteps"].tolist()

    def velocity(x, step):
        return 0.4 * x + 0.3 * x.tanh() * step.reshape(-1, 1, 1, 1, 1) / 1000 + 0.2 * x.mean((2, 3, 4), keepdim=True) - 0.1

    trajectory = []
    flow_sample(velocity, t["in.x"], sigmas, timesteps=timesteps, solver=UniPC, start=meta["start_index"], after=lambda i, x: trajectory.append(x))
    torch.testing.assert_close(torch.stack(trajectory), t["out.trajectory"], rtol=0, atol=tolerance)


def gaussian_velocity(x, t, variance=0.25, mean=0.3):
    """E[ε - x₀ | x_σ] of Gaussian data."""
    sigma = (t / 1000).reshape(-1, *[1] * (x.ndim - 1))
    centred = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * variance + sigma**2)
    return (sigma - (1 - sigma) * variance) * centred - mean


def test_solvers_converge_at_their_order():
    """Against the exact flow of Gaussian data, x_σ = (1-σ) m + √((1-σ)² s² + σ²) ε: Euler is of first order in the step, UniPC of second."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = lambda sigma: (1 - sigma) * 0.3 + ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5 * noise

    def error(solver, steps):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        return (flow_sample(gaussian_velocity, exact(0.9), sigmas, solver=solver) - exact(0.1)).abs().max().item()

    assert error(Euler, 40) / error(Euler, 80) == pytest.approx(2, abs=0.1)
    assert error(UniPC, 40) / error(UniPC, 80) == pytest.approx(4, abs=0.4)
    assert error(UniPC, 40) < error(Euler, 40) / 10


@pytest.mark.parametrize("solver", [Euler, UniPC])
def test_whole_flows(solver):
    """From pure noise to the data, m + s ε."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = flow_sample(gaussian_velocity, noise, flow_sigmas(200, 3.0), solver=solver)
    torch.testing.assert_close(x, 0.3 + 0.5 * noise, rtol=0, atol=0.02)


def test_grids():
    assert flow_sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted(0.5, 3.0) == pytest.approx(0.75)
    assert flow_sigmas(2, 3.0) == pytest.approx([1.0, 0.75, 0.0])
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        assert math.log(resolution_shift(tokens)) == pytest.approx(mu)
        e, sigma = math.exp(mu), 0.37
        assert shifted(sigma, resolution_shift(tokens)) == pytest.approx(e / (e + 1 / sigma - 1))
    assert 1000 * flow_sigmas(25, 5.0, "library")[-2] == pytest.approx(24.41, abs=0.01)  # shifted twice; once would be 4.98


def test_starting_a_flow_late():
    x = torch.randn(2, 4, dtype=torch.float64)
    middle = {}
    whole = flow_sample(gaussian_velocity, x, flow_sigmas(6), after=lambda i, x: middle.update({i: x}))
    assert torch.equal(flow_sample(gaussian_velocity, middle[3], flow_sigmas(6), start=4), whole)


# ---- guidance --------------------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def forward(self, z, t, context, bias):
        self.rows = context.shape[0]
        return z * context[:, :1] + t[:, None] + bias


def test_guidance_by_hand():
    model, z, t = Linear(), torch.randn(3, 4), torch.tensor([1, 2, 3])
    condition = {"context": torch.randn(3, 2), "bias": torch.randn(3, 1)}
    null = {"bias": torch.randn(3, 1), "context": torch.randn(3, 2)}
    conditional = guided(model, condition)(z, t)
    assert model.rows == 3
    unconditional = guided(model, null)(z, t)
    torch.testing.assert_close(conditional, model(z, t, **condition))
    actual = guided(model, condition, null, 7.5)(z, t)
    assert model.rows == 6
    torch.testing.assert_close(actual, unconditional + 7.5 * (conditional - unconditional))
    with pytest.raises(ValueError, match="needs the null condition"):
        guided(model, condition, scale=2.0)


def test_guided_models_hear_the_step():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.site, self.steps = Attention(1), []

        def forward(self, z, t):
            self.steps.append(self.site.step)
            return z

    model = Model()
    sample(guided(model, {}), torch.randn(1, 2), Schedule(), 3)
    assert model.steps == [0, 1, 2] and model.site.step is None
    with pytest.raises(KeyError):
        sample(guided(model, {"context": torch.randn(1, 2)}, {}, 2.0), torch.randn(1, 2), Schedule(), 3)
