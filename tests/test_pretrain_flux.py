"""The small Flux: its text stub, its colour score, the recipe at smoke scale, and the checkpoint that ships."""

from dataclasses import replace

import pytest
import torch

from common.backbones import pretrained
from common.backbones.flux import FluxTransformer2DModel
from common.data.scenes import BACKGROUNDS, COLOURS, Scene, Thing, captioned, full_caption, render_all
from common.pretrain import recipe, shipping
from common.tiny_flux import WORDS, OnPixels, colour_accuracy, colours_seen, encode, sample, words

# ---- text -----------------------------------------------------------------------------------------------------------------------------


def test_words():
    assert words("a red circle on a gray background, neon style") == ["a", "red", "circle", "on", "a", "gray", "background", "neon", "style"]
    assert words("") == ["<null>"]


def test_states_are_word_plus_position_and_zero_behind():
    text = encode(["a red circle", "red a circle", ""])
    states, pooled = text["states"], text["pooled"]
    assert states.shape == (3, WORDS, 64) and pooled.shape == (3, 64)
    assert not states[:2, 3:].any() and not states[2, 1:].any() and states[:2, :3].abs().min() > 0
    torch.testing.assert_close(pooled[0], pooled[1])  # the mean knows no order
    torch.testing.assert_close(states[0, 0] - states[1, 0], states[1, 1] - states[0, 1])  # w(a) - w(red), whichever the position
    torch.testing.assert_close(states[0, 2], states[1, 2])
    assert torch.equal(encode(["a red circle"])["states"][0], states[0])  # nothing depends on the other captions


def test_vectors_have_the_stated_scale_and_are_distinct():
    vocabulary = sorted({word for text in captioned(300, seed=0).captions for word in words(text)})
    assert len(vocabulary) > 30
    pooled = encode(vocabulary)["pooled"]
    assert abs(pooled.std() - 1) < 0.05 and abs(pooled.mean()) < 0.05
    assert torch.pdist(pooled).min() > 64**0.5  # independent ones are about √128 apart
    positions = encode([" ".join(["a"] * WORDS)])["states"][0] - encode(["a"])["pooled"]
    assert abs(positions.std() - 0.5) < 0.05


def test_every_caption_fits():
    made = captioned(500, seed=1)
    assert max(len(words(text)) for text in made.captions + [full_caption(scene) for scene in made.scenes]) <= WORDS
    with pytest.raises(ValueError, match="has 19 words: the small Flux reads 18"):
        encode([" ".join(["red"] * 19)])


# ---- images ---------------------------------------------------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """Instead of a Flux: the velocity that leads to `image`, if the text is `pooled`; else the one that leads to black."""

    def __init__(self, image: torch.Tensor, pooled: torch.Tensor):
        super().__init__()
        self.image, self.pooled, self.times = image, pooled, []

    def forward(self, tokens, states, pooled, t, img_ids, txt_ids):
        assert img_ids.shape == (64, 3) and txt_ids.shape == (WORDS, 3)
        self.times.append(float(t[0]))
        told = (pooled == self.pooled).all(1)[:, None, None, None]
        z = OnPixelsInverse.unpack(tokens)
        velocity = (z - torch.where(told, self.image, -torch.ones_like(self.image))) / t[:, None, None, None]
        return OnPixelsInverse.pack(velocity)


