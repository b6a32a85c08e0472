"""Video files <-> uint8 clips (3, T, H, W): pictures as players show them, frames chosen by their timestamps.
A tick is a timestamp as the file counts it; times are in seconds, fps in 1/second."""
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plumbing.errors import UserError, reading
from plumbing.files import MARK, atomic

READABLE = tuple(".mp4 .m4v .mov .3gp .mkv .webm .avi .wmv .flv .mpg .mpeg .ts .ogv .mxf .y4m".split())
FORMATS = "mov,matroska,avi,asf,flv,mpeg,mpegts,mpegvideo,ogg,mxf,yuv4mpegpipe,gif"     # no lists of files
INDEXED = ("mov", "matroska")           # containers that say when each frame is shown, and find key frames
SEGMENT = bytes.fromhex("1853806701")   # in an .mkv, precedes the size of what follows
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")     # in a .wmv, 24 bytes before the size of the file
SLACK = 2e-3                            # containers round timestamps, some to a millisecond
ENLARGED = "enlarged x4 to {}x{}"       # ends the comment of a small clip that was enlarged for players

# PyAV refuses frames with kinds of side data that it does not know: EXIF, the views of a spatial video
av.sidedata.sidedata.Type._missing_ = classmethod(lambda kinds, number: kinds.VIDEO_HINT)


def read_video(source: str | Path | bytes, frames: int, fps: float, height: int, width: int,
               generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """A video file, or its bytes -> (uint8 clip (3, frames, height, width), its frames per second).

    The clip starts at a random frame, or at the first without a generator; see `pick`. Raises ValueError."""
    ticks, keys, seconds = timeline(source)
    if ticks[0] == ticks[-1]:
        raise ValueError(f"not a clip: {len(ticks)} frames, all of one timestamp")
    chosen, rate = pick(ticks * seconds, frames, fps, generator)
    return decode_at(source, ticks, keys, chosen, lambda frame: resize_crop(frame, height, width)), rate


def read_clip(path: str | Path, frames: int | None = None,
              fit: Callable[[Tensor], Tensor] = lambda frame: frame) -> Tensor:
    """A video, or a folder of png -> clip (3, T, H, W), uint8 unless `fit` changes that. Raises UserError.

    frames: how many, in the middles of equal parts of the clip; None: all. fit: applied to each frame
    (3, H, W) as it is decoded, so that memory holds the fitted ones only."""
    def middles(T: int) -> list[int]:
        if T < (frames or 1):
            raise ValueError(f"{T} frames in it, {frames or 1} are needed")
        return [int((i + 0.5) * T / (frames or T)) for i in range(frames or T)]

    folder = png_folder(path)
    with reading(path, "a clip"):
        if folder.is_dir():
            files = sorted(folder.glob("[!.]*.png"), key=lambda file: (len(file.name), file.name))
            return torch.stack([fit(read_picture(files[i])) for i in middles(len(files))], dim=1)
        ticks, keys, _ = timeline(path)
        return decode_at(path, ticks, keys, middles(len(ticks)), fit)


def read_picture(path: Path) -> Tensor:
    """A picture -> uint8 RGB (3, H, W)."""
    picture = Image.open(path)
    if picture.mode.startswith("I"):                                # 16 bits of gray, which PIL would clip
        picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def pick(times: np.ndarray, frames: int, fps: float,
         generator: torch.Generator | None = None) -> tuple[np.ndarray, float]:
    """Which frames are on screen at `frames` instants that are 1/fps apart -> (their indices, fps).

    times: when each frame appears, ascending; the last one stays as long as most do. In a video too short
    for that the instants are spread evenly over all of it, and the fps handed back is their higher one."""
    end = times[-1] + np.median(np.diff(times))
    starts = int((times + (frames - 1) / fps < end - SLACK).sum())
    if starts:
        first = 0 if generator is None else torch.randint(starts, (), generator=generator).item()
        instants = times[first] + np.arange(frames) / fps
    else:
        instants = np.linspace(times[0], times[-1], frames)
        fps = (frames - 1) / float(times[-1] - times[0])
    return np.searchsorted(times, instants + SLACK, side="right") - 1, fps


@contextmanager
def open_video(source: str | Path | bytes) -> Iterator[tuple]:
    """Yields (PyAV's container, its best video stream, what check_end says). Raises ValueError, without the
    file's name."""
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError("No such file, or a folder, pipe or device")
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        has_end = check_end(file)
        try:                                                # a title need not be utf-8
            with av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                    raise ValueError("no video in it")
                if stream.codec_context is None:
                    raise ValueError("its codec is not known here; convert it to h264")
                stream.codec_context.thread_count = 1       # more do not mark damaged frames reliably
                stream.codec_context.flags |= av.codec.context.Flags.unaligned      # crops to the pixel
                yield container, stream, has_end
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"not a readable video: {error.strerror}") from error


