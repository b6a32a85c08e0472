"""The networks: UNet3D (the denoiser ε), TextEncoder (caption -> c); VAE (pixels <-> z) is networks/vae.py's.

One UNet3D serves VideoCrafter2 and ModelScopeT2V: an image diffusion UNet whose every layer has a temporal
twin behind it. ResBlock = image convolutions, then convolutions along T; Transformer over space, then time.

Axes: B batch, C channels, T frames, H W space, L tokens, D width. Latents and clips are (B, C, T, H, W), in
memory (B, T, H, W, C), so that the folds below are views (on a CPU: measured there; CUDA's group norms copy).
Symbols: z noisy latents, t timesteps, c caption states (B, L, D), w guidance scale ω; result ε.

Layers are written as their formulas. On a CPU networks/fast_cpu.py has equal ones that are faster.
"""
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import fast_cpu, layouts
from networks.clip import TextTower, bpe, recompute, say_cut
from networks.layouts import fetch
from networks.vae import KL_F8, VAE, Upsample, VAEConfig, VAEResBlock
from plumbing import weights
from plumbing.errors import UserError
from solver import Sampling

# The published UNets: blocks on the way down, on the way up (from below) beside those they take as skips,
# and in the middle. A layer: its kind, width in (a sum: what comes up + skip), and width out if it differs.
LAYOUT = """
    conv 4 320                           | res 320+320 320, space 320, time 320
    res 320, space 320, time 320         | res 320+320 320, space 320, time 320
    res 320, space 320, time 320         | res 640+320 320, space 320, time 320
    downsample 320                       | res 640+320 640, space 640, time 640, upsample 640
    res 320 640, space 640, time 640     | res 640+640 640, space 640, time 640
    res 640, space 640, time 640         | res 1280+640 640, space 640, time 640
    downsample 640                       | res 1280+640 1280, space 1280, time 1280, upsample 1280
    res 640 1280, space 1280, time 1280  | res 1280+1280 1280, space 1280, time 1280
    res 1280, space 1280, time 1280      | res 1280+1280 1280, space 1280, time 1280
    downsample 1280                      | res 1280+1280 1280, upsample 1280
    res 1280                             | res 1280+1280 1280
    res 1280                             | res 1280+1280 1280
                    res 1280, space 1280, time 1280, res 1280
"""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet3D; the defaults are VideoCrafter2's and ModelScopeT2V's."""
    layout: str = LAYOUT
    in_channels: int = 4
    channels: int = 320                     # of the first features, as in layout, and of the sinusoids of t
    head_dim: int = 64
    context_dim: int = 1024                 # width of the caption states
    init_heads: int = 8                     # of the temporal transformer right after the first convolution
    fps: bool = False                       # VideoCrafter2 is told the frame rate
    guidance: bool = False                  # T2V-Turbo is told ω
    motion: bool = False                    # T2V-Turbo-v2 is told λ', the strength of motion guidance, too
    groups: int = 32                        # of every group norm


VC2 = UNetConfig(fps=True)
MODELSCOPE = UNetConfig()


def read_layout(layout: str) -> tuple[list, list, list]:
    """The layers (kind, width in, width out) of all blocks: on the way down, in the middle, on the way up."""
    def layer(kind, *widths):
        widths = [sum(map(int, width.split("+"))) for width in widths]
        return kind, widths[0], widths[-1]

    def block(text):
        return [layer(*words.split()) for words in text.split(",")]

    *rows, middle = layout.strip().splitlines()
    down, up = zip(*(row.split("|") for row in rows))
    return [block(text) for text in down], block(middle), [block(text) for text in reversed(up)]


# ---- folds -------------------------------------------------------------------------------------------------

def frames_to_batch(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)                              # (B, C, T, H, W) -> (B*T, C, H, W)


def batch_to_frames(x: Tensor, B: int) -> Tensor:
    return x.unflatten(0, (B, -1)).transpose(1, 2)                      # (B*T, C, H, W) -> (B, C, T, H, W)


def pixels_to_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)                       # (B, C, T, H, W) -> (B, T*H*W, C)


def tokens_to_pixels(x: Tensor, T: int, H: int, W: int) -> Tensor:
    return x.unflatten(1, (T, H, W)).permute(0, 4, 1, 2, 3)             # (B, T*H*W, C) -> (B, C, T, H, W)


def per_frame(layer, x: Tensor) -> Tensor:
    """Applies an image layer to every frame of x (B, C, T, H, W)."""
    return batch_to_frames(layer(frames_to_batch(x)), x.shape[0])


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
    order of operations below, in float32."""
    half = dim // 2
    step = torch.full((), 10000.0, device=w.device).log() / (half - 1)      # made on the device, not copied
    angle = (1000 * w.float())[:, None] * torch.exp(torch.arange(half, device=w.device) * -step)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# ---- blocks ------------------------------------------------------------------------------------------------

