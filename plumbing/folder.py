"""The folder of a training run: its lock, its checkpoints and its log."""
import dataclasses
import errno
import fcntl
import importlib.util
import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import atomic, remove_leftovers
from plumbing.run import Group, Parts, memory

BEAT, WATCH = 5.0, 60.0     # seconds: a run renews its lock; without renewal for so long it counts as dead
CONTENT = {                 # of a checkpoint
    "config": dict, "step": int, "steps_skipped": int, "clips_skipped": int, "params": dict, "ema": list,
    "optimizer": dict}
BROKEN = (                  # what torch.load raises for files that are cut off, changed or no files of torch
    OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error, struct.error)


# ---- the lock ----------------------------------------------------------------------------------------------


class Lock:
    """OUT serves one run at a time: its first process holds OUT/lock until it ends, as a context manager.

    Between processes of one machine, and on network folders that know file locks, the system's lock decides;
    it ends with its process. Other machines' runs are known by their heartbeat: the file changes every BEAT
    seconds.
    """

    def __init__(self, out: Path):
        self.path, self.ended = Path(out) / "lock", threading.Event()
        self.thread = threading.Thread(target=self.keep_beating, daemon=True)
        self.me = dict(host=socket.gethostname(), process=os.getpid(), beat=0)

    def __enter__(self) -> "Lock":
        holder = self.holder()
        if holder and holder["host"] != self.me["host"] and self.beats(holder):
            raise ValueError(self.refusal(holder))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            if not self.lock(holder):
                os.close(self.file)
                raise ValueError(self.refusal(holder))
            self.write(json.dumps(self.me))
        except OSError as error:
            raise ValueError(f"{self.path.parent} cannot be made or written ({error.strerror}); "
                             "choose another --out") from error
        self.thread.start()
        return self

    def lock(self, holder: dict | None) -> bool:
        """Takes the system's lock. Where the folder knows none, a holder on this machine has to be dead."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = error.errno in (errno.EACCES, errno.EAGAIN)
            return not taken and not (holder and self.beats(holder))
        return True

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(OSError):
            self.write("")
        os.close(self.file)

    def refusal(self, holder: dict | None) -> str:
        who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
        return f"{self.path.parent} is in use by {who}; wait until it ends, or choose another --out"

    def holder(self) -> dict | None:
        """What the lock's file says, None where it is free. Opened anew, as network folders need."""
        try:
            holder = json.loads(self.path.read_text() or "null")
        except (OSError, ValueError):
            return None
        return holder if isinstance(holder, dict) and {"host", "process"} <= holder.keys() else None

    def beats(self, holder: dict) -> bool:
        """Does the holder renew its lock?"""
        print(f"{self.path} is of process {holder['process']} on {holder['host']}; waiting {WATCH:.0f} s "
              "to see whether that is still running", file=sys.stderr)
        for _ in range(20):
            time.sleep(WATCH / 20)
            if self.holder() not in (holder, None):
                return True
        return False

    def keep_beating(self) -> None:
        while not self.ended.wait(BEAT):
            self.me["beat"] += 1
            with suppress(OSError):                             # a full disk does not end the run here
                self.write(json.dumps(self.me))

    def write(self, text: str) -> None:
        """In place: another file descriptor, closed, would end the system's lock."""
        os.pwrite(self.file, text.encode(), 0)
        os.ftruncate(self.file, len(text.encode()))


# ---- checkpoints -------------------------------------------------------------------------------------------


