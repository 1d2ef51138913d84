import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from common.attention import STAGES, controlled
from common.backbones.sd_unet import UNet2DConditionModel, UNetConfig, published_name
from common.errors import UserError
from tests.controls import Identity
from tests.goldens import cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CASES = [case for name in ("_sd_unet", "_tiny_sd") for case in cases(name) if "UNet2DConditionModel" in case.meta["reference"]]
TWO_LEVELS = {
    "block_out_channels": (16, 24),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SMALL = UNetConfig(**TWO_LEVELS, attention_head_dim=(2, 3), layers_per_block=1)
SMALL_XL = UNetConfig(
    in_channels=9,
    block_out_channels=(8, 16, 24),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 2),
    attention_head_dim=(1, 2, 3),
    cross_attention_dim=12,
    norm_num_groups=4,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
)
SD21 = UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
BOTH = pytest.mark.parametrize("config", [SMALL, SMALL_XL], ids=["SD", "XL inpainting"])


def random_model(config):
    torch.manual_seed(0)
    return UNet2DConditionModel(config)  # torch's initialisation: no parameter is zero but the biases of norms


def random_inputs(config, size=(8, 8)):
    torch.manual_seed(1)
    inputs = {
        "sample": torch.randn(2, config.in_channels, *size),
        "timestep": torch.tensor([17, 921]),
        "encoder_hidden_states": torch.randn(2, 5, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        inputs |= {"text_embeds": torch.randn(2, 10), "time_ids": torch.tensor([[1024.0, 512, 0, 64, 1024, 1024]] * 2)}
    return inputs


# ---- parity ----------------------------------------------------------------------------------------------------------------------------


def meta_model(config):
    with torch.device("meta"):
        return UNet2DConditionModel(config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@DTYPES
def test_golden(case, dtype):
    long = str(dtype).removeprefix("torch.")
    bits = long.removeprefix("float")
    tolerance = case.meta["tolerance"]
    tolerance = float(re.match(r"[\d.e-]+", str(tolerance.get(long, tolerance.get("f" + bits))))[0])
    old = "unet_config" in case.meta  # the two sets of cases name their tensors differently
    names = {"sample": "x", "encoder_hidden_states": "context", "timestep": "timestep", "text_embeds": "pooled_text", "time_ids": "time_ids"}
    names = names if old else {name: f"in/{name}" for name in names}
    inputs = {ours: case.tensors[theirs] for ours, theirs in names.items() if theirs in case.tensors}
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in ("sample", "encoder_hidden_states")]

    model = UNet2DConditionModel.from_config(case.meta["unet_config" if old else "constructor"]).to(dtype)
    model.load_state_dict({name: t.to(dtype) for name, t in case.state("w/" if old else "param/").items()})
    inner = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: inner.update({name: output}))

    def close(actual, name):
        torch.testing.assert_close(actual, case.tensors[name].to(dtype), rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")

    sample = model(**inputs)
    close(sample, f"out_f{bits}" if old else f"out{bits}/out_sample")
    if old:
        close(torch.autograd.grad(sample.square().sum() / 2, leaves[:1])[0], "grad_x_f64")  # float32's was rounded by another processor
    elif dtype == torch.float64:
        for name in (name.removeprefix("out64/") for name in case.tensors if name.startswith("out64/")):
            if name != "out_sample":
                close(inner[name], "out64/" + name)
        grads = torch.autograd.grad((sample * case.tensors["in/probe"]).sum(), leaves)
        close(grads[0], "grad64/sample")
        close(grads[1], "grad64/encoder_hidden_states")


@BOTH
def test_diffusers_agrees(config):
    """Latents of a size that the levels do not halve evenly, too."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    model = random_model(config)
    theirs = diffusers.UNet2DConditionModel(**vars(config)).eval()
    theirs.load_state_dict(model.state_dict())
    for size in ((8, 8), (9, 13)):
        inputs = random_inputs(config, size)
        more = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        expected = theirs(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=more).sample
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (UNetConfig(), 859_520_964),
        (SD21, 865_910_724),
        (SDXL, 2_567_463_684),
        (UNetConfig(in_channels=9), 859_535_364),  # SD 1.5 inpainting: 5 · 9 · 320 more
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL", "inpainting"],
)
def test_published_sizes(config, parameters):
    assert sum(p.numel() for p in meta_model(config).parameters()) == parameters


@pytest.mark.parametrize("config", [UNetConfig(), SDXL], ids=["SD 1.5", "SDXL"])
def test_published_names(config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**vars(config))
    shapes = lambda model: {name: t.shape for name, t in model.state_dict().items()}
    assert shapes(meta_model(config)) == shapes(theirs)


# ---- names of the original release -----------------------------------------------------------------------------------------------------


def original_names(config):
    """The modules of the original U-Net, by its own construction: every part is appended to a running list of blocks."""

    def resnet(prefix, inside, outside):
        return [f"{prefix}.{name}" for name in ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")] + (
            [f"{prefix}.skip_connection"] if inside != outside else []
        )

    def transformer(prefix, depth):
        parts = [f"{prefix}.{name}" for name in ("norm", "proj_in", "proj_out")]
        for k in range(depth):
            block = f"{prefix}.transformer_blocks.{k}"
            parts += [f"{block}.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_out.0")]
            parts += [f"{block}.{attn}.to_{p}!" for attn in ("attn1", "attn2") for p in "qkv"]  # ! has no bias
        return parts

    widths, layers = config.block_out_channels, config.layers_per_block
    names, width, skips, block = ["time_embed.0", "time_embed.2", "input_blocks.0.0"], widths[0], [widths[0]], 1
    for level, dim in enumerate(widths):
        for _ in range(layers):
            names += resnet(f"input_blocks.{block}.0", width, dim)
            if config.down_block_types[level].startswith("CrossAttn"):
                names += transformer(f"input_blocks.{block}.1", config.depths[level])
            width, block = dim, block + 1
            skips.append(dim)
        if level < len(widths) - 1:
            names.append(f"input_blocks.{block}.0.op")
            block += 1
            skips.append(dim)
    names += resnet("middle_block.0", width, width) + transformer("middle_block.1", config.depths[-1]) + resnet("middle_block.2", width, width)
    block = 0
    for level, dim in list(enumerate(widths))[::-1]:
        attention = config.up_block_types[::-1][level].startswith("CrossAttn")
        for j in range(layers + 1):
            names += resnet(f"output_blocks.{block}.0", width + skips.pop(), dim)
            width = dim
            if attention:
                names += transformer(f"output_blocks.{block}.1", config.depths[level])
            if level and j == layers:
                names.append(f"output_blocks.{block}.{2 if attention else 1}.conv")
            block += 1
    names += ["out.0", "out.2"] + (["label_emb.0.0", "label_emb.0.2"] if config.addition_embed_type else [])
    return [f"{name.removesuffix('!')}.{kind}" for name in names for kind in ("weight", "bias") if not (kind == "bias" and name.endswith("!"))]


@pytest.mark.parametrize(("config", "layers"), [(UNetConfig(), 2), (SDXL, 2), (SMALL, 1)], ids=["SD 1.5", "SDXL", "one layer"])
def test_original_names(config, layers):
    ours = list(meta_model(config).state_dict())
    original = ["model.diffusion_model." + name for name in original_names(config)]
    assert sorted(published_name(name, layers) for name in original) == sorted(ours)
    assert [published_name(name, layers) for name in ours] == ours


def test_original_names_by_hand():
    """Known places of Stable Diffusion 1's file."""
    pairs = {
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.bias": "down_blocks.1.resnets.0.conv_shortcut.bias",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.2.out_layers.3.weight": "mid_block.resnets.1.conv2.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.11.1.proj_out.weight": "up_blocks.3.attentions.2.proj_out.weight",
        "output_blocks.6.0.emb_layers.1.weight": "up_blocks.2.resnets.0.time_emb_proj.weight",
    }
    assert {name: UNet2DConditionModel.rename("model.diffusion_model." + name) for name in pairs} == pairs


@pytest.mark.parametrize("whole", [False, True], ids=["diffusers", "whole system"])
def test_from_pretrained(tmp_path, whole):
    """A directory as diffusers publishes it, and one with the original file, which holds the autoencoder, the text encoder and more."""
    config = replace(SMALL, layers_per_block=2)
    model, inputs = random_model(config), random_inputs(config)
    state = model.state_dict()
    if whole:
        state = {"model.diffusion_model." + name: state[published_name(name)] for name in original_names(config)}
        others = ("first_stage_model.encoder.conv_in.weight", "cond_stage_model.model.ln_final.bias", "model_ema.decay", "betas")
        state |= {name: torch.ones(1) for name in others}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "act_fn": "silu", **vars(config)}))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(**inputs), model(**inputs))
    (tmp_path / "config.json").write_text(json.dumps(vars(SMALL)))
    with pytest.raises(UserError, match="does not fit UNet2DConditionModel"):
        UNet2DConditionModel.from_pretrained(tmp_path)


