"""Data as people have it: manifests of public sets, names of shards, members of tars, what is no file."""
import os
import tarfile
from pathlib import Path

import pytest
from clips import SHAPE, make_mp4, tar_of

import train
from data import BadClip, open_dataset
from plumbing.errors import UserError
from plumbing.manifests import check_columns, open_sources


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return make_mp4(tmp_path_factory.mktemp("mp4"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- manifests: name, text, options -> what a row says, or the message -------------------------------------

WEBVID = 'videoid,contentUrl,duration,page_dir,name\n21,https://x/21.mp4,PT12S,006_01,"A dog runs, fast"\n'
READ = [
    ("webvid.csv", WEBVID, {}, ("006_01/21.mp4", "A dog runs, fast", None)),
    ("webvid.csv", WEBVID, dict(columns="path=V/{videoid}.mp4,caption=name", root="/videos"),
     ("/videos/V/21.mp4", "A dog runs, fast", None)),
    ("openvid.csv", "video,caption,aesthetic score,motion score\n1.mp4,A dog,4.1,5.2\n", {},
     ("1.mp4", "A dog", None)),
    ("vidgen.json", '[{"vid": "Ee-Scene-0030", "caption": "A dog"}]', dict(root="v"),
     ("v/Ee-Scene-0030.mp4", "A dog", None)),
    ("opensora.csv", "path,text,num_frames\n/v/1.mp4,A dog,9\n", dict(root="w"), ("/v/1.mp4", "A dog", None)),
    ("t2v_turbo.csv", "relpath,text\n1.mp4,A dog\n", {}, ("1.mp4", "A dog", None)),
    ("METADATA.CSV", "file_name,text\n1.mp4,A dog\n", {}, ("1.mp4", "A dog", None)),
    ("metadata.JSONL", '{"file_name": "1.mp4", "text": "A dog"}\n', {}, ("1.mp4", "A dog", None)),
    ("semicolons.csv", "path;caption\n1.mp4;A dog, fast\n", {}, ("1.mp4", "A dog, fast", None)),
    ("tabs.tsv", "path\tcaption\treward_caption\n1.mp4\tA dog\tdog\n", {}, ("1.mp4", "A dog", "dog")),
    ("commas.tsv", "path,caption,,\n1.mp4,A dog,,\n", {}, ("1.mp4", "A dog", None)),
    ("no_header.csv", "1.mp4,A dog\n2.mp4,A cat\n", {}, ("1.mp4", "A dog", None)),
    ("upper.csv", 'Path , Caption\n1.mp4, "A dog, fast"\n', {}, ("1.mp4", "A dog, fast", None)),
    ("utf16.csv", "path,caption\n1.mp4,A caf\u00e9\n".encode("utf-16"), {}, ("1.mp4", "A caf\u00e9", None)),
    ("own.csv", "clip file;Words;Short\n1.mp4;A dog;dog\n",
     dict(columns="path=clip file,caption=Words,reward_caption=short"), ("1.mp4", "A dog", "dog")),
]
REFUSED = [
    ("own.csv", "file name;words\n1.mp4;A dog\n", {}, r"\('file name', 'words', separated by semicolons\)"),
    ("own.tsv", "a\tb\n1.mp4\tA dog\n", {}, r"\('a', 'b', separated by tabs\).*--columns path=COLUMN"),
    ("ids.csv", "name,path\n0001,1.mp4\n", {}, r"\('name', 'path', separated by commas\)"),
    ("own.json", '[{"a": "1.mp4", "b": "A dog"}]', {}, r"\('a', 'b'\)"),
    ("own.csv", "path,caption\n1.mp4,A dog\n", dict(columns="caption=words"), r"\('path', 'caption', sep"),
    ("own.csv", "path,caption\n1.mp4,A dog\n", dict(columns="captions=a"), "--columns captions=a: expected"),
    ("own.csv", "\npath,caption\n", dict(columns="path=a,path=b"), "--columns path=a,path=b: expected"),
    ("own.csv", "path,caption,caption\n1.mp4,A,B\n", {}, "two of its columns have one name"),
    ("own.json", '{"path": "1.mp4"}', {}, "own.json is not a manifest"),
    ("quotes.csv", 'path,caption\n1.mp4,"A dog\n2.mp4,A cat\n', {}, "quotes.csv, near line"),
]


@pytest.mark.parametrize("name, text, options, want", READ, ids=[row[0] for row in READ])
def test_manifests_of_public_sets(name, text, options, want, here):
    (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (source,) = open_sources(name, **options)
    assert tuple(source.row(0)) == want


def test_columns_without_a_manifest_are_refused():
    config = train.Config(columns="caption=long")
    for specs in (["a/*.tar"], ["clips"], ["a.tar", "b"]):
        with pytest.raises(UserError, match="are for manifests, and --data names none"):
            check_columns(specs, config)
    for specs in (["a/*.tar", "b.CSV"], ["b.json,c"], ["lists/*"]):
        check_columns(specs, config)
    check_columns(["a.tar"], train.Config())


def test_everything_in_a_folder_of_shards_twice_and_a_link_to_the_folder_itself(here):
    """The second time the index of the first lies among them."""
    (here / "all/more").mkdir(parents=True)
    tar_of(here / "all/a.tar", [("1.mp4", b"x"), ("1.txt", b"A dog")])
    assert [sum(map(len, open_sources("all/*"))) for _ in range(2)] == [1, 1]
    (here / "all/more/2.mp4").write_bytes(b"x")
    (here / "all/more/up").symlink_to("..")
    assert sum(map(len, open_sources("all"))) == 2


@pytest.mark.parametrize("name, text, options, message", REFUSED)
def test_a_refusal_names_the_columns(name, text, options, message, here):
    (here / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_sources(name, **options)


# ---- names -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, count, warning", [
    ("s/*.tar", 4, None), ("s/{a,b}.tar", 2, None), ("s/[ab].tar", 2, None), ("s", 4, None),
    ("s/a.tar, ~/s/b.tar", 2, None), ("~/s/{0,2}.tar", 2, None),
    ("s/{0..2}.tar", 2, "s/{0..2}.tar: 1 of 3 are missing, e.g. s/1.tar"),
    ("dogs, cats", 1, None), ("[12].tar", 1, None)])
def test_names_of_sources(spec, count, warning, here, monkeypatch, recwarn):
    monkeypatch.setenv("HOME", str(here))
    for name in ("s/0", "s/2", "s/a", "s/b", "dogs, cats/0", "[12]"):
        (here / name).parent.mkdir(exist_ok=True)
        tar_of(here / f"{name}.tar", [("0.mp4", b"x"), ("0.txt", b"A dog")])
    assert len(open_dataset(spec)) == count
    assert [str(each.message) for each in recwarn] == ([warning] if warning else [])


def test_what_is_no_file(here):
    """A pipe is never opened; an address or a protocol of ffmpeg is a file that is not there."""
    os.mkfifo("a.csv"), os.mkfifo("a.tar"), os.mkfifo("pipe.mp4")
    for name in ("a.csv", "a.tar", "/dev/null"):
        with pytest.raises(UserError, match="is no data, or a pipe or device"):
            open_dataset(name)
    (here / "b.csv").write_text("path,caption\nhttp://localhost/a.mp4,A dog\npipe.mp4,A dog\n")
    for i, reason in enumerate(["a.mp4: No such file", "pipe.mp4: No such file, or a folder, pipe"]):
        with pytest.raises(BadClip, match=reason):
            open_dataset("b.csv").get(i)


# ---- members of shards: what the tar holds -> captions of its clips, or why one is bad ---------------------

V = None                                              # stands for a video
KEYS = [
    ({"a.v2.mp4": V, "a.v2.txt": b"one"}, ["one"]),
    ({"b.480p.mp4": V, "b.txt": b"two"}, ["two"]),
    ({"c.mp4": V, "c.txt": b"three", "c.more.txt": b"not this", "c.depth.mp4": V}, ["three"]),
    ({"d.caption.txt": b"four", "d.mp4": V}, ["four"]),
    ({"x.y/e.f.mp4": V, "x.y/e.f.json": b'{"caption": "five"}', "x.y/e.g.mp4": V, "x.y/e.g.txt": b"six"},
     ["five", "six"]),
    ({"F.MP4": V, "F.TXT": b"seven"}, ["seven"]),
    ({"h.mp4": V, "i.mp4": V, "h.json": b"[1]"}, ["its .json is not an object", "no caption"]),
    ({"stats.json": b"{}", ".hidden.mp4": V, "j.mp4": V, "j.txt": b"eight"}, ["eight"]),
]


def captions(name: str) -> list[str]:
    dataset, answers = open_dataset(name, **SHAPE), []
    for i in range(len(dataset)):
        try:
            answers.append(dataset.get(i)["caption"])
        except BadClip as error:
            answers.append(error.reason)
    return answers


@pytest.mark.parametrize("members, want", KEYS)
def test_keys_of_members(members, want, mp4, here):
    tar_of(here / "a.tar", [(name, mp4 if content is V else content) for name, content in members.items()])
    assert captions("a.tar") == want


def test_links_sparse_members_and_keys_that_stand_twice(mp4, here):
    first, second = [("a.mp4", mp4), ("a.txt", b"1")], [("a.mp4", mp4), ("a.txt", b"3")]
    tar_of(here / "a.tar", [*first, ("b.txt", b"2"), *second])
    with tarfile.open("a.tar", "a") as tar:
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = tarfile.LNKTYPE, "a.mp4"
        tar.addfile(link)
    assert sorted(captions("a.tar")) == ["1", "2", "3"]

    holes = mp4 + bytes(1 << 20)                      # a hole behind the video
    with open("c.mp4", "wb") as file:
        file.write(mp4)
        file.truncate(len(holes))
    Path("c.txt").write_text("sparse")
    if os.system("tar --sparse -cf c.tar c.mp4 c.txt 2>/dev/null"):
        pytest.skip("no GNU tar here")
    assert os.path.getsize("c.tar") < 1 << 20 and open_sources("c.tar")[0].read(0)[0] == holes


def test_a_bad_member_costs_one_clip(mp4, here):
    paths = [tar_of(here / f"{k}.tar", [(f"{k}.mp4", mp4), (f"{k}.txt", str(k).encode())]) for k in range(3)]
    joined = b"".join(Path(path).read_bytes() for path in paths)
    at = joined.index(b"1.mp4")
    long = tarfile.TarInfo("x" * 200).tobuf(tarfile.GNU_FORMAT)
    for kind, content, want in (
        ("joined", joined, ["0", "1", "2"]),
        ("a header", joined[:at + 148] + b"zzzzzzzz" + joined[at + 156:],
         ["0", "2"]),
        ("a long name", long[:1024] + b"z" * 512 + joined, ["0", "1", "2"]),
        ("cut", joined[:at + 2000], ["0", f"its shard is damaged at byte {at}"]),
        ("without its end", joined.rstrip(b"\0").ljust(len(joined) - 2048, b"\0"), ["0", "1", "2"]),
        ("zeros", joined + bytes(3 << 20), ["0", "1", "2"]),
    ):
        Path("joined.tar").write_bytes(content)
        assert captions("joined.tar") == want, kind
    for content in (b"", b"x" * 2000):                # no tar: the others are read all the same
        Path("junk.tar").write_bytes(content)
        with pytest.warns(UserWarning, match="1 of 2 shards hold no clip, e.g. junk.tar"):
            assert len(open_dataset("{0,junk}.tar")) == 1
