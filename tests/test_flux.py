import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from common.attention import STAGES, attend, controlled
from common.backbones.flux import Branch, Cached, Conditioning, FluxConfig, FluxTransformer2DModel, Visible, image_ids, pack, rotary_table, unpack
from common.lora import add_lora, merge, unmerge
from tests.controls import Identity
from tests.goldens import cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PLAIN = pytest.mark.parametrize("case", cases("_flux"), ids=lambda case: case.name)
BRANCHED = pytest.mark.parametrize("case", [c for c in cases("pka") if "out64/concat_attend" in c.tensors], ids=lambda case: case.name)
SMALL = FluxConfig(
    in_channels=12,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=3,
    joint_attention_dim=10,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 4, 4),
)
GRID = (3, 4)


def build(case, dtype):
    model = FluxTransformer2DModel.from_config(case.meta["constructor"]).to(dtype)
    model.load_state_dict(case.state("param/"))
    return model


def closeness(case, dtype):
    """assert_close at the tolerance of the case; tensors of a float64 run are under out64/, those of a float32 run under out32/."""
    tolerance = case.meta["tolerance"][str(dtype).removeprefix("torch.")]

    def close(actual, name):
        torch.testing.assert_close(actual, case.tensors[name].to(dtype), rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")

    return close


def random_model(config=SMALL):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def random_inputs():
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, GRID[0] * GRID[1], 12),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.2, 0.9]),
        "img_ids": image_ids(GRID),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 1.0]),
    }


def random_branches():
    """Text, image and two conditions of other sizes."""
    i = random_inputs()
    noisy = Conditioning(i["timestep"], i["pooled_projections"], i["guidance"])
    clean = replace(noisy, timestep=torch.zeros(2))
    text = Branch("text", i["encoder_hidden_states"], i["txt_ids"], noisy)
    image = Branch("image", i["hidden_states"], i["img_ids"], noisy)
    edge = Branch("edge", torch.randn(2, 12, 12), image_ids(GRID), clean)
    subject = Branch("subject", torch.randn(2, 6, 12), image_ids((2, 3)) - torch.tensor([0, 0, 4]), clean)
    return text, image, edge, subject


# ---- the published model ---------------------------------------------------------------------------------------------------------------


@PLAIN
@DTYPES
def test_golden(case, dtype):
    model, close = build(case, dtype), closeness(case, dtype)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
    inputs = {name: case.tensors["in/" + name].to(dtype) for name in names if "in/" + name in case.tensors}
    tokens = [inputs[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")]
    blocks = {}
    for name, module in model.named_modules():
        if name.split(".")[-1].isdigit() and name.startswith(("transformer_blocks", "single_transformer_blocks")) and name.count(".") == 1:
            module.register_forward_hook(lambda _, inputs, outputs, name=name: blocks.update({name: torch.cat(outputs, 1).split(sizes, 1)}))
    sizes = [inputs["txt_ids"].shape[0], inputs["img_ids"].shape[0]]
    sample = model(**inputs)
    if dtype == torch.float32:
        return close(sample, "out32/sample")

    close(sample, "out64/sample")
    close(model.time_text_embed(inputs["timestep"], inputs["pooled_projections"], inputs.get("guidance")), "out64/time_text_embed")
    table = rotary_table(torch.cat([inputs["txt_ids"], inputs["img_ids"]]), model.config.axes_dims_rope)
    for i, part in enumerate((table.real, table.imag)):
        close(part.repeat_interleave(2, -1), f"out64/pos_embed.{i}")
    expected = [name for name in case.tensors if name.startswith(("out64/transformer_blocks", "out64/single_transformer_blocks"))]
    assert len(expected) == 2 * len(blocks)
    for name in expected:
        block, stream = name.removeprefix("out64/").rsplit(".", 1)
        close(blocks[block][int(stream)], name)
    grads = torch.autograd.grad((sample * case.tensors["in/probe"]).sum(), tokens)
    close(grads[0], "grad64/hidden_states")
    close(grads[1], "grad64/encoder_hidden_states")


def test_diffusers_agrees():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference implementation")
    model, inputs = random_model(), random_inputs()
    theirs = diffusers.FluxTransformer2DModel(**vars(SMALL)).eval()
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**inputs), theirs(**inputs).sample, rtol=1e-4, atol=1e-4)


