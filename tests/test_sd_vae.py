import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.attention import STAGES, controlled
from common.backbones.sd_vae import AutoencoderConfig, AutoencoderKL, published_name
from tests.controls import Identity
from tests.goldens import cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CASES = [case for name in ("_sd_vae", "_tiny_sd") for case in cases(name) if "AutoencoderKL" in case.meta["reference"]]
SD = AutoencoderConfig(block_out_channels=(8, 12), layers_per_block=2, norm_num_groups=4, latent_channels=3)
FLUX = AutoencoderConfig(
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=6,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)
BOTH = pytest.mark.parametrize("config", [SD, FLUX], ids=["SD", "Flux"])


def random_model(config):
    torch.manual_seed(0)
    return AutoencoderKL(config)


def scaled(config, z):
    return (z - (config.shift_factor or 0)) * config.scaling_factor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@DTYPES
def test_golden(case, dtype):
    long = str(dtype).removeprefix("torch.")
    bits = long.removeprefix("float")
    tolerance = case.meta["tolerance"]
    tolerance = float(re.match(r"[\d.e-]+", str(tolerance.get(long, tolerance.get("f" + bits))))[0])

    def close(actual, name):
        expected = case.tensors[name]
        stored = torch.finfo(expected.dtype).eps  # some float64 results are stored as float32
        torch.testing.assert_close(actual, expected.to(dtype), rtol=stored, atol=tolerance, msg=lambda m: f"{name}: {m}")

    old = "config" in case.meta  # the two sets of cases name their tensors differently
    model = AutoencoderKL.from_config(case.meta["config" if old else "constructor"]).to(dtype)
    model.load_state_dict({name: t.to(dtype) for name, t in case.state("w/" if old else "param/").items()})
    inner = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: inner.update({name: output}))

    image = case.tensors["x" if old else "in/image"].to(dtype).requires_grad_()
    mean, logvar = model.moments(image)
    torch.testing.assert_close(model.encode(image), scaled(model.config, mean))
    if old:
        close(mean, f"mean_f{bits}")
        close(logvar, f"logvar_f{bits}")
        close(model(image), f"decoded_f{bits}")
        return
    z = mean + (logvar / 2).exp() * case.tensors["in/eps"].to(dtype)
    decoded = model.decode(scaled(model.config, z))
    close(decoded, f"out{bits}/decoded")
    if dtype == torch.float64:
        for name in ("encoder.mid_block", "encoder", "decoder.mid_block"):
            close(inner[name], "out64/" + name)
        for actual, name in ((mean, "mean"), (mean, "mode"), (logvar, "logvar"), (z, "sample_with_eps")):
            close(actual, "out64/" + name)
        close((mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)) / 2, "out64/kl_per_image")
        close(torch.autograd.grad((decoded * case.tensors["in/probe"]).sum(), image)[0], "grad64/image")


@BOTH
def test_diffusers_agrees(config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    model = random_model(config)
    theirs = diffusers.AutoencoderKL(**vars(config), **blocks).eval()
    theirs.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 16, 24)
    posterior = theirs.encode(image).latent_dist
    torch.testing.assert_close(model.encode(image), scaled(config, posterior.mode()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(image), theirs.decode(posterior.mode()).sample, rtol=1e-4, atol=1e-5)


@BOTH
def test_samples(config):
    """Over many draws, the latents have the posterior's mean and variance; a seed repeats them."""
    model, image = random_model(config), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        mean, logvar = model.moments(image)
        draws = model.encode(image.expand(4000, -1, -1, -1), torch.Generator().manual_seed(3))
        again = model.encode(image.expand(4000, -1, -1, -1), torch.Generator().manual_seed(3))
    assert torch.equal(draws, again)
    std = config.scaling_factor * (logvar / 2).exp()
    assert ((draws.mean(0, keepdim=True) - scaled(config, mean)).abs() < 5 * std / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0, keepdim=True) / std, torch.ones_like(std), rtol=0, atol=5 / 8000**0.5)


def test_log_variance_is_bounded():
    model = random_model(FLUX)
    with torch.no_grad():
        model.encoder.conv_out.bias[6:] = torch.tensor([1000.0, -1000.0] * 3)
        assert model.moments(torch.randn(1, 3, 8, 8))[1][0, :, 0, 0].tolist() == [20.0, -30.0] * 3