def check_end(file: BinaryIO) -> bool:
    """Does a file say when it ends, but not its size? Raises ValueError for one that is shorter than its
    size, of which ffmpeg would make a shorter clip."""
    head, size = file.read(4096) + bytes(8), file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 4096))
    tail = file.read()                                              # of a gif; zeros or words may follow it
    boxes = top_level(file, size)
    stated_size = boxes.get(b"RIFF", 8) - 8                         # .avi; some count the 8 of its head
    if b"moov" in boxes:                                                                # .mp4, .mov
        stated_size = max(boxes[b"moov"], boxes.get(b"moof", 0))
    elif SEGMENT in head:                                                               # .mkv, .webm
        start = head.index(SEGMENT) + len(SEGMENT)                  # of a number of 7 bytes
        stated_size = start + 7 + int.from_bytes(head[start:start + 7], "big")
    elif ASF in head:                                                                   # .wmv
        stated_size = int.from_bytes(head.split(ASF, 1)[1][24:32], "little")
    elif head.startswith(b"FLV") and b"filesize\0" in head:
        stated_size = np.frombuffer(head.split(b"filesize\0")[1][:8], ">f8").item()

    file.seek(0)
    cut_gif = head.startswith(b"GIF8") and not re.search(rb"\0;[\0\t-~]*\Z", tail)
    if cut_gif or size < stated_size < 2 ** 48:
        raise ValueError("truncated: its end is missing")
    has_size = 0 < stated_size < 2 ** 48                            # larger: written to a pipe, not known
    mkv_has_end = SEGMENT in head and re.search(rb"\x44\x89[\x84\x88]", head)
    return not has_size and bool(mkv_has_end or head.startswith(b"\x06\x0e\x2b\x34"))     # of an .mxf


def top_level(file: BinaryIO, size: int) -> dict[bytes, int]:
    """Where the parts of an .mp4 or .avi of `size` bytes end: the last one of each name -> position."""
    ends, position = {}, 0
    while position < size:
        file.seek(position)
        header = file.read(16)
        name, length = header[4:8], int.from_bytes(header[:4], "big")
        if header.startswith(b"RIFF"):
            name, length = b"RIFF", 8 + int.from_bytes(header[4:8], "little")
            if length in (8, 2 ** 32 + 7):                          # written to a pipe, not known
                break
        elif length == 1:
            length = int.from_bytes(header[8:], "big")
        position += length or size - position                       # 0: to the end
        ends[name] = position
    return ends


