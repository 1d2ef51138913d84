import json

import pytest
import torch
from safetensors.torch import save_file

from common.attention import controlled
from common.backbones.clip import CLIPVisionConfig
from common.backbones.llama import Cache, LlamaConfig
from common.backbones.llava import Llava, LlavaConfig, Role, up_to
from tests.controls import Identity, Record
from tests.goldens import cases
from tests.test_llama import left_padded, published, tolerance

CASES = pytest.mark.parametrize("case", cases("_llava"), ids=lambda case: case.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
IMAGE = 49
SMALL = LlavaConfig(
    LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4),
    CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8),
    image_token_index=IMAGE,
)


def small():
    model = Llava(SMALL).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model


def prompt(before, after, images=1):
    """Random words around the image tokens of 2 x 2 patches."""
    return torch.cat([torch.randint(IMAGE, (before,)), torch.full((4 * images,), IMAGE), torch.randint(IMAGE, (after,))])


# ---- against the golden tensors -------------------------------------------------------------------------------------------------------


@CASES
@DTYPES
def test_full_pass(case, dtype, tmp_path):
    t, suffix, tolerances = case.tensors, ".f64" * (dtype == torch.float64), tolerance(case, dtype)
    close = lambda ours, name: torch.testing.assert_close(ours, t[name + suffix], **tolerances)
    model = Llava.from_pretrained(published(case, tmp_path), dtype=dtype)
    ids, mask, real = t["in.input_ids"], t["in.attention_mask"], t["in.attention_mask"].bool()
    pixels = t["in.pixel_values"].to(dtype, copy=True).requires_grad_()
    depth = model.config.vision_config.num_hidden_layers
    close(torch.stack([model.vision_tower(pixels, i) for i in range(depth + 1)]), "out.vision_hidden_states")
    close(model.image_features(pixels), "out.image_features")
    x = model.embed(ids, pixels)
    torch.testing.assert_close(x[real], t["out.inputs_embeds" + suffix][real], **tolerances)
    with controlled(model.language_model, Record()) as record:
        logits = model(ids, pixels, mask, t["in.position_ids"])
    h = model.language_model.model(x, mask, t["in.position_ids"])
    states, theirs = torch.stack([*record.states, h]), t["out.hidden_states" + suffix]
    torch.testing.assert_close(states[:, real], theirs[:, real], **tolerances)
    maps, theirs = torch.stack(record.maps).transpose(2, 3), t["out.attentions" + suffix].transpose(2, 3)
    torch.testing.assert_close(maps[:, real], theirs[:, real], **tolerances)
    torch.testing.assert_close(logits[real], t["out.logits" + suffix][real], **tolerances)
    (logits * t["in.rand"])[real].sum().backward()
    close(pixels.grad, "grad.pixel_values")


@CASES
@DTYPES
@torch.no_grad()
def test_cached_decoding(case, dtype, tmp_path):
    t, suffix, tolerances = case.tensors, ".f64" * (dtype == torch.float64), tolerance(case, dtype)
    model = Llava.from_pretrained(published(case, tmp_path), dtype=dtype)
    cache = Cache()
    logits = [model(t["in.input_ids"], t["in.pixel_values"].to(dtype), t["in.attention_mask"], t["in.position_ids"], cache)[:, -1]]
    for token in t["in.next_tokens"].split(1, 1):
        with controlled(model.language_model, Record()) as record:
            logits.append(model(token, cache=cache)[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), t["decode.logits" + suffix], **tolerances)
    torch.testing.assert_close(torch.stack(record.maps), t["decode.last_attentions" + suffix], **tolerances)


@CASES
def test_names_of_newer_files(case, tmp_path):
    """The case maps the published names to those in the memory of transformers 5."""
    state = {}
    for name, tensor in case.state("sd.").items():
        [(stem, newer)] = [(s.rstrip("*"), n.rstrip("*")) for s, n in list(case.meta["name_map"].items())[1:] if name.startswith(s.rstrip("*"))]
        state[newer + name.removeprefix(stem)] = tensor
    (tmp_path / "config.json").write_text(json.dumps(case.meta["config"]))
    save_file(state, tmp_path / "model.safetensors")
    loaded, expected = Llava.from_pretrained(tmp_path).state_dict(), case.state("sd.")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


