"""Datasets of clips (data.py): sources and what is wrong with them, indices of shards, order, bad clips."""
import csv
import itertools
import json
import os
import re
import tarfile
import warnings
from io import BytesIO
from multiprocessing import Process
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import SHAPE, counting_clip, make_mp4, numbers, read_video, tar_of, write_at, write_sound

import data
from data import BadClip, loader, open_dataset
from plumbing import tars, video
from plumbing.sources import expand


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return make_mp4(tmp_path_factory.mktemp("mp4"))


# ---- sources -----------------------------------------------------------------------------------------------


@pytest.fixture
def sources(mp4, tmp_path) -> dict[str, str]:
    """The same three clips as a folder, two manifests and two shards."""
    folder = tmp_path / "clips" / "sub"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.mp4").write_bytes(mp4)
        (folder / f"{k}.txt").write_text(f" caption {k}, \u00e9\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        "path,caption,reward_caption\n"
        + "".join(f'clips/sub/{k}.mp4,"caption {k}, \u00e9",{"short" if k == 1 else ""}\n' for k in range(3)),
        encoding="utf-8",
    )
    rows = [dict(path=f"clips/sub/{k}.mp4", caption=f"caption {k}, \u00e9") for k in range(3)]
    rows[1]["reward_caption"] = "short"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    texts = [f"caption {k}, \u00e9".encode() for k in range(3)]
    long_name = "folder/" * 20 + "k2"  # needs a header of its own in the tar
    tar_of(
        tmp_path / "s-08.tar",
        [
            ("0.mp4", mp4),
            ("0.txt", texts[0]),
            ("._0.mp4", b"x"),
            ("1.txt", texts[1]),
            ("1.json", b'{"reward_caption": "short", "caption": "not this"}'),
            ("1.mp4", mp4),
        ],
    )
    tar_of(
        tmp_path / "s-09.tar",
        [
            (long_name + ".mp4", mp4),
            ("notes/readme.md", b"hello"),
            (long_name + ".json", json.dumps({"caption": "caption 2, \u00e9"}).encode()),
        ],
    )
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
        assert torch.equal(
            item["clip"], read_video(mp4, 4, 8, 16, 24, generator=torch.Generator().manual_seed(k))
        )


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
    for name, content, message in (
        ("a.csv", "file,text\na.mp4,hello\n", "no row has both.*expected path,caption"),
        ("b.jsonl", '{"path": "a.mp4", "caption": "a"}\n{"pa', 'line 2: .*expected {"path"'),
        ("c.jsonl", "[1, 2]\n", 'line 1: .*expected {"path"'),
        ("d.csv", "", "no row"),
    ):
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
    (here / "a.csv").write_text(
        'path,caption,reward_caption\na.mp4,a dog, running, fast\nb.mp4,"a dog, running",\n'
        'c.mp4,"say "hi" now",x\n\nd.mp4\n,lonely,\n'
    )
    assert texts(open_dataset("a.csv", **SHAPE)) == [
        'BAD a.mp4: line 2 of a.csv: 4 fields for 3 columns; quote a caption with commas: "one, two"',
        ("a dog, running", None),
        "BAD : line 4 of a.csv: ',' expected after '\"'",
        "BAD d.mp4: empty caption",
        "BAD : line 7 of a.csv: no path",
    ]


@pytest.mark.parametrize("rows", [
    'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,a cow\n', 'a.mp4,"a dog\nb.mp4,"a cat"\nc.mp4,a cow\n',
    'a.mp4,"a dog\nb.mp4,a cat"\nc.mp4,a cow\n', 'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,"a cow"\n'])
def test_csv_quotes_that_swallow_rows(rows, here):
    (here / "a.csv").write_text("path,caption\nd.mp4,first\n" + rows)
    with pytest.raises(
        ValueError, match="^a.csv, line 3: a quote that is not closed in its row swallows the rows"
    ):
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
    tar_of(
        here / "a.tar",
        [
            ("a.mp4", mp4),
            ("a.txt", b"\xef\xbb\xbfa"),
            ("a.json", b'{"reward_caption": {"a": 1}}'),
            ("b.mp4", mp4),
            ("b.json", b"[" * 100000),
        ],
    )
    got = texts(open_dataset("a.tar", **SHAPE))
    assert got[0] == "BAD a.tar:a.mp4: its reward caption is not a string: {'a': 1}"
    assert got[1].startswith("BAD a.tar:b.mp4: ")                    # deeper than Python's stack


