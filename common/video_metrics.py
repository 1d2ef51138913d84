"""How good generated clips of one moving object are, by means that need no download.

    VideoNet      reads colour, shape and direction off a clip: text alignment, and features for Fréchet distances
    track         where the object is in each frame, from the chroma max - min over the channels, which grey grounds lack
    jerk, flicker how unsteadily it moves, changes its colour and its size
    count         how many objects there are in a frame
    sharpness     the energy of fine detail against that of a reference

A clip is a video (3, frames, h, w) in [-1, 1]. Generated clips are to be `stored` first: measured is what a file holds.
"""

import tempfile
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.ndimage import label
from torch import Tensor, nn

from common.backbones.pretrained import Pretrained
from common.data.videos import COLOURS, DIRECTIONS, SHAPES, MovingShapes, VideoFolder, export

FACTORS = {"colour": len(COLOURS), "shape": len(SHAPES), "direction": len(DIRECTIONS)}  # the columns of MovingShapes.labels

Clips = Float[Tensor, "n 3 frames h w"]


def stored(clips: MovingShapes, video: Clips) -> Clips:
    """`video`, which shows the captions of `clips`, after it has been written to mp4 files and read back."""
    with tempfile.TemporaryDirectory() as root:
        export(replace(clips, video=video), root)
        folder = VideoFolder(root, frames=video.shape[2], size=video.shape[-2:], random_start=False)
        return torch.stack([folder[i][0] for i in range(len(folder))])


# ---- a reader of clips ----------------------------------------------------------------------------------------------------------------


@dataclass
class VideoNetConfig:
    size: int = 32  # side of the frames it reads
    channels: tuple[int, ...] = (16, 32, 64)


class VideoNet(Pretrained, nn.Module):
    """Three 3-D convolutions and, on the largest value of each channel, a linear head for each of FACTORS.

    So neither the place nor the number of frames matters, which may be anything from 3 on; a direction shows in neighbouring frames.
    Larger frames are averaged down to `size` first.
    """

    config_class = VideoNetConfig
    tiny = "tiny-wan/judge"

    def __init__(self, config: VideoNetConfig):
        super().__init__()
        self.config = config
        widths, strides = (3, *config.channels), ((1, 2, 2), (1, 2, 2), (2, 2, 2))
        self.stages = nn.Sequential(*(_stage(a, b, stride) for a, b, stride in zip(widths, config.channels, strides, strict=False)))
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], kinds) for name, kinds in FACTORS.items()})

    def maps(self, video: Clips) -> Float[Tensor, "n c f_2 h_8 w_8"]:
        frames, size = video.shape[2], self.config.size
        return self.stages(video if video.shape[-1] == size else F.interpolate(video, (frames, size, size), mode="area"))

    def forward(self, video: Clips) -> dict[str, Float[Tensor, "n kinds"]]:
        """Logits of each factor."""
        strongest = self.maps(video).amax((2, 3, 4))
        return {name: head(strongest) for name, head in self.heads.items()}

    @torch.no_grad()
    def features(self, video: Clips) -> Float[Tensor, "n c"]:
        """The last convolution's mean: `reader.frechet` of two sets of them is a small FVD, and with clips made `still` a small FID."""
        return self.maps(video).mean((2, 3, 4))

    @torch.no_grad()
    def alignment(self, video: Clips, labels: Int[Tensor, "n 3"]) -> dict[str, float]:
        """The share of clips that show the colour, the shape, the direction of their captions, and the mean of the three as "align"."""
        logits = self(video)
        shares = {name: float((logits[name].argmax(1) == labels[:, i]).float().mean()) for i, name in enumerate(FACTORS)}
        return shares | {"align": sum(shares.values()) / len(shares)}


def _stage(inputs: int, channels: int, stride: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm3d(channels), nn.ReLU())


def still(video: Clips) -> Float[Tensor, "nf 3 frames h w"]:
    """Every frame as a clip in which nothing moves."""
    frames = video.shape[2]
    return video.transpose(1, 2).flatten(0, 1)[:, :, None].expand(-1, -1, frames, -1, -1)


# ---- the object's track ---------------------------------------------------------------------------------------------------------------


class Track(NamedTuple):
    """Of the object in every frame. Where there is none, area, colour and centre are 0."""

    mask: Float[Tensor, "n frames h w"]
    area: Float[Tensor, "n frames"]  # pixels
    center: Float[Tensor, "n frames 2"]  # (x, y) in pixels from the upper left corner
    colour: Float[Tensor, "n frames 3"]


def track(video: Clips) -> Track:
    """The mask rises from 0 to 1 between a quarter and a half of the clip's strongest chroma (taken as at least 0.1 of the range)."""
    chroma = (video.amax(1) - video.amin(1)) / 2
    peak = chroma.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    mask = (4 * chroma / peak - 1).clamp(0, 1)
    area = mask.sum((2, 3))
    mean = lambda values: (values * mask).sum((-2, -1)) / area.clamp(min=1e-6)
    y, x = (torch.arange(n) + 0.5 for n in mask.shape[2:])
    center = torch.stack([mean(x.expand_as(mask)), mean(y[:, None].expand_as(mask))], -1)
    return Track(mask, area, center, torch.stack([mean(channel) for channel in video.unbind(1)], -1))


def steadiness(video: Clips) -> dict[str, float]:
    """Means over the clips.

    jerk: length of the centre's second difference, in pixels. colour flicker: deviation over the frames of the object's colour, whose range
    is 2. size flicker: deviation of its area over the mean area.
    """
    seen = track(video)
    jerk = seen.center.diff(n=2, dim=1).norm(dim=-1).mean()
    colour = seen.colour.std(1, correction=0).mean()
    size = (seen.area.std(1, correction=0) / seen.area.mean(1).clamp(min=1e-6)).mean()
    return {"jerk": float(jerk), "colour flicker": float(colour), "size flicker": float(size)}


def count(video: Clips, expected: float = 0.1) -> float:
    """Objects in a frame, on average: connected regions of the mask of more than a fifth of the `expected` area, a share of the frame."""
    frames = track(video).mask.flatten(0, 1).numpy() > 0.5
    sizes = (np.bincount(label(frame)[0].ravel())[1:] for frame in frames)
    return float(np.mean([(size > 0.2 * expected * frame.size).sum() for size, frame in zip(sizes, frames, strict=True)]))


def sharpness(video: Clips, reference: Clips) -> float:
    """Energy of the frequencies from a quarter of the sampling rate on, over that of the reference: 1 is as sharp, noise counts as sharp."""
    return float(_detail(video) / _detail(reference))


def _detail(video: Clips) -> Tensor:
    rows, columns = (torch.fft.fftfreq(n) for n in video.shape[3:])
    fine = torch.hypot(rows[:, None], columns) >= 0.25
    return torch.fft.fft2(video.mean(1))[..., fine].abs().square().mean()


def metrics(judge: VideoNet, video: Clips, labels: Int[Tensor, "n 3"], reference: Clips) -> dict[str, float]:
    """All that takes one set of clips, its labels, and rendered clips of the same captions."""
    return judge.alignment(video, labels) | steadiness(video) | {"count": count(video), "sharpness": sharpness(video, reference)}