# ---- controls --------------------------------------------------------------------------------------------------------------------------


@BOTH
def test_identity_control(config):
    model, inputs = random_model(config), random_inputs(config, (8, 12))
    plain = model(**inputs)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model(**inputs), plain, rtol=0, atol=1e-6)
    assert torch.equal(model(**inputs), plain)
    assert set(control.calls.values()) == {1}
    assert {stage for stage, _ in control.calls} == set(STAGES)
    assert len(control.calls) == len(STAGES) * len({site for _, site in control.calls})


def test_sites():
    model = random_model(SMALL)
    with controlled(model, Identity()) as control:
        model(**random_inputs(SMALL, (8, 12)))
    sites = [site for stage, site in control.calls if stage == "qkv"]
    places = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    expected = [
        (f"{place}.transformer_blocks.0.{attn}", kind, layer, 3 if layer == 1 else 2, (4, 6) if layer == 1 else (8, 12))
        for layer, place in enumerate(places)
        for attn, kind in (("attn1", "self"), ("attn2", "cross"))
    ]
    assert [(site.name, site.kind, site.layer, site.heads, site.grid) for site in sites] == expected


def test_layers_of_stable_diffusion():
    """The second finest level of the decoder begins with layer 10, the finest with 13."""
    layers = {name: module.layer for name, module in meta_model(UNetConfig()).named_modules() if name.endswith("attn1")}
    assert sorted(layers.values()) == list(range(16))
    assert layers["mid_block.attentions.0.transformer_blocks.0.attn1"] == 6
    assert layers["up_blocks.2.attentions.0.transformer_blocks.0.attn1"] == 10
    assert layers["up_blocks.3.attentions.0.transformer_blocks.0.attn1"] == 13


# ---- calls -----------------------------------------------------------------------------------------------------------------------------


def test_one_timestep_for_all():
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    expected = model(**inputs | {"timestep": torch.tensor([400, 400])})
    torch.testing.assert_close(model(**inputs | {"timestep": torch.tensor(400)}), expected)


def test_half_precision():
    model, inputs = random_model(SMALL_XL), random_inputs(SMALL_XL)
    expected = model(**inputs)
    half = {name: t.bfloat16() if t.is_floating_point() and name != "time_ids" else t for name, t in inputs.items()}
    actual = model.bfloat16()(**half)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.05)


def test_wrong_calls():
    inputs = random_inputs(SMALL_XL)
    del inputs["time_ids"]
    with pytest.raises(ValueError, match="time_ids"):
        random_model(SMALL_XL)(**inputs)
    with pytest.raises(ValueError, match="text_image"):
        UNet2DConditionModel(replace(SMALL, addition_embed_type="text_image"))
