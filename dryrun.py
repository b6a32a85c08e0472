"""Will it fit, and how long will it take? Training steps with random weights and clips at full size; no download needed.

`train.py --preset turbo-vc2 --dry-run N` makes N steps. `--dry-run 0` makes one with fake tensors, which have shapes but no
contents: the full-size models then need neither memory nor a GPU, and what is counted is what a GPU would have to hold.
"""
import dataclasses
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rewards
import weights
from model import VAE, TextEncoder, UNet3D
from run import Parts

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
    """New modules are made there and so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def networks(config, device):
    """The teacher's networks as weights.load would return them, with random weights."""
    name = config.preset.split("-")[1]
    family, dtype = weights.FAMILIES[name], getattr(torch, config.dtype)
    with build(device, dtype if config.lora else torch.float32):
        unet = UNet3D(dataclasses.replace(family.unet, guidance=True))
    with build(device, dtype):
        vae, text = VAE(family.vae).requires_grad_(False), TextEncoder(family.text).requires_grad_(False)
    return weights.Models(name, unet, vae, text, family.fps, family.height, family.width, family.frames, {})


class RandomReward(rewards.Reward):
    """Random weights, centre crop, and one caption for all (the public tokenizers read files)."""
    generator = property(lambda self: None, lambda self, value: None)

    def __init__(self, name, config, device):
        recipe, dtype = rewards.RECIPES[name], getattr(torch, config.dtype)
        settings = recipe.config(None)
        if name == "internvideo2":
            settings = dataclasses.replace(settings, frames=config.video_frames)
        with build(device, dtype):
            model = recipe.model(settings)
        length = {rewards.CLIP: 77, rewards.ViCLIP: 32, rewards.ImageReward: 35, rewards.InternVideo2: 40}[recipe.model]
        super().__init__(name, rewards.freeze(model, device, dtype), lambda captions: torch.ones(len(captions), length).long())
        self.checkpoint(config.checkpointing)


def noise_clips(config, n: int) -> dict:
    """A batch as data.loader yields it."""
    clip = torch.randint(0, 256, (n, 3, config.frames, config.height, config.width), dtype=torch.uint8)
    return dict(clip=clip, caption=["noise"] * n, reward_caption=[None] * n, bad=0)


def report(config, group, Trainer, reward_terms) -> Parts:
    """Makes the steps and prints the table of what is returned."""
    if config.preset == "shapes":
        raise ValueError("--preset shapes is small and downloads nothing; leave --dry-run away")
    simulate = config.dry_run == 0
    if simulate:                                                # one micro-batch: the next ones find the same memory
        group.device, config = torch.device("cpu"), dataclasses.replace(config, batch=config.micro * group.world)
    memory = CudaBytes() if group.device.type == "cuda" else LiveBytes()
    parts, rest = Parts(group.device, memory), {}
    with FakeTensorMode() if simulate else nullcontext(), like_cuda() if simulate else nullcontext(), memory:
        with parts("UNet, VAE, text encoder"):
            models = networks(config, group.device)
        with parts("reward models"):
            is_video = [name in ("viclip", "internvideo2") for name, _, _ in map(rewards.parse_spec, config.reward)]
            terms = reward_terms(config, {
                name: (video, weight, partial(RandomReward, name, config, group.device))
                for (name, _, weight), video in zip(map(rewards.parse_spec, config.reward), is_video, strict=True)})
        with parts("trained weights, EMA, gradient"):
            trainer = Trainer(config, models, terms, group, parts)
        with parts("optimizer"):
            trainer.optimizer.step()                            # allocates the moments; the gradient is zero
        rest, parts.kept = parts.kept, {}
        parts.seconds.clear(), parts.peak.clear()
        if simulate:
            fake(trainer)
        records = [trainer.step(noise_clips(config, config.batch // group.world)) for _ in range(max(config.dry_run, 1))]
    if group.rank == 0:
        show(config, rest, parts, records, simulate)
    group.leave()
    return parts


def fake(trainer) -> None:
    """What a tensor without contents cannot tell: losses are 0, and each reward looks at other frames (the worst case)."""
    trainer.read = lambda values: [0.0] * len(trainer.names)
    for term in trainer.terms:
        term.pick = lambda T, generator, n=term.frames, video=term.video: list(range(T - n, T) if video else range(n))


def show(config, rest: dict, parts: Parts, records: list[dict], simulate: bool) -> None:
    n = len(records)
    print(f"{config.preset}, {config.width}x{config.height}, {config.frames} frames, {config.dtype}, "
          f"{config.micro} of {config.batch} clips at a time, " + ("simulated" if simulate else f"{n} steps"))
    print(f"\n{'held all the time':34}{'GiB':>8}")
    for name, size in rest.items():
        print(f"{name:34}{size / GIB:8.2f}")
    print(f"{'together':34}{sum(rest.values()) / GIB:8.2f}")
    print(f"\n{'part of a step':18}{'s' if not simulate else '':>8}{'keeps GiB':>12}{'peak GiB':>12}")
    for name in parts.peak:
        seconds = "" if simulate else f"{parts.seconds[name] / n:.2f}"
        print(f"{name:18}{seconds:>8}{parts.kept[name] / GIB:12.2f}{parts.peak[name] / GIB:12.2f}")
    worst = max(parts.peak, key=parts.peak.get)
    print(f"\nmost: {parts.peak[worst] / GIB:.2f} GiB, in {worst}; on a GPU add about 1 GiB for CUDA and its libraries")
    if not simulate:
        seconds = sum(parts.seconds.values()) / n
        print("last step: " + ", ".join(f"{name} {value:.4g}" for name, value in records[-1].items()))
        print(f"a step takes {seconds:.2f} s, {config.steps} steps take {seconds * config.steps / 3600:.1f} h")
