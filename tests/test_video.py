"""Clips as files (plumbing/video.py): frames sampled by their times, clips written and read; atomic files."""
import itertools
import os
import resource
import signal
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import counting_clip, make_mp4, numbers, pick, read_video, write_at
from PIL import Image
from safetensors.torch import save_file

from plumbing import video
from plumbing.errors import UserError
from plumbing.files import atomic
from plumbing.video import read_clip, resize_crop, write_video


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return make_mp4(tmp_path_factory.mktemp("mp4"))


# ---- sampling frames ---------------------------------------------------------------------------------------

def test_pick_consecutive_frames_at_the_native_rate():
    """However a container rounds its timestamps, and from every start."""
    for rate, digits in itertools.product((8, 15, 24, 25, 29.97, 30), (3, 6)):
        times = np.round(np.arange(40) / rate, digits)
        seen = set()
        for seed in range(100):
            got = pick(times, 16, rate, generator=torch.Generator().manual_seed(seed))
            assert (np.diff(got) == 1).all()
            seen.add(int(got[0]))
        assert seen >= {0, 24} or len(seen) > 18 and max(seen) <= 24
    assert pick(times, 16, 30)[0] == 0


def test_pick_short_clips():
    times = np.arange(10) / 10                                       # one second
    assert pick(times, 8, 8).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # 7/8 s: long enough
    assert pick(times, 10, 1).tolist() == list(range(10))  # 9 s: spread over what is there
    assert pick(times, 4, 1).tolist() == [0, 3, 6, 9]
    assert pick(times, 19, 10)[[0, -1]].tolist() == [0, 9]  # 10 frames for 19: some twice
    for frames, fps, true_fps in ((8, 8, 8), (10, 1, 10), (4, 1, 3 / 0.9)):     # at what rate it is played
        assert video.pick(times, frames, fps)[1] == pytest.approx(true_fps)


@pytest.mark.parametrize("kind", ["mp4", "bframes", "open-gop", "webm", "vfr"])
def test_read_video_returns_the_frames_of_those_instants(kind, tmp_path):
    """From every start, across key frames: what decoding everything would give."""
    ms = [round(t * 1000 / 30) for t in range(40)]
    if kind == "vfr":
        ms = np.cumsum(np.random.default_rng(0).integers(1, 6, 40) * 20).tolist()
    options = {"bframes": {"g": "12", "bf": "3"},
               "open-gop": {"x264-params": "open-gop=1:keyint=8:bframes=3:b-adapt=0:scenecut=0"}}
    path = tmp_path / ("a.webm" if kind == "webm" else "a.mp4")
    write_at(path, ms, options.get(kind, {"g": "7"}), "libvpx-vp9" if kind == "webm" else "libx264")
    times, starts = np.array(ms) / 1000, set()
    for seed in range(12):
        clip = read_video(path, 5, 10, 32, 48, generator=torch.Generator().manual_seed(seed))
        got = numbers(clip)
        assert clip.shape == (3, 5, 32, 48) and clip.dtype == torch.uint8
        assert got == [int((times <= times[got[0]] + k / 10 + 0.002).sum()) - 1 for k in range(5)]
        starts.add(got[0])
    assert len(starts) > 5


@pytest.mark.parametrize("name, codec, options", [
    ("a.avi", "mpeg4", {}), ("b.AVI", "libx264", {"bf": "3"}), ("a.wmv", "wmv2", {}),
    ("a.mov", "libx264", {}), ("a.flv", "flv1", {}), ("a.mpg", "mpeg2video", {"bf": "2"}),
    ("a.ts", "libx264", {"bf": "3"}), ("a.3gp", "mpeg4", {}),
    ("a.mkv", "libx264", {"bf": "3"}), ("a.mxf", "mpeg2video", {})])
