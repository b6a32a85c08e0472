"""Datasets of clips (data.py): sources and what is wrong with them, the index of shards, order, bad clips."""
import itertools
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import SHAPE, make_mp4, numbers, read_video, tar_of, write_at, write_sound

from data import BadClip, loader, open_dataset
from plumbing import shards
from plumbing.errors import UserError
from plumbing.manifests import expand


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return make_mp4(tmp_path_factory.mktemp("mp4"))


# ---- sources -----------------------------------------------------------------------------------------------

@pytest.fixture
def sources(mp4, tmp_path) -> dict[str, str]:
    """The same three clips as a folder, two manifests and two shards."""
    folder = tmp_path / "clips" / "sub"
    folder.mkdir(parents=True)
    captions = [f"caption {k}, \u00e9" for k in range(3)]
    for k, caption in enumerate(captions):
        (folder / f"{k}.mp4").write_bytes(mp4)
        (folder / f"{k}.txt").write_text(f" {caption}\n", encoding="utf-8")
    rows = [dict(path=f"clips/sub/{k}.mp4", caption=caption) for k, caption in enumerate(captions)]
    rows[1]["reward_caption"] = "short"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    lines = [f'{row["path"]},"{row["caption"]}",{row.get("reward_caption", "")}\n' for row in rows]
    (tmp_path / "a.csv").write_text("path,caption,reward_caption\n" + "".join(lines), encoding="utf-8")

    long_name = "folder/" * 20 + "k2"                                # needs a header of its own in the tar
    more = b'{"reward_caption": "short", "caption": "not this"}'
    tar_of(tmp_path / "s-08.tar", [("0.mp4", mp4), ("0.txt", captions[0].encode()), ("._0.mp4", b"x"),
                                   ("1.txt", captions[1].encode()), ("1.json", more), ("1.mp4", mp4)])
    tar_of(tmp_path / "s-09.tar", [(f"{long_name}.mp4", mp4), ("notes/.readme.md", b"hello"),
                                   (f"{long_name}.json", json.dumps({"caption": captions[2]}).encode())])
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
        assert torch.equal(item["clip"], read_video(mp4, 4, 8, 16, 24, torch.Generator().manual_seed(k)))


def test_brace_patterns():
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{0..1}/{x,y}") == ["0/x", "0/y", "1/x", "1/y"]
    assert expand("{0..1,7,more}.tar") == ["0.tar", "1.tar", "7.tar", "more.tar"]
    assert len(expand("/data/webvid/{00000..09999}.tar")) == 10000
    assert expand("plain.tar") == ["plain.tar"] and not expand("{3..1}.tar")