@BOTH
def test_identity_control(config):
    model, image = random_model(config).double(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    plain = model(image)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model(image), plain, rtol=0, atol=1e-12)
    assert torch.equal(model(image), plain)
    shrink = 2 ** (len(config.block_out_channels) - 1)
    sites = [(site.name, site.kind, site.layer, site.grid) for stage, site in control.calls if stage == "output"]
    assert sites == [(f"{part}.mid_block.attentions.0", "self", i, (16 // shrink, 24 // shrink)) for i, part in enumerate(("encoder", "decoder"))]
    assert {stage for stage, _ in control.calls} == set(STAGES)
    assert len(control.calls) == 2 * len(STAGES)


def test_attention_by_hand():
    attention = random_model(SD).encoder.mid_block.attentions[0]
    h = torch.randn(2, 12, 3, 4)
    y = F.group_norm(h, 4, attention.group_norm.weight, attention.group_norm.bias, 1e-6).flatten(2).transpose(1, 2)
    q, k, v = attention.to_q(y), attention.to_k(y), attention.to_v(y)
    expected = h + attention.to_out((q @ k.mT / 12**0.5).softmax(-1) @ v).mT.reshape(h.shape)
    torch.testing.assert_close(attention(h), expected)


def test_published_sizes():
    """SD's has 83,653,863 parameters; Flux's lacks the 1x1 convolutions (8 · 9 and 4 · 5) and has 12 more latent channels."""
    with torch.device("meta"):
        sd = AutoencoderKL(AutoencoderConfig())
        flux = AutoencoderKL(AutoencoderConfig(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False))
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(sd) == 83_653_863
    assert count(flux) == 83_653_863 - 92 + 9 * 512 * (24 + 12) + 24


def test_published_names():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    config = AutoencoderConfig()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), diffusers.AutoencoderKL(**vars(config), **blocks)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {name: t.shape for name, t in theirs.state_dict().items()}


def original_names():
    """The modules of SD's original autoencoder: encoder levels and decoder levels both counted from the image."""

    def resnet(prefix, wider):
        return [f"{prefix}.{name}" for name in ("norm1", "conv1", "norm2", "conv2", *(["nin_shortcut"] if wider else []))]

    names = ["quant_conv", "post_quant_conv"]
    for part in ("encoder", "decoder"):
        names += [f"{part}.{name}" for name in ("conv_in", "norm_out", "conv_out", *(f"mid.attn_1.{p}" for p in ("norm", "q", "k", "v", "proj_out")))]
        names += resnet(f"{part}.mid.block_1", False) + resnet(f"{part}.mid.block_2", False)
    for level in range(4):  # widths 128, 256, 512, 512
        for j in range(2):
            names += resnet(f"encoder.down.{level}.block.{j}", j == 0 and level in (1, 2))
        for j in range(3):
            names += resnet(f"decoder.up.{level}.block.{j}", j == 0 and level in (0, 1))
        names += [f"encoder.down.{level}.downsample.conv"] if level < 3 else []
        names += [f"decoder.up.{level}.upsample.conv"] if level > 0 else []
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_original_names():
    with torch.device("meta"):
        ours = list(AutoencoderKL(AutoencoderConfig()).state_dict())
    assert sorted(published_name("first_stage_model." + name) for name in original_names()) == sorted(ours)
    assert [published_name(name) for name in ours] == ours
    pairs = {
        "decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.up.0.block.2.conv1.bias": "decoder.up_blocks.3.resnets.2.conv1.bias",
        "decoder.up.1.block.0.nin_shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight": "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid_block.attentions.0.query.bias": "encoder.mid_block.attentions.0.to_q.bias",
        "decoder.mid_block.attentions.0.proj_attn.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
    }
    assert {name: AutoencoderKL.rename(name) for name in pairs} == pairs


def test_from_pretrained(tmp_path):
    """An old directory, whose attention has other names and 1x1 convolutions, with the scale in its configuration."""
    model = random_model(SD)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = lambda name: re.sub(r"to_(q|k|v|out\.0)", lambda match: names[match[0]], name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **vars(SD), "scaling_factor": 0.13025}))
    as_kernel = lambda t: t[..., None, None].clone() if t.ndim == 2 else t
    save_file({old(name): as_kernel(t) for name, t in model.state_dict().items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    image = torch.randn(1, 3, 8, 8)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode(image), model.encode(image) * 0.13025 / 0.18215)
    torch.testing.assert_close(loaded(image), model(image))


def test_parts_of_other_models_are_left():
    for name in ("model.diffusion_model.out.2.bias", "cond_stage_model.model.ln_final.bias", "loss.logvar", "alphas_cumprod"):
        assert AutoencoderKL.rename(name) is None
    assert AutoencoderKL.rename("first_stage_model.quant_conv.bias") == "quant_conv.bias"
