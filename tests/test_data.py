"""The data: reproducible sample by sample, what it says it is, and clear about what is missing."""

import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.feature_selection import f_classif

from common.data import images, photos, text
from common.data.digits import digits
from common.data.scenes import CLASSES, FILLS, coverage, fill_pattern, pink_noise, scale_mix, shape_distance
from common.errors import UserError

# ---- scenes ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mix():
    return scale_mix(800, seed=3)


def test_a_scene_depends_on_seed_and_index_alone(mix):
    part = scale_mix(20, seed=3, start=250)  # across the border between two rendered groups
    for whole, piece in zip((mix.images, mix.labels, mix.masks), (part.images, part.labels, part.masks), strict=True):
        assert torch.equal(whole[250:270], piece)
    assert not torch.equal(scale_mix(20, seed=4).images, mix.images[:20])
    assert len(mix.images.flatten(1).unique(dim=0)) == 800


def test_classes_are_balanced_and_named(mix):
    assert mix.labels.bincount().tolist() == [50] * 16
    assert len(CLASSES) == 16 and CLASSES[6] == "coarse horizontal stripes, fine vertical stripes"
    assert torch.equal(mix.masks.amax((1, 2)), 1 + mix.labels % 4)
    assert all(len(mask.unique()) == 2 for mask in mix.masks)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", np.pi * 100), ("square", np.pi * 100), ("triangle", 20 * 20 / 2), ("cross", 2 * 20 * 7.6 - 7.6**2)],
)
def test_shapes_have_the_area_of_the_formula(shape, area):
    y, x = np.mgrid[-20:20:800j, -20:20:800j]
    distance = shape_distance(shape, x, y, np.array(10.0))
    assert (distance < 0).mean() * 1600 == pytest.approx(area, rel=0.01)
    y, x = np.mgrid[-20:20, -20:20] + 0.5
    assert coverage(shape_distance(shape, x, y, np.array(10.0))).sum() == pytest.approx(area, rel=0.02)


def test_masks_have_the_outline_of_a_shape(mix):
    """The share of its bounding box that each mask fills tells circle, square, triangle and cross apart; all are as frequent."""
    shares = np.array([np.pi / 4, 1, 0.5, 2 * 0.38 - 0.38**2])
    found = []
    for mask in mix.masks.numpy() > 0:
        rows, columns = ndimage.find_objects(mask.astype(int))[0]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert 17 <= width <= 34 and abs(height - width) <= 1
        distance = abs(shares - mask.sum() / (height * width))
        assert distance.min() < 0.06
        found.append(distance.argmin())
    assert abs(np.bincount(found) - 200).max() < 4 * (800 * 3 / 16) ** 0.5


def test_masks_lie_on_the_object(mix):
    """The object shifts the tint, so of all masks moved, grown or shrunk, the true one explains most of red - green."""
    red_green = mix.images[:200, 0].numpy().astype(int) - mix.images[:200, 1].numpy()
    masks, block = mix.masks[:200].numpy() > 0, np.ones((3, 3))

    def explained(change) -> float:
        return np.mean([np.corrcoef(d.ravel(), change(mask).ravel())[0, 1] ** 2 for d, mask in zip(red_green, masks, strict=True)])

    true = explained(lambda mask: mask)
    for shift in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        assert explained(lambda mask, shift=shift: np.roll(mask, shift, (0, 1))) < 0.95 * true
    assert explained(lambda mask: ndimage.binary_dilation(mask, block)) < 0.9 * true
    assert explained(lambda mask: ndimage.binary_erosion(mask, block)) < 0.9 * true


FINE, COARSE = (4, 6), (20, 28)  # shortest and longest period of the patterns, in pixels
DIRECTIONS = {"dots": (0.5, 0.5, 0), "horizontal stripes": (0, 1, 0), "vertical stripes": (1, 0, 0), "checker": (0, 0, 1)}


