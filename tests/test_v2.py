"""T2V-Turbo-v2 in the tiny world: any number of processes makes the same cache; training from it is exact."""
import dataclasses
import itertools
import json
import os
import random
import signal
import time
from functools import partial

import motion
import pytest
import tiny
import torch
from tiny import MOTION, Clips, configure, die, last, log, run, same

import data
import prepare
import train
from plumbing.errors import UserError
from plumbing.run import Group
from turbo import motion_strength

V2 = ("--preset", "shapes-v2")
networks = partial(tiny.networks, unet=MOTION)
SMALL = dict(inversion_steps=5, grid=50, frames=tiny.T, height=tiny.H, width=tiny.W)


def make(folder, clips=24, draws=2, rank=0, world_size=1, models=None, before=lambda index: None):
    """Algorithm 1 on tiny networks, by one of some processes."""
    models = models or networks()
    models.unet.requires_grad_(False)
    dataset = Clips()
    dataset.on_get = before
    config = dataclasses.replace(prepare.Config(), preset="shapes-v2", clips=clips, draws=draws,
                                 **SMALL, fps=8)
    mixture = prepare.mixture([dataset, dataset], clips, config.seed)
    header = prepare.header_of(config, models, mixture)
    writer = data.CacheWriter(folder, header, rank, world_size)
    if prepare.prepare(config, models, mixture, writer) is None and world_size == 1:
        writer.write_header(complete=True)
    return models, config


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".part"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2") / "cache"
    make(folder)
    return folder


# ---- Algorithm 1 -------------------------------------------------------------------------------------------

def test_a_sample_is_what_the_teacher_says(cache):
    models, schedule = networks(), train.Schedule(50)
    made = data.Cache(cache)
    assert len(made) == 48 and len(data.Cache(cache, only_rewards=True)) == 24
    for index in (0, 7, 40):
        sample = made.get(index)
        z_t, t = sample["z_t"].float()[None], torch.tensor([sample["t"]])
        c = models.text([sample["caption"]])
        with torch.no_grad():
            eps_c, eps_u = models.unet(z_t, t, c, fps=8), models.unet(z_t, t, models.text([""]), fps=8)
        assert torch.allclose(sample["eps_c"].float(), eps_c[0], atol=5e-3)          # float16
        assert torch.allclose(sample["eps_u"].float(), eps_u[0], atol=5e-3)
        assert sample["t"] in schedule.grid
        assert bool(motion_strength(t, 1.0, 0.5)) == bool(sample["gradient"].any())
    assert {made.get(i)["t"] >= 500 for i in range(48)} == {True, False}


def test_two_processes_make_the_cache_of_one(cache, tmp_path):
    for rank in (0, 1):
        make(tmp_path, rank=rank, world_size=2)
    with pytest.raises(UserError, match=r"not complete: run the same prepare.py once more"):
        data.Cache(tmp_path)
    make(tmp_path)
    assert content(tmp_path) == content(cache)


def test_all_draws_of_a_clip_share_one_inversion(tmp_path, monkeypatch):
    calls, invert = [], prepare.ddim_invert
    monkeypatch.setattr(prepare, "ddim_invert", lambda *args: calls.append(args) or invert(*args))
    make(tmp_path, clips=4, draws=3)
    assert len(calls) == 4


def test_bad_clips_are_named_and_too_many_end_it(tmp_path, monkeypatch):
    def bad(index):
        raise data.BadClip(f"{index}.mp4", "it is bad")

    with pytest.raises(UserError, match="too many bad clips: 20 of 20; the last one: .*it is bad"):
        make(tmp_path, before=bad)
    assert len((tmp_path / "bad_clips.jsonl").read_text().splitlines()) == 20
    make(tmp_path, clips=24, before=lambda index: bad(index) if index == 5 else None)
    made = data.Cache(tmp_path)
    assert 0 < 48 - len(made) <= 4 and made.get(len(made) - 1)["z_t"].any()

    monkeypatch.setattr(Clips, "__len__", lambda self: 400)
    monkeypatch.setattr(prepare, "prepare_clip", lambda *args: dict(t=torch.zeros(1), c=torch.zeros(1)))
    for _ in range(2):                                      # 4 % are not too many, nor when it goes on
        make(tmp_path / "many", clips=800, before=lambda index: bad(index) if index % 26 == 0 else None)


