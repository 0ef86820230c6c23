"""Video preparation, bit-identical to transformers' Qwen3VLVideoProcessor.

Frames are sampled at `video_fps`, paired (`temporal_patch_size` frames are one patch in time) and
resized together; each pair is announced in the text by its mean time, "<0.2 seconds>". The limits
on pixels hold for the whole clip, and no cap per frame is applied (the processor's default).

    9 frames at 24 fps, 4 sampled:  frame   0    3    5    8
                                    pairs  [0    3]  [5    8]
                                    times  <0.1 s>   <0.3 s>      grid (2, h, w)

Resizing differs from images: it is torch's bicubic with antialiasing on bytes (what torchvision
calls), whose roundings are not PIL's. The value table differs too, in the last bit: there mean
and deviation are scaled to bytes first.
"""

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from titan_vlm.data.images import MAX_ASPECT_RATIO, MEAN, STD, VisualSpec, byte_patches
from titan_vlm.data.reading import surely
from titan_vlm.data.sample import VideoRef, raise_machine_trouble, to_rgb
from titan_vlm.errors import DataError

MIN_FRAMES = 4
MAX_FRAMES = 768
MAX_LENGTH = 2_000_000  # frames of a file: all are decoded, up to the last that is looked at
# What FFmpeg may take a file for. Play lists and scripts, which it knows too, name other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,gif,webp,apng,"
    "h264,hevc,m4v,ivf,mxf"
)


@dataclass
class VideoPlan:
    """What the size and length of a video decide, before any pixel is decoded."""

    grid: tuple[int, int, int]
    frame_indices: list[int]
    timestamps: list[float]  # one per grid[0]


