"""A run that is killed and resumed is the run that was not killed; and what was saved stays whole."""
import functools
import json
import multiprocessing
import os
import pty
import random
import resource
import shutil
import signal
import socket
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
import torch.distributed.run as torchrun_itself
from safetensors.torch import load_file

import train
from plumbing import folder
from plumbing.files import atomic
from plumbing.folder import checkpoints
from plumbing.run import attempt

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*words):
    """The command line of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, words)]


def wait_for_a_step(out, processes):
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        time.sleep(0.05)
        assert all(process.is_alive() for process in processes)


def half_a_file(path):
    """Dies while it writes."""
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text("hal")
        tiny.die()


def killed_at(position, out):
    """The process that reads the clip at this position of the run dies of it, once the first one has saved
    what was before."""
    def before(rank):
        def on_get(index):
            if next(count) == position:
                end = time.monotonic() + 20
                while not checkpoints(out) and time.monotonic() < end:
                    time.sleep(0.01)
                tiny.die()

        count = iter(range(10 ** 6))
        tiny.Clips.on_get = staticmethod(on_get)
    return before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(*options, world=1) -> folder of a run with these options, made once; not to be changed."""
    @functools.cache
    def folder_of(*options, world=1):
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        code, text = tiny.run(out, *options, world=world)
        assert code == 0, text
        return out
    return folder_of


@pytest.fixture
def two_steps(undisturbed, tmp_path):
    """two_steps(name) -> folder tmp_path/name with a run of two steps."""
    return lambda name: shutil.copytree(undisturbed("--steps", 2), tmp_path / name)


@pytest.mark.parametrize("world, options", [
    (1, []), (2, []), (1, ["--lora", 0, "--ema", 0]), (2, ["--lora", 0])])
def test_two_steps_a_kill_and_two_more_are_four_steps(undisturbed, tmp_path, world, options):
    one, two = undisturbed(*options, world=world), tmp_path / "two"
    before = killed_at(2 * 6 // world + 1, two)
    assert tiny.run(two, *options, world=world, before=before)[0] == -signal.SIGKILL
    assert tiny.last(two)["step"] == 2 and not (two / "turbo.safetensors").exists()
    code, text = tiny.run(two, *options, "--resume", "auto", world=world)
    assert code == 0, text
    assert tiny.last(one)["step"] == tiny.last(two)["step"] == 4
    assert tiny.same(tiny.last(one), tiny.last(two))  # weights, EMA, optimizer, counters
    assert tiny.log(one) == tiny.log(two) and len(tiny.log(one)) == 4
    assert tiny.same(load_file(one / "turbo.safetensors"), load_file(two / "turbo.safetensors"))


def test_killed_while_a_checkpoint_is_written(undisturbed, tmp_path):
    def before(rank):
        whole = torch.save

        def half(state, path):
            whole(state, path)
            if state["step"] == 4:
                os.truncate(path, path.stat().st_size // 2)
                tiny.die()
        torch.save = half

    assert tiny.run(tmp_path / "two", before=before)[0] == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["checkpoint-0000002.pt"]
    assert list((tmp_path / "two").glob(".*.part"))
    assert tiny.run(tmp_path / "two", "--resume", "auto")[0] == 0
    assert tiny.same(tiny.last(undisturbed()), tiny.last(tmp_path / "two"))
    assert not list((tmp_path / "two").glob(".*.part"))


@pytest.mark.parametrize("number, world", [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGHUP, 1)])
def test_a_signal_saves_and_ends(tmp_path, number, world):
    """Also if only one of the processes hears it."""
    def heard(rank):                                        # also where pytest itself ignores it (nohup)
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)

    endless = ("--steps", 10 ** 6, "--save-every", 10 ** 6)
    processes = tiny.start(tmp_path / "run", *endless, world=world, before=heard)
    wait_for_a_step(tmp_path / "run", processes)
    os.kill(processes[-1].pid, number)
    assert tiny.finish(processes)[-1] == 128 + number
    state = tiny.last(tmp_path / "run")
    assert state["step"] == len(tiny.log(tmp_path / "run")) >= 1
    assert "--resume auto" in Path(f"{tmp_path / 'run'}.txt").read_text()
    assert tiny.run(tmp_path / "run", "--resume", "auto", "--steps", state["step"] + 1, world=world)[0] == 0


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(two_steps, tmp_path):
    """A limit on the size of a file, reached by the second checkpoint only, stands in for the disk."""
    run = two_steps("run")
    size, before = checkpoints(run)[0].stat().st_size, tiny.last(run)

    def full(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, text = tiny.run(run, "--resume", "auto", before=full)
    assert code == 2 and "checkpoint-0000004.pt cannot be written" in text and "Traceback" not in text
    assert tiny.same(tiny.last(run), before) and not list(run.glob(".*.part"))
    assert tiny.run(run, "--resume", "auto")[0] == 0


def test_what_can_be_said_before_training_is_said_before(two_steps, tmp_path):
    (tmp_path / "file").write_text("")
    code, text = tiny.run(tmp_path / "a", "--out", tmp_path / "file" / "run")
    assert code == 2 and "cannot be made" in text and "Traceback" not in text

    def little(rank):
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)

    code, text = tiny.run(tmp_path / "b", before=little)
    assert code == 2 and "make room" in text and not (tmp_path / "b" / "log.jsonl").exists()

    two_steps("c")
    for options, told in (((), "--resume auto"), (("--resume", tmp_path / "c" / "x.pt"), "the last one is"),
                          (("--resume", "auto", "--batch", 4), "this run began with --batch 6")):
        code, text = tiny.run(tmp_path / "c", "--steps", 3, *options)
        assert code == 2 and told in text.splitlines()[-1] and "Traceback" not in text