def spectrum(picture: np.ndarray, longest: float, shortest: float) -> tuple[list[float], float]:
    """Shares of the power that vary along x, along y and along the diagonals; and the strongest wave's period, within these two."""
    f = np.fft.fftfreq(256)
    fy, fx = np.meshgrid(f, f, indexing="ij")
    frequency, angle = np.hypot(fx, fy), np.rad2deg(np.arctan2(fy, fx)) % 180
    window = np.outer(np.hanning(len(picture)), np.hanning(len(picture)))
    power = abs(np.fft.fft2((picture - picture.mean()) * window, s=(256, 256))) ** 2
    power *= (frequency > 1 / longest) & (frequency < 1 / shortest)
    along_x, along_y = np.minimum(angle, 180 - angle) < 22.5, abs(angle - 90) < 22.5
    shares = [power[where].sum() / power.sum() for where in (along_x, along_y, ~along_x & ~along_y)]
    return shares, 1 / frequency.flat[power.argmax()]


def check_periods(measured: list[float], fill: str, expected: tuple[int, int]) -> None:
    """Uniform between the two expected; the waves of a checker run diagonally, where the period is shorter."""
    low, middle, high = np.quantile(measured, [0.15, 0.5, 0.85]) * (np.sqrt(2) if fill == "checker" else 1)
    width = expected[1] - expected[0]
    assert middle == pytest.approx(sum(expected) / 2, abs=0.2 * width)
    assert expected[0] - 0.1 * width < low < expected[0] + 0.35 * width
    assert expected[1] - 0.35 * width < high < expected[1] + 0.1 * width


@pytest.mark.parametrize("fill", FILLS)
def test_fine_patterns_have_their_direction_and_period(mix, fill):
    shares, periods = [], []
    for image, mask in zip(*(t[mix.labels % 4 == FILLS.index(fill)].numpy() for t in (mix.images, mix.masks)), strict=True):
        top, left = (round(c) - 8 for c in ndimage.center_of_mass(mask))
        middle = np.s_[top : top + 16, left : left + 16]
        if (mask[middle] > 0).all():
            share, period = spectrum(image.mean(0)[middle], 1.3 * FINE[1], 2)
            shares.append(share)
            periods.append(period)
    assert len(shares) > 50 and np.median(shares, 0) == pytest.approx(DIRECTIONS[fill], abs=0.15)
    check_periods(periods, fill, FINE)


def test_coarse_patterns_have_their_direction_and_period():
    """Against the photographs behind, which have no direction in common: by how much each fill moves the shares."""
    mix, shares = scale_mix(192, seed=3, size=144), []
    for i, fill in enumerate(FILLS):
        found = [spectrum(image.mean(0), 1.4 * COARSE[1], COARSE[0] / 2) for image in mix.images[mix.labels // 4 == i].numpy()]
        shares.append(np.median([share for share, _ in found], 0))
        check_periods([period for _, period in found], fill, COARSE)
    moved, expected = (np.array(x) - np.mean(x, 0) for x in (shares, list(DIRECTIONS.values())))
    assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.95


def test_mean_colours_do_not_tell_the_class(mix):
    pixels, inside = mix.images.float(), (mix.masks > 0).unsqueeze(1)
    features = torch.cat([pixels.mean((2, 3)), (pixels * inside).sum((2, 3)) / inside.sum((2, 3))], 1)
    assert f_classif(features, mix.labels)[1].min() > 0.001  # the variance between classes is that within


def test_fills_have_mean_zero():
    v, u = np.mgrid[:16, :16] * 2 * np.pi / 16
    for fill in FILLS:
        pattern = fill_pattern(fill, u, v)
        assert abs(pattern.mean()) < 1e-12 and pattern.max() == pytest.approx(1)


def test_pink_noise_falls_with_frequency():
    rng = np.random.default_rng(0)
    power = np.mean([abs(np.fft.fft2(pink_noise(rng, 64))) ** 2 for _ in range(100)], 0)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    band = (frequency > 0.05) & (frequency < 0.45)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]) / 2, 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)


