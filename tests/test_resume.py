"""A run that is killed, and then resumed, is the run that was not killed; and what was saved stays whole, whatever happens."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from plumbing.run import attempt

ROOT = Path(__file__).parent.parent


def killed_at(position):
    """The process that reads the clip at this position of the run dies of it."""
    def before(rank):
        count = iter(range(10 ** 6))
        tiny.Clips.on_get = staticmethod(lambda index: next(count) == position and tiny.die())
    return before


@pytest.mark.parametrize("world, options", [(1, []), (2, []), (1, ["--lora", 0, "--ema", 0]), (2, ["--lora", 0])])
def test_two_steps_a_kill_and_two_more_are_four_steps(tmp_path, world, options):
    one, two = tmp_path / "one", tmp_path / "two"
    assert tiny.run(one, *options, world=world)[0] == 0
    assert tiny.run(two, *options, world=world, before=killed_at(2 * 6 // world + 1))[0] == -signal.SIGKILL
    assert tiny.last(two)["step"] == 2 and not (two / "turbo.safetensors").exists()
    code, text = tiny.run(two, *options, "--resume", "auto", world=world)
    assert code == 0, text
    assert tiny.last(one)["step"] == tiny.last(two)["step"] == 4
    assert tiny.same(tiny.last(one), tiny.last(two))                                 # weights, EMA, optimizer, counters
    assert tiny.log(one) == tiny.log(two) and len(tiny.log(one)) == 4
    assert tiny.same(load_file(one / "turbo.safetensors"), load_file(two / "turbo.safetensors"))


def test_killed_while_a_checkpoint_is_written(tmp_path):
    def before(rank):
        whole = torch.save

        def half(state, path):
            whole(state, path)
            if state["step"] == 4:
                os.truncate(path, path.stat().st_size // 2)
                tiny.die()
        torch.save = half

    assert tiny.run(tmp_path / "one")[0] == 0
    assert tiny.run(tmp_path / "two", before=before)[0] == -signal.SIGKILL
    assert [path.name for path in train.checkpoints(tmp_path / "two")] == ["checkpoint-0000002.pt"]
    assert list((tmp_path / "two").glob("*.tmp"))
    assert tiny.run(tmp_path / "two", "--resume", "auto")[0] == 0
    assert tiny.same(tiny.last(tmp_path / "one"), tiny.last(tmp_path / "two"))
    assert not list((tmp_path / "two").glob("*.tmp"))


@pytest.mark.parametrize("number, world", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_saves_and_ends(tmp_path, number, world):
    """Also if only one of the processes hears it."""
    processes = tiny.start(tmp_path / "run", "--steps", 10 ** 6, "--save-every", 10 ** 6, world=world)
    while not (tmp_path / "run" / "log.jsonl").exists() or not (tmp_path / "run" / "log.jsonl").read_text():
        time.sleep(0.05)
        assert all(process.is_alive() for process in processes)
    os.kill(processes[-1].pid, number)
    assert tiny.finish(processes)[-1] == 128 + number
    state = tiny.last(tmp_path / "run")
    assert state["step"] == len(tiny.log(tmp_path / "run")) >= 1
    assert "--resume auto" in Path(f"{tmp_path / 'run'}.txt").read_text()
    assert tiny.run(tmp_path / "run", "--resume", "auto", "--steps", state["step"] + 1, world=world)[0] == 0


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path):
    """A limit on the size of a file, reached by the second checkpoint only, stands in for the disk."""
    assert tiny.run(tmp_path / "run", "--steps", 2)[0] == 0
    size, before = train.checkpoints(tmp_path / "run")[0].stat().st_size, tiny.last(tmp_path / "run")

    def full(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, text = tiny.run(tmp_path / "run", "--resume", "auto", before=full)
    assert code == 2 and "checkpoint-0000004.pt cannot be written" in text and "Traceback" not in text
    assert tiny.same(tiny.last(tmp_path / "run"), before) and not list((tmp_path / "run").glob("*.tmp"))
    assert tiny.run(tmp_path / "run", "--resume", "auto")[0] == 0


def test_what_can_be_said_before_training_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    code, text = tiny.run(tmp_path / "a", "--out", tmp_path / "file" / "run")
    assert code == 2 and "cannot be made" in text and "Traceback" not in text

    def little(rank):
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)

    code, text = tiny.run(tmp_path / "b", before=little)
    assert code == 2 and "make room" in text and not (tmp_path / "b" / "log.jsonl").exists()

    assert tiny.run(tmp_path / "c", "--steps", 2)[0] == 0
    for options, told in (((), "--resume auto"), (("--resume", tmp_path / "c" / "x.pt"), "the last one is"),
                          (("--resume", "auto", "--batch", 4), "this run began with --batch 6")):
        code, text = tiny.run(tmp_path / "c", "--steps", 3, *options)
        assert code == 2 and told in text.splitlines()[-1] and "Traceback" not in text


def test_a_restart_goes_on_with_its_own_run_only(tmp_path):
    """torchrun counts its attempts, but the first of them may have been refused a folder that holds an older run."""
    def second_attempt(rank):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    run = tmp_path / "run"
    assert tiny.run(run, "--steps", 2)[0] == 0
    settings = json.loads((run / "config.json").read_text())
    assert settings["launcher"] == os.getpid()
    (run / "config.json").write_text(json.dumps(settings | {"launcher": 1}))
    code, text = tiny.run(run, "--steps", 3, before=second_attempt)
    assert code == 2 and "--resume auto" in text
    (run / "config.json").write_text(json.dumps(settings))
    assert tiny.run(run, "--steps", 3, before=second_attempt)[0] == 0 and len(tiny.log(run)) == 3


def test_an_older_checkpoint_begins_another_future(tmp_path):
    run = tmp_path / "run"
    assert tiny.run(run, "--steps", 6, "--keep", 3)[0] == 0
    assert [path.name[-4:-3] for path in train.checkpoints(run)] == ["2", "4", "6"]
    assert tiny.run(run, "--steps", 4, "--resume", run / "checkpoint-0000002.pt", "--lr", 1, "--keep", 1)[0] == 0
    assert [path.name[-4:-3] for path in train.checkpoints(run)] == ["4"]
    assert [line["lr"] for line in tiny.log(run)] == [1e-4, 1e-4, 1.0, 1.0]
    assert tiny.last(run)["optimizer"]["param_groups"][0]["lr"] == 1


def test_processes_meet_their_own_attempt_only():
    """The store outlives the attempts: one whose second process alone came, and died; one; one with a late second."""
    store, names = dist.HashStore(), []
    store.set("here 1", "dead")

    def come(rank, late=0):
        time.sleep(late)
        names.append(attempt(store, rank, 2))

    for late in (0, 0.3):
        both = [threading.Thread(target=come, args=(0,)), threading.Thread(target=come, args=(1, late))]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(20)
    assert len(names) == 4 and names[0] == names[1] != names[2] == names[3]


def test_torchrun_restarts_from_the_last_checkpoint_by_itself(tmp_path):
    """One of two processes dies in step 4 of the first attempt; torchrun ends the other and starts again, once."""
    environment = os.environ | {"CRASH": str(3 * 3 + 1), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
                                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
               "--monitor-interval=0.1", ROOT / "tests" / "tiny.py", "--out", tmp_path / "two"]
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert tiny.run(tmp_path / "one", world=2)[0] == 0
    assert tiny.same(tiny.last(tmp_path / "one"), tiny.last(tmp_path / "two"))
    assert tiny.log(tmp_path / "one") == tiny.log(tmp_path / "two")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    options = ["--steps", 60, "--save-every", 1, "--sample-every", 20]
    start = time.time()
    assert tiny.run(tmp_path / "one", *options)[0] == 0
    whole, kills, before = time.time() - start, 0, 0
    random.seed(0)
    while kills < 20:
        process, = tiny.start(tmp_path / "two", *options, "--resume", "auto")
        process.join(random.uniform(0.1, whole / 8))
        process.kill()
        process.join()
        kills += 1
        saved = train.checkpoints(tmp_path / "two")
        now = tiny.last(tmp_path / "two")["step"] if saved else 0
        assert now >= before and len(saved) <= 3                        # loads, and nothing saved was lost
        before = now
    assert tiny.run(tmp_path / "two", *options, "--resume", "auto")[0] == 0
    assert tiny.same(tiny.last(tmp_path / "one"), tiny.last(tmp_path / "two"))
    assert tiny.log(tmp_path / "one") == tiny.log(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_all_is_saved(tmp_path, number):
    """Also with workers that decode, to whom torchrun sends the signal as well."""
    run, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tests" / "tiny.py",
               "--out", run, "--steps", 10 ** 6, "--save-every", 10 ** 6, "--workers", 2]
    process = subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, number)                                      # Ctrl-C reaches the whole group of the terminal
    _, text = process.communicate(timeout=120)
    assert "stopped by a signal, and saved" in text
    assert tiny.last(run)["step"] == len(tiny.log(run)) >= 1


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two torchruns of one process each, which meet by torchrun's own arguments, are two processes of one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([str(word) for word in (
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1",
        "--master_addr=127.0.0.1", "--master_port=29437", ROOT / "tests" / "tiny.py", "--out", tmp_path / "nodes")],
        env=environment, stderr=subprocess.PIPE, text=True) for node in range(2)]
    texts = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert tiny.run(tmp_path / "one", world=2)[0] == 0
    assert tiny.same(tiny.last(tmp_path / "one"), tiny.last(tmp_path / "nodes"))
