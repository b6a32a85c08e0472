"""The cache that T2V-Turbo-v2 trains from (data.py): written, killed, refused, read in two streams."""
import itertools
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import BadClip, Cache, CacheWriter, loader
from plumbing.errors import UserError

HEADER = dict(teacher="f00", grid=200, fps=8, size=[3, 5, 6], motion_share=0.5, clips=70, draws=2, seed=0)
BAD = (7, 40)


def cached_clip(index: int) -> tuple[dict, dict]:
    """What a teacher would say, a function of the index; every third clip has no motion guidance."""
    latents = torch.randn(4, 2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(index))
    tensors = dict(zip(("z_t", "eps_c", "eps_u", "gradient"), latents)) | {"c": latents[0, 0, 0, 0]}
    if index % 3 == 0:
        del tensors["gradient"]
    rewards = index % 5 == 0
    return tensors, dict(t=[4 + index, 9 + index], caption=f"caption {index} \u00e9", rewards=rewards,
                         reward_caption="short" if rewards else None)


def prepare(folder, rank: int = 0, world_size: int = 1, wait: float = 0) -> CacheWriter:
    writer = CacheWriter(folder, HEADER, rank, world_size)
    for index in writer.missing():
        if index not in BAD:
            writer.write(index, *cached_clip(index))
            time.sleep(wait)
    return writer


@pytest.fixture(scope="module")
def complete_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder).write_header(complete=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_cache_returns_what_was_written(complete_cache):
    cache = Cache(complete_cache, dict(teacher="f00", grid=200, size=(3, 5, 6)))
    clips = [index for index in range(70) if index not in BAD]
    assert len(cache) == 2 * len(clips)
    for place, index in enumerate(clips):
        tensors, notes = cached_clip(index)
        for draw in range(2):
            sample = cache.get(2 * place + draw)
            assert torch.equal(sample["c"], tensors["c"].half()) and sample["t"] == notes["t"][draw]
            assert all(sample[name] == notes[name] for name in ("caption", "reward_caption", "rewards"))
            for name in ("z_t", "eps_c", "eps_u"):
                assert torch.equal(sample[name], tensors[name][draw].half())
            gradient = tensors.get("gradient", torch.zeros(2, 4, 3, 5, 6))
            assert torch.equal(sample["gradient"], gradient[draw].half())


def test_preparing_killed_at_random_moments_equals_preparing_undisturbed(complete_cache, tmp_path):
    rng, kills = np.random.default_rng(0), 0
    while CacheWriter(tmp_path, HEADER).missing() != list(BAD):
        processes = [Process(target=prepare, args=(tmp_path, rank, 2, 0.004)) for rank in range(2)]
        for process in processes:
            process.start()
        time.sleep(0.05 + 0.1 * rng.random())
        for process in processes:
            kills += process.is_alive()
            process.kill()
            process.join()
    with pytest.raises(UserError, match=r"is not complete: run the same prepare.py once more"):
        Cache(tmp_path)
    prepare(tmp_path).write_header(complete=True)
    assert contents(tmp_path) == contents(complete_cache) and kills > 2


def test_another_cache_and_no_cache_are_refused(complete_cache, tmp_path):
    with pytest.raises(UserError, match="was made with grid = 200, not 50: choose another folder"):
        Cache(complete_cache, dict(grid=50))
    with pytest.raises(UserError, match="was made with seed = 0, not 1"):
        CacheWriter(complete_cache, HEADER | dict(seed=1))
    with pytest.raises(UserError, match="no such file"):
        Cache(tmp_path)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(UserError, match="is not the header of a cache"):
        Cache(tmp_path)


def test_copies_of_clips_are_no_clips(tmp_path):
    prepare(tmp_path).write_header(complete=True)
    whole = len(Cache(tmp_path))
    (tmp_path / "0000001 (1).safetensors").write_bytes((tmp_path / "0000001.safetensors").read_bytes())
    assert len(Cache(tmp_path)) == whole and not {*prepare(tmp_path).missing()} - {*BAD}


def test_a_damaged_clip_is_a_bad_clip(tmp_path):
    prepare(tmp_path).write_header(complete=True)
    path = data.clip_files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-100])
    cache = Cache(tmp_path)
    cache.get(1)
    with pytest.raises(BadClip, match=f"{path.name} is not a clip of a cache"):
        cache.get(2)


def test_values_that_float16_cannot_hold(tmp_path):
    (tensors, notes), writer = cached_clip(1), CacheWriter(tmp_path, HEADER)
    for name, value in (("eps_c", 70_000.0), ("gradient", torch.nan)):
        with pytest.raises(BadClip, match=f"{name} has values that are not finite in float16"):
            writer.write(1, tensors | {name: tensors[name] + value}, notes)
    assert data.clip_files(tmp_path) == []


def test_two_streams_of_a_cache_resume_by_the_step(complete_cache, tmp_path):
    """v2 Sec. 4: L_CD on all clips, rewards on the short-caption ones."""
    cache, rewarded = Cache(complete_cache), Cache(complete_cache, only_rewards=True)
    assert len(rewarded) == 2 * 13                                  # of 14 clips, 40 is bad

    def streams(start, steps):
        both = zip(loader(cache, 3, seed=0, start_step=start), loader(rewarded, 1, seed=1, start_step=start))
        return list(itertools.islice(both, steps))

    whole = streams(0, 60)
    for a, b in zip(whole, streams(0, 25) + streams(25, 35), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["z_t"], y["z_t"]) and x["caption"] == y["caption"]
    assert all(b["reward_caption"] == ["short"] for _, b in whole)
    drawn = [(caption, int(t)) for a, _ in whole for caption, t in zip(a["caption"], a["t"])]
    assert len(set(drawn[:136])) == 136 == len(cache)               # an epoch meets each sample once

    header = (complete_cache / "header.json").read_text()
    (tmp_path / "header.json").write_text(header.replace('"files": 68', '"files": 0'))
    with pytest.raises(UserError, match="carries rewards; prepare.py --reward-data says which do"):
        Cache(tmp_path, only_rewards=True)
