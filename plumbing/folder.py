"""The folder of a training run: its lock, its checkpoints and its log."""
import dataclasses
import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import cli
from plumbing.errors import UserError, reading
from plumbing.files import atomic, check_writable, remove_leftovers, replaceable
from plumbing.run import Group, Parts, memory

KEPT = 2                # checkpoints


@contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """OUT serves one run at a time, where the system has file locks; they end with their process."""
    check_writable(out)
    with open(Path(out) / "lock", "a") as file:
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{out} is in use by another run; wait until it ends, or choose another "
                            "--out") from error
        except ImportError:
            print("training is tested on Linux; here, on Windows, are no locks: start one run per --out",
                  file=sys.stderr)
        except OSError:                                         # a network folder without locks
            pass
        yield


def check_unchanged(saved: dict, settings: dict) -> None:
    """Refuses another value of a setting that holds for the whole of a run."""
    for name, value in settings.items():
        if saved.get(name, value) != value:
            raise UserError(f"this run began with {cli.flag_of(name)} {saved[name]}, not {value}; go on with "
                            "that, or choose another --out")


# ---- checkpoints -------------------------------------------------------------------------------------------

def checkpoints(out: str | Path) -> list[Path]:
    """This program's checkpoints in a folder, oldest first; copies under other names are not its own."""
    return sorted(Path(out).glob("checkpoint-" + 7 * "[0-9]" + ".pt"))


def open_folder(config) -> Path | None:
    """Checks that OUT is this run's, cleans it up -> the checkpoint to go on from."""
    out, saved = Path(config.out), checkpoints(config.out)
    if saved and not config.resume:
        raise UserError(f"{out} already holds {saved[-1].name}; go on with --resume auto, or choose another "
                        "--out")
    path = saved[-1] if saved else None
    if config.resume not in ("", "auto"):
        path = Path(config.resume).expanduser()
        if not path.is_file():
            raise UserError(f"--resume {path}: no such file; auto takes the newest of --out")

    # nothing is written over but the first steps of a run without a checkpoint
    if path is None or path.resolve().parent != out.resolve():
        students = *out.glob("*.safetensors"), *out.glob("t2v_turbo_vc2.pt"), *out.glob("unet")
        log = (out / "log.jsonl").read_text(errors="replace") if (out / "log.jsonl").exists() else ""
        foreign_log = log and "memory_gib" not in log
        foreign_samples = [sample for sample in out.glob("samples/*.gif") if not replaceable(sample)]
        if saved or students or foreign_log or foreign_samples or (out / "config.json").exists():
            raise UserError(f"{out} holds another run, one whose checkpoints are gone, or other files; "
                            "choose another --out")
        (out / "log.jsonl").unlink(missing_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / "samples")
    return path


def describe(config) -> None:
    """Writes OUT/config.json, once there is a checkpoint: what tells a run from the first steps of one."""
    with atomic(Path(config.out) / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=1))


def read_checkpoint(path: Path, group: Group, key: str = "settings") -> dict:
    """A checkpoint with this key, memory-mapped. The first process reads it once, for its checksums."""
    with reading(path, "a whole checkpoint of this program"):
        if group.rank == 0:
            with zipfile.ZipFile(path) as file:
                if file.testzip():
                    raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, _ = state["step"], state[key]
    if group.any(step != group.broadcast(step)):
        raise UserError("the processes go on from different steps; all nodes must share the folder of "
                        f"{path}")
    return state


def save_checkpoint(out: Path, step: int, state: dict) -> None:
    """OUT/checkpoint-STEP.pt. Once it is there, those of an abandoned future and all but the last two go."""
    path = out / f"checkpoint-{step:07d}.pt"
    with atomic(path) as temporary:
        torch.save(state, temporary)
    saved = checkpoints(out)
    past = saved[:saved.index(path) + 1]
    for old in set(saved) - set(past[-KEPT:]):
        old.unlink()


# ---- the log -----------------------------------------------------------------------------------------------

class Log(ExitStack):
    """The first process writes log.jsonl (a line per step), the bar, and TensorBoard where it is installed.

    On resume, the lines after the checkpoint go: their steps are made again. So does a half line that a kill
    left. `last` is the step of the last line."""

    def __init__(self, out: Path, start: int, steps: int, group: Group):
        super().__init__()
        self.device, self.last, self.file, self.board = group.device, start, None, None
        if group.rank:
            return
        path = Path(out) / "log.jsonl"
        lines = [(step, line) for step, line in whole_lines(path) if step <= start]
        self.last = lines[-1][0] if lines else 0
        with atomic(path) as temporary:
            temporary.write_text("".join(line for _, line in lines))
        self.file = self.enter_context(open(path, "a"))
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = self.enter_context(SummaryWriter(str(out), purge_step=start + 1))
        self.bar = self.enter_context(tqdm(total=steps, initial=start))     # its line ends before an error's

    def __call__(self, step: int, record: dict, parts: Parts) -> None:
        if self.file is None:
            return
        seconds = {name: round(value, 4) for name, value in parts.seconds.items()}
        line = {"step": step, **record, "memory_gib": round(memory(self.device), 3), "seconds": seconds}
        print(json.dumps(line), file=self.file, flush=True)

        hidden = ("lr", "steps_skipped", "clips_skipped")
        shown = {name: f"{value:.4g}" for name, value in record.items() if value and name not in hidden}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, step)


def whole_lines(path: Path) -> list[tuple[int, str]]:
    """(step, line) of a log, without the half line that a kill may leave. Raises UserError."""
    with reading(path, "the log of a run"):
        lines = path.read_text(errors="replace").split("\n") if path.exists() else [""]
        return [(json.loads(line)["step"], line + "\n") for line in lines[:-1]]
