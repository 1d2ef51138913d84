"""The small Wan: prompts and sampler, the recipe at smoke scale, and the checkpoints that ship."""

from dataclasses import replace

import pytest
import torch

from common.backbones import pretrained
from common.data.videos import VOCABULARY, moving_shapes
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.pretrain import recipe, shipping
from common.tiny_wan import prompt_states, sample


def test_prompts_are_one_hot_words():
    states = prompt_states(["a red circle moving up", ""])
    assert states.shape == (2, 5, len(VOCABULARY)) and torch.equal(states.sum(-1), torch.ones(2, 5))
    assert [VOCABULARY[i] for i in states[0].argmax(-1)] == ["a", "red", "circle", "moving", "up"]
    assert [VOCABULARY[i] for i in states[1].argmax(-1)] == ["<null>"] * 5


class Known(torch.nn.Module):
    """Instead of a Wan: the velocity that leads to a clip if the prompt has words, else to black."""

    def __init__(self, video: torch.Tensor):
        super().__init__()
        self.video, self.times = video, []

    def forward(self, z, timestep, encoder_hidden_states):
        self.times.append(float(timestep[0]))
        told = (encoder_hidden_states[:, 0, 0] == 0).view(-1, 1, 1, 1, 1)  # word 0 is <null>
        return (z - torch.where(told, self.video, -torch.ones_like(self.video))) / (timestep / 1000).view(-1, 1, 1, 1, 1)


def test_the_sampler_follows_the_velocity_on_the_shifted_grid():
    clip = moving_shapes(1, seed=0, frames=6)
    model, noise, pixels = Known(clip.video), torch.randn(1, 3, 6, 32, 32), PatchCodec(PatchCodecConfig(1, 3))
    torch.testing.assert_close(sample(model, pixels, clip.captions, noise, steps=4, guidance=1.0), clip.video, atol=1e-5, rtol=0)
    assert model.times == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)])
    guided = sample(model, pixels, clip.captions, noise, steps=4, guidance=2.0)  # as far beyond the clip as black is before it
    torch.testing.assert_close(guided, (2 * clip.video + 1).clamp(-1, 1), atol=1e-5, rtol=0)


def test_held_out_clips_cover_every_caption_once():
    made = recipe("tiny-wan").held_out()
    assert len(set(made.captions)) == len(made.captions) == 48
    assert made.video.shape == (48, 3, 8, 32, 32)


def test_the_loss_of_a_known_velocity():
    module = recipe("tiny-wan")
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, z, timestep, encoder_hidden_states):
            seen.append((timestep, encoder_hidden_states))
            return torch.zeros_like(z)

    torch.manual_seed(0)
    video, words = 2 * torch.rand(400, 3, 2, 16, 16) - 1, torch.arange(1, 6).repeat(400, 1)
    loss = module.flow_loss(Recorder(), (video, words))
    [(timestep, states)] = seen
    assert float(loss) == pytest.approx(1 + float(video.square().mean()), rel=0.01)  # E (ε - x)²
    null = states.argmax(-1) == 0
    assert torch.equal(null.all(1), null.any(1)) and 20 < null.all(1).sum() < 60  # whole captions, one in ten
    assert timestep.median() == pytest.approx(750, abs=40)  # 3u/(1 + 2u) at u = 1/2


def test_the_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    module = recipe("tiny-wan")
    cfg = replace(module.SCALES["smoke"], out=tmp_path / "run")
    trained = module.train(cfg)
    for name, model in trained.items():
        model.save_pretrained(pretrained.CHECKPOINTS / "tiny-wan" / name, torch.bfloat16)
    for name, model in shipping.load("tiny-wan").items():
        loaded = model.state_dict()
        stored = {key: t.bfloat16().float() if t.is_floating_point() else t for key, t in trained[name].state_dict().items()}
        assert all(torch.equal(t, stored[key]) for key, t in loaded.items())
    assert trained["transformer"].proj_out.weight.abs().sum() > 0 and module.data(cfg) == module.data(cfg)
