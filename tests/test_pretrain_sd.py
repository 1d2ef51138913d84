"""The recipe of the small Stable Diffusion, and the shipped model against its own record."""

import dataclasses

import pytest
import torch
from torch import nn

from common.backbones import pretrained
from common.backbones.sd_unet import ResnetBlock2D, Transformer2DModel
from common.data import scenes
from common.pretrain import shipping, tiny_sd
from common.stable_diffusion import StableDiffusion


def test_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)
    cfg = dataclasses.replace(tiny_sd.SCALES["smoke"], out=tmp_path / "run")
    (trained,) = tiny_sd.train(cfg).values()
    trained.save_pretrained(tmp_path / "tiny-sd", torch.bfloat16)
    again = shipping.load("tiny-sd")[""]
    for name, weight in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.bfloat16().float()), name
    assert again.sample(["a ring"], steps=2).shape == (1, 3, 32, 32)


def test_loss_against_the_formula_by_hand(monkeypatch):
    """A network that predicts 0: the loss is the mean square of v."""
    model = tiny_sd.build().eval()
    nn.init.zeros_(model.unet.conv_out.weight)
    nn.init.zeros_(model.unet.conv_out.bias)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([0, 999]))
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.stack([torch.full_like(z[0], 2), torch.full_like(z[1], 3)]))
    made = scenes.captioned(2, 0)
    z, a = (2 * (made.images / 255) - 1) / 4, model.schedule.alphas_cumprod[[0, 999]].tolist()
    expected = sum((a[i] ** 0.5 * noise - (1 - a[i]) ** 0.5 * z[i]).square().mean().item() / 2 for i, noise in enumerate((2, 3)))
    assert tiny_sd.loss(model, (made.images, model.tokenizers[0](made.captions))).item() == pytest.approx(expected, rel=1e-5)


def test_a_tenth_of_the_captions_is_dropped(monkeypatch):
    seen = []
    model = tiny_sd.build().eval()
    tower = model.text_encoders[0].text_model
    monkeypatch.setattr(tower, "last", lambda ids: seen.append(ids) or torch.zeros(*ids.shape, 64))
    ids = model.tokenizers[0](["a red circle"] * 2000)
    monkeypatch.setattr(model.unet, "forward", lambda z, t, context: z)
    tiny_sd.loss(model, (torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), ids))
    empty = (seen[0] == model.tokenizers[0]([""])).all(1)
    assert torch.equal(seen[0][~empty], ids[~empty]) and 0.07 < empty.float().mean() < 0.13


def test_residual_branches_start_at_zero():
    model = tiny_sd.build()
    tiny_sd.initialise(model)
    for module in model.unet.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is None:
            x = torch.randn(1, module.conv1.in_channels, 4, 4)
            assert torch.equal(module(x, torch.randn(1, 192)), x)
        elif isinstance(module, Transformer2DModel):
            x = torch.randn(1, module.proj_in.in_channels, 4, 4)
            assert torch.equal(module(x, torch.randn(1, 24, 64)), x)
    assert isinstance(model, StableDiffusion) and not model.unet.conv_out.weight.any()


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert tiny_sd.psnr(a, b) == pytest.approx((20 + 40) / 2)