def test_the_command_makes_a_cache_killed_or_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_models", lambda config, device: networks())
    monkeypatch.setattr(train.shapes, "Clips", lambda **size: Clips())
    monkeypatch.setitem(train.PRESETS, "shapes-v2", train.PRESETS["shapes-v2"] | SMALL)
    argv = [*V2, "--clips", "6", "--draws", "2", "--out"]
    prepare.main([*argv, str(tmp_path / "whole")])
    assert "6 of 6 clips" in capsys.readouterr().out
    header = json.loads((tmp_path / "whole" / "header.json").read_text())
    assert header["grid"] == 50 and header["inversion_steps"] == 5 and header["complete"]

    Clips.on_get = staticmethod(lambda index: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="143"):
            prepare.main([*argv, str(tmp_path / "stopped")])
    finally:
        Clips.on_get = staticmethod(lambda index: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    assert len(data.clip_files(tmp_path / "stopped")) == 1
    assert "stopped by a signal" in capsys.readouterr().err
    prepare.main([*argv, str(tmp_path / "stopped")])
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    with pytest.raises(SystemExit):
        prepare.main([*V2, "--clips", "8", "--draws", "2", "--out", str(tmp_path / "whole")])
    assert "was made with clips = 6, not 8" in capsys.readouterr().err


def test_preparing_killed_at_random_moments_is_preparing_undisturbed(tmp_path):
    rng, folder = random.Random(0), tmp_path / "killed"
    make(tmp_path / "whole", clips=16)
    fork = torch.multiprocessing.get_context("fork")
    for files in (1, 4, 9):
        process = fork.Process(target=make, args=(folder,), kwargs=dict(clips=16))
        process.start()
        while process.is_alive() and len(data.clip_files(folder)) < files:
            time.sleep(0.01)
        time.sleep(0.1 * rng.random())
        process.kill()
        process.join()
    make(folder, clips=16)
    assert content(folder) == content(tmp_path / "whole")


# ---- Algorithm 2 -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [4, 0])
def test_one_process_and_two_killed_or_not_train_the_same_student(cache, tmp_path, lora):
    """Killed in step 3 and resumed: bit by bit the run undisturbed; one and two processes to rounding."""
    options = (*V2, "--data", cache, "--save-every", 1, "--lora", lora, "--micro-batch", 2)
    for world in (1, 2):
        whole, killed = tmp_path / f"whole-{world}", tmp_path / f"killed-{world}"
        assert run(whole, *options, world=world)[0] == 0
        assert run(killed, *options, world=world, before=killed_in_step_3)[0] == -signal.SIGKILL
        assert last(killed)["step"] == 2
        assert run(killed, *options, "--resume", "auto", world=world)[0] == 0
        assert same(last(killed), last(whole)) and log(killed) == log(whole)
    assert same(log(tmp_path / "whole-1"), log(tmp_path / "whole-2"), near=2e-4)
    one, two = (torch.cat([entry["exp_avg"].flatten() for entry in last(tmp_path / f"whole-{world}")
                           ["optimizer"]["state"].values()]) for world in (1, 2))
    assert (one - two).norm() < 1e-4 * one.norm()           # of the gradients; Adam's steps are their signs


def killed_in_step_3(rank):
    gradients = train.CachedTrainer.gradients

    def until_killed(self, *batch):
        if self.done == 2:
            die()
        return gradients(self, *batch)

    train.CachedTrainer.gradients = until_killed


def trainer(cache, *argv, **recipe):
    config = configure(*V2, "--data", cache, *argv, **recipe)
    models, clips, terms = tiny.load_world(config, Group())
    return train.CachedTrainer(config, models, terms, Group()), clips


def first_batch(made, clips):
    return next(train.batches_of(made, clips, None))


def test_the_strength_of_guidance_is_an_input_of_the_student(cache, monkeypatch):
    made, clips = trainer(cache, "--motion", "0.05")
    inputs, forward = [], made.models.unet.forward

    def listening(z, t, c, w=None, fps=None, motion=None):
        inputs.extend(zip(t.tolist(), motion.tolist()))
        return forward(z, t, c, w=w, fps=fps, motion=motion)

    monkeypatch.setattr(made.models.unet, "forward", listening)
    made.step(first_batch(made, clips))
    assert all(motion == (pytest.approx(0.05) if t >= 500 else 0) for t, motion in inputs)
    assert {t >= 500 for t, _ in inputs} == {True, False}
    header = train.header(made)
    assert (header["method"], header["motion"], header["motion_share"]) == ("turbo-v2", 0.05, 0.5)


def test_without_motion_guidance_from_the_same_cache(cache):
    made, clips = trainer(cache, "--motion", "0")
    assert not hasattr(made.models.unet, "motion_cond_proj") and train.header(made)["motion"] is None
    record = made.step(first_batch(made, clips))
    assert record["loss_cd"] > 0 and record["image"] > 0


def test_the_gradient_is_that_of_both_streams(cache):
    """A step's gradient: L_CD of the first stream less β times the rewards of the second, nothing else."""
    both, clips = trainer(cache)
    batch = first_batch(both, clips)
    gradients = []
    for select in (lambda: both.gradients(batch),
                   lambda: [both.distill(*some) for some in both.micro_batches(batch["distill"], 6)],
                   lambda: [both.reward(*some) for some in both.micro_batches(batch["rewards"], 2)]):
        both.gradient.zero_()
        select()
        gradients.append(both.gradient.clone())
    whole, *parts = gradients
    assert all(part.any() for part in parts)
    assert torch.allclose(whole, sum(parts), rtol=1e-4, atol=1e-7)


def test_rewards_see_the_clips_that_carry_them_and_nothing_is_read_without_rewards(cache):
    made, clips = trainer(cache)
    batches = list(itertools.islice(train.batches_of(made, clips, None), 8))
    assert all(batch["rewards"]["rewards"].all() for batch in batches)
    assert not all(batch["distill"]["rewards"].all() for batch in batches)
    made, clips = trainer(cache, reward=())
    assert "rewards" not in first_batch(made, clips)


def test_a_cache_of_other_options_or_another_teacher_is_refused(cache, monkeypatch):
    with pytest.raises(UserError, match="was made with grid = 50, not 40"):
        trainer(cache, grid=40)
    monkeypatch.setattr(train, "load_models", lambda config, device: networks(seed=1))
    monkeypatch.setattr(train, "reward_terms", lambda config, load: [])
    with pytest.raises(UserError, match="was made by another teacher"):
        train.load_world(configure(*V2, "--data", cache), Group())
    with pytest.raises(UserError, match="v2 trains from one cache"):
        train.check_files(configure(*V2))


def test_the_motion_gradient_by_its_program(capsys):
    """tests/motion.py in little: all cells are there."""
    motion.main(["--clips", "2", "--grid", "2", "--inversion-steps", "1", "--motion", "0.5",
                 "--transfers", "1", "--steps", "2"])
    titles, _, row, _, travel, *_, transfer = capsys.readouterr().out.splitlines()
    assert row.startswith("| 999 | ") and row.count("|") == titles.count("|") == 11
    assert travel.startswith("Things go ") and transfer.startswith("| 0.5 | ")


def test_the_command_prepares_the_toys_cache_as_a_user_types_it(tmp_path):
    """With the embedded teacher and the preset's own options, but for the number of clips."""
    prepare.main([*V2, "--clips", "2", "--draws", "1", "--out", str(tmp_path / "cache")])
    samples = data.Cache(tmp_path / "cache", train.cache_header(train.configure([*V2])))
    assert len(samples) == 2 and samples.get(0)["z_t"].shape == (8, 8, 8, 8)