class OnPixelsInverse:
    """Packing by hand: token 8 r + c holds the 4 x 4 pixels at row 4 r, column 4 c, channel by channel."""

    @staticmethod
    def pack(images):
        tokens = [images[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(1) for r in range(8) for c in range(8)]
        return torch.stack(tokens, 1)

    @staticmethod
    def unpack(tokens):
        rows = [torch.cat([tokens[:, 8 * r + c].unflatten(1, (3, 4, 4)) for c in range(8)], 3) for r in range(8)]
        return torch.cat(rows, 2)


def test_the_sampler_follows_the_velocity_with_times_from_1_to_0():
    image = captioned(1, seed=0).images / 127.5 - 1
    model = Known(image, encode(["a red circle"])["pooled"])
    found = sample(model, ["a red circle"], torch.randn(1, 3, 32, 32), steps=4, guidance=1.0)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    assert model.times == pytest.approx([1, 0.75, 0.5, 0.25])
    # guidance 2 goes as far beyond the image as black is before it: 2 image + 1, clamped
    guided = sample(model, ["a red circle"], torch.randn(1, 3, 32, 32), steps=4, guidance=2.0)
    torch.testing.assert_close(guided, (2 * image + 1).clamp(-1, 1), atol=1e-5, rtol=0)


def test_sites_know_the_grid():
    module = recipe("tiny-flux")
    model = module.build(module.SCALES["smoke"])
    seen = []

    class Watch:
        def weights(self, site, p):
            seen.append((site.grid, site.step, p.shape[-1]))
            return p

    from common.attention import controlled

    with controlled(OnPixels(model), Watch()):
        sample(model, ["a red circle"], torch.randn(1, 3, 32, 32), steps=2)
    assert seen == [((8, 8), 0, WORDS + 64)] * 2 + [((8, 8), 1, WORDS + 64)] * 2


# ---- the score ------------------------------------------------------------------------------------------------------------------------


def two(first: str, second: str, ground: str, **options) -> Scene:
    return Scene((Thing("circle", first, 0.25, 0.5, 0.19, **options), Thing("ring", second, 0.75, 0.5, 0.19, **options)), ground)


@pytest.mark.parametrize("texture", ["plain", "striped", "dotted"])
def test_colours_are_read_off_renders(texture):
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    asked = [two(colours[i % 6], colours[(i + 1) % 6], grounds[i % 4], texture=texture) for i in range(12)]
    images = render_all(asked)[0]
    assert colours_seen(images, asked) == [(scene.things[0].colour, scene.things[1].colour, scene.background) for scene in asked]
    assert colour_accuracy(images, asked) == {"colour at its place": 1.0, "background at the corners": 1.0}


def test_colour_accuracy_counts_things():
    drawn = render_all([two("red", "blue", "white"), two("red", "blue", "white")])[0]
    asked = [two("red", "blue", "white"), two("red", "green", "black")]
    assert colour_accuracy(drawn, asked) == {"colour at its place": 0.75, "background at the corners": 0.5}


# ---- the checkpoint -------------------------------------------------------------------------------------------------------------------


def test_the_shipped_checkpoint_is_as_good_as_it_says():
    models, told = shipping.load("tiny-flux"), shipping.provenance("tiny-flux")["quality"]
    found = recipe("tiny-flux").measure(models)
    assert found == pytest.approx(told, abs=0.02)
    assert found["colour at its place"] > 3 * found["colour at its place (floor)"] / 2
    assert sum(file.stat().st_size for file in (pretrained.CHECKPOINTS / "tiny-flux").rglob("*")) < 4e6
    weights = FluxTransformer2DModel.from_pretrained("tiny").state_dict()
    assert all(torch.equal(weights[name], t) for name, t in models["transformer"].state_dict().items())


def test_the_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    module = recipe("tiny-flux")
    cfg = replace(module.SCALES["smoke"], out=tmp_path / "run")
    trained = module.train(cfg)["transformer"]
    trained.save_pretrained(pretrained.CHECKPOINTS / "tiny-flux" / "transformer", torch.bfloat16)
    loaded = FluxTransformer2DModel.from_pretrained("tiny")
    assert all(torch.equal(t, trained.state_dict()[name].bfloat16().float()) for name, t in loaded.state_dict().items())
    assert loaded.proj_out.weight.abs().sum() > 0 and module.data(cfg) == module.data(cfg)
    assert torch.equal(module.samples(loaded, ["a red circle"], steps=2), module.samples(loaded, ["a red circle"], steps=2))


def test_one_caption_in_ten_is_null():
    module = recipe("tiny-flux")
    text = encode(["a red circle"] * 400)
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, tokens, states, pooled, t, img_ids, txt_ids):
            seen.append((states, pooled, t))
            return torch.zeros_like(tokens)

    torch.manual_seed(0)
    images = torch.randint(256, (400, 3, 32, 32), dtype=torch.uint8)
    loss = module.flow_loss(Recorder(), (images, text["states"], text["pooled"]))
    [(states, pooled, t)] = seen
    null = encode([""])
    dropped = (pooled == null["pooled"]).all(1)
    assert torch.equal(dropped, (states == null["states"]).all((1, 2))) and 20 < dropped.sum() < 60
    assert torch.equal(states[~dropped], text["states"][~dropped])
    assert abs(t.logit().mean() - 1) < 0.2 and abs(t.logit().std() - 1) < 0.1
    assert float(loss) == pytest.approx(1 + float((images / 127.5 - 1).square().mean()), rel=0.01)  # E (ε - x)²