def plan_video(video: VideoRef, spec: VisualSpec) -> VideoPlan:
    """Reads the header of the file (or of the first frame) only."""
    total, fps, width, height = video_header(video, spec)
    # Frames without a rate were sampled by whoever stored them: taken as they are.
    as_they_are = not video.path and video.fps is None and total <= MAX_FRAMES
    indices = list(range(total)) if as_they_are else sample_frames(total, fps, spec)
    new_w, new_h = smart_resize_video(len(indices), width, height, spec, video.name)
    times = pair_times(indices, fps, spec.temporal_patch_size)
    grid = (len(times), new_h // spec.patch_size, new_w // spec.patch_size)
    return VideoPlan(grid, indices, times)


def prepare_video(video: VideoRef, plan: VideoPlan, spec: VisualSpec) -> np.ndarray:
    """float32 [N, C] of the planned frames."""
    _, grid_h, grid_w = plan.grid
    size = (grid_h * spec.patch_size, grid_w * spec.patch_size)
    frames_THWC = load_frames(video, plan.frame_indices, size)
    if missing := -len(frames_THWC) % spec.temporal_patch_size:
        frames_THWC = np.concatenate([frames_THWC, np.repeat(frames_THWC[-1:], missing, 0)])
    patches_NCtP = byte_patches(frames_THWC, spec.temporal_patch_size, spec)
    return VIDEO_TABLE[patches_NCtP].reshape(len(patches_NCtP), spec.patch_dim)


def video_text(times: list[float], vision_start: str, pad: str, vision_end: str) -> str:
    """What stands for a video in the text: per pair of frames its time and one placeholder."""
    return "".join(f"<{time:.1f} seconds>{vision_start}{pad}{vision_end}" for time in times)


def sample_frames(total: int, fps: float, spec: VisualSpec) -> list[int]:
    """Indices of the frames that are looked at, evenly spread, about `video_fps` a second."""
    count = int(min(total / fps * spec.video_fps, total))  # infinite at a rate of almost nothing
    count = min(max(count, MIN_FRAMES), MAX_FRAMES, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def pair_times(indices: list[int], fps: float, temporal: int) -> list[float]:
    """Seconds of each patch in time: the mean of its first and last frame."""
    padded = indices + [indices[-1]] * (-len(indices) % temporal)
    times = [index / fps for index in padded]
    return [(times[i] + times[i + temporal - 1]) / 2 for i in range(0, len(times), temporal)]


def smart_resize_video(
    frames: int, width: int, height: int, spec: VisualSpec, name: str
) -> tuple[int, int]:
    """(width, height) in multiples of `factor`; the limits hold for all frames together."""
    factor, temporal = spec.factor, spec.temporal_patch_size
    if frames < temporal:
        raise DataError(
            f"{name}: {frames} frame(s), a video needs at least {temporal}; use an image"
        )
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise DataError(f"{name}: aspect ratio {ratio:.0f}, at most {MAX_ASPECT_RATIO}")
    if spec.square:
        side = max(factor, math.isqrt(spec.max_pixels) // factor * factor)
        return side, side
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / temporal) * temporal * new_h * new_w
    if volume > spec.video_max_pixels:
        shrink = math.sqrt(frames * height * width / spec.video_max_pixels)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < spec.video_min_pixels:
        grow = math.sqrt(spec.video_min_pixels / (frames * height * width))
        new_h = math.ceil(height * grow / factor) * factor
        new_w = math.ceil(width * grow / factor) * factor
    return new_w, new_h


def video_header(video: VideoRef, spec: VisualSpec) -> tuple[int, float, int, int]:
    """(number of frames, frames per second, width, height)."""
    if not video.path:
        if not video.frames:
            raise DataError(f"{video.name}: a video without frames")
        return len(video.frames), video.fps or spec.video_fps, *video.frames[0].header_size()
    return surely(partial(file_header, video), video.path)


def file_header(video: VideoRef) -> tuple[int, float, int, int]:
    av = import_av()
    try:
        with open_video(av, video) as container:
            stream = container.streams.video[0]
            # Some containers do not say how many frames they hold: count the packets instead.
            packets = (packet for packet in container.demux(stream) if packet.size)
            total = stream.frames or sum(1 for _ in islice(packets, MAX_LENGTH + 1))
            rate = float(stream.average_rate or 0)
            width, height = stream.width, stream.height
            if min(total, rate, width, height) <= 0:
                raise ValueError(f"{total} frames of {width} x {height} at {rate} per second")
            if total > MAX_LENGTH:
                raise ValueError(f"more than {MAX_LENGTH} frames")
            video.limits.check_pixels(width, height)
            return total, rate, width, height
    except Exception as error:  # PyAV has a type for each of FFmpeg's errors, and its own
        raise_machine_trouble_of_video(error)
        raise DataError(f"{video.path}: cannot be read as a video: {error}") from error


def open_video(av, video: VideoRef):
    """A regular file that is a video itself; FFmpeg would also take URLs and pipes for paths."""
    video.limits.check_file(video.path)
    return av.open(
        f"file:{os.path.abspath(video.path)}",
        options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
    )


def raise_machine_trouble_of_video(error: Exception) -> None:
    """As for images, but FFmpeg's ENOMEM is the sample's: damaged files ask for any amount."""
    if getattr(error, "errno", None) != errno.ENOMEM:
        raise_machine_trouble(error)


def load_frames(
    video: VideoRef, indices: list[int], size: tuple[int, int] | None = None
) -> np.ndarray:
    """uint8 [T, H, W, 3] of the wanted frames, in order; each resized to `size` (height, width)
    when it is decoded, so that no more than one is held as it was."""
    read = partial(read_frames, video, indices, size)
    return surely(read, video.path) if video.path else read()


def read_frames(
    video: VideoRef, indices: list[int], size: tuple[int, int] | None = None
) -> np.ndarray:
    if video.path:
        images = decode_frames(video, indices)
    else:
        images = ((index, video.frames[index].load_rgb()) for index in indices)
    found, first = {}, None
    for index, image in images:
        first = first or image.size
        if image.size != first:
            raise DataError(f"{video.name}: frames of different sizes")
        found[index] = resized(np.asarray(image), size)
    return np.stack([found[index] for index in indices])


def resized(frame_HWC: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size in (None, frame_HWC.shape[:2]):
        return frame_HWC
    frame_1CHW = torch.from_numpy(np.array(frame_HWC)).permute(2, 0, 1)[None].contiguous()
    resized_1CHW = F.interpolate(
        frame_1CHW, size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def decode_frames(video: VideoRef, indices: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames of a file, in RGB, each with its number."""
    wanted = set(indices)
    av = import_av()
    try:
        with open_video(av, video) as container:
            # The size may change on the way: FFmpeg's own limit holds before it decodes.
            most = {"max_pixels": str(video.limits.max_image_pixels)}
            container.streams.video[0].codec_context.options = most
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    wanted.remove(number)
                    yield number, to_rgb(frame.to_image())
                if number >= indices[-1]:
                    break
    except Exception as error:
        raise_machine_trouble_of_video(error)
        raise DataError(f"{video.path}: broken video: {error}") from error
    if wanted:
        raise DataError(f"{video.path}: broken video: ends before frame {indices[-1]}")


def import_av():
    """PyAV, which only video files need."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            "video files need the package av (pip install av); lists of frames do not"
        ) from error
    return av


def _video_table() -> np.ndarray:
    """Byte -> float32 value, with transformers' roundings for videos (mean and std times 255)."""
    mean = torch.tensor(MEAN) * (1.0 / (1 / 255))
    std = torch.tensor(STD) * (1.0 / (1 / 255))
    return ((torch.arange(256, dtype=torch.float32) - mean) / std).numpy()


VIDEO_TABLE = _video_table()
