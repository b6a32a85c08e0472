"""A run that is killed and resumed is the run that was not killed; and what was saved stays whole."""
import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed.run as torchrun_itself
from safetensors.torch import load_file

import train
from plumbing import folder
from plumbing.errors import UserError
from plumbing.folder import checkpoints
from plumbing.run import Group

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*words):
    """The command line of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, words)]


def wait_for_a_step(out, processes):
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        time.sleep(0.05)
        assert all(process.is_alive() for process in processes)


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
    return lambda name: shutil.copytree(undisturbed("--train-steps", 2), tmp_path / name)


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

    endless = ("--train-steps", 10 ** 6, "--save-every", 10 ** 6)
    processes = tiny.start(tmp_path / "run", *endless, world=world, before=heard)
    wait_for_a_step(tmp_path / "run", processes)
    os.kill(processes[-1].pid, number)
    assert tiny.finish(processes)[-1] == 128 + number
    state = tiny.last(tmp_path / "run")
    assert state["step"] == len(tiny.log(tmp_path / "run")) >= 1
    assert "--resume auto" in Path(f"{tmp_path / 'run'}.txt").read_text()
    more = ("--resume", "auto", "--train-steps", state["step"] + 1)
    assert tiny.run(tmp_path / "run", *more, world=world)[0] == 0


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


def test_an_older_checkpoint_begins_another_future(tmp_path):
    run = tmp_path / "run"
    assert tiny.run(run, "--train-steps", 6)[0] == 0
    assert [path.name[-4:-3] for path in checkpoints(run)] == ["4", "6"]
    options = ["--train-steps", 5, "--resume", run / "checkpoint-0000004.pt", "--lr", 1]
    assert tiny.run(run, *options, lr_fall=0.5)[0] == 0
    assert [path.name[-4:-3] for path in checkpoints(run)] == ["4", "5"]
    assert [line["lr"] for line in tiny.log(run)] == pytest.approx([1e-4] * 4 + [0.4])
    assert tiny.last(run)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.4)


def test_copies_of_checkpoints_are_nobodys(two_steps):
    """Names that only begin like a checkpoint's are neither resumed nor deleted."""
    run = two_steps("run")
    copies = [run / "checkpoint-best.pt", run / "checkpoint-0000004 (copy).pt", run / "checkpoint-9.pt"]
    for copy in copies:
        shutil.copy(run / "checkpoint-0000002.pt", copy)
    assert tiny.run(run, "--resume", "auto")[0] == 0
    assert [path.name[-4:-3] for path in checkpoints(run)] == ["2", "4"]
    assert all(copy.exists() for copy in copies)


def test_options_of_the_whole_run_do_not_change(undisturbed, tmp_path):
    """On resume; steps, learning rate and the like may, see the tests above. Nor does the teacher."""
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    weights = (run / "turbo.safetensors").stat()

    def another(**fingerprint):
        def before(rank):
            made = tiny.networks
            tiny.networks = lambda **options: SimpleNamespace(**vars(made(**options)) | fingerprint)
        return before

    for options, before, message in (
        (("--preset", "shapes"), None, "this run began with --preset shapes-vcm, not shapes"),
        (("--batch", 12), None, "this run began with --batch 6, not 12"),
        (("--reward", "shapes-clip:3", "--reward", "shapes-viclip"), None,
         "--reward shapes-clip:1 shapes-viclip:2, not shapes-clip:3 shapes-viclip:2"),
        ((), another(teacher="x"), "this run began with another --teacher"),
        ((), another(autoencoder="x"), "this run began with another --teacher"),
        (("--train-steps", 1), None, "this run has made 4 steps"),
    ):
        code, text = tiny.run(run, *options, "--resume", "auto", before=before)
        assert code == 2 and message in text.splitlines()[-1] and "Traceback" not in text
    assert (run / "turbo.safetensors").stat() == weights


def test_what_a_run_left_is_not_written_over(undisturbed, two_steps, tmp_path):
    """Without its checkpoints a run is not begun again onto its weights or its log."""
    for name, gone in (("whole", "checkpoint-*.pt"), ("log", "[ct][hu]*")):
        run = shutil.copytree(undisturbed(), tmp_path / name)
        for path in run.glob(gone):
            path.unlink()
        before = (run / "log.jsonl").read_text()
        for options in ((), ("--resume", "auto")):
            code, text = tiny.run(run, *options)
            assert code == 2 and "whose checkpoints are gone" in text.splitlines()[-1]
        assert (run / "log.jsonl").read_text() == before
    for name, text in (("log.jsonl", '{"step": 1}'), ("samples/step-000002-0.gif", "a holiday")):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / name).write_text(text)
        assert tiny.run(tmp_path / name)[0] == 2 and (tmp_path / name / name).read_text() == text
    run = two_steps("student")
    student = "--init", run / "turbo.safetensors", "--resume", "auto"
    for options, message in (((), "--resume auto"), (student, "an output never replaces an input")):
        code, text = tiny.run(run, *options)
        assert code == 2 and message in text.splitlines()[-1] and "Traceback" not in text


