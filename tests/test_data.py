"""Clips as files (video.py), datasets of them, their order, what happens to bad ones, and the cache (data.py)."""
import csv
import itertools
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from io import BytesIO
from multiprocessing import Process
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import data
from data import BadClip, Cache, CacheWriter, loader, open_dataset
from plumbing import tars, video
from plumbing.files import atomic, remove_leftovers
from plumbing.sources import expand
from plumbing.video import read_clip, resize_crop, write_video

CHILD = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
SHAPE = dict(frames=4, fps=8, height=16, width=24)


def pick(*args, **options) -> np.ndarray:
    return video.pick(*args, **options)[0]


def read_video(*args, **options) -> torch.Tensor:
    return video.read_video(*args, **options)[0]


def counting_clip(frames: int, height: int = 32, width: int = 48, step: int = 4) -> torch.Tensor:
    """Frame t is grey of level step * t + 8, so a frame tells its number."""
    return (step * torch.arange(frames) + 8).view(1, -1, 1, 1).expand(3, frames, height, width).to(torch.uint8)


def numbers(clip: torch.Tensor, step: int = 4) -> list[int]:
    return ((clip.float().mean((0, 2, 3)) - 8) / step).round().int().tolist()


def write_at(path, milliseconds: list[int], options: dict | None = None, codec: str = "libx264", size=(32, 48)) -> None:
    """A video whose frame t is shown from milliseconds[t] on."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if codec == "libx264" else {}) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, pixels in enumerate(counting_clip(len(milliseconds), *size).permute(1, 2, 3, 0).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = milliseconds[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    """Two seconds at 30 fps with a key frame every third of a second."""
    path = tmp_path_factory.mktemp("mp4") / "a.mp4"
    write_at(path, [round(t * 1000 / 30) for t in range(60)], {"g": "10"})
    return path.read_bytes()


def tar_of(path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return str(path)


# ---- sampling frames ----


def test_pick_consecutive_frames_at_the_native_rate():
    """However a container rounds its timestamps, and from every start."""
    for rate, digits in itertools.product((8, 15, 24, 25, 29.97, 30), (3, 6)):
        times = np.round(np.arange(40) / rate, digits)
        seen = set()
        for seed in range(100):
            got = pick(times, times[-1] + 1 / rate, 16, rate, generator=torch.Generator().manual_seed(seed))
            assert (np.diff(got) == 1).all()
            seen.add(int(got[0]))
        assert seen >= {0, 24} or len(seen) > 18 and max(seen) <= 24
    assert pick(times, 2, 16, 30)[0] == 0


def test_pick_shows_what_a_viewer_sees():
    """Variable frame rate: at each instant the frame that is on screen then, found by walking through the frames."""
    times = np.array([0, 0.1, 0.15, 0.9, 1.0, 1.75, 1.8, 2.4])
    for seed in range(20):
        got = pick(times, 2.5, 6, 4, generator=torch.Generator().manual_seed(seed))
        start = times[got[0]]
        for k, index in enumerate(got):
            on_screen = [i for i, t in enumerate(times) if t <= start + k / 4 + 0.002][-1]
            assert index == on_screen
        assert start + 5 / 4 < 2.5
    assert pick(times, 2.5, 6, 4).tolist() == [0, 2, 2, 2, 4, 4]


def test_pick_short_clips():
    times = np.arange(10) / 10                                       # one second
    assert pick(times, 1.0, 8, 8).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]          # 7/8 s: long enough
    assert pick(times, 1.0, 10, 1).tolist() == list(range(10))                  # 9 s: spread over what is there
    assert pick(times, 1.0, 4, 1).tolist() == [0, 3, 6, 9]
    assert pick(times, 1.0, 19, 10)[[0, -1]].tolist() == [0, 9]                 # 10 frames for 19: some twice
    for frames, fps, true_fps in ((8, 8, 8), (10, 1, 10), (4, 1, 3 / 0.9)):      # the rate that the frames really have
        assert video.pick(times, 1.0, frames, fps)[1] == pytest.approx(true_fps)


@pytest.mark.parametrize("kind", ["mp4", "bframes", "open-gop", "webm", "vfr"])
def test_read_video_returns_the_frames_of_those_instants(kind, tmp_path):
    """From every start, across key frames: what is decoded after seeking is what decoding everything would give."""
    ms = [round(t * 1000 / 30) for t in range(40)]
    if kind == "vfr":
        ms = np.cumsum(np.random.default_rng(0).integers(1, 6, 40) * 20).tolist()
    options = {"bframes": {"g": "12", "bf": "3"}, "open-gop": {"x264-params": "open-gop=1:keyint=8:bframes=3"}}
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


def test_read_video_bytes_decode_only_what_is_needed(mp4, monkeypatch):
    decoded, decode = [], video.decode
    monkeypatch.setattr(video, "decode", lambda *a: (decoded.append(frame.pts) or frame for frame in decode(*a)))
    with video.open_video(mp4) as (container, stream):
        ticks, _, keys = video.timeline(container, stream)
    keys = np.searchsorted(ticks, sorted(keys))
    assert len(keys) > 5
    for seed in range(5):
        decoded.clear()
        got = numbers(read_video(mp4, 3, 15, 32, 48, generator=torch.Generator().manual_seed(seed)))
        assert got == [got[0], got[0] + 2, got[0] + 4]
        assert decoded == ticks[max(keys[keys <= got[0]]):got[2] + 1].tolist()


def test_same_generator_same_clip(mp4):
    a, b, c = (read_video(mp4, 4, 8, 16, 24, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_phone_clips_are_turned_upright(tmp_path):
    """A file of 48x32 pixels with the matrix of a quarter turn clockwise is shown as 32x48."""
    clip = torch.zeros(3, 3, 32, 48, dtype=torch.uint8)
    clip[0, :, :, :24] = 250                                         # left half red: on top when turned clockwise
    write_video(tmp_path / "a.mp4", clip, 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    content[matrix:matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    turned = read_clip(tmp_path / "a.mp4")
    assert turned.shape == (3, 3, 48, 32)
    assert turned[0, :, :20].min() > 200 and turned[0, :, 28:].max() < 50


@pytest.mark.parametrize("H, W, height, width", [(36, 64, 16, 24), (64, 36, 16, 24), (45, 51, 16, 24), (9, 13, 16, 24)])
def test_resize_crop_against_pillow(H, W, height, width):
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


def test_resize_crop_keeps_what_already_fits_and_averages_stripes():
    x = torch.randint(0, 256, (3, 16, 30)).to(torch.uint8)
    assert torch.equal(resize_crop(x, 16, 24), x[:, :, 3:27])
    stripes = (torch.arange(64) % 2 * 200).to(torch.uint8).expand(3, 64, 64)      # without antialiasing: 0 or 200
    assert (resize_crop(stripes, 16, 16)[:, :, 2:-2].int() - 100).abs().max() < 12


# ---- whole clips ----


@pytest.fixture(scope="module")
def smooth_clip() -> torch.Tensor:
    x = torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(x[None], (9, 32, 48), mode="trilinear")[0] * 255).to(torch.uint8)


@pytest.mark.parametrize("name, tolerance", [("a.mp4", 4), ("a.gif", 8), ("a.png", 0), ("a", 0), ("a.safetensors", 0)])
def test_write_and_read_again(name, tolerance, smooth_clip, tmp_path):
    path = tmp_path / "new folder" / name
    write_video(path, torch.cat([smooth_clip, smooth_clip], 1), 8)   # a longer one first: nothing of it may be left
    write_video(path, smooth_clip, 8)
    got = read_clip(path)
    assert got.shape == smooth_clip.shape and got.dtype == torch.uint8
    assert (got.int() - smooth_clip.int()).abs().float().mean() <= tolerance
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
    for name in ("still.gif", "still.mp4"):                          # equal frames are not merged into one
        write_video(tmp_path / name, smooth_clip[:, :1].expand(3, 9, 32, 48), 8)
        assert read_clip(tmp_path / name).shape == (3, 9, 32, 48)


def test_written_times(smooth_clip, tmp_path):
    for name, fps, want in (("a.mp4", 8, 9 / 8), ("a.mp4", 29.97, 9 / 29.97), ("a.gif", 8, 1.13)):
        write_video(tmp_path / name, smooth_clip, fps)
        with video.open_video(tmp_path / name) as (container, stream):
            ticks, end, _ = video.timeline(container, stream)
        assert end * float(stream.time_base) == pytest.approx(want, abs=0.011 if name == "a.gif" else 1e-3)
    assert read_video(tmp_path / "a.gif", 4, 8, 32, 48).shape == (3, 4, 32, 48)


def test_odd_sizes_become_even_in_mp4_only(smooth_clip, tmp_path):
    odd = smooth_clip[:, :, :31, :47]
    for name, size in (("a.mp4", (32, 48)), ("a.gif", (31, 47)), ("a.png", (31, 47))):
        write_video(tmp_path / name, odd, 8)
        got = read_clip(tmp_path / name)
        assert got.shape == (3, 9, *size)
        assert (got[:, :, :31, :47].int() - odd.int()).abs().float().mean() < 8


def test_pngs_in_the_order_of_their_numbers(tmp_path):
    for t in (10, 9, 2):
        Image.new("L", (4, 4), t).save(tmp_path / f"{t}.png")        # grey ones are read as RGB
    assert read_clip(tmp_path)[0, :, 0, 0].tolist() == [2, 9, 10]


def test_clip_errors(smooth_clip, tmp_path):
    with pytest.raises(ValueError, match=r"choose .mp4, .gif"):
        write_video(tmp_path / "a.xyz", smooth_clip, 8)
    with pytest.raises(ValueError, match=r"uint8 \(3, T, H, W\); this one is torch.float32"):
        write_video(tmp_path / "a.mp4", smooth_clip.float(), 8)
    with pytest.raises(ValueError, match="missing.mp4.*No such file"):
        read_clip(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="not a clip"):
        read_clip(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="expected a tensor named clip"):
        read_clip(tmp_path / "bad.safetensors")


WRITE = """
import os, sys, torch
from plumbing.video import write_video
t, y, x = torch.meshgrid(torch.arange(40), torch.arange(64), torch.arange(64), indexing="ij")
noise = torch.randint(0, 40, (3, 40, 64, 64), generator=torch.Generator().manual_seed(0))
clip = (((3 * x + 5 * y + 7 * t) % 200)[None] + noise).to(torch.uint8)
cores = os.sched_getaffinity(0)
for k in range(4):
    os.sched_setaffinity(0, list(cores)[:1 if k % 2 else None])
    for name in ("mp4", "gif"):
        write_video(f"{sys.argv[1]}/{k}.{name}", clip, 8)