def test_every_container_gives_the_frames_of_those_instants(name, codec, options, tmp_path):
    """Also those without an index (mpeg), without times of display (avi), or where a seek lands too late."""
    assert Path(name).suffix.lower() in video.READABLE
    with av.open(str(tmp_path / name), "w", format="mpegts" if name == "a.ts" else None) as container:
        stream = container.add_stream(codec, rate=25, options=options | {"b": "4M"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in counting_clip(40, 48, 64).permute(1, 2, 3, 0).contiguous().numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())

    starts = set()
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        assert numbers(read_video(source, 40, 25, 48, 64)) == [*range(40)]
        for seed in range(6):
            got = numbers(read_video(source, 5, 5, 48, 64, generator=torch.Generator().manual_seed(seed)))
            assert got == [got[0] + 5 * k for k in range(5)]
            starts.add(got[0])
    assert len(starts) > 4


def test_only_what_is_needed_is_decoded(mp4):
    """From the key frame before the clip to the next but one behind it: the rest may be damaged."""
    with av.open(BytesIO(mp4)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    ticks, keys, _ = video.timeline(mp4)
    for first in (3, 17, 36, 41):
        chosen = range(first, first + 6, 2)
        start = max(key for key in keys if key <= ticks[first])
        end = [key for key in (*keys, *2 * [ticks[-1] + 1]) if key > ticks[first + 4]][1]
        content = bytearray(mp4)
        for packet in packets:
            if not start <= packet.pts < end:
                content[packet.pos:packet.pos + packet.size] = bytes(packet.size)
        clip, again = (video.decode_at(source, ticks, keys, chosen, lambda frame: frame)
                       for source in (mp4, bytes(content)))
        assert bytes(content) != mp4 and torch.equal(again, clip) and numbers(clip) == list(chosen)


@pytest.mark.parametrize("H, W", [(36, 64), (64, 36), (45, 51), (9, 13)])
def test_resize_crop_against_pillow(H, W, height=16, width=24):
    """Pillow's bicubic is antialiased too; both round to integers, so values may differ by one."""
    x = torch.randint(0, 256, (3, H, W), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scale = max(height / H, width / W)
    h, w = round(H * scale), round(W * scale)
    assert (h == height) or (w == width)
    big = np.array(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((w, h), Image.BICUBIC))
    top, left = (h - height) // 2, (w - width) // 2
    want = torch.from_numpy(big[top:top + height, left:left + width]).permute(2, 0, 1)
    got = resize_crop(x, height, width)
    assert got.shape == (3, height, width)
    assert (got.int() - want.int()).abs().max() <= 1


# ---- whole clips -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smooth_clip() -> torch.Tensor:
    x = torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    clip = F.interpolate(x[None], (9, 32, 48), mode="trilinear", align_corners=True)[0]
    return (clip * 255).to(torch.uint8)


@pytest.mark.parametrize("name, tolerance", [("a.mp4", 4), ("a.gif", 8), ("a.PNG", 0), ("A.Mp4", 4)])
def test_write_and_read_again(name, tolerance, smooth_clip, tmp_path):
    path = tmp_path / "new folder" / name
    write_video(path, smooth_clip, 8)
    got = read_clip(path)
    assert got.shape == smooth_clip.shape and got.dtype == torch.uint8
    assert (got.int() - smooth_clip.int()).abs().float().mean() <= tolerance
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("name, fps", [("a.mp4", 0.1), ("a.mp4", 29.97), ("a.mp4", 240), ("a.gif", 8),
                                       ("a.gif", 50)])
def test_every_fps_that_may_be_written_is_read(name, fps, smooth_clip, tmp_path):
    write_video(tmp_path / name, smooth_clip, fps)
    ticks, _, seconds = video.timeline(tmp_path / name)
    assert ticks[-1] * seconds == pytest.approx(8 / fps, abs=0.006 if name == "a.gif" else 1e-3 / fps)


def test_pngs_in_the_order_of_their_numbers(tmp_path):
    for t, mode, level in ((10, "L", 10), (9, "I;16", 9 * 256 + 200), (2, "I;16", 2 * 256)):    # 8 or 16 bits
        Image.new(mode, (4, 4), level).save(tmp_path / f"{t}.png")
    assert read_clip(tmp_path)[0, :, 0, 0].tolist() == [2, 9, 10]


def test_output_is_checked_before_there_is_a_clip(smooth_clip, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    write_video(tmp_path / "v2.0.png", smooth_clip, 8)
    for name, message in (("a.gif", "fps 60 for .*a.gif: a .gif has at most 50"),
                          ("folder.mp4", "folder.mp4: .*folder.mp4 is there already"),
                          ("v2.0.png", "v2.0.png: .*v2.0 is there already; choose another name")):
        with pytest.raises(UserError, match=message):
            video.check_output(tmp_path / name, 60)
        with pytest.raises(UserError, match=message):
            write_video(tmp_path / name, smooth_clip[:, :1], 60)
    assert torch.equal(read_clip(tmp_path / "v2.0"), smooth_clip)


def test_unreadable_clips_are_named_with_the_reason(smooth_clip, tmp_path):
    write_video(tmp_path / "a.png", smooth_clip, 8)
    Image.new("RGB", (5, 5)).save(tmp_path / "a" / "0003.png")
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "cut.mp4", smooth_clip, 8)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:600])
    for name, reason in (("missing.mp4", "No such file"), ("empty", "0 frames"), ("a", "equal size"),
                         ("cut.mp4", "not a readable video")):
        with pytest.raises(UserError, match=f"{name} is not a clip, or is damaged .*{reason}"):
            read_clip(tmp_path / name)
    (tmp_path / "a" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a cannot be read: .*0003.png"):
        read_clip(tmp_path / "a")


# ---- files -------------------------------------------------------------------------------------------------

def test_atomic_follows_the_umask_and_takes_long_names(tmp_path):
    before = os.umask(0o027)
    try:
        for name in ("a.safetensors", "\u00e9" * 120 + ".safetensors"):  # 252 bytes, where 255 are allowed
            with atomic(tmp_path / "new" / name) as temporary:
                save_file({"x": torch.zeros(1)}, temporary)
            assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_is_said_with_the_file_and_leaves_nothing(suffix, tmp_path):
    clip = torch.randint(0, 256, (3, 8, 256, 256)).to(torch.uint8)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))
        with pytest.raises(UserError, match="cannot be written: .*too large"):
            write_video(tmp_path / f"a{suffix}", clip, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_atomic_leaves_nothing_of_a_failure(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    refused = pytest.raises(UserError, match="cannot be written: (File exists|Not a dir)")
    with refused, atomic(tmp_path / "a/b"):
        raise AssertionError("the block must not run")
    with pytest.raises(UserError, match="b cannot be written: Is a directory"), atomic(tmp_path / "b"):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"} and (tmp_path / "a").read_text() == "old"