def checkpoints(out: Path) -> list[Path]:
    """This program's checkpoints in a folder, oldest first; copies under other names are not its own."""
    paths = Path(out).glob("checkpoint-*.pt")
    return sorted((path for path in paths if re.fullmatch(r"checkpoint-\d{7,}\.pt", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def open_folder(config, group: Group) -> Path | None:
    """The first process takes OUT, and says which checkpoint all go on from, or None.

    Raises ValueError where OUT cannot be written or belongs to another run.
    """
    return group.from_first(take_folder(config) if group.rank == 0 else None)


def take_folder(config) -> Path | None:
    """Checks that OUT is this run's, cleans it up and writes config.json -> the checkpoint to go on from."""
    out = Path(config.out)
    path = find_checkpoint(config, out)
    if path is None or path.resolve().parent != out.resolve():
        (out / "log.jsonl").unlink(missing_ok=True)         # of a run that left no checkpoint
    for folder in (out, out / "samples"):
        remove_leftovers(folder)
    if not restarted(out):
        settings = json.dumps(dataclasses.asdict(config) | {"launcher": os.getppid()}, indent=1)
        with atomic(out / "config.json") as temporary:
            temporary.write_text(settings)
    return path


def find_checkpoint(config, out: Path) -> Path | None:
    """The checkpoint to go on from. Raises ValueError where OUT holds those of another run."""
    own = checkpoints(out)
    last = own[-1] if own else None
    if config.resume == "auto":
        return last
    if not config.resume:
        if own and not restarted(out):
            raise ValueError(f"{out} already holds {last.name}; "
                             "go on with --resume auto, or choose another --out")
        return last

    if restarted(out):                      # the run began with PATH, but may have come further
        began = (out / "config.json").stat().st_mtime
        since = [path for path in own if path.stat().st_mtime > began]
        if since:
            return since[-1]
    path = Path(config.resume)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}" + (f"; the last one is {last}" if own else ""))
    if own and path.resolve().parent != out.resolve():
        raise ValueError(f"--resume {path}: {out} holds {last.name} of another run; choose another --out")
    return path


def restarted(out: Path) -> bool:
    """Did the same torchrun, by --max-restarts, start this run before?"""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0" or not (out / "config.json").exists():
        return False
    return json.loads((out / "config.json").read_text()).get("launcher") == os.getppid()


def check_room(out: Path, size: int, keep: int, exports: int) -> None:
    """Raises ValueError where checkpoints and weights do not fit the disk, in bytes.

    size: of one checkpoint; `keep` + 1 must fit, and then `exports`, the weights at the end."""
    need = size * (keep + 1 - min(keep, len(checkpoints(out)))) + exports
    free = shutil.disk_usage(out).free
    if free < need:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB free, checkpoints and weights take "
                         f"{need / 1e9:.2f} GB ({keep} kept, one being written); "
                         "make room, or choose another --out or a smaller --keep")


def read_checkpoint(path: Path) -> dict:
    """A checkpoint, memory-mapped. Raises ValueError where it is damaged, or no checkpoint of train.py."""
    try:
        check_bytes(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; all nodes must share that folder") from error
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except BROKEN as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({path.stat().st_size:,} bytes); "
                         "go on from an earlier one with --resume FILE") from error
    if not is_checkpoint(state):
        raise ValueError(f"{path} is no checkpoint of train.py, or a damaged one; "
                         "--resume takes OUT/checkpoint-STEP.pt")
    return state


def check_bytes(path: Path) -> None:
    """Reads a checkpoint once, for its checksums, which torch.load passes over. Raises ValueError."""
    if not zipfile.is_zipfile(path):
        return                                                  # torch.load says more
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"the bytes of {damaged} are not those that were written")


def is_checkpoint(state: object) -> bool:
    """Is all there that CONTENT says, with averages and moments of the weights' shapes (or none)?"""
    if not isinstance(state, dict):
        return False
    if not all(isinstance(state.get(key), kind) for key, kind in CONTENT.items()):
        return False

    moments = state["optimizer"].get("state")
    if not isinstance(moments, dict) or not all(isinstance(entry, dict) for entry in moments.values()):
        return False
    shapes = [getattr(p, "shape", None) for p in state["params"].values()]
    averages = [getattr(x, "shape", None) for x in state["ema"]]
    alike = None not in shapes and averages in ([], shapes) and list(moments) in ([], [*range(len(shapes))])
    return alike and all(
        isinstance(entry.get("step"), torch.Tensor) and getattr(entry.get(name), "shape", None) == shape
        for entry, shape in zip(moments.values(), shapes) for name in ("exp_avg", "exp_avg_sq"))


# ---- the log -----------------------------------------------------------------------------------------------


class Log:
    """The first process writes log.jsonl (a line per step), the bar, and TensorBoard where it is installed.

    On resume, the lines after the checkpoint go: their steps are made again. So does a half line that a kill
    left.
    """

    def __init__(self, out: Path, start: int, steps: int, group: Group):
        self.file = self.board = self.bar = None
        self.last = start                                       # the step of the last line
        if group.rank:
            return
        path = Path(out) / "log.jsonl"
        lines = whole_lines(path, start)
        self.last = lines[-1][0] if lines else 0
        with atomic(path) as temporary:
            temporary.write_text("".join(line for _, line in lines))
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
        hidden = ("lr", "steps_skipped", "clips_skipped")
        shown = {name: f"{value:.4g}" for name, value in record.items() if value and name not in hidden}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        """Ends the bar's line, so that an error message starts on its own."""
        for part in (self.bar, self.board, self.file):
            if part is not None:
                part.close()


def whole_lines(path: Path, last: int) -> list[tuple[int, str]]:
    """The lines of a log up to a step: (step, line)."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, TypeError, KeyError):     # half a line
            continue
        if step <= last:
            lines.append((step, line + "\n"))
    return lines