def timeline(source: str | Path | bytes) -> tuple[np.ndarray, list[int], float]:
    """When a video's frames are shown -> their ticks, ascending; those of key frames; seconds per tick.

    Without an index there are no key frames, and the k-th frame that is decoded is shown at the k-th tick."""
    ticks, keys, shown_keys, end = [], [], [], 0.0          # end: of the last packet of all, in seconds
    with open_video(source) as (container, stream, has_end):
        name, context = container.format.name, stream.codec_context
        indexed = name.startswith(INDEXED) and context.pix_fmt != "pal8"        # a palette comes but once
        for packet in container.demux([*container.streams]):
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                continue
            frames = [packet] if indexed else decoded(packet)
            if any(frame.is_corrupt for frame in frames):
                raise ValueError("truncated or damaged: a frame is incomplete")
            if not indexed:
                ticks += [frame.pts for frame in frames]
            elif packet.pts is not None:
                if packet.is_keyframe:
                    keys.append(packet.pts)
                shown = context.name != "vp8" or packet.size and memoryview(packet)[0] & 16    # RFC 6386, 9.1
                if shown and not packet.is_discard:                 # by an edit list
                    ticks.append(packet.pts)
                    shown_keys += [packet.pts] if packet.is_keyframe else []

        if not ticks or None in ticks:
            raise ValueError("not a clip: no frames, or some without a timestamp; convert it to mp4")
        outside = any(entry.pos + entry.size > container.size for entry in stream.index_entries)
        stated_end = (container.duration or 0) / av.time_base if has_end else 0         # not quite exact
        if outside or stated_end - end > max(0.25, 0.02 * stated_end):
            raise ValueError("truncated: its last frames are missing")
        order = shown_keys if indexed else ticks
        if name != "avi" and order != sorted(order):                # an avi's are of packets
            raise ValueError("its timestamps run backwards (files joined?); convert it to mp4")

        # of a file that was cut: what is shown before its first key frame may need more than that
        if keys and min(ticks) < keys[0]:
            container.seek(keys[0], stream=stream)
            leading = takewhile(lambda frame: (frame.pts or 0) < keys[0], container.decode(stream))
            decodable = {frame.pts for frame in leading if not frame.is_corrupt}
            ticks = [tick for tick in ticks if tick >= keys[0] or tick in decodable]
        return np.array(sorted(set(ticks) if keys else ticks)), sorted(keys), float(stream.time_base)


def decoded(packet: av.Packet) -> list[av.VideoFrame]:
    """A packet's frames. One that is empty, and not the last, repeats a frame (Theora)."""
    return packet.decode() if packet.size or packet.dts is None else []