def test_larger_scenes_show_shapes_of_the_same_size(mix):
    large = scale_mix(800, seed=3, size=72)
    assert large.images.shape == (800, 3, 72, 72) and large.images.dtype == torch.uint8
    areas = [(m.masks > 0).sum((1, 2)).float() for m in (mix, large)]
    error = (areas[0].std() ** 2 / 800 + areas[1].std() ** 2 / 800) ** 0.5
    assert abs(areas[0].mean() - areas[1].mean()) < 4 * error
    with pytest.raises(ValueError, match="36 pixels"):
        scale_mix(1, 0, size=32)


# ---- photographs ----------------------------------------------------------------------------------------------------------------------


def test_every_photograph_is_attributed():
    found = photos.photos() | photos.textures()
    assert found.keys() == photos.ATTRIBUTION.keys()
    assert all(image.dtype == np.uint8 for image in found.values())
    assert all(image.shape[2] == 3 for image in photos.photos().values()) and all(image.ndim == 2 for image in photos.textures().values())


def test_a_crop_depends_on_seed_and_index_alone():
    crops = photos.crops(12, seed=1, size=32)
    assert crops.shape == (12, 3, 32, 32)
    assert np.array_equal(crops[5:9], photos.crops(4, seed=1, size=32, start=5))
    assert not np.array_equal(crops, photos.crops(12, seed=2, size=32))


def test_a_crop_is_a_part_of_its_photograph():
    cat = photos.photos()["cat"]  # 300 rows, so crops of 300 are not resized
    for crop in photos.crops(6, seed=0, size=300, names=("cat",)).transpose(0, 2, 3, 1):
        windows = [cat[:, left : left + 300] for left in range(152)]
        assert any(np.array_equal(view, w) for view in (crop, crop[:, ::-1]) for w in windows)


# ---- digits ---------------------------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_in_proportion():
    d, source = digits(), load_digits()
    assert d.train_images.shape == (1200, 1, 8, 8) and d.test_images.shape == (597, 1, 8, 8)
    expected = np.bincount(source.target) * 1200 / 1797
    assert abs(d.train_labels.bincount().numpy() - expected).max() <= 1
    pixels = np.concatenate([d.train_images, d.test_images]).reshape(1797, 64) * 16
    together = np.concatenate([pixels, np.concatenate([d.train_labels, d.test_labels])[:, None]], 1)
    original = np.concatenate([source.data, source.target[:, None]], 1)
    order = lambda rows: rows[np.lexsort(rows.T)]
    assert np.array_equal(order(together), order(original))


# ---- text -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_CACHE", str(tmp_path / "cache"))
    text._tokenized.cache_clear()
    text._stdlib.cache_clear()
    yield tmp_path / "cache"
    text._tokenized.cache_clear()
    text._stdlib.cache_clear()


PROSE = "the quick brown fox jumps over the lazy dog, and then it sleeps; "


def test_bpe_writes_every_text_and_learns_the_same_twice():
    tokenizer = text.byte_level_bpe([PROSE * 20], 280)
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.get_vocab() == text.byte_level_bpe([PROSE * 20], 280).get_vocab()
    every_byte = bytes(range(256)).decode("latin-1")
    anything = "".join(chr(c) for c in np.random.default_rng(0).integers(0, 0x110000, 500) if not 0xD800 <= c < 0xE000)
    for sample in ("", "  two  spaces\n\ttab\r\n", "naïve café 東京 🦊", every_byte, anything, PROSE):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert len(tokenizer.encode(PROSE).ids) < 0.6 * len(PROSE)


def test_corpus_of_the_language_reference(cache):
    from pydoc_data.topics import topics

    c = text.corpus("topics", vocab=512, context=64)
    assert c.vocab_size == 512 and max(c.train.max(), c.val.max()) < 512
    (kept,) = cache.glob("bpe-*.json")
    tokenizer = text.Tokenizer.from_file(str(kept))
    train, val = tokenizer.decode(c.train), tokenizer.decode(c.val)
    assert c.bytes_per_token == len(val.encode()) / len(c.val)
    held_out = [whole for document in topics.values() if (whole := re.sub(r"\n{2,}", "\n\n", document.strip("\n"))) in val]
    assert sum(map(len, held_out)) >= len(val) - 2 * len(held_out)
    assert {p for p in train.split("\n\n") if len(p) > 80}.isdisjoint(val.split("\n\n"))
    assert 0.08 < len(val) / sum(map(len, topics.values())) < 0.105
    assert text.corpus("topics", vocab=512, context=64) is c


