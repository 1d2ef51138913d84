"""Video metrics against clips whose tracks, flickers and spectra are known by construction."""

import pytest
import torch
import torch.nn.functional as F

from common.data.videos import MovingShapes, moving_shapes
from common.video_metrics import VideoNet, VideoNetConfig, count, metrics, sharpness, steadiness, still, stored, track

GREY, RED = torch.tensor([-0.5, -0.5, -0.5]), torch.tensor([0.8, -0.6, -0.6])


def squares(corners, side: int = 8, colours=None, size: int = 32) -> torch.Tensor:
    """A clip (1, 3, frames, size, size) of squares on grey; corners[frame]: one (x, y) of the upper left corner, or several."""
    video = GREY[:, None, None, None].repeat(1, len(corners), size, size)
    for frame, listed in enumerate(corners):
        for x, y in listed if isinstance(listed, list) else [listed]:
            colour = RED if colours is None else colours[frame]
            video[:, frame, y : y + side, x : x + side] = colour[:, None, None]
    return video[None]


def test_track_finds_a_square_exactly():
    corners = [(2, 5), (4, 5), (6, 5), (8, 5), (10, 5)]
    found = track(squares(corners))
    assert torch.equal(found.area, torch.full((1, 5), 64.0))
    torch.testing.assert_close(found.center[0], torch.tensor([(x + 4.0, y + 4.0) for x, y in corners]))
    torch.testing.assert_close(found.colour[0], RED.expand(5, 3))


def test_the_mask_is_where_the_chroma_is():
    video = squares([(0, 0)])
    for x, share in enumerate((0.2, 0.375, 0.6)):  # below a quarter, in the middle of the ramp, above a half
        video[0, :, 0, 20, x] = GREY + share * (RED - GREY)
    assert track(video).mask[0, 0, 20, :4].tolist() == pytest.approx([0, 0.5, 1, 0], abs=1e-5)
    faint = GREY[None, :, None, None, None].repeat(1, 1, 2, 8, 8) + 0.01 * torch.tensor([1.0, 0, 0])[:, None, None, None]
    nothing = track(faint)  # a tint is no object
    assert nothing.area.sum() == 0 and nothing.center.abs().sum() == 0 and count(faint) == 0


def test_straight_motion_is_steady():
    found = steadiness(squares([(2 + 2 * t, 5) for t in range(6)]))
    assert found == pytest.approx({"jerk": 0, "colour flicker": 0, "size flicker": 0}, abs=1e-5)


def test_jerk_is_the_second_difference():
    # x 2 2 6 6 and y 5 5 2 2: second differences (4, -3) and (-4, 3)
    assert steadiness(squares([(2, 5), (2, 5), (6, 2), (6, 2)]))["jerk"] == pytest.approx(5)


def test_flickers():
    colours = [torch.tensor([0.9, -0.6, -0.6]), torch.tensor([0.5, -0.6, -0.6])] * 2  # deviation 0.2 in one channel of three
    assert steadiness(squares([(4, 4)] * 4, colours=colours))["colour flicker"] == pytest.approx(0.2 / 3, abs=1e-5)
    grows = torch.cat([squares([(4, 4)], side=6), squares([(4, 4)], side=8)], 2)  # areas 36 and 64
    assert steadiness(grows)["size flicker"] == pytest.approx(14 / 50, abs=1e-5)


def test_count():
    one, two = (4, 4), [(4, 4), (20, 20)]
    assert count(squares([one, one])) == 1
    assert count(squares([two, two])) == 2
    assert count(squares([one, two])) == 1.5
    speck = squares([one])
    speck[0, :, 0, 24:26, 24:26] = RED[:, None, None]  # 4 pixels of the 20.5 that count
    assert count(speck) == 1
    assert count(speck, expected=0.01) == 2


def test_sharpness():
    x = torch.arange(32) * 2 * torch.pi / 32
    wave = lambda cycles, size=1.0: (size * torch.cos(cycles * x)).expand(1, 3, 2, 32, 32)
    fine, coarse = wave(10), wave(7)
    assert sharpness(2 * fine, fine) == pytest.approx(4, rel=1e-4)
    assert sharpness(fine + coarse, fine) == pytest.approx(1, rel=1e-4)
    assert sharpness(coarse, fine) == pytest.approx(0, abs=1e-4)
    assert sharpness(fine.transpose(3, 4), fine) == pytest.approx(1, rel=1e-4)
    assert sharpness(wave(8, 2.0), wave(8)) == pytest.approx(4, rel=1e-4)  # a quarter of the sampling rate belongs to it
    real = moving_shapes(4, seed=0, frames=4).video
    blurred = F.interpolate(F.avg_pool3d(real, (1, 2, 2)), scale_factor=(1, 2, 2), mode="trilinear")
    assert sharpness(blurred, real) < 0.5


def test_renders_are_steady_single_and_sharp():
    real = moving_shapes(24, seed=0, frames=6, texture=True)
    found = steadiness(real.video)
    assert found["jerk"] < 0.02 and found["size flicker"] < 0.01 and found["colour flicker"] < 0.01
    assert count(real.video) == 1 and sharpness(real.video, real.video) == 1
    symmetric = real.labels[:, 1] < 2  # a triangle's center is not its centroid
    assert (track(real.video).center - real.centers)[symmetric].norm(dim=-1).max() < 0.5


def test_stored_clips_come_back():
    real = moving_shapes(3, seed=0, frames=6)
    video = real.video.flip(3)  # not what `real` shows
    back = stored(real, video)
    assert back.shape == video.shape and (back - video).abs().mean() < 2 * 1.5 / 255


def test_still():
    video = moving_shapes(2, seed=0, frames=4).video
    frozen = still(video)
    assert frozen.shape == (8, 3, 4, 32, 32)
    for clip in range(2):
        for frame in range(4):
            assert torch.equal(frozen[4 * clip + frame], video[clip, :, [frame] * 4])


def test_videonet_reads_any_length_and_size():
    torch.manual_seed(0)
    judge = VideoNet(VideoNetConfig()).eval()
    video = moving_shapes(3, seed=0, frames=6).video
    logits = judge(video)
    assert {name: tuple(t.shape) for name, t in logits.items()} == {"colour": (3, 4), "shape": (3, 3), "direction": (3, 4)}
    enlarged = video.repeat_interleave(2, 3).repeat_interleave(2, 4)
    for name, expected in judge(enlarged).items():
        torch.testing.assert_close(logits[name], expected)
    assert judge(video[:, :, :3])["colour"].shape == (3, 4)
    assert judge.features(video).shape == (3, 64)


def test_alignment_is_the_share_of_right_answers():
    torch.manual_seed(0)
    judge = VideoNet(VideoNetConfig()).eval()
    video = moving_shapes(4, seed=0, frames=6).video
    said = torch.stack([logits.argmax(1) for logits in judge(video).values()], 1)
    labels = said.clone()
    labels[0, 0] = (labels[0, 0] + 1) % 4
    labels[:2, 1] = (labels[:2, 1] + 1) % 3
    assert judge.alignment(video, labels) == pytest.approx({"colour": 0.75, "shape": 0.5, "direction": 1.0, "align": 0.75})


def test_metrics_name_all():
    real: MovingShapes = moving_shapes(2, seed=0, frames=6)
    found = metrics(VideoNet(VideoNetConfig()).eval(), real.video, real.labels, real.video)
    assert list(found) == ["colour", "shape", "direction", "align", "jerk", "colour flicker", "size flicker", "count", "sharpness"]
