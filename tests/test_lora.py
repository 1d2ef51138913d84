import copy

import pytest
import torch
from torch import nn

from common.backbones.sd_unet import UNet2DConditionModel
from common.errors import UserError
from common.lora import LoraLinear, adapter, add_lora, load_lora, lora_state, merge, unmerge
from tests.test_sd_unet import SMALL, random_inputs

TARGETS = r".*attn[12]\.to_(q|k|v|out\.0)"


def adapted_unet():
    """The U-Net with two trained adapters, and what it computed before it had them."""
    torch.manual_seed(0)
    model, inputs = UNet2DConditionModel(SMALL), random_inputs(SMALL)
    base = model(**inputs)
    for name, targets, rank, alpha in (("style", TARGETS, 2, 6.0), ("subject", r".*ff\.net\.2", 3, None)):
        for parameter in add_lora(model, name, targets, rank, alpha):
            nn.init.normal_(parameter, std=0.3)
    return model, inputs, base


def test_by_hand():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    a, b = add_lora(model, "style", "0", rank=2, alpha=6.0)
    assert not b.any() and a.std() > 0
    nn.init.normal_(b)
    x = torch.randn(3, 5)
    plain = model(x)
    with adapter("style"):
        actual = model(x)
    w, bias = model[0].weight, model[0].bias
    torch.testing.assert_close(plain, (x @ w.T + bias).relu())
    torch.testing.assert_close(actual, (x @ (w + 3 * b @ a).T + bias).relu())


def test_names():
    model, *_ = adapted_unet()
    torch.manual_seed(0)
    base = UNet2DConditionModel(SMALL).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    added = set(state) - set(base)
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.style.weight" in added
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.style.weight" in added
    assert len([name for name in added if ".style." in name]) == 4 * 2 * 4 * 2  # blocks · attentions · layers · matrices
    assert len([name for name in added if ".subject." in name]) == 4 * 2
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert state[f"{block}.attn2.to_k.lora_A.style.weight"].shape == (2, 12)
    assert state[f"{block}.ff.net.2.lora_B.subject.weight"].shape == (16, 3)


def test_starts_as_the_base_model():
    torch.manual_seed(0)
    model, inputs = UNet2DConditionModel(SMALL), random_inputs(SMALL)
    base = model(**inputs)
    add_lora(model, "style", TARGETS, 2)
    with adapter("style"):
        assert torch.equal(model(**inputs), base)


def test_activation():
    model, inputs, base = adapted_unet()
    results = {}
    for names in ((), (None,), ("other",), ("style",), ("subject",), ("style", "subject")):
        with adapter(*names):
            results[names] = model(**inputs)
    for names in ((), (None,), ("other",)):
        assert torch.equal(results[names], base)
    different = [base, results["style",], results["subject",], results["style", "subject"]]
    assert all((x - y).abs().max() > 1e-3 for i, x in enumerate(different) for y in different[:i])
    with adapter("style"):
        with adapter(None):
            assert torch.equal(model(**inputs), base)
        assert torch.equal(model(**inputs), results["style",])
    with pytest.raises(RuntimeError), adapter("style"):
        raise RuntimeError
    assert torch.equal(model(**inputs), base)


def test_merged_is_unmerged():
    model, inputs, base = adapted_unet()
    with adapter("style", "subject"):
        both = model(**inputs)
    with adapter("style"):
        style = model(**inputs)
    merge(model, "style")
    merge(model, "style")  # once only
    torch.testing.assert_close(model(**inputs), style, rtol=1e-4, atol=1e-5)
    with adapter("style"):  # not twice
        torch.testing.assert_close(model(**inputs), style, rtol=1e-4, atol=1e-5)
    with adapter("subject"):
        torch.testing.assert_close(model(**inputs), both, rtol=1e-4, atol=1e-5)
    unmerge(model, "style")
    unmerge(model, "style")
    torch.testing.assert_close(model(**inputs), base, rtol=1e-4, atol=1e-5)
    with adapter("style"):
        torch.testing.assert_close(model(**inputs), style, rtol=1e-4, atol=1e-5)


def test_training_moves_the_adapter_only():
    torch.manual_seed(0)
    model, inputs = UNet2DConditionModel(SMALL).requires_grad_(False), random_inputs(SMALL)
    parameters = add_lora(model, "style", TARGETS, 2)
    before = copy.deepcopy(model.state_dict())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(3):
        with adapter("style"):
            losses.append(model(**inputs).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name for name in changed)


def test_files():
    """What one model saves another loads, at the scale it is told, with the prefix of a pipeline or without."""
    model, inputs, _ = adapted_unet()
    state = lora_state(model, "style")
    assert len(state) == 64
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in state
    with adapter("style"):
        expected = model(**inputs)
    for prefix in ("", "unet.", "base_model.model."):
        torch.manual_seed(0)
        other = UNet2DConditionModel(SMALL)
        parameters = load_lora(other, "loaded", {prefix + name: tensor for name, tensor in state.items()}, alpha=6.0)
        assert len(parameters) == 64
        with adapter("loaded"):
            assert torch.equal(other(**inputs), expected)


def test_moves_with_the_model():
    model = nn.Sequential(nn.Linear(5, 4)).double()
    add_lora(model, "style", "0", 2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert isinstance(copy.deepcopy(model)[0], LoraLinear)


def test_wrong_calls():
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="no module of Sequential is called like 'to_q'"):
        add_lora(model, "style", "to_q", 2)
    with pytest.raises(ValueError, match="1 is a Conv2d"):
        add_lora(model, "style", "[01]", 2)
    assert not any(isinstance(module, LoraLinear) for module in model)
    with pytest.raises(ValueError, match="has no adapter 'style'"):
        merge(model, "style")
    add_lora(model, "style", "0", 2)
    with pytest.raises(ValueError, match="already has an adapter 'style'"):
        add_lora(model, "style", "0", 2)
    pair = {"2.lora_A.weight": torch.randn(2, 5), "2.lora_B.weight": torch.randn(4, 2)}
    with pytest.raises(UserError, match="it adapts 2, which Sequential lacks"):
        load_lora(model, "other", pair)
    with pytest.raises(UserError, match=r"must hold pairs <module>.lora_A.weight, <module>.lora_B.weight"):
        load_lora(model, "other", {"0.lora_A.weight": torch.randn(2, 5)})
    with pytest.raises(UserError, match=r"its 0.lora_B.weight is \(3, 2\), Sequential needs \(4, 2\)"):
        load_lora(model, "other", {"0.lora_A.weight": torch.randn(2, 5), "0.lora_B.weight": torch.randn(3, 2)})
