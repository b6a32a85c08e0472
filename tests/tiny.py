"""A world small enough that a training step takes milliseconds. As a program: train.py in that world."""
from types import SimpleNamespace

import torch
from torch import nn

import model
import train

T, H, W = 4, 16, 16


class Text(nn.Module):
    """Caption -> three random tokens, of its own seed."""

    def forward(self, captions):
        draw = [torch.randn(3, 16, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in captions]
        return torch.stack(draw)


class Clips:
    """Noise with a caption; the start is as random as a decoder's."""

    def __len__(self):
        return 7

    def get(self, index, generator):
        clip = torch.randint(0, 256, (3, T, H, W), generator=generator, dtype=torch.uint8)
        return dict(clip=clip, caption=f"noise number {index}", reward_caption=None, index=index)


class Brightness(nn.Module):
    """A reward that wants frames bright and reads the caption's length."""
    generator = None

    def __init__(self, name, kind, frames=None):
        super().__init__()
        self.name, self.kind, self.frames = name, kind, frames

    def forward(self, clips, captions):
        lengths = torch.tensor([len(text) for text in captions], dtype=clips.dtype, device=clips.device)
        return (clips ** 2).mean((1, 2, 3, 4)) * lengths + clips.std((1, 3, 4)).mean(1)


def networks(device="cpu", seed=0):
    """Tiny random networks whose last layers are not zero, as a trained teacher's are not."""
    torch.manual_seed(seed)
    unet = model.UNet3D(model.UNetConfig(channels=32, mult=(1, 2), res_blocks=1, head_dim=16, context_dim=16, init_heads=2))
    vae = model.VAE(model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2))
    for p in unet.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    for network in (unet, vae):
        network.requires_grad_(False).eval().to(device)
    return SimpleNamespace(name="tiny", unet=unet, vae=vae, text=Text(), fps=8, frames=T, height=H, width=W, steps=50)


def world(device):
    return networks(device), Clips(), {"image": Brightness("image", "image"), "video": Brightness("video", "video", 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.toy = world
    train.main()
