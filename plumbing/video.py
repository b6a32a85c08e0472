"""Video files <-> uint8 clips (3, T, H, W): frames sampled by their timestamps, whole clips read and written.

Axes: T frames, H W space. A tick is a timestamp as the file counts it; times are in seconds, fps in frames per second.
"""
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# ---- sampling frames ----


@contextmanager
def open_video(source: str | Path | bytes) -> Iterator[tuple]:
    """Yield (container, video stream). Decoding has one thread: workers are the parallelism, and ffmpeg marks damaged
    frames reliably only so."""
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise ValueError("no video stream in it (only sound?)")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {error.strerror}") from error


def decode(container, stream) -> Iterator:
    """Decoded frames. A damaged one is an error: those predicted from it are wrong too, which ffmpeg does not say."""
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ValueError("damaged: a frame cannot be decoded")
        yield frame


def timeline(container, stream) -> tuple[np.ndarray, int, list[int]]:
    """Read the packets, decode nothing -> ascending ticks of the frames, tick of the end, ticks of the key frames.

    These are the timestamps that the frames really have, so a variable frame rate needs no special case."""
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
    if len(shown) < 2:
        raise ValueError(f"not a clip: {len(shown)} frames")
    shown.sort()
    ticks = np.array([pts for pts, _ in shown])
    last = shown[-1][1] or (ticks[-1] - ticks[0]) // (len(ticks) - 1)       # a file may not say how long a frame lasts
    seconds = float(stream.time_base)
    stated = stream.duration * seconds if stream.duration else 0
    if not stated and len(container.streams) == 1:    # webm states the length of the whole file, sound included
        stated = (container.duration or 0) / av.time_base
    if (ticks[-1] + last - ticks[0]) * seconds < 0.9 * stated:    # cut between two packets: no other trace
        raise ValueError(f"truncated: {(ticks[-1] + last - ticks[0]) * seconds:.2f} s of {stated:.2f} s")
    return ticks, ticks[-1] + last, keys


def pick(times: np.ndarray, end: float, frames: int, fps: float, short: str = "stretch", generator=None) -> np.ndarray:
    """Indices of the frames on screen at `frames` instants 1/fps apart, from a random frame on (or the first).

    times: ascending; the last frame is on screen until `end`. A clip too short for that is either stretched (the
    instants spread evenly over the whole of it, so that it plays slower than life) or, short="skip", a ValueError."""
    slack = 2e-3                                      # containers round timestamps, some to a millisecond
    need = (frames - 1) / fps
    starts = int((times + need < end - slack).sum())
    if starts:
        start = torch.randint(starts, (), generator=generator).item() if generator is not None else 0
        instants = times[start] + np.arange(frames) / fps
    elif short == "stretch":
        instants = np.linspace(times[0], times[-1], frames)
    else:
        raise ValueError(f"too short: {end - times[0]:.2f} s, but {frames} frames at {fps:g} fps span {need:.2f} s")
    return np.searchsorted(times, instants + slack, side="right") - 1


def read_video(source: str | Path | bytes, frames: int, fps: float, height: int, width: int, short: str = "stretch",
               generator: torch.Generator | None = None) -> Tensor:
    """File or its bytes -> uint8 (3, frames, height, width). Decodes from the key frame before them, and no further."""
    with open_video(source) as (container, stream):
        ticks, end, keys = timeline(container, stream)
        seconds = float(stream.time_base)
        wanted = ticks[pick(ticks * seconds, end * seconds, frames, fps, short, generator)].tolist()
        container.seek(max((key for key in keys if key <= wanted[0]), default=wanted[0]), stream=stream)
        found = {}
        for frame in decode(container, stream):
            if frame.pts in wanted:
                found[frame.pts] = resize_crop(pixels(frame), height, width)
            if frame.pts is not None and frame.pts >= wanted[-1]:
                break
    if len(found) < len(set(wanted)):
        raise ValueError(f"damaged: {len(set(wanted)) - len(found)} frames are missing")
    return torch.stack([found[pts] for pts in wanted], dim=1)


