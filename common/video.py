"""Video files: exact reading, writing, checking.

A seek lands on the wrong frame, silently, in many files: wherever frames shown before a key frame come after it in the file (open GOPs,
some B-frames), decord returns a neighbour of the frame asked for. Decoding from the first frame is always right. `read_video` does that
up to frame 2000, and beyond it unless seeks in this file have been found exact. `write_video` writes files in which every seek is.

decord reads; av reads where decord has no wheel, what decord cannot open (AV1), and frames 24, 48 or 72 pixels wide, which decord takes for
frames of four channels.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from math import ceil
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError

SEQUENTIAL = 2000  # frames up to here are always reached by decoding from the first

Size = int | tuple[int, int]
Choice = Callable[[int, float], Sequence[int]]


class VideoError(UserError):
    """A video file cannot be read: `path` says which, `reason` why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


# ---- which frames ---------------------------------------------------------------------------------------------------------------------


def uniform_indices(total: int, n: int) -> list[int]:
    """The middles of n equal segments of `total` frames; all frames if there are no more than n.

    The segments' edges are rounded down. torch.linspace, as in Video-CCAM's evaluation, puts some whole-number edges one too low (of 14
    segments of 58 frames, the edge 29 is 28): kept, so that published evaluations see the same frames.
    """
    if n >= total:
        return list(range(total))
    edges = torch.linspace(0, total, n + 1, dtype=torch.int64)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def fps_indices(total: int, fps: float, rate: float | None = None, most: int | None = None) -> list[int]:
    """The frames nearest to the times 0, 1/rate, 2/rate, ... of a video with `fps` frames a second (rate None: every frame), cut to the
    first `most`."""
    steps = torch.arange(0, total, fps / (rate or fps)).round().long().clamp(max=total - 1)
    return steps[:most].tolist()


# ---- reading --------------------------------------------------------------------------------------------------------------------------


def read_video(
    path: str | Path, indices: Sequence[int] | Choice | None = None, num: int | None = None, size: Size | None = None
) -> UInt8[Tensor, "t h w 3"]:
    """The RGB frames `indices` (in any order, repeated or not), or `num` uniformly spaced ones, or all.

    indices: frame numbers from 0, or a function that chooses them: (number of frames, frames a second) -> numbers.
    size: side, or (height, width), of the frames returned: the middle is cut out in that aspect ratio and resized, by averaging areas or,
    to enlarge, bilinearly. A phone's rotated video comes upright.

    The file is opened and closed in the call, so that no reader outlives a fork. In a DataLoader still take worker processes that share no
    threads with their parent (multiprocessing_context "forkserver" or "spawn") and a timeout.

    Raises VideoError: the file is missing, empty, no video, truncated, or has no such frame. Damage within a file that keeps its length
    may go unnoticed: `validate_video`.
    """
    if indices is not None and num is not None:
        raise ValueError("give indices or num, not both")
    path = Path(path)
    with _opened(path):  # av says what is wrong with a file, decord does not
        pass

    def choose(total: int, fps: float) -> list[int]:
        if num is not None:
            chosen = uniform_indices(total, num)
        elif indices is None:
            chosen = range(total)
        else:
            chosen = indices(total, fps) if callable(indices) else indices
        chosen = [int(i) for i in chosen]
        if not chosen:
            raise ValueError(f"no frames asked of {path}")
        if not 0 <= min(chosen) <= max(chosen) < total:
            wrong = next(i for i in chosen if not 0 <= i < total)
            raise VideoError(path, f"there is no frame {wrong}: it has {total} frames, numbered from 0")
        return chosen

    frames = _read_decord(path, choose, size)
    return _read_av(path, choose, size) if frames is None else frames


def _read_decord(path: Path, choose: Choice, size: Size | None) -> Tensor | None:
    """None: decord is absent or cannot read this."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)

    def convert(frame) -> Tensor:
        if frame.shape[-1] != 3:
            raise RuntimeError("decord took padding for a channel")
        return _fit(frame.asnumpy(), size)

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        wanted = choose(len(reader), reader.get_avg_fps())
        if max(wanted) > SEQUENTIAL and _seeks_exactly(path, path.stat().st_mtime_ns):
            found = {i: convert(reader[i]) for i in sorted(set(wanted))}
        else:
            found = _pick(_in_order(reader), wanted, convert)
    except (decord.DECORDError, RuntimeError):
        return None
    return torch.stack([found[i] for i in wanted])


def _in_order(reader) -> Iterator:
    """Frames by `next`: `skip_frames` is faster, and wrong where there are B-frames."""
    for _ in range(len(reader)):
        yield reader.next()


@lru_cache(maxsize=4096)
def _seeks_exactly(path: Path, modified: int) -> bool:
    """Whether decord finds the same frames by seeking as in order, just behind eight key frames. `modified`: forgets a file that changed."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    keys = [k for k in reader.get_key_indices() if 0 < k < min(len(reader) - 1, SEQUENTIAL)]
    probes = [i for k in keys[:: ceil(len(keys) / 8) or 1] for i in (k, k + 1)]
    if not probes:
        return False
    truth = _pick(_in_order(reader), probes, lambda frame: frame.asnumpy())
    seeker = decord.VideoReader(str(path), num_threads=1)
    return all(np.array_equal(seeker[i].asnumpy(), truth[i]) for i in probes)


