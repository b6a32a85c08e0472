"""T2V-Turbo-v2 in the tiny world: any number of processes makes the same cache; training from it is exact."""
import json
import os
import random
import signal
import time
from datetime import timedelta
from functools import partial

import motion
import pytest
import tiny
import torch
from oracles import sizes
from tiny import MOTION, Clips, configure, die, last, log, run, same, start, unsharded

import data
import plumbing.run
import prepare
import train
from plumbing.run import Group

PLAN = prepare.Plan(grid=50, draws=2, inversion_steps=10, motion_share=0.5, fps=8, seed=0, micro=4)
V2 = ("--preset", "shapes-v2")
networks = partial(tiny.networks, unet=MOTION)


def make(folder, plan=PLAN, rank=0, world=1, clips=24, networks=networks):
    """Algorithm 1 on tiny networks, by one of `world` processes."""
    models = networks()
    models.unet.requires_grad_(False)
    chosen = prepare.Chosen([Clips(), Clips()], clips, plan.seed)
    config = configure(*V2)
    header = train.expected(config) | {
        "teacher": prepare.teacher_identity(models), "teacher_file": "tiny", "clips": clips,
        "draws": plan.draws, "motion_share": plan.motion_share}
    writer = data.CacheWriter(folder, header, rank, world)
    return prepare.prepare(plan, models, chosen, writer, Group())


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2") / "cache"
    make(folder)
    return folder


# ---- Algorithm 1 -------------------------------------------------------------------------------------------


def test_a_sample_is_what_the_teacher_says(cache):
    models, schedule = networks(), train.Schedule(50)
    for index in (0, 7, 40):
        sample = data.Cache(cache).get(index)
        z_t, t = sample["z_t"].float()[None], torch.tensor([sample["t"]])
        c = models.text([sample["caption"]])
        with torch.no_grad():
            eps_c, eps_u = models.unet(z_t, t, c, fps=8), models.unet(z_t, t, models.text([""]), fps=8)
        assert torch.allclose(sample["eps_c"].float(), eps_c[0], atol=5e-3)          # float16
        assert torch.allclose(sample["eps_u"].float(), eps_u[0], atol=5e-3)
        assert sample["t"] in schedule.grid
        assert (sample["t"] >= 500) == bool(sample["gradient"].any())


def test_half_of_the_clips_carry_rewards(cache):
    whole = data.Cache(cache)
    assert len(whole) == 48 and whole.rewards.sum() == 24
    assert {whole.get(i)["source"] for i in range(len(whole)) if whole.rewards[i]} == {"reward_data"}
    sources = [(row["source"], row["source_index"]) for row in map(whole.get, range(0, 48, 2))]
    assert len(set(sources)) == 24, "no clip twice"


def test_two_processes_make_the_same_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(data.CacheWriter, "finish", lambda self: None)
    make(tmp_path, rank=1, world=2)
    monkeypatch.undo()
    make(tmp_path, rank=0, world=2)
    assert content(tmp_path) == content(cache)