def test_a_trained_tokenizer_is_kept(cache, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(PROSE * 50)
    first = text.corpus(str(tmp_path / "a.txt"), vocab=280, context=16)
    text._tokenized.cache_clear()
    monkeypatch.setattr(text, "byte_level_bpe", None)  # learning again would fail
    again = text.corpus(str(tmp_path / "a.txt"), vocab=280, context=16)
    assert np.array_equal(first.train, again.train) and first.hash == again.hash
    monkeypatch.undo()
    monkeypatch.setenv("ATLAS_CACHE", str(cache))
    (tmp_path / "a.txt").write_text(PROSE * 49 + PROSE.upper())
    assert text.corpus(str(tmp_path / "a.txt"), vocab=280, context=16).hash != first.hash


def test_documents_are_held_out_whole_and_their_copies_dropped():
    copied = "a paragraph of more than forty characters, word for word."
    documents = {f"document {i}": f"text number {i} that stands in one document only.\n\n{copied}\n\nshort" for i in range(40)}
    train, val = text._by_document(documents)
    for i in range(40):
        assert (f"number {i} that" in train) != (f"number {i} that" in val)
    assert val.count("text number") in (3, 4) and copied in val and copied not in train and train.count("short") > 30
    assert text._by_document(dict(reversed(documents.items()))) == (train, val)


def test_docstrings_of_the_standard_library(cache, tmp_path, monkeypatch):
    files = {
        "a.py": '"""Module a."""\nclass A:\n    """Class A,\n    two lines."""\n    async def f(self):\n        "Method f."\nx = "no docstring"\n',
        "test/b.py": '"""A test."""',
        "p/site-packages/c.py": '"""Installed."""',
        "p/d.py": "def broken(:",
        "p/e.py": "x = 1",
    }
    for name, source in files.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    expected = {"a.py": "Module a.\n\nClass A,\ntwo lines.\n\nMethod f."}
    assert text._stdlib() == expected
    text._stdlib.cache_clear()
    monkeypatch.setattr(text, "_docstrings", None)  # read from the cache
    assert text._stdlib() == expected


def test_windows_of_a_corpus():
    c = text.Corpus(100, np.arange(30, dtype=np.uint16), np.arange(50, 62, dtype=np.uint16), context=4, bytes_per_token=1.0, hash="")
    assert len(c) == 26 and c.stride == 1
    inputs, targets = c.batch(torch.tensor([25, 0, 7]))
    assert inputs.tolist() == [[25, 26, 27, 28], [0, 1, 2, 3], [7, 8, 9, 10]] and torch.equal(targets, inputs + 1) and inputs.dtype == torch.int64
    inputs, targets = c.val_windows()
    assert inputs.tolist() == [[50, 51, 52, 53], [54, 55, 56, 57]] and torch.equal(targets, inputs + 1)
    wide = text.Corpus(100, np.arange(60, dtype=np.uint16), np.arange(60, dtype=np.uint16), context=32, bytes_per_token=1.0, hash="")
    assert wide.batch(torch.arange(len(wide)))[0][:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24] and wide.batch(torch.tensor([6]))[1][0, -1] == 56


@pytest.mark.parametrize(("kind", "vocab"), [(np.uint16, 50257), (np.uint32, 100_000)])
def test_token_files(tmp_path, kind, vocab):
    train, val = np.arange(1000, dtype=kind), np.arange(100, 200, dtype=kind)
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    c = text.corpus(str(tmp_path), vocab=vocab, context=32)
    assert np.array_equal(c.train, train) and np.array_equal(c.val, val) and c.vocab_size == vocab and len(c.val_windows()[0]) == 3
    alone = text.corpus(str(tmp_path / "train.bin"), vocab=vocab, context=32)
    assert np.array_equal(alone.train, train[:900]) and np.array_equal(alone.val, train[900:])


def test_bad_texts_are_refused_with_a_sentence(cache, tmp_path):
    def refused(name: Path, match: str, vocab: int = 50257):
        with pytest.raises(UserError, match=match):
            text.corpus(str(name), vocab=vocab, context=32)

    refused(tmp_path / "nowhere.txt", "no such file; give a text file.*stdlib, topics")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    refused(tmp_path, r"val\.bin is missing: put nanoGPT's")
    (tmp_path / "val.bin").write_bytes(b"odd")
    refused(tmp_path, "has 3 bytes, which are no uint16 token ids")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    refused(tmp_path, "holds token 99, but the vocabulary has 64: set the vocabulary size", vocab=64)
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "val.bin")
    refused(tmp_path, "has 20 tokens, but a window takes 33: give a longer text")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    refused(tmp_path / "latin.txt", "is not UTF-8 text")
    (tmp_path / "short.txt").write_text("too short")
    refused(tmp_path / "short.txt", "give a longer text")


