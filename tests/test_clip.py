import pytest
import torch
from safetensors.torch import save_file

from common.attention import controlled
from common.backbones.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPTextWithProjection,
    CLIPVision,
    CLIPVisionConfig,
    CLIPVisionWithProjection,
    from_open_clip,
    open_clip_config,
    to_open_clip,
)
from common.errors import UserError
from tests.controls import Identity, Record
from tests.goldens import cases
from tests.test_llama import tolerance

CASES = pytest.mark.parametrize("case", cases("_clip_map"), ids=lambda case: case.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SMALL = CLIPConfig(
    CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8),
    CLIPTextConfig(vocab_size=40, hidden_size=16, intermediate_size=30, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=9),
    projection_dim=12,
)


def small():
    model = CLIP(SMALL).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model


def published(case):
    """The weights under the published names; the case has `logit_scale` among those of open_clip alone, where it has the same name."""
    return {"logit_scale": case.tensors["open_clip.logit_scale"]} | case.state("hf.")


# ---- against open_clip ----------------------------------------------------------------------------------------------------------------


@CASES
def test_names_map_both_ways(case):
    theirs, ours = case.state("open_clip."), published(case)
    for converted, expected in ((from_open_clip(theirs), ours), (to_open_clip(ours), theirs)):
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)
    assert CLIP(open_clip_config(case.meta["constructor"])).state_dict().keys() == ours.keys()


@CASES
@DTYPES
@torch.no_grad()
def test_features_states_and_maps(case, dtype):
    t, suffix = case.tensors, ".f64" * (dtype == torch.float64)
    model = CLIP(open_clip_config(case.meta["constructor"])).to(dtype).eval()
    model.load_state_dict(published(case))
    pixels, ids = t["in.pixel_values"].to(dtype), t["in.input_ids"]
    with controlled(model, Record()) as image:
        image_state = model.vision_model(pixels)
    with controlled(model, Record()) as text:
        text_state = model.text_model(ids)
    ours = {
        "image_features": model.image_features(pixels),
        "text_features": model.text_features(ids),
        "text_last_hidden_state": model.text_model.last(ids),
        "vision_hidden_states": torch.stack([*image.states, image_state]),
        "text_hidden_states": torch.stack([*text.states, text_state]),
        "vision_attentions": torch.stack(image.maps),
        "text_attentions": torch.stack(text.maps),
    }
    assert {f"out.{name}{suffix}" for name in ours} == {name for name in t if name.startswith("out.") and name.endswith(".f64") == bool(suffix)}
    for name, value in ours.items():
        torch.testing.assert_close(value, t[f"out.{name}{suffix}"], **tolerance(case, dtype))
    for number, state in enumerate(ours["vision_hidden_states"]):
        torch.testing.assert_close(model.vision_model(pixels, number), state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.vision_model(pixels, number - len(image.states) - 1), state, rtol=1e-4, atol=1e-5)


def test_configuration_of_open_clip():
    """Its ViT-B-32 is OpenAI's but for the activation."""
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    assert open_clip_config(config | {"quick_gelu": True}) == CLIPConfig()
    assert open_clip_config(config).vision_config.hidden_act == open_clip_config(config).text_config.hidden_act == "gelu"
    with pytest.raises(ValueError, match="visual.trunk.norm belongs to no CLIP of two plain towers"):
        from_open_clip({"visual.trunk.norm": torch.ones(1)})


# ---- against transformers -------------------------------------------------------------------------------------------------------------

HF_VISION = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 48,
    "patch_size": 12,
    "projection_dim": 20,
}
HF_TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "hidden_act": "gelu",
    "projection_dim": 20,
    "eos_token_id": 7,
    "bos_token_id": 1,
}