def test_what_a_folder_holds_besides_clips_is_counted_once(here):
    (here / "sub").mkdir()
    for name in ("x.gif", "sub/y.GIF", "z.jpg", "README", ".hidden", "a.txt"):
        (here / name).write_text("x")
    (here / "sub" / "back").symlink_to(here)  # a circle
    with pytest.warns(
        UserWarning, match=r"files not read: 2 .gif, 1 .jpg, 1 without a suffix; clips are .mp4"
    ) as got:
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
    """The last dot where a pair is named so; else the first, as in WebDataset; a key that stands twice."""
    tar_of(
        here / "a.tar",
        [
            ("a.v2.mp4", mp4),
            ("a.v2.txt", b"one"),
            ("b.480p.mp4", mp4),
            ("b.txt", b"two"),
            ("c.mp4", mp4),
            ("c.txt", b"three"),
            ("c.more.txt", b"not this"),
            ("c.more.json", b"{}"),
            ("d.mp4", mp4),
            ("d.txt", b"four"),
            ("d.mp4", mp4),
            ("d.txt", b"five"),
            ("e.1.txt", b"alone"),
            ("stats.json", b"{}"),
        ],
    )
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
    assert texts(open_dataset("a.tar", **SHAPE))[0].startswith(
        "BAD a.tar:a\ufffdb\ufffd[31m\ufffd.mp4: not a readable"
    )


# ---- index of shards ---------------------------------------------------------------------------------------


def test_index_is_kept_and_made_anew_when_the_shard_changes(sources, tmp_path, monkeypatch, mp4):
    scans, scan = [], tars.scan
    monkeypatch.setattr(tars, "scan", lambda *a: scans.append(a[0]) or scan(*a))
    first = open_dataset(sources["tar"], **SHAPE)
    assert len(scans) == 2 and (tmp_path / "s-08.tar.index").exists()
    again = open_dataset(sources["tar"], **SHAPE)
    assert len(scans) == 2 and np.array_equal(first.sources[0].rows, again.sources[0].rows)
    members = [("x.mp4", mp4), ("x.txt", b"new"), ("y.mp4", mp4), ("y.txt", b"newer")]
    tar_of(tmp_path / "s-09.tar", members)                           # its size
    assert len(open_dataset(sources["tar"], **SHAPE)) == 4 and len(scans) == 3
    os.utime(tmp_path / "s-09.tar", (1, 1))  # its time
    (tmp_path / "s-08.tar.index").write_bytes(b"")  # damage
    assert open_dataset(sources["tar"], **SHAPE).get(3)["caption"] == "newer" and len(scans) == 5
    assert not list(tmp_path.glob(".*"))


