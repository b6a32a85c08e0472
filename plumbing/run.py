"""What carries a training run: its processes and devices, its optimizer, and the signals that end it."""
import os
import resource
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: a later import would hold the group for good
from torch import Tensor, nn

from plumbing import cli

STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
PATIENCE = timedelta(hours=2)   # of collectives: others wait while one downloads, indexes, writes 22 GB


# ---- processes and devices ---------------------------------------------------------------------------------


def pick_device(text: str = "") -> torch.device:
    """The device of an option `--device`: "cpu", "cuda", "cuda:1", "mps"; "" means CUDA, else the CPU.

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
        raise ValueError(f"--device {text}: the last GPU of this machine is cuda:{gpus - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine has no usable Apple GPU; try --device cpu")
    return torch.device(text)


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply in bfloat16? GPUs before Ampere, and processors without AVX-512 BF16 or AMX,
    imitate it, and may be slower than in float32 (measured: shapes/README.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and native


def usual_dtype(device: torch.device) -> str:
    """What the toy's networks work in, unless the command line says otherwise."""
    return "bfloat16" if has_bfloat16(device) else "float32"


cpu_plays = "cpu"               # in a simulation tensors on the CPU may play those of a GPU: "cuda"


def on_cpu(x: Tensor) -> bool:
    """Does a CPU compute x?"""
    return x.device.type == cpu_plays == "cpu"


class Group:
    """The processes of a run, as torchrun started them; without torchrun, one.

    Gradients meet in one explicit all-reduce per step instead of DistributedDataParallel. Of a step's four
    passes through the UNet only one has a gradient, and LoRA's gradient is 0.5 GB against seconds of
    computing, so there is next to nothing to overlap; and one tensor makes clipping, and the agreement of all
    processes on whether it is finite, one line.
    """

    def __init__(self, device: str = ""):
        """device: as for `pick_device`; with "" or "cuda" every process of a machine gets its own GPU."""
        self.rank, self.world, local_rank = cli.place()
        if self.world > 1 and "MASTER_ADDR" not in os.environ:
            raise ValueError(f"the environment says WORLD_SIZE={self.world}, but not MASTER_ADDR; "
                             "start several processes with torchrun, or unset WORLD_SIZE")
        self.device = pick_device(device)
        if self.device.type == "cuda":
            self.device = own_gpu(self.device, local_rank, self.world)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store, _, _ = next(dist.rendezvous("env://"))
            self.store = dist.PrefixStore(attempt(store, self.rank, self.world), store)
            dist.init_process_group(backend, timeout=PATIENCE, store=self.store, rank=self.rank,
                                    world_size=self.world)

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes, in place, and the same bits on each."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag) -> bool:
        """Is it true on any process?"""
        return self.sum(torch.tensor(float(bool(flag)), device=self.device)).item() > 0

    def any_at_last(self, flag) -> bool:
        """`any` at the end of work that was split unevenly: the first to be through may wait for longer than
        a collective would. Once in a run."""
        if self.world == 1:
            return bool(flag)
        self.store.set(f"last {self.rank}", str(int(bool(flag))))
        answers = [f"last {rank}" for rank in range(self.world)]
        while not self.store.check(answers):
            time.sleep(0.2)
        return any(self.store.get(answer) == b"1" for answer in answers)

    def all_of(self, number: int) -> list[int]:
        """A number of each process, in the order of their ranks."""
        numbers = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        return self.sum(numbers).tolist()

    def share(self, x: Tensor, owner: int) -> None:
        """Overwrites x on all processes with the owner's."""
        if self.world > 1:
            dist.broadcast(x, owner)

    def from_first(self, value):
        """A small picklable value of the first process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process runs the block alone, then the others, which find its files."""
        if self.rank > 0:
            self.any(False)
        yield
        if self.rank == 0:
            self.any(False)

    def leave(self) -> None:
        """All together: torchrun ends the others when one has left with a signal's exit status.

        Ends the group's threads; one that met the end of the interpreter would abort the process.
        """
        self.any(False)
        if self.world > 1:
            dist.destroy_process_group()


def own_gpu(device: torch.device, local_rank: int, world: int) -> torch.device:
    """The GPU of one of several processes of a machine. Raises ValueError where there are too few."""
    if world > 1 and device.index is not None:
        raise ValueError(f"--device {device}: every process takes a GPU of its own; use --device cuda")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"there is no GPU for process {local_rank} of this machine; "
                         f"use torchrun --nproc_per_node={torch.cuda.device_count()}")
    return torch.device("cuda", local_rank if device.index is None else device.index)