def test_packing_is_the_pipelines():
    """Against the reshapes of the published pipeline, written out: view (b, c, h/2, 2, w/2, 2), permute (0, 2, 4, 1, 3, 5)."""
    latents = torch.randn(2, 3, 4, 6)
    tokens = latents.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, (2, 3)), latents)
    assert image_ids((2, 3)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_published_size():
    with torch.device("meta"):
        model = FluxTransformer2DModel(FluxConfig())
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320


def test_starts_as_zero_velocity():
    """AdaLN-Zero: untrained blocks pass their streams on, the output projection is zero."""
    model, inputs = FluxTransformer2DModel(SMALL), random_inputs()
    streams = []
    model.single_transformer_blocks[-1].register_forward_hook(lambda _, inputs, outputs: streams.extend(outputs))
    assert not model(**inputs).any()
    assert torch.equal(streams[0][:, 5:], model.x_embedder(inputs["hidden_states"]))


def test_half_precision():
    model, inputs = random_model(), random_inputs()
    exact = model(**inputs)
    half = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    sample = model.bfloat16()(**{name: t.bfloat16() if name in half else t for name, t in inputs.items()})
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())


def test_published_checkpoint_loads(tmp_path):
    model, inputs = random_model(), random_inputs()
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(SMALL) | {"_class_name": "FluxTransformer2DModel"}))
    assert torch.equal(FluxTransformer2DModel.from_pretrained(tmp_path)(**inputs), model(**inputs))


def test_wrong_calls():
    inputs, (text, image, edge, _) = random_inputs(), random_branches()
    with pytest.raises(ValueError, match='must be named "image"'):
        random_model().velocity([text, edge])
    with pytest.raises(ValueError, match="a name of its own"):
        random_model().velocity([text, image, edge, edge])
    with pytest.raises(ValueError, match="pass guidance"):
        random_model()(**inputs | {"guidance": None})
    with pytest.raises(ValueError, match="must sum to attention_head_dim = 12"):
        FluxTransformer2DModel(replace(SMALL, axes_dims_rope=(4, 4, 6)))


# ---- controls --------------------------------------------------------------------------------------------------------------------------


def test_identity_control():
    model, inputs = random_model(), random_inputs()
    plain = model(**inputs)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model(**inputs), plain, rtol=0, atol=1e-6)
    assert torch.equal(model(**inputs), plain)
    assert {stage for stage, _ in control.calls} == set(STAGES)
    assert set(control.calls.values()) == {1} and len(control.calls) == len(STAGES) * 4
    assert sorted({(site.layer, site.kind, site.grid, site.heads) for _, site in control.calls}) == [(i, "joint", GRID, 3) for i in range(4)]


def test_identity_control_of_branches():
    """A condition that reads alone is a call of its own, on its own grid."""
    model, branches = random_model(), random_branches()
    plain = model.velocity(branches)
    with controlled(model, Identity()) as control:
        torch.testing.assert_close(model.velocity(branches), plain, rtol=0, atol=1e-6)
    assert Counter(site.grid for stage, site in control.calls for _ in range(control.calls[stage, site]) if stage == "weights") == {
        GRID: 8,
        (2, 3): 4,
    }
    assert Counter(site.grid for stage, site in control.calls if stage in ("hidden", "context", "output")) == {GRID: 12}


class Scale:
    """Multiplies one stage of the single blocks by 2."""

    def output(self, site, y):
        return 2 * y


def test_output_stage_of_single_blocks():
    """`output` is what the block adds, before its gate: doubling it is doubling the output projection."""
    model, inputs = random_model(), random_inputs()
    with controlled(model, Scale(), where=lambda site: site.name.startswith("single")):
        doubled = model(**inputs)
    with torch.no_grad():
        for block in model.single_transformer_blocks:
            block.proj_out.weight *= 2
            block.proj_out.bias *= 2
    torch.testing.assert_close(model(**inputs), doubled, rtol=1e-4, atol=1e-5)


# ---- branches --------------------------------------------------------------------------------------------------------------------------


