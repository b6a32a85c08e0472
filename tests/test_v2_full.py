"""T2V-Turbo-v2 at full size on a CPU, from random weights in the layouts of the public files.

    pytest -s -m slow tests/test_v2_full.py

Needs 10 GB of disk; seconds and memory are printed.
"""
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_full_size
import test_rewards
import torch
from tiny import log

import data
import model
import train
import turbo
from plumbing.layouts import PUBLIC
from plumbing.video import write_video
from solver import Schedule, ddim_invert

SIZE = (4, 64, 128)                                         # frames, height, width
SAID = [str(word) for pair in zip(("--frames", "--height", "--width"), SIZE) for word in pair]


def command(title, script, *argv):
    """Runs a script on one thread; prints its seconds and its peak of resident memory."""
    root, start = Path(train.__file__).parent, time.time()
    with open(os.devnull) as nothing:
        process = subprocess.Popen([sys.executable, script, "--preset", "turbo-v2", *SAID,
                                    *map(str, argv)], cwd=root, stdin=nothing,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(f"\n{title}: {time.time() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of one core, "
          f"peak {used.ru_maxrss / 2 ** 20:.1f} GiB, the mapped files included")
    assert process.returncode == 0


def moving_clip(seed):
    """A bright square on noise that moves right: uint8 (3, 2 T, H, W)."""
    T, H, W = SIZE
    noise = torch.randint(0, 128, (3, 1, H, W), generator=torch.Generator().manual_seed(seed))
    clip = noise.expand(3, 2 * T, H, W).clone()
    for frame in range(2 * T):
        left = 8 * (frame + seed)
        clip[:, frame, 16:48, left:left + 32] = 255
    return clip.byte()


def write_clips(folder, seeds):
    folder.mkdir()
    for seed in seeds:
        write_video(folder / f"{seed}.mp4", moving_clip(seed), 8)
        (folder / f"{seed}.txt").write_text(f"a white square moves to the right on noise {seed}")


def aside(task, *args):
    """Runs a task in a process of its own, which gives its memory back."""
    process = multiprocessing.Process(target=task, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    aside(test_full_size.write_videocrafter, folder)
    return folder / "model.ckpt"


@pytest.mark.slow
def test_four_clips_and_two_steps(teacher, tmp_path):
    """Algorithm 1 on four clips, two of which carry rewards, and two steps of Algorithm 2 with all three."""
    write_clips(tmp_path / "long", (0, 1))
    write_clips(tmp_path / "short", (2, 3))
    cache, out = tmp_path / "cache", tmp_path / "run"
    command("preparing 4 clips, 2 draws", "prepare.py", "--out", cache, "--teacher", teacher, "--data",
            tmp_path / "long", "--reward-data", tmp_path / "short", "--draws", 2)
    made = data.Cache(cache)
    samples = [made.get(i) for i in range(len(made))]
    assert len(samples) == 8 and len(data.Cache(cache, only_rewards=True)) == 4
    assert any(sample["gradient"].any() for sample in samples)
    assert all(sample["t"] >= 500 or not sample["gradient"].any() for sample in samples)

    # full fine-tuning holds 16 bytes a weight, 23 GB
    given = []
    for name in ("hpsv2", "clip", "internvideo2"):
        (tmp_path / name).mkdir()
        aside(test_rewards.write_full_size, name, tmp_path / name)
        given += ["--reward", f"{name}={tmp_path / name / PUBLIC[name].files[0]}"]
    command("2 steps of 3 + 1 clips, LoRA of rank 64", "train.py", "--data", cache, "--teacher", teacher,
            "--out", out, "--lora", 64, "--batch", 3, "--train-steps", 2, "--sample-every", 0, *given)
    lines = log(out)
    print(*lines, sep="\n")
    assert len(lines) == 2 and {"hpsv2", "clip", "internvideo2"} < lines[0].keys()
    assert all(line["grad_norm"] > 0 and line["steps_skipped"] == 0 for line in lines)


@pytest.mark.slow
def test_a_coarser_inversion_moves_the_gradient(teacher):
    """Cosine and length of ∂G/∂z_t by inversions of 50 and 25 steps against 200: printed only, as the weights
    are random. So that the walk goes somewhere the last layer is scaled until ε has unit variance."""
    models = model.load("vc2", teacher, dtype=torch.bfloat16)
    models.unet.requires_grad_(False)
    schedule, times = Schedule(200), [torch.tensor([t]) for t in (504, 999)]
    clip = moving_clip(0)[None, :, :SIZE[0]].float() / 127.5 - 1
    with torch.no_grad():
        z0 = models.vae.encode(clip.to(torch.bfloat16)).float()
        c = models.text(["a white square moves to the right"])

    def eps_model(z, t):
        return models.unet(z, t, c, fps=8).float()

    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        models.unet.out[-1].weight /= eps_model(noise, times[-1]).std()
    gradients = {}
    for steps in (200, 50, 25):
        start = time.time()
        for t, z_ref in zip(times, ddim_invert(Schedule(steps), eps_model, z0, times), strict=True):
            z_t = schedule.add_noise(z0, noise, t)
            gradient, energy = turbo.motion_gradient(models.unet, z_t, z_ref, t, c, fps=8)
            gradients[steps, t.item()] = gradient.flatten()
            fine = gradients[200, t.item()]
            cosine = torch.cosine_similarity(gradient.flatten(), fine, dim=0).item()
            print(f"\ninversion {steps}, t = {t.item()}: energy {energy.item():.3g}, cosine {cosine:.3f}, "
                  f"length {(gradient.norm() / fine.norm()).item():.3f}, "
                  f"std of z_ref {z_ref.std().item():.2f}, {time.time() - start:.0f} s")
            assert gradient.isfinite().all() and gradient.any()
