"""Video files <-> uint8 clips (3, T, H, W): frames sampled by their timestamps, whole clips read and written.

Axes: T frames, H W space. A tick is a timestamp as the file counts it; times are in seconds, fps in 1/second.
PyAV and Pillow are imported where they are needed, so that programs start without them.
"""
from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing.files import atomic

if TYPE_CHECKING:
    import av

READABLE = (        # clips of a training folder or shard: what PyAV reads, but for .gif, which are previews
    ".mp4", ".m4v", ".mov", ".f4v", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv",
    ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".ogv", ".mxf", ".dv", ".rm", ".rmvb", ".nut", ".y4m")
INDEXED = ("mov", "matroska")           # containers that say when each frame is shown, and find key frames
SLACK = 2e-3                            # containers round timestamps, some to a millisecond
FPS_MIN, FPS_MAX = 0.1, 240             # what the containers hold and the players play
GIF_FPS_MAX = 50                        # players show a gif's frames for 2/100 s at least

# ---- frames of a clip for training -------------------------------------------------------------------------


def read_video(source: str | Path | bytes, frames: int, fps: float, height: int, width: int,
               generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """A video file, or its bytes -> (uint8 clip (3, frames, height, width), its frames per second).

    The clip starts at a random frame, or at the first without a generator. Its rate is `fps`, or more where
    the video is too short (see `pick`). Decoding begins at the last key frame before the clip, or at the
    first frame where the container has no index, and ends with the clip. Raises ValueError for whatever
    cannot be read whole. """
    with open_video(source) as (container, stream):
        ticks, end, keys = timeline(container, stream)
        seconds = float(stream.time_base)
    chosen, rate = pick(ticks * seconds, end * seconds, frames, fps, generator)
    wanted = ticks[chosen].tolist()

    with open_video(source) as (container, stream):
        if keys:
            container.seek(max((key for key in keys if key <= wanted[0]), default=wanted[0]), stream=stream)
            shown = ((frame.pts, frame) for frame in decode(container, stream))
        else:
            shown = zip(ticks.tolist(), decode(container, stream))
        found = {}
        for tick, frame in shown:
            if tick in wanted:
                found[tick] = resize_crop(pixels(frame), height, width)
            if tick is not None and tick >= wanted[-1]:
                break

    missing = len(set(wanted)) - len(found)
    if missing:
        raise ValueError(f"damaged: {missing} frames are missing")
    return torch.stack([found[tick] for tick in wanted], dim=1), rate


def pick(times: np.ndarray, end: float, frames: int, fps: float,
         generator: torch.Generator | None = None) -> tuple[np.ndarray, float]:
    """Which frames are on screen at `frames` instants that are 1/fps apart -> (their indices, fps).

    The first instant is that of a random frame, or of the first without a generator. times: of the video's
    frames, ascending; the last one is on screen until `end`. A video too short for that is taken whole: the
    instants spread evenly over it, and the fps handed back is the higher one of those instants.
    """
    need = (frames - 1) / fps
    starts = int((times + need < end - SLACK).sum())
    if starts:
        first = 0 if generator is None else torch.randint(starts, (), generator=generator).item()
        instants = times[first] + np.arange(frames) / fps
    else:
        instants = np.linspace(times[0], times[-1], frames)
        fps = (frames - 1) / float(times[-1] - times[0])
    return np.searchsorted(times, instants + SLACK, side="right") - 1, fps


@contextmanager
def open_video(source: str | Path | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Yields (container, video stream). Raises ValueError, without the file's name, for what is no video.

    Decoding has one thread: workers are the parallelism, and ffmpeg marks damaged frames reliably only so."""
    import av

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, metadata_errors="replace") as container:       # a title need not be utf-8
            if not container.streams.video:
                raise ValueError("no video stream in it (only sound?)")
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.time_base is None:
                raise ValueError("not a readable video: its codec is not known here; convert it to h264")
            stream.codec_context.thread_count = 1
            yield container, stream
    except FileNotFoundError as error:
        raise ValueError(error.strerror) from error
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {error.strerror}") from error


def decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames. Raises ValueError at a damaged one: others are predicted from it, and not marked."""
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ValueError("damaged: a frame cannot be decoded")
        yield frame


def timeline(container: av.container.InputContainer,
             stream: av.VideoStream) -> tuple[np.ndarray, int, list[int]]:
    """When a video's frames are shown -> their ticks, ascending; the end's tick; the ticks of key frames.

    These are the timestamps that the frames really have, so a variable frame rate needs no special case.
    Without an index there are no key frames, and the k-th frame that is decoded is shown at the k-th tick."""
    import av

    indexed = container.format.name.startswith(INDEXED)
    shown, keys = packet_times(container, stream) if indexed else (frame_times(container, stream), [])
    if len(shown) < 2:
        raise ValueError(f"not a clip: {len(shown)} frames")

    # until when the last one is shown: not every file says how long a frame lasts
    ticks = np.array([pts for pts, _ in shown])
    last = shown[-1][1] or (ticks[-1] - ticks[0]) // (len(ticks) - 1)
    end = ticks[-1] + last
    if ticks[0] == ticks[-1]:
        raise ValueError("not a clip: all its frames have one timestamp")

    # a file cut between two packets shows no other trace than the length that it states
    seconds = float(stream.time_base)
    length = (end - ticks[0]) * seconds
    stated = stream.duration * seconds if stream.duration else 0
    if not stated and len(container.streams) == 1:    # webm states the whole file's length, sound included
        stated = (container.duration or 0) / av.time_base
    if length < 0.9 * stated:
        raise ValueError(f"truncated: {length:.2f} s of {stated:.2f} s")
    return ticks, end, keys


def packet_times(container: av.container.InputContainer,
                 stream: av.VideoStream) -> tuple[list[tuple[int, int]], list[int]]:
    """Reads the packets, one a frame, decodes nothing -> (tick, duration) of each, ticks of key frames."""
    shown, keys = [], []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError("truncated or damaged: a packet is incomplete")
        if packet.pts is None:
            continue
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:                     # discarded: cut away by the file's edit list
            shown.append((packet.pts, packet.duration or 0))
    return sorted(shown), keys


def frame_times(container: av.container.InputContainer,
                stream: av.VideoStream) -> list[tuple[int, int]]:
    """Decodes all frames -> (tick, duration) of each, in the order in which they are shown."""
    shown = [(frame.pts, frame.duration or 0) for frame in decode(container, stream)]
    if any(pts is None for pts, _ in shown):
        raise ValueError("its frames have no timestamps; convert it to mp4")
    if container.format.name != "avi" and shown != sorted(shown):     # an avi's are those of the packets
        raise ValueError("its timestamps run backwards (files joined?); convert it to mp4")
    return sorted(shown)


def pixels(frame: av.VideoFrame) -> Tensor:
    """Decoded frame -> uint8 (3, H, W) in RGB, turned upright where the file says that the camera was not."""
    x = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(x, round(frame.rotation / 90), (1, 2))


def resize_crop(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) -> (3, height, width): the smallest antialiased resize that covers it, cropped."""
    _, H, W = x.shape
    scale = max(height / H, width / W)
    H, W = max(height, round(H * scale)), max(width, round(W * scale))
    x = F.interpolate(x[None], (H, W), mode="bicubic", antialias=True)[0]

    top, left = (H - height) // 2, (W - width) // 2
    return x[:, top:top + height, left:left + width]


# ---- whole clips -------------------------------------------------------------------------------------------


def check_output(path: str | Path, fps: float) -> None:
    """Raises ValueError where `write_video` would: before there is a clip to lose."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".png", *WRITERS):
        raise ValueError(f"{path}: choose .mp4, .gif, .png, .safetensors, or a folder's name without suffix")
    if not FPS_MIN <= fps <= FPS_MAX:
        raise ValueError(f"fps {fps:g} for {path}: choose from {FPS_MIN:g} to {FPS_MAX:g}")
    if suffix == ".gif" and fps > GIF_FPS_MAX:
        raise ValueError(f"fps {fps:g} for {path}: a gif has {GIF_FPS_MAX} at most; write .mp4")
    if suffix in WRITERS and path.is_dir():
        raise ValueError(f"{path} is a folder: choose another name")


def write_video(path: str | Path, clip: Tensor, fps: float) -> None:
    """Write uint8 (3, T, H, W) as .mp4, .gif, .safetensors (lossless) or png frames.

    FOLDER, or FOLDER.png, holds the frames as 0000.png and so on. The same clip always becomes the same file.
    Raises ValueError (see `check_output`)."""
    if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[0] != 3 or not clip.numel():
        raise ValueError(f"{path}: expected uint8 (3, T, H, W); this one is {clip.dtype} {tuple(clip.shape)}")
    check_output(path, fps)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in WRITERS:
        with atomic(path) as temporary:
            WRITERS[suffix](str(temporary), clip, Fraction(fps).limit_denominator(1001))
    else:
        write_png(path.with_suffix(""), clip)


def to_frames(clip: Tensor) -> np.ndarray:
    """(3, T, H, W) -> (T, H, W, 3)"""
    return clip.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_tensor(path: str, clip: Tensor, fps: Fraction) -> None:
    save_file({"clip": clip.contiguous()}, path, metadata={"fps": str(float(fps))})


def write_mp4(path: str, clip: Tensor, fps: Fraction) -> None:
    """h264 in yuv420p, whose colour planes have half the size: an odd size repeats its last row or column.

    x264's macroblock tree rounds differently from run to run, and its threads split a frame by their number:
    without both, a clip has one file."""
    import av

    _, _, H, W = clip.shape
    rows, columns = [*range(H), *[H - 1] * (H % 2)], [*range(W), *[W - 1] * (W % 2)]
    clip = clip[:, :, rows][..., columns]

    options = {"crf": "17", "x264-params": "mbtree=0:threads=1"}
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = len(rows), len(columns), "yuv420p"
        for frame in to_frames(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: str, clip: Tensor, fps: Fraction) -> None:
    """One palette of 256 colours made for this clip; frame times rounded to the gif's hundredths of a second.

    Pillow chooses the palette (median cut, no dithering) and PyAV writes the file: Pillow and imageio would
    merge frames that look alike, and a clip of 16 frames would be read back with 10."""
    import av
    from PIL import Image

    # all frames, one below the other, are one picture with one palette
    _, T, H, W = clip.shape
    column = Image.fromarray(to_frames(clip).reshape(T * H, W, 3)).quantize(256, dither=Image.Dither.NONE)
    colours = np.array(column.getpalette(), np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, np.uint8)        # alpha, red, green, blue
    palette[:len(colours), 1:] = colours

    tick = Fraction(1, 100)
    with av.open(path, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = H, W, "pal8", tick
        for t, indices in enumerate(np.array(column).reshape(T, H, W)):
            frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
            frame.pts, frame.time_base = round(t / fps / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_png(folder: Path, clip: Tensor) -> None:
    """A folder of frames, 0000.png and on; numbered frames of an earlier clip in it are deleted."""
    from PIL import Image

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    for old in folder.glob("[0-9][0-9][0-9][0-9].png"):     # of a longer clip written here before
        old.unlink()
    for t, pixel_rows in enumerate(to_frames(clip)):
        with atomic(folder / f"{t:04d}.png") as temporary:
            Image.fromarray(pixel_rows).save(temporary, format="png")


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".safetensors": write_tensor}


def read_clip(path: str | Path) -> Tensor:
    """All frames of what write_video writes, or of any other video -> uint8 (3, T, H, W).

    Raises ValueError, in one line that names the file."""
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return read_tensor(path)
        if suffix == ".png" or path.is_dir():
            return read_png(path.with_suffix("") if suffix == ".png" else path)
        with open_video(path) as (container, stream):
            frames = [pixels(frame) for frame in decode(container, stream)]
        if not frames:
            raise ValueError("it has no frames")
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("its frames have several sizes")
        return torch.stack(frames, dim=1)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not a clip ({reason})") from error


def read_tensor(path: Path) -> Tensor:
    try:
        clip = load_file(path)["clip"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"expected a tensor named clip, uint8 (3, T, H, W): {error}") from error
    if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[0] != 3 or not clip.numel():
        raise ValueError(f"its clip is {clip.dtype} {tuple(clip.shape)}; expected uint8 (3, T, H, W)")
    return clip


def read_png(folder: Path) -> Tensor:
    """The .png files of a folder in the order of their numbers (2 before 10), all of one size."""
    from PIL import Image

    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    frames = []
    for file in sorted(folder.glob("*.png"), key=lambda file: (len(file.name), file.name)):
        try:
            with Image.open(file) as picture:
                frames.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file.name} is not a readable picture") from error
        if frames[-1].shape != frames[0].shape:
            size, first = tuple(frames[-1].shape[1:]), tuple(frames[0].shape[1:])
            raise ValueError(f"{file.name} is {size[0]}x{size[1]}, those before it {first[0]}x{first[1]}")
    if not frames:
        raise ValueError("no .png in it")
    return torch.stack(frames, dim=1)
