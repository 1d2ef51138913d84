"""Video files: the frame asked for is the frame returned, whatever the file, and a bad file says what is wrong with it."""

import contextlib
import pickle
import random
import struct
import sys
import wave

import av
import numpy as np
import pytest
import torch

from common import video
from common.errors import UserError
from common.video import VideoError, fps_indices, read_video, safe_scale, uniform_indices, validate_video, write_video
from tests.goldens import cases


def numbered(n: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames that show their number in binary, in 12 black or white blocks."""
    bits = torch.arange(n)[:, None] >> torch.arange(12) & 1
    rows, columns = torch.arange(height) * 3 // height, torch.arange(width) * 4 // width
    blocks = 4 * rows[:, None] + columns
    return (20 + 215 * bits[:, blocks]).to(torch.uint8)[..., None].repeat(1, 1, 1, 3)


def numbers(frames: torch.Tensor) -> list[int]:
    height, width = frames.shape[1:3]
    block = torch.arange(height)[:, None] * 3 // height * 4 + torch.arange(width) * 4 // width
    bright = torch.stack([frames[:, block == b].float().mean((1, 2)) > 128 for b in range(12)], 1)
    return (bright << torch.arange(12)).sum(1).tolist()


def encode(path, frames: torch.Tensor, codec: str = "libx264", pix_fmt: str = "yuv420p", container: dict | None = None, **options) -> None:
    """A file as others write them."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=8, options={name.replace("_", "-"): str(value) for name, value in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in frames.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


def open_gop(path, n: int = 60):
    encode(path, numbered(n), g=12, bf=3, x264_params="open-gop=1:scenecut=0")
    return path


def shuffled(n: int) -> list[int]:
    return random.Random(0).sample(range(n), n)


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(90))
    return tmp_path / "clip.mp4"


@pytest.fixture(params=["decord", "av"])
def backend(request, monkeypatch):
    if request.param == "av":
        monkeypatch.setitem(sys.modules, "decord", None)  # its import fails, as where it has no wheel
    else:
        pytest.importorskip("decord")
    return request.param


# ---- the right frames -----------------------------------------------------------------------------------------------------------------


def test_frames_come_in_the_order_asked(clip, backend):
    order = [*shuffled(90), 7, 7, 0]
    assert numbers(read_video(clip, order)) == order
    assert numbers(read_video(clip)) == list(range(90))
    assert numbers(read_video(clip, num=8)) == [5, 16, 27, 39, 50, 61, 72, 84]  # edges 0, 11, 22, 33, 45, ...
    assert numbers(read_video(clip, lambda total, fps: [total - 1, int(fps)])) == [89, 8]


def test_every_seek_in_a_written_file_is_exact(clip):
    decord = pytest.importorskip("decord")
    reader = decord.VideoReader(str(clip))
    assert all(numbers(torch.from_numpy(reader[i].asnumpy())[None]) == [i] for i in shuffled(90))
    data = clip.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a web server can play it before all is sent


def test_open_gops_are_read_exactly(tmp_path, backend):
    path = open_gop(tmp_path / "open.mp4")
    if backend == "decord":  # else the file would prove nothing
        reader = __import__("decord").VideoReader(str(path))
        assert sum(numbers(torch.from_numpy(reader[i].asnumpy())[None]) != [i] for i in shuffled(60)) > 10
    assert [numbers(read_video(path, [i])) for i in shuffled(60)[:20]] == [[i] for i in shuffled(60)[:20]]


