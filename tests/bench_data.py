"""How fast one worker decodes training clips: python tests/bench_data.py

16 frames at 16 fps, 512x320, from random starts in 5 s clips of 596x336 at 30 fps (the size of WebVid's files)."""
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import loader, open_dataset  # noqa: E402
from plumbing.video import write_video  # noqa: E402


def moving_clip(seed: int, T: int = 150, height: int = 336, width: int = 596) -> torch.Tensor:
    """A coloured texture that drifts, with a little noise, so that the file is about as large as a natural one."""
    generator = torch.Generator().manual_seed(seed)
    texture = F.interpolate(torch.rand(1, 3, 24, 40, generator=generator), (height, width), mode="bicubic")[0] * 200
    frames = [texture.roll((t, 2 * t), (1, 2)) + 20 * torch.rand(3, height, width, generator=generator)
              for t in range(T)]
    return torch.stack(frames, 1).clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    torch.set_num_threads(1)                                         # what a worker has
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):
            write_video(f"{folder}/{k}.mp4", moving_clip(k), 30)
            Path(folder, f"{k}.txt").write_text("a texture")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.mp4")) / 2e6
        batches = loader(open_dataset(folder, frames=16, fps=16, height=320, width=512), batch=1)
        next(batches)
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(20):
            next(batches)
        wall, processor = 20 / (time.perf_counter() - wall), 20 / (time.process_time() - processor)
        print(f"{processor:.1f} clips per second and worker ({wall:.1f} by the wall clock of this machine now), "
              f"files of {size:.1f} MB")