"""


def test_the_same_clip_is_the_same_file_on_one_core_and_on_all(tmp_path):
    """x264's macroblock tree made other pixels in every third run, and its threads other ones per number of cores."""
    for process in ("1", "2"):
        subprocess.run([sys.executable, "-c", WRITE, tmp_path / process], check=True, env=CHILD)
    for suffix in ("mp4", "gif"):
        files = {path.read_bytes() for path in tmp_path.glob(f"*/*.{suffix}")}
        assert len(files) == 1 and len(list(tmp_path.glob(f"*/*.{suffix}"))) == 8


def test_gif_keeps_every_frame_and_its_colours(tmp_path):
    """Slow fades are where palettes merge frames; up to 256 colours are kept exactly."""
    fade = torch.arange(16, dtype=torch.uint8).view(1, 16, 1, 1).expand(3, 16, 8, 8).contiguous()
    write_video(tmp_path / "a.gif", fade, 8)
    assert torch.equal(read_clip(tmp_path / "a.gif"), fade)


def test_output_is_checked_before_there_is_a_clip(smooth_clip, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for name, fps, message in (("a.webm", 8, "a.webm: choose .mp4, .gif, .png"), ("a.jpg", 8, "a.jpg: choose"),
                               ("a.mp4", 10000, r"fps 10000 for .*a.mp4: choose from 0.1 to 240"),
                               ("a.mp4", 0, "fps 0 for"), ("a.mp4", float("nan"), "fps nan for"),
                               ("a.gif", 60, "a gif has 50 at most; write .mp4"), ("folder.mp4", 8, "is a folder")):
        with pytest.raises(ValueError, match=message):
            video.check_output(tmp_path / name, fps)
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / name, smooth_clip, fps)
    for name in ("a.MP4", "a.Gif", "a.SafeTensors", "a.PNG"):
        write_video(tmp_path / name, smooth_clip, 8)
        assert read_clip(tmp_path / name).shape == smooth_clip.shape


@pytest.mark.parametrize("fps", [0.1, 0.3, 29.97, 240])
def test_every_fps_that_may_be_written_is_read(fps, smooth_clip, tmp_path):
    write_video(tmp_path / "a.mp4", smooth_clip, fps)
    clip, rate = video.read_video(tmp_path / "a.mp4", 9, fps, 32, 48)
    assert rate == fps and (clip.int() - read_clip(tmp_path / "a.mp4").int()).abs().max() <= 1


