"""Between pixels and latents: the VAE of Stable Diffusion, and TAESD's small decoder for the same latents.

Both work frame by frame. B clips of C channels and T frames of H x W pixels; N images.
"""
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing import weights


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are those of Stable Diffusion's KL-F8, which both teachers use."""
    channels: int = 128
    mult: tuple = (1, 2, 4, 4)              # width of each level, in units of channels
    res_blocks: int = 2                     # per level of the encoder; one more in the decoder
    latent: int = 4
    groups: int = 32                        # of every group norm
    scale: float = 0.18215                  # brings latents to unit variance
    patch: int = 1                          # patch x patch pixels enter and leave as channels; KL-F8: 1

    @property
    def factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch * 2 ** (len(self.mult) - 1)

    def shape(self, T: int, H: int, W: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the latents of a clip with T frames of H x W pixels."""
        return self.latent, T, H // self.factor, W // self.factor


KL_F8 = VAEConfig()


class VAEResBlock(nn.Module):
    """Two convolutions around which x passes unchanged. (N, Cin, H, W) -> (N, Cout, H, W)"""

    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.silu = nn.SiLU()

    def forward(self, x):
        h = self.conv1(self.silu(self.norm1(x)))
        h = self.silu(self.norm2(h))
        h = self.conv2(h)
        return self.nin_shortcut(x) + h


class VAEAttention(nn.Module):
    """One head over all pixels of a frame."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).permute(0, 2, 3, 1).flatten(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)         # (N, 1, H*W, C)
        h = h[:, 0].unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    """Doubles H and W, each pixel four times, and convolves. (N, C, H, W) -> (N, C, 2H, 2W)"""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def named(**layers) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def downsample(width):
    pad = nn.ZeroPad2d((0, 1, 0, 1))                        # right and below only, as in training
    return named(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2))


def vae_level(cin, cout, count, groups, **resampling):
    blocks = [VAEResBlock(cin if i == 0 else cout, cout, groups) for i in range(count)]
    return named(block=nn.Sequential(*blocks), **resampling)


class Levels(nn.Sequential):
    def forward(self, h):
        for level in self:
            for layer in (*level.block, *level[1:]):        # one by one: nobody holds a level's input
                h = layer(h)
        return h


def vae_middle(width, groups):
    return named(block_1=VAEResBlock(width, width, groups), attn_1=VAEAttention(width, groups),
                 block_2=VAEResBlock(width, width, groups))


def encoder(config: VAEConfig) -> nn.Sequential:
    """Frames (N, 3, H, W) -> mean and log-variance of their latents before quant_conv, (N, 2 C, H/8, W/8)"""
    widths, groups = [config.channels * m for m in config.mult], config.groups
    levels = [vae_level(cin, width, config.res_blocks, groups, downsample=downsample(width))
              for cin, width in zip([config.channels, *widths], widths, strict=False)]
    del levels[-1].downsample
    return named(conv_in=nn.Conv2d(3 * config.patch ** 2, config.channels, 3, padding=1),
                 down=Levels(*levels), mid=vae_middle(widths[-1], groups),
                 norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 2 * config.latent, 3, padding=1))


def decoder(config: VAEConfig) -> nn.Sequential:
    """Latents (N, C, h, w) -> frames (N, 3, 8h, 8w)"""
    widths, groups = [config.channels * m for m in config.mult], config.groups
    levels = [vae_level(cin, width, config.res_blocks + 1, groups, upsample=Upsample(width))
              for cin, width in zip([*widths[1:], widths[-1]], widths, strict=True)]
    del levels[0].upsample
    up = OrderedDict((str(i), level) for i, level in reversed(list(enumerate(levels))))     # up.0 runs last
    return named(conv_in=nn.Conv2d(config.latent, widths[-1], 3, padding=1),
                 mid=vae_middle(widths[-1], groups), up=Levels(up),
                 norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[0], 3 * config.patch ** 2, 3, padding=1))


def by_frames(network: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None = None) -> Tensor:
    """Applies a network of images to clips x (B, C, T, H, W), `chunk` frames at a time."""
    frames = x.transpose(1, 2).flatten(0, 1)                # (B*T, C, H, W)
    images = torch.cat([network(part) for part in frames.split(chunk or len(frames))])
    return images.unflatten(0, (len(x), -1)).transpose(1, 2)


class VAE(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] <-> latents (B, 4, T, H/8, W/8) of unit variance, frame by frame.

    The names of its parts are those of Stable Diffusion's first_stage_model."""

    def __init__(self, config: VAEConfig = KL_F8):
        super().__init__()
        self.config, latent = config, config.latent
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, T, H, W) -> mean and log-variance of q(z | x), (B, 4, T, H/8, W/8) each, unscaled"""
        def encode(frames):
            return self.quant_conv(self.encoder(F.pixel_unshuffle(frames, self.config.patch)))

        x = x.to(self.dtype, memory_format=torch.channels_last_3d)
        mean, logvar = by_frames(encode, x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean, or its sample with that noise; scaled."""
        mean, logvar = self.posterior(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise.to(mean)
        return z * self.config.scale

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """Scaled latents -> pixels, `chunk` frames at a time; not clamped, as rewards need the gradient."""
        def decode(z):
            return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)

        z = (z / self.config.scale).to(self.dtype, memory_format=torch.channels_last_3d)
        return by_frames(decode, z, chunk)


# ---- TAESD -------------------------------------------------------------------------------------------------

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
    """TAESD's decoder (O. B. Bohan), 1.2 M weights where the VAE's has 50 M: less exact, and next to no work.

    Scaled latents (N, 4, h, w) -> frames (N, 3, 8h, 8w) in [0, 1]. Layers are named by their places."""

    def __init__(self, width: int = 64):
        def level():
            return [*(TinyBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2),
                    nn.Conv2d(width, width, 3, padding=1, bias=False)]

        super().__init__(SoftClamp(), nn.Conv2d(4, width, 3, padding=1), nn.ReLU(),
                         *level(), *level(), *level(),
                         TinyBlock(width), nn.Conv2d(width, 3, 3, padding=1))

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """As VAE.decode: (B, 4, T, h, w) -> pixels in about [-1, 1], `chunk` frames at a time."""
        return 2 * by_frames(self, z.to(self[1].weight.dtype), chunk) - 1


def load_tiny_decoder(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """path: taesd_decoder.safetensors or .pth, or its folder."""
    state = weights.read_tensors(*weights.weight_files(path, "taesd_decoder"))
    with weights.without_memory():
        decoder = TinyDecoder()
    return weights.fill(decoder, state, path, device, dtype).requires_grad_(False)
