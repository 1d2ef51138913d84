"""The scene reader and its distances, against closed forms, scipy and hand-made scenes; the shipped one against its own record."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from common.backbones import pretrained
from common.data import scenes
from common.data.scenes import Scene, Thing
from common.pretrain import shipping, tiny_reader
from common.reader import Reader, ReaderConfig, accuracy, frechet, lpips, read, truth

CIRCLE = Thing("circle", "red", 0.3, 0.5, 0.2)
SQUARE = Thing("square", "blue", 0.7, 0.5, 0.18, "dotted")


def small_reader():
    return Reader(ReaderConfig(channels=(4, 6, 8, 8), embedding=10)).eval()


# ---- what the judge says --------------------------------------------------------------------------------------------------------------


def test_truth_of_hand_made_scenes():
    pair, alone = Scene((CIRCLE, SQUARE), "white", style="neon"), Scene((CIRCLE,), "black")
    # layout, shape, colour, texture, the same of the second, background, style
    assert truth([pair, alone]).tolist() == [[5, 0, 0, 0, 1, 2, 2, 1, 3], [1, 0, 0, 0, -1, -1, -1, 0, 0]]


def test_accuracy_leaves_out_what_is_not_there():
    asked = torch.tensor([[0, 1, 2, 0, -1, -1, -1, 3, 0], [5, 1, 2, 0, 4, 5, 2, 3, 1]])
    found = torch.tensor([[0, 1, 0, 1, 4, 0, 0, 3, 0], [5, 0, 1, 1, 4, 0, 2, 2, 1]])
    right = [1, 0.5, 0, 0, 1, 0, 1, 0.5, 1]
    assert accuracy(found, asked) == dict(zip(scenes.FACTORS, right, strict=True))


def test_read_takes_the_likeliest_value():
    reader = small_reader()
    wanted = torch.tensor([6, 4, 0, 2, 3, 5, 1, 2, 4])
    for head, value in zip(reader.heads.values(), wanted, strict=True):
        torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            head.bias.copy_(torch.arange(len(head.bias)).eq(value))
    assert read(reader, torch.rand(300, 3, 32, 32)).tolist() == [wanted.tolist()] * 300


def test_features_halve_and_other_sizes_are_refused():
    reader = small_reader()
    assert [tuple(h.shape) for h in reader.features(torch.rand(2, 3, 32, 32))] == [(2, 4, 32, 32), (2, 6, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4)]
    assert reader.embedding(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="3 x 32 x 32, not 3 x 48 x 48"):
        reader(torch.rand(1, 3, 48, 48))


# ---- distances ------------------------------------------------------------------------------------------------------------------------


def test_lpips_on_hand_made_features(monkeypatch):
    """Orthogonal features are 2 apart, whatever their lengths; two stages add up, and positions are averaged."""
    east, north = torch.tensor([3.0, 0]).view(1, 2, 1, 1), torch.tensor([0, 0.5]).view(1, 2, 1, 1)
    half = torch.cat([east, north], 3)  # differs from east at one of two positions
    stages = {"a": [east, east.expand(1, 2, 1, 2)], "b": [north, half], "c": [7 * east, 2 * east.expand(1, 2, 1, 2)]}
    monkeypatch.setattr(Reader, "features", lambda self, key: stages[key])
    reader = small_reader()
    assert lpips(reader, "a", "b").tolist() == pytest.approx([2 + 1])
    assert lpips(reader, "a", "c").tolist() == pytest.approx([0])


def test_frechet_closed_forms():
    x = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7).double())
    x = x - x.mean(0)
    shift = torch.tensor([1.0, 0, 0, 2, 0, 0]).double()
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, x + shift) == pytest.approx(5, abs=1e-6)
    assert frechet(x, 3 * x) == pytest.approx(4 * x.T.cov().trace().item())  # (3 - 1)² tr S


def test_frechet_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)


# ---- the shipped one ------------------------------------------------------------------------------------------------------------------


def test_shipped_reader_is_as_good_as_recorded():
    recorded = shipping.provenance("tiny-reader")
    assert tiny_reader.measure(shipping.load("tiny-reader")) == pytest.approx(recorded["quality"], abs=0.005)
    assert sum(file.stat().st_size for file in (pretrained.CHECKPOINTS / "tiny-reader").rglob("*")) <= 4e6


def test_shipped_reader_reads_scenes_that_no_generator_drew():
    layouts = [Thing("circle", "red", *scenes.PLACES[place], 0.22) for place in scenes.PLACES]
    plain = [Scene((thing,), ground) for thing in layouts for ground in scenes.BACKGROUNDS]
    plain += [Scene((CIRCLE, SQUARE), ground) for ground in scenes.BACKGROUNDS]
    asked = truth(plain)
    found = read(Reader.from_pretrained("tiny"), scenes.render_all(plain)[0] / 255)
    assert ((found == asked) | (asked < 0)).float().mean() > 0.97


def test_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(shipping, "SHEETS", tmp_path)
    monkeypatch.setattr(tiny_reader, "TESTS", 40)
    cfg = dataclasses.replace(tiny_reader.SCALES["smoke"], out=tmp_path / "run")
    found = shipping.run("tiny-reader", cfg, "just pretrain tiny-reader --scale smoke")
    assert set(found["quality"]) == {factor + part for factor in scenes.FACTORS for part in ("", ", unstyled", ", chance")}
    assert (tmp_path / "tiny-reader.png").exists()
    assert Reader.from_pretrained("tiny").embed.weight.dtype == torch.float32
