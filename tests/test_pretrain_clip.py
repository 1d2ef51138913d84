"""The shipped tiny-clip is what its json says, and its recipe runs."""

from dataclasses import replace

import pytest
import torch

from common.backbones import pretrained
from common.backbones.clip import CLIP, CLIPVisionWithProjection
from common.data import scenes
from common.pretrain import shipping, tiny_clip


def test_the_shipped_model_is_as_good_as_its_json_says():
    stated = shipping.provenance("tiny-clip")["quality"]
    assert tiny_clip.measure({"": CLIP.from_pretrained("tiny")}) == pytest.approx(stated, abs=0.02)
    assert sum(file.stat().st_size for file in (pretrained.CHECKPOINTS / "tiny-clip").rglob("*")) <= 4e6
    for direction in ("image to text", "text to image"):
        assert stated[f"{direction}: recall@1"] > 10 * stated["recall@1, chance"]
    assert stated["zero-shot colour: accuracy"] > 0.9


def test_a_tower_alone_loads_and_gives_the_same_features():
    images = torch.rand(2, 3, 32, 32)
    tower = CLIPVisionWithProjection.from_pretrained("tiny")
    torch.testing.assert_close(tower.feature(images), CLIP.from_pretrained("tiny").image_features(images))


def test_the_recipe_trains_ships_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(shipping, "SHEETS", tmp_path)
    found = shipping.run("tiny-clip", replace(tiny_clip.SCALES["smoke"], out=tmp_path / "runs"), "just pretrain tiny-clip --scale smoke")
    assert found["parameters"] == {"tiny-clip": sum(p.numel() for p in CLIP.from_pretrained("tiny").parameters())}
    assert (tmp_path / "tiny-clip.png").stat().st_size > 10_000 and found["quality"]["recall@1, chance"] == 1 / 256


def test_held_out_captions_are_distinct_and_tell_their_images():
    images, captions = tiny_clip.held_out(256)
    assert len(set(captions)) == len(captions) == len(images) == 256
    made = scenes.captioned(512, tiny_clip.HELD_OUT)
    told = {image.numpy().tobytes(): scenes.full_caption(scene) for image, scene in zip(made.images, made.scenes, strict=True)}
    assert [told[image.numpy().tobytes()] for image in images] == captions


def test_the_loss_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    s = torch.randn(3, 3)
    rows, columns = -(s - s.logsumexp(1, True)).diagonal().mean(), -(s - s.logsumexp(0, True)).diagonal().mean()
    torch.testing.assert_close(tiny_clip.loss(lambda images, texts: s, (torch.zeros(3, dtype=torch.uint8), torch.zeros(3))), (rows + columns) / 2)


def test_recall_counts_the_rank_of_the_own_partner(monkeypatch):
    """A model whose similarity of pair i with partner j is known: partner 0 beats all for one image in four, the rest are found."""

    class Known:
        def __call__(self, images, rows):
            s = torch.eye(len(images), len(rows))
            if len(images) == len(rows):
                s[::4, 1] = 2
            return s

    found = tiny_clip.measure({"": Known()}, n=32)
    assert found["image to text: recall@1"] == 1 - 8 / 32 and found["image to text: recall@5"] == 1
    assert found["text to image: recall@1"] == 1 - 1 / 32 and found["text to image: recall@5"] == 1 - 1 / 32