def attempt(store: dist.Store, rank: int, world: int) -> str:
    """A new name on which all processes of this start agree.

    torchrun keeps one store over all of its restarts, and in it the addresses of processes that died: an
    early process reads an old address, and connects to nobody or hangs. (The count of restarts is no such
    name: every node counts its own failures.)
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here {rank}", mine)
        name = store.get(f"invited {mine}").decode()        # waits; values of a dead process are never read
        store.set(f"arrived {rank} {name}", "")
        return name
    for other in range(1, world):
        while not store.check([f"arrived {other} {mine}"]):
            invited = store.get(f"here {other}").decode()   # may be a dead process's: read again
            store.set(f"invited {invited}", mine)
            time.sleep(0.02)
    return mine


class Parts:
    """Seconds spent in the named parts of a step.

    With a `memory` (dryrun.py) also the most bytes held in each part, and how many more it left than it
    found.
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
            self.peak[name] = max(self.peak[name], self.memory.peak)
            self.kept[name] = self.memory.live - before


def memory(device: torch.device) -> float:
    """The most GiB that this process has held: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20         # Linux counts KiB


# ---- what waits in host memory -----------------------------------------------------------------------------


class Offload:
    """--offload: frozen weights and the optimizer's moments are on the device only while they are at work.

        with offload(unet, then=[reward]):      # the UNet is on the device, the reward on its way there

    Before and after they wait in pinned host memory. A frozen weight needs no copy back, and what autograd
    saved of it stays on the device as long as its graph. Device memory is taken on the stream that computes,
    and both streams wait for each other, so that memory is not used again before its time.
    """
    home = torch.device("cpu")

    def __init__(self, device: torch.device, on: bool):
        self.device, self.on = device, on
        self.stream = torch.cuda.Stream(device) if on and device.type == "cuda" else None
        self.waiting: dict = {}         # owner -> its places, (dictionary, name), and what waits for each
        self.coming: dict = {}          # owner -> copies on the device
        self.changing: set = set()      # owners whose tensors change while at work

    def keep(self, owner, places: list[tuple[dict, str]] | None = None) -> None:
        """From now on the owner's tensors wait. places: where they are; None: a network's frozen weights."""
        if not self.on:
            return
        if places is None:
            every = [(m._parameters, name) for m in owner.modules() for name in m._parameters]
            places = [(at, name) for at, name in every if at[name] is not None and not at[name].requires_grad]
        else:
            self.changing.add(owner)
        pinned = dict(device=self.home, pin_memory=self.stream is not None)
        here = [at[name].detach() for at, name in places]
        self.waiting[owner] = places, [torch.empty_like(x, **pinned).copy_(x) for x in here]
        self.place(owner, self.waiting[owner][1])

    def bytes(self) -> int:
        return sum(x.nbytes for _, waiting in self.waiting.values() for x in waiting)

    def place(self, owner, tensors: list[Tensor]) -> None:
        """Puts tensors where the owner looks for them."""
        places, _ = self.waiting[owner]
        for (at, name), x in zip(places, tensors, strict=True):
            at[name] = nn.Parameter(x, requires_grad=False) if isinstance(at[name], nn.Parameter) else x

    def fetch(self, owner) -> None:
        """Starts the copies to the device."""
        if owner not in self.waiting or owner in self.coming:
            return
        _, waiting = self.waiting[owner]
        self.coming[owner] = [torch.empty_like(x, device=self.device) for x in waiting]
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):        # None: no other stream
            for copy, x in zip(self.coming[owner], waiting, strict=True):
                copy.copy_(x, non_blocking=True)

    @contextmanager
    def __call__(self, *owners, then: Sequence = ()):
        """The owners' tensors are on the device within the block. then: who is at work next."""
        owners = [owner for owner in dict.fromkeys(owners) if owner in self.waiting]

        # bring in the owners' tensors, wait for them, and start on the next ones'
        for owner in owners:
            self.fetch(owner)
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
        for owner in owners:
            self.place(owner, self.coming.pop(owner))
        for owner in then:
            self.fetch(owner)

        yield

        # put the waiting tensors back in their places; moments have changed and are copied first
        for owner in owners:
            places, waiting = self.waiting[owner]
            if owner in self.changing:
                for (at, name), x in zip(places, waiting, strict=True):
                    x.copy_(at[name])
            self.place(owner, waiting)


# ---- the optimizer -----------------------------------------------------------------------------------------


