"""The networks: UNet3D (the denoiser ε), VAE (pixels <-> latents) and TextEncoder (caption -> c).

One UNet3D serves VideoCrafter2 and ModelScopeT2V: an image diffusion UNet whose every layer has a temporal
twin behind it. ResBlock = image convolutions, then convolutions along T; Transformer over space, then over
time.

Axes: B batch, C channels, T frames, H W space, L tokens, D width. Latents and clips are (B, C, T, H, W).
All activations are channels-last, in memory (B, T, H, W, C), so that each of the four folds below is a view:
    frames_to_batch    (B, C, T, H, W) -> (B*T, C, H, W)     image layers see frames as a batch
    pixels_to_tokens   (B, C, T, H, W) -> (B, T*H*W, C)      linear layers see tokens
and back. Symbols: z noisy latents, t timesteps, c caption states (B, L, D), w guidance scale ω; result ε.
"""
import math
import re
import sys
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing import weights
from plumbing.errors import UserError
from plumbing.run import on_cpu
from solver import Sampling


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet3D; the defaults are VideoCrafter2's and ModelScopeT2V's."""
    in_channels: int = 4
    channels: int = 320
    mult: tuple = (1, 2, 4, 4)              # width of each level, in units of channels
    res_blocks: int = 2                     # per level on the way down; one more on the way up
    attention_levels: tuple = (0, 1, 2)
    head_dim: int = 64
    context_dim: int = 1024                 # width of the caption states
    init_heads: int = 8                     # of the temporal transformer right after the first convolution
    fps: bool = False                       # VideoCrafter2 is told the frame rate
    guidance: bool = False                  # T2V-Turbo is told ω
    motion: bool = False                    # T2V-Turbo-v2 is told λ', the strength of motion guidance, too
    groups: int = 32                        # of every group norm


VC2 = UNetConfig(fps=True)
MODELSCOPE = UNetConfig()

# ---- folds -------------------------------------------------------------------------------------------------


def frames_to_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, B: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)"""
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def pixels_to_tokens(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T*H*W, C)"""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def tokens_to_pixels(x: Tensor, T: int, H: int, W: int) -> Tensor:
    """(B, T*H*W, C) -> (B, C, T, H, W)"""
    return x.unflatten(1, (T, H, W)).permute(0, 4, 1, 2, 3)


def per_frame(layer, x: Tensor) -> Tensor:
    """Apply an image layer to every frame of x (B, C, T, H, W)."""
    return batch_to_frames(layer(frames_to_batch(x)), x.shape[0])


def channels_last(module: nn.Module) -> nn.Module:
    """Convolution weights in the memory format of the activations (in place)."""
    for p in module.parameters():
        if p.dim() in (4, 5):
            p.data = p.data.to(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)
    return module


# ---- embeddings --------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep or frame rate, (B,) -> (B, dim), float32: all cosines, then all sines."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def guidance_embedding(w: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of 1000 ω, (B,) -> (B, dim), float32: all sines, then all cosines.

    Angles reach 15,000 rad, where a float32 is only good to 1e-3: the published weights were trained with the
    order of operations below, in float32.
    """
    half = dim // 2
    step = torch.full((), 10000.0, device=w.device).log() / (half - 1)      # made there: nothing is copied
    angle = (1000 * w.float())[:, None] * torch.exp(torch.arange(half, device=w.device) * -step)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# ---- blocks ------------------------------------------------------------------------------------------------