def test_far_frames_are_sought_only_where_seeks_are_exact(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    monkeypatch.setattr(video, "SEQUENTIAL", 40)
    decoded_in_order = []
    in_order = video._in_order
    monkeypatch.setattr(video, "_in_order", lambda reader: decoded_in_order.append(len(reader)) or in_order(reader))
    write_video(tmp_path / "closed.mp4", numbered(100))
    open_gop(tmp_path / "open.mp4", 101)
    encode(tmp_path / "one.mp4", numbered(102), g=300, bf=0, x264_params="scenecut=0")
    for name in ("closed", "open", "one") * 2:
        assert numbers(read_video(tmp_path / f"{name}.mp4", [90, 3, 61])) == [90, 3, 61]
    # closed: the probe; open: the probe once, and both times the frames; one key frame: nothing to probe, the frames
    assert decoded_in_order == [100, 101, 101, 102, 101, 102]


def test_what_decord_cannot_open_is_read_by_av(tmp_path):
    codec = next((name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available), None)
    if codec is None:
        pytest.skip("av has no AV1 encoder here")
    encode(tmp_path / "clip.mp4", numbered(20), codec)
    assert numbers(read_video(tmp_path / "clip.mp4", shuffled(20))) == shuffled(20)
    encode(tmp_path / "clip.webm", numbered(20), codec)  # does not say how many frames it has
    assert numbers(read_video(tmp_path / "clip.webm", num=4)) == [2, 7, 12, 17]
    assert validate_video(tmp_path / "clip.webm") == 20


@pytest.mark.parametrize(("height", "width"), [(24, 24), (48, 48), (72, 72), (17, 33), (50, 66), (16, 16)])
def test_frames_of_odd_sizes(tmp_path, height, width, backend):
    frames = numbered(14, height, width)
    write_video(tmp_path / "clip.mp4", frames)
    found = read_video(tmp_path / "clip.mp4", shuffled(14))
    assert found.shape == (14, height, width, 3) and numbers(found) == shuffled(14)
    assert (found.float() - frames[shuffled(14)].float()).abs().mean() < 1.5


def test_a_rotated_video_comes_upright(tmp_path, backend):
    frames = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    frames[:, :16, :24] = 255  # upper left
    write_video(tmp_path / "clip.mp4", frames)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # the display matrix of the track header
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)  # a quarter turn clockwise
    (tmp_path / "turned.mp4").write_bytes(data)
    found = read_video(tmp_path / "turned.mp4").float()
    assert found.shape == (3, 96, 64, 3)
    assert found[:, :24, -16:].mean() > 240 and found.mean() < 255 / 15  # upper right, and only there


def test_size_cuts_out_the_middle_and_averages(tmp_path):
    noise = torch.randint(0, 256, (2, 16, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    frames = noise.repeat_interleave(4, 1).repeat_interleave(4, 2)
    write_video(tmp_path / "clip.mp4", frames, crf=0)
    whole = read_video(tmp_path / "clip.mp4").float()
    means = whole.unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))
    assert (read_video(tmp_path / "clip.mp4", size=(16, 24)) - means).abs().max() <= 1
    assert (read_video(tmp_path / "clip.mp4", size=16) - means[:, :, 4:20]).abs().max() <= 1
    assert read_video(tmp_path / "clip.mp4", size=128).shape == (2, 128, 128, 3)


# ---- bad files ------------------------------------------------------------------------------------------------------------------------


def bad_file(kind: str, folder):
    path = folder / "bad.mp4"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "no index":  # as when the writer was killed: the index would have come last
        encode(path, numbered(60))
        path.write_bytes(path.read_bytes().partition(b"moov")[0])
    elif kind == "truncated":
        write_video(path, numbered(60))
        path.write_bytes(path.read_bytes()[:-900])
    elif kind == "sound":
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(8000))
    return path


REASONS = {
    "missing": "there is no such file",
    "directory": "no file but a directory",
    "empty": "the file is empty: fetch or write it again",
    "garbage": "this is no video, or a damaged one",
    "no index": "begins as an mp4, but its index is cut off or damaged",
    "truncated": r"truncated or damaged after \d\d frames",
    "sound": "no pictures in it",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_file_says_what_is_wrong(kind, tmp_path, backend):
    path = bad_file(kind, tmp_path)
    for read in (read_video, validate_video):
        with pytest.raises(VideoError, match=REASONS[kind]) as raised:
            read(path)
        assert raised.value.path == path and str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("index", [90, -1])
def test_a_frame_that_is_not_there(clip, index, backend):
    with pytest.raises(VideoError, match=rf"there is no frame {index}: it has 90 frames, numbered from 0"):
        read_video(clip, [0, index])


def test_the_start_of_a_truncated_file_can_still_be_read(tmp_path):
    assert numbers(read_video(bad_file("truncated", tmp_path), [5, 2])) == [5, 2]


def damaged(path, copies: int):
    """The file again and again, with one byte of its pictures changed."""
    data = path.read_bytes()
    for position in np.random.default_rng(0).integers(data.index(b"mdat") + 1000, len(data), copies):
        path.write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        yield path


def is_valid(path) -> bool:
    try:
        return validate_video(path) > 0
    except VideoError as error:
        assert "fetch or write it again" in str(error)
        return False


def test_validation_finds_what_reading_does_not(clip, backend):
    assert validate_video(clip) == 90
    found = silent = 0
    for path in damaged(clip, 20):
        found += not is_valid(path)
        with contextlib.suppress(VideoError):
            silent += numbers(read_video(path)) != list(range(90))
    assert found >= 16 and silent > 0


def test_validation_is_stricter_than_decoding(tmp_path):
    def decodes(path) -> bool:
        with av.open(str(path)) as file, contextlib.suppress(av.FFmpegError):
            return len(list(file.decode(video=0))) == 60
        return False

    path = tmp_path / "clip.mp4"
    encode(path, numbered(60), "mjpeg", "yuvj420p", {"movflags": "+faststart"})
    verdicts = [(is_valid(path), decodes(path)) for path in damaged(path, 60)]
    assert (True, False) not in verdicts and (False, True) in verdicts


def test_validation_counts(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", numbered(30))
    monkeypatch.setattr(video, "_length", lambda path: (31, 8.0))
    with pytest.raises(VideoError, match="should have 31 frames, but has 30"):
        validate_video(tmp_path / "clip.mp4")


def test_wrong_calls(clip):
    with pytest.raises(ValueError, match="indices or num"):
        read_video(clip, [1], num=2)
    with pytest.raises(ValueError, match="no frames asked"):
        read_video(clip, [])


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "it is odd")))
    assert isinstance(error, UserError) and (error.path, error.reason, str(error)) == ("a.mp4", "it is odd", "a.mp4: it is odd")


