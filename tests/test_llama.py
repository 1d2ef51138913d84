import json
import re
from dataclasses import replace

import jaxtyping
import pytest
import torch
from safetensors.torch import save_file

from common.attention import STAGES, controlled
from common.backbones.llama import Cache, Llama, LlamaConfig, rope_frequencies
from common.errors import UserError
from tests.controls import Identity, Record
from tests.goldens import cases

CASES = pytest.mark.parametrize("case", cases("_llama") + cases("_qwen2"), ids=lambda case: f"{case.path.parent.name}-{case.name}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SMALL = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def tolerance(case, dtype):
    text = case.meta["tolerance"][str(dtype).removeprefix("torch.")]
    return {kind: float(value) for kind, value in re.findall(r"(rtol|atol) (\S+?)(?:,|$)", text)}


def published(case, directory):
    """The directory of a checkpoint as it lies on the hub."""
    (directory / "config.json").write_text(json.dumps(case.meta["config"]))
    save_file(case.state("sd."), directory / "model.safetensors")
    return directory


def small(config=SMALL, std=0.3):
    model = Llama(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=std)
    return model


def left_padded(rows, width):
    """Rows of different lengths as ids and mask."""
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()


# ---- against the golden tensors -------------------------------------------------------------------------------------------------------


@CASES
@DTYPES
def test_full_pass(case, dtype, tmp_path):
    t, suffix, tolerances = case.tensors, ".f64" * (dtype == torch.float64), tolerance(case, dtype)
    model = Llama.from_pretrained(published(case, tmp_path), dtype=dtype)
    ids, mask, positions, real = t["in.input_ids"], t["in.attention_mask"], t["in.position_ids"], t["in.attention_mask"].bool()
    x = model.embed(ids).detach().requires_grad_()
    with controlled(model, Record()) as record:
        h = model.model(x, mask, positions)
    logits = model.lm_head(h)
    for ours in (logits, model(ids, mask, positions)):
        torch.testing.assert_close(ours[real], t["out.logits" + suffix][real], **tolerances)
    states, theirs = torch.stack([*record.states, h]), t["out.hidden_states" + suffix]
    torch.testing.assert_close(states[:, real], theirs[:, real], **tolerances)
    maps, theirs = torch.stack(record.maps).transpose(2, 3), t["out.attentions" + suffix].transpose(2, 3)
    torch.testing.assert_close(maps[:, real], theirs[:, real], **tolerances)
    (logits * t["in.rand"])[real].sum().backward()
    torch.testing.assert_close(x.grad, t["grad.inputs_embeds" + suffix], **tolerances)


@CASES
@DTYPES
@torch.no_grad()
def test_cached_decoding(case, dtype, tmp_path):
    t, suffix, tolerances = case.tensors, ".f64" * (dtype == torch.float64), tolerance(case, dtype)
    model = Llama.from_pretrained(published(case, tmp_path), dtype=dtype)
    ids, mask, positions = (t[f"in.{name}"] for name in ("input_ids", "attention_mask", "position_ids"))
    steps = t["decode.logits"].shape[1] - 1
    cache, logits, prefix = Cache(), [], ids.shape[1] - steps
    for start, end in [(0, prefix)] + [(i, i + 1) for i in range(prefix, ids.shape[1])]:
        new = slice(start, end)
        with controlled(model, Record()) as record:
            logits.append(model(ids[:, new], mask[:, new], positions[:, new], cache=cache)[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), t["decode.logits" + suffix], **tolerances)
    torch.testing.assert_close(torch.stack(record.maps), t["decode.last_attentions" + suffix], **tolerances)
    for ours, name in zip(zip(*cache.layers, strict=True), ("decode.keys", "decode.values"), strict=True):
        rows = lambda x: x.transpose(2, 3)[:, mask.bool()]
        torch.testing.assert_close(rows(torch.stack(ours)), rows(t[name + suffix]), **tolerances)


# ---- against transformers -------------------------------------------------------------------------------------------------------------

HF_SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "eos_token_id": [7, 8],
    "pad_token_id": 0,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
HF_MODELS = {
    "llama": ("LlamaForCausalLM", {"head_dim": 24, "rope_parameters": SCALED, "attention_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


@pytest.mark.parametrize(("name", "options"), HF_MODELS.values(), ids=HF_MODELS)
@torch.no_grad()
def test_transformers_files_load_and_agree(name, options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class(**HF_SIZES, **options)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = Llama.from_pretrained(tmp_path)
    ids, mask = left_padded([torch.randint(9, 300, (n,)) for n in (30, 11, 24)], 30)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours(ids, mask)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=2e-4)

    generated = ours.generate(ids, mask, max_new_tokens=12)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 30:]
    assert generated.shape == expected.shape
    for mine, other in zip(generated, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(other.tolist()) if token in (7, 8)), len(other))
        assert torch.equal(mine[:end], other[:end])


# ---- generation and the cache ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_equals_uncached_whatever_the_chunks():
    model, ids = small(), torch.randint(50, (2, 13))
    cache = Cache()
    chunks = [model(chunk, cache=cache) for chunk in ids.split([4, 1, 6, 2], 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), model(ids), rtol=1e-5, atol=1e-5)
    assert cache.length() == cache.length(3) == 13


@torch.no_grad()
def test_a_batch_equals_its_rows_and_padding_is_invisible():
    model, rows = small(), [torch.randint(50, (n,)) for n in (9, 5, 7)]
    ids, mask = left_padded(rows, 9)
    logits, generated = model(ids, mask), model.generate(ids, mask, max_new_tokens=6)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, 9 - len(row) :], model(row[None])[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(generated[i : i + 1], model.generate(row[None], max_new_tokens=6))
    right = torch.zeros(1, 9, dtype=torch.long)
    right[0, :5] = rows[1]
    torch.testing.assert_close(model(right, (torch.arange(9) < 5)[None])[0, :5], model(rows[1][None])[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_full_passes():
    model, ids = small(), torch.randint(50, (2, 6))
    generated = model.generate(ids, max_new_tokens=7)
    for _ in range(7):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, ids[:, 6:])


def test_rows_end_by_themselves():
    model, ids = small(), torch.randint(50, (2, 6))
    free = model.generate(ids, max_new_tokens=8)
    end = next(t for t in free[0].tolist() if t not in free[1])
    model.config.end_tokens = [end]
    ended, at = model.generate(ids, max_new_tokens=8), free[0].tolist().index(end)
    assert torch.equal(ended[0, : at + 1], free[0, : at + 1]) and (ended[0, at:] == end).all() and torch.equal(ended[1], free[1])
    assert model.generate(ids[:1], max_new_tokens=8).shape == (1, at + 1)


def test_sampling_draws_from_the_softmax():
    model, ids = small(std=0.15), torch.randint(50, (1, 6))
    expected = (model(ids)[0, -1] / 1.5).softmax(-1)
    draws = model.generate(ids.expand(4000, -1), max_new_tokens=1, temperature=1.5, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draws[:, 0], minlength=50)
    chi2 = ((counts - 4000 * expected).square() / (4000 * expected)).sum()
    assert chi2 < 86  # 0.999 quantile of 49 degrees of freedom


def test_wrong_calls():
    model, ids = small(), torch.randint(50, (2, 6))
    mask = torch.ones(2, 6)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(ids, mask, max_new_tokens=1)
    cache = Cache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 7\), not \(2, 1\): it covers the new tokens"):
        model(ids[:, :1], torch.ones(2, 7), cache=cache)


# ---- controls -------------------------------------------------------------------------------------------------------------------------


def test_an_identity_control_changes_nothing():
    assert all(hasattr(Identity, stage) for stage in STAGES)
    model, (ids, mask) = small().double(), left_padded([torch.randint(50, (n,)) for n in (8, 5)], 8)
    plain = model(ids, mask)
    with controlled(model, Identity()):
        torch.testing.assert_close(model(ids, mask), plain, rtol=0, atol=1e-9)
    with controlled(model, Record()) as record:
        sites = [bound.name for layer in model.model.layers for bound in layer.self_attn.controls]
        model(ids, mask)
    assert sites == [f"model.layers.{i}.self_attn" for i in range(4)] and len(record.states) == len(record.maps) == 4


class Drop:
    """Removes tokens `start` to `end` before a layer, once."""

    def __init__(self, layer, start, end):
        self.layer, self.start, self.end = layer, start, end

    def hidden(self, site, x):
        if site.layer == self.layer and x.shape[1] > self.end:
            return torch.cat([x[:, : self.start], x[:, self.end :]], 1)


@pytest.fixture
def lengths_may_change():
    """`Attention.hidden` is annotated as keeping the length, and the annotations are checked while tests run."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("lengths_may_change")
@torch.no_grad()
def test_a_control_may_drop_tokens():
    """The layers after the drop are a model of their own: one whose input is the shortened residual stream."""
    model, ids = small(), torch.randint(50, (2, 10))
    ids, more = ids[:, :8], ids[:, 8:]
    lower, upper = small(replace(SMALL, num_hidden_layers=2)), small(replace(SMALL, num_hidden_layers=2))
    lower.model.layers, upper.model.layers = model.model.layers[:2], torch.nn.ModuleList(model.model.layers[2:])
    lower.model.embed_tokens, upper.model.norm, upper.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
    lower.model.norm = torch.nn.Identity()

    def by_hand(ids):
        h = lower.model(lower.embed(ids))
        for layer in upper.model.layers:
            layer.self_attn.layer -= 2
        logits = upper(torch.cat([h[:, :1], h[:, 4:]], 1))
        for layer in upper.model.layers:
            layer.self_attn.layer += 2
        return logits

    cache = Cache()
    with controlled(model, Drop(2, 1, 4)):
        torch.testing.assert_close(model(ids), by_hand(ids), rtol=1e-5, atol=1e-5)
        decoded = [model(ids, cache=cache)] + [model(token, cache=cache) for token in more.split(1, 1)]
    assert [cache.length(i) for i in range(4)] == [10, 10, 7, 7]
    torch.testing.assert_close(torch.cat(decoded, 1), by_hand(torch.cat([ids, more], 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("lengths_may_change")
@torch.no_grad()
def test_tokens_are_dropped_beside_padding():
    model, rows = small(), [torch.randint(50, (n,)) for n in (9, 7)]
    ids, mask = left_padded(rows, 9)
    with controlled(model, Drop(1, 4, 6)):
        together = model.generate(ids, mask, max_new_tokens=4), model(ids, mask)[:, 2:]
    for i, (row, start) in enumerate(zip(rows, (4, 2), strict=True)):
        with controlled(model, Drop(1, start, start + 2)):
            alone = model.generate(row[None], max_new_tokens=4), model(row[None])[:, -5:]
        assert torch.equal(together[0][i], alone[0][0])
        torch.testing.assert_close(together[1][i, -5:], alone[1][0], rtol=1e-5, atol=1e-5)


# ---- configurations -------------------------------------------------------------------------------------------------------------------

REAL_SIZES = {
    "Llama-2-7b": (6_738_415_616, (32000, 4096, 11008, 32, 32), {}),
    "Llama-3-8B": (8_030_261_248, (128256, 4096, 14336, 32, 32), {"num_key_value_heads": 8}),
    "Llama-3.2-1B": (1_235_814_400, (128256, 2048, 8192, 16, 32), {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}),
    "Qwen2-0.5B": (494_032_768, (151936, 896, 4864, 24, 14), {"num_key_value_heads": 2, "tie_word_embeddings": True, "model_type": "qwen2"}),
    "Qwen2-7B": (7_615_616_512, (152064, 3584, 18944, 28, 28), {"num_key_value_heads": 4, "model_type": "qwen2"}),
}


@pytest.mark.parametrize(("parameters", "sizes", "options"), REAL_SIZES.values(), ids=REAL_SIZES)
def test_real_sizes(parameters, sizes, options):
    with torch.device("meta"):
        model = Llama(LlamaConfig(*sizes, **options))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_spellings_of_the_rotary_configuration():
    device = torch.device("cpu")
    old = replace(SMALL, rope_theta=5e5, rope_scaling={"type": "llama3"} | {k: v for k, v in SCALED.items() if k not in ("rope_type", "rope_theta")})
    new = replace(SMALL, rope_parameters=SCALED | {"rope_theta": 5e5})
    assert torch.equal(rope_frequencies(old, torch.float64, device), rope_frequencies(new, torch.float64, device))
    assert not torch.equal(rope_frequencies(new, torch.float64, device), rope_frequencies(SMALL, torch.float64, device))


@pytest.mark.parametrize(
    "change", [{"rope_scaling": {"type": "yarn"}}, {"hidden_act": "gelu"}, {"model_type": "mistral"}, {"use_sliding_window": True}], ids=str
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(UserError, match="is not supported by LlamaConfig, only"):
        Llama.from_config(vars(SMALL) | change)