def test_a_restart_goes_on_with_its_own_run_only(two_steps):
    """torchrun counts its attempts; the first may have been refused a folder that holds an older run."""
    def second_attempt(rank):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    run = two_steps("run")
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
    assert [path.name[-4:-3] for path in checkpoints(run)] == ["2", "4", "6"]
    options = ["--steps", 4, "--resume", run / "checkpoint-0000002.pt", "--lr", 1, "--lr-fall", 0.5,
               "--keep", 1]
    assert tiny.run(run, *options)[0] == 0
    assert [path.name[-4:-3] for path in checkpoints(run)] == ["4"]
    assert [line["lr"] for line in tiny.log(run)] == [1e-4, 1e-4, 1.0, 0.5]
    assert tiny.last(run)["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_copies_of_checkpoints_are_nobodys(two_steps):
    """Names that only begin like a checkpoint's are neither resumed nor deleted."""
    run = two_steps("run")
    copies = [run / "checkpoint-best.pt", run / "checkpoint-0000004 (copy).pt", run / "checkpoint-9.pt"]
    for copy in copies:
        shutil.copy(run / "checkpoint-0000002.pt", copy)
    assert tiny.run(run, "--resume", "auto", "--keep", 1)[0] == 0
    assert [path.name for path in checkpoints(run)] == ["checkpoint-0000004.pt"]
    assert all(copy.exists() for copy in copies)


def test_options_of_the_whole_run_do_not_change(undisturbed, tmp_path):
    """On resume; steps, learning rate and the like may, see the tests above."""
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    weights = (run / "turbo.safetensors").stat()
    for options, told in {
        ("--steps", 2): "checkpoint-0000004.pt is at step 4, past --steps 2",
        ("--w-max", 14): "this run began with --w-max 15.0, not 14.0",
        ("--image-weight", 2): "this run began with --image-weight 1.0, not 2.0",
        ("--image-frames", 1): "this run began with --image-frames 2, not 1",
        ("--clip", 2): "this run began with --clip 1.0, not 2.0",
        ("--dtype", "bfloat16"): "this run began with --dtype float32, not bfloat16",
        ("--fps", 9): "this run began with --fps 8, not 9",
        ("--reward", "shapes-clip:3", "--reward", "shapes-viclip"):
            "the rewards shapes-clip (1), shapes-viclip (2), not shapes-clip (3), shapes-viclip (2)",
    }.items():
        code, text = tiny.run(run, "--steps", 5, *options, "--resume", "auto")
        assert code == 2 and told in text.splitlines()[-1] and "Traceback" not in text
    assert (run / "turbo.safetensors").stat() == weights


def test_a_checkpoint_in_another_folder(undisturbed, tmp_path):
    """It begins a log of its own there, and spares what another run has saved."""
    first, fresh, other = undisturbed(), tmp_path / "fresh", tmp_path / "other"
    assert tiny.run(other, "--steps", 2, "--seed", 1)[0] == 0
    fresh.mkdir()
    (fresh / "log.jsonl").write_text('{"step": 1, "loss": 0}\n')       # of a run that left no checkpoint
    argv = ["--steps", 6, "--resume", first / "checkpoint-0000004.pt"]
    assert tiny.run(fresh, *argv)[0] == 0
    assert [line["step"] for line in tiny.log(fresh)] == [4, 5, 6]
    assert tiny.log(fresh)[0] == tiny.log(first)[-1]
    code, text = tiny.run(other, *argv)
    assert code == 2 and "holds checkpoint-0000002.pt of another run" in text.splitlines()[-1]
    assert [path.name for path in checkpoints(other)] == ["checkpoint-0000002.pt"]

    def second_attempt(rank):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    assert tiny.run(fresh, *argv[2:], "--steps", 7, before=second_attempt)[0] == 0
    # from its own last one, not from --resume
    assert [line["step"] for line in tiny.log(fresh)] == [4, 5, 6, 7]


def test_what_a_kill_leaves_is_cleaned_up(undisturbed, two_steps):
    """Half a line in the log, and files that were being written."""
    one, two = undisturbed(), two_steps("two")
    with open(two / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    for name in ("turbo.safetensors", "samples/step-000002-0.gif"):
        process = multiprocessing.get_context("fork").Process(target=half_a_file, args=(two / name,))
        process.start()
        process.join()
    assert len(list(two.rglob(".*.part"))) == 2
    assert tiny.run(two, "--resume", "auto")[0] == 0
    assert tiny.log(one) == tiny.log(two) and not list(two.rglob(".*.part"))


def test_samples_come_after_the_checkpoint(tmp_path):
    """A failure in what is optional costs no step; the next start makes the samples and the log's line."""
    one, two = tmp_path / "one", tmp_path / "two"

    def fails(rank):
        def write_video(*args):
            raise ValueError("no room for samples")
        train.video.write_video = write_video

    options = ["--sample-every", 2]
    assert tiny.run(one, *options)[0] == 0
    code, text = tiny.run(two, *options, before=fails)
    assert code == 2 and text.splitlines()[-1] == "train.py: no room for samples"
    assert tiny.last(two)["step"] == 2 and len(tiny.log(two)) == 1
    assert tiny.run(two, *options, "--resume", "auto")[0] == 0
    assert tiny.log(one) == tiny.log(two)
    assert [line.get("oracle") for line in tiny.log(two)] == [None, 0.5, None, 0.5]
    assert len(list((two / "samples").iterdir())) == 4


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused in one line; a killed run's lock is taken over."""
    run, options = tmp_path / "run", ["--steps", 10 ** 6, "--save-every", 10 ** 6, "--resume", "auto"]
    first, = tiny.start(run, *options)
    wait_for_a_step(run, [first])
    code, text = tiny.run(tmp_path / "second", "--out", run, "--resume", "auto")
    holder = f"process {first.pid} on {socket.gethostname()}"
    told = f"train.py: {run} is in use by {holder}; wait until it ends, or choose another --out"
    assert code == 2 and text.strip() == told
    assert first.is_alive()
    first.kill()
    first.join()
    assert tiny.run(run, "--resume", "auto", "--steps", 1)[0] == 0


def test_a_lock_of_another_machine(tmp_path, monkeypatch):
    """Whose processes cannot be seen from here: it counts as long as its heartbeat goes on. The watch's own
    pauses are the other machine's clock, so that nothing depends on how fast this one is."""
    path, pauses = tmp_path / "lock", []

    def other_machine(beat):
        path.write_text(json.dumps(dict(host="elsewhere", process=7, beat=beat)))

    def pause(seconds):
        pauses.append(seconds)
        if beating and len(pauses) == 15:
            other_machine(beat=4)

    monkeypatch.setattr(time, "sleep", pause)
    other_machine(beat=3)
    beating = True
    with pytest.raises(ValueError, match="is in use by process 7 on elsewhere; wait until it ends"):
        folder.Lock(tmp_path).__enter__()
    assert len(pauses) == 15                                            # it does not wait for the rest

    beating = False
    pauses.clear()
    with folder.Lock(tmp_path):                                         # dead
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert path.read_text() == "" and sum(pauses) == pytest.approx(folder.WATCH)


BROKEN = {
    "empty": (b"", "is no checkpoint, or a damaged one (0 bytes)"),
    "text": (b"hello", "is no checkpoint, or a damaged one (5 bytes)"),
    "cut": (None, "is no checkpoint, or a damaged one"),
    "list": ([1, 2], "is no checkpoint of train.py"),
    "tensor": (torch.zeros(2), "is no checkpoint of train.py"),
    "foreign": ({"state_dict": {}}, "is no checkpoint of train.py"),
    "older": ({"step": 2, "config": {}}, "is no checkpoint of train.py"),
    "odd": (dict.fromkeys(folder.CONTENT, "x"), "is no checkpoint of train.py"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_ends_in_one_line(tmp_path, name):
    content, told = BROKEN[name]
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"state": torch.zeros(1000)} if content is None else content, path)
    if content is None:
        os.truncate(path, 2000)
    with pytest.raises(ValueError) as error:
        folder.read_checkpoint(path)
    assert str(error.value).startswith(f"{path} {told}") and "\n" not in str(error.value)


def test_one_wrong_bit_in_a_checkpoint_is_noticed(tmp_path):
    """torch.load takes it for a weight: the run would go on with another network."""
    path, value = tmp_path / "x.pt", torch.tensor([1.25, 3.5])
    torch.save(dict(config={}, step=1, steps_skipped=0, clips_skipped=0, ema=[], optimizer={"state": {}},
                    params={"w": value}), path)
    assert folder.read_checkpoint(path)["params"]["w"].tolist() == [1.25, 3.5]
    content = bytearray(path.read_bytes())
    content[content.index(value.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pt is no checkpoint, or a damaged one"):
        folder.read_checkpoint(path)


def test_checkpoints_are_mapped_not_read(tmp_path):
    """22 GB of a full fine-tuning, times the processes of a machine, need not fit its memory."""
    torch.save(dict(config={}, step=1, steps_skipped=0, clips_skipped=0, ema=[], optimizer={"state": {}},
                    params={"w": torch.ones(2 ** 25)}), tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = folder.read_checkpoint(tmp_path / "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 16  # KiB; the file has 2 ** 17
    assert state["params"]["w"][-1] == 1


def test_a_checkpoint_of_the_first_version_is_resumed(undisturbed, two_steps):
    """Without a record, and with options that it did not know."""
    run = two_steps("run")
    state = tiny.last(run)
    del state["record"], state["config"]["device"]
    state["config"]["reward"] = ("hpsv2", "internvideo2")               # the toy did not look at it
    torch.save(state, run / "checkpoint-0000002.pt")
    assert tiny.run(run, "--resume", "auto")[0] == 0
    assert tiny.same(tiny.last(run)["params"], tiny.last(undisturbed())["params"])


def test_all_processes_go_on_from_the_same_step(tmp_path):
    """Nodes that do not share OUT may find another checkpoint under the same name."""
    assert tiny.run(tmp_path / "run", "--steps", 2, world=2)[0] == 0

    def before(rank):
        read = train.read_checkpoint
        train.read_checkpoint = lambda path: read(path) | {"step": 2 - rank}

    code, text = tiny.run(tmp_path / "run", "--resume", "auto", world=2, before=before)
    assert code == 2 and "the processes go on from different steps (2, 1); all nodes must share" in text


def test_a_closed_terminal_saves_and_ends(tmp_path):
    """SIGHUP, after which the terminal cannot be written to."""
    run, options = tmp_path / "run", [f"--out={tmp_path / 'run'}", "--steps=1000000", "--save-every=1000000"]
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"PYTHONPATH": str(ROOT), "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
        signal.signal(signal.SIGHUP, signal.SIG_DFL)            # also where pytest itself ignores it (nohup)
        os.execv(sys.executable, [sys.executable, str(ROOT / "tests" / "tiny.py"), *options])
    os.set_blocking(terminal, False)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert tiny.last(run)["step"] == len(tiny.log(run)) >= 1


def test_processes_meet_their_own_attempt_only():
    """The store outlives attempts: one of a second process alone; one; one with a late second."""
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


def test_torchrun_restarts_from_the_last_checkpoint_by_itself(undisturbed, tmp_path):
    """One of two processes dies in step 4 of the first attempt; torchrun ends the other and starts again."""
    words = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=run", "--nproc-per-node=2",
             "--max-restarts=1", "--monitor-interval=0.1", "tiny.py"]

    def agent():
        sys.argv[1:], os.environ["CRASH"] = ["--out", str(tmp_path / "two")], str(3 * 3 + 1)
        config, *_ = torchrun_itself.config_from_args(torchrun_itself.parse_args(words))
        config.start_method = "fork"                        # in place of four starts of Python and PyTorch
        torchrun_itself.elastic_launch(config, tiny.program)()

    process = multiprocessing.get_context("fork").Process(target=agent)
    process.start()
    process.join(600)
    assert process.exitcode == 0
    one, two = undisturbed(world=2), tmp_path / "two"
    assert tiny.same(tiny.last(one), tiny.last(two)) and tiny.log(one) == tiny.log(two)


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
        saved = checkpoints(tmp_path / "two")
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
    run = tmp_path / "run"
    command = torchrun("--standalone", "--nproc_per_node=2", ROOT / "tests" / "tiny.py", "--out", run,
                       "--steps", 10 ** 6, "--save-every", 10 ** 6, "--workers", 2)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, number)  # Ctrl-C reaches the whole group of the terminal
    _, text = process.communicate(timeout=120)
    assert "stopped by a signal, and saved" in text
    assert tiny.last(run)["step"] == len(tiny.log(run)) >= 1


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two torchruns of one process each, which meet by torchrun's own arguments, are two processes of one."""
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", "--master_port=29437"]
    program = [ROOT / "tests" / "tiny.py", "--out", tmp_path / "nodes"]
    nodes = [subprocess.Popen(torchrun(*meeting, f"--node_rank={node}", *program), env=ENVIRONMENT,
                              stderr=subprocess.PIPE, text=True) for node in range(2)]
    texts = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert tiny.run(tmp_path / "one", world=2)[0] == 0
    assert tiny.same(tiny.last(tmp_path / "one"), tiny.last(tmp_path / "nodes"))
