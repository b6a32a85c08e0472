"""The networks: UNet3D (the denoiser ε), VAE (pixels <-> latents) and TextEncoder (caption -> c).

One UNet3D serves VideoCrafter2, ModelScopeT2V and the toy: an image diffusion UNet whose every block is followed by its
temporal twin. ResBlock = image convolutions, then convolutions along T; Transformer over space, then over time.

Axes: B batch, C channels, T frames, H W space, L tokens, D width. Latents and clips are (B, C, T, H, W).
All activations are channels-last, in memory (B, T, H, W, C), so that each of the four folds below is a view:
    frames_to_batch    (B, C, T, H, W) -> (B*T, C, H, W)     image layers see frames as a batch
    pixels_to_tokens   (B, C, T, H, W) -> (B, T*H*W, C)      linear layers see tokens
and back. Symbols: z noisy latent, t timestep, w guidance scale ω, eps the predicted noise ε.
"""
import math
import sys
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet3D; the defaults are VideoCrafter2's and ModelScopeT2V's."""
    in_channels: int = 4
    channels: int = 320
    mult: tuple = (1, 2, 4, 4)              # width of each level, in units of channels
    res_blocks: int = 2                     # per level on the way down; one more on the way up
    attention_levels: tuple = (0, 1, 2)
    head_dim: int = 64
    context_dim: int = 1024                 # width of the text states
    init_heads: int = 8                     # of the temporal transformer right after the first convolution
    fps: bool = False                       # VideoCrafter2 is told the frame rate
    guidance: bool = False                  # T2V-Turbo is told ω
    motion: bool = False                    # T2V-Turbo-v2 is told the strength of its motion guidance, too
    groups: int = 32                        # of every group norm
    dropout: float = 0.0                    # in the temporal convolutions, in train mode; the teachers had 0.1
    spacetime: int = 0                      # toy only: width of SpaceTime, and its temporal attention sees all pixels; 0 = neither


VC2 = UNetConfig(fps=True)
MODELSCOPE = UNetConfig()
SHAPES = UNetConfig(in_channels=8, channels=32, mult=(2, 3), res_blocks=1, attention_levels=(0, 1), head_dim=32,
                    context_dim=128, init_heads=1, groups=8, spacetime=128)


# ---------------------------------------------------------------------------------------------- folds

def frames_to_batch(x):
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x, B):
    """(B*T, C, H, W) -> (B, C, T, H, W)"""
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def pixels_to_tokens(x):
    """(B, C, T, H, W) -> (B, T*H*W, C)"""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def tokens_to_pixels(x, T, H, W):
    """(B, T*H*W, C) -> (B, C, T, H, W)"""
    return x.unflatten(1, (T, H, W)).permute(0, 4, 1, 2, 3)


def per_frame(layer, x):
    """Apply an image layer to every frame of x (B, C, T, H, W)."""
    return batch_to_frames(layer(frames_to_batch(x)), x.shape[0])


def channels_last(module):
    """Convolution weights in the memory format of the activations (in place)."""
    for p in module.parameters():
        if p.dim() in (4, 5):
            p.data = p.data.to(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)
    return module


# ---------------------------------------------------------------------------------------- embeddings

def timestep_embedding(t, dim):
    """Sinusoids of a timestep or frame rate, (B,) -> (B, dim), float32: all cosines, then all sines."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def guidance_embedding(w, dim=256):
    """Sinusoids of 1000 ω, (B,) -> (B, dim), float32: all sines, then all cosines.

    Angles reach 15,000 rad, where a float32 is only good to 1e-3: the published weights were trained with the order of
    operations below, in float32.
    """
    half = dim // 2
    step = torch.log(torch.tensor(10000.0, device=w.device)) / (half - 1)
    angle = (1000 * w.float())[:, None] * torch.exp(torch.arange(half, device=w.device) * -step)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class SpaceTime(nn.Module):
    """Tells the toy where and when: caption-modulated functions of (t, y, x), added to the first features and to what each
    attention over the clip sees, and one of t, added to the timestep embedding of every frame. Normalised, so that they are
    as large as the features they join.

    The published UNets know neither place (only what zero padding leaks) nor time (their temporal attention has no
    positions); a billion weights cope, a toy that must move a shape "from left to right" does not.
    """

    octaves = 4

    def __init__(self, axes, width, context_dim, channels):
        super().__init__()
        self.features = nn.Linear(axes * (1 + 2 * self.octaves), width)
        self.modulation = nn.Linear(context_dim, 2 * width)
        self.hidden = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)

    def forward(self, context, *sizes):
        """context (B, L, D), whose last token is the caption as a whole; sizes T or T, H, W -> (B, sizes..., C)"""
        axes = [torch.linspace(-1, 1, n, device=context.device) for n in sizes]
        c = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)                # (T, H, W, 3)
        waves = [f(math.pi * 2 ** k * c) for k in range(self.octaves) for f in (torch.sin, torch.cos)]
        h = self.norm1(self.features(torch.cat([c, *waves], dim=-1).to(context.dtype)))   # (T, H, W, D)
        said = self.modulation(context[:, -1]).view(len(context), *[1] * len(sizes), -1)
        scale, shift = said.chunk(2, dim=-1)
        h = F.silu(h * (1 + scale) + shift)                                          # (B, T, H, W, D)
        return self.out(self.norm2(F.silu(self.hidden(h))))


