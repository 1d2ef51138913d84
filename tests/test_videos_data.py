"""Captioned videos: the pictures show what captions, masks and centres say, and a folder of files gives what its table lists."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.data import Batches
from common.data.videos import COLOURS, DIRECTIONS, SHAPES, VOCABULARY, VideoFolder, export, moving_shapes, tokenize
from common.errors import UserError
from common.video import validate_video, write_video

# ---- moving shapes --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return moving_shapes(150, seed=3)


def centroids(masks: torch.Tensor) -> torch.Tensor:
    """(x, y) of the centre of mass, in pixels from the upper left corner."""
    at = torch.arange(masks.shape[-1]) + 0.5
    return torch.stack([(masks.sum(-2) * at).sum(-1), (masks.sum(-1) * at).sum(-1)], -1) / masks.sum((-2, -1))[..., None]


def seen(shapes) -> torch.Tensor:
    """Colour, shape and direction of each clip as its pixels and its mask show them."""
    solid = shapes.masks == 1
    mean = (shapes.video * solid[:, None]).sum((2, 3, 4)) / solid.sum((1, 2, 3))[:, None]
    colour = torch.cdist((mean + 1) / 2, torch.tensor(list(COLOURS.values()))).argmin(1)
    fills = []  # the share of its bounding box that an object covers
    for mask in shapes.masks[:, 0]:
        width, height = mask.amax(0).sum(), mask.amax(1).sum()
        fills.append(mask.sum() / (width * height))
    shape = (torch.stack(fills)[:, None] - torch.tensor([np.pi / 4, 1, 0.5])).abs().argmin(1)
    moved = centroids(shapes.masks)[:, -1] - centroids(shapes.masks)[:, 0]
    direction = (moved @ torch.tensor(list(DIRECTIONS.values())).T.float()).argmax(1)
    return torch.stack([colour, shape, direction], 1)


def test_a_clip_depends_on_seed_and_index_alone(shapes):
    part = moving_shapes(20, seed=3, start=55)  # across the border between two rendered groups
    for name in ("video", "labels", "masks", "centers", "radius"):
        assert torch.equal(getattr(part, name), getattr(shapes, name)[55:75])
    assert part.captions == shapes.captions[55:75]
    assert len(shapes.video.flatten(1).unique(dim=0)) == 150
    assert not torch.equal(moving_shapes(20, seed=4).video, shapes.video[:20])


def test_captions_labels_and_pictures_agree(shapes):
    assert shapes.video.shape == (150, 3, 8, 32, 32) and shapes.video.abs().max() <= 1
    assert torch.equal(seen(shapes), shapes.labels)
    colours, directions = list(COLOURS), list(DIRECTIONS)
    for text, (colour, shape, direction) in zip(shapes.captions, shapes.labels.tolist(), strict=True):
        assert text == f"a {colours[colour]} {SHAPES[shape]} moving {directions[direction]}"
    for column, kinds in enumerate((4, 3, 4)):
        assert (shapes.labels[:, column].bincount() - 150 / kinds).abs().max() < 4 * (150 / kinds) ** 0.5


def test_tokens_are_the_words_of_the_caption(shapes):
    tokens = tokenize(shapes.captions)
    assert tokens.shape == (150, 5)
    assert [" ".join(VOCABULARY[i] for i in row) for row in tokens.tolist()] == shapes.captions
    assert len(VOCABULARY) == 14 and VOCABULARY[0] == "<null>"


@pytest.mark.parametrize(("size", "speed", "frames"), [(32, 2, 8), (64, 2, 6), (24, 1, 8), (32, 0, 4)])
def test_objects_move_at_the_speed_asked(size, speed, frames):
    clips = moving_shapes(60, seed=0, size=size, frames=frames, speed=(speed, speed))
    moved = centroids(clips.masks).diff(dim=1)
    want = torch.tensor(list(DIRECTIONS.values()))[clips.labels[:, 2]] * speed * size / 32
    assert (moved - want[:, None]).abs().max() < 0.12
    assert torch.allclose(clips.centers.diff(dim=1), want[:, None].float().expand_as(moved), atol=1e-4)
    # a triangle's centre of mass lies a third of the radius below the middle of its box
    below = torch.tensor([0, 1 / 3])[None] * (clips.labels[:, 1] == 2)[:, None] * clips.radius[:, None]
    assert (centroids(clips.masks) - clips.centers - below[:, None]).abs().max() < 0.12


def test_speeds_fill_their_range():
    clips = moving_shapes(200, seed=0, frames=4, speed=(1, 3))
    step = clips.centers.diff(dim=1).norm(dim=-1).mean(1)
    assert 1 <= step.min() < 1.1 and 2.9 < step.max() <= 3 and step.mean() == pytest.approx(2, abs=0.2)


def test_the_path_stays_inside(shapes):
    border = shapes.masks.clone()
    border[..., 1:-1, 1:-1] = 0
    assert border.max() < 0.2  # the soft corners of triangles
    area = shapes.masks.sum((2, 3))
    assert (area / area[:, :1] - 1).abs().max() < 0.01  # nothing is cut off
    assert shapes.radius.min() >= 5 and shapes.radius.max() <= 7
    with pytest.raises(ValueError, match="9 frames at speed 3 lead out of the image"):
        moving_shapes(1, seed=0, frames=9, speed=(3, 3))


def test_what_leaves_on_one_side_enters_on_the_other():
    clips = moving_shapes(60, seed=0, size=16, frames=8, speed=(4, 4), wrap=True)  # 2 pixels a frame: 14 of 16
    assert (clips.centers < 0).any() or (clips.centers > 16).any()
    step = torch.tensor(list(DIRECTIONS.values()))[clips.labels[:, 2]] * 2
    for masks, (dx, dy) in zip(clips.masks, step.tolist(), strict=True):
        assert torch.allclose(masks[1:], masks[:-1].roll((dy, dx), (1, 2)), atol=1e-4)


def test_texture_is_striped_and_moves_along(shapes):
    striped = moving_shapes(60, seed=3, texture=True)
    assert torch.equal(striped.masks, shapes.masks[:60])
    still = moving_shapes(60, seed=3, texture=True, speed=(0, 0))
    outside = (striped.masks == 0)[:, None].expand_as(striped.video)
    assert torch.equal(striped.video[outside], shapes.video[:60][outside])
    for clip, mask, (dx, dy) in zip(
        striped.video, striped.masks, (2 * torch.tensor(list(DIRECTIONS.values()))[striped.labels[:, 2]]).tolist(), strict=True
    ):
        inside = (mask[1:] == 1)[None].expand(3, -1, -1, -1)
        assert torch.allclose(clip[:, 1:][inside], clip[:, :-1].roll((dy, dx), (2, 3))[inside], atol=1e-4)
    square = int((still.labels[:, 1] == 1).nonzero()[0])
    row = still.video[square, :, 0][:, (still.masks[square, 0] == 1).any(1)][:, 2].mean(0)[(still.masks[square, 0] == 1).any(0)]
    assert torch.allclose(row[4:], row[:-4], atol=1e-4) and (row[2:] - row[:-2]).abs().max() > 0.2  # period 4, the half-period differs


def test_light_scales_the_whole_frame(shapes):
    lit = moving_shapes(150, seed=3, light=True)
    ratio = ((lit.video + 1) / (shapes.video + 1)).flatten(3)
    ratio = ratio.median(-1).values[:, 1]  # of green, which seldom saturates: (clip, frame)
    assert (ratio.mean(1).min() < 0.5) and (1.2 < ratio.mean(1).max() < 1.33)
    drift = ratio.amax(1) / ratio.amin(1)
    assert drift.min() > 1.1 and drift.max() < 1.1 / 0.9 + 1e-3
    dark = lit.video.amax((1, 2, 3, 4)) < 1  # nothing cut off
    assert dark.sum() > 50
    want = (shapes.video[dark] + 1) * ratio[dark][:, None, :, None, None]
    assert torch.allclose(lit.video[dark] + 1, want, atol=1e-4)


def test_labels_can_be_given(shapes):
    labels = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(4))
    clips = moving_shapes(48, seed=3, labels=labels)
    assert torch.equal(seen(clips), labels)
    assert torch.equal(clips.radius, shapes.radius[:48])


# ---- export and VideoFolder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 24])
def test_exported_clips_come_back(tmp_path, size):
    clips = moving_shapes(4, seed=1, size=size)
    export(clips, tmp_path)
    folder = VideoFolder(tmp_path, frames=8, size=size)
    assert len(folder) == 4
    for i, (video, caption) in enumerate(folder[k] for k in range(4)):
        assert caption == clips.captions[i] and video.dtype == torch.float32
        assert (video - clips.video[i]).abs().mean() * 127.5 < 1.5
    assert all(validate_video(path) == 8 for path in (tmp_path / "clips").iterdir())
    assert (tmp_path / "metadata.csv").read_text().splitlines()[:2] == ["path,caption", f"clips/00000.mp4,{clips.captions[0]}"]


def grey_clip(path, frames: int) -> None:
    """8 frames a second; frame t has the grey 20 + 5 t."""
    write_video(path, (20 + 5 * torch.arange(frames)).to(torch.uint8)[:, None, None, None].repeat(1, 64, 64, 3))


def times(video: torch.Tensor) -> list[int]:
    return ((((video.mean((0, 2, 3)) + 1) * 127.5) - 20) / 5).round().int().tolist()


@pytest.fixture
def root(tmp_path):
    grey_clip(tmp_path / "a.mp4", 40)
    grey_clip(tmp_path / "deep/b.mp4", 24)
    (tmp_path / "metadata.csv").write_text('path,caption,split\na.mp4,"grey, getting lighter",train\ndeep/b.mp4,short,val\n')
    return tmp_path


def test_csv(root):
    folder = VideoFolder(root, frames=4, stride=3, size=16, random_start=False)
    video, caption = folder[0]
    assert video.shape == (3, 4, 16, 16) and times(video) == [0, 3, 6, 9] and caption == "grey, getting lighter"
    assert [VideoFolder(root, split=split)[0][1] for split in ("train", "val")] == ["grey, getting lighter", "short"]


def test_jsonl_with_parts_of_videos(root):
    (root / "metadata.csv").unlink()
    rows = [{"path": "a.mp4", "caption": "middle", "start": 1.0, "end": 2.0}, {"path": "a.mp4", "caption": "end", "start": 4}]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    folder = VideoFolder(root, frames=4, stride=2)
    starts = {times(folder[0][0])[0] for _ in range(20)}
    assert starts == {8, 9}  # frames 8-15, of which a clip spans 7
    assert {times(folder[1][0])[0] for _ in range(20)} == {32, 33} and folder[1][1] == "end"


def test_starts_are_drawn_from_the_seed(root):
    folder = VideoFolder(root, frames=8)

    def starts() -> list[int]:
        torch.manual_seed(0)
        return [times(folder[0][0])[0] for _ in range(12)]

    first = starts()
    assert first == starts() and len(set(first)) > 6 and max(first) <= 32

    def stream(start: int) -> list:
        return [batch for step in Batches(folder, 2, seed=5).stream(start, 4) for batch in step]

    for whole, resumed in zip(stream(0)[2:], stream(2), strict=True):
        assert torch.equal(whole[0], resumed[0]) and whole[1] == resumed[1]


def test_bad_files_are_replaced_and_reported(root):
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:1500])
    grey_clip(root / "brief.mp4", 5)
    with (root / "metadata.csv").open("a") as table:
        table.write("cut.mp4,x,train\ngone.mp4,y,train\nbrief.mp4,z,train\n")
    folder = VideoFolder(root, frames=8)
    assert folder.skipped == []
    with pytest.warns(UserWarning) as caught:
        found = [folder[k] for k in (2, 3, 4, 2, 3, 4)]
    for video, caption in found:
        assert caption in ("grey, getting lighter", "short") and len(set(times(video))) == 8
    assert folder.skipped == ["cut.mp4", "gone.mp4", "brief.mp4"]
    said = sorted(str(warning.message).removeprefix(f"skipped {root}/") for warning in caught)  # each file once
    assert said[0] == "brief.mp4: a clip takes 8 frames, but there are 5"
    assert said[1].startswith("cut.mp4: truncated or damaged after")
    assert said[2:] == ["gone.mp4: there is no such file"]


@pytest.mark.filterwarnings("ignore:skipped")
def test_ten_replacements_in_a_row_are_the_end(root):
    with pytest.raises(UserError, match=r"11 videos in a row .*a clip takes 50 frames, but there are (40|24)"):
        VideoFolder(root, frames=50)[0]


def test_workers(root):
    """Two worker processes read the same clips, and tell their parent what they skipped."""
    with (root / "metadata.csv").open("a") as table:
        table.write("gone.mp4,y,train\n")
    folder = VideoFolder(root, frames=4, random_start=False)
    loader = DataLoader(folder, batch_size=1, sampler=[0, 1, 2, 1], num_workers=2, multiprocessing_context="forkserver", timeout=120)
    found = [(times(video[0]), caption[0]) for video, caption in loader]
    assert [found[k] for k in (0, 1, 3)] == [([0, 1, 2, 3], "grey, getting lighter"), *[([0, 1, 2, 3], "short")] * 2]
    assert found[2][1] in ("grey, getting lighter", "short")
    assert folder.skipped == ["gone.mp4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file,caption\na.mp4,x\n", "row 1 has no path, only file, caption"),
        ("metadata.csv", "path\na.mp4\n", "row 1 has no caption, only path"),
        ("metadata.csv", "path,caption\na.mp4,x\n,y\n", "row 2 has no path"),
        ("metadata.csv", "path,caption\n", "lists no videos"),
        ("metadata.csv", "path,caption,start\na.mp4,x,soon\n", "start and end of row 1 must be seconds .*soon"),
        ("metadata.csv", b"path,caption\na.mp4,\xff\n", "is not a UTF-8 csv table"),
        ("metadata.jsonl", '{"path": "a.mp4", "caption": "x"}\n{"path": \n', "is not a UTF-8 jsonl table"),
        ("metadata.jsonl", "[1, 2]\n", "is not a UTF-8 jsonl table"),
    ],
)
def test_bad_tables(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        VideoFolder(tmp_path)


def test_missing_parts(root):
    with pytest.raises(UserError, match="no such directory; it must hold videos and metadata.csv"):
        VideoFolder(root / "nowhere")
    with pytest.raises(UserError, match="has no metadata.csv or metadata.jsonl"):
        VideoFolder(root / "deep")
    with pytest.raises(UserError, match="no row has the split 'test'; its column `split` has 'train', 'val'"):
        VideoFolder(root, split="test")