def test_index_in_the_cache_folder_where_the_shards_are_not_writable(sources, tmp_path, monkeypatch):
    for name in ("s-08", "s-09"):  # root may write anywhere, but not over a folder
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
    tar_of(
        here / "a.tar",
        [
            ("a.txt", b"a"),
            ("a.mp4", mp4),
            ("b.txt", b"b" * 20),
            ("b.mp4", mp4),
            ("c.txt", b"c"),
            ("c.mp4", mp4),
        ],
    )
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
        return dict(
            clip=torch.stack([torch.tensor(index), draw]),
            caption=str(index),
            reward_caption=None,
            index=index,
        )


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
        ranks = [
            take(Numbers(11, bad), 7, 12 // world, rank=r, world=world, workers=workers) for r in range(world)
        ]
        return [
            torch.cat([rank[n][key] for rank in ranks])
            for n in range(7)
            for key in ("clip", "index", "position")
        ]

    want = run(1)
    assert torch.cat(want[2::3]).tolist() == list(range(84))
    for world, workers in ((2, 0), (3, 0), (2, 2)):
        for a, b in zip(want, run(world, workers), strict=True):
            assert torch.equal(a, b)
    assert not set(bad) & set(torch.cat(want[1::3]).tolist())
    clean = torch.cat([out["index"] for out in take(Numbers(11), 7, 12)])
    got = torch.cat(want[1::3])
    replaced = torch.isin(clean, torch.tensor(bad or [-1]))          # only the bad ones
    assert ((got == clean) | replaced).all()


def test_resume_goes_on_with_the_very_next_clip():
    whole = take(Numbers(11, [4]), 9, 3, rank=1, world=2, seed=5)
    parts = [
        take(Numbers(11, [4]), k, 3, rank=1, world=2, seed=5, start_step=n)
        for n, k in ((0, 4), (4, 3), (7, 2))
    ]
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
    """60 frames at 30 fps: 1.97 s from the first to the last. 16 frames at 4 fps span 3.75 s."""
    for name in "abcd":
        (here / f"{name}.txt").write_text(name)
    for fps, want in ((16, 16), (4, 15 / (59 / 30))):
        dataset = open_dataset(str(here), frames=16, fps=fps, height=16, width=24)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            (out,) = take(dataset, 1, 4)
        assert out["fps"].tolist() == pytest.approx([want] * 4, rel=1e-3)
        assert len(said) == (fps == 4)
        assert all("is shorter than 16 frames at 4 fps" in str(each.message) for each in said)


# ---- bad clips ---------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(mp4, tmp_path) -> str:
    """Every kind of bad file, and 40 good ones."""
    folder = tmp_path / "clips"
    folder.mkdir()
    half, noise = len(mp4) // 2, bytearray(mp4)
    for at in range(mp4.index(b"mdat") + 800, len(mp4) - 20, 40):
        noise[at:at + 20] = os.urandom(20)
    files = dict(
        codec=mp4.replace(b"avc1", b"zzzz"),
        corrupt=bytes(noise),
        truncated=mp4[:half],
        cut=mp4[: mp4.index(b"mdat") + 4],
        empty=b"",
        junk=b"x" * 999,
        no_caption=mp4,
        blank_caption=mp4,
        latin=mp4,
    )
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


REASONS = dict(
    codec="its codec is not known here; convert it to h264",
    corrupt="damaged|not a readable video",
    truncated="truncated",
    cut="truncated|not a clip|readable",
    empty="not a readable video",
    junk="not a readable video",
    sound="no video stream",
    no_caption="no caption",
    blank_caption="empty caption",
    latin="utf-8",
    still="not a clip: 1 frames",
)


def test_bad_files_are_skipped_counted_and_named(bad_folder, tmp_path):
    log = tmp_path / "bad.jsonl"
    dataset = open_dataset(bad_folder, **SHAPE)
    names = [os.path.basename(dataset.sources[0].name(i))[:-4] for i in range(len(dataset))]
    outs = []
    with pytest.raises(
        ValueError, match=r"too many bad clips: 20 of the last .* \(the limit is 5%\).*see .*bad.jsonl"
    ):
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
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
            )
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
    """Frames predicted from a damaged one are wrong without a mark; nothing of that may pass as good."""
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
        return torch.stack([video.pixels(frame, container, stream) for frame in container.decode(stream)], 1)


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
    second = content.index(b"c.mp4")  # where the header of a later member begins
    kinds = {
        "cut": content[: second + 2000],
        "cut_header": content[: second + 100],
        "empty": b"",
        "junk": b"x" * 2000,
        "bad_header": content[: second + 148] + b"zzzzzzzz" + content[second + 156 :],
    }
    for name, damaged in kinds.items():
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        dataset = open_dataset([path, str(tmp_path / f"{name}.tar")], **SHAPE)
        last = len(dataset) - 1
        good = 0 if name in ("empty", "junk") else 2                 # a and b of the damaged shard
        assert last == 5 + good
        where = 0 if name in ("empty", "junk") else second
        with pytest.raises(BadClip, match=f"{name}.tar: damaged tar from byte {where} on"):
            dataset.get(last)
        if where:
            assert dataset.get(5)["caption"] == "a"
    no_end = tmp_path / "no_end.tar"                                 # without the zeros at the end: allowed
    no_end.write_bytes(content.rstrip(bytes(1)).ljust(-(-len(content.rstrip(bytes(1))) // 512) * 512, b"\0"))
    assert len(open_dataset(str(no_end), **SHAPE)) == 5


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes replaced, cut out or put in, or the end cut off."""
    content, at, length = bytearray(content), rng.integers(len(content)), rng.integers(1, 40)
    kind = rng.integers(5)
    if kind == 0:
        content[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        content[at : at + length] = rng.bytes(length)
    elif kind == 2:
        del content[at : at + 20 * length]
    elif kind == 3:
        content[at:at] = rng.bytes(length)
    else:
        del content[at:]
    return bytes(content)


def test_random_damage_is_a_bad_clip_or_one_line(here, mp4):
    """Each clip is read or is a BadClip, or its source is refused: nothing else, and on one line."""
    (here / "a.csv").write_text('path,caption\na.mp4,"a, dog"\nb.mp4,two\n')
    (here / "a.jsonl").write_text('{"path": "a.mp4", "caption": "a"}\n{"path": "b.mp4", "caption": "b"}\n')
    long = "y" * 150
    tar_of(here / "a.tar", [("x.mp4", mp4), ("x.txt", b"x"), (f"{long}.mp4", mp4), (f"{long}.txt", b"y")])
    good = {name: (here / name).read_bytes() for name in ("a.csv", "a.jsonl", "a.tar", "c.mp4")}
    (here / "c.txt").write_text("a caption")
    rng = np.random.default_rng(0)
    for k in range(120):
        name = sorted(good)[k % len(good)]
        (here / name).write_bytes(damaged(good[name], rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                      # of the folder: what it does not read
                dataset = open_dataset("." if name == "c.mp4" else name, **SHAPE)
        except ValueError as error:
            assert "\n" not in str(error) and name in str(error)
            continue
        assert all("\n" not in text for text in texts(dataset) if isinstance(text, str))


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
