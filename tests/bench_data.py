"""How fast one worker decodes training clips and reads v2's cache: python tests/bench_data.py

16 frames at 16 fps, 512x320, from random starts in 5 s clips of 596x336 at 30 fps (WebVid's size)."""
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Cache, CacheWriter, loader, open_dataset  # noqa: E402
from plumbing.video import write_video  # noqa: E402


def moving_clip(seed: int, T: int = 150, height: int = 336, width: int = 596) -> torch.Tensor:
    """A coloured texture that drifts, with a little noise, so that the file is about as large as a natural
    one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 24, 40, generator=generator)
    texture = F.interpolate(coarse, (height, width), mode="bicubic")[0] * 200
    frames = [texture.roll((t, 2 * t), (1, 2)) + 20 * torch.rand(3, height, width, generator=generator)
              for t in range(T)]
    return torch.stack(frames, 1).clamp(0, 255).to(torch.uint8)


def rate(batches, steps: int, batch: int) -> tuple[float, float]:
    """Clips per second of processor time and of the clock."""
    next(batches)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    clips = steps * batch
    return clips / (time.process_time() - processor), clips / (time.perf_counter() - wall)


def decoding(folder: str) -> None:
    for k in range(2):
        write_video(f"{folder}/{k}.mp4", moving_clip(k), 30)
        Path(folder, f"{k}.txt").write_text("a texture")
    size = sum(file.stat().st_size for file in Path(folder).glob("*.mp4")) / 2e6
    processor, wall = rate(loader(open_dataset(folder, 16, 16, 320, 512), batch=1), 20, 1)
    print(f"decoding:      {processor:.1f} clips per second and worker ({wall:.1f} by the clock), "
          f"files of {size:.1f} MB")


def caching(folder: str) -> None:
    """v2's cache: samples of 512x320 and 16 frames, with motion gradients, in batches of 3."""
    writer = CacheWriter(folder, dict(clips=64, draws=1))
    z, c = torch.randn(4, 16, 40, 64), torch.randn(77, 1024)
    start = time.process_time()
    for index in writer.missing():
        writer.add(dict(index=index, draw=0, rewards=True, z_t=z, eps_c=z, eps_u=z, gradient=z, c=c))
    writer.finish()
    print(f"cache written: {64 / (time.process_time() - start):.0f} samples per second")
    start = time.process_time()
    CacheWriter(folder, dict(clips=64, draws=1)).missing()
    print(f"cache checked: {64 / (time.process_time() - start):.0f} samples per second")
    processor, wall = rate(loader(Cache(folder), batch=3), 40, 3)
    print(f"cache read:    {processor:.0f} samples per second and worker ({wall:.0f} by the clock)")


if __name__ == "__main__":
    torch.set_num_threads(1)                                         # what a worker has
    for measure in (decoding, caching):
        with tempfile.TemporaryDirectory() as folder:
            measure(folder)