# -------------------------------------------------------------------------------------------- blocks

def zero(layer):
    """A residual branch whose last layer is zero starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class FrameConv(nn.Module):
    """3x3 convolution of every frame, which may halve (stride 2) or first double H and W."""

    def __init__(self, cin, cout, stride=1, double=False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride, padding=1)
        self.double = double

    def forward(self, x, emb, context):
        B, x = x.shape[0], frames_to_batch(x)
        if self.double:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return batch_to_frames(self.conv(x), B)


class TemporalConv(nn.Module):
    """Four convolutions over three frames each, residual; normalised over all frames together."""

    def __init__(self, channels, dropout, groups):
        super().__init__()

        def layer(*drop):
            return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), *drop,
                                 nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))

        self.conv1 = layer()
        self.conv2, self.conv3, self.conv4 = (layer(nn.Dropout(dropout)) for _ in range(3))
        zero(self.conv4[-1])

    def forward(self, x):
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(nn.Module):
    """Two image convolutions with the timestep added between them, then TemporalConv."""

    def __init__(self, cin, cout, emb_dim, dropout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(emb_dim, cout)
        self.norm2 = nn.GroupNorm(groups, cout)
        self.conv2 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.temporal = TemporalConv(cout, dropout, groups)

    def forward(self, x, emb, context):
        h = per_frame(lambda x: self.conv1(F.silu(self.norm1(x))), x)
        h = h + self.emb(emb).transpose(1, 2)[..., None, None]
        h = per_frame(lambda h: self.conv2(F.silu(self.norm2(h))), h)
        return self.temporal(per_frame(self.skip, x) + h)


def attention(q, k, v):
    """softmax(q kᵀ / √d) v over (N, heads, L, d)

    By torch's fused kernel, except for short bf16 sequences on a CPU, where that takes twice as long as the formula,
    and with its backward pass five times.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 512:
        return attention_map(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_map(q, k):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention over a frame's pixels ("space"), a pixel's frames ("time"), the caption ("text"), or, in the toy,
    all pixels of all frames ("clip")."""

    def __init__(self, width, heads, head_dim, over, context_dim=None):
        super().__init__()
        inner = heads * head_dim
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(context_dim or width, inner, bias=False)
        self.v = nn.Linear(context_dim or width, inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.head_dim, self.over = head_dim, over
        self.maps = None                    # a dict while record_attention listens

    def forward(self, x, context, T):
        """x (B, T*H*W, D), context (B, L, D) -> (B, T*H*W, D)

        Nothing is copied: over time, pixels count as heads, (B, T, H*W*heads, d); over the text, a clip is one
        sequence of T*H*W queries, so that its keys and values are computed once and not once per frame.
        """
        B, L, _ = x.shape
        source = context if self.over == "text" else x
        fold = {"space": (B * T, L // T), "time": (B, T), "text": (B, L), "clip": (B, L)}[self.over]
        fold_source = (B, source.shape[1]) if self.over == "text" else fold
        q = self.q(x).view(*fold, -1, self.head_dim).transpose(1, 2)
        k, v = (f(source).view(*fold_source, -1, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        if self.maps is None:
            h = attention(q, k, v)
        else:
            p = attention_map(q, k)                         # (B, H*W*heads, T, T)
            self.maps[self] = p.unflatten(1, (L // T, -1))
            h = p @ v
        return self.out(h.transpose(1, 2).reshape(B, L, -1))


class GEGLU(nn.Module):
    """Feed-forward layer, four times as wide inside, whose one half gates the other (Shazeer, 2020)."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class Transformer(nn.Module):
    """Self-attention, a second attention, feed-forward. Over "space" the second one reads the text; over "time" it is
    self-attention again, and so the text reaches time only through space. The toy's temporal one sees the whole "clip": in
    its 64 latent pixels things move past each other, and a pixel's own frames do not tell what moved."""

    def __init__(self, channels, heads, head_dim, over, context_dim, groups, spacetime=0):
        super().__init__()
        inner = heads * head_dim
        if over == "clip":
            self.place = SpaceTime(3, spacetime, context_dim, inner)
        text = dict(over="text", context_dim=context_dim) if over == "space" else dict(over=over)
        self.over = over
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.attn1 = Attention(inner, heads, head_dim, over)
        self.ff = GEGLU(inner)              # before attn2, as VideoCrafter2 has it: public LoRA files go by this order
        self.attn2 = Attention(inner, heads, head_dim, **text)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(inner) for _ in range(3))
        self.proj_out = zero(nn.Linear(inner, channels))

    def forward(self, x, emb, context):
        """x (B, C, T, H, W), context (B, L, D) -> like x; emb is for ResBlocks."""
        B, C, T, H, W = x.shape
        h = per_frame(self.norm, x) if self.over == "space" else self.norm(x)
        h = self.proj_in(pixels_to_tokens(h))
        if self.over == "clip":
            h = h + self.place(context, T, H, W).flatten(1, 3)
        h = h + self.attn1(self.norm1(h), context, T)
        h = h + self.attn2(self.norm2(h), context, T)
        h = h + self.ff(self.norm3(h))
        return x + tokens_to_pixels(self.proj_out(h), T, H, W)


