"""Will it fit, and how long will it take? Training steps with random weights and clips at full size; no download needed.

`train.py --preset turbo-vc2 --dry-run N` makes N steps. `--dry-run 0` makes one with fake tensors, which have shapes but no
contents: the full-size models then need neither memory nor a GPU, and what is counted is what a GPU would have to hold.
(`--preset shapes --dry-run N` takes the toy as it is, and so is a benchmark.)
"""
import dataclasses
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from plumbing.run import Parts

GIB = 2 ** 30


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within the block and not yet freed, real or fake. `peak`: the most since `reset`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
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
    """The same numbers from PyTorch's allocator."""
    live = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated())

    def reset(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return self.live


@contextmanager
def like_cuda():
    """Autocast on a GPU computes norms in float32, on a CPU it does not: the simulation shall count the larger tensors."""
    norms = F.group_norm, F.layer_norm
    F.group_norm = lambda x, groups, w=None, b=None, eps=1e-5: norms[0](wide(x), groups, wide(w), wide(b), eps)
    F.layer_norm = lambda x, shape, w=None, b=None, eps=1e-5: norms[1](wide(x), shape, wide(w), wide(b), eps)
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
    """What a trainer's step takes: n clips, or for v2 samples of a cache, with zeros in them and one caption."""
    told = dict(caption=["a red circle moving right"] * n, reward_caption=[None] * n)
    T, H, W = config.frames, config.height, config.width
    if config.preset not in ("turbo-v2", "shapes-v2"):
        return told | dict(clip=torch.zeros(n, 3, T, H, W, dtype=torch.uint8), bad=0)
    vae = models.vae.config
    z = torch.zeros(n, vae.latent, T, H // vae.factor, W // vae.factor)
    c = models.text(told["caption"]).to("cpu")
    sample = told | dict(t=torch.full((n,), 999), z_t=z, eps_c=z, eps_u=z, gradient=z, c=c)
    return dict(distill=sample, rewards=sample, bad=0)


# ---- the report --------------------------------------------------------------------------------------------


def report(config, group, world, Trainer) -> Parts:
    """Makes the steps and prints what is returned. world(config, group) -> models, clips and reward terms. The first step is extra: memory is counted in it, but not time."""
    n = config.batch // group.world
    if config.dry_run == 0:
        if config.preset == "shapes":
            raise ValueError("--preset shapes is small enough for real steps: --dry-run 5")
        n, group.device = config.micro, torch.device("cpu")     # the other clips of a batch would find the same memory
        config = dataclasses.replace(config, batch=n * group.world)
    memory, mode = CudaBytes() if group.device.type == "cuda" else LiveBytes(), nullcontext()
    if config.dry_run == 0:
        mode = FakeTensorMode()
        mode.__deepcopy__ = lambda memo: mode                   # copies of fake tensors stay in the one mode
    parts = Parts(group.device, memory)
    with mode, like_cuda() if config.dry_run == 0 else nullcontext(), memory:
        models, clips, terms = world(config, group)
        to_host = no_values if config.dry_run == 0 else torch.Tensor.tolist
        trainer = Trainer(config, models, terms, group, parts, to_host)
        trainer.optimizer.step()                                # allocates the moments; the gradient is zero
        held = inventory(trainer) | {"together": memory.live}
        if config.dry_run == 0:
            pick_worst(terms)
        batch = random_batch(config, models, n)
        steps = tqdm(total=1 + config.dry_run, desc=f"steps of {config.batch} clips", disable=group.rank > 0)
        trainer.step(batch)
        steps.update()
    parts.memory, records = None, []
    parts.seconds.clear()
    for _ in range(config.dry_run):
        records.append(trainer.step(batch))
        steps.update()
    steps.close()
    if group.rank == 0:
        show(config, group, held, parts, records)
    group.leave()
    return parts


def no_values(metrics) -> list[float]:
    """What a tensor without contents cannot tell: every loss is 0."""
    return [0.0] * len(metrics)


def pick_worst(terms) -> None:
    """Each reward looks at other frames than the others: the most that a step decodes."""
    for term in terms:
        term.pick = lambda T, generator, n=term.frames, video=term.video: list(range(T - n, T) if video else range(n))


def inventory(trainer) -> dict[str, int]:
    """Bytes that are held all the time."""
    models, trained = trainer.models, trainer.gradient.nbytes
    held = {"UNet": bytes_of(models.unet) - trained, "VAE": bytes_of(models.vae), "text encoder": bytes_of(models.text)}
    if trainer.teacher is not trainer.student:
        held |= {"UNet": 0, "teacher": bytes_of(trainer.teacher)}
    held |= {term.name: bytes_of(term.reward.model) for term in trainer.terms}
    held["trained weights" if not trainer.config.lora else "LoRA"] = trained
    return held | {"their EMA": trained * bool(trainer.ema), "their gradient": trained, "their moments": 2 * trained}


def bytes_of(module) -> int:
    return sum(p.nbytes for p in module.parameters())


def show(config, group, held: dict, parts: Parts, records: list[dict]) -> None:
    """Prints the table: what is held all the time, then time and memory of each part of a step."""
    n = len(records)
    print(f"{config.preset}, {config.width}x{config.height}, {config.frames} frames, {config.dtype}, {config.batch} clips on "
          f"{group.world} process{'es' * (group.world > 1)}, {config.micro} at a time, " + (f"{n} steps" if n else "simulated"))
    print(f"\n{'held all the time':18}     GiB")
    for name, size in held.items():
        print(f"{name:18}{size / GIB:8.2f}")
    print(f"\n{'part of a step':18}{'peak GiB':>8}{'leaves GiB':>12}" + f"{'s':>8}" * bool(n))
    for name, peak in parts.peak.items():
        seconds = f"{parts.seconds[name] / n:8.2f}" if n else ""
        print(f"{name:18}{peak / GIB:8.2f}{parts.kept[name] / GIB:12.2f}{seconds}")
    worst = max(parts.peak, key=parts.peak.get)
    print("(what distill leaves are the activations that the backward pass needs)")
    print(f"\nmost: {parts.peak[worst] / GIB:.2f} GiB, in {worst}; on a GPU add about 1 GiB for CUDA and its libraries")
    if n:
        seconds = sum(parts.seconds.values()) / n
        print("last step: " + ", ".join(f"{name} {value:.4g}" for name, value in records[-1].items()))
        print(f"a step takes {seconds:.2f} s, {config.steps} steps take {seconds * config.steps / 3600:.1f} h")