def decode_at(source: str | Path | bytes, ticks: np.ndarray, keys: list[int], chosen: Sequence[int],
              fit: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fit` makes of the frames whose indices in a timeline (ticks, keys) are `chosen`, along dim 1.

    Decoding begins at the last key frame before the first of them. Where that fails (some files say only at
    their beginning how they are coded) it begins at the first one, and without `keys` at the first frame."""
    needed, pictures, last = [int(ticks[index]) for index in chosen], {}, -np.inf
    with open_video(source) as (container, stream, _):
        if keys:
            container.seek(max((key for key in keys if key <= needed[0]), default=needed[0]), stream=stream)
        frames = chain.from_iterable(map(decoded, container.demux(stream)))
        aspect = stream.codec_context.sample_aspect_ratio or 1
        for order, frame in enumerate(frames):
            tick = frame.pts if keys else int(ticks[order])
            if frame.is_corrupt or tick is None or tick < last:     # what is predicted from it is not marked
                break
            if tick in needed:
                change = (stream.codec_context.sample_aspect_ratio or 1) / aspect
                pictures[tick] = fit(pixels(frame, container, stream, change))
            if needed[-1] in pictures:
                break
            last = tick

    if not pictures.keys() >= set(needed):
        if keys[1:]:
            pictures.clear()
            return decode_at(source, ticks, keys[:1], chosen, fit)
        raise ValueError("damaged: a frame is missing, out of order, or cannot be decoded")
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise ValueError("its pictures change their size; split it there")
    return torch.stack([pictures[tick] for tick in needed], dim=1)


def pixels(frame: av.VideoFrame, container: av.container.InputContainer, stream: av.VideoStream,
           change: Fraction = Fraction(1)) -> Tensor:
    """Decoded frame -> uint8 RGB (3, H, W) as players show it: with square pixels, upright, not mirrored.
    change: of the pixels' aspect since the stream began.

    ffmpeg converts the colours by the file's matrix and range; where it names none, as BT.601, limited."""
    if frame.color_trc in (16, 18):                                 # in ITU-T H.273
        raise ValueError("an HDR video (PQ or HLG); convert it to SDR")
    if frame.format.name in ("rgb555be", "rgb565be"):               # which swscale mistakes
        frame = frame.reformat(format=frame.format.name.replace("be", "le"))
    width = round(frame.width * (stream.sample_aspect_ratio or 1) * change)
    x = frame.to_ndarray(format="rgb24", width=width, interpolation="BICUBIC", threads=1)
    x = torch.from_numpy(x).permute(2, 0, 1)

    if container.metadata.get("comment", "").endswith(ENLARGED.format(*x.shape[1:])):   # by write_video
        x = x[:, 2::4, 2::4]                                        # one pixel of each block

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()    # (x, y) goes to (ax + cy, bx + dy)
        if abs(b) > abs(a):
            x, a, d = x.mT, c, b
        x = x.flip([dim for dim, sign in ((2, a), (1, d)) if sign < 0])
    return x


def resize_crop(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) -> (3, height, width): the smallest antialiased resize that covers it, cropped."""
    _, H, W = x.shape
    scale = max(height / H, width / W)
    H, W = max(height, round(H * scale)), max(width, round(W * scale))
    x = F.interpolate(x[None], (H, W), mode="bicubic", antialias=True)[0]
    top, left = (H - height) // 2, (W - width) // 2
    return x[:, top:top + height, left:left + width]


# ---- writing -----------------------------------------------------------------------------------------------

def png_folder(path: str | Path) -> Path:
    """a.png is the folder a of pictures; other names are their own."""
    return Path(path).with_suffix("") if Path(path).suffix.lower() == ".png" else Path(path)


def check_output(path: str | Path, fps: float) -> None:
    """Raises UserError where `write_video` would: before there is a clip to lose."""
    folder = png_folder(path)
    if folder.is_dir() or folder != Path(path) and os.path.lexists(folder):
        raise UserError(f"{path}: {folder} is there already; choose another name")
    if Path(path).suffix.lower() == ".gif" and fps > 50:
        raise UserError(f"fps {fps:g} for {path}: a .gif has at most 50")


def write_video(path: str | Path, clip: Tensor, fps: float) -> None:
    """Write uint8 (3, T, H, W) as .mp4, .gif, or as NAME.png: NAME/0000.png and so on. Raises UserError.

    A clip of less than 128 pixels is enlarged in mp4 and gif, which read_clip takes back: players show its
    pixels, and yuv420p, which halves the planes of colour, keeps the edges."""
    check_output(path, fps)
    suffix, pictures, comment = Path(path).suffix.lower(), clip.cpu().permute(1, 2, 3, 0).numpy(), MARK
    if suffix == ".png":
        folder = png_folder(path)
        hidden = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(hidden, ignore_errors=True)
        for t, picture in enumerate(pictures):
            with atomic(hidden / f"{t:04d}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="png")
        hidden.rename(folder)
        return

    if max(clip.shape[2:]) < 128:
        pictures = pictures.repeat(4, 1).repeat(4, 2)
        comment = f"{comment}, {ENLARGED.format(*pictures.shape[1:3])}"
    with atomic(path) as temporary:
        write = {".mp4": write_mp4, ".gif": write_gif}[suffix]
        write(temporary, np.ascontiguousarray(pictures), fps, comment)


def write_gif(path: Path, pictures: np.ndarray, fps: float, comment: str) -> None:
    """Frames that look alike become one that lasts longer."""
    first, *others = map(Image.fromarray, pictures)
    ends = np.round(100 * np.arange(len(pictures) + 1) / fps)       # a gif counts 1/100 s
    first.save(path, format="gif", save_all=True, append_images=others, loop=0, comment=comment,
               duration=(10 * np.diff(ends)).tolist())


def write_mp4(path: Path, pictures: np.ndarray, fps: float, comment: str) -> None:
    """h264 in yuv420p, which every player takes, BT.709. The options make equal files of equal clips."""
    options = {"crf": "17", "x264-params": "mbtree=0:threads=1"}
    with av.open(f"file:{path.absolute()}", "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        tags = stream.codec_context
        tags.colorspace = tags.color_primaries = tags.color_trc = tags.color_range = 1   # BT.709, limited
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="itu709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