def test_unreadable_clips_are_named_with_the_reason(smooth_clip, tmp_path, monkeypatch):
    write_video(tmp_path / "a", smooth_clip, 8)
    (tmp_path / "a" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a: not a clip \(0003.png is not a readable picture\)"):
        read_clip(tmp_path / "a")
    Image.new("RGB", (5, 5)).save(tmp_path / "a" / "0003.png")
    with pytest.raises(ValueError, match=r"0003.png is 5x5, those before it 32x48"):
        read_clip(tmp_path / "a")
    save_file({"clip": torch.zeros(3, 2, 4, 4)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"f.safetensors: not a clip .its clip is torch.float32"):
        read_clip(tmp_path / "f.safetensors")
    write_video(tmp_path / "a.mp4", smooth_clip, 8)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(ValueError, match=r"a.mp4: not a clip \(Permission denied\)"):
        read_clip(tmp_path / "a.mp4")


# ---- files ----


def test_atomic_follows_the_umask_and_takes_long_names(tmp_path):
    before = os.umask(0o027)
    try:
        for name in ("a.safetensors", "\u00e9" * 120 + ".safetensors"):      # 252 bytes, where 255 are allowed
            with atomic(tmp_path / "new" / name) as temporary:
                save_file({"x": torch.zeros(1)}, temporary)
            assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_atomic_says_which_file_and_why(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in ((tmp_path / "file" / "a", "file/a cannot be written: (File exists|Not a directory)"),
                         (tmp_path / "folder", "folder cannot be written: it is a folder")):
        with pytest.raises(ValueError, match=reason), atomic(path):
            raise AssertionError("the block must not run")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:                                                             # as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, limit[1]))
        with pytest.raises(ValueError, match="a.safetensors cannot be written: .*too large"):
            with atomic(tmp_path / "a.safetensors") as temporary:
                save_file({"x": torch.zeros(99999)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_leftovers_of_killed_processes_are_removed_and_no_others(tmp_path):
    code = ("import os, signal, sys; from plumbing.files import atomic\n"
            "with atomic(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], env=CHILD)
    assert len(list(tmp_path.glob(".a.bin.*.part"))) == 1
    with atomic(tmp_path / "mine") as temporary:
        temporary.write_text("x")
        theirs = tmp_path / ".b.other-host.99999999.0.part"          # of a process that may be alive elsewhere
        theirs.mkdir()
        for path in (tmp_path / ".hidden.part", tmp_path / "data.part"):
            path.write_text("x")
        remove_leftovers(tmp_path)
        assert not list(tmp_path.glob(".a.bin.*")) and temporary.exists() and theirs.exists()
        os.utime(theirs, (time.time() - 4000,) * 2)
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".hidden.part", "data.part"}


def test_atomic_leaves_nothing_of_a_failure(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


# ---- sources ----


@pytest.fixture
def sources(mp4, tmp_path) -> dict[str, str]:
    """The same three clips as a folder, two manifests and two shards."""
    folder = tmp_path / "clips" / "sub"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.mp4").write_bytes(mp4)
        (folder / f"{k}.txt").write_text(f" caption {k}, \u00e9\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("path,caption,reward_caption\n" + "".join(
        f'clips/sub/{k}.mp4,"caption {k}, \u00e9",{"short" if k == 1 else ""}\n' for k in range(3)), encoding="utf-8")
    rows = [dict(path=f"clips/sub/{k}.mp4", caption=f"caption {k}, \u00e9") for k in range(3)]
    rows[1]["reward_caption"] = "short"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    texts = [f"caption {k}, \u00e9".encode() for k in range(3)]
    long_name = "folder/" * 20 + "k2"                                # needs a header of its own in the tar
    tar_of(tmp_path / "s-08.tar", [("0.mp4", mp4), ("0.txt", texts[0]), ("._0.mp4", b"x"), ("1.txt", texts[1]),
                                   ("1.json", b'{"reward_caption": "short", "caption": "not this"}'), ("1.mp4", mp4)])
    tar_of(tmp_path / "s-09.tar", [(long_name + ".mp4", mp4), ("notes/readme.md", b"hello"),
                                   (long_name + ".json", json.dumps({"caption": "caption 2, \u00e9"}).encode())])
    return dict(folder=str(folder.parent), csv=str(tmp_path / "a.csv"), jsonl=str(tmp_path / "a.jsonl"),
                tar=str(tmp_path / "s-{08..09}.tar"))


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "tar"])
def test_every_source_gives_the_same_clips(kind, sources, mp4):
    dataset = open_dataset(sources[kind], **SHAPE)
    assert len(dataset) == 3
    for k in range(3):
        item = dataset.get(k, torch.Generator().manual_seed(k))
        assert item["index"] == k and item["caption"] == f"caption {k}, \u00e9"
        assert item["reward_caption"] == ("short" if k == 1 and kind != "folder" else None)
        assert torch.equal(item["clip"], read_video(mp4, 4, 8, 16, 24, generator=torch.Generator().manual_seed(k)))


def test_sources_joined(sources):
    for spec in (",".join(sources.values()), list(sources.values())):
        dataset = open_dataset(spec, **SHAPE)
        assert len(dataset) == 12
        assert [dataset.get(k)["caption"][8] for k in range(12)] == list("012" * 4)


def test_brace_patterns():
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{0..1}/{x,y}") == ["0/x", "0/y", "1/x", "1/y"]
    assert len(expand("/data/webvid/{00000..09999}.tar")) == 10000
    assert expand("plain.tar") == ["plain.tar"]
    with pytest.raises(ValueError, match=r"runs backwards; write \{1..3\}"):
        expand("{3..1}.tar")


def test_a_users_mistakes(tmp_path):
    for spec, message in ((tmp_path, r"no clips in .*: expected \*.mp4 with .txt beside them, e.g. 0001.mp4"),
                          (tmp_path / "nowhere", "no data at .*nowhere: expected a folder"),
                          (tmp_path / "{0..2}.tar", "3 of 3 shards are not there, e.g. .*0.tar")):
        with pytest.raises(ValueError, match=message):
            open_dataset(str(spec))
    for name, content, message in (("a.csv", "file,text\na.mp4,hello\n", "no row has both.*expected path,caption"),
                                   ("b.jsonl", '{"path": "a.mp4", "caption": "a"}\n{"pa', 'line 2: .*expected {"path"'),
                                   ("c.jsonl", "[1, 2]\n", 'line 1: .*expected {"path"'), ("d.csv", "", "no row")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_dataset(str(tmp_path / name))
    tar_of(tmp_path / "00.tar", [("readme", b"hello")])
    with pytest.raises(ValueError, match="a shard has members KEY.mp4"):
        open_dataset(str(tmp_path / "00.tar"))
    with pytest.raises(ValueError, match=r"no clips in .*for its shards write '.*\{00..00\}.tar'"):
        open_dataset(str(tmp_path))


def texts(dataset) -> list:
    """What get() says about each clip: its caption, or (name, reason) of a bad one."""
    def text(i):
        try:
            item = dataset.get(i)
            return item["caption"], item["reward_caption"]
        except BadClip as error:
            return f"BAD {error.name}: {error.reason}"

    return [text(i) for i in range(len(dataset))]


@pytest.fixture
def here(mp4, tmp_path, monkeypatch):
    """A folder with four clips a.mp4 to d.mp4, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(mp4)
    return tmp_path


def test_csv_rows_that_lose_words_are_bad_and_named(here):
    (here / "a.csv").write_text("path,caption,reward_caption\na.mp4,a dog, running, fast\nb.mp4,\"a dog, running\",\n"
                                "c.mp4,\"say \"hi\" now\",x\n\nd.mp4\n,lonely,\n")
    assert texts(open_dataset("a.csv", **SHAPE)) == [
        'BAD a.mp4: line 2 of a.csv: 4 fields for 3 columns; quote a caption with commas: "one, two"',
        ("a dog, running", None), "BAD : line 4 of a.csv: ',' expected after '\"'", "BAD d.mp4: empty caption",
        "BAD : line 7 of a.csv: no path"]


@pytest.mark.parametrize("rows", [
    'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,a cow\n', 'a.mp4,"a dog\nb.mp4,"a cat"\nc.mp4,a cow\n',
    'a.mp4,"a dog\nb.mp4,a cat"\nc.mp4,a cow\n', 'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,"a cow"\n'])
def test_csv_quotes_that_swallow_rows(rows, here):
    (here / "a.csv").write_text("path,caption\nd.mp4,first\n" + rows)
    with pytest.raises(ValueError, match="^a.csv, line 3: a quote that is not closed in its row swallows the rows"):
        open_dataset("a.csv", **SHAPE)


def test_long_captions_line_breaks_byte_order_marks_and_latin(here):
    long = "word " * 40000                                           # csv's own limit is 128 kB
    (here / "a.csv").write_text(f'path,caption\na.mp4,{long}\nb.mp4,"two\nlines"\n\ufeffc.mp4,\ufeff a cow\n',
                                encoding="utf-8-sig")
    with open(here / "a.csv", "ab") as file:
        file.write(b"d.mp4,caf\xe9\n")
    limit = csv.field_size_limit()
    first, second, third, fourth = texts(open_dataset("a.csv", **SHAPE))
    assert csv.field_size_limit() == limit
    assert first == (long.strip(), None) and second == ("two\nlines", None) and third == ("a cow", None)
    assert fourth == "BAD d.mp4: its caption is not utf-8"
    (here / "a.csv").unlink()
    (here / "a.txt").write_text("a dog", encoding="utf-8-sig")
    assert texts(open_dataset(str(here), **SHAPE))[0] == ("a dog", None)


def test_captions_that_are_no_strings(here, mp4):
    rows = [dict(path="a.mp4", caption="a", reward_caption=["a"]), dict(path="b.mp4", caption=7),
            dict(path=["c.mp4"], caption="c"), dict(path="d.mp4", caption="d", reward_caption="")]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(open_dataset("a.jsonl", **SHAPE)) == [
        "BAD a.mp4: its reward caption is not a string: ['a']", "BAD b.mp4: its caption is not a string: 7",
        "BAD : line 3 of a.jsonl: no path", ("d", None)]
    tar_of(here / "a.tar", [("a.mp4", mp4), ("a.txt", b"\xef\xbb\xbfa"), ("a.json", b'{"reward_caption": {"a": 1}}'),
                            ("b.mp4", mp4), ("b.json", b"[" * 100000)])
    got = texts(open_dataset("a.tar", **SHAPE))
    assert got[0] == "BAD a.tar:a.mp4: its reward caption is not a string: {'a': 1}"
    assert got[1].startswith("BAD a.tar:b.mp4: ")                    # deeper than Python's stack


def test_what_a_folder_holds_besides_clips_is_counted_once(here):
    (here / "sub").mkdir()
    for name in ("x.avi", "sub/y.AVI", "z.wmv", "README", ".hidden", "a.txt"):
        (here / name).write_text("x")
    (here / "sub" / "back").symlink_to(here)                         # a circle
    with pytest.warns(UserWarning, match=r"files not read: 2 .avi, 1 .wmv, 1 without a suffix; clips are .mp4") as got:
        assert len(open_dataset(str(here), **SHAPE)) == 4
    assert len(got) == 1


def test_sources_that_cannot_be_read_say_why(here, monkeypatch):
    for spec in ("gone.csv", "gone.jsonl"):
        with pytest.raises(ValueError, match=f"no data at {spec}: expected a folder"):
            open_dataset(spec)
    with pytest.raises(ValueError, match="a.mp4 is no data: expected a folder"):
        open_dataset("a.mp4")
    (here / "folder.csv").mkdir()
    (here / "folder.tar").mkdir()
    for spec in ("folder.csv", "folder.tar"):
        with pytest.raises(ValueError, match=f"^{spec} cannot be read: Is a directory$"):
            open_dataset(spec)
    with pytest.raises(ValueError, match="is more than 1000000 shards"):
        expand("{0..10000000000}.tar")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "a.csv")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match="^a.csv cannot be read: Permission denied$"):
        open_dataset("a.csv")


def test_keys_of_shard_members(here, mp4):
    """The last dot where a pair is named so; else the first, as WebDataset has it; a key that stands twice."""
    tar_of(here / "a.tar", [("a.v2.mp4", mp4), ("a.v2.txt", b"one"), ("b.480p.mp4", mp4), ("b.txt", b"two"),
                            ("c.mp4", mp4), ("c.txt", b"three"), ("c.more.txt", b"not this"), ("c.more.json", b"{}"),
                            ("d.mp4", mp4), ("d.txt", b"four"), ("d.mp4", mp4), ("d.txt", b"five"),
                            ("e.1.txt", b"alone"), ("stats.json", b"{}")])
    assert texts(open_dataset("a.tar", **SHAPE)) == [
        ("one", None), ("two", None), ("three", None), ("four", None), ("five", None),
        "BAD a.tar:e.1.txt: no video beside this caption"]


def test_tars_joined_by_cat(here, mp4):
    paths = [tar_of(here / f"{k}.tar", [(f"{k}.mp4", mp4), (f"{k}.txt", str(k).encode())]) for k in range(3)]
    contents = [Path(path).read_bytes() for path in paths]
    (here / "all.tar").write_bytes(b"".join(contents))
    assert texts(open_dataset("all.tar", **SHAPE)) == [("0", None), ("1", None), ("2", None)]
    (here / "cut.tar").write_bytes(contents[0] + contents[1][:3000])
    assert texts(open_dataset("cut.tar", **SHAPE)) == [
        ("0", None), f"BAD cut.tar: damaged tar from byte {len(contents[0])} on"]
    (here / "zeros.tar").write_bytes(contents[0] + bytes(3 << 20))
    assert texts(open_dataset("zeros.tar", **SHAPE)) == [("0", None)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_bad_members_are_named_in_full(form, here):
    names = ["f\u00e9lix/\u732b.mp4", "/".join(["folder"] * 18) + "/clip.mp4", "x" * 90 + ".mp4"]
    if form != tarfile.USTAR_FORMAT:
        names.append("\u00e9" * 150 + ".mp4")
    with tarfile.open(here / "a.tar", "w", format=form) as tar:
        for name in names:
            for member in (name, name[:-3] + "txt"):
                info = tarfile.TarInfo(member)
                info.size = 5
                tar.addfile(info, BytesIO(b"words"))
    dataset = open_dataset("a.tar", **SHAPE)
    assert [dataset.name(i) for i in range(len(dataset))] == [f"a.tar:{name}" for name in names]


def test_names_of_bad_members_stay_on_one_line(here):
    tar_of(here / "a.tar", [("a\nb\x1b[31m\udcff.mp4", b"x"), ("a\nb\x1b[31m\udcff.txt", b"x")])
    assert texts(open_dataset("a.tar", **SHAPE))[0].startswith("BAD a.tar:a\ufffdb\ufffd[31m\ufffd.mp4: not a readable")


# ---- index of shards ----


def test_index_is_kept_and_made_anew_when_the_shard_changes(sources, tmp_path, monkeypatch, mp4):
    scans, scan = [], tars.scan
    monkeypatch.setattr(tars, "scan", lambda *a: scans.append(a[0]) or scan(*a))
    first = open_dataset(sources["tar"], **SHAPE)
    assert len(scans) == 2 and (tmp_path / "s-08.tar.index").exists()
    again = open_dataset(sources["tar"], **SHAPE)
    assert len(scans) == 2 and np.array_equal(first.sources[0].rows, again.sources[0].rows)
    tar_of(tmp_path / "s-09.tar", [("x.mp4", mp4), ("x.txt", b"new"), ("y.mp4", mp4), ("y.txt", b"newer")])   # its size
    assert len(open_dataset(sources["tar"], **SHAPE)) == 4 and len(scans) == 3
    os.utime(tmp_path / "s-09.tar", (1, 1))                                                                  # its time
    (tmp_path / "s-08.tar.index").write_bytes(b"")                                                       # damage
    assert open_dataset(sources["tar"], **SHAPE).get(3)["caption"] == "newer" and len(scans) == 5
    assert not list(tmp_path.glob(".*"))


def test_index_in_the_cache_folder_where_the_shards_are_not_writable(sources, tmp_path, monkeypatch):
    for name in ("s-08", "s-09"):                                    # root may write anywhere, but not over a folder
        (tmp_path / f"{name}.tar.index").mkdir()
    with pytest.warns(UserWarning, match="is not writable: name a cache folder"):
        assert len(open_dataset(sources["tar"], **SHAPE)) == 3
    cache = tmp_path / "cache"
    assert len(open_dataset(sources["tar"], **SHAPE, cache=str(cache))) == 3
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(tars, "scan", None)
    assert open_dataset(sources["tar"], **SHAPE, cache=str(cache)).get(1)["reward_caption"] == "short"


def test_a_stale_index_with_the_right_stamp(here, mp4):
    """Another shard of the same size and time: seen at the start, or else when a changed clip is read."""
    def write(middle):
        tar_of(here / "a.tar", [("a.mp4", mp4), ("a.txt", b"a"), *middle, ("d.mp4", mp4), ("d.txt", b"d")])
        os.utime(here / "a.tar", (1, 1))

    write([("b.mp4", mp4), ("b.txt", b"b" * 20)])
    assert len(open_dataset("a.tar", **SHAPE)) == 3
    write([("b.txt", b"c" * 20), ("b.mp4", mp4)])                    # its middle in another order
    dataset = open_dataset("a.tar", **SHAPE)
    got = texts(dataset)
    assert got[0] == ("a", None) and got[2] == ("d", None)
    assert got[1].endswith("its shard is another one than was indexed: delete the shard's .index")
    tar_of(here / "a.tar", [("a.txt", b"a"), ("a.mp4", mp4), ("b.txt", b"b" * 20), ("b.mp4", mp4), ("c.txt", b"c"),
                            ("c.mp4", mp4)])
    os.utime(here / "a.tar", (1, 1))
    assert texts(open_dataset("a.tar", **SHAPE)) == [("a", None), ("b" * 20, None), ("c", None)]


def test_a_damaged_index_is_made_again(here, mp4):
    path = tar_of(here / "a.tar", [(f"{name}.{kind}", mp4) for name in "abc" for kind in ("mp4", "txt")])
    rows, index = open_dataset(path, **SHAPE).sources[0].rows, here / "a.tar.index"
    whole, rng = index.read_bytes(), np.random.default_rng(0)
    for k in range(60):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        index.write_bytes(content[:rng.integers(len(content))] if k % 2 else content)
        assert np.array_equal(open_dataset(path, **SHAPE).sources[0].rows, rows)
        assert index.read_bytes() == whole


# ---- order ----


class Numbers:
    """A dataset from a function: the clip tells its index and what its generator drew; some indices are bad."""

    def __init__(self, n: int, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def get(self, index, generator):
        if index in self.bad:
            raise BadClip(f"clip {index}", "it is bad")
        draw = torch.randint(256, (), generator=generator)
        return dict(clip=torch.stack([torch.tensor(index), draw]), caption=str(index), reward_caption=None, index=index)


def take(dataset, steps: int, batch: int, **options) -> list[dict]:
    return list(itertools.islice(loader(dataset, batch, **options), steps))


def test_epochs_are_permutations_and_differ():
    got = torch.cat([out["index"] for out in take(Numbers(10), 6, 5, seed=3)]).view(3, 10)
    for epoch in got:
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(got[0], got[1]) and not torch.equal(got[1], got[2])
    other = torch.cat([out["index"] for out in take(Numbers(10), 2, 5, seed=4)])
    assert not torch.equal(other, got[0])


@pytest.mark.parametrize("bad", [(), (2, 9)])
def test_the_global_batch_is_the_same_on_1_2_3_ranks(bad):
    """7 steps of 12 clips over 11: across epochs, with substitutes of bad clips, for any number of workers."""
    def run(world, workers=0):
        ranks = [take(Numbers(11, bad), 7, 12 // world, rank=r, world=world, workers=workers) for r in range(world)]
        return [torch.cat([rank[n][key] for rank in ranks]) for n in range(7) for key in ("clip", "index", "position")]

    want = run(1)
    assert torch.cat(want[2::3]).tolist() == list(range(84))
    for world, workers in ((2, 0), (3, 0), (2, 2)):
        for a, b in zip(want, run(world, workers), strict=True):
            assert torch.equal(a, b)
    assert not set(bad) & set(torch.cat(want[1::3]).tolist())
    clean = torch.cat([out["index"] for out in take(Numbers(11), 7, 12)])
    got = torch.cat(want[1::3])
    assert ((got == clean) | torch.isin(clean, torch.tensor(bad or [-1]))).all()        # only the bad ones are replaced


def test_resume_goes_on_with_the_very_next_clip():
    whole = take(Numbers(11, [4]), 9, 3, rank=1, world=2, seed=5)
    parts = [take(Numbers(11, [4]), k, 3, rank=1, world=2, seed=5, start_step=n) for n, k in ((0, 4), (4, 3), (7, 2))]
    for a, b in zip(whole, sum(parts, []), strict=True):
        assert torch.equal(a["clip"], b["clip"]) and a["caption"] == b["caption"]


def test_loader_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(Numbers(5), 3, 2, workers=2)
    take(Numbers(5), 3, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_real_clips_through_workers(sources):
    dataset = open_dataset([sources["tar"], sources["folder"]], **SHAPE)
    for a, b in zip(take(dataset, 4, 2, seed=1), take(dataset, 4, 2, seed=1, workers=2), strict=True):
        assert a["clip"].shape == (2, 3, 4, 16, 24) and torch.equal(a["clip"], b["clip"])
        assert a["caption"] == b["caption"] and a["reward_caption"] == b["reward_caption"]


def test_epochs_start_clips_at_different_frames(sources):
    dataset = open_dataset(sources["folder"], **SHAPE)
    starts = {(int(out["index"]), numbers(out["clip"][0])[0]) for out in take(dataset, 12, 1)}
    assert len(starts) > 6


def test_a_short_clip_says_at_what_rate_it_is_played(mp4, here):
    """60 frames at 30 fps: 1.97 s from the first to the last. 16 frames at 4 fps span 3.75 s, so they are faster."""
    for name in "abcd":
        (here / f"{name}.txt").write_text(name)
    for fps, want in ((16, 16), (4, 15 / (59 / 30))):
        out, = take(open_dataset(str(here), frames=16, fps=fps, height=16, width=24), 1, 4)
        assert out["fps"].tolist() == pytest.approx([want] * 4, rel=1e-3)


# ---- bad clips ----


@pytest.fixture
def bad_folder(mp4, tmp_path) -> str:
    """Every kind of bad file, and 40 good ones."""
    folder = tmp_path / "clips"
    folder.mkdir()
    half, noise = len(mp4) // 2, bytearray(mp4)
    for at in range(mp4.index(b"mdat") + 800, len(mp4) - 20, 40):
        noise[at:at + 20] = os.urandom(20)
    files = dict(codec=mp4.replace(b"avc1", b"zzzz"), corrupt=bytes(noise), truncated=mp4[:half], cut=mp4[:mp4.index(b"mdat") + 4], empty=b"",
                 junk=b"x" * 999, no_caption=mp4, blank_caption=mp4, latin=mp4)
    for name, content in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "no_caption.txt").unlink()
    (folder / "blank_caption.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    write_sound(folder / "sound.mp4")
    write_at(folder / "still.mp4", [0])
    write_at(folder / "vfr.mp4", [0, 500, 510, 900, 1300], {"g": "2"})
    write_at(folder / "odd.mp4", [0, 100, 200, 300, 400, 500], size=(31, 45))
    for name in ("sound", "still", "vfr", "odd"):
        (folder / f"{name}.txt").write_text("a caption")
    for k in range(40):
        (folder / f"good{k:02d}.mp4").write_bytes(mp4)
        (folder / f"good{k:02d}.txt").write_text("a caption")
    return str(folder)


REASONS = dict(codec="its codec is not known here; convert it to h264", corrupt="damaged|not a readable video", truncated="truncated", cut="truncated|not a clip|readable",
               empty="not a readable video", junk="not a readable video", sound="no video stream",
               no_caption="no caption", blank_caption="empty caption", latin="utf-8", still="not a clip: 1 frames")


def test_bad_files_are_skipped_counted_and_named(bad_folder, tmp_path):
    log = tmp_path / "bad.jsonl"
    dataset = open_dataset(bad_folder, **SHAPE)
    names = [os.path.basename(dataset.sources[0].name(i))[:-4] for i in range(len(dataset))]
    outs = []
    with pytest.raises(ValueError, match=r"too many bad clips: 20 of the last .* \(the limit is 5%\).*see .*bad.jsonl"):
        for out in loader(dataset, 4, bad_file=log):
            outs.append(out)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        name = os.path.basename(row["clip"])[:-4]
        assert names[row["index"]] == name
        assert re.search(REASONS[name], row["reason"]), row
    assert {names[row["index"]] for row in rows} == set(REASONS)     # an epoch meets each of them
    good = {names[i] for out in outs for i in out["index"].tolist()}
    assert {"vfr", "odd"} < good and not good & set(REASONS)
    assert outs[-1]["bad"] == sum(row["step"] < len(outs) for row in rows)


def test_a_title_that_is_not_utf8_is_no_reason(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "a dog named Rex"
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for pixels in counting_clip(8).permute(1, 2, 3, 0).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mkv").read_bytes()
    assert b"a dog" in content
    assert numbers(read_video(content.replace(b"a dog", b"\xe9\xff\xfe\xf9\xf8"), 3, 8, 32, 48)) == [0, 1, 2]


@pytest.mark.parametrize("name, want", [(n, w) for n, w in REASONS.items()])
def test_why_a_file_is_bad(name, want, bad_folder):
    dataset = open_dataset(bad_folder, **SHAPE)
    index = [os.path.basename(dataset.sources[0].name(i))[:-4] for i in range(len(dataset))].index(name)
    with pytest.raises(BadClip, match=want) as error:
        dataset.get(index)
    assert error.value.name.endswith(f"{name}.mp4")


def test_a_missing_file_of_a_manifest(mp4, tmp_path):
    (tmp_path / "a.csv").write_text("path,caption\ngone.mp4,a dog\n")
    with pytest.raises(BadClip, match="gone.mp4: .*No such file"):
        open_dataset(str(tmp_path / "a.csv"), **SHAPE).get(0)


def test_damage_between_the_key_frame_and_the_clip(mp4):
    """Frames predicted from a damaged one are wrong without being marked; nothing of that may pass as good."""
    good, passed = read_clip_bytes(mp4), 0
    for seed in range(12):
        noise, rng = bytearray(mp4), np.random.default_rng(seed)
        at = rng.integers(mp4.index(b"mdat") + 800, len(mp4) - 60)
        noise[at:at + 30] = rng.bytes(30)
        try:
            clip = read_video(bytes(noise), 16, 30, 32, 48, generator=torch.Generator().manual_seed(seed))
        except ValueError:
            continue
        passed += 1
        start = numbers(clip)[0]
        assert torch.equal(clip, good[:, start:start + 16])
    assert passed < 12


def read_clip_bytes(content: bytes) -> torch.Tensor:
    with video.open_video(content) as (container, stream):
        return torch.stack([video.pixels(frame) for frame in container.decode(stream)], 1)


def test_bad_shards(mp4, tmp_path):
    good = [("a.mp4", mp4), ("a.txt", b"a")]
    path = tar_of(tmp_path / "0.tar", good + [("b.txt", b"no video"), ("c.mp4", mp4), ("d.mp4", mp4),
                                              ("d.json", b"[1]"), ("e.mp4", mp4[:999]), ("e.txt", b"e")])
    dataset = open_dataset(path, **SHAPE)
    assert len(dataset) == 5 and dataset.get(0)["caption"] == "a"
    for index, message in ((1, "0.tar:b.txt: no video"), (2, "0.tar:c.mp4: no caption"), (3, "not an object"),
                           (4, "0.tar:e.mp4: not a readable video")):
        with pytest.raises(BadClip, match=message):
            dataset.get(index)
    content = (tmp_path / "0.tar").read_bytes()
    second = content.index(b"c.mp4")                                 # where the header of a later member begins
    kinds = {"cut": content[:second + 2000], "cut_header": content[:second + 100], "empty": b"", "junk": b"x" * 2000,
             "bad_header": content[:second + 148] + b"zzzzzzzz" + content[second + 156:]}
    for name, damaged in kinds.items():
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        dataset = open_dataset([path, str(tmp_path / f"{name}.tar")], **SHAPE)
        last = len(dataset) - 1
        assert last == 5 + (0 if name in ("empty", "junk") else 2)   # a and b of the damaged shard, then the damage
        where = 0 if name in ("empty", "junk") else second
        with pytest.raises(BadClip, match=f"{name}.tar: damaged tar from byte {where} on"):
            dataset.get(last)
        if where:
            assert dataset.get(5)["caption"] == "a"
    no_end = tmp_path / "no_end.tar"                                 # without the zeros at the end: allowed
    no_end.write_bytes(content.rstrip(bytes(1)).ljust(-(-len(content.rstrip(bytes(1))) // 512) * 512, b"\0"))
    assert len(open_dataset(str(no_end), **SHAPE)) == 5


def test_four_percent_go_on_and_six_percent_do_not(tmp_path):
    take(Numbers(1000, range(0, 1000, 30)), 300, 10)
    with pytest.raises(ValueError, match=r"too many bad clips: .* x it is bad; the last one is clip"):
        take(Numbers(1000, range(0, 1000, 16)), 300, 10)
    with pytest.raises(ValueError, match="40 of the last 40 "):      # all bad: at once, in workers too
        take(Numbers(5, range(5)), 1, 2, workers=1, bad_file=tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) >= 20
    with pytest.raises(ValueError, match="the dataset is empty"):
        loader(Numbers(0), 2)


def test_a_programming_error_is_not_a_bad_clip():
    class Broken(Numbers):
        def get(self, index, generator):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        take(Broken(3), 1, 1)


def test_many_processes_append_to_one_log(tmp_path):
    log = tmp_path / "bad.jsonl"
    rows = [dict(step=0, clip="x" * 500, reason="y" * 500)] * 200
    processes = [Process(target=data.append_rows, args=(log, rows)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows * 4


# ---- the cache ----

HEADER = dict(teacher="vc2", fingerprint="f00", grid=200, fps=8, size=[3, 5, 6], tau=0.5, clips=70, draws=2, seed=0)


def cached_sample(index: int, draw: int = 0) -> dict:
    """What a teacher would say: any tensors that are a function of (index, draw); no gradient below n = 100."""
    latents = torch.randn(4, 4, 3, 5, 6, generator=torch.Generator().manual_seed(2 * index + draw))
    n = (37 * index + draw) % 200
    return dict(z_t=latents[0], eps_c=latents[1].bfloat16(), eps_0=latents[2].half(),
                motion=latents[3] if n >= 100 else None, c=latents[0, 0, 0], index=index, draw=draw, n=n,
                caption=f"caption {index} \u00e9", reward_caption="short" if index % 5 == 0 else None,
                rewards=index % 5 == 0, source=f"a.tar:{index}.mp4", source_index=3 * index)


def prepare(folder, rank: int = 0, world: int = 1, header: dict = HEADER, wait: float = 0) -> CacheWriter:
    """Clips 7 and 40 cannot be used."""
    writer = CacheWriter(folder, header, rank, world)
    for index in writer.missing():
        if index in (7, 40):
            writer.skip(index, "it is bad")
            continue
        for draw in range(header["draws"]):
            writer.add(cached_sample(index, draw))
            time.sleep(wait)
    return writer


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder).finish()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cache_returns_what_was_added(whole_cache):
    cache = Cache(whole_cache, dict(teacher="vc2", grid=200, size=(3, 5, 6)))
    clips = [index for index in range(70) if index not in (7, 40)]
    assert len(cache) == 2 * len(clips) and cache.skipped == {7: "it is bad", 40: "it is bad"}
    for place, index in enumerate(clips):
        for draw in range(2):
            got, want = cache.get(2 * place + draw), cached_sample(index, draw)
            assert got["guided"] == (want["motion"] is not None) == (want["n"] >= 100)
            want["motion"] = torch.zeros(4, 3, 5, 6) if want["motion"] is None else want["motion"]
            for name, value in want.items():
                if torch.is_tensor(value):
                    assert got[name].dtype == torch.float16 and torch.equal(got[name], value.half())
                else:
                    assert got[name] == value
    assert sorted(contents(whole_cache)) == [f"00000{k}.safetensors" for k in range(5)] + ["header.json", "index.json"]


def test_size_of_a_sample_at_512x320(tmp_path):
    """1.14 MB, 1.47 MB with a gradient: 24,000 clips, half of them guided, are 31 GB."""
    z, size = torch.zeros(4, 16, 40, 64), {}
    for motion in (None, z):
        writer = CacheWriter(tmp_path / str(motion is None), dict(clips=1, draws=1))
        writer.add(dict(z_t=z, eps_c=z, eps_0=z, motion=motion, c=torch.zeros(77, 1024), index=0, draw=0, rewards=True))
        file, = (tmp_path / str(motion is None)).glob("*.safetensors")
        size[motion is not None] = file.stat().st_size
    assert 0 < size[False] - 1_140_736 < 2000 and 0 < size[True] - 1_468_416 < 2000


def test_two_processes_make_the_files_of_one(whole_cache, tmp_path):
    """Also in another order, and after a half of it was made by three."""
    writers = [CacheWriter(tmp_path, HEADER, rank, 3) for rank in range(3)]
    assert sorted(clip for writer in writers for clip in writer.missing()) == list(range(70))
    prepare(tmp_path, 1, 3)
    for rank in (1, 0):
        writer = CacheWriter(tmp_path, HEADER, rank, 2)
        for index in reversed(writer.missing()):
            for draw in (1, 0):
                writer.skip(index, "it is bad") if index in (7, 40) else writer.add(cached_sample(index, draw))
    with pytest.raises(ValueError, match=f"the cache in {tmp_path} is not whole: go on with --prepare"):
        Cache(tmp_path)
    writer.finish()
    assert contents(tmp_path) == contents(whole_cache)


def test_preparing_killed_at_random_moments_equals_preparing_undisturbed(whole_cache, tmp_path):
    rng, kills = np.random.default_rng(0), 0
    while True:
        processes = [Process(target=prepare, args=(tmp_path, rank, 2), kwargs=dict(wait=0.002)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(0.05 + 0.15 * rng.random())
            kills += process.is_alive()
            process.kill()
            process.join()
        if all(process.exitcode == 0 for process in processes):
            break
    assert kills >= 3
    CacheWriter(tmp_path, HEADER).finish()
    assert contents(tmp_path) == contents(whole_cache)


def test_damaged_shards_are_found_and_made_again(whole_cache, tmp_path):
    for name, content in contents(whole_cache).items():
        (tmp_path / name).write_bytes(content)
    foreign = tmp_path.with_name("foreign")
    prepare(foreign, header=HEADER | dict(seed=1))
    flipped = bytearray((tmp_path / "000001.safetensors").read_bytes())
    flipped[-100] ^= 1
    (tmp_path / "000001.safetensors").write_bytes(flipped)
    cache = Cache(tmp_path)
    with pytest.raises(BadClip, match="000001.safetensors, sample .*: damaged: .* is not what was written"):
        for index in range(len(cache)):
            cache.get(index)

    (tmp_path / "000002.safetensors").write_bytes((tmp_path / "000002.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="000002.safetensors is missing or damaged: make it anew with --prepare"):
        Cache(tmp_path)
    (tmp_path / "000003.safetensors").write_bytes((foreign / "000003.safetensors").read_bytes())
    (tmp_path / "000004.safetensors").unlink()
    writer = CacheWriter(tmp_path, HEADER)
    assert writer.missing() == list(range(16, 70))
    with pytest.raises(ValueError, match="000002.safetensors is missing or damaged"):
        writer.finish()
    prepare(tmp_path).finish()
    assert contents(tmp_path) == contents(whole_cache)


def test_a_cache_of_something_else_is_refused_in_one_line(whole_cache, tmp_path):
    remedy = "choose another folder or those options$"
    for change in (dict(teacher="ms"), dict(grid=50), dict(size=[3, 5, 7]), dict(fingerprint="bad"), dict(clips=71)):
        name, value = next(iter(change.items()))
        message = rf"^the cache in .* was made with {name} = .*{re.escape(str(HEADER[name]))}.*, not .*: {remedy}"
        with pytest.raises(ValueError, match=message):
            CacheWriter(whole_cache, HEADER | change)
        with pytest.raises(ValueError, match=message):
            Cache(whole_cache, change)
    with pytest.raises(ValueError, match=f"was made with motion = None, not 0.05: {remedy}"):
        CacheWriter(whole_cache, HEADER | dict(motion=0.05))
    with pytest.raises(ValueError, match=f"no cache in {tmp_path}: make one with --prepare"):
        Cache(tmp_path)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(ValueError, match="header.json cannot be read"):
        Cache(tmp_path)


def test_values_that_float16_cannot_hold(tmp_path):
    writer = CacheWriter(tmp_path, HEADER | dict(clips=3, draws=1))
    for index, (name, value) in enumerate((("eps_c", 1e5), ("motion", float("nan")), ("z_t", 60000.0))):
        sample = cached_sample(index) | {name: torch.full((4, 3, 5, 6), value)}
        writer.add(sample)
    writer.finish()
    cache = Cache(tmp_path)
    assert len(cache) == 1 and cache.get(0)["index"] == 2
    assert cache.skipped == {0: "eps_c of draw 0 has values that are not finite in float16",
                             1: "motion of draw 0 has values that are not finite in float16"}
    writer = CacheWriter(tmp_path / "bad", HEADER)
    with pytest.raises(ValueError, match="too many clips cannot be used: 20 of 20 .*the last one is clip 19: nan"):
        for index in range(70):
            writer.skip(index, "nan")


def test_two_streams_of_a_cache_resume_by_the_step(whole_cache):
    """v2 Sec. 4: L_CD on all clips, rewards on the short-caption ones, or on disjoint sets."""
    cache = Cache(whole_cache)

    def streams(start, steps, all_clips=cache, **options):
        rewarded = loader(cache.where(rewards=True), 1, seed=1, start_step=start, **options)
        both = zip(loader(all_clips, 3, seed=0, start_step=start, **options), rewarded)
        return list(itertools.islice(both, steps))

    whole = streams(0, 60)
    for a, b in zip(whole, streams(0, 25) + streams(25, 35), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["z_t"], y["z_t"]) and x["caption"] == y["caption"] and x["z_t"].shape[1:] == (4, 3, 5, 6)
    assert all(b["rewards"].all() and b["reward_caption"] == ["short"] for _, b in whole)
    drawn = [(int(i), int(d)) for a, _ in whole for i, d in zip(a["index"], a["draw"])][:136]
    assert len(set(drawn)) == 136 == len(cache)                      # an epoch meets each sample once
    drawn = [(int(b["index"]), int(b["draw"])) for _, b in whole][:26]
    assert len(set(drawn)) == 26 == len(cache.where(rewards=True))
    assert not any(a["rewards"].any() for a, _ in streams(0, 9, cache.where(rewards=False)))
    for n in range(4):                                               # two processes share the global batch
        ranks = [list(itertools.islice(loader(cache, 3, r, 2), n + 1))[n] for r in range(2)]
        both = list(itertools.islice(loader(cache, 6), n + 1))[n]
        assert torch.equal(torch.cat([rank["z_t"] for rank in ranks]), both["z_t"])


def test_a_cache_without_rewards_says_so(tmp_path):
    writer = CacheWriter(tmp_path, HEADER | dict(clips=1, draws=1))
    writer.add(cached_sample(1) | dict(index=0))
    writer.finish()
    with pytest.raises(ValueError, match="no clip of .* carries rewards: --reward-data says which do"):
        Cache(tmp_path).where(rewards=True)


def test_fingerprint_tells_networks_apart():
    weights = {"a": torch.arange(1000.0).view(10, 100), "b": torch.zeros(()), "c": torch.zeros(0)}
    other = [{**weights, "b": torch.ones(())}, {"a": weights["a"], "d": weights["b"], "c": weights["c"]},
             {**weights, "a": weights["a"].view(100, 10)}, {**weights, "a": weights["a"] + 1}]
    assert data.fingerprint(dict(reversed(weights.items()))) == data.fingerprint(weights)
    assert len({data.fingerprint(w) for w in [weights, *other]}) == 5


def test_speed(mp4, capsys):
    start = time.perf_counter()
    for seed in range(10):
        read_video(mp4, 16, 16, 32, 48, generator=torch.Generator().manual_seed(seed))
    with capsys.disabled():
        print(f"\nread_video: {10 / (time.perf_counter() - start):.0f} clips/s of 16 frames at 48x32 "
              "(tests/bench_data.py: full size)")