@BRANCHED
@DTYPES
def test_golden_branches(case, dtype):
    model, close = build(case, dtype), closeness(case, dtype)
    t = {name: tensor.to(dtype) for name, tensor in case.state("in/").items()}
    guidance = torch.ones_like(t["timestep"]) if case.meta["constructor"]["guidance_embeds"] else None

    noisy, clean = (Conditioning(timestep, t["pooled"], guidance) for timestep in (t["timestep"], torch.zeros_like(t["timestep"])))
    main = ("text", "image")
    text, image = (Branch(name, t[name], t[name + "_ids"], noisy) for name in main)
    names = [name.removeprefix("cond_") for name in t if name.startswith("cond_")]
    conditions = [Branch(name, t["cond_" + name], t[name + "_ids"], clean) for name in names]
    dependent = Visible(lambda reader, source: reader in main or source in main or reader == source)
    out = {torch.float64: "out64/", torch.float32: "out32/"}[dtype]
    close(model.velocity([text, image, *conditions], dependent), out + "concat_attend")
    independent = model.velocity([text, image, *conditions])
    close(independent, out + "concat_attend_independent")
    cache = model.condition_cache(conditions)
    torch.testing.assert_close(model.velocity([text, image], Cached(cache)), independent, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    if dtype == torch.float64:
        close(model.velocity([text, image]), "out64/no_conditions")
        for name in (name for name in case.tensors if name.startswith("cache64/")):
            kind, index, condition, part = re.fullmatch(r"cache64/(double|single)_block(\d+)_(\w+)_([kv])", name).groups()
            layer = int(index) + (model.config.num_layers if kind == "single" else 0)
            close(cache[layer][condition]["_kv".index(part)], name)


def test_visible_is_the_masked_joint_attention():
    """Any visibility equals one attention over all tokens with the boolean matrix as its mask."""
    model, branches = random_model(), random_branches()
    see = {"text": ("text", "image"), "image": ("text", "image", "edge"), "edge": ("edge", "subject"), "subject": ("image", "subject")}

    def masked(attention, branches):
        q, k, v = (torch.cat([heads[i] for heads in branches.values()], 2) for i in range(3))
        owner = [name for name, (q, _, _) in branches.items() for _ in range(q.shape[2])]
        mask = torch.tensor([[b in see[a] for b in owner] for a in owner])
        o = attend(q, k, v, mask=mask[None, None])
        return {name: o[:, :, torch.tensor([a == name for a in owner])] for name in branches}

    actual = model.velocity(branches, Visible(lambda reader, source: source in see[reader]))
    torch.testing.assert_close(actual, model.velocity(branches, masked), rtol=1e-4, atol=1e-5)


def test_sharing_the_conditioning_changes_nothing():
    """Branches with one Conditioning object are computed as one sequence; with equal ones, apart."""
    model, branches = random_model(), random_branches()
    apart = [replace(branch, conditioning=replace(branch.conditioning)) for branch in branches]
    torch.testing.assert_close(model.velocity(branches), model.velocity(apart), rtol=1e-5, atol=1e-5)


def test_cache_outlives_the_timestep():
    model, (text, image, *conditions) = random_model(), random_branches()
    cache = model.condition_cache(conditions)
    for t in (0.1, 0.8):
        noisy = replace(image.conditioning, timestep=torch.full((2,), t))
        main = [replace(branch, conditioning=noisy) for branch in (text, image)]
        expected = model.velocity([*main, *conditions])
        torch.testing.assert_close(model.velocity(main, Cached(cache)), expected, rtol=1e-5, atol=1e-5)
        assert (expected - model.velocity(main)).abs().max() > 1e-2


def test_a_mix_replaces_the_attention():
    """Uniform attention by a mix equals uniform attention by a control."""

    class Uniform:
        def logits(self, site, s):
            return torch.zeros_like(s)

    def uniform(attention, branches):
        mean = torch.cat([v for _, _, v in branches.values()], 2).mean(2, keepdim=True)
        return {name: mean.expand_as(q) for name, (q, _, _) in branches.items()}

    model, (text, image, *_) = random_model(), random_branches()
    with controlled(model, Uniform()):
        expected = model.velocity([text, image])
    torch.testing.assert_close(model.velocity([text, image], uniform), expected, rtol=1e-4, atol=1e-5)


def test_adapter_acts_in_its_branch_alone():
    """The condition's keys are those of a model with the adapter merged into its weights; text and image are the base model's."""
    model, (text, image, edge, _) = random_model(), random_branches()
    targets = r"x_embedder|.*\.(norm1?\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2|proj_mlp|proj_out)"
    for p in add_lora(model, "edge", targets, rank=2):
        torch.nn.init.normal_(p, std=0.2)
    adapted = model.velocity([text, image, replace(edge, adapter="edge")])
    plain = model.velocity([text, image, edge])
    merge(model, "edge")
    cache = model.condition_cache([edge])
    unmerge(model, "edge")
    torch.testing.assert_close(adapted, model.velocity([text, image], Cached(cache)), rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-2
