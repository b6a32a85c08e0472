"""Clips, video files and tars that the tests of video.py and data.py make."""
import tarfile
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import torch

from plumbing import video

SHAPE = dict(frames=4, fps=8, height=16, width=24)


def pick(*args, **options) -> np.ndarray:
    return video.pick(*args, **options)[0]


def read_video(*args, **options) -> torch.Tensor:
    return video.read_video(*args, **options)[0]


def counting_clip(frames: int, height: int = 32, width: int = 48, step: int = 4) -> torch.Tensor:
    """Frame t is grey of level step * t + 8, so a frame tells its number."""
    levels = (step * torch.arange(frames) + 8).view(1, -1, 1, 1)
    return levels.expand(3, frames, height, width).to(torch.uint8)


def numbers(clip: torch.Tensor, step: int = 4) -> list[int]:
    return ((clip.float().mean((0, 2, 3)) - 8) / step).round().int().tolist()


def write_at(path, milliseconds: list[int], options=None, codec="libx264", size=(32, 48), title="") -> None:
    """A video whose frame t is shown from milliseconds[t] on."""
    start = {"movflags": "+faststart"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=start) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        pictures = counting_clip(len(milliseconds), *size).permute(1, 2, 3, 0).contiguous().numpy()
        for pts, picture in zip(milliseconds, pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_mp4(folder) -> bytes:
    """Two seconds at 30 fps with a key frame every third of a second."""
    write_at(folder / "a.mp4", [round(t * 1000 / 30) for t in range(60)], {"g": "10"})
    return (folder / "a.mp4").read_bytes()


def tar_of(path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return str(path)
