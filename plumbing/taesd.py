"""TAESD's decoder (O. B. Bohan, madebyollin/taesd): 1.2 M weights for the latents of the VAE's 50 M.

It is less exact, and next to no work. N frames of H x W pixels, B clips of T frames.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plumbing import weights

# diffusers counts layers without the clamp
DIFFUSERS_TINY = [(r"^decoder\.layers\.(\d+)", lambda match: str(int(match[1]) + 1))]


class TinyBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        conv1, conv2, conv3 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), conv3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyDecoder(nn.Sequential):
    """Scaled latents (N, 4, h, w) -> frames (N, 3, 8h, 8w) in [0, 1]; layers are named by their places."""
    config = SimpleNamespace(factor=8, latent=4)            # as the VAE's

    def __init__(self, width: int = 64):
        def level():
            return [*(TinyBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2),
                    nn.Conv2d(width, width, 3, padding=1, bias=False)]

        super().__init__(SoftClamp(), nn.Conv2d(4, width, 3, padding=1), nn.ReLU(),
                         *level(), *level(), *level(),
                         TinyBlock(width), nn.Conv2d(width, 3, 3, padding=1))

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """Scaled latents (B, 4, T, h, w) -> pixels in about [-1, 1], `chunk` frames at a time."""
        frames = z.transpose(1, 2).flatten(0, 1).to(self[1].weight.dtype)
        pixels = torch.cat([self(some) for some in frames.split(chunk or len(frames))])
        return 2 * pixels.unflatten(0, (len(z), -1)).transpose(1, 2) - 1


def load_tiny_decoder(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """path: taesd_decoder.pth or .safetensors, or an AutoencoderTiny of diffusers (a file, or its folder)."""
    files = weights.weight_files(path, "diffusion_pytorch_model", "taesd_decoder")
    state = weights.rename(weights.read_named(*files), DIFFUSERS_TINY)
    state = {name: x for name, x in state.items() if not name.startswith("encoder.")}

    with weights.without_memory():
        decoder = TinyDecoder()
    return weights.fill(decoder, state, path, device, dtype).requires_grad_(False)
