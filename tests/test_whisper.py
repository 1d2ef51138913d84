import json

import pytest
import torch
from safetensors.torch import save_file

from common.attention import STAGES, controlled
from common.backbones.whisper import WhisperConfig, WhisperForConditionalGeneration
from tests.controls import Identity
from tests.goldens import cases

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-4}, torch.float64: {"rtol": 1e-8, "atol": 1e-9}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
CASES = pytest.mark.parametrize("case", cases("_whisper"), ids=lambda case: case.name)
SMALL = WhisperConfig(
    vocab_size=40,
    num_mel_bins=6,
    d_model=24,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=36,
    decoder_layers=3,
    decoder_attention_heads=2,
    decoder_ffn_dim=28,
    max_source_positions=9,
    max_target_positions=12,
)


class Maps:
    """Collects the attention weights of a kind of site, in the order of the calls."""

    def __init__(self):
        self.seen = []

    def weights(self, site, p):
        self.seen.append(p.detach())


def maps(model, prefix, kind, run):
    with controlled(model, Maps(), where=lambda site: site.name.startswith(prefix) and site.kind == kind) as control:
        run()
    return torch.stack(control.seen)


def build(case, dtype):
    model = WhisperForConditionalGeneration.from_config(case.meta["config"]).to(dtype)
    model.load_state_dict(case.state("sd."))
    return model


def small_inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 18, generator=g), torch.randint(40, (2, 7), generator=g)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@CASES
@DTYPES
def test_golden_pass(case, dtype):
    model = build(case, dtype)
    features, ids = case.tensors["in.input_features"].to(dtype).requires_grad_(), case.tensors["in.decoder_input_ids"]

    def close(actual, name):
        expected = case.tensors[name + (".f64" if dtype == torch.float64 else "")]
        torch.testing.assert_close(actual, expected, **TOLERANCE[dtype], msg=lambda m: f"{name}: {m}")

    close(model.encode(features), "out.encoder")
    logits = model(features, ids)
    close(logits, "out.logits")
    (grad,) = torch.autograd.grad((logits * case.tensors["in.rand"]).sum(), features)
    close(grad, "grad.input_features")

    run = lambda: model(features, ids)
    close(maps(model, "model.encoder", "self", run), "out.encoder_attentions")
    close(maps(model, "model.decoder", "self", run), "out.decoder_attentions")
    close(maps(model, "model.decoder", "cross", run), "out.cross_attentions")
    assert torch.equal(model(features, ids), logits)


@CASES
@DTYPES
def test_golden_cached_decoding(case, dtype):
    """A prefix and then single tokens; the expected logits are those of the last token of every call."""
    model, suffix = build(case, dtype), ".f64" if dtype == torch.float64 else ""
    features, ids = case.tensors["in.input_features"].to(dtype), case.tensors["in.decoder_input_ids"]
    expected = case.tensors["decode.logits" + suffix]
    states, cache, prefix = model.encode(features), {}, ids.shape[1] - expected.shape[1] + 1
    with controlled(model, Maps(), where=lambda site: site.kind == "cross") as control:
        logits = [model.decode(part, states, cache)[:, -1] for part in ids.split([prefix] + [1] * (expected.shape[1] - 1), 1)]
    torch.testing.assert_close(torch.stack(logits, 1), expected, **TOLERANCE[dtype])
    last = torch.stack(control.seen[-len(model.model["decoder"].layers) :])
    torch.testing.assert_close(last, case.tensors["decode.last_cross_attentions" + suffix], **TOLERANCE[dtype])


def test_transformers_agrees(small):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference implementation")
    config = transformers.WhisperConfig(**vars(SMALL), pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    tables = {"model.encoder.embed_positions.weight": theirs.model.encoder.embed_positions.weight}
    torch.testing.assert_close(WhisperForConditionalGeneration(SMALL).state_dict()[next(iter(tables))], next(iter(tables.values())))

    missing, unexpected = theirs.load_state_dict(small.state_dict(), strict=False)
    assert missing == ["proj_out.weight"] and not unexpected  # tied to the embedding
    features, ids = small_inputs()
    expected = theirs(input_features=features, decoder_input_ids=ids).logits
    torch.testing.assert_close(small(features, ids), expected, rtol=1e-4, atol=1e-4)


def test_identity_control(small):
    features, ids = small_inputs()
    plain = small(features, ids)
    with controlled(small, Identity()) as control:
        torch.testing.assert_close(small(features, ids), plain, rtol=0, atol=1e-6)
    assert torch.equal(small(features, ids), plain)
    assert set(control.calls.values()) == {1} and len(control.calls) == len(STAGES) * (2 + 2 * 3)


def test_control_of_cached_decoding(small):
    """The keys' source is shown once where they are cached, every new token where they are appended."""
    features, ids = small_inputs()
    states, cache = small.encode(features), {}
    plain = small.decode(ids, states)
    with controlled(small, Identity()) as control:
        steps = [small.decode(token, states, cache) for token in ids.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), plain, rtol=0, atol=1e-6)
    calls = {(stage, site.kind): n for (stage, site), n in control.calls.items()}
    assert calls["context", "cross"] == 1 and calls["context", "self"] == calls["weights", "cross"] == ids.shape[1]


def test_loads_with_or_without_the_tied_projection(small, tmp_path):
    features, ids = small_inputs()
    state = small.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(vars(SMALL) | {"model_type": "whisper"}))
    for extra in ({}, {"proj_out.weight": state["model.decoder.embed_tokens.weight"].clone()}):
        save_file(state | extra, tmp_path / "model.safetensors")
        loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded(features, ids), small(features, ids))


def test_published_size():
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig())
    assert sum(p.numel() for p in model.parameters()) == 72_593_920


def test_wrong_lengths(small):
    features, ids = small_inputs()
    with pytest.raises(ValueError, match="exactly 18 mel frames, not 17"):
        small(features[..., :17], ids)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        small(features, torch.zeros(2, 13, dtype=torch.long))