def test_killed_and_resumed_it_is_the_same_cache(cache, tmp_path, monkeypatch):
    added, add = [], data.CacheWriter.add

    def until_killed(self, sample):
        added.append(sample)
        if len(added) == 37:
            raise KeyboardInterrupt
        add(self, sample)

    monkeypatch.setattr(data.CacheWriter, "add", until_killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    with pytest.raises(ValueError, match="not whole: go on with --prepare"):
        data.Cache(tmp_path)
    monkeypatch.undo()
    make(tmp_path)
    assert content(tmp_path) == content(cache)


def test_all_draws_of_a_clip_share_one_inversion(tmp_path, monkeypatch):
    calls, invert = [], prepare.ddim_invert

    def counted(schedule, eps_model, z0, wanted):
        calls.append(len(wanted))
        return invert(schedule, eps_model, z0, wanted)

    monkeypatch.setattr(prepare, "ddim_invert", counted)
    make(tmp_path, train.dataclasses.replace(PLAN, draws=3), clips=8)
    assert len(calls) == 2 and max(calls) <= 3, "one per four clips"


def test_a_clip_does_not_depend_on_those_beside_it(tmp_path):
    two_levels = partial(networks, unet=train.dataclasses.replace(MOTION, **sizes(32, (1, 2), 1, (0,))))
    for micro in (1, 4):
        plan = train.dataclasses.replace(PLAN, micro=micro)
        make(tmp_path / f"{micro}", plan, clips=12, networks=two_levels)
    one, four = data.Cache(tmp_path / "1"), data.Cache(tmp_path / "4")
    for index in range(len(one)):
        a, b = one.get(index), four.get(index)
        assert a["t"] == b["t"] and torch.equal(a["z_t"], b["z_t"])
        assert torch.allclose(a["gradient"].float(), b["gradient"].float(), rtol=2e-2, atol=1e-3)


TWENTY, SEVENTY = ((*V2, "--draws", 1, "--inversion-steps", 5, "--prepare-clips", clips, "--prepare")
                   for clips in (20, 70))


def in_the_tiny_world(rank):
    """For the command --prepare."""
    train.load_models = lambda config, device: networks()
    train.shapes.Clips = lambda **size: Clips()


def slow_second_process(rank):
    """It takes longer than collectives have patience."""
    in_the_tiny_world(rank)
    plumbing.run.PATIENCE = timedelta(seconds=8)
    if rank == 1:
        seen = []
        Clips.on_get = staticmethod(lambda index: seen.append(index) or len(seen) == 1 and time.sleep(11))


def test_two_processes_killed_at_random_moments_make_the_cache_of_one_undisturbed(tmp_path):
    rng = random.Random(0)
    assert run(tmp_path / "one", *SEVENTY, tmp_path / "whole", before=in_the_tiny_world)[0] == 0
    for shards in (1, 2, 3):
        processes = start(tmp_path / "two", *SEVENTY, tmp_path / "killed", world=2, before=in_the_tiny_world)
        while len(list(tmp_path.glob("killed/0*"))) < shards and any(p.is_alive() for p in processes):
            time.sleep(0.02)
        time.sleep(rng.random())
        for process in processes:
            process.kill()
            process.join()
    assert run(tmp_path / "two", *SEVENTY, tmp_path / "killed", world=2, before=in_the_tiny_world)[0] == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_who_is_through_waits_for_the_others_as_long_as_it_takes(tmp_path):
    code, text = run(tmp_path / "run", *TWENTY, tmp_path / "c", world=2, before=slow_second_process)
    assert code == 0 and "20 samples of 20 clips" in text, text


def test_a_signal_ends_preparing_also_for_who_is_through(tmp_path):
    processes = start(tmp_path / "run", *TWENTY, tmp_path / "c", world=2, before=slow_second_process)
    while not (tmp_path / "c" / "000000.safetensors").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.1)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    text = (tmp_path / "run.txt").read_text()
    assert "stopped by a signal" in text and "missing or damaged" not in text


# ---- Algorithm 2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [4, 0])
def test_one_process_and_two_killed_or_not_train_the_same_student(cache, tmp_path, lora):
    """Bit by bit, weights, moments and log, with as many threads per process: two processes that share the
    optimizer's state, and one that adds up as two do (--sums 2), each killed in step 3 and resumed; and two
    that hold the whole state each, undisturbed.

    Only to rounding agree, here as in v1 (test_any_split_of_the_batch_trains_the_same): one process without
    --sums 2, whose sum of four gradients is ((L_CD of the first half + of the second) + rewards of the
    first) + of the second, where two processes add both of each half first; other sizes of --micro; and more
    than two processes, whose all-reduce adds up in an order of its own.
    """
    options = (*V2, "--data", cache, "--save-every", 1, "--lora", lora, "--micro", 2)
    whole = tmp_path / "unsharded"
    assert run(whole, *options, world=2, before=unsharded)[0] == 0
    for world, sums in ((1, 2), (2, 1)):
        out, argv = tmp_path / str(world), (*options, "--sums", sums)
        assert run(out, *argv, world=world, before=killed_in_step_3)[0] == -signal.SIGKILL
        assert last(out)["step"] == 2
        assert run(out, *argv, "--resume", "auto", world=world)[0] == 0
        assert same(last(out), last(whole)) and log(out) == log(whole)


def killed_in_step_3(rank):
    gradients = train.CachedTrainer.gradients

    def until_killed(self, *batch):
        if self.done == 2:
            die()
        return gradients(self, *batch)

    train.CachedTrainer.gradients = until_killed


def trainer(cache, *argv):
    config = configure(*V2, "--data", cache, *argv)
    models, clips, terms = train.load_world(config, Group())
    return train.CachedTrainer(config, models, terms, Group()), clips


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch):
    monkeypatch.setattr(train, "load_world", tiny.load_world)


def first_batch(trainer, clips):
    return next(train.batches_of(trainer, clips, None))


def test_no_second_copy_of_the_weights(cache):
    made, _ = trainer(cache, "--lora", "0")
    assert made.teacher is made.student and made.ema is None