def _read_av(path: Path, choose: Choice, size: Size | None) -> Tensor:
    total, fps = _length(path)
    wanted = choose(total, fps)
    found = _pick(_decode(path), wanted, lambda frame: _fit(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90), size))
    if max(wanted) not in found:
        raise VideoError(path, f"it should have {total} frames, but frame {max(wanted)} is missing: fetch or write it again")
    return torch.stack([found[i] for i in wanted])


def _pick(frames: Iterable, wanted: Sequence[int], convert: Callable) -> dict[int, Tensor]:
    """The wanted ones of frames that come in order; decoding ends with the last of them."""
    needed = set(wanted)
    return {i: convert(frame) for i, frame in enumerate(islice(frames, max(wanted) + 1)) if i in needed}


def _fit(frame: UInt8[np.ndarray, "h w 3"], size: Size | None) -> UInt8[Tensor, "H W 3"]:
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        method = Image.Resampling.BOX if height <= frame.shape[0] and width <= frame.shape[1] else Image.Resampling.BILINEAR
        frame = np.array(ImageOps.fit(Image.fromarray(frame), (width, height), method))
    return torch.from_numpy(np.ascontiguousarray(frame))


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file by av, which holds at least one video stream."""
    if not path.exists():
        raise VideoError(path, "there is no such file")
    if not path.is_file():
        raise VideoError(path, "this is no file but a directory or device")
    if path.stat().st_size == 0:
        raise VideoError(path, "the file is empty: fetch or write it again")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except av.InvalidDataError:
        with path.open("rb") as file:
            mp4 = file.read(8)[4:] == b"ftyp"
        why = "it begins as an mp4, but its index is cut off or damaged" if mp4 else "this is no video, or a damaged one"
        raise VideoError(path, f"{why}: fetch or write it again") from None
    except av.FFmpegError as error:
        raise VideoError(path, f"it cannot be opened ({error.strerror})") from None
    with container:
        if not container.streams.video:
            raise VideoError(path, "there are no pictures in it, only sound or other data")
        yield container


def _length(path: Path) -> tuple[int, float]:
    """Frames by the file's own account, and frames a second."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate)
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream)), fps


def _decode(path: Path, strict: bool = False) -> Iterator[av.VideoFrame]:
    """All frames in order, by av. strict: a decoding error that could be concealed is one all the same."""
    done = 0
    with _opened(path) as container:
        stream = container.streams.video[0]
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        try:
            for frame in container.decode(stream):
                yield frame
                done += 1
        except av.FFmpegError as error:
            raise VideoError(path, f"truncated or damaged after {done} frames ({error.strerror}): fetch or write it again") from None


def validate_video(path: str | Path) -> int:
    """Decode the whole file, strictly, and count its frames.

    Raises VideoError at the first frame that is damaged, or if there are fewer or more frames than the file says it has. Video has no
    checksums: damage is found where it breaks the code. Of single changed bytes that is nearly every one in H.264 and MPEG-4, every
    second in HEVC and VP9, and every fourth in MJPEG; the others change only the picture.
    """
    path = Path(path)
    total, _ = _length(path)
    done = sum(1 for _ in _decode(path, strict=True))
    if done != total:
        raise VideoError(path, f"it should have {total} frames, but has {done}: fetch or write it again")
    return total


# ---- writing --------------------------------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: UInt8[Tensor, "t h w 3"], fps: float = 8, scale: int = 1, crf: int = 10) -> None:
    """Write RGB frames as an H.264 mp4 that keeps the colour of every pixel (yuv444p) and in which every seek is exact. An interrupted
    write leaves the old file.

    scale: enlarge by repeating pixels; `read_video(path, size=...)` averages them back. Other programs read frames at least 64 pixels and
    a multiple of 32 wide most reliably: `safe_scale(width)`. crf: 0 (lossless but for rounding) to 51; 10 errs by about 1/255 a value.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.numel():
        raise ValueError(f"frames must be uint8 (t, h, w, 3) with t > 0, not {frames.dtype} {tuple(frames.shape)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    # key frames at least every 12, nothing refers across them, no frame is stored out of order, and the index comes first
    options = {"crf": str(crf), "g": "12", "bf": "0", "x264-params": "open-gop=0"}
    try:
        with av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv444p"
            stream.codec_context.thread_count = 1  # the same file whatever the number of cores
            for frame in frames.numpy(force=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def safe_scale(width: int) -> int:
    """The smallest whole factor that makes a width a multiple of 32, and at least 64."""
    return next(k for k in range(1, 65) if k * width >= 64 and k * width % 32 == 0)