def zero(layer: nn.Module) -> nn.Module:
    """A residual branch whose last layer is zero starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class FrameConv(nn.Module):
    """3x3 convolution of every frame, which may halve (stride 2) or first double (upsample) H and W."""

    def __init__(self, cin: int, cout: int, stride: int = 1, upsample: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride, padding=1)
        self.upsample = upsample

    def forward(self, x, emb, c):
        B, x = x.shape[0], frames_to_batch(x)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return batch_to_frames(self.conv(x), B)


class TemporalConv(nn.Module):
    """Four convolutions over three frames each, residual; normalised over all frames together."""

    def __init__(self, channels: int, groups: int):
        super().__init__()

        def layer(*dropout):
            return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), *dropout,
                                 nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))

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
        self.silu = nn.SiLU()

    def forward(self, x, emb, c):
        """x (B, Cin, T, H, W), emb (B, 1 or T, 4 channels) -> (B, Cout, T, H, W); c is for Transformers."""
        h = per_frame(lambda x: self.conv1(self.silu(self.norm1(x))), x)
        h = h + self.emb(emb).transpose(1, 2)[..., None, None]
        h = per_frame(lambda h: self.conv2(self.silu(self.norm2(h))), h)
        return self.temporal(per_frame(self.skip, x) + h)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over (N, heads, L, d)

    Over a few frames as written: pixels count as heads there, and fused kernels are not made for 12,800 of
    them with 16 tokens each. Elsewhere by torch's fused kernel."""
    if k.shape[-2] <= 32:
        return attention_map(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d): (N, heads, L, d) twice -> (N, heads, L, L)"""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


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
        """(B, L, heads*d) -> (B*T, heads, H*W, d), (B, H*W*heads, T, d) or (B, heads, L, d), a view"""
        B, L, _ = x.shape
        sequences = B * T if self.over == "space" else B
        length = {"space": L // T, "time": T, "all": L}[self.over]          # over time pixels count as heads
        return x.view(sequences, length, -1, self.head_dim).transpose(1, 2)


class GEGLU(nn.Module):
    """Feed-forward layer, four times as wide inside, whose one half gates the other (Shazeer, 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
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

def condition_layers(config: UNetConfig) -> dict[str, nn.Module]:
    """What T2V-Turbo adds to its teacher: layers for ω, and in v2 for the strength of motion guidance.

    They start at zero (and combine_proj as a sum), so that a student starts as its teacher."""
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

        # the embedding of t, and of what else the UNet is told
        def mlp():
            return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

        self.time_embed = mlp()
        if config.fps:
            self.fps_embedding = mlp()
        for name, layer in self.conditions().items():
            self.add_module(name, layer)

        # blocks
        down, middle, up = read_layout(config.layout)
        self.input_blocks = nn.ModuleList(map(self.block, down))
        self.init_attn = Block(self.transformer("time", width, config.init_heads))
        self.middle_block = self.block(middle)
        self.output_blocks = nn.ModuleList(map(self.block, up))
        _, _, last = up[-1][-1]
        self.out = nn.Sequential(nn.GroupNorm(config.groups, last), nn.SiLU(),
                                 zero(nn.Conv2d(last, config.in_channels, 3, padding=1)))

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
        return FrameConv(cin, cout, stride=2 if kind == "downsample" else 1, upsample=kind == "upsample")

    def transformer(self, over: str, channels: int, heads: int) -> Transformer:
        config = self.config
        return Transformer(channels, heads, config.head_dim, over, config.context_dim, config.groups)

    @property
    def dtype(self) -> torch.dtype:
        return self.middle_block[0].norm1.weight.dtype      # of a norm, which LoRA never wraps

    def forward(self, z: Tensor, t: Tensor, c: Tensor, w: Tensor | None = None, fps=None,
                motion: Tensor | None = None) -> Tensor:
        """z (B, C, T, H, W), t (B,), c (B, L, D), w and motion (B,), fps a number -> ε like z"""
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
        """Embedding of the conditions of a clip, (B, 1, 4 channels): t, and ω, λ' and frame rate if given."""
        config, B = self.config, z.shape[0]
        h = timestep_embedding(t, config.channels).to(self.dtype)
        if w is not None:
            assert config.guidance, "this UNet was built without a guidance embedding"
            guidance = self.time_cond_proj(guidance_embedding(w).to(self.dtype))
            if motion is not None:
                strength = self.motion_cond_proj(guidance_embedding(motion).to(self.dtype))
                guidance = self.combine_proj(torch.cat([guidance, strength], dim=1))
            h = h + guidance
        h = self.time_embed(h)

        if config.fps:
            rate = torch.full((B,), 16 if fps is None else fps, device=z.device)
            h = h + self.fps_embedding(timestep_embedding(rate, config.channels).to(self.dtype))
        return h[:, None]

    def first(self, z, emb, c):
        """The first features: a convolution, then attention over time at full resolution."""
        h = self.run(self.input_blocks[0], z, emb, c)
        return self.run(self.init_attn, h, emb, c)

    def last(self, h):
        """Norm and convolution to ε, in float32 where their weights are, also under autocast.

        In ẑ0 at t = 999 an error of ε is divided by α = 0.068: rounding nothing but ε costs 0.025 of ẑ0."""
        dtype = self.out[0].weight.dtype
        with torch.autocast(h.device.type, enabled=False) if dtype == torch.float32 else nullcontext():
            return self.out(h.to(dtype))

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return recompute(block, *args)
        return block(*args)

    def motion_attentions(self) -> list[Attention]:
        """Where v2 reads a clip's motion: the first attention of every temporal transformer on the way up."""
        transformers = [m for m in self.output_blocks.modules() if isinstance(m, Transformer)]
        return [m.attn1 for m in transformers if m.over != "space"]

    def with_maps(self, *args, **conditions) -> tuple[Tensor, list[Tensor]]:
        """forward -> ε and the probabilities of all motion attentions, (B, H*W*heads, T, T) each, float32.

        Both are differentiable, also with checkpointing: only q and k are kept, and the maps are made of them
        afterwards."""
        outputs, attentions = {}, self.motion_attentions()

        def keep(layer, inputs, output):
            outputs[layer] = output

        hooks = [layer.register_forward_hook(keep) for attn in attentions for layer in (attn.q, attn.k)]
        try:
            eps = self(*args, **conditions)
        finally:
            for hook in hooks:
                hook.remove()

        T, dtype = eps.shape[2], torch.promote_types(eps.dtype, torch.float32)
        queries = [attn.fold(outputs[attn.q].to(dtype), T) for attn in attentions]
        keys = [attn.fold(outputs[attn.k].to(dtype), T) for attn in attentions]
        return eps, list(map(attention_map, queries, keys))


# ---- text --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TextConfig:
    """Sizes of CLIP's text tower; the defaults are ViT-H's."""
    width: int = 1024
    layers: int = 24                        # of the published tower; its last layer is never run
    heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408


VIT_H = TextConfig()


class TextEncoder(TextTower):
    """Captions -> states of all L tokens before CLIP's last layer, (B, L, D).

    Unlike the embedding of the whole caption, they keep every word in its place."""

    def __init__(self, config: TextConfig = VIT_H):
        super().__init__(**vars(config))
        self.config, self.width = config, config.width
        self.tokenizer = bpe()
        self.said_cut = False

    def forward(self, captions: list[str]) -> Tensor:
        length = self.config.context_length
        self.said_cut = self.said_cut or say_cut("the text encoder", self.tokenizer, captions, length)
        return self.penultimate(self.tokenizer(captions).to(self.positional_embedding.device))


# for fast_cpu.speed_up: layers that have equal ones which, on a CPU, are faster or hold less
CPU_LAYERS = {GEGLU: fast_cpu.InParts, VAEResBlock: fast_cpu.ByRows, Upsample: fast_cpu.Folded}

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

    def student_sampling(self, method: str) -> Sampling:
        """How a student of a method is sampled; VCM's as T2V-Turbo's."""
        return self.sampling.get(method, self.sampling["turbo"])


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


def check_size(family: Family, **sides: int | None) -> None:
    """Raises UserError for heights and widths in pixels that VAE and UNet cannot halve evenly."""
    multiple = family.vae.factor * 2 ** family.unet.layout.count("downsample")      # 64, the toy's 16
    for name, pixels in sides.items():
        if pixels is not None and (pixels < multiple or pixels % multiple):
            low = max(pixels // multiple, 1) * multiple
            raise UserError(f"{name} {pixels} is not a multiple of {multiple}; try {low} or {low + multiple}")


@dataclass
class Models:
    """What sampling and training start from; `load` makes one."""
    name: str                               # vc2, ms or shapes
    unet: nn.Module
    vae: nn.Module
    text: nn.Module
    family: Family
    header: dict = field(default_factory=dict)  # how the student was trained (`complete`); {}: a teacher
    teacher: str = ""                       # fingerprint of the teacher's weights
    autoencoder: str = ""                   # and of its VAE's

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that the networks were trained on."""
        family, header = self.family, self.header
        return tuple(header.get(name, getattr(family, name)) for name in ("frames", "height", "width"))

    @property
    def sampling(self) -> Sampling:
        """How the student, or without one the teacher, is sampled by default: as it was trained."""
        header, config = self.header, self.unet.config
        if not header:
            return self.family.sampling["teacher"]
        default = self.family.student_sampling(header["method"])
        return replace(default, grid=header["grid"],
                       guidance=min(max(default.guidance, header["w_min"]), header["w_max"]),
                       timesteps=default.timesteps if header["grid"] == default.grid else (),
                       fps=header["fps"] if config.fps else None,
                       motion=header["motion"] if config.motion else None,
                       motion_share=header["motion_share"])

    @property
    def fps(self) -> float:
        """Frames per second of a generated clip: what the UNet is told, where it is told."""
        return self.sampling.fps or self.header.get("fps", self.family.fps)


def complete(header: dict, family: Family) -> dict:
    """A student's header with what released files do not say: method, grid (N, once called `steps`), w_min
    and w_max (range of ω), fps, frames, height, width, motion (λ'), motion_share (τ)."""
    default = family.student_sampling(header.get("method", "turbo"))
    defaults = dict(method="turbo", grid=header.get("steps", default.grid), w_min=5.0, w_max=15.0,
                    fps=default.fps or family.fps, frames=family.frames, height=family.height,
                    width=family.width, motion=default.motion, motion_share=default.motion_share)
    return defaults | header


def check_teacher(header: dict, teacher: str, source) -> None:
    """Says so where a student's LoRA was trained on other weights than those it is added to."""
    if header.get("teacher", teacher) != teacher:
        print(f"{source} was distilled from other weights than this teacher's; unless they differ in "
              "precision alone, expect worse clips", file=sys.stderr)


@cache
def lora_shapes(config: UNetConfig) -> weights.Shapes:
    """{layer: shape of its weight} of all layers that take LoRA, in the UNet's order."""
    with weights.without_memory():
        unet = getattr(config, "network", UNet3D)(config)               # the toy's is its own
    takes_lora = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {name: m.weight.shape for name, m in unet.named_modules() if isinstance(m, takes_lora)}


def read_turbo(path: str | Path, config: UNetConfig, name: str | None = None, lora_scale: float = 1.0):
    """A student's file or folder -> (config of its UNet, its whole state or None, LoRA or None, its header).

    name: the model that the student must belong to, where its header names one. A file without a header is
    one that was released."""
    content, header, path = weights.read_student(path, name)
    config = replace(config, guidance=True, motion=any("motion_cond_proj" in key for key in content))
    if weights.is_lora(content):
        lora = weights.read_lora(content, lora_shapes(config), path, lora_scale)
        return config, None, lora, header or {"method": "turbo"}
    if lora_scale != 1:
        raise UserError(f"--lora-scale {lora_scale:g}: {path} holds whole weights, no LoRA to scale")

    # a whole UNet: alone, or in a whole model
    unet, vae = (weights.under(content, prefix) for prefix in ("diffusion_model.", "first_stage_model."))
    state = layouts.rename(unet or content, layouts.UNET)
    weights.check_numbers(state, path, finite=True)
    is_v2 = config.motion or config.fps and not unet        # unet_mg.pt, unet_no_mg.pt; else t2v_turbo_vc2.pt
    header = {"whole": bool(vae)} | (header or {"method": "turbo-v2" if is_v2 else "turbo"})
    return config, state, None, header if config.motion else header | {"motion": None}


def untrained(name: str, **conditions) -> Models:
    """The networks of "vc2" or "ms" with random weights, in torch's default dtype."""
    family = FAMILIES[name]
    unet = UNet3D(replace(family.unet, **conditions))
    vae, text = VAE(family.vae).requires_grad_(False), TextEncoder(family.text).requires_grad_(False)
    return Models(name, unet, vae, text, family)


def load(name: str, teacher: str | Path | None = None, turbo: str | Path | None = None, device="cpu",
         dtype: torch.dtype | None = torch.float32, lora_scale: float = 1.0, **conditions) -> Models:
    """The networks of "vc2" or "ms", the teacher's or, LoRA merged, the student's. In eval mode.

    teacher: file or folder; None = download. turbo: a student's file, or a key of PUBLIC to download; None:
    the teacher alone. lora_scale: strength of the student's LoRA, 1 as trained. dtype: None = the files'.
    conditions: guidance=True and motion=True add the layers that a student needs, as it starts."""
    family, header, state, lora = FAMILIES[name], {}, None, None
    config = replace(family.unet, **conditions)

    # the student's file
    if turbo is not None:
        turbo = fetch(turbo) if turbo in layouts.PUBLIC else turbo
        config, state, lora, header = read_turbo(turbo, config, name, lora_scale)
        header = complete(header, family)

    # the teacher's, which also holds VAE and text encoder
    if teacher is None:
        teacher = turbo if header.get("whole") else fetch(name)
    unet_state, vae_state, text_state = weights.read_teacher(teacher, family.text.layers)
    if lora and "time_cond_proj.weight" in unet_state:
        raise UserError(f"{teacher} holds a student, to which {turbo} cannot be added; give its teacher")
    if state is None:
        layers = condition_layers(config).items()
        state = {f"{name}.weight": layer.weight.data for name, layer in layers} | unet_state

    # networks without memory, and then the tensors
    with weights.without_memory():
        models = untrained(name, guidance=config.guidance, motion=config.motion)
    fingerprint = weights.fingerprint(unet_state, models.unet)
    autoencoder = weights.fingerprint(vae_state, models.vae)
    if lora:
        check_teacher(header, fingerprint, turbo)
    source = teacher if lora or turbo is None else turbo
    weights.fill(models.unet, state, source, device, dtype, lora).out.float()           # see UNet3D.last
    weights.fill(models.vae, vae_state, teacher, device, dtype)
    fast_cpu.speed_up(CPU_LAYERS, models.unet, models.vae)
    weights.fill(models.text, text_state, teacher, device, dtype)
    return replace(models, header=header, teacher=fingerprint, autoencoder=autoencoder)


@torch.no_grad()
def to_latents(vae: nn.Module, clips: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
    """Clips uint8 (B, 3, T, H, W) -> latents z0 (B, C, T, h, w), float32: the mean of the VAE's posterior, or
    what generators on the CPU, one per clip, draw from it."""
    x, noise = clips.to(next(vae.parameters()).device) / 127.5 - 1, None
    if generators:
        shape = vae.config.shape(*clips.shape[2:])
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return vae.encode(x, noise).float()


@torch.no_grad()
def to_clip(vae: nn.Module, z: Tensor, chunk: int | None = None) -> Tensor:
    """Latents (B, C, T, h, w) -> clips uint8 (B, 3, T, H, W), cut to whole numbers as in the released code.

    chunk: frames decoded at a time; None = all."""
    x = vae.decode(z, chunk).float()
    if not x.isfinite().all():
        raise UserError("the networks gave NaN or infinity, which would be a black clip; try --dtype float32"
                        ", or where training diverged a lower --lr")
    return ((x.clamp(-1, 1) + 1) / 2 * 255).byte()