class FlatAdamW:
    """AdamW (0.9, 0.999) over all trained weights as one flat tensor, of which each process updates a share.

    The network's weights and gradients become views of `weights` and `gradient`. For n weights on P processes
    each process holds 4 n bytes of weights, 4 n of gradient and 8 n / P of moments: for 1.41 B weights, 5.3
    GiB, 5.3 GiB and 10.5 / P GiB.
    """

    def __init__(self, params: list[nn.Parameter], group: Group, lr: float, offload: Offload | None = None):
        """offload: with it the moments wait in host memory between the steps."""
        self.params, self.group = params, group
        self.offload = offload or Offload(params[0].device, on=False)
        size, device = sum(p.numel() for p in params), params[0].device
        self.weights = torch.empty(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        for p, weight, grad in zip(params, self.views(self.weights), self.views(self.gradient), strict=True):
            p.data = weight.copy_(p.detach())
            p.grad = grad

        # in whole cache lines: AdamW rounds the last few weights of a share in another way than the others
        self.bounds = [size * rank // group.world // 16 * 16 for rank in range(group.world)] + [size]
        self.start, self.end = self.bounds[group.rank:group.rank + 2]
        self.mine = nn.Parameter(self.weights[self.start:self.end])             # the same memory
        self.mine.grad = self.gradient[self.start:self.end]
        self.adam = torch.optim.AdamW([self.mine], lr=lr, weight_decay=0, fused=True)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as tensors like the parameters, each in its parameter's memory format."""
        pieces = flat.split([p.numel() for p in self.params])
        return [piece.as_strided(p.shape, p.stride()) for piece, p in zip(pieces, self.params, strict=True)]

    def step(self, lr: float | None = None) -> None:
        """Updates the own share of the weights and fetches the others'. lr: from now on."""
        if lr is not None:
            self.adam.param_groups[0]["lr"] = lr
        with self.offload(self):
            self.adam.step()
        self.put_away()
        for owner, share in enumerate(self.shares(self.weights)):
            self.group.share(share, owner)

    def put_away(self) -> None:
        """The moments wait in host memory from their first step on (--offload)."""
        moments = self.adam.state[self.mine]
        if moments and self not in self.offload.waiting:
            self.offload.keep(self, [(moments, "exp_avg"), (moments, "exp_avg_sq")])

    def shares(self, flat: Tensor) -> list[Tensor]:
        return [flat[a:b] for a, b in zip(self.bounds, self.bounds[1:])]

    def state_dict(self) -> dict:
        """Like that of torch.optim.AdamW over the parameters. All processes call it, the first gets it."""
        mine, groups = self.adam.state[self.mine], self.adam.state_dict()["param_groups"]
        if not mine:                                                        # no step was made yet
            return dict(state={}, param_groups=groups)
        with self.offload(self):
            first, second = self.gather(mine["exp_avg"]), self.gather(mine["exp_avg_sq"])
        if self.group.rank:
            return {}
        state, step = {}, mine["step"].cpu()
        for i, (exp_avg, exp_avg_sq) in enumerate(zip(self.views(first), self.views(second), strict=True)):
            state[i] = dict(step=step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return dict(state=state, param_groups=groups)

    def gather(self, share: Tensor) -> Tensor | None:
        """All shares of a moment as one flat tensor on the CPU of the first process."""
        flat = torch.empty(len(self.weights)) if self.group.rank == 0 else None
        for owner, (start, end) in enumerate(zip(self.bounds, self.bounds[1:])):
            part = share if owner == self.group.rank else torch.empty(end - start, device=share.device)
            self.group.share(part, owner)
            if flat is not None:
                flat[start:end] = part
        return flat

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; the learning rate stays. Takes the file of any number of processes."""
        if not state["state"]:
            return
        share = dict(step=state["state"][0]["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            share[name] = self.own_share([state["state"][i][name] for i in range(len(self.params))])
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict(dict(state={0: share}, param_groups=groups))    # puts `step` on the GPU
        self.offload.waiting.pop(self, None)
        self.put_away()

    def own_share(self, tensors: list[Tensor]) -> Tensor:
        """Of tensors like the parameters, what lies in this process's share, on the weights' device."""
        share, offset = torch.empty_like(self.mine.data), 0
        for p, x in zip(self.params, tensors, strict=True):
            first, last = max(offset, self.start), min(offset + p.numel(), self.end)
            if first < last:
                ordered = torch.empty_strided(p.shape, p.stride()).copy_(x)         # in p's memory format
                flat = ordered.as_strided((p.numel(),), (1,))
                share[first - self.start:last - self.start] = flat[first - offset:last - offset]
            offset += p.numel()
        return share


# ---- signals -----------------------------------------------------------------------------------------------


def listen() -> list[int]:
    """A list that gets the number of a stop signal. A second signal ends the process as it always did.

    A signal that the process was started to ignore (nohup) stays ignored.
    """
    heard, terminals = [], [fd for fd in (1, 2) if os.isatty(fd)]
    wanted = [number for number in STOP if signal.getsignal(number) != signal.SIG_IGN]

    def hear(number, frame):
        heard.append(number)
        for each in wanted:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGHUP:                 # the terminal is gone: writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in terminals:
                os.dup2(nowhere, fd)

    for number in wanted:
        signal.signal(number, hear)
    return heard


def shielded(batches: Iterator) -> Iterator:
    """The same batches, but the worker processes that make them outlive the signal that ends the run.

    Ctrl-C and torchrun send the signal to the workers as well, and the step under way may need them. They
    inherit what is blocked while the first batch starts them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    yield first
    yield from batches