def randomised(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@torch.no_grad()
def test_transformers_files_load_and_agree(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    config = transformers.CLIPConfig(vision_config=HF_VISION, text_config=HF_TEXT, projection_dim=20)
    theirs = randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="400KB")
    ours = CLIP.from_pretrained(tmp_path)
    pixels, ids = torch.randn(3, 3, 48, 48), torch.randint(8, 100, (2, 20))
    ids[0, 11] = ids[0, 15] = ids[1, 19] = 7
    expected = theirs(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    close = lambda mine, other: torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-4)
    close(ours(pixels, ids), expected.logits_per_image)
    vision, text = CLIPVisionWithProjection.from_pretrained(tmp_path), CLIPTextWithProjection.from_pretrained(tmp_path)
    close(torch.nn.functional.normalize(vision.feature(pixels)), expected.image_embeds)
    close(torch.nn.functional.normalize(text.feature(ids)), expected.text_embeds)
    close(vision(pixels, -2), expected.vision_model_output.hidden_states[-2])
    close(text(ids, -2), expected.text_model_output.hidden_states[-2])
    close(text.text_model.last(ids), expected.text_model_output.last_hidden_state)


@pytest.mark.parametrize(("ours", "theirs", "sizes"), [(CLIPVision, "CLIPVisionModel", HF_VISION), (CLIPText, "CLIPTextModel", HF_TEXT)])
@torch.no_grad()
def test_files_of_one_tower_load(ours, theirs, sizes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    theirs = getattr(transformers, theirs)
    theirs = randomised(theirs(theirs.config_class(**sizes)))
    theirs.save_pretrained(tmp_path)
    given = torch.randn(2, 3, 48, 48) if ours is CLIPVision else torch.randint(100, (2, 20))
    expected = theirs(given, output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours.from_pretrained(tmp_path)(given), expected[-1], rtol=1e-4, atol=2e-4)


# ---- behaviour ------------------------------------------------------------------------------------------------------------------------


def test_an_identity_control_changes_nothing():
    model, pixels, ids = small().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(40, (2, 9))
    plain = model(pixels, ids)
    with controlled(model, Identity()):
        torch.testing.assert_close(model(pixels, ids), plain, rtol=0, atol=1e-9)


def test_sites_know_the_grid():
    seen, model = [], small()

    class Where:
        def hidden(self, site, x):
            seen.append((site.name, site.kind, site.layer, site.grid))

    with controlled(model, Where()):
        model(torch.randn(1, 3, 32, 32), torch.randint(40, (1, 9)))
    assert seen == [(f"vision_model.encoder.layers.{i}.self_attn", "self", i, (4, 4)) for i in range(3)] + [
        (f"text_model.encoder.layers.{i}.self_attn", "self", i, None) for i in range(2)
    ]


@torch.no_grad()
def test_a_batch_equals_its_rows_and_text_is_causal():
    model, pixels, ids = small(), torch.randn(3, 3, 32, 32), torch.randint(39, (2, 9))
    for i in range(3):
        torch.testing.assert_close(model.image_features(pixels)[i], model.image_features(pixels[i : i + 1])[0], rtol=1e-5, atol=1e-5)
    ids[:, 4] = 39
    after = ids.clone()
    after[:, 5:] = 0
    torch.testing.assert_close(model.text_features(ids), model.text_features(after), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.text_features(ids), model.text_features(ids[:, :5]), rtol=1e-5, atol=1e-5)


REAL_SIZES = {
    "ViT-B/32": (151_277_313, CLIPConfig()),
    "ViT-L/14": (
        427_616_513,
        CLIPConfig(
            CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
            projection_dim=768,
        ),
    ),
}


@pytest.mark.parametrize(("parameters", "config"), REAL_SIZES.values(), ids=REAL_SIZES)
def test_real_sizes(parameters, config):
    with torch.device("meta"):
        model = CLIP(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_wrong_calls(tmp_path):
    model = small()
    with pytest.raises(ValueError, match=r"the image is \(32, 40\), this tower takes 32 x 32"):
        model.image_features(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match="the text has 10 tokens, this tower takes 9"):
        model.text_features(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(UserError, match="hidden_act = 'relu' is not supported by CLIPTextConfig, only 'quick_gelu', 'gelu'"):
        CLIPText.from_config({"hidden_act": "relu"})
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}}')
    save_file({"text_model.final_layer_norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit CLIPVision: vision_model.embeddings.class_embedding is missing"):
        CLIPVision.from_pretrained(tmp_path)
