"""What carries a training run: its processes, its folder with checkpoints and log, and the signals that end it."""
import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
import time
import uuid
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

STOP = {signal.SIGTERM, signal.SIGINT}


def pick_device(text: str = "") -> torch.device:
    """The device of an option `--device`: "cpu", "cuda", "cuda:1" or "mps"; "" means CUDA where there is a GPU, else the CPU.

    Raises ValueError where PyTorch does not know the device or this machine does not have it.
    """
    kind, _, number = text.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not text:
        return torch.device("cuda" if gpus else "cpu")
    if kind not in ("cpu", "cuda", "mps") or text != kind and not (kind == "cuda" and number.isdecimal()):
        raise ValueError(f"--device {text}: no such device here; choose cpu, cuda, cuda:NUMBER or mps")
    if kind == "cuda" and not gpus:
        raise ValueError(f"--device {text}: this machine has no usable GPU; try --device cpu")
    if kind == "cuda" and int(number or 0) >= gpus:
        raise ValueError(f"--device {text}: this machine has {gpus} GPU{'s' * (gpus > 1)}; the last one is cuda:{gpus - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine has no usable Apple GPU; try --device cpu")
    return torch.device(text)


class Group:
    """The processes of a run, as torchrun started them; without torchrun, one.

    Gradients meet in one explicit all-reduce per step instead of DistributedDataParallel. Of a step's four passes through
    the UNet only one has a gradient, and LoRA's gradient is 0.5 GB against seconds of computing, so there is next to
    nothing to overlap; and one tensor makes clipping, and the agreement of all processes on whether it is finite, one line.
    """

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(attempt(store, self.rank, self.world), store)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world)

    def sum(self, x: Tensor) -> Tensor:
        """In place, and the same bits on all processes."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag) -> bool:
        return self.sum(torch.tensor(float(bool(flag)), device=self.device)).item() > 0

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def attempt(store: dist.Store, rank: int, world: int) -> str:
    """A new name on which all processes of this start agree.

    torchrun keeps one store over all of its restarts, and in it the addresses of the processes that died: who is early reads
    an old one, and connects to nobody or hangs. (Its count of restarts is no such name: it counts each node's own failures.)
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here {rank}", mine)
        name = store.get(f"invited {mine}").decode()                    # waits; nobody answers the dead, or for them
        store.set(f"arrived {rank} {name}", "")
        return name
    for other in range(1, world):
        while not store.check([f"arrived {other} {mine}"]):
            store.set("invited " + store.get(f"here {other}").decode(), mine)       # perhaps a dead one: asked again
            time.sleep(0.02)
    return mine


class Parts:
    """Seconds spent in the named parts of a step.

    With a `memory` (dryrun.py) also the most bytes held in each part, and by how many it left more than it found.
    """

    def __init__(self, device: torch.device, memory=None):
        self.device, self.memory = device, memory
        self.seconds, self.peak, self.kept = defaultdict(float), defaultdict(int), {}

    @contextmanager
    def __call__(self, name: str):
        start, before = time.perf_counter(), self.memory.reset() if self.memory else 0
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start
        if self.memory:
            self.peak[name], self.kept[name] = max(self.peak[name], self.memory.peak), self.memory.live - before


# ---- the folder --------------------------------------------------------------------------------------------------


def write(path: Path, writer) -> None:
    """writer(temporary path), to the disk, then rename: under its name a file is whole, or it is the one before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        writer(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error}); what was saved before is whole: make room, then go on "
                         "with --resume auto") from error


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*.pt"))


def open_folder(config, group: Group) -> Path | None:
    """Sees to it that OUT can be written and is not another run's -> the checkpoint to go on from."""
    out = Path(config.out)
    saved = checkpoints(out)
    if config.resume not in ("", "auto"):
        if not Path(config.resume).is_file():
            raise ValueError(f"no checkpoint at {config.resume}" + (f"; the last one is {saved[-1]}" if saved else ""))
        saved = [Path(config.resume)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); choose another --out") from error
    if group.rank == 0:
        if saved and not config.resume and not restarted(out):
            raise ValueError(f"{out} already holds {saved[-1].name}; go on with --resume auto, or choose another --out")
        for leftover in out.glob("*.tmp"):                                  # of a process that was killed while it wrote
            leftover.unlink()
        said = json.dumps(dataclasses.asdict(config) | {"launcher": os.getppid()}, indent=1)
        write(out / "config.json", lambda file: file.write_text(said))
    return saved[-1] if saved else None


def restarted(out: Path) -> bool:
    """Did the same torchrun, by --max-restarts, start this run before?"""
    said = out / "config.json"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and said.exists() and json.loads(said.read_text()).get("launcher") == os.getppid()


def check_room(out: Path, size: int, keep: int) -> None:
    """A full disk is better found now than after hours. size: of a checkpoint; one more than are kept is being written."""
    need, free = size * (keep + 1 - min(keep, len(checkpoints(out)))), shutil.disk_usage(out).free
    if free < need:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB free, the checkpoints take {need / 1e9:.2f} GB ({keep} kept, one "
                         "being written); make room, or choose another --out or a smaller --keep")


class Log:
    """The first process writes log.jsonl (a line per step), the bar, and TensorBoard where it is installed.

    On resume, the lines after the checkpoint go: their steps are made again.
    """

    def __init__(self, out: Path, start: int, steps: int, group: Group):
        self.file = self.board = None
        if group.rank:
            return
        path = out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True)[:start] if path.exists() else []
        write(path, lambda temporary: temporary.write_text("".join(lines)))
        self.file, self.bar = open(path, "a"), tqdm(total=steps, initial=start)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out), purge_step=start + 1)

    def __call__(self, step: int, record: dict, parts: Parts) -> None:
        if self.file is None:
            return
        seconds = {name: round(value, 4) for name, value in parts.seconds.items()}
        line = {"step": step, **record, "memory_gib": round(memory(parts.device), 3), "seconds": seconds}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        dull = ("lr", "steps_skipped", "clips_skipped")
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if v and k not in dull}, refresh=False)
        self.bar.update()
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, step)


def memory(device: torch.device) -> float:
    """The most GiB that this process has held: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20         # Linux counts KiB


# ---- signals -----------------------------------------------------------------------------------------------------


def listen() -> list[int]:
    """A list that gets the number of a stop signal. A second signal ends the process as it always did."""
    heard = []

    def hear(number, frame):
        heard.append(number)
        for each in STOP:
            signal.signal(each, signal.SIG_DFL)

    for number in STOP:
        signal.signal(number, hear)
    return heard


def shielded(batches):
    """The same batches, but their worker processes, which inherit what is blocked, survive the signal that ends the run:
    a Ctrl-C, or torchrun, sends it to them too, and the step under way may need them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    yield first
    yield from batches
