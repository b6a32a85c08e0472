"""Will it fit, and how long will it take? What a training step holds and computes.

`train.py --dry-run 0` runs the program's own code on fake tensors, which have shapes but no contents: models
of full size then need neither memory, nor a GPU, nor a file. `--dry-run N` makes N real steps with random
weights.
"""
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from plumbing.errors import UserError
from plumbing.run import Offload, Parts

GIB = 2 ** 30
aten = torch.ops.aten
FORMULAS = flop_registry | {                # torch's has no formula of a CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}
CARDS = {"A100": 312e12, "H100": 989e12}    # FLOP a second in bf16, dense, from their data sheets


class Counter(TorchDispatchMode):
    """Counts what is done within the block, to real or to fake tensors.

    `live`: bytes of the tensors made on the device and not yet freed; `peak`: the most of them so far.
    `flops`: by torch's formulas, a multiplication and an addition are two."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.sizes = device, {}                    # bytes of the storages that are alive
        self.live = self.peak = self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if op.overloadpacket in FORMULAS:
            self.flops += FORMULAS[op.overloadpacket](*args, **kwargs, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                self.add(x.untyped_storage())
        return out

    def add(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@contextmanager
def simulation() -> Iterator[Counter]:
    """Within the block tensors are fake, on the CPU, and counted as a GPU would hold them: norms in float32,
    as autocast has them there; what waits in host memory (--offload) is not counted."""
    fake, counter = FakeTensorMode(), Counter()
    fake.__deepcopy__ = lambda memo: fake                       # copies of fake tensors stay in the one mode
    to_host = staticmethod(lambda x: torch.empty_like(x.detach(), device="cuda"))       # not counted

    def in_float32(norm: Callable) -> Callable:
        def called(x, size, w=None, b=None, eps=1e-5):
            if torch.is_autocast_enabled("cpu"):
                x, w, b = (None if y is None else y.float() for y in (x, w, b))
            return norm(x, size, w, b, eps)
        return called

    norms = dict(group_norm=in_float32(F.group_norm), layer_norm=in_float32(F.layer_norm))
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")           # by deepcopy
    with patch.object(Offload, "to_host", to_host), patch.multiple(F, **norms), fake, counter:
        yield counter


@contextmanager
def build(device, dtype: torch.dtype) -> Iterator[None]:
    """Within the block modules are made on this device, of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        yield
    torch.set_default_dtype(before)


class Budget(Parts):
    """What each named part of a step holds and computes, and its seconds on the device."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter, self.held = counter, 0                    # held: bytes between two steps
        self.peak, self.flops = defaultdict(int), defaultdict(int)

    @contextmanager
    def __call__(self, name: str):
        counter, flops = self.counter, self.counter.flops
        counter.peak = counter.live
        with super().__call__(name):
            yield
            if counter.device == "cuda":
                torch.cuda.synchronize()
        self.peak[name] = max(self.peak[name], counter.peak)
        self.flops[name] += counter.flops - flops


def report_step(config, group, load_world: Callable, trainer_class: type) -> Budget:
    """--dry-run N: prints what a training step takes. load_world(config, group) -> models, clips, rewards.

    Memory is counted while all is built and in a first step, which is not among the N. Simulated (N = 0), a
    process has one micro-batch, as other clips of a batch find the same memory, and shows it to rewards."""
    n, alone = config.dry_run, copy(group)
    if not n and config.is_toy:
        raise UserError("--dry-run 0 is for the real models; the toy is small enough for --dry-run 1")
    if not n:                                                   # no process waits for another
        alone.device, alone.sum = torch.device("cpu"), lambda x: x
        config = replace(config, batch=config.micro_batch * group.world_size, reward_every=1)
    with Counter(group.device.type) if n else simulation() as counter:
        budget = Budget(counter)
        with budget("construction"):
            models, _, terms = load_world(config, alone)
            trainer = trainer_class(config, models, terms, alone)
        trainer.parts = budget
        trainer.optimizer.step()                                # allocates the moments; the gradient is zero
        trainer.keep_moments()
        budget.held = counter.live
        if not n:
            pick_worst(terms)
            trainer.to_host = lambda sums: [0.0] * len(sums)    # which have no contents
        with trainer.offload(models.text):
            batch = random_batch(config, models, config.batch // group.world_size)
        trainer.step(batch)

    budget.seconds.clear()
    for _ in range(n):
        trainer.step(batch)
    if group.rank == 0:
        show(budget, config)
    group.close()
    return budget


def show(budget: Budget, config) -> None:
    """Prints the parts of a step, and what they come to."""
    n = config.dry_run
    print(f"{config.preset}, {config.width}x{config.height}, {config.frames} frames, {config.dtype}, "
          f"{config.batch} clips a step, {config.micro_batch} at a time, {n or 'simulated'} steps\n\n"
          f"{'part':14}peak GiB    TFLOP       s")
    for name, peak in budget.peak.items():
        seconds = f"{budget.seconds[name] / n:8.2f}" if n else "       -"
        print(f"{name:14}{peak / GIB:8.2f}{budget.flops[name] / 1e12:9.2f}{seconds}")

    worst, flops = max(budget.peak, key=budget.peak.get), sum(budget.flops.values())
    cards = ", ".join(f"{card} {flops / rate:.2f} s" for card, rate in CARDS.items())
    print(f"\nheld all the time: {budget.held / GIB:.2f} GiB; most: {budget.peak[worst] / GIB:.2f} GiB, in "
          f"{worst}; on a GPU add about 1 GiB for CUDA and its libraries\n"
          f"in all {flops / 1e12:.1f} TFLOP; in bf16 at the peak rates of {cards}")
    if n:
        seconds = sum(budget.seconds.values()) / n
        hours = seconds * config.train_steps / 3600
        print(f"a step takes {seconds:.2f} s, {config.train_steps} steps take {hours:.1f} h")


def random_batch(config, models, n: int) -> dict:
    """What a trainer's step takes: n clips, or for v2 samples of a cache, zeros with one caption."""
    captions = dict(caption=["a red circle moving right"] * n, reward_caption=[None] * n)
    T, H, W = config.frames, config.height, config.width
    if not config.preset.endswith("v2"):
        return captions | dict(clip=torch.zeros(n, 3, T, H, W, dtype=torch.uint8), bad=0)
    z = torch.zeros(n, *models.vae.config.shape(T, H, W))
    c = models.text(captions["caption"]).to("cpu")
    sample = captions | dict(t=torch.full((n,), 999), z_t=z, eps_c=z, eps_u=z, gradient=z, c=c)
    return dict(distill=sample, rewards=sample, bad=0)


def pick_worst(terms) -> None:
    """Each reward looks at other frames than the others: the most that a step decodes."""
    start = 0
    for term in terms:
        term.pick = lambda T, generator, frames=range(start, start + term.frames): [i % T for i in frames]
        start += term.frames