# ---- against transformers -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_files_load_and_agree(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    vision = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=20
    )
    text = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, eos_token_id=7
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=199, vision_feature_select_strategy="full", vision_feature_layer=-1
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    ours = Llava.from_pretrained(tmp_path)
    rows = [torch.cat([torch.randint(8, 199, (a,)), torch.full((17,), 199), torch.randint(8, 199, (b,))]) for a, b in ((3, 9), (5, 2))]
    ids, mask = left_padded(rows, 29)
    pixels, positions = torch.randn(2, 3, 32, 32), (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours(ids, pixels, mask)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=5e-4)
    generated = ours.generate(ids, pixels, mask, max_new_tokens=8)
    expected = theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 29:]
    for mine, other in zip(generated, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(other.tolist()) if token == 7), len(other))
        assert torch.equal(mine[:end], other[:end])


# ---- behaviour ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_image_rows_go_where_the_image_tokens_are():
    model, pixels = small(), torch.randn(3, 3, 16, 16)
    ids, _ = left_padded([prompt(2, 3, images=2), prompt(1, 4)], 13)
    x, words, rows = model.embed(ids, pixels), model.language_model.model.embed_tokens.weight, iter(model.image_features(pixels).flatten(0, 1))
    for b in range(2):
        for n in range(13):
            assert torch.equal(x[b, n], next(rows) if ids[b, n] == IMAGE else words[ids[b, n]])
    assert next(rows, None) is None
    with pytest.raises(ValueError, match="the prompts hold 12 image tokens, not 2 x 4: write one per patch of every image"):
        model.embed(ids, pixels[:2])


@torch.no_grad()
def test_a_batch_equals_its_rows():
    model, pixels = small(), torch.randn(2, 3, 16, 16)
    rows = [prompt(2, 6), prompt(3, 2)]
    ids, mask = left_padded(rows, 12)
    logits, generated = model(ids, pixels, mask), model.generate(ids, pixels, mask, max_new_tokens=5)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -len(row) :], model(row[None], pixels[i : i + 1])[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(generated[i], model.generate(row[None], pixels[i : i + 1], max_new_tokens=5)[0])


def test_an_identity_control_changes_nothing():
    model, pixels, ids = small().double(), torch.randn(1, 3, 16, 16, dtype=torch.float64), prompt(2, 4)[None]
    plain = model(ids, pixels)
    with controlled(model, Identity()):
        torch.testing.assert_close(model(ids, pixels), plain, rtol=0, atol=1e-9)
    with controlled(model, Record(), where=lambda site: site.name.startswith("language_model.")) as record:
        model(ids, pixels)
    assert len(record.maps) == 3


def test_roles():
    model = small()
    ids, mask = left_padded([prompt(2, 3, images=2), prompt(1, 4)], 13)
    letters = lambda roles: ["".join("-siqo"[role] for role in row) for row in roles]
    roles = model.roles(ids, mask)
    assert letters(roles) == ["ssiiiiiiiiqqq", "----siiiiqqqq"]
    assert letters(up_to(roles, 15)) == ["ssiiiiiiiiqqqoo", "----siiiiqqqqoo"]
    assert torch.equal(roles == Role.IMAGE, ids == IMAGE)


def test_real_size():
    """The configuration that llava-hf/llava-1.5-7b-hf publishes, which leaves out what is Llama's default."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    vision = {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    with torch.device("meta"):
        model = Llava.from_config({"image_token_index": 32000, "text_config": text, "vision_config": vision, "vision_feature_layer": -2})
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072
    assert model.vision_tower.vision_model.embeddings.position_embedding.num_embeddings == 576 + 1
