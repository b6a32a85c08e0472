"""Will it fit, and how long will it take? A budget of a training step or of a clip; no download needed.

`train.py --preset turbo-vc2 --dry-run N` makes N steps with random weights. `--dry-run 0` makes one with fake
tensors, which have shapes but no contents: the full-size models then need neither memory nor a GPU, and it
counts what a GPU would have to hold, move and compute. `sample.py --dry-run` does the same for a clip that is
sampled, `train.py --preset turbo-v2 --prepare CACHE --dry-run 0` for one that is prepared.
(`--preset shapes --dry-run N` takes the toy as it is, and so is a benchmark.)
"""
import dataclasses
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from plumbing.run import Offload, Parts

GIB = 2 ** 30
CARDS = {   # from their data sheets: TFLOP/s in bf16 (tensor cores, dense) and in float32, GB/s of memory
    "RTX 4090": (165.2, 82.6, 1008), "A100 80GB SXM": (312.0, 19.5, 2039), "H100 SXM": (989.4, 66.9, 3350)}


# ---- counting ----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within the block and not yet freed, real or fake. `peak`: most since `reset`.

    Also `flops`, by the formulas of torch.utils.flop_counter (a multiplication and an addition are two), and
    `moved`: bytes that operations read and write, each by itself; fused ones move fewer.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = self.moved = 0
        self.known, self.paused = set(), False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        formula = flop_registry.get(op.overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not op.is_view:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.moved += sum(x.nbytes for x in read + written)
        for x in written:
            if x.device.type != "meta":
                self.add(x.untyped_storage())
        return out

    def uncounted(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor like x that takes no bytes: it plays one in host memory."""
        self.paused = True
        copy = torch.empty_like(x.detach())
        self.paused = False
        return copy

    def add(self, storage) -> None:
        if self.paused:
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key, size).atexit = False

    def drop(self, key, size) -> None:
        self.known.discard(key)
        self.live -= size

    def reset(self) -> int:
        self.peak = self.live
        return self.live


class CudaBytes(nullcontext):
    """The bytes from PyTorch's allocator; it counts no operations."""
    flops = moved = 0
    live = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated())

    def reset(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return self.live


class CountedParts(Parts):
    """Also FLOP and bytes moved in each part."""

    def __init__(self, device: torch.device, memory):
        super().__init__(device, memory, synchronize=True)
        self.flops, self.moved = defaultdict(int), defaultdict(int)

    @contextmanager
    def __call__(self, name: str):
        counter = self.memory
        flops, moved = (counter.flops, counter.moved) if counter else (0, 0)
        with super().__call__(name):
            yield
        if counter:
            self.flops[name] += counter.flops - flops
            self.moved[name] += counter.moved - moved


@contextmanager
def simulation():
    """Within the block tensors are fake, on the CPU, and are counted as a GPU would hold them -> the counter.

    What waits in host memory (--offload) is not counted.
    """
    fake, counter, to_host = FakeTensorMode(), LiveBytes(), Offload.to_host
    fake.__deepcopy__ = lambda memo: fake                       # copies of fake tensors stay in the one mode
    Offload.to_host = staticmethod(counter.uncounted)
    try:
        with warnings.catch_warnings(), fake, like_cuda(), counter:
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")   # by deepcopy
            yield counter
    finally:
        Offload.to_host = staticmethod(to_host)


@contextmanager
def like_cuda():
    """Norms in float32, as autocast has them on a GPU and not on a CPU: the larger tensors are counted."""
    norms = F.group_norm, F.layer_norm

    def norm(function, x, size, w=None, b=None, eps=1e-5):
        return function(wide(x), size, wide(w), wide(b), eps)

    F.group_norm, F.layer_norm = (partial(norm, function) for function in norms)
    try:
        yield
    finally:
        F.group_norm, F.layer_norm = norms


def wide(x):
    return x.float() if torch.is_autocast_enabled("cpu") else x


@contextmanager
def build(device, dtype):
    """Create modules on this device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_batch(config, models, n: int) -> dict:
    """What a trainer's step takes: n clips, or for v2 samples of a cache, zeros with one caption."""
    told = dict(caption=["a red circle moving right"] * n, reward_caption=[None] * n)
    T, H, W = config.frames, config.height, config.width
    if config.preset not in ("turbo-v2", "shapes-v2"):
        return told | dict(clip=torch.zeros(n, 3, T, H, W, dtype=torch.uint8), bad=0)
    vae = models.vae.config
    z = torch.zeros(n, vae.latent, T, H // vae.factor, W // vae.factor)
    c = models.text(told["caption"]).to("cpu")
    sample = told | dict(t=torch.full((n,), 999), z_t=z, eps_c=z, eps_u=z, gradient=z, c=c)
    return dict(distill=sample, rewards=sample, bad=0)


# ---- a training step ---------------------------------------------------------------------------------------


def report(config, group, world, trainer_class) -> Parts:
    """Makes the steps and prints what is returned. world(config, group) -> models, clips and reward terms.

    The first step is extra: memory is counted in it, but not time.
    """
    simulated = config.dry_run == 0
    if simulated:
        if config.preset.startswith("shapes"):
            raise ValueError(f"--preset {config.preset} is small enough for real steps: --dry-run 5")
        group.device, n = torch.device("cpu"), config.micro_batch     # other clips of a batch find the same memory
        less = {"reward_every": 1} if config.preset == "turbo-v2" else {}
        config = dataclasses.replace(config, batch=n * group.world_size, **less)
    cuda = group.device.type == "cuda"
    counting = simulation() if simulated else CudaBytes() if cuda else LiveBytes()

    # the world, and one step
    with counting as entered:
        counter = entered if isinstance(entered, LiveBytes) else counting
        parts = CountedParts(group.device, counter)
        models, _, terms = world(config, group)
        to_host = no_values if simulated else torch.Tensor.tolist
        trainer = trainer_class(config, models, terms, group)
        trainer.parts, trainer.to_host = parts, to_host
        trainer.optimizer.step()                                # allocates the moments; the gradient is zero
        trainer.keep_moments()
        held = inventory(trainer)
        held["together" if not config.offload else "on the device"] = counter.live
        if simulated:
            pick_worst(terms)
        batch = random_batch(config, models, config.batch // group.world_size)
        bar = f"steps of {config.batch} clips"
        steps = tqdm(total=1 + config.dry_run, desc=bar, disable=group.rank > 0)
        trainer.step(batch)
        steps.update()

    # the steps that are timed
    parts.memory, records = None, []
    parts.seconds.clear()
    for _ in range(config.dry_run):
        records.append(trainer.step(batch))
        steps.update()
    steps.close()
    if group.rank == 0:
        show(config, group, held, parts, records)
    group.close()
    return parts


def no_values(metrics) -> list[float]:
    """What a tensor without contents cannot tell: every loss is 0."""
    return [0.0] * len(metrics)


def pick_worst(terms) -> None:
    """Each reward looks at other frames than the others: the most that a step decodes."""
    for term in terms:
        term.pick = partial(last_frames if term.video else first_frames, term.frames)


def first_frames(n: int, T: int, generator) -> list[int]:
    return list(range(n))


def last_frames(n: int, T: int, generator) -> list[int]:
    return list(range(T - n, T))


def inventory(trainer) -> dict[str, int]:
    """Bytes that are held on the device all the time, and with --offload those that wait."""
    models, trained = trainer.models, trainer.gradient.nbytes
    held = {name: bytes_of(network) for name, network in networks_of(models).items()}
    held["UNet"] -= trained
    if trainer.teacher is not trainer.student:
        held |= {"UNet": 0, "teacher": bytes_of(trainer.teacher)}
    held |= {term.name: bytes_of(term.reward.model) for term in trainer.terms}
    held["trained weights" if not trainer.config.lora else "LoRA"] = trained
    ema = trained * bool(trainer.ema)
    held |= {"their EMA": ema, "their gradient": trained, "their moments": 2 * trained}
    waiting = sum(host.nbytes for pairs in trainer.offload.waiting.values() for _, host in pairs)
    waiting = {"in host memory": waiting} if trainer.offload.on else {}
    return held | waiting


def networks_of(models) -> dict:
    return {"UNet": models.unet, "VAE": models.vae, "text encoder": models.text}


def bytes_of(module) -> int:
    return sum(p.nbytes for p in module.parameters())


def show(config, group, held: dict, parts: CountedParts, records: list[dict]) -> None:
    """Prints the table: what is held all the time, then the cost of each part of a step."""
    n = len(records)
    print(f"{config.preset}, {config.width}x{config.height}, {config.frames} frames, {config.dtype}, "
          f"{config.batch} clips on {group.world_size} process{'es' * (group.world_size > 1)}, {config.micro_batch} at a time"
          ", " + (f"{n} steps" if n else "simulated"))
    show_held(held)
    show_parts(parts, "part of a step", n)
    print("(what distill leaves are the activations that the backward pass needs)")
    show_most(parts)
    if n:
        seconds = sum(parts.seconds.values()) / n
        print("last step: " + ", ".join(f"{name} {value:.4g}" for name, value in records[-1].items()))
        hours = seconds * config.train_steps / 3600
        print(f"a step takes {seconds:.2f} s, {config.train_steps} steps take {hours:.1f} h")
    else:
        show_cards(sum(parts.flops.values()), sum(parts.moved.values()), config.dtype)


# ---- a clip ------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """A part of what is done to a clip."""
    do: Callable        # (networks, results of the parts before it, by name) -> its own result
    times: int = 1      # how often; simulated once


def report_clip(title: str, models: Callable, dtype: str, work: dict[str, Work]) -> CountedParts:
    """Prints the budget of a clip, sampled or prepared, all of it with fake tensors. models() -> networks."""
    with simulation() as counter, torch.no_grad():
        parts, results = CountedParts(torch.device("cpu"), counter), {}
        made = models()
        held = {name: bytes_of(network) for name, network in networks_of(made).items()}
        held["together"] = counter.live
        for name, part in work.items():
            with parts(name):
                results[name] = part.do(made, results)

    print(f"{title}, {dtype}, simulated")
    show_held(held)
    times = {name: part.times for name, part in work.items()}
    show_parts(parts, "part of a clip", times=times)
    show_most(parts)
    flops, moved = (sum(times[name] * of[name] for name in work) for of in (parts.flops, parts.moved))
    show_cards(flops, moved, dtype)
    return parts


# ---- tables ------------------------------------------------------------------------------------------------


def show_held(held: dict) -> None:
    print(f"\n{'held all the time':18}     GiB")
    for name, size in held.items():
        print(f"{name:18}{size / GIB:8.2f}")


def show_parts(parts: CountedParts, title: str, n: int = 0, times: dict[str, int] | None = None) -> None:
    """A line per part. n: timed steps; without them FLOP and bytes. times: how often each part is done."""
    last = f"{'s':>8}" if n else f"{'TFLOP':>10}{'GB moved':>10}" + f"{'times':>7}" * bool(times)
    print(f"\n{title:18}{'peak GiB':>8}{'leaves GiB':>12}{last}")
    for name, peak in parts.peak.items():
        cost = f"{parts.flops[name] / 1e12:10.2f}{parts.moved[name] / 1e9:10.0f}"
        if n:
            cost = f"{parts.seconds[name] / n:8.2f}"
        if times:
            cost += f"{times[name]:7}"
        print(f"{name:18}{peak / GIB:8.2f}{parts.kept[name] / GIB:12.2f}{cost}")


def show_most(parts: CountedParts) -> None:
    worst = max(parts.peak, key=parts.peak.get)
    print(f"\nmost: {parts.peak[worst] / GIB:.2f} GiB, in {worst}; "
          "on a GPU add about 1 GiB for CUDA and its libraries")


def show_cards(flops: int, moved: int, dtype: str) -> None:
    """Seconds at the peak rates of three cards: the arithmetic, and memory traffic without fusion."""
    print(f"\nin all {flops / 1e12:.1f} TFLOP, and {moved / 1e9:.0f} GB moved if no operations are fused")
    print(f"{'at the peak rates of':22}{'TFLOP/s':>9}{'GB/s':>7}{'s of arithmetic':>17}{'s of traffic':>14}")
    for name, (half, single, bandwidth) in CARDS.items():
        rate = single if dtype == "float32" else half
        print(f"{name:22}{rate:9.1f}{bandwidth:7}{flops / rate / 1e12:17.2f}{moved / bandwidth / 1e9:14.2f}")