@pytest.mark.parametrize("stream", ["/dev/full", None])
def test_a_stderr_that_takes_nothing_ends_no_run(undisturbed, tmp_path, stream):
    command = [sys.executable, str(ROOT / "tests" / "tiny.py"), "--out", str(tmp_path / "run")]
    place = {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
    words = ["sh", "-c", f'exec "$@" 2>{stream or "&-"}', "sh", *command]
    assert subprocess.run(words, env=ENVIRONMENT | place, stdout=subprocess.DEVNULL).returncode == 0
    assert tiny.same(tiny.last(tmp_path / "run"), tiny.last(undisturbed()))


def test_a_checkpoint_in_another_folder(undisturbed, tmp_path):
    """It begins a log of its own there, and spares what another run has saved."""
    first, fresh, other = undisturbed(), tmp_path / "fresh", tmp_path / "other"
    assert tiny.run(other, "--train-steps", 2, "--seed", 1)[0] == 0
    fresh.mkdir()
    (fresh / "log.jsonl").write_text('{"step": 1, "memory_gib": 0}\n')         # of a run without a checkpoint
    argv = ["--train-steps", 6, "--resume", first / "checkpoint-0000004.pt"]
    assert tiny.run(fresh, *argv)[0] == 0
    assert [line["step"] for line in tiny.log(fresh)] == [4, 5, 6]
    assert tiny.log(fresh)[0] == tiny.log(first)[-1]
    code, text = tiny.run(other, *argv)
    assert code == 2 and f"{other} holds another run" in text.splitlines()[-1]
    assert [path.name for path in checkpoints(other)] == ["checkpoint-0000002.pt"]


def test_what_a_kill_leaves_is_cleaned_up(undisturbed, two_steps):
    """Half a line in the log, and files that were being written."""
    one, two = undisturbed(), two_steps("two")
    with open(two / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    (two / "samples").mkdir(exist_ok=True)
    leftovers = [two / ".turbo.safetensors.0123abcd.part", two / "samples/.step-0.gif.0123abcd.part"]
    for path in leftovers:
        path.touch()
    assert tiny.run(two, "--resume", "auto")[0] == 0
    assert tiny.log(one) == tiny.log(two) and not any(path.exists() for path in leftovers)


def test_samples_come_after_the_checkpoint(tmp_path):
    """A failure in what is optional costs no step; the next start makes the samples and the log's line."""
    one, two = tmp_path / "one", tmp_path / "two"

    def fails(rank):
        def write_video(*args):
            raise UserError("no room for samples")
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
    """The second is refused in one line; a killed run's lock is free."""
    run, options = tmp_path / "run", ["--train-steps", 10 ** 6, "--save-every", 10 ** 6, "--resume", "auto"]
    first, = tiny.start(run, *options)
    wait_for_a_step(run, [first])
    code, text = tiny.run(tmp_path / "second", "--out", run, "--resume", "auto")
    message = f"train.py: {run} is in use by another run; wait until it ends, or choose another --out"
    assert code == 2 and text.strip() == message
    assert first.is_alive()
    first.kill()
    first.join()
    assert tiny.run(run, *options[2:], "--train-steps", 1)[0] == 0


STATE = dict(settings={}, teacher="", step=1, params={"w": torch.tensor([1.25, 3.5])}, optimizer={})
BROKEN = {"empty": b"", "cut": STATE, "list": [1, 2], "foreign": {"state_dict": {}}, "flipped": STATE}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_ends_in_one_line(tmp_path, name):
    """Also one of which a bit is wrong, which torch.load takes for a weight."""
    path = tmp_path / "x.pt"
    if isinstance(BROKEN[name], bytes):
        path.write_bytes(BROKEN[name])
    else:
        torch.save(BROKEN[name], path)
    if name == "cut":
        os.truncate(path, path.stat().st_size - 100)
    if name == "flipped":
        content = bytearray(path.read_bytes())
        content[content.index(STATE["params"]["w"].numpy().tobytes())] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.pt is not a whole checkpoint of this program") as error:
        folder.read_checkpoint(path, Group())
    assert "\n" not in str(error.value)


def test_checkpoints_are_mapped_not_read(tmp_path):
    """22 GB of a full fine-tuning, times the processes of a machine, need not fit its memory."""
    torch.save(STATE | {"params": {"w": torch.ones(2 ** 25)}}, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rank1 = SimpleNamespace(rank=1, any=bool, broadcast=lambda step: step)
    state = folder.read_checkpoint(tmp_path / "x.pt", rank1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 16  # KiB; the file has 2 ** 17
    assert state["params"]["w"][-1] == 1


def test_all_processes_go_on_from_the_same_step(tmp_path):
    """Nodes that do not share OUT may find another checkpoint under the same name."""
    assert tiny.run(tmp_path / "run", "--train-steps", 2, world=2)[0] == 0

    def before(rank):
        load = torch.load
        torch.load = lambda *args, **options: load(*args, **options) | {"step": 2 - rank}

    code, text = tiny.run(tmp_path / "run", "--resume", "auto", world=2, before=before)
    assert code == 2 and "the processes go on from different steps; all nodes must share" in text


def test_torchrun_restarts_from_the_last_checkpoint_by_itself(undisturbed, tmp_path):
    """One of two processes dies in step 4 of the first attempt; torchrun ends the other and starts again."""
    words = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=run", "--nproc-per-node=2",
             "--max-restarts=1", "--monitor-interval=0.1", "tiny.py"]

    def agent():
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the addresses of dead processes stay
        os.environ["CRASH"] = str(3 * 3 + 1)
        sys.argv[1:] = ["--out", str(tmp_path / "two"), "--resume", "auto"]
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
    options = ["--train-steps", 60, "--save-every", 1, "--sample-every", 20]
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
                       "--train-steps", 10 ** 6, "--save-every", 10 ** 6, "--workers", 2)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, number)  # Ctrl-C reaches the whole group of the terminal
    _, text = process.communicate(timeout=120)
    assert "stopped by a signal, saved" in text
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