def test_a_users_mistakes(tmp_path):
    for spec, message in ((tmp_path, r"no clips in .*: expected files, or members of shards, KEY.mp4"),
                          (tmp_path / "{0..2}.tar", "no data at .*{0..2}.tar: expected a folder")):
        with pytest.raises(UserError, match=message):
            open_dataset(str(spec))
    for name, content, message in (
        ("b.jsonl", '{"path": "a.mp4", "caption": "a"}\n{"pa', "b.jsonl is not a manifest, or is damaged"),
        ("d.csv", "", "no clips in"),
        ("f.mp4", "x", "is no data, or a pipe or device: expected a folder"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            open_dataset(str(tmp_path / name))
    tar_of(tmp_path / "00.tar", [("readme", b"hello")])
    with pytest.raises(UserError, match="expected files, or members of shards, KEY.mp4"):
        open_dataset(str(tmp_path / "00.tar"))


def texts(dataset) -> list:
    """What get() says about each clip: its captions, or name and reason of a bad one."""
    answers = []
    for i in range(len(dataset)):
        try:
            item = dataset.get(i)
            answers.append((item["caption"], item["reward_caption"]))
        except BadClip as error:
            answers.append(f"BAD {error.name}: {error.reason}")
    return answers


@pytest.fixture
def here(mp4, tmp_path, monkeypatch):
    """A folder with four clips a.mp4 to d.mp4, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(mp4)
    return tmp_path


def test_csv_rows_that_lose_words_are_bad_and_named(here):
    (here / "a.csv").write_text('path,caption,reward_caption\na.mp4,a dog, running, fast\n'
                                'b.mp4,"a dog, running",\n\nd.mp4\n,lonely,\n')
    assert texts(open_dataset("a.csv", **SHAPE)) == [
        "BAD a.mp4: a caption is no text, or has commas and no quotation marks: ['a dog', 'fast']",
        ("a dog, running", None), "BAD d.mp4: no caption", "BAD : No such file, or a folder, pipe or device"]


def test_long_captions_line_breaks_byte_order_marks_and_latin(here):
    long = "word " * 20000
    (here / "a.csv").write_text(f'path,caption\na.mp4,{long}\nb.mp4,"two\nlines"\nc.mp4,\ufeff a cow\n',
                                encoding="utf-8-sig")
    with open(here / "a.csv", "ab") as file:
        file.write(b"d.mp4,caf\xe9\n")
    first, second, third, fourth = texts(open_dataset("a.csv", **SHAPE))
    assert first == (long.strip(), None) and second == ("two\nlines", None) and third == ("a cow", None)
    assert fourth.startswith("BAD d.mp4: 'utf-8' codec")
    (here / "a.csv").unlink()
    (here / "a.txt").write_text("a dog", encoding="utf-8-sig")
    assert texts(open_dataset(str(here), **SHAPE))[0] == ("a dog", None)


def test_captions_that_are_no_strings(here, mp4):
    rows = [dict(path="a.mp4", caption="a", reward_caption=["a"]), dict(path="b.mp4", caption=7),
            dict(path=["c.mp4"], caption="c"), dict(path="d.mp4", caption="d", reward_caption="")]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    no = "a caption is no text, or has commas and no quotation marks"
    *bad, good = texts(open_dataset("a.jsonl", **SHAPE))
    assert bad[:2] == [f"BAD a.mp4: {no}: ['a']", f"BAD b.mp4: {no}: 7"] and good == ("d", None)
    assert bad[2].startswith("BAD ['c.mp4']: No such file")
    tar_of(here / "a.tar", [("a.mp4", mp4), ("a.txt", b"\xef\xbb\xbfa"),
                            ("a.json", b'{"reward_caption": {}}'), ("b.mp4", mp4), ("b.json", b"{")])
    first, second = texts(open_dataset("a.tar", **SHAPE))
    assert first == f"BAD a.tar:a.mp4: {no}: {{}}" and second.startswith("BAD a.tar:b.mp4: ")


# ---- shards ------------------------------------------------------------------------------------------------

def test_bad_members_are_named_in_full(here):
    names = ["f\u00e9lix/\u732b.mp4", "folder/" * 18 + "clip.mp4", "x" * 200 + ".mp4"]
    members = [(member, b"words") for name in names for member in (name, name[:-3] + "txt")]
    tar_of(here / "a.tar", members)
    for text, name in zip(texts(open_dataset("a.tar", **SHAPE)), names, strict=True):
        assert text.startswith(f"BAD a.tar:{name}: not a readable")


def test_index_is_kept_and_made_anew_when_a_shard_changes(sources, tmp_path, monkeypatch, mp4):
    scans, scan = [], shards.scan
    monkeypatch.setattr(shards, "scan", lambda path: scans.append(path) or scan(path))
    first, again = (open_dataset(sources["tar"], **SHAPE).sources[0].index for _ in range(2))
    assert len(scans) == 2 and isinstance(again, np.memmap) and np.array_equal(first, again)

    tar_of(tmp_path / "s-09.tar", [("x.mp4", mp4), ("x.txt", b"new"), ("y.mp4", mp4), ("y.txt", b"newer")])
    assert len(open_dataset(sources["tar"], **SHAPE)) == 4 and len(scans) == 4           # another size
    os.utime(tmp_path / "s-09.tar", (1, 1))                                              # another time
    assert open_dataset(sources["tar"], **SHAPE).get(3)["caption"] == "newer" and len(scans) == 6
    for index in tmp_path.glob("clips-*.npy"):
        index.write_bytes(index.read_bytes()[:-8])                                       # damage
    assert len(open_dataset(sources["tar"], **SHAPE)) == 4 and len(scans) == 8
    assert not list(tmp_path.glob(".*"))


def test_index_in_the_cache_folder_where_the_shards_are_not_writable(sources, tmp_path, monkeypatch):
    (name,) = (open_dataset(sources["tar"], **SHAPE), *tmp_path.glob("clips-*.npy"))[1:]
    name.unlink()
    name.mkdir()                                     # root may write anywhere, but not over a folder
    cache = tmp_path / "cache"
    assert len(open_dataset(sources["tar"], **SHAPE)) == 3
    assert len(open_dataset(sources["tar"], **SHAPE, cache=str(cache))) == 3
    assert [path.name for path in cache.iterdir()] == [name.name]
    monkeypatch.setattr(shards, "scan", None)
    assert open_dataset(sources["tar"], **SHAPE, cache=str(cache)).get(1)["reward_caption"] == "short"


# ---- order -------------------------------------------------------------------------------------------------

class Numbers:
    """A dataset from a function: the clip tells its index and what its generator drew; some are bad."""

    def __init__(self, n: int, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def get(self, index, generator):
        if index in self.bad:
            raise BadClip(f"clip {index}", "it is bad")
        draw = torch.randint(256, (), generator=generator)
        clip = torch.stack([torch.tensor(index), draw])
        return dict(clip=clip, caption=str(index), reward_caption=None, index=index)


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
    """7 steps of 12 clips over 11: across epochs, substitutes for bad clips, any number of workers."""
    def run(world, workers=0):
        options = dict(world_size=world, workers=workers)
        ranks = [take(Numbers(11, bad), 7, 12 // world, rank=rank, **options) for rank in range(world)]
        return [torch.cat([rank[n][key] for rank in ranks])
                for n in range(7) for key in ("clip", "index")]

    want = run(1)
    for world, workers in ((2, 0), (3, 0), (2, 2)):
        for a, b in zip(want, run(world, workers), strict=True):
            assert torch.equal(a, b)
    assert not set(bad) & set(torch.cat(want[1::2]).tolist())
    clean = torch.cat([out["index"] for out in take(Numbers(11), 7, 12)])
    got = torch.cat(want[1::2])
    replaced = torch.isin(clean, torch.tensor(bad or [-1]))          # only the bad ones
    assert ((got == clean) | replaced).all()


def test_resume_goes_on_with_the_very_next_clip():
    options = dict(rank=1, world_size=2, seed=5)
    whole = take(Numbers(11, [4]), 9, 3, **options)
    parts = [take(Numbers(11, [4]), k, 3, start_step=n, **options) for n, k in ((0, 4), (4, 3), (7, 2))]
    for a, b in zip(whole, sum(parts, []), strict=True):
        assert torch.equal(a["clip"], b["clip"]) and a["caption"] == b["caption"]


def test_epochs_start_clips_at_different_frames(sources):
    """Drawn from generators of their own: the global random state is left alone."""
    before = torch.get_rng_state()
    dataset = open_dataset(sources["folder"], **SHAPE)
    starts = {(int(out["index"]), numbers(out["clip"][0])[0]) for out in take(dataset, 12, 1)}
    assert len(starts) > 6 and torch.equal(before, torch.get_rng_state())


def test_a_short_clip_says_at_what_rate_it_is_played(mp4, here):
    """60 frames at 30 fps: 1.97 s from the first to the last. 16 frames at 4 fps span 3.75 s."""
    (here / "a.txt").write_text("a")
    assert open_dataset(str(here), 16, 16, 16, 24).get(0)["fps"] == 16
    with pytest.warns(UserWarning, match="clips shorter than 16 frames at 4 fps are stretched"):
        assert open_dataset(str(here), 16, 4, 16, 24).get(0)["fps"] == pytest.approx(15 / (59 / 30), rel=1e-3)


class Slow(Numbers):
    """Each clip takes a while, less and less, so that threads end in another order than they begin."""

    def get(self, index, generator):
        time.sleep(0.002 * (index % 5))
        return super().get(index, generator)


def test_threads_keep_the_order_and_end_with_the_loader():
    before = threading.active_count()
    batches = loader(Slow(23, [3]), 4, workers=2)
    for want in take(Numbers(23, [3]), 12, 4):
        assert torch.equal(next(batches)["clip"], want["clip"])
    assert threading.active_count() == before + 2
    batches.close()
    end = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- bad clips ---------------------------------------------------------------------------------------------

REASONS = dict(codec="its codec is not known here; convert it to h264", corrupt="damaged|not a readable",
               truncated="truncated", cut="truncated|not a clip|readable", empty="not a readable video",
               junk="not a readable video", sound="no video", no_caption="no caption", blank="no caption",
               latin="utf-8", still="not a clip: 1 frame", pipe="No such file, or a folder, pipe")


@pytest.fixture
def bad_folder(mp4, tmp_path) -> str:
    """Every kind of bad file, and 40 good ones."""
    folder = tmp_path / "clips"
    folder.mkdir()
    noise = bytearray(mp4)
    for at in range(mp4.index(b"mdat") + 800, len(mp4) - 20, 40):
        noise[at:at + 20] = os.urandom(20)
    files = dict(codec=mp4.replace(b"avc1", b"zzzz"), corrupt=bytes(noise), truncated=mp4[:len(mp4) // 2],
                 cut=mp4[:mp4.index(b"mdat") + 4], empty=b"", junk=b"x" * 999, no_caption=mp4, blank=mp4,
                 latin=mp4, **{f"good{k:02d}": mp4 for k in range(40)})
    for name, content in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
    write_sound(folder / "sound.mp4")
    write_at(folder / "still.mp4", [0])
    write_at(folder / "vfr.mp4", [0, 500, 510, 900, 1300], {"g": "2"})
    write_at(folder / "odd.mp4", [0, 100, 200, 300, 400, 500], size=(31, 45))
    write_at(folder / "title.mkv", [0, 100, 200, 300, 400, 500], title="a dog")
    title = (folder / "title.mkv").read_bytes().replace(b"a dog", b"\xe9\xff\xfe\xf9\xf8")      # no utf-8
    (folder / "title.mkv").write_bytes(title)
    os.mkfifo(folder / "pipe.mp4")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a caption")
    (folder / "no_caption.txt").unlink()
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return str(folder)


def test_bad_files_are_skipped_counted_and_named(bad_folder, tmp_path):
    log = tmp_path / "bad.jsonl"
    dataset = open_dataset(bad_folder, **SHAPE)
    names = [Path(dataset.sources[0].name(i)).stem for i in range(len(dataset))]
    outs = take(dataset, 14, 4, bad_file=log, workers=2)             # an epoch meets each of them

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        name = Path(row["clip"]).stem
        assert names[row["index"]] == name and re.search(REASONS[name], row["reason"]), row
    assert {names[row["index"]] for row in rows} == set(REASONS)
    good = {names[i] for out in outs for i in out["index"].tolist()}
    assert {"vfr", "odd", "title"} < good and not good & set(REASONS)
    assert outs[-1]["bad"] == len(rows)


def test_damage_between_the_key_frame_and_the_clip(mp4):
    """Frames predicted from a damaged one are wrong without a mark; nothing of that may pass as good."""
    good, passed = read_video(mp4, 60, 30, 32, 48), 0
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


def test_a_run_ends_when_too_many_clips_are_bad(tmp_path):
    take(Numbers(1000, range(0, 1000, 3)), 60, 10)                   # a third of them
    with pytest.raises(UserError, match=r"too many bad clips: 1.. of the last 1.., e.g. clip .*: it is"):
        take(Numbers(1000, range(300, 1000)), 60, 10)
    with pytest.raises(UserError, match="40 of the last 40, .*; see .*bad.jsonl"):          # 20 in a row
        take(Numbers(5, range(5)), 1, 2, workers=1, bad_file=tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_a_programming_error_is_not_a_bad_clip_and_keeps_its_traceback(workers):
    class Broken(Numbers):
        def get(self, index, generator):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as error:
        take(Broken(3), 1, 1, workers=workers)
    assert error.traceback[-1].name == "get"