def pixels(frame) -> Tensor:
    """Decoded frame -> uint8 (3, H, W) in RGB, turned upright where the file says that the camera was not."""
    x = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(x, round(frame.rotation / 90), (1, 2))


def resize_crop(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) -> (3, height, width): the smallest antialiased resize that covers it, then its centre."""
    _, H, W = x.shape
    scale = max(height / H, width / W)
    H, W = max(height, round(H * scale)), max(width, round(W * scale))
    x = F.interpolate(x[None], (H, W), mode="bicubic", antialias=True)[0]
    top, left = (H - height) // 2, (W - width) // 2
    return x[:, top:top + height, left:left + width]


# ---- whole clips ----


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path` only if the block succeeds: no half-written files."""
    temporary = Path(path).with_name(f".{uuid.uuid4().hex}.{Path(path).name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_video(path: str | Path, clip: Tensor, fps: float) -> None:
    """Write uint8 (3, T, H, W) as .mp4, .gif, .safetensors (lossless) or png frames (FOLDER, or NAME.png for NAME/)."""
    path = Path(path)
    writers = {".mp4": write_mp4, ".gif": write_gif, ".safetensors": write_tensor}
    if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[0] != 3 or not clip.numel():
        raise ValueError(f"a clip is uint8 (3, T, H, W); this one is {clip.dtype} {tuple(clip.shape)}")
    if path.suffix in ("", ".png"):
        write_png(path.with_suffix(""), clip)
    elif path.suffix in writers:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            writers[path.suffix](str(temporary), clip, Fraction(fps).limit_denominator(1001))
    else:
        raise ValueError(f"{path}: choose .mp4, .gif, .png, .safetensors, or a folder's name without suffix")


def to_frames(clip: Tensor) -> np.ndarray:
    """(3, T, H, W) -> (T, H, W, 3)"""
    return clip.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_tensor(path: str, clip: Tensor, fps: Fraction) -> None:
    save_file({"clip": clip.contiguous()}, path, metadata={"fps": str(float(fps))})


def write_png(folder: Path, clip: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9].png"):     # of a longer clip written here before
        old.unlink()
    for t, frame in enumerate(to_frames(clip)):
        iio.imwrite(folder / f"{t:04d}.png", frame)


def write_mp4(path: str, clip: Tensor, fps: Fraction) -> None:
    """h264 in yuv420p halves the colour planes, so an odd size is made even by repeating the last row or column."""
    H, W = clip.shape[2:]
    clip = clip[:, :, [*range(H), *[H - 1] * (H % 2)]][..., [*range(W), *[W - 1] * (W % 2)]]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[2:], "yuv420p"
        for frame in to_frames(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: str, clip: Tensor, fps: Fraction) -> None:
    """One palette of 256 colours made for this clip. A gif counts hundredths of a second: frame times are rounded."""
    H, W = clip.shape[2:]
    graph, tick = av.filter.Graph(), Fraction(1, 100)
    source = graph.add_buffer(width=W, height=H, format="rgb24", time_base=tick)
    split, make, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(make, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    with av.open(path, "w") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = H, W, "pal8", tick
        for t, frame in enumerate(to_frames(clip)):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = round(t / fps / tick), tick
            graph.push(frame)
        graph.push(None)                              # the palette exists only when all frames are in
        for _ in range(clip.shape[1]):
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode())


def read_clip(path: str | Path) -> Tensor:
    """All frames of what write_video writes, or of any other video -> uint8 (3, T, H, W)."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)["clip"]
        if path.suffix == ".png" or path.is_dir():
            folder = path.with_suffix("") if path.suffix == ".png" else path
            files = sorted(folder.glob("*.png"), key=lambda file: (len(file.name), file.name))   # 2 before 10
            frames = [torch.from_numpy(iio.imread(file, mode="RGB")).permute(2, 0, 1) for file in files]
        else:
            with open_video(path) as (container, stream):
                frames = [pixels(frame) for frame in decode(container, stream)]
        return torch.stack(frames, dim=1)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: expected a tensor named clip, uint8 (3, T, H, W) ({error})") from error
    except (ValueError, RuntimeError) as error:       # RuntimeError: no frames, or frames of several sizes
        raise ValueError(f"{path}: not a clip ({error})") from error
