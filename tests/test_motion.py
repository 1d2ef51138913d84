import re

import pytest
import torch
import torch.nn.functional as F

from common.attention import STAGES, controlled
from common.backbones.motion import AnimateDiffTransformer3D, UNetMotionConfig, UNetMotionModel, published_name
from common.backbones.sd_unet import UNet2DConditionModel
from tests.controls import Identity
from tests.goldens import cases
from tests.test_sd_unet import SMALL

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
MODULES = [case for case in cases("_motion") if "AnimateDiffTransformer3D" in case.meta["module"]]
UNETS = [case for case in cases("_motion") if "UNetMotionModel" in case.meta["module"]]
FRAMES = 3


def close(case, actual, name):
    """At the json's tolerance, in words: "max abs err <= 5e-4 * max(1,max|ref|)"."""
    words = case.meta["tolerance"][str(actual.dtype).removeprefix("torch.")]
    expected = case.tensors[name].to(actual.dtype)
    scale = max(1.0, expected.abs().max().item()) if "max|ref|" in words else 1.0
    tolerance = float(re.search(r"<= ([\d.e-]+)", words)[1]) * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


def motion_module(case, dtype):
    constructor = case.meta["constructor"]
    same = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "norm_num_groups", "num_positional_embeddings")
    module = AnimateDiffTransformer3D(**{name: constructor[name] for name in same}).to(dtype)
    module.load_state_dict(case.state("sd."))
    return module


def video_model(**fields):
    """The image U-Net of test_sd_unet with random motion modules."""
    torch.manual_seed(0)
    model = UNetMotionModel.from_unet(UNet2DConditionModel(SMALL), motion_num_attention_heads=(2, 3), **fields)
    for name, parameter in model.named_parameters():
        if "motion_modules" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_inputs(videos=2):
    torch.manual_seed(1)
    return {
        "sample": torch.randn(videos, 4, FRAMES, 8, 12),
        "timestep": torch.tensor([17, 921])[:videos],
        "encoder_hidden_states": torch.randn(videos * FRAMES, 5, SMALL.cross_attention_dim),
    }


# ---- parity ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
@DTYPES
def test_golden_module(case, dtype):
    module = motion_module(case, dtype)
    h = case.tensors["in.hidden_states"].to(dtype).requires_grad_()
    out = module(h, case.meta["num_frames"])
    close(case, out, "out.f64" if dtype == torch.float64 else "out.f32")
    if dtype == torch.float64:
        close(case, torch.autograd.grad((out * case.tensors["in.cotangent"]).sum(), h)[0], "out.grad_f64")


@pytest.mark.parametrize("case", UNETS, ids=lambda case: case.name)
@DTYPES
def test_golden_unet(case, dtype):
    model = UNetMotionModel.from_config(case.meta["constructor"]).to(dtype)
    model.load_state_dict(case.state("sd."))
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.state("in.").items()}
    close(case, model(**inputs), "out.f64" if dtype == torch.float64 else "out.f32")


