"""What carries a run: its device, its processes, what a step takes, and what waits in host memory."""
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: a later import would hold the group for good
from torch import Tensor, nn

from plumbing import cli
from plumbing.errors import UserError

# ---- devices -----------------------------------------------------------------------------------------------

def pick_device(text: str = "") -> torch.device:
    """The device of an option `--device`: "cpu", "cuda", "cuda:1", "xpu", "mps"; "": CUDA, else the CPU. With
    "cuda" each of torchrun's processes gets its own GPU."""
    _, world_size, local_rank = cli.place()
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(),
              "mps": int(torch.backends.mps.is_available())}
    text = text or ("cuda" if counts["cuda"] else "cpu")
    if text.startswith("cuda:") and world_size > 1:
        raise UserError(f"--device {text}: every process takes a GPU of its own; use --device cuda")
    text = f"cuda:{local_rank}" if text == "cuda" else text
    present = [f"{kind}:{i}" for kind, count in counts.items() for i in range(count)]
    if text not in present and f"{text}:0" not in present:
        raise UserError(f"--device {text}: no such device here; this machine has {', '.join(present)}")
    return torch.device(text)


# ---- processes ---------------------------------------------------------------------------------------------

class Group:
    """The processes of a run, as torchrun started them; without torchrun, one.

    Gradients meet in one explicit all-reduce: of a step's four passes through the UNet only one has a
    gradient, so there is next to nothing that DistributedDataParallel could overlap. patience: how long the
    others wait while one downloads, indexes, writes 22 GB."""

    def __init__(self, device: str = "", patience: timedelta = timedelta(hours=2)):
        self.rank, self.world_size, _ = cli.place()
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")                  # TF32 for float32 networks
        if self.world_size > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"the environment says WORLD_SIZE={self.world_size}, but not MASTER_ADDR; start "
                            "several processes with torchrun, or unset WORLD_SIZE")
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=patience)

    def sum(self, x: Tensor) -> Tensor:
        """Adds x up over all processes, in place; the same bits on each."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag) -> bool:
        """Is the flag true on any process?"""
        return self.sum(torch.tensor(float(bool(flag)))).item() > 0

    def broadcast(self, value):
        """A small picklable value of rank 0."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others, which find its files."""
        if self.rank > 0:
            self.any(False)
        yield
        if self.rank == 0:
            self.any(False)

    def close(self) -> None:
        """Waits for all: torchrun ends the others when one leaves with a signal's exit status."""
        self.any(False)
        if self.world_size > 1:
            dist.destroy_process_group()


def stop_signals() -> list[int]:
    """A list that gets the number of a stop signal. The same signal once more ends the process as it always
    does; one that the process was started to ignore (nohup) stays ignored."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)                # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)
    return received


# ---- what a step takes -------------------------------------------------------------------------------------

class Parts:
    """Seconds of the named parts of a step, those of the host: nothing waits for a GPU (budget.py's do)."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def memory(device: torch.device) -> float:
    """The most GiB that this process has held: tensors on a GPU, everything on a CPU; on Windows 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    with suppress(ImportError):
        import resource
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20                 # bytes; Linux counts KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return 0.0


def flat_gradient(params: list[nn.Parameter]) -> Tensor:
    """One tensor of which every p.grad is a view: one all-reduce, one norm, one check that all is finite."""
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, piece in zip(params, flat.split(sizes), strict=True):
        p.grad = piece.as_strided(p.shape, p.stride())              # in the parameter's memory format
    return flat


class Offload:
    """--offload: an owner's tensors wait in host memory, and are on the device within `with offload(owner):`.

    Only their `data` changes place. What autograd keeps of a frozen weight is the weight itself, so that a
    backward pass needs its owner on the device, and nothing of it is held in between."""

    def __init__(self, device: torch.device, on: bool):
        self.device, self.on = device, on
        self.waiting = {}               # owner -> [(tensor, its copy in host memory)]
        self.turn = ExitStack()         # of the owner that `in_turn` called last

    @staticmethod
    def to_host(x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x.detach())

    def keep(self, owner, tensors: Iterable[Tensor]) -> None:
        """From now on the owner's tensors wait."""
        self.waiting[owner] = [(x, self.to_host(x)) for x in tensors if self.on]
        for x, host in self.waiting[owner]:
            x.data = host

    @contextmanager
    def __call__(self, *owners):
        waiting = [pair for owner in set(owners) for pair in self.waiting.get(owner, ())]
        for x, host in waiting:
            x.data = torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
        yield
        for x, host in waiting:
            if not isinstance(x, nn.Parameter):                                 # moments have changed
                host.copy_(x)
            x.data = host

    def in_turn(self, call: Callable, owner) -> Callable:
        """`call`, for which the owner's tensors take the place of the last one's, until `turn` is closed."""
        def called(*args):
            self.turn.close()
            self.turn.enter_context(self(owner))
            return call(*args)
        return called