# ---- image folders --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes in ImageNet's layout; each image is of one grey."""
    for split in ("train", "validation"):
        for label, wnid in enumerate(("n01440764", "n01443537")):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (100 * label + 20 * i,) * 3).save(tmp_path / split / wnid / f"{wnid}_{i}.JPEG", quality=95)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folder_reads_imagenets_layout(folder, split):
    found = images.image_folder(folder, split)
    assert found.classes == ["n01440764", "n01443537"] and [label for _, label in found] == [0, 0, 0, 1, 1, 1]
    assert [np.asarray(image).mean() for image, _ in found] == pytest.approx([0, 20, 40, 100, 120, 140], abs=1)


def test_missing_and_broken_images_are_refused_with_a_sentence(folder):
    with pytest.raises(UserError, match=r"no such directory; it must hold train/<class>/\*\.JPEG"):
        images.image_folder(folder / "nowhere", "train")
    with pytest.raises(UserError, match="has no directory test"):
        images.image_folder(folder, "test")
    (folder / "bare/train").mkdir(parents=True)
    with pytest.raises(UserError, match="Couldn't find any class folder"):
        images.image_folder(folder / "bare", "train")
    (folder / "bare/train/n01440764").mkdir()
    with pytest.raises(UserError, match="no valid file for the classes n01440764"):
        images.image_folder(folder / "bare", "train")

    data = (folder / "train/n01440764/n01440764_0.JPEG").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "a.png")
    png = bytearray((folder / "a.png").read_bytes())
    png[40:60] = bytes(20)
    for name, content in {"cut.JPEG": data[: len(data) // 2], "page.JPEG": b"<html>404</html>", "flipped.png": bytes(png)}.items():
        broken = folder / "train/n01440764/zz_broken"
        (path := broken.with_name(name)).write_bytes(content)
        found = images.image_folder(folder, "train")
        index = [Path(p).name for p, _ in found.samples].index(name)
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            found[index]
        path.unlink()


def test_evaluation_transform_is_resize_crop_normalize():
    picture = Image.fromarray(photos.photos()["coffee"])  # 600 x 400
    ours = images.eval_transform(32, 40)(picture)
    resized = np.asarray(picture.resize((60, 40), Image.Resampling.BICUBIC))[4:36, 14:46] / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert torch.allclose(ours, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5)


def test_training_transform_varies_and_erases():
    picture, transform = Image.fromarray(photos.photos()["coffee"]), images.train_transform(32)
    assert [op for op in map(str, transform.transforms) if op.startswith("RandomErasing")] == ["RandomErasing(p=0.25, mode=pixel, count=(1, 1))"]
    a, b = transform(picture), transform(picture)
    assert a.shape == (3, 32, 32) and not torch.equal(a, b)
