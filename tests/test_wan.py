import json
import re

import pytest
import torch
from safetensors.torch import save_file

from common.attention import STAGES, controlled
from common.backbones.wan import WanConfig, WanTransformer3DModel, published_name, rotary_table
from tests.controls import Identity
from tests.goldens import cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CASES = [case for case in cases("_wan") if "WanTransformer3DModel" in case.meta["module"]]  # its neighbours are schedulers
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 3, "text_dim": 10, "freq_dim": 16}
SMALL |= {"ffn_dim": 20, "num_layers": 2, "patch_size": (1, 2, 2)}
IMAGE = {"image_dim": 6, "added_kv_proj_dim": 24}
KINDS = pytest.mark.parametrize("fields", [SMALL, SMALL | IMAGE], ids=["text-to-video", "image-to-video"])


def random_model(fields):
    torch.manual_seed(0)
    model = WanTransformer3DModel(WanConfig(**fields))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def random_inputs(fields, text=7):
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 4, 6),
        "timestep": torch.tensor([17.0, 921.0]),
        "encoder_hidden_states": torch.randn(2, text, 10),
    }
    return inputs | ({"encoder_hidden_states_image": torch.randn(2, 5, 6)} if "image_dim" in fields else {})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@DTYPES
def test_golden(case, dtype):
    model = WanTransformer3DModel.from_config(case.meta["constructor"]).to(dtype)
    model.load_state_dict(case.state("sd."))
    suffix = "_f64" if dtype == torch.float64 else "_f32"
    bound = float(re.search(r"<= ([\d.e-]+)", case.meta["tolerance"][str(dtype).removeprefix("torch.")])[1])

    def close(actual, name):
        expected = case.tensors[name].to(dtype)
        relative = max(1, expected.abs().max()) if dtype == torch.float32 else 1
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound * relative, msg=lambda m: f"{name}: {m}")

    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.state("in.").items() if name != "cotangent"}
    video, text = inputs["hidden_states"].requires_grad_(), inputs["encoder_hidden_states"].requires_grad_()
    first = []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: first.append(output))
    sample = model(**inputs)
    close(sample, "out.sample" + suffix)
    grads = torch.autograd.grad((sample * case.tensors["in.cotangent"]).sum(), (video, text))
    close(grads[0], "out.grad_hidden_states" + suffix)
    if dtype == torch.float64:
        close(grads[1], "out.grad_text_f64")
        close(first[0], "aux.block0_out_f64")
        grid = [n // p for n, p in zip(video.shape[2:], model.config.patch_size, strict=True)]
        table = rotary_table(grid, model.config.attention_head_dim)
        for part, name in ((table.real, "aux.rope_cos"), (table.imag, "aux.rope_sin")):
            close(part.repeat_interleave(2, -1)[None, :, None], name)


@KINDS
def test_diffusers_agrees(fields):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    model = random_model(fields)
    theirs = diffusers.WanTransformer3DModel(**fields).eval()
    theirs.load_state_dict(model.state_dict())
    inputs = random_inputs(fields, text=512)  # the only length that diffusers tells from the image tokens
    torch.testing.assert_close(model(**inputs), theirs(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_image_tokens_with_a_short_prompt():
    """By hand: the image adds softmax(q k_iᵀ/√d) v_i to the heads before the output projection."""
    attn = random_model(SMALL | IMAGE).blocks[0].attn2
    x, text, image = torch.randn(2, 9, 24), torch.randn(2, 4, 24), torch.randn(2, 5, 24)
    split = lambda t: t.unflatten(-1, (2, 12)).transpose(1, 2)
    rms = lambda t, w: w * t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    q = split(rms(attn.to_q(x), attn.norm_q.weight))
    o = 0
    for k, v in (
        (rms(attn.to_k(text), attn.norm_k.weight), attn.to_v(text)),
        (rms(attn.add_k_proj(image), attn.norm_added_k.weight), attn.add_v_proj(image)),
    ):
        o = o + (q @ split(k).mT / 12**0.5).softmax(-1) @ split(v)
    torch.testing.assert_close(attn(x, text, image), attn.to_out(o.transpose(1, 2).flatten(2)))


@KINDS
def test_identity_control(fields):
    model, inputs = random_model(fields), random_inputs(fields)
    plain = model(**inputs)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model(**inputs), plain, rtol=0, atol=1e-6)
    assert torch.equal(model(**inputs), plain)
    assert set(control.calls.values()) == {1}
    sites = {site: {stage for stage, s in control.calls if s == site} for _, site in control.calls}
    assert {site.grid for site in sites} == {(2, 3)}
    for layer in range(2):
        names = {f"blocks.{layer}.attn1": ("self", set(STAGES)), f"blocks.{layer}.attn2": ("cross", set(STAGES))}
        if "image_dim" in fields:
            names[f"blocks.{layer}.attn2.image"] = ("cross", {"context", "qkv", "logits", "weights", "heads"})
        assert {site.name: (site.kind, stages) for site, stages in sites.items() if site.layer == layer} == names


def test_published_size():
    """Wan2.1-T2V-1.3B, 825 tensors."""
    with torch.device("meta"):
        model = WanTransformer3DModel(WanConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert len(model.state_dict()) == 825


def original_names(layers):
    """The parameters of the original image-to-video release, written out."""
    layer = ["modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"]
    for attn in ("self_attn", "cross_attn"):
        layer += [f"{attn}.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias")] + [f"{attn}.norm_{p}.weight" for p in "qk"]
    layer += [f"cross_attn.{p}_img.{kind}" for p in "kv" for kind in ("weight", "bias")] + ["cross_attn.norm_k_img.weight"]
    linear = ["patch_embedding", "time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2", "time_projection.1", "head.head"]
    linear += [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    names = [f"blocks.{i}.{name}" for i in range(layers) for name in layer] + ["head.modulation"]
    return names + [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]


def test_original_names():
    """Every parameter of the original release has its place, and the names of diffusers stay."""
    ours = random_model(SMALL | IMAGE).state_dict()
    assert sorted(map(published_name, original_names(2))) == sorted(ours)
    assert [published_name(name) for name in ours] == list(ours)
    pairs = {
        "blocks.1.cross_attn.norm_k.weight": "blocks.1.attn2.norm_k.weight",
        "blocks.1.cross_attn.norm_k_img.weight": "blocks.1.attn2.norm_added_k.weight",
        "blocks.1.cross_attn.v_img.bias": "blocks.1.attn2.add_v_proj.bias",
        "blocks.0.self_attn.o.weight": "blocks.0.attn1.to_out.0.weight",
        "blocks.0.norm3.bias": "blocks.0.norm2.bias",
        "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
        "head.modulation": "scale_shift_table",
        "blocks.0.modulation": "blocks.0.scale_shift_table",
        "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
        "text_embedding.0.bias": "condition_embedder.text_embedder.linear_1.bias",
        "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    }
    assert {name: published_name(name) for name in pairs} == pairs


def test_original_checkpoint_loads(tmp_path):
    """A directory with the weights under the original names, and a config.json with fields that this model has no use for."""
    fields = SMALL | IMAGE
    model, inputs = random_model(fields), random_inputs(fields)
    ours = model.state_dict()
    save_file({name: ours[published_name(name)] for name in original_names(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields | {"_class_name": "WanTransformer3DModel", "rope_max_seq_len": 1024}))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs), model(**inputs))


@KINDS
def test_half_precision(fields):
    model, inputs = random_model(fields), random_inputs(fields)
    exact = model(**inputs)
    half = {name: t if name == "timestep" else t.bfloat16() for name, t in inputs.items()}
    sample = model.bfloat16()(**half)
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_image_tokens_belong_to_image_models():
    with pytest.raises(ValueError, match="image-to-video"):
        random_model(SMALL)(**random_inputs(IMAGE))
    with pytest.raises(ValueError, match="image-to-video"):
        random_model(SMALL | IMAGE)(**random_inputs({}))