# ---- writing --------------------------------------------------------------------------------------------------------------------------


def test_colours_survive_in_every_pixel(tmp_path):
    """Coloured discs and stripes of one pixel move on a grey ramp; in yuv420p, whose colours are half as fine, they err more."""
    t, y, x = torch.meshgrid(torch.arange(16), torch.arange(32), torch.arange(32), indexing="ij")
    disc = (x - 8 - t).square() + (y - 16).square() < 49
    inner = disc & (x % 2 == 0)
    frames = (60 + 2 * x)[..., None].repeat(1, 1, 1, 3)
    frames[disc] = torch.tensor([230, 40, 40])
    frames[inner] = torch.tensor([50, 75, 240])
    frames = frames.to(torch.uint8)

    def error(size) -> float:
        return float((read_video(tmp_path / "clip.mp4", size=size).float() - frames.float()).abs().mean())

    for scale in (1, safe_scale(32)):
        write_video(tmp_path / "clip.mp4", frames, scale=scale)
        assert error(32) < 1.5
    encode(tmp_path / "clip.mp4", frames, crf=10)
    assert error(32) > 3


def test_rate_and_length(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(30), fps=29.97)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(29.97, abs=0.01) and stream.frames == 30
        assert stream.codec_context.pix_fmt == "yuv444p"


def test_an_interrupted_write_leaves_the_old_file(clip, monkeypatch):
    before = clip.read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    frames = numbered(5)
    monkeypatch.setattr(video.np, "ascontiguousarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video(clip, frames)
    assert clip.read_bytes() == before and [p.name for p in clip.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("frames", [torch.zeros(3, 8, 8, 3), torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 8, 8, 3, dtype=torch.uint8)])
def test_only_rgb_bytes_are_written(tmp_path, frames):
    with pytest.raises(ValueError, match=r"uint8 \(t, h, w, 3\)"):
        write_video(tmp_path / "clip.mp4", frames)
    assert not list(tmp_path.iterdir())


def test_safe_scale():
    assert {width: safe_scale(width) for width in (16, 24, 32, 40, 48, 64, 72, 96)} == {16: 4, 24: 4, 32: 2, 40: 4, 48: 2, 64: 1, 72: 4, 96: 1}


# ---- which frames ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 23, 58, 300, 1001])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 16, 14, 96])
def test_uniform_indices_are_middles_of_segments(total, n):
    found = uniform_indices(total, n)
    if n >= total:
        assert found == list(range(total))
        return
    for k, index in enumerate(found):  # the middle of [k, k+1) · total/n, down to its frame; edges are rounded down before, at most to one lower
        assert 0 <= (2 * k + 1) * total / (2 * n) - index < 2
    assert len(set(found)) == n and found == sorted(found)
    if total % n == 0 and n & (n - 1) == 0:
        assert found == [(2 * k + 1) * total // (2 * n) for k in range(n)]


@pytest.mark.parametrize("case", [case for case in cases("video_ccam") if "uniform" in case.meta["cases"]], ids=str)
def test_sampling_is_that_of_video_ccam(case):
    for want in case.meta["cases"]["uniform"]:
        assert uniform_indices(want["total_frames"], want["num_frames"]) == case.tensors[want["key"]].tolist()
    for want in case.meta["cases"]["fps"]:
        most = want["max_num_frames"] if want["max_num_frames"] > 0 else None
        assert fps_indices(want["total_frames"], want["input_fps"], want["output_fps"], most) == case.tensors[want["key"]].tolist()


def test_fps_indices_stay_inside():
    assert fps_indices(11, 30, 20) == [0, 2, 3, 4, 6, 8, 9, 10]  # 10.5 rounds to 10; 1.5 and 4.5 to the even neighbour
    assert fps_indices(12, 30, 20, most=3) == [0, 2, 3]
    assert max(fps_indices(100, 29, 28.7)) == 99
