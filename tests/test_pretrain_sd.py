"""The recipe of the small Stable Diffusion, and the shipped model against its own record."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn

from common.backbones import pretrained
from common.backbones.clip import CLIP
from common.backbones.sd_unet import ResnetBlock2D, Transformer2DModel
from common.data import scenes
from common.pretrain import shipping, tiny_sd
from common.stable_diffusion import StableDiffusion


def test_recipe(tmp_path, monkeypatch):
    shutil.copytree(pretrained.CHECKPOINTS / "tiny-clip", tmp_path / "tiny-clip")  # where the text tower begins
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)
    cfg = dataclasses.replace(tiny_sd.SCALES["smoke"], out=tmp_path / "run")
    (trained,) = tiny_sd.train(cfg).values()
    trained.save_pretrained(tmp_path / "tiny-sd", torch.bfloat16)
    again = shipping.load("tiny-sd")[""]
    for name, weight in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.bfloat16().float()), name
    assert again.sample(["a ring"], steps=2).shape == (1, 3, 32, 32)
    clip = CLIP.from_pretrained("tiny").state_dict()
    assert all(torch.equal(weight, clip[name]) for name, weight in trained.text_encoders[0].state_dict().items())  # the tower stays as it is


def test_the_shipped_model_is_as_good_as_its_json_says():
    stated, found = shipping.provenance("tiny-sd")["quality"], tiny_sd.measure(shipping.load("tiny-sd"))
    assert set(found) == set(stated)
    for name, value in found.items():
        assert value == pytest.approx(stated[name], abs=0.5 if "inversion" in name else 0.04), name
    for factor, more in (("layout", 0.4), ("colour", 0.3), ("background", 0.4), ("style", 0.4)):
        assert found[factor] > found[f"{factor}, floor"] + more
    assert sum(path.stat().st_size for path in (pretrained.CHECKPOINTS / "tiny-sd").rglob("*") if path.is_file()) <= 4e6


def test_loss_against_the_formula_by_hand(monkeypatch):
    """A network that predicts 0: the loss is the mean square of v."""
    model = tiny_sd.build().eval()
    nn.init.zeros_(model.unet.conv_out.weight)
    nn.init.zeros_(model.unet.conv_out.bias)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([0, 999]))
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.stack([torch.full_like(z[0], 2), torch.full_like(z[1], 3)]))
    made = scenes.captioned(2, 0)
    z, a = model.codec.fit(made.images / 127.5 - 1).encode(made.images / 127.5 - 1), model.schedule.alphas_cumprod[[0, 999]].tolist()
    expected = sum((a[i] ** 0.5 * noise - (1 - a[i]) ** 0.5 * z[i]).square().mean().item() / 2 for i, noise in enumerate((2, 3)))
    assert tiny_sd.loss(model, (made.images, model.tokenizers[0](made.captions))).item() == pytest.approx(expected, rel=1e-5)


def test_a_tenth_of_the_captions_is_dropped(monkeypatch):
    seen = []
    model = tiny_sd.build().eval()
    tower = model.text_encoders[0].text_model
    monkeypatch.setattr(tower, "last", lambda ids: seen.append(ids) or torch.zeros(*ids.shape, 96))
    ids = model.tokenizers[0](["a red circle"] * 2000)
    monkeypatch.setattr(model.unet, "forward", lambda z, t, context: z)
    tiny_sd.loss(model, (torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), ids))
    empty = (seen[0] == model.tokenizers[0]([""])).all(1)
    assert torch.equal(seen[0][~empty], ids[~empty]) and 0.07 < empty.float().mean() < 0.13


def test_residual_branches_start_at_zero():
    model = tiny_sd.build()
    tiny_sd.initialise(model.unet)
    for module in model.unet.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is None:
            x = torch.randn(1, module.conv1.in_channels, 4, 4)
            assert torch.equal(module(x, torch.randn(1, 256)), x)
        elif isinstance(module, Transformer2DModel):
            x = torch.randn(1, module.proj_in.in_channels, 4, 4)
            assert torch.equal(module(x, torch.randn(1, 24, 96)), x)
    assert isinstance(model, StableDiffusion) and not model.unet.conv_out.weight.any()


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert tiny_sd.psnr(a, b) == pytest.approx((20 + 40) / 2)