def test_the_student_is_told_the_strength_of_guidance(cache, monkeypatch):
    made, clips = trainer(cache, "--motion", "0.05")
    told = []
    forward = made.student.forward

    def listening(z, t, c, w=None, fps=None, motion=None):
        told.extend(zip(t.tolist(), motion.tolist()))
        return forward(z, t, c, w=w, fps=fps, motion=motion)

    made.student.forward = listening
    made.step(first_batch(made, clips))
    assert all(motion == (pytest.approx(0.05) if t >= 500 else 0) for t, motion in told)
    assert {t >= 500 for t, _ in told} == {True, False}

    header = train.header(made)
    assert (header["method"], header["motion"], header["motion_share"]) == ("turbo-v2", 0.05, 0.5)


def test_without_motion_guidance_from_the_same_cache(cache):
    made, clips = trainer(cache, "--motion", "0")
    assert not hasattr(made.student, "motion_cond_proj") and train.header(made)["motion"] is None
    record = made.step(first_batch(made, clips))
    assert record["loss_cd"] > 0 and record["image"] > 0


def test_the_gradient_is_that_of_both_streams(cache):
    """A step's gradient: L_CD of the first stream less β times the rewards of the second, nothing else."""
    both, clips = trainer(cache)
    batch = first_batch(both, clips)
    both.gradient.zero_()
    both.gradients(batch)
    whole = both.gradient.clone()

    alone = []
    for other in ("distill", "rewards"):
        both.gradient.zero_()
        for samples, positions in both.micro_batches(batch[other], 6 if other == "distill" else 2):
            (both.distill if other == "distill" else both.reward)(samples, positions)
        alone.append(both.gradient.clone())
    assert all(part.any() for part in alone)
    assert torch.allclose(whole, sum(alone), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("on, distilled, rewarded", [
    ("short", {True, False}, {True}), ("all", {True, False}, {True, False}), ("disjoint", {False}, {True})])
def test_which_clips_the_rewards_see(cache, on, distilled, rewarded):
    made, clips = trainer(cache, "--rewards-on", on)
    batches = train.batches_of(made, clips, None)
    seen = {"distill": set(), "rewards": set()}
    for _ in range(8):
        batch = next(batches)
        for stream, values in seen.items():
            values |= set(map(bool, batch[stream]["rewards"]))
    assert seen == {"distill": distilled, "rewards": rewarded}


@pytest.mark.parametrize("argv, message", [
    (("--grid", "40"), "was made with grid = 50, not 40"),
    (("--motion-share", "0.2"), "was made with motion_share = 0.5, not 0.2"),
])
def test_a_cache_of_other_options_is_refused(cache, argv, message):
    with pytest.raises(ValueError, match=message):
        trainer(cache, *argv)


def test_a_cache_of_another_teacher_is_refused(cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train, "load_models", lambda config, device: networks(seed=1))
    monkeypatch.setattr(train, "reward_terms", lambda config, load: [])
    with pytest.raises(ValueError, match="was made by another teacher"):
        train.load_world(configure(*V2, "--data", cache), Group())


def test_the_teacher_is_the_same_in_either_dtype():
    models = networks()
    before = prepare.teacher_identity(models)
    models.unet.to(torch.bfloat16)
    assert prepare.teacher_identity(models) == before


def test_options_of_v2_belong_to_v2():
    refused = partial(pytest.raises, ValueError)
    with refused(match="--draws has no effect here: it belongs to --prepare"):
        configure(*V2, "--data", "x", "--draws", "2")
    with refused(match="--motion has no effect here: it belongs to --preset turbo-v2"):
        configure("--preset", "shapes", "--motion", "0.1")
    with refused(match="v2 trains from a cache"):
        train.check_files(configure(*V2))


def test_preparing_by_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_models", lambda config, device: networks())
    monkeypatch.setattr(train.shapes, "Clips", lambda **size: Clips())
    train.main([*V2, *"--prepare-clips 6 --frames 4 --height 16 --width 16 --inversion-steps 5".split(),
                "--prepare", str(tmp_path / "c"), *"--video-frames 2 --image-frames 2".split()])
    assert "24 samples of 6 clips, 12 of them with rewards" in capsys.readouterr().out
    header = json.loads((tmp_path / "c" / "header.json").read_text())
    assert header["grid"] == 8 and header["inversion_steps"] == 5


def test_the_motion_gradient_by_its_program(capsys):
    """tests/motion.py in little: all cells are there; an inversion agrees with itself and not with a coarser
    one."""
    few = ["--clips", "1", "--grid", "2"]
    motion.main([*few, "--inversion-steps", "1", "--motion", "0.5"])
    titles, _, row, *_, travel = capsys.readouterr().out.splitlines()
    assert row.startswith("| 999 | ") and row.count("|") == titles.count("|") == 11
    assert travel.startswith("Things go ")

    motion.main([*few, "--inversion-steps", "2", "--coarser", "2", "--coarser", "1"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| 999 | +1.000, 1.00, 0% | ") and row.count("1.00, 0%") == 1