def zero(layer: nn.Module) -> nn.Module:
    """A residual branch whose last layer is zero starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class SiLU(nn.Module):
    """x sigmoid(x), in place where no graph is recorded: the norm before it made x for it alone."""

    def forward(self, x):
        return F.silu(x, inplace=not torch.is_grad_enabled())


silu = SiLU()


class FrameConv(nn.Module):
    """3x3 convolution of every frame, which may halve (stride 2) or first double H and W."""

    def __init__(self, cin: int, cout: int, stride: int = 1, double: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride, padding=1)
        self.double = double

    def forward(self, x, emb, c):
        B, x = x.shape[0], frames_to_batch(x)
        if self.double:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return batch_to_frames(self.conv(x), B)


class TimeConv(nn.Conv3d):
    """Convolution along T. On a CPU as an image convolution over (T, H*W), with the same result.

    On one thread torch takes a 3x1x1 kernel, by its last two sizes, for pointwise, and runs it through copies
    of its input (im2col): at half the speed, and not channels-last.
    """

    def forward(self, x):
        if not on_cpu(x):
            return super().forward(x)
        h = F.conv2d(x.flatten(3), self.weight.flatten(3), self.bias, padding=self.padding[:2])
        return h.unflatten(3, x.shape[3:])


class TemporalConv(nn.Module):
    """Four convolutions over three frames each, residual; normalised over all frames together."""

    def __init__(self, channels: int, groups: int):
        super().__init__()

        def layer(*between):
            return nn.Sequential(nn.GroupNorm(groups, channels), SiLU(), *between,
                                 TimeConv(channels, channels, (3, 1, 1), padding=(1, 0, 0)))

        self.conv1 = layer()
        # nn.Identity is where the teachers had dropout: the convolution keeps its public name, conv2.3
        self.conv2, self.conv3, self.conv4 = (layer(nn.Identity()) for _ in range(3))
        zero(self.conv4[-1])

    def forward(self, x):
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(nn.Module):
    """Two image convolutions with the timestep added between them, then TemporalConv."""

    def __init__(self, cin: int, cout: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(emb_dim, cout)
        self.norm2 = nn.GroupNorm(groups, cout)
        self.conv2 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.temporal = TemporalConv(cout, groups)

    def forward(self, x, emb, c):
        """x (B, Cin, T, H, W), emb (B, 1 or T, 4 channels) -> (B, Cout, T, H, W); c is for Transformers."""
        h = per_frame(lambda x: self.conv1(silu(self.norm1(x))), x)
        h = h + self.emb(emb).transpose(1, 2)[..., None, None]
        h = per_frame(lambda h: self.conv2(silu(self.norm2(h))), h)
        return self.temporal(per_frame(self.skip, x) + h)


CUDA_GRID = 65_535                          # the most that batch x heads may be in a fused attention kernel


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over (N, heads, L, d)

    By torch's fused kernel, except for short bf16 sequences on a CPU, where that takes twice as long as the
    formula, and with its backward pass five times.
    """
    most = max(CUDA_GRID // len(q), 1)
    if q.shape[1] > most:                   # over time pixels count as heads: 73,728 at 576x1024
        parts = zip(q.split(most, 1), k.split(most, 1), v.split(most, 1), strict=True)
        return torch.cat([attention(*part) for part in parts], dim=1)
    if on_cpu(q) and q.dtype == torch.bfloat16 and k.shape[-2] <= 512:
        return attention_map(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d): (N, heads, L, d) twice -> (N, heads, L, L)"""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention among a frame's pixels ("space"), a pixel's frames ("time"), or all tokens of a
    clip, or from these to a caption ("all")."""

    def __init__(self, width: int, heads: int, head_dim: int, over: str, source_dim: int | None = None):
        super().__init__()
        inner = heads * head_dim
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(source_dim or width, inner, bias=False)
        self.v = nn.Linear(source_dim or width, inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.head_dim, self.over = head_dim, over

    def forward(self, x, source, T):
        """Queries from x (B, T*H*W, D); keys and values from source, x again or (B, L, D) -> (B, T*H*W, D)"""
        B, L, _ = x.shape
        h = attention(self.fold(self.q(x), T), self.fold(self.k(source), T), self.fold(self.v(source), T))
        return self.out(h.transpose(1, 2).reshape(B, L, -1))

    def fold(self, x, T):
        """(B, L, heads*d) -> (sequences, heads, length, d), a view"""
        B, L, _ = x.shape
        if self.over == "space":
            sequences, length = B * T, L // T       # a frame's pixels: (B*T, heads, H*W, d)
        elif self.over == "time":
            sequences, length = B, T                # a pixel's frames, pixels as heads: (B, H*W*heads, T, d)
        else:
            sequences, length = B, L                # the whole clip, or its caption: (B, heads, L, d)
        return x.view(sequences, length, -1, self.head_dim).transpose(1, 2)


class GEGLU(nn.Module):
    """Feed-forward layer, four times as wide inside, whose one half gates the other (Shazeer, 2020).

    Where no graph is recorded it takes some tokens at a time: what is inside would be the most that is held.
    """
    tokens = 4096

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.gated(x)
        return torch.cat([self.gated(part) for part in x.split(self.tokens, dim=1)], dim=1)

    def gated(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class Transformer(nn.Module):
    """Self-attention, a second attention, feed-forward. Over "space" the second one reads the caption; over
    "time" it is self-attention again, and so the caption reaches time only through space."""

    def __init__(self, channels: int, heads: int, head_dim: int, over: str, context_dim: int, groups: int):
        super().__init__()
        inner = heads * head_dim
        second = dict(over="all", source_dim=context_dim) if over == "space" else dict(over=over)
        self.over = over
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.attn1 = Attention(inner, heads, head_dim, over)
        self.ff = GEGLU(inner)              # before attn2, as in VideoCrafter2: LoRA files go by this order
        self.attn2 = Attention(inner, heads, head_dim, **second)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(inner) for _ in range(3))
        self.proj_out = zero(nn.Linear(inner, channels))

    def forward(self, x, emb, c):
        """x (B, C, T, H, W), c (B, L, D) -> like x; emb is for ResBlocks."""
        T, H, W = x.shape[2:]
        h = self.tokens(x, c)
        n = self.norm1(h)
        h = h + self.attn1(n, n, T)
        n = self.norm2(h)
        h = h + self.attn2(n, c if self.over == "space" else n, T)
        h = h + self.ff(self.norm3(h))
        return x + tokens_to_pixels(self.proj_out(h), T, H, W)

    def tokens(self, x, c):
        """What enters the attentions: (B, C, T, H, W) -> (B, T*H*W, D)"""
        h = per_frame(self.norm, x) if self.over == "space" else self.norm(x)
        return self.proj_in(pixels_to_tokens(h))


class Block(nn.Sequential):
    def forward(self, x, emb, c):
        for layer in self:
            x = layer(x, emb, c)
        return x


# ---- UNet --------------------------------------------------------------------------------------------------


def layout(config: UNetConfig) -> tuple[list, list, list]:
    """The layers (kind, width in, width out) of all blocks: on the way down, in the middle, on the way up.

    The published UNets, each block of the way up beside the one whose output it takes as its skip:

        input_blocks                               output_blocks
         0  conv 4 320                             11  res 640 320, space 320, time 320
         1  res 320, space 320, time 320           10  res 640 320, space 320, time 320
         2  res 320, space 320, time 320            9  res 960 320, space 320, time 320
         3  halve 320                               8  res 960 640, space 640, time 640, double 640
         4  res 320 640, space 640, time 640        7  res 1280 640, space 640, time 640
         5  res 640, space 640, time 640            6  res 1920 640, space 640, time 640
         6  halve 640                               5  res 1920 1280, space 1280, time 1280, double 1280
         7  res 640 1280, space 1280, time 1280     4  res 2560 1280, space 1280, time 1280
         8  res 1280, space 1280, time 1280         3  res 2560 1280, space 1280, time 1280
         9  halve 1280                              2  res 2560 1280, double 1280
        10  res 1280                                1  res 2560 1280
        11  res 1280                                0  res 2560 1280
               middle_block  res 1280, space 1280, time 1280, res 1280
    """
    widths = [config.channels * m for m in config.mult]
    n, last = config.res_blocks, len(widths) - 1

    def attend(width):
        return [("space", width, width), ("time", width, width)]

    down, up, finer = [], [], config.channels           # finer: width of the level above, larger in H and W
    for level, width in enumerate(widths):
        attention = attend(width) if level in config.attention_levels else []
        coarser = widths[min(level + 1, last)]

        # down: enter the level, then n ResBlocks
        enter = ("halve", finer, finer) if level else ("conv", config.in_channels, finer)
        inputs = [finer] + [width] * (n - 1)
        down += [[enter]] + [[("res", cin, width), *attention] for cin in inputs]

        # up: n + 1 ResBlocks, each of what comes up beside its skip, then leave the level
        inputs = [coarser + width] + [width + width] * (n - 1) + [width + finer]
        blocks = [[("res", cin, width), *attention] for cin in inputs]
        blocks[-1] += [("double", width, width)] if level else []
        up = blocks + up
        finer = width

    middle = [[("res", width, width), *attend(width), ("res", width, width)]]
    return down, middle, up


def condition_layers(config: UNetConfig) -> dict[str, nn.Module]:
    """What T2V-Turbo adds to its teacher: layers for ω, and in v2 for the strength of motion guidance.

    They start at zero (and combine_proj as a sum), so that a student starts as its teacher.
    """
    layers, width = {}, config.channels
    if config.guidance:
        layers["time_cond_proj"] = zero(nn.Linear(256, width, bias=False))
    if config.motion:
        layers["motion_cond_proj"] = zero(nn.Linear(256, width, bias=False))
        layers["combine_proj"] = nn.Linear(2 * width, width, bias=False)
        layers["combine_proj"].weight.data.copy_(torch.eye(width).repeat(1, 2))
    return layers


class UNet3D(nn.Module):
    """eps = UNet3D(z, t, c, ω). The names of its outer parts are VideoCrafter2's."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, width = config, config.channels
        self.checkpointing = False          # recompute each block in the backward pass instead of storing it

        def mlp():
            return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

        self.time_embed = mlp()
        if config.fps:
            self.fps_embedding = mlp()
        for name, layer in self.conditions().items():
            self.add_module(name, layer)

        down, (middle,), up = ([self.block(layers) for layers in blocks] for blocks in layout(config))
        self.input_blocks = nn.ModuleList(down)
        self.init_attn = Block(self.transformer("time", width, config.init_heads))
        self.middle_block = middle
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(nn.GroupNorm(config.groups, width * config.mult[0]), SiLU(),
                                 zero(nn.Conv2d(width * config.mult[0], config.in_channels, 3, padding=1)))
        channels_last(self)

    def conditions(self) -> dict[str, nn.Module]:
        """Layers for what the UNet is told besides timestep, caption and frame rate."""
        return condition_layers(self.config)

    def block(self, layers) -> Block:
        return Block(*(self.layer(*layer) for layer in layers))

    def layer(self, kind: str, cin: int, cout: int) -> nn.Module:
        """A layer of the layout."""
        config = self.config
        if kind == "res":
            return ResBlock(cin, cout, 4 * config.channels, config.groups)
        if kind in ("space", "time"):
            return self.transformer(kind, cin, cin // config.head_dim)
        return FrameConv(cin, cout, stride=2 if kind == "halve" else 1, double=kind == "double")

    def transformer(self, over: str, channels: int, heads: int) -> Transformer:
        config = self.config
        return Transformer(channels, heads, config.head_dim, over, config.context_dim, config.groups)

    @property
    def dtype(self) -> torch.dtype:
        return self.middle_block[0].norm1.weight.dtype      # of a norm, which LoRA never wraps

    def forward(self, z: Tensor, t: Tensor, c: Tensor, w: Tensor | None = None, fps=None,
                motion: Tensor | None = None) -> Tensor:
        """z (B, C, T, H, W), t (B,), c (B, L, D), w and motion (B,), fps (B,) or a number -> ε like z"""
        c = c.to(self.dtype)
        emb = F.silu(self.embed(z, t, c, w, fps, motion))
        h = self.first(z.to(self.dtype, memory_format=torch.channels_last_3d), emb, c)

        skips = [h]
        for block in self.input_blocks[1:]:
            h = self.run(block, h, emb, c)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, c)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = self.run(block, h, emb, c)
        return per_frame(self.last, h).to(z.dtype)

    def embed(self, z, t, c, w, fps, motion):
        """Conditioning embedding of a clip, (B, 1, 4 channels): timestep, and ω, λ' and frame rate where
        known."""
        config, B = self.config, z.shape[0]
        h = timestep_embedding(t, config.channels).to(self.dtype)
        if w is not None:
            assert config.guidance, "this UNet was built without a guidance embedding"
            told = self.time_cond_proj(guidance_embedding(w).to(self.dtype))
            if motion is not None:
                strength = self.motion_cond_proj(guidance_embedding(motion).to(self.dtype))
                told = self.combine_proj(torch.cat([told, strength], dim=1))
            h = h + told
        h = self.time_embed(h)

        if config.fps:
            fps = 16 if fps is None else fps
            if not isinstance(fps, Tensor):
                fps = torch.full((B,), fps, device=z.device)
            h = h + self.fps_embedding(timestep_embedding(fps, config.channels).to(self.dtype))
        return h[:, None]

    def first(self, z, emb, c):
        """The first features: a convolution, then attention over time at full resolution."""
        h = self.run(self.input_blocks[0], z, emb, c)
        return self.run(self.init_attn, h, emb, c)

    def last(self, h):
        """Norm and convolution to ε, in float32 where their weights are, also under autocast.

        In ẑ0 at t = 999 an error of ε is divided by α = 0.068. Rms error of ẑ0 at full width, random weights:
        0.217 with bfloat16 everywhere, 0.209 with this end in float32; rounding nothing but ε costs 0.025.
        """
        whole = self.out[0].weight.dtype == torch.float32
        with torch.autocast(h.device.type, enabled=False) if whole else nullcontext():
            return self.out(h.to(self.out[0].weight.dtype))

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def motion_attentions(self) -> list[Attention]:
        """Where v2 reads a clip's motion: the first attention of every temporal transformer on the way up."""
        transformers = [m for m in self.output_blocks.modules() if isinstance(m, Transformer)]
        return [m.attn1 for m in transformers if m.over != "space"]

    def with_maps(self, *args, **conditions) -> tuple[Tensor, list[Tensor]]:
        """forward -> ε and the probabilities of all motion attentions, (B, H*W*heads, T, T) each, float32.

        Both are differentiable, also with checkpointing: only q and k are kept, and the maps are made of them
        afterwards. A compiled network runs eagerly here, as its graph would not listen.
        """
        # one pass, in which q and k are kept
        heard, attentions = {}, self.motion_attentions()

        def listen(layer, inputs, output):
            heard[layer] = output

        hooks = [layer.register_forward_hook(listen) for attn in attentions for layer in (attn.q, attn.k)]
        try:
            with torch.compiler.set_stance("force_eager"):
                eps = self(*args, **conditions)
        finally:
            for hook in hooks:
                hook.remove()

        # the maps, in float32
        T, maps, precise = eps.shape[2], [], torch.promote_types(eps.dtype, torch.float32)
        for attn in attentions:
            q, k = (attn.fold(heard[layer].to(precise), T) for layer in (attn.q, attn.k))
            maps.append(attention_map(q, k))
        return eps, maps


def compile_layers(unet: UNet3D, **options) -> None:
    """torch.compile with these options, layer by layer, in place: layers of the same sizes share their code.

    The published UNets have 22 ResBlocks of 14 sizes, and 34 Transformers of 9.
    """
    torch._dynamo.config.recompile_limit = 100              # code for so many sizes of a class
    for layer in unet.modules():
        if isinstance(layer, (ResBlock, Transformer)):
            layer.compile(dynamic=False, **options)


# ---- VAE ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are those of Stable Diffusion's KL-F8, which both teachers use."""
    channels: int = 128
    mult: tuple = (1, 2, 4, 4)
    res_blocks: int = 2                     # per level of the encoder; one more in the decoder
    latent: int = 4
    groups: int = 32                        # of every group norm
    scale: float = 0.18215                  # brings latents to unit variance
    patch: int = 1                          # patch x patch pixels enter and leave as channels; KL-F8: 1

    @property
    def factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch * 2 ** (len(self.mult) - 1)


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

    def forward(self, x):
        if too_large(x):
            h = norm_silu_conv(self.norm1, self.conv1, x)
            h = norm_silu_conv(self.norm2, self.conv2, h, out=h)
            for rows, h_rows in zip(x.split(ROWS, dim=2), h.split(ROWS, dim=2), strict=True):
                h_rows += self.nin_shortcut(rows)
            return h

        h = self.conv1(silu(self.norm1(x)))
        h = silu(self.norm2(h))
        h = self.conv2(h)
        return self.nin_shortcut(x) + h


LARGE = 2 ** 24                             # numbers of an image whose copies would be the most that is held
ROWS = 16                                   # of it that are normalised at a time


def too_large(x: Tensor) -> bool:
    """Are images (N, C, H, W) taken by rows? On a CPU, where no graph is recorded, which would keep what norm
    and SiLU make of them anyway."""
    large = x[0].numel() >= LARGE and x.shape[2] % ROWS == 0
    return large and on_cpu(x) and not torch.is_grad_enabled()


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, out: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) of a 3x3 convolution, by rows. out: where the result goes; it may be x itself."""
    N, _, H, W = x.shape
    scale, shift = scale_and_shift(norm, x)
    if out is None:
        out = x.new_empty(N, H, W, conv.out_channels).permute(0, 3, 1, 2)

    window = x.new_zeros(N, ROWS + 2, W, x.shape[1]).permute(0, 3, 1, 2)        # and a row above and below
    for top in range(0, H, ROWS):
        window[:, :, 0] = window[:, :, ROWS]                # of the rows before these; zero above the first
        rows = x[:, :, top:top + ROWS + 1]
        inside = window[:, :, 1:1 + rows.shape[2]]
        F.silu(torch.addcmul(shift, rows, scale, out=inside), inplace=True)
        if rows.shape[2] == ROWS:                           # the last ones
            window[:, :, -1] = 0
        out[:, :, top:top + ROWS] = F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
    return out


def scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A group norm as a product and a sum: x (N, C, H, W) -> (N, C, 1, 1) twice, in float32."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    parts = [torch.var_mean(rows.float(), (2, 3, 4), correction=0) for rows in groups.split(ROWS, dim=3)]
    variances, means = map(torch.stack, zip(*parts))        # of equally many rows each
    variance = variances.mean(0) + means.var(0, correction=0)

    each = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(each, dim=1) * norm.weight
    shift = norm.bias - means.mean(0).repeat_interleave(each, dim=1) * scale
    return scale[..., None, None], shift[..., None, None]


class VAEAttention(nn.Module):
    """One head over all pixels of a frame."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).permute(0, 2, 3, 1).flatten(1, 2)[:, None] for f in (self.q, self.k, self.v))
        h = attention(q, k, v)                              # (N, 1, H*W, C)
        h = h[:, 0].unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)
        return x + self.proj_out(h)


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def vae_down(width):
    pad = nn.ZeroPad2d((0, 1, 0, 1))                        # right and below only, as in training
    return dict(downsample=named(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2)))


