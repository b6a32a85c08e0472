"""Clips per second by threads and by processes, in turns: python tests/bench_data.py [WORKERS]

16 frames at 16 fps and 512x320, from random starts in 2 s clips of 1280x720 at 30 fps."""
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
from plumbing.video import write_video  # noqa: E402

ROUNDS, CLIPS = 5, 12


def moving_clip(seed: int, T: int = 60, height: int = 720, width: int = 1280) -> torch.Tensor:
    """A coloured texture that drifts, with noise, so that its file is about as large as a natural one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 24, 40, generator=generator)
    texture = F.interpolate(coarse, (height, width), mode="bicubic")[0] * 200
    noise = 6 * torch.rand(3, height, width, generator=generator)
    frames = [texture.roll((t, 2 * t), (1, 2)) + noise.roll((-7 * t, 11 * t), (1, 2)) for t in range(T)]
    return torch.stack([frame.clamp(0, 255).to(torch.uint8) for frame in frames], 1)


class Draws:
    """What a process of PyTorch's DataLoader needs: dataset[position]."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, position: int):
        return data.draw(self.dataset, 0, position)[0]["clip"]


def rate(clips) -> float:
    """Clips per second, once the workers are at it."""
    next(clips)
    start = time.perf_counter()
    for _ in islice(clips, CLIPS):
        pass
    return CLIPS / (time.perf_counter() - start)


def main(workers: int) -> None:
    rates = {"threads": [], "processes": [], "one": []}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):
            write_video(f"{folder}/{k}.mp4", moving_clip(k), 30)
            Path(folder, f"{k}.txt").write_text("a texture")
        dataset = data.open_dataset(folder, 16, 16, 320, 512)

        for _ in range(ROUNDS):
            processes = DataLoader(Draws(dataset), None, sampler=count(), num_workers=workers)
            rates["processes"].append(rate(iter(processes)))
            rates["threads"].append(rate(data.loader(dataset, 1, workers=workers)))
            rates["one"].append(rate(data.loader(dataset, 1, workers=0)))

            print(", ".join(f"{name} {each[-1]:.2f} clips/s" for name, each in rates.items()), flush=True)

    ratios = [a / b for a, b in zip(rates["threads"], rates["processes"])]
    print(f"{workers} workers, median of {ROUNDS} rounds: threads / processes = {median(ratios):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
