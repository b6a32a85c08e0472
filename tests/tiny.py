"""A world in which a training step takes milliseconds, and ways to start, kill and compare runs in it.

As a program it is train.py in that world: `torchrun tests/tiny.py --out DIR`.
"""
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from oracles import sizes
from torch import nn

import data
import model
import train
from plumbing.folder import checkpoints

# runs are forked here, which neither CUDA nor the threads of autograd survive;
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# after a first backward pass on the CPU (not a fake one) there are none
torch.ones(1, requires_grad=True).backward()

T, H, W = 4, 16, 16
OPTIONS = dict(
    frames=T, height=H, width=W, batch=6, micro_batch=3, lora=4, train_steps=4, save_every=2, sample_every=0,
    dtype="float32", lr=1e-4, reward=("shapes-clip", "shapes-viclip"))
RECIPE = dict(out="none", image_frames=2, video_frames=2, grid=50, w_min=5.0, w_max=15.0)
UNET = model.UNetConfig(**sizes(32, (1,), 1, attention_levels=()), head_dim=16, context_dim=16,
                        init_heads=2, groups=8)
MOTION = dataclasses.replace(UNET, **sizes(32, (1,), 1, attention_levels=(0,)))     # v2's energy reads it


class Text(nn.Module):
    """Caption -> three random tokens, from a seed of its own."""

    def forward(self, captions):
        generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in captions]
        return torch.stack([torch.randn(3, 16, generator=g) for g in generators])


class Clips:
    """Noise with a caption. `on_get` is called with the index first: a place for accidents."""
    on_get = staticmethod(lambda index: None)

    def __len__(self):
        return 100

    def get(self, index, generator):
        self.on_get(index)
        clip = torch.randint(0, 256, (3, T, H, W), generator=generator, dtype=torch.uint8)
        return dict(clip=clip, caption=f"noise {'x' * (index % 5)}", reward_caption=None, index=index)


class Bright:
    """A reward that likes bright, varied frames, and long captions."""

    def __init__(self, name):
        self.name, self.model = name, nn.Identity()

    def __call__(self, clips, captions, generators=None):
        lengths = torch.tensor([len(text) for text in captions], dtype=clips.dtype)
        return (clips ** 2).mean((1, 2, 3, 4)) * lengths + clips.std(1).mean((1, 2, 3))


def networks(seed=0, unet=UNET):
    """Tiny random networks whose last layers are not zero, as a trained teacher's are not."""
    torch.manual_seed(seed)
    unet = model.UNet3D(unet)
    vae = model.VAE(model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2))
    for p in unet.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return SimpleNamespace(unet=unet.eval(), vae=vae.requires_grad_(False).eval(), text=Text(),
                           teacher=f"of seed {seed}", autoencoder="")


def load_world(config, group):
    def load(name, path, frames):
        return Bright("image" if frames is None else "video")

    terms = train.reward_terms(config, load)
    for term in terms:
        term.name = term.reward.name
    clips = data.Cache(config.data[0], train.cache_header(config)) if config.is_v2 else Clips()
    return networks(unet=MOTION if config.is_v2 else UNET), clips, terms


def in_this_world(command, argv, **recipe):
    """command(argv) where --preset shapes-vcm and shapes-v2 are tiny. recipe: fields that no option has."""
    tiny = {name: train.PRESETS[name] | OPTIONS | RECIPE | recipe for name in ("shapes-vcm", "shapes-v2")}
    preset = [] if "--preset" in argv else ["--preset", "shapes-vcm"]
    with mock.patch.dict(train.PRESETS, tiny):
        return command([*preset, *map(str, argv)])


def configure(*argv, **recipe):
    return in_this_world(train.configure, argv, **recipe)


def main(argv, **recipe):
    """train.py's, in this world."""
    train.load_world, train.shapes.accuracy = load_world, lambda generate, pairs: 0.5
    torch.set_num_threads(1)
    in_this_world(train.main, argv, **recipe)
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), "threads of the group outlive it"


# ---- runs --------------------------------------------------------------------------------------------------

def _process(rank, world, port, argv, before, recipe, log):
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv[0] = "train.py"
    if before:
        before(rank)
    main(argv, **recipe)


def start(out, *argv, world=1, before=None, **recipe):
    """Forks the processes of a run. `before(rank)` is called in each first."""
    import torch._dynamo  # every optimizer wants it: once here, not in each process
    assert torch._dynamo

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    argv = [*argv] if "--out" in argv else ["--out", out, *argv]
    processes = [fork.Process(target=_process, args=(rank, world, port, argv, before, recipe, f"{out}.txt"))
                 for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    """Exit codes; a run of which one process fails is ended as torchrun ends it."""
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.05)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.join(1)
                process.kill()
    return [process.exitcode for process in processes]


def run(out, *argv, world=1, before=None, **recipe):
    """A whole run -> (first exit code that is not 0, else 0; what it printed)."""
    codes = finish(start(out, *argv, world=world, before=before, **recipe))
    with open(f"{out}.txt") as file:
        return next((code for code in codes if code), 0), file.read()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ---- what a run leaves -------------------------------------------------------------------------------------

def last(out):
    """The last checkpoint, loaded."""
    return torch.load(checkpoints(out)[-1], weights_only=True)


def log(out):
    """Its log, without what differs from run to run."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["memory_gib"]
    return lines


def same(a, b, near=None):
    """Are two checkpoints, or parts of them, equal bit by bit; or within `near`?"""
    if isinstance(a, dict):
        differ = ("out", "resume", "train_steps", "micro_batch")
        return a.keys() == b.keys() and all(same(a[key], b[key], near) for key in a if key not in differ)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, near) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        if near is None:
            return torch.equal(a, b)
        return torch.allclose(a, b, rtol=near, atol=near * a.abs().max().item())
    return a == b if near is None or not isinstance(a, float) else abs(a - b) <= near * abs(a)


def program():
    """This file as a program, where torchrun has told it its place."""
    first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"]
    if first and rank == "1" and "CRASH" in os.environ:
        seen = []
        limit = int(os.environ["CRASH"])
        Clips.on_get = staticmethod(lambda index: seen.append(index) or (len(seen) > limit and die()))
    if not first and rank == "0":
        time.sleep(1)  # late: the other one comes upon the first attempt's address in torchrun's store
    main(sys.argv[1:])


if __name__ == "__main__":
    program()