class Block(nn.Sequential):
    def forward(self, x, emb, context):
        for layer in self:
            x = layer(x, emb, context)
        return x


# ---------------------------------------------------------------------------------------------- UNet

def blocks(c):
    """The layers of every block of a UNetConfig: on the way down, in the middle, on the way up."""
    widths = [c.channels * m for m in c.mult]

    def res(cin, cout):
        return ResBlock(cin, cout, 4 * c.channels, c.dropout, c.groups)

    def attend(width):
        return [Transformer(width, width // c.head_dim, c.head_dim, over, c.context_dim, c.groups, c.spacetime)
                for over in ("space", "clip" if c.spacetime else "time")]

    down, skips = [[FrameConv(c.in_channels, c.channels)]], [c.channels]         # skips: widths, popped on the way up
    for level, width in enumerate(widths):
        for _ in range(c.res_blocks):
            down.append([res(skips[-1], width)] + (attend(width) if level in c.attention_levels else []))
            skips.append(width)
        if level < len(widths) - 1:
            down.append([FrameConv(width, width, stride=2)])
            skips.append(width)

    middle = [res(width, width), *attend(width), res(width, width)]

    up = []
    for level, out in reversed(list(enumerate(widths))):
        for _ in range(c.res_blocks + 1):
            up.append([res(width + skips.pop(), out)] + (attend(out) if level in c.attention_levels else []))
            width = out
        if level > 0:
            up[-1].append(FrameConv(width, width, double=True))
    return down, middle, up


def condition_layers(c):
    """What T2V-Turbo adds to its teacher: layers for ω, and in v2 for the strength of motion guidance.

    They start at zero (and combine_proj as a sum), so that a student starts as its teacher.
    """
    layers = {}
    if c.guidance:
        layers["time_cond_proj"] = zero(nn.Linear(256, c.channels, bias=False))
    if c.motion:
        layers["motion_cond_proj"] = zero(nn.Linear(256, c.channels, bias=False))
        layers["combine_proj"] = nn.Linear(2 * c.channels, c.channels, bias=False)
        layers["combine_proj"].weight.data.copy_(torch.eye(c.channels).repeat(1, 2))
    return layers


class UNet3D(nn.Module):
    """eps = UNet3D(z, t, c, ω). The names of its outer parts are VideoCrafter2's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpointing = False          # recompute each block in the backward pass instead of storing it

        def mlp():
            return nn.Sequential(nn.Linear(c.channels, 4 * c.channels), nn.SiLU(),
                                 nn.Linear(4 * c.channels, 4 * c.channels))

        self.time_embed = mlp()
        if c.fps:
            self.fps_embedding = mlp()
        for name, layer in condition_layers(c).items():
            self.add_module(name, layer)
        if c.spacetime:
            self.spacetime = SpaceTime(3, c.spacetime, c.context_dim, c.channels)
            self.frametime = SpaceTime(1, c.spacetime, c.context_dim, 4 * c.channels)

        down, middle, up = blocks(c)
        self.input_blocks = nn.ModuleList(Block(*layers) for layers in down)
        self.init_attn = Block(Transformer(c.channels, c.init_heads, c.head_dim, "time", c.context_dim, c.groups))
        self.middle_block = Block(*middle)
        self.output_blocks = nn.ModuleList(Block(*layers) for layers in up)
        self.out = nn.Sequential(nn.GroupNorm(c.groups, c.channels * c.mult[0]), nn.SiLU(),
                                 zero(nn.Conv2d(c.channels * c.mult[0], c.in_channels, 3, padding=1)))
        channels_last(self)

    @property
    def dtype(self):
        return self.out[0].weight.dtype     # of a norm, which LoRA never wraps

    def embed(self, z, t, context, w, fps, motion):
        """What is said to all pixels, (B, 1, 4 C): the timestep, and ω, λ and the frame rate where known; toy: (B, T, 4 C)."""
        c, B = self.config, z.shape[0]
        h = timestep_embedding(t, c.channels).to(self.dtype)
        if w is not None:
            assert c.guidance, "this UNet was built without a guidance embedding"
            cond = self.time_cond_proj(guidance_embedding(w).to(self.dtype))
            if motion is not None:
                cond = self.combine_proj(torch.cat([cond, self.motion_cond_proj(
                    guidance_embedding(motion).to(self.dtype))], dim=1))
            h = h + cond
        h = self.time_embed(h)
        if c.fps:
            fps = torch.as_tensor(16 if fps is None else fps, device=z.device).expand(B)
            h = h + self.fps_embedding(timestep_embedding(fps, c.channels).to(self.dtype))
        h = h[:, None]
        if c.spacetime:
            h = h + self.frametime(context, z.shape[2])
        return F.silu(h)

    def forward(self, z, t, context, w=None, fps=None, motion=None):
        """z (B, C, T, H, W), t (B,), context (B, L, D), w, fps, motion (B,) or None -> eps (B, C, T, H, W)"""
        context = context.to(self.dtype)
        emb = self.embed(z, t, context, w, fps, motion)
        h = z.to(self.dtype, memory_format=torch.channels_last_3d)

        skips = []
        for i, block in enumerate(self.input_blocks):
            h = self.run(block, h, emb, context)
            if i == 0:
                if self.config.spacetime:
                    h = h + self.spacetime(context, *h.shape[2:]).permute(0, 4, 1, 2, 3)
                h = self.run(self.init_attn, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return per_frame(self.out, h).to(z.dtype)

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


@contextmanager
def record_attention(unet):
    """`with record_attention(unet) as maps:` a forward pass leaves its temporal attention in maps, differentiable.

    maps: {module: (B, H*W, heads, T, T)} of the first self-attention over time of every block on the way up that has
    one, the layers that T2V-Turbo-v2 takes the motion of a clip from. Go backward within the block, too: recomputed
    blocks must listen again.
    """
    maps = {}
    listening = [m.attn1 for m in unet.output_blocks.modules() if isinstance(m, Transformer) and m.over == "time"]
    for attn in listening:
        attn.maps = maps
    try:
        yield maps
    finally:
        for attn in listening:
            attn.maps = None


# ----------------------------------------------------------------------------------------------- VAE

@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are those of Stable Diffusion's KL-F8, which both teachers use."""
    channels: int = 128
    mult: tuple = (1, 2, 4, 4)
    res_blocks: int = 2                     # per level of the encoder; one more in the decoder
    latent: int = 4
    groups: int = 32                        # of every group norm
    scale: float = 0.18215                  # brings latents to unit variance
    patch: int = 1                          # toy only: pixels of a patch enter and leave as channels

    @property
    def factor(self):
        return self.patch * 2 ** (len(self.mult) - 1)


KL_F8 = VAEConfig()
SHAPES_VAE = VAEConfig(channels=48, mult=(1, 1), res_blocks=1, latent=8, groups=8, patch=4)


class VAEResBlock(nn.Module):
    """Two convolutions around which x passes unchanged. (N, Cin, H, W) -> (N, Cout, H, W)"""

    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """One head over all pixels of a frame."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).permute(0, 2, 3, 1).flatten(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (N, 1, H*W, C)
        h = attention(q, k, v)[:, 0].unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)
        return x + self.proj_out(h)


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def vae_down(width):                                        # the pad is lopsided, as it was in training
    return dict(downsample=named(lopsided=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))


def vae_up(width):
    return dict(upsample=named(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1)))


def vae_level(cin, cout, count, groups, resample):
    blocks = [VAEResBlock(cin if i == 0 else cout, cout, groups) for i in range(count)]
    return named(block=nn.Sequential(*blocks), **resample)


def vae_middle(width, groups):
    return named(block_1=VAEResBlock(width, width, groups), attn_1=VAEAttention(width, groups),
                 block_2=VAEResBlock(width, width, groups))


class Encoder(nn.Module):
    """Frames (N, 3, H, W) -> mean and log-variance of their latents before quant_conv, (N, 2 C, H/8, W/8)."""

    def __init__(self, c):
        super().__init__()
        widths = [c.channels * m for m in c.mult]
        self.conv_in = nn.Conv2d(3 * c.patch ** 2, c.channels, 3, padding=1)
        self.down = nn.ModuleList(
            vae_level(cin, cout, c.res_blocks, c.groups, vae_down(cout) if i < len(widths) - 1 else {})
            for i, (cin, cout) in enumerate(zip([c.channels] + widths[:-1], widths, strict=True)))
        self.mid = vae_middle(widths[-1], c.groups)
        self.norm_out = nn.GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for layer in (*self.down, self.mid):
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (N, C, h, w) -> frames (N, 3, 8h, 8w)."""

    def __init__(self, c):
        super().__init__()
        widths = [c.channels * m for m in c.mult]
        self.conv_in = nn.Conv2d(c.latent, widths[-1], 3, padding=1)
        self.mid = vae_middle(widths[-1], c.groups)
        self.up = nn.ModuleList(                            # up.0 is the finest level and runs last
            vae_level(cin, cout, c.res_blocks + 1, c.groups, vae_up(cout) if i > 0 else {})
            for i, (cin, cout) in enumerate(zip(widths[1:] + widths[-1:], widths, strict=True)))
        self.norm_out = nn.GroupNorm(c.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * c.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for layer in (self.mid, *reversed(self.up)):
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] <-> latents (B, 4, T, H/8, W/8) of unit variance, frame by frame.

    The names of its parts are those of Stable Diffusion's first_stage_model.
    """

    def __init__(self, config=KL_F8):
        super().__init__()
        c = self.config = config
        self.checkpointing = False          # recompute each chunk of decoded frames in the backward pass
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent, 2 * c.latent, 1)
        self.post_quant_conv = nn.Conv2d(c.latent, c.latent, 1)
        channels_last(self)

    @property
    def dtype(self):
        return self.quant_conv.weight.dtype

    def posterior(self, x):
        """x (B, 3, T, H, W) -> mean and log-variance of q(z | x), (B, 4, T, H/8, W/8) each, unscaled"""
        frames = frames_to_batch(x.to(self.dtype, memory_format=torch.channels_last_3d))
        h = self.quant_conv(self.encoder(F.pixel_unshuffle(frames, self.config.patch)))
        mean, logvar = batch_to_frames(h, x.shape[0]).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x, noise=None):
        """The posterior's mean, or its sample with that noise; scaled."""
        mean, logvar = self.posterior(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise.to(mean)
        return z * self.config.scale

    def decode(self, z, chunk=None):
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


# ---------------------------------------------------------------------------------------------- text

@dataclass(frozen=True)
class TextConfig:
    width: int = 1024
    layers: int = 24                        # of the published tower; its last layer is never run
    heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408


VIT_H = TextConfig()


class TextEncoder(nn.Module):
    """Captions -> states of all L tokens before CLIP's last layer, (B, L, D).

    The tower is open_clip's, and so are its names. Unlike the pooled embedding, these states keep every word's place.
    """

    def __init__(self, config=VIT_H, tokenizer=None):
        super().__init__()
        import open_clip  # here, for it takes seconds, and the rest of this file needs nothing but torch
        c = self.config = config
        self.tokenizer = tokenizer or open_clip.get_tokenizer("ViT-H-14")
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.positional_embedding = nn.Parameter(torch.randn(c.context_length, c.width) * 0.01)
        self.transformer = open_clip.transformer.Transformer(c.width, c.layers - 1, c.heads)
        self.ln_final = nn.LayerNorm(c.width)
        self.warned = False

    @property
    def width(self):
        return self.config.width

    def tokenize(self, captions):
        """list of B captions -> (B, L) token ids; the first time that one is too long, says so and cuts it."""
        limit = self.config.context_length - 2              # start and end take a place each
        for caption in captions if hasattr(self.tokenizer, "encode") and not self.warned else ():
            if len(self.tokenizer.encode(caption)) > limit:
                print(f"caption is cut at {limit} tokens, the text encoder's limit: {caption[:60]}...", file=sys.stderr)
                self.warned = True
                break
        return self.tokenizer(captions)

    def forward(self, captions):
        ids = self.tokenize(captions).to(self.positional_embedding.device)
        x = self.token_embedding(ids) + self.positional_embedding
        L = ids.shape[1]
        causal = torch.full((L, L), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return self.ln_final(self.transformer(x, attn_mask=causal))


# --------------------------------------------------------------------------------------------- models

@dataclass(frozen=True)
class Family:
    """A teacher: its networks, and the clips it was trained for."""
    unet: UNetConfig
    height: int
    width: int
    fps: int                                # of a generated clip; VideoCrafter2's UNet is told
    frames: int = 16
    vae: VAEConfig = KL_F8
    text: TextConfig = VIT_H


FAMILIES = {"vc2": Family(VC2, 320, 512, fps=16), "ms": Family(MODELSCOPE, 256, 256, fps=8)}


def check_size(family, **sides):
    """Heights and widths in pixels, or None, that the family's VAE and UNet can halve evenly: multiples of 64, of the toy's
    16. Raises ValueError."""
    unet, vae = (FAMILIES[family].unet, FAMILIES[family].vae) if family in FAMILIES else (SHAPES, SHAPES_VAE)
    multiple = vae.factor * 2 ** (len(unet.mult) - 1)
    for name, pixels in sides.items():
        if pixels is not None and (pixels < multiple or pixels % multiple):
            low = max(pixels // multiple, 1) * multiple
            raise ValueError(f"{name} {pixels} is not a multiple of {multiple}; try {low} or {low + multiple}")


@dataclass
class Models:
    """What sampling and training start from; weights.load makes one."""
    name: str                               # vc2, ms or shapes
    unet: nn.Module
    vae: nn.Module
    text: nn.Module
    fps: int
    height: int
    width: int
    frames: int
    header: dict                            # of the student's weights: method, steps, w_min, w_max; {} for a teacher

    @property
    def steps(self):
        """N of the grid that the student was trained on."""
        return self.header.get("steps", 50)
