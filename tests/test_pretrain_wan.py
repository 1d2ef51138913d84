"""The small Wan: prompts and sampler, the recipe at smoke scale, and the checkpoints that ship."""

from dataclasses import replace

import pytest
import torch

from common.backbones import pretrained
from common.backbones.wan import WanConfig, WanTransformer3DModel, rotary_table
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


def test_heads_start_at_the_tokens_around_and_at_other_times():
    """Alone, the biases give weights that fall with the distance, in head 0 from the token itself, in head 1 from its place in other frames."""
    torch.manual_seed(0)
    grid, size = (2, 5, 5), 36
    model = WanTransformer3DModel(WanConfig(num_attention_heads=3, attention_head_dim=size, in_channels=2, out_channels=2, text_dim=4, num_layers=2))
    recipe("tiny-wan").look_around(model)
    attention, seen = model.blocks[1].attn1, []
    for projection in (attention.to_q, attention.to_k):
        torch.nn.init.zeros_(projection.weight)
    attention.attend = lambda q, k, v: seen.append((q @ k.mT / size**0.5).softmax(-1)[0].unflatten(-1, grid)) or v
    attention(torch.randn(1, 50, 3 * size), rotary=rotary_table(grid, size).to(torch.complex64))
    middle = seen[0][:, 25 + 12]  # of the second frame
    for head, frame in ((0, 1), (1, 0)):
        there, other = middle[head, frame], middle[head, 1 - frame]
        assert there.sum() > 2 * other.sum() and there.flatten().argmax() == 12
        torch.testing.assert_close(there, there.flip(0, 1))
        assert there[2, 2] > there[2, 1] > there[2, 0] and there[2, 2] > there[1, 2] > there[0, 2]
    torch.testing.assert_close(middle[2], torch.full(grid, 1 / 50))


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


def test_the_shipped_checkpoint_is_as_good_as_it_says():
    models, told = shipping.load("tiny-wan"), shipping.provenance("tiny-wan")["quality"]
    found = recipe("tiny-wan").measure(models)
    assert found == pytest.approx(told, rel=0.05, abs=0.05)  # one clip in 48 is 0.02
    assert found["colour"] > 0.9 and found["direction"] > 0.9 and found["jerk"] < found["jerk (floor)"]
    assert sum(file.stat().st_size for file in (pretrained.CHECKPOINTS / "tiny-wan").rglob("*")) < 4e6
    weights = WanTransformer3DModel.from_pretrained("tiny").state_dict()
    assert all(torch.equal(weights[name], t) for name, t in models["transformer"].state_dict().items())
