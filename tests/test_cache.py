"""The cache that T2V-Turbo-v2 trains from (data.py): added to, killed, damaged, shared, refused, read."""
import itertools
import re
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import BadClip, Cache, CacheWriter, loader

HEADER = dict(
    teacher="vc2", fingerprint="f00", grid=200, fps=8, size=[3, 5, 6], tau=0.5, clips=70, draws=2, seed=0
)


def cached_sample(index: int, draw: int = 0) -> dict:
    """What a teacher would say: tensors that are a function of (index, draw); no gradient below t = 500."""
    latents = torch.randn(4, 4, 3, 5, 6, generator=torch.Generator().manual_seed(2 * index + draw))
    t = (185 * index + 5 * draw) % 1000 + 4
    return dict(
        z_t=latents[0],
        eps_c=latents[1].bfloat16(),
        eps_u=latents[2].half(),
        gradient=latents[3] * (t >= 500),
        c=latents[0, 0, 0],
        index=index,
        draw=draw,
        t=t,
        caption=f"caption {index} \u00e9",
        reward_caption="short" if index % 5 == 0 else None,
        rewards=index % 5 == 0,
        source=f"a.tar:{index}.mp4",
        source_index=3 * index,
    )


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
            assert got.keys() == want.keys()
            for name, value in want.items():
                if torch.is_tensor(value):
                    assert got[name].dtype == torch.float16 and torch.equal(got[name], value.half())
                else:
                    assert got[name] == value
    shards = [f"00000{k}.safetensors" for k in range(5)]
    assert sorted(contents(whole_cache)) == [*shards, "header.json", "index.json"]


def test_size_of_a_sample_at_512x320(tmp_path):
    """1.14 MB, 1.47 MB with a gradient: 24,000 clips, half of them guided, are 31 GB."""
    sizes = []
    for gradient in (0.0, 1.0):
        folder, z = tmp_path / str(gradient), torch.zeros(4, 16, 40, 64)
        writer = CacheWriter(folder, dict(clips=1, draws=1))
        tensors = dict(z_t=z, eps_c=z, eps_u=z, gradient=z + gradient, c=torch.zeros(77, 1024))
        writer.add(dict(tensors, index=0, draw=0, rewards=True))
        sizes.append((folder / "000000.safetensors").stat().st_size)
    assert 0 < sizes[0] - 1_140_736 < 2000 and 0 < sizes[1] - 1_468_416 < 2000


def test_two_processes_make_the_files_of_one(whole_cache, tmp_path):
    """Also in another order, and after a half of it was made by three."""
    writers = [CacheWriter(tmp_path, HEADER, rank, 3) for rank in range(3)]
    assert sorted(clip for writer in writers for clip in writer.missing()) == list(range(70))
    prepare(tmp_path, 1, 3)
    for rank in (1, 0):
        writer = CacheWriter(tmp_path, HEADER, rank, 2)
        for index in reversed(writer.missing()):
            for draw in (1, 0):
                if index in (7, 40):
                    writer.skip(index, "it is bad")
                else:
                    writer.add(cached_sample(index, draw))
    with pytest.raises(ValueError, match=f"the cache in {tmp_path} is not whole: go on with --prepare"):
        Cache(tmp_path)
    writer.finish()
    assert contents(tmp_path) == contents(whole_cache)


def test_preparing_killed_at_random_moments_equals_preparing_undisturbed(whole_cache, tmp_path):
    rng, patience, kills = np.random.default_rng(0), 0.1, 0
    while True:
        options = dict(wait=0.004)
        processes = [Process(target=prepare, args=(tmp_path, rank, 2), kwargs=options) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(patience * rng.random())
            kills += process.is_alive()
            process.kill()
            process.join()
        if all(process.exitcode == 0 for process in processes):
            break
        patience *= 1.3                                              # a busy machine comes to an end as well
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
    with pytest.raises(
        ValueError, match="000002.safetensors is missing or damaged: make it anew with --prepare"
    ):
        Cache(tmp_path)
    (tmp_path / "000003.safetensors").write_bytes((foreign / "000003.safetensors").read_bytes())
    (tmp_path / "000004.safetensors").unlink()
    writer = CacheWriter(tmp_path, HEADER)
    assert writer.missing() == list(range(16, 70))
    with pytest.raises(ValueError, match="000002.safetensors is missing or damaged"):
        writer.finish()
    prepare(tmp_path).finish()
    assert contents(tmp_path) == contents(whole_cache)


def test_no_flipped_bit_passes(whole_cache, tmp_path):
    """In any file of a cache: it is refused, or the samples are those that were added."""
    files, rng = contents(whole_cache), np.random.default_rng(0)
    want = [Cache(whole_cache).get(index) for index in range(136)]
    for k in range(28):
        name = sorted(files)[k % len(files)]
        content = bytearray(files[name])
        content[rng.integers(len(content) // (1 if k % 2 else 50))] ^= 1 << rng.integers(8)
        for other in files:
            (tmp_path / other).write_bytes(content if other == name else files[other])
        try:
            cache = Cache(tmp_path)
        except ValueError as error:
            assert name in str(error)
            continue
        assert len(cache) == 136
        for index in range(136):
            try:
                got = cache.get(index)
            except BadClip:
                continue
            assert got.keys() == want[index].keys()
            for key, value in want[index].items():
                assert torch.equal(got[key], value) if torch.is_tensor(value) else got[key] == value


def test_a_cache_of_something_else_is_refused_in_one_line(whole_cache, tmp_path):
    remedy = "choose another folder or those options$"
    for change in (
        dict(teacher="ms"),
        dict(grid=50),
        dict(size=[3, 5, 7]),
        dict(fingerprint="bad"),
        dict(clips=71),
    ):
        name, value = next(iter(change.items()))
        message = (
            rf"^the cache in .* was made with {name} = .*{re.escape(str(HEADER[name]))}.*, not .*: {remedy}"
        )
        with pytest.raises(ValueError, match=message):
            CacheWriter(whole_cache, HEADER | change)
        with pytest.raises(ValueError, match=message):
            Cache(whole_cache, change)
    with pytest.raises(ValueError, match=f"was made with motion = None, not 0.05: {remedy}"):
        CacheWriter(whole_cache, HEADER | dict(motion=0.05))
    with pytest.raises(ValueError, match=f"no cache in {tmp_path}: make one with --prepare"):
        Cache(tmp_path)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(ValueError, match="header.json is damaged .*: delete it and go on with --prepare"):
        Cache(tmp_path)


def test_values_that_float16_cannot_hold(tmp_path):
    writer = CacheWriter(tmp_path, HEADER | dict(clips=3, draws=1))
    for index, (name, value) in enumerate((("eps_c", 1e5), ("gradient", float("nan")), ("z_t", 60000.0))):
        sample = cached_sample(index) | {name: torch.full((4, 3, 5, 6), value)}
        writer.add(sample)
    writer.finish()
    cache = Cache(tmp_path)
    assert len(cache) == 1 and cache.get(0)["index"] == 2
    assert cache.skipped == {0: "eps_c of draw 0 has values that are not finite in float16",
                             1: "gradient of draw 0 has values that are not finite in float16"}
    writer = CacheWriter(tmp_path / "bad", HEADER)
    with pytest.raises(
        ValueError, match="too many clips cannot be used: 20 of 20 .*the last one is clip 19: nan"
    ):
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
            assert (
                torch.equal(x["z_t"], y["z_t"])
                and x["caption"] == y["caption"]
                and x["z_t"].shape[1:] == (4, 3, 5, 6)
            )
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