class VAEUpsample(nn.Module):
    """Doubles H and W, each pixel four times, and convolves. (N, C, H, W) -> (N, C, 2H, 2W)"""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        if on_cpu(x) and not torch.is_grad_enabled():
            return self.folded(x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def folded(self, x):
        """The same with 4/9 of the products, and without the doubled image: nine of its pixels are four of x.

        The pixels of the result in even and odd rows and columns are four convolutions of x, 2x2 each.
        """
        N, C, H, W = x.shape
        out = x.new_empty(N, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        for i, j in product((0, 1), repeat=2):
            kernel = fold_kernel(fold_kernel(self.conv.weight, i, dim=2), j, dim=3)
            corner = (..., slice(i, i + H), slice(j, j + W))                    # of (H + 1, W + 1)
            out[:, :, i::2, j::2] = F.conv2d(x, kernel, self.conv.bias, padding=1)[corner]
        return out


def fold_kernel(kernel: Tensor, odd: int, dim: int) -> Tensor:
    """Sums the two of three weights that fall on the same pixel before doubling: the last two in even rows or
    columns, the first two in odd ones."""
    a, b, c = kernel.split(1, dim)
    return torch.cat([a + b, c] if odd else [a, b + c], dim)


def vae_up(width):
    return dict(upsample=VAEUpsample(width))


def vae_level(cin, cout, count, groups, resample):
    blocks = [VAEResBlock(cin if i == 0 else cout, cout, groups) for i in range(count)]
    return named(block=nn.Sequential(*blocks), **resample)


def vae_middle(width, groups):
    return named(block_1=VAEResBlock(width, width, groups), attn_1=VAEAttention(width, groups),
                 block_2=VAEResBlock(width, width, groups))


class Encoder(nn.Module):
    """Frames (N, 3, H, W) -> mean and log-variance of their latents before quant_conv, (N, 2 C, H/8, W/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.channels * m for m in config.mult], config.groups
        self.conv_in = nn.Conv2d(3 * config.patch ** 2, config.channels, 3, padding=1)
        self.down, finer = nn.ModuleList(), config.channels
        for level, width in enumerate(widths):
            resample = vae_down(width) if level < len(widths) - 1 else {}
            self.down.append(vae_level(finer, width, config.res_blocks, groups, resample))
            finer = width
        self.mid = vae_middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for layer in (*self.down, self.mid):
            h = layer(h)
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (N, C, h, w) -> frames (N, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.channels * m for m in config.mult], config.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent, widths[last], 3, padding=1)
        self.mid = vae_middle(widths[last], groups)
        self.up = nn.ModuleList()                           # up.0 is the finest level and runs last
        for level, width in enumerate(widths):
            coarser = widths[min(level + 1, last)]
            resample = vae_up(width) if level > 0 else {}
            self.up.append(vae_level(coarser, width, config.res_blocks + 1, groups, resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in (*level.block, *level[1:]):        # one by one: nobody holds the level's input
                h = layer(h)
        return self.conv_out(silu(self.norm_out(h)))


class VAE(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] <-> latents (B, 4, T, H/8, W/8) of unit variance, frame by frame.

    The names of its parts are those of Stable Diffusion's first_stage_model.
    """

    def __init__(self, config: VAEConfig = KL_F8):
        super().__init__()
        self.config, latent = config, config.latent
        self.checkpointing = False          # recompute each chunk of decoded frames in the backward pass
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        channels_last(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def posterior(self, x: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """x (B, 3, T, H, W) -> mean and log-variance of q(z | x), (B, 4, T, H/8, W/8) each, unscaled"""
        frames = frames_to_batch(x.to(self.dtype, memory_format=torch.channels_last_3d))
        frames = F.pixel_unshuffle(frames, self.config.patch)
        h = torch.cat([self.quant_conv(self.encoder(part)) for part in frames.split(chunk or len(frames))])
        mean, logvar = batch_to_frames(h, x.shape[0]).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, noise: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The posterior's mean, or its sample with that noise; scaled. `chunk` frames at a time."""
        mean, logvar = self.posterior(x, chunk)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise.to(mean)
        return z * self.config.scale

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """Scaled latents -> pixels, `chunk` frames at a time; not clamped, as rewards need the gradient."""
        frames = frames_to_batch((z / self.config.scale).to(self.dtype, memory_format=torch.channels_last_3d))
        pixels = [self.run(part) for part in frames.split(chunk or len(frames))]
        return batch_to_frames(torch.cat(pixels), z.shape[0])

    def decode_frames(self, z):
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)

    def run(self, z):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.decode_frames, z, use_reentrant=False)
        return self.decode_frames(z)


# ---- text --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    width: int = 1024
    layers: int = 24                        # of the published tower; its last layer is never run
    heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408


VIT_H = TextConfig()


@cache
def clip_tokenizer():
    """OpenCLIP's byte pairs."""
    import open_clip  # here, as it takes seconds, which the toy saves
    return open_clip.get_tokenizer("ViT-H-14")


class TextEncoder(nn.Module):
    """Captions -> states of all L tokens before CLIP's last layer, (B, L, D).

    The tower is open_clip's, and so are its names. Unlike the pooled embedding, these states keep every word
    in its place.
    """

    def __init__(self, config: TextConfig = VIT_H, tokenizer=None):
        super().__init__()
        import open_clip

        self.config, width = config, config.width
        self.tokenizer = tokenizer or clip_tokenizer()
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.transformer = open_clip.transformer.Transformer(width, config.layers - 1, config.heads)
        self.ln_final = nn.LayerNorm(width)
        self.warned = False

    @property
    def width(self) -> int:
        return self.config.width

    def tokenize(self, captions: list[str]) -> Tensor:
        """B captions -> (B, L) token ids. The first time that one is too long, says that it is cut."""
        limit = self.config.context_length - 2              # start and end take a place each
        if not self.warned and hasattr(self.tokenizer, "encode"):
            long = [caption for caption in captions if len(self.tokenizer.encode(caption)) > limit]
            if long:
                print(f"caption is cut at {limit} tokens, the text encoder's limit: {long[0][:60]}...",
                      file=sys.stderr)
                self.warned = True
        return self.tokenizer(captions)

    def forward(self, captions: list[str]) -> Tensor:
        ids = self.tokenize(captions).to(self.positional_embedding.device)
        x = self.token_embedding(ids) + self.positional_embedding
        L = ids.shape[1]
        causal = torch.full((L, L), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return self.ln_final(self.transformer(x, attn_mask=causal))


# ---- families and loading ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Family:
    """A teacher: its networks, the clips it was trained for, how it and its students are sampled."""
    unet: UNetConfig
    height: int
    width: int
    fps: int                                # of a generated clip
    sampling: dict[str, Sampling]           # by method: "turbo" (VCM, too), "turbo-v2", "teacher"
    frames: int = 16
    vae: VAEConfig = KL_F8
    text: TextConfig = VIT_H


FAMILIES = {
    "vc2": Family(VC2, 320, 512, fps=16, sampling={
        "turbo": Sampling("student", steps=4, guidance=7.5, grid=50, fps=16),
        "turbo-v2": Sampling("student", steps=16, guidance=7.5, grid=200, fps=8,
                             motion=0.05, motion_share=0.5),
        "teacher": Sampling("ddim", steps=50, guidance=11.0, fps=28, eta=1.0, scale_z0=True),  # authors' 12
    }),
    "ms": Family(MODELSCOPE, 256, 256, fps=8, sampling={
        "turbo": Sampling("student", steps=4, guidance=7.5, grid=50),
        "teacher": Sampling("ddim", steps=50, guidance=8.0),                                   # authors' 9
    }),
}

PUBLIC = {                                  # name: hub repository, files
    "vc2": ("VideoCrafter/VideoCrafter2", ["model.ckpt"]),
    "ms": ("ali-vilab/text-to-video-ms-1.7b", ["unet/diffusion_pytorch_model.safetensors",
                                               "vae/diffusion_pytorch_model.safetensors",
                                               "text_encoder/model.safetensors"]),
    "vc2-turbo": ("jiachenli-ucsb/T2V-Turbo-VC2-Merged", ["t2v_turbo_vc2.pt"]),
    "vc2-turbo-lora": ("jiachenli-ucsb/T2V-Turbo-VC2", ["unet_lora.pt"]),
    "ms-turbo": ("jiachenli-ucsb/T2V-Turbo-MS", ["unet_lora.pt"]),
    "vc2-turbo-v2": ("jiachenli-ucsb/T2V-Turbo-v2", ["unet_mg.pt"]),
    "vc2-turbo-v2-no-mg": ("jiachenli-ucsb/T2V-Turbo-v2-no-MG", ["unet_no_mg.pt"]),
}

V1 = {"method": "turbo", "steps": 50, "w_min": 5.0, "w_max": 15.0}
V2 = {"method": "turbo-v2", "steps": 200, "w_min": 5.0, "w_max": 15.0}
RELEASED = {                                # layout: what a released file, without a header, was trained with
    "LoRA list": V1,                                        # unet_lora.pt
    "whole model": V1 | {"whole": True},                    # t2v_turbo_vc2.pt: with VAE and text encoder
    "UNet with motion": V2,                                 # unet_mg.pt
    "UNet": V2 | {"motion": None},                          # unet_no_mg.pt
}

MODELSCOPE_FILES = ["text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"]
UNUSED_TEXT = r"visual\.|text_projection|logit_scale|attn_mask|embeddings\.position_ids|"


def check_size(family: Family, **sides: int | None) -> None:
    """Raises UserError for heights and widths in pixels that VAE and UNet cannot halve evenly.

    They must be multiples of 64, the toy's of 16.
    """
    multiple = family.vae.factor * 2 ** (len(family.unet.mult) - 1)
    for name, pixels in sides.items():
        if pixels is not None and (pixels < multiple or pixels % multiple):
            low = max(pixels // multiple, 1) * multiple
            raise UserError(f"{name} {pixels} is not a multiple of {multiple}; "
                             f"try {low} or {low + multiple}")


@dataclass
class Models:
    """What sampling and training start from; `load` makes one."""
    name: str                               # vc2, ms or shapes
    unet: nn.Module
    vae: nn.Module
    text: nn.Module
    family: Family
    header: dict = field(default_factory=dict)  # how the student was trained (`complete`); {}: a teacher

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that the networks were trained on."""
        family, header = self.family, self.header
        return tuple(header.get(name, getattr(family, name)) for name in ("frames", "height", "width"))

    @property
    def sampling(self) -> Sampling:
        """How the student, or without one the teacher, is sampled by default: as it was trained."""
        if not self.header:
            return self.family.sampling["teacher"]
        default, config = default_sampling(self.family, self.header["method"]), self.unet.config
        guidance = min(max(default.guidance, self.header["w_min"]), self.header["w_max"])
        same_grid = self.header["steps"] == default.grid
        return replace(default, guidance=guidance, grid=self.header["steps"],
                       timesteps=default.timesteps if same_grid else (),
                       fps=self.header["fps"] if config.fps else None,
                       motion=self.header["motion"] if config.motion else None,
                       motion_share=self.header["motion_share"])

    @property
    def fps(self) -> float:
        """Frames per second of a generated clip: what the UNet is told, where it is told."""
        return self.sampling.fps or self.header.get("fps", self.family.fps)


def default_sampling(family: Family, method: str) -> Sampling:
    """The family's entry for a student's method; VCM is sampled as T2V-Turbo is."""
    return family.sampling.get(method, family.sampling["turbo"])


def complete(header: dict, family: Family) -> dict:
    """A student's header with what files of version 1 say elsewhere, and released files nowhere.

    method, steps (N of its grid), w_min, w_max (range of ω), fps, frames, height, width, motion (λ'),
    motion_share (τ).
    """
    default = default_sampling(family, header.get("method", "turbo"))
    usual = dict(method="turbo", steps=default.grid, w_min=5.0, w_max=15.0, fps=default.fps or family.fps,
                 frames=family.frames, height=family.height, width=family.width,
                 motion=default.motion, motion_share=default.motion_share)
    train = header.get("train", {})
    options = {name: train[name] for name in ("fps", "frames", "height", "width") if name in train}
    return usual | options | header


def fetch(name: str) -> Path:
    """Path of a public file (of the first, where a model has several), downloaded on its first use."""
    repository, files = PUBLIC[name]
    return [weights.download(repository, file) for file in files][0]


def read_teacher(path: str | Path, text_layers: int) -> list[tuple[weights.State, Path]]:
    """A teacher's file or folder -> for UNet, VAE and text encoder: tensors under our names, their file."""
    path = Path(path)
    path = path / "model.ckpt" if (path / "model.ckpt").is_file() else path

    if (path / MODELSCOPE_FILES[0]).is_file():
        files = [path / name for name in MODELSCOPE_FILES]
        unet, vae, text = map(weights.read_named, files)
        unet = weights.rename(unet, weights.MODELSCOPE_ORIGINAL)
        vae = weights.part(vae, "first_stage_model.")
    elif path.is_dir():
        stem = ["diffusion_pytorch_model"]
        files = [weights.one_of(path / "unet", stem), weights.one_of(path / "vae", stem),
                 weights.one_of(path / "text_encoder", ["model", "pytorch_model"])]
        unet, vae, text = map(weights.read_named, files)
        unet = weights.rename(unet, weights.DIFFUSERS)
        vae = weights.rename(vae, weights.DIFFUSERS_VAE)
        text = weights.huggingface_text(text)
    else:
        files, content = [path] * 3, weights.read_named(path)
        unet = weights.rename(weights.part(content, "model.diffusion_model."), weights.VIDEOCRAFTER)
        vae = weights.part(content, "first_stage_model.")
        text = weights.part(content, "cond_stage_model.model.")

    last = rf"transformer\.resblocks\.{text_layers - 1}\."             # the tower's last layer is not run
    text = {key: x for key, x in text.items() if not re.match(UNUSED_TEXT + last, key)}
    return list(zip((unet, vae, text), files, strict=True))


@cache
def lora_shapes(config: UNetConfig) -> weights.Shapes:
    """{layer: shape of its weight} of all layers that take LoRA, in the UNet's order."""
    with weights.without_memory():
        unet = getattr(config, "network", UNet3D)(config)               # the toy's is its own
    takes_lora = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {name: m.weight.shape for name, m in unet.named_modules() if isinstance(m, takes_lora)}


def layout_of(config: UNetConfig) -> str:
    """Whose order of layers a T2V-Turbo LoRA list has."""
    return "vc2" if config.fps else "ms"


def read_turbo(path: str | Path, config: UNetConfig, name: str | None = None):
    """A student's file -> (config of its UNet, the UNet's whole state or None, LoRA or None, its header).

    name: the model that the student must belong to, where its header names one.
    """
    own = Path(path).suffix == ".safetensors"
    header = check_header(weights.read_header(path), path, name) if own else {}
    content = weights.unwrap(weights.read_tensors(path))
    config = replace(config, guidance=True)

    # LoRA: a list without names, or pairs of ours
    if isinstance(content, list):
        if name == "shapes":
            raise ValueError(f"{path}: a list of LoRA matrices, of --model vc2 or ms, not of the toy")
        lora = weights.lora_from_list(content, lora_shapes(config), layout_of(config), path)
        return config, None, lora, RELEASED["LoRA list"]
    content = weights.named_tensors(content, path)
    if any(key.endswith(".up") for key in content):
        config = replace(config, motion="motion_cond_proj.up" in content)
        lora = weights.lora_from_dict(content, lora_shapes(config), layout_of(config), path)
        return config, None, lora, header

    # a whole UNet: ours, VideoCrafter2's, or in a whole model
    if own:
        return replace(config, motion="motion_cond_proj.weight" in content), content, None, header
    unet = weights.part(content, "model.diffusion_model.")
    state = weights.rename(unet or content, weights.VIDEOCRAFTER)
    config = replace(config, motion="motion_cond_proj.weight" in state)
    if unet:
        return config, state, None, RELEASED["whole model"]
    return config, state, None, RELEASED["UNet with motion" if config.motion else "UNet"]


def check_header(header: dict, path: str | Path, name: str | None) -> dict:
    """Raises ValueError where a student's header holds values of the wrong kind, or names another model."""
    for key in ("model", "method"):
        if not isinstance(header.get(key, ""), str):
            raise ValueError(f"{path}: its header says {key} {header[key]!r}, no name; "
                             "no student's file, or damaged")
    for key in ("steps", "w_min", "w_max", "fps", "frames", "height", "width", "motion", "motion_share"):
        value = header.get(key)
        if value is not None and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise ValueError(f"{path}: its header says {key} {value!r}, no number; "
                             "no student's file, or damaged")
    if not isinstance(header.get("train", {}), dict):
        raise ValueError(f"{path}: its header's training options are no JSON object; the file is damaged")
    if name and header.get("model", name) != name:
        raise ValueError(f"{path} is a student of {header['model']}, not of {name}; "
                         f"use --model {header['model']}")
    return header


def load(name: str, teacher: str | Path | None = None, turbo: str | Path | None = None, device="cpu",
         dtype: torch.dtype | None = torch.float32, lora_scale: float = 1.0, **conditions) -> Models:
    """The networks of "vc2" or "ms", the teacher's or, LoRA merged, the student's. In eval mode.

    teacher: file or folder; None = download. turbo: a student's file, or a key of PUBLIC to download; None:
    the teacher alone. lora_scale: strength of the student's LoRA, 1 as trained. dtype: None = the files'.
    conditions: guidance=True and motion=True add the layers that a student needs, as it starts.
    """
    if name not in FAMILIES:
        raise ValueError(f"no model {name!r}; there are {', '.join(FAMILIES)}")
    family, header, state, lora = FAMILIES[name], {}, None, None
    config = replace(family.unet, **conditions)

    # the student's file
    if turbo is not None:
        turbo = fetch(turbo) if turbo in PUBLIC else turbo
        config, state, lora, header = read_turbo(turbo, config, name)
        lora = weights.scaled(lora, lora_scale, turbo)
    if teacher is None and header.get("whole"):
        teacher = turbo

    # the teacher's, which also holds VAE and text encoder
    if teacher is None:
        teacher = fetch(name)
        teacher = teacher.parent.parent if name == "ms" else teacher                    # its folder
    (unet_state, unet_file), vae_part, text_part = read_teacher(teacher, family.text.layers)
    if state is None:
        new = {f"{layer}.weight": module.weight.data for layer, module in condition_layers(config).items()}
        state, turbo = new | unet_state, unet_file

    # networks without memory, and then the tensors
    with weights.without_memory():
        unet, vae, text = UNet3D(config), VAE(family.vae), TextEncoder(family.text)
    weights.fill(unet, state, turbo, device, dtype, lora).out.float()                   # see UNet3D.last
    weights.fill(vae, *vae_part, device, dtype).requires_grad_(False)
    weights.fill(text, *text_part, device, dtype).requires_grad_(False)
    return Models(name, unet, vae, text, family, complete(header, family) if header else {})


@torch.no_grad()
def to_clip(vae: nn.Module, z: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """Latents (B, C, T, h, w) -> clips uint8 (B, 3, T, H, W), cut to whole numbers as in the released code.

    chunk: frames decoded at a time; None = all.
    """
    x = vae.decode(z, chunk).float()
    if not x.isfinite().all():
        raise UserError("the networks gave NaN or infinity, which would be a black clip; try --dtype float32")
    return ((x.clamp(-1, 1) + 1) / 2 * 255).byte()