def test_diffusers_agrees():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    model = video_model(temporal_transformer_layers_per_block=2, motion_max_seq_length=8)
    ours = vars(model.config)
    names = set(ours) - {"attention_head_dim", "norm_per_frame"}
    theirs = diffusers.UNetMotionModel(**{name: ours[name] for name in names}).eval()
    theirs.load_state_dict(model.state_dict())
    inputs = random_inputs()
    torch.testing.assert_close(model(**inputs), theirs(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_published_names():
    """AnimateDiff's second version: SD 1.5 with 453 million parameters of motion modules."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    with torch.device("meta"):
        ours = UNetMotionModel(UNetMotionConfig())
        theirs = diffusers.UNetMotionModel(cross_attention_dim=768)
        adapter = diffusers.MotionAdapter()
    shapes = lambda state: {name: t.shape for name, t in state.items()}
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert shapes(ours.motion_state()) == shapes(adapter.state_dict())
    assert sum(p.numel() for name, p in ours.named_parameters() if "motion_modules" not in name) == 859_520_964
    assert sum(p.numel() for p in adapter.parameters()) == 453_209_280


# ---- the mechanism ---------------------------------------------------------------------------------------------------------------------


def test_starts_as_the_image_model():
    """Untrained motion modules leave every frame as the image U-Net has it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(SMALL)
    model, inputs = UNetMotionModel.from_unet(unet, motion_num_attention_heads=1), random_inputs()
    videos = model(**inputs)
    for i in range(2):
        for f in range(FRAMES):
            row = slice(i * FRAMES + f, i * FRAMES + f + 1)
            frame = unet(inputs["sample"][i : i + 1, :, f], inputs["timestep"][i], inputs["encoder_hidden_states"][row])
            torch.testing.assert_close(videos[i : i + 1, :, f], frame, rtol=1e-4, atol=1e-6)


def test_videos_of_a_batch_are_independent():
    model, inputs = video_model(), random_inputs()
    first = {name: t[: len(t) // 2] for name, t in inputs.items()}
    torch.testing.assert_close(model(**inputs)[:1], model(**first), rtol=1e-4, atol=1e-5)


def test_frames_are_seen_in_order():
    """Without positions the modules would not care about the order of the frames; with them they do."""
    module = video_model().mid_block.motion_modules[0]
    h = torch.randn(4, 24, 2, 2)
    order = torch.tensor([2, 0, 3, 1])
    assert (module(h[order], 4) - module(h, 4)[order]).abs().max() > 1e-2
    module.transformer_blocks[0].pos_embed.pe.zero_()
    torch.testing.assert_close(module(h[order], 4), module(h, 4)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_frame", [False, True], ids=["video", "frame"])
def test_norm_statistics(per_frame):
    """The first layer's input, normalised by hand."""
    module = AnimateDiffTransformer3D(2, 4, 8, norm_num_groups=2, norm_per_frame=per_frame)
    seen = []
    module.proj_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    h = torch.randn(2 * FRAMES, 8, 3, 4) * torch.arange(1, 2 * FRAMES + 1)[:, None, None, None]
    module(h, FRAMES)
    x = h.reshape(2, FRAMES, 2, 4, 3, 4)  # b f groups c H W
    axes = (3, 4, 5) if per_frame else (1, 3, 4, 5)
    x = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(seen[0], x.reshape(2, FRAMES, 8, 12).permute(0, 3, 1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_positions_by_hand():
    module = AnimateDiffTransformer3D(2, 4, 8, norm_num_groups=2, num_positional_embeddings=6)
    pe = module.transformer_blocks[0].pos_embed.pe
    for position in range(6):
        for i in range(4):
            angle = torch.tensor(position / 10_000 ** (2 * i / 8))
            torch.testing.assert_close(pe[0, position, 2 * i : 2 * i + 2], torch.stack([angle.sin(), angle.cos()]))


def test_block_by_hand():
    block = video_model().down_blocks[0].motion_modules[0].transformer_blocks[0]
    x = torch.randn(5, 4, 16)
    norm = lambda layer, x: F.layer_norm(x, (16,), layer.weight, layer.bias)

    def attended(attention, y):
        q, k, v = (layer(y).reshape(5, 4, 2, 8).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v))
        return attention.to_out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(5, 4, 16))

    p = block.pos_embed.pe[:, :4]
    y = x + attended(block.attn1, norm(block.norm1, x) + p)
    y = y + attended(block.attn2, norm(block.norm2, y) + p)
    a, b = block.ff.net[0].proj(norm(block.norm3, y)).chunk(2, -1)
    y = y + block.ff.net[2](a * b * (1 + torch.erf(b / 2**0.5)) / 2)
    torch.testing.assert_close(block(x, (1, 5)), y, rtol=1e-4, atol=1e-5)


# ---- controls, calls, names ------------------------------------------------------------------------------------------------------------


def test_identity_control():
    model, inputs = video_model(), random_inputs()
    plain = model(**inputs)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model(**inputs), plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    assert torch.equal(model(**inputs), plain)
    assert set(control.calls.values()) == {1} and {stage for stage, _ in control.calls} == set(STAGES)
    sites = {site.name: site for stage, site in control.calls if stage == "output"}
    image = [site for name, site in sites.items() if "motion_modules" not in name]
    assert [site.layer for site in image] == [0, 0, 1, 1, 2, 2, 3, 3]  # as in the image U-Net
    motion = [site for name, site in sites.items() if "motion_modules" in name]
    assert [site.layer for site in motion] == [layer for layer in range(7) for _ in range(2)]
    assert {site.kind for site in motion} == {"self"}
    assert [site.grid for site in motion[::2]] == [(8, 12), (4, 6), (4, 6), (4, 6), (4, 6), (8, 12), (8, 12)]


def test_too_many_frames():
    with pytest.raises(ValueError, match="3 frames, but the motion modules know 2"):
        video_model(motion_max_seq_length=2)(**random_inputs())


def test_without_a_motion_module_in_the_middle():
    """The first version of AnimateDiff."""
    model, whole = video_model(use_motion_mid_block=False), video_model()
    assert set(whole.motion_state()) - set(model.motion_state()) == {name for name in whole.motion_state() if name.startswith("mid_block")}
    assert model(**random_inputs()).shape == (2, 4, FRAMES, 8, 12)


def test_adapters_load():
    """A motion adapter's file, in diffusers' names or in AnimateDiff's own, which holds the positions once per attention."""
    trained = video_model()
    original = {}
    for name, tensor in trained.motion_state().items():
        head, tail = re.fullmatch(r"(.*motion_modules\.\d+)\.(.*)", name).groups()
        for ours, theirs in (("attn1", "attention_blocks.0"), ("attn2", "attention_blocks.1"), ("norm1", "norms.0"), ("norm2", "norms.1")):
            tail = tail.replace(f".{ours}.", f".{theirs}.")
        tail = tail.replace(".norm3.", ".ff_norm.")
        tails = [tail.replace("pos_embed.pe", f"attention_blocks.{i}.pos_encoder.pe") for i in (0, 1)] if "pos_embed" in tail else [tail]
        original |= {f"module.{head}.temporal_transformer.{tail}": tensor for tail in tails}
    inputs = random_inputs()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(SMALL)
    for state in (trained.motion_state(), original):
        model = UNetMotionModel.from_unet(unet, state, motion_num_attention_heads=(2, 3))
        torch.testing.assert_close(model(**inputs), trained(**inputs))


def test_original_names_by_hand():
    stem = "down_blocks.0.motion_modules.1."
    pairs = {
        "temporal_transformer.norm.weight": "norm.weight",
        "temporal_transformer.proj_out.bias": "proj_out.bias",
        "temporal_transformer.transformer_blocks.0.attention_blocks.0.to_out.0.bias": "transformer_blocks.0.attn1.to_out.0.bias",
        "temporal_transformer.transformer_blocks.0.attention_blocks.1.to_k.weight": "transformer_blocks.0.attn2.to_k.weight",
        "temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe": "transformer_blocks.0.pos_embed.pe",
        "temporal_transformer.transformer_blocks.0.norms.1.bias": "transformer_blocks.0.norm2.bias",
        "temporal_transformer.transformer_blocks.0.ff_norm.weight": "transformer_blocks.0.norm3.weight",
        "temporal_transformer.transformer_blocks.0.ff.net.0.proj.weight": "transformer_blocks.0.ff.net.0.proj.weight",
    }
    assert {name: published_name(stem + name) for name in pairs} == {name: stem + ours for name, ours in pairs.items()}
    assert UNetMotionModel.rename("model.diffusion_model.input_blocks.3.0.op.bias") == "down_blocks.0.downsamplers.0.conv.bias"
    names = list(video_model().state_dict())
    assert [UNetMotionModel.rename(name) for name in names] == names
