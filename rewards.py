"""Reward models R_img(x, c) and R_vid(x, c): how well does a clip x fit its caption c, how good does it look?

    reward = load("hpsv2", "HPS_v2.1_compressed.pt", device="cuda")
    scores = reward(clips, captions)

with clips (B, T, 3, H, W) in [0, 1] and B captions gives scores (B,), higher is better.

The pixels carry gradient, so that a generator can climb it; the reward's parameters and captions never do.

From top to bottom: `Reward`, and how clips are fitted to a model's input; the networks, each with
`text(ids)`, which sees the captions alone, and `score(frames, text)`; the table RECIPES, in which a new
reward is one entry; `load`.

B clips, T frames, H W pixels, S side of the model's square input, N patches of a frame, L tokens, D width,
E features.
"""
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.clip import OPENCLIP_BLOCKS, BlockStack, LayerNorm, TextTower, TowerBlock, attend
from plumbing.weights import (
    download,
    fill,
    huggingface_text,
    read_header,
    read_named,
    rename,
    without_memory,
)
from plumbing.wordpiece import WordPiece

Generators = Sequence[torch.Generator] | None           # on the CPU, one per clip: they draw its crop window
Tokenizer = Callable[[list[str]], Tensor]               # B captions -> token ids (B, L)
View = Callable[[Tensor, int, Generators], Tensor]      # clips (B, T, 3, H, W) -> (B, T, 3, S, S)


# ---- a reward ----------------------------------------------------------------------------------------------
class Reward:
    """reward(clips, captions): clips (B, T, 3, H, W) in [0, 1], any H and W, B captions -> (B,) float32.

    An image reward scores each frame with its clip's caption and averages over T; a video reward takes
    T = `frames`.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Tokenizer):
        recipe = RECIPES[name]
        self.name, self.kind, self.view = name, recipe.kind, recipe.view
        self.model, self.tokenizer = model, tokenizer
        self.frames: int | None = model.frames                      # None: an image reward takes any number

        convolution = next(p for p in model.parameters() if p.ndim == 4)            # that cuts the patches
        self.device, self.dtype = convolution.device, convolution.dtype
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=self.device).view(3, 1, 1)
                               for x in recipe.pixels)
        self.cache: dict[str, Tensor] = {}                          # caption -> what model.text made of it
        self.at_work = nullcontext                                  # around each call; train.py --offload

    def __call__(self, clips: Tensor, captions: list[str], generators: Generators = None) -> Tensor:
        """generators: one per clip, on the CPU, draws the crop window of a video reward; None: the centre."""
        with torch.autocast(self.device.type, enabled=False), self.at_work():   # not in the caller's bf16
            frames = self.fit(clips, generators)
            if isinstance(captions, str) or len(captions) != len(clips):
                raise ValueError(f"{self.name} takes one caption per clip: "
                                 f"{len(clips)} clips, captions {captions!r:.60}")
            return self.model.score(frames, self.text(captions))

    def features(self, clips: Tensor) -> Tensor:
        """Clips -> (B, E) float32 of unit length: what a video reward compares with the caption."""
        if self.kind != "video":
            videos = [name for name, recipe in RECIPES.items() if recipe.kind == "video"]
            raise ValueError(f"{self.name} reads single frames, it has no features of a clip; "
                             f"take {' or '.join(videos)}")
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.model.encode_video(self.fit(clips)).float(), dim=-1)

    def fit(self, clips: Tensor, generators: Generators = None) -> Tensor:
        """Clips -> the model's input (B, T, 3, S, S): resized, cropped, normalised, in its dtype."""
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise ValueError(f"{self.name} takes clips (B, T, 3, H, W), not {tuple(clips.shape)}")
        if self.frames and clips.shape[1] != self.frames:
            raise ValueError(f"{self.name} takes {self.frames} frames, not {clips.shape[1]}; "
                             "pick some, evenly spaced")
        frames = self.view(clips.to(self.device).float(), self.model.image_size, generators)
        return ((frames - self.mean) / self.std).to(self.dtype)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """What the model makes of the captions alone, each computed once."""
        if len(self.cache) > 10_000:
            self.cache.clear()
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.cache]
        if new:
            self.cache.update(zip(new, self.model.text(self.tokenizer(new).to(self.device)), strict=True))
        return torch.stack([self.cache[caption] for caption in captions])

    def checkpoint(self, on: bool = True) -> None:
        """Gradient checkpointing: about a third more time, and the memory of one block instead of all."""
        for module in self.model.modules():
            if isinstance(module, BlockStack):
                module.grad_checkpointing = on


# ---- views: clips (B, T, 3, H, W) -> (B, T, 3, S, S), float32 ----------------------------------------------
def squash(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The whole frame, its aspect ratio lost: PickScore, CLIPScore."""
    return resize(clips, S, S)


def pad(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The whole frame between black bars: HPS."""
    H, W = clips.shape[-2:]
    longer = max(H, W)
    clips = resize(clips, max(1, round(H * S / longer)), max(1, round(W * S / longer)))

    h, w = S - clips.shape[-2], S - clips.shape[-1]                 # the bars' height and width
    return F.pad(clips, (w // 2, w - w // 2, h // 2, h - h // 2))


def centre(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The middle square: ImageReward."""
    return crop(shorter_side(clips, S, int), S)


def window(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The middle square, or one that the generators draw: the video rewards were trained on random crops."""
    return crop(shorter_side(clips, S, round), S, generators)


def shorter_side(clips: Tensor, S: int, to_int: Callable[[float], int]) -> Tensor:
    """Resized so that the shorter side is S. How the longer one is rounded differs between models."""
    H, W = clips.shape[-2:]
    shorter = min(H, W)
    return resize(clips, to_int(H * S / shorter), to_int(W * S / shorter))


def resize(clips: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing: what torchvision does to tensors."""
    if clips.shape[-2:] == (height, width):
        return clips
    frames = F.interpolate(clips.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return frames.unflatten(0, clips.shape[:2])


def crop(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """An S x S window, the same for all frames of a clip, at the centre or where its generator says."""
    spare_y, spare_x = clips.shape[-2] - S, clips.shape[-1] - S
    if generators is None:
        y, x = round(spare_y / 2), round(spare_x / 2)
        return clips[..., y:y + S, x:x + S]

    windows = []
    for clip, generator in zip(clips, generators, strict=True):
        y = int(torch.randint(spare_y + 1, (), generator=generator))
        x = int(torch.randint(spare_x + 1, (), generator=generator))
        windows.append(clip[..., y:y + S, x:x + S])
    return torch.stack(windows)


def frames_for(reward: Reward, clips: Tensor) -> Tensor:
    """Clips uint8 (B, 3, T, H, W) as a reward takes them: (B, T, 3, H, W) in [0, 1].

    All frames, or, evenly spaced, as many as the reward takes.
    """
    pixels, T = clips.transpose(1, 2).float() / 255, clips.shape[2]
    if not reward.frames:
        return pixels
    if T < reward.frames:
        raise ValueError(f"{reward.name} looks at {reward.frames} frames, the clip has {T}")
    middles = [int((i + 0.5) * T / reward.frames) for i in range(reward.frames)]
    return pixels[:, middles]


# ---- parts that the networks share -------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class LayerScale(nn.Module):
    """How much of a residual branch is let through, per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma).to(x.dtype)


class Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


FLOAT32 = (nn.LayerNorm, RMSNorm, LayerScale, Float32Linear)        # keep float32 parameters in a bf16 model


class QuickGELU(nn.Module):
    """OpenAI CLIP's cheaper GELU; ViCLIP was trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class InternVideo2Block(TowerBlock):
    """The same with RMSNorm, also of queries and keys (over all heads at once), no qkv bias, and LayerScale.

    The tanh GELU is the one of the fused kernel that InternVideo2 was trained with.
    """

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__(width, heads, hidden, act=partial(nn.GELU, "tanh"), norm=partial(RMSNorm, eps=1e-6))
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_norm, self.attn.k_norm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)


def patches(conv: nn.Conv2d, frames: Tensor) -> Tensor:
    """Frames (B, T, 3, S, S) -> tokens (B, T, N, D) of the patches that `conv` cuts and projects."""
    return conv(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


# ---- CLIP (HPSv2.1, PickScore, CLIPScore, toy) and ViCLIP --------------------------------------------------
@dataclass(frozen=True)
class CLIPConfig:
    """The defaults are ViT-H/14, which HPSv2.1, PickScore and CLIPScore share."""
    image_size: int = 224
    patch: int = 14
    frames: int | None = None     # that the vision tower reads at once; None: it reads single frames
    width: int = 1280
    layers: int = 32
    heads: int = 16
    embed_dim: int = 1024         # of the features that both towers end in
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408
    tubelet: int = 1              # toy only: frames that a patch spans (ViViT, Arnab et al., 2021)

    def __post_init__(self):
        """Raises ValueError for what is no network: the toy's sizes come from a file."""
        for name, size in vars(self).items():
            if (type(size) is not int or not 0 < size < 100_000) and (name, size) != ("frames", None):
                raise ValueError(f"{name} is {size!r}")
        if self.width % self.heads or self.text_width % self.text_heads:
            raise ValueError(f"{self.heads} and {self.text_heads} heads for widths {self.width} and "
                             f"{self.text_width}")
        if self.layers + self.text_layers > 1000:
            raise ValueError(f"{self.layers} and {self.text_layers} layers")


@dataclass(frozen=True)
class ViCLIPConfig(CLIPConfig):
    """The defaults are ViCLIP-L."""
    frames: int = 8
    width: int = 1024
    layers: int = 24
    embed_dim: int = 768
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    context_length: int = 32


class VisionTower(nn.Module):
    """Joint attention over one class token and the N patches of a frame, or the T*N patches of a clip."""

    def __init__(self, config: CLIPConfig, act: type[nn.Module]):
        super().__init__()
        D, N = config.width, (config.image_size // config.patch) ** 2
        self.tubelet = config.tubelet
        self.conv1 = nn.Conv2d(3 * config.tubelet, D, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + N, D))
        if config.frames:
            times = config.frames // config.tubelet
            self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, times, D))
        self.ln_pre, self.ln_post = LayerNorm(D), LayerNorm(D)
        self.blocks = BlockStack(TowerBlock(D, config.heads, 4 * D, act) for _ in range(config.layers))
        self.proj = nn.Parameter(torch.zeros(D, config.embed_dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S), T = 1 without `config.frames` -> features (B, E)."""
        frames = frames.unflatten(1, (-1, self.tubelet)).flatten(2, 3)              # (B, T / n, 3 * n, S, S)
        x = patches(self.conv1, frames) + self.positional_embedding[1:]             # (B, T / n, N, D)
        if hasattr(self, "temporal_positional_embedding"):
            x = x + self.temporal_positional_embedding[:, :, None]
        x = x.flatten(1, 2)

        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.blocks(self.ln_pre(torch.cat([first, x], dim=1)))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Image-text contrast (Radford et al., 2021): two towers whose features are compared."""
    act = nn.GELU                                                   # of the towers' blocks

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config, self.image_size, self.frames = config, config.image_size, config.frames
        self.vision_encoder = VisionTower(config, self.act)
        self.text_encoder = TextTower(config.text_width, config.text_layers, config.text_heads,
                                      config.context_length, config.vocab_size, config.embed_dim, self.act)
        self.init()

    @torch.no_grad()
    def init(self) -> None:
        """For training from scratch: linear maps keep the variance, the residual branches start small."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "embedding" in name:
                p.normal_(std=0.02)
            elif p.ndim > 1:                                        # the rest are norms, ones already
                residual = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
                p.normal_(std=p[0].numel() ** -0.5 * (0.2 if residual else 1.0))

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, E), not of unit length."""
        return self.vision_encoder(images[:, None])

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), L <= context_length -> features (B, E), not of unit length."""
        return self.text_encoder.pooled(ids)

    text = encode_text

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        images = self.encode_image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])     # (B, T, E)
        return cosine(images, text[:, None]).mean(dim=1)


class ViCLIP(CLIP):
    """Video-text contrast (InternVid): a CLIP whose vision tower sees the patches of all frames at once."""
    act = QuickGELU

    def encode_video(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S) -> features (B, E), not of unit length."""
        assert frames.shape[1:3] == (self.frames, 3), f"frames {tuple(frames.shape)} for {self.config}"
        return self.vision_encoder(frames)

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        return cosine(self.encode_video(frames), text)


# ---- BERT, BLIP's ViT and ImageReward ----------------------------------------------------------------------
@dataclass(frozen=True)
class ViTConfig:
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class BERTConfig:
    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    token_types: int = 0          # 0: the model has no token types; else all tokens are of type 0
    image_width: int = 0          # of the image tokens that every layer attends to; 0: text only


class ViT(nn.Module):
    """Frames (B, T, 3, S, S) -> tokens (B, 1 + T*N, D), the class token first."""

    def __init__(self, config: ViTConfig, block: Callable[[int, int, int], TowerBlock], frames: int = 1):
        super().__init__()
        D, N = config.width, (config.image_size // config.patch) ** 2
        self.patch_embed = nn.Conv2d(3, D, config.patch, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * N, D))
        self.blocks = BlockStack(block(D, config.heads, config.hidden) for _ in range(config.layers))

    def forward(self, frames: Tensor) -> Tensor:
        x = patches(self.patch_embed, frames).flatten(1, 2)         # (B, T*N, D)
        first = self.cls_token.expand(len(x), -1, -1)
        return self.blocks(torch.cat([first, x], dim=1) + self.pos_embed)


class BERTAttention(nn.Module):
    """Attention of a text to itself or to an image, with the residual and BERT's norm behind it."""

    def __init__(self, config: BERTConfig, source_width: int):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.query, self.dense = nn.Linear(D, D), nn.Linear(D, D)
        self.key, self.value = nn.Linear(source_width, D), nn.Linear(source_width, D)
        self.norm = LayerNorm(D, eps=1e-12)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        y = attend(self.query(x), self.key(source), self.value(source), self.heads, attn_mask=mask)
        return self.norm(x + self.dense(y))


class BERTLayer(nn.Module):
    """Self-attention, cross-attention to image tokens if any, feed-forward; each with its norm behind it."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        D, hidden = config.width, config.hidden
        self.attention = BERTAttention(config, D)
        if config.image_width:
            self.crossattention = BERTAttention(config, config.image_width)
        self.intermediate, self.output = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm = LayerNorm(D, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.attention(x, x, mask)
        if image is not None:
            x = self.crossattention(x, image)
        return self.norm(x + self.output(F.gelu(self.intermediate(x))))


class BERT(nn.Module):
    """Token ids (B, L), 0 = padding, perhaps image tokens (B, M, image_width) -> state at [CLS] (B, D)."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        D, types = config.width, config.token_types
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(512, D)
        self.token_type_embeddings = nn.Embedding(types, D) if types else None
        self.norm = LayerNorm(D, eps=1e-12)
        self.layers = BlockStack(BERTLayer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.shape[1]]
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings.weight[0]
        mask = (ids != 0)[:, None, None]                            # (B, 1, 1, L): padding is not attended to
        return self.layers(self.norm(x), mask, image)[:, 0]


@dataclass(frozen=True)
class ImageRewardConfig:
    vit: ViTConfig = ViTConfig(image_size=224, patch=16, width=1024, layers=24, heads=16, hidden=4096)
    bert: BERTConfig = BERTConfig(vocab_size=30524, width=768, layers=12, heads=12, hidden=3072,
                                  image_width=1024)


class ImageReward(nn.Module):
    """BLIP reads the caption while it attends to the image; five linear layers turn this into a score."""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        self.image_size, self.frames = config.vit.image_size, None
        norm = partial(LayerNorm, eps=1e-6)
        self.vision, self.norm = ViT(config.vit, partial(TowerBlock, norm=norm)), norm(config.vit.width)
        self.bert = BERT(config.bert)
        sizes = [config.bert.width, 1024, 128, 64, 16, 1]           # in training, dropout stood between them
        self.mlp = nn.Sequential(*(Float32Linear(a, b) for a, b in pairwise(sizes)))

    def text(self, ids: Tensor) -> Tensor:
        return ids                                              # without an image there is nothing to compute

    def score(self, frames: Tensor, ids: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the images it was trained on. Capped at 2, as T2V-Turbo (and ReFL) does:
        a frame that good has no more gradient."""
        B, T = frames.shape[:2]
        image = self.norm(self.vision(frames.flatten(0, 1)[:, None]))       # (B*T, 1+N, D)
        state = self.bert(ids.repeat_interleave(T, dim=0), image)           # caption b for each of its frames
        score = (self.mlp(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
        return score.clamp(max=2).view(B, T).mean(dim=1)


# ---- InternVideo2, stage 2 ---------------------------------------------------------------------------------
class AttentionPool(nn.Module):
    """All tokens into one: the mean of the tokens attends to all of them."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.norm1_q, self.norm1_k, self.norm1_v = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.norm1_q(x.mean(dim=1, keepdim=True)))
        k, v = self.k(self.norm1_k(x)), self.v(self.norm1_v(x))
        return self.proj(attend(q, k, v, self.heads))[:, 0]


@dataclass(frozen=True)
class InternVideo2Config:
    vit: ViTConfig = ViTConfig(image_size=224, patch=14, width=1408, layers=40, heads=16, hidden=6144)
    bert: BERTConfig = BERTConfig(vocab_size=30522, width=1024, layers=19, heads=16, hidden=4096,
                                  token_types=2)
    pool_dim: int = 768
    embed_dim: int = 512
    frames: int = 8               # or 4, which it was trained with; `stretch` fits the position table


class InternVideo2(nn.Module):
    """A video transformer of 1 B parameters against the first 19 layers of BERT-large (the others attend to
    frames)."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.image_size, self.frames = config.vit.image_size, config.frames
        self.vision = ViT(config.vit, InternVideo2Block, config.frames)
        self.pool = AttentionPool(config.vit.width, config.vit.heads, config.pool_dim)
        self.bert = BERT(config.bert)
        self.vision_proj = nn.Linear(config.pool_dim, config.embed_dim)
        self.text_proj = nn.Linear(config.bert.width, config.embed_dim)

    def text(self, ids: Tensor) -> Tensor:
        return self.text_proj(self.bert(ids))

    def encode_video(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S) -> features (B, E), not of unit length."""
        return self.vision_proj(self.pool(self.vision(frames)))

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        return cosine(self.encode_video(frames), text)


def stretch(table: Tensor, frames: int, N: int) -> Tensor:
    """A position table (1, 1 + T*N, D), the class token first, interpolated linearly in time to another T."""
    grid = table[:, 1:].unflatten(1, (-1, N)).permute(0, 2, 3, 1).flatten(1, 2)         # (1, N*D, T)
    grid = F.interpolate(grid.float(), size=frames, mode="linear")                      # (1, N*D, frames)
    grid = grid.unflatten(1, (N, -1))
    return torch.cat([table[:, :1], grid.permute(0, 3, 1, 2).flatten(1, 2)], dim=1)


# ---- names in the public files -> ours ---------------------------------------------------------------------
OPENCLIP = [
    (r"^visual\.", "vision_encoder."),
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)\b", r"text_encoder.\1"),
    *OPENCLIP_BLOCKS]
HUGGINGFACE_VISION = [
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.", "visual."),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"), (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^(visual)_projection\.weight", r"\1.proj"), (r"^(text_projection)\.weight", r"\1")]
BERT_NAMES = [
    (r"^bert\.(embeddings|encoder)\.", "bert."), (r"\.layer\.", ".layers."),
    (r"attention\.(self|output)\.", "attention."), (r"\.(intermediate|output)\.dense", r".\1"),
    (r"(\.output)?\.LayerNorm", ".norm")]
MLP_LAYERS = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}     # there, dropout counts as a layer
IMAGEREWARD = [
    (r"^blip\.visual_encoder\.norm", "norm"), (r"^blip\.visual_encoder", "vision"),
    (r"^blip\.text_encoder", "bert"), (r"patch_embed\.proj", "patch_embed"),
    (r"^mlp\.layers\.(\d)\b", lambda match: f"mlp.{MLP_LAYERS[match[1]]}"),
    *BERT_NAMES]
INTERNVIDEO2 = [
    (r"^vision_encoder\.clip_projector\.(cross_attn\.)?", "pool."), (r"^pool\.([qkv])_bias", r"pool.\1.bias"),
    (r"^vision_encoder", "vision"), (r"patch_embed\.proj", "patch_embed"), (r"^text_encoder\.bert", "bert"),
    *BERT_NAMES]

State = dict[str, Tensor]


def from_clip(state: State, config: CLIPConfig) -> State:
    """open_clip's names, or those of transformers' CLIPModel, which also transposes the projections."""
    if any(key.startswith("vision_model.") for key in state):
        state = huggingface_text(rename(state, HUGGINGFACE_VISION))
        state = {key: w.T if key in ("visual.proj", "text_projection") else w for key, w in state.items()}
    return rename(needed(state), OPENCLIP)


def from_viclip(state: State, config: ViCLIPConfig) -> State:
    return rename(needed(state), OPENCLIP_BLOCKS)


def flat(state: State) -> State:
    """Without the prefix of data-parallel training (HPS), and Conv3d over single frames as Conv2d."""
    return {key.removeprefix("module."): w.squeeze(2) if w.ndim == 5 else w for key, w in state.items()}


def needed(state: State) -> State:
    """Without the temperature of the training loss, and without constants."""
    unused = ("logit_scale", "temp", "position_ids", "attn_mask")
    return {key: w for key, w in state.items() if not key.endswith(unused)}


def from_imagereward(state: State, config: ImageRewardConfig) -> State:
    return rename(state, IMAGEREWARD)


def from_internvideo2(state: State, config: InternVideo2Config) -> State:
    state, key = rename(state, INTERNVIDEO2), "vision.pos_embed"
    N = (config.vit.image_size // config.vit.patch) ** 2
    if key in state and state[key].shape[1:2] != (1 + config.frames * N,):
        state[key] = stretch(state[key], config.frames, N)
    return state


# ---- the table of rewards ----------------------------------------------------------------------------------
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # mean, std
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOY_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BERT_WORDS = 30522                                              # of the uncased models


def bpe(path: Path, length: int) -> Tokenizer:
    """CLIP's tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer  # here, for it takes seconds
    return SimpleTokenizer(context_length=length)


def wordpiece(path: Path, length: int, repository: str, **options) -> Tokenizer:
    """BERT's, from the `vocab.txt` beside the weights, else from `repository`."""
    vocabulary = path.parent / "vocab.txt"
    if not vocabulary.exists():
        try:
            vocabulary = download(repository, "vocab.txt")
        except ValueError as error:
            raise ValueError(f"there is no {vocabulary} beside the weights, and: {error}") from error
    tokenizer = WordPiece(vocabulary, length, **options)
    words = len(tokenizer.ids) - len(options.get("extra", ()))
    if words != BERT_WORDS:
        raise ValueError(f"{vocabulary} holds {words} words, not {BERT_WORDS}; "
                         f"take vocab.txt of {repository}")
    return tokenizer


def toy_clip(header: dict) -> CLIPConfig:
    """The toy's header is a configuration of open_clip."""
    vision, text = header["vision_cfg"], header["text_cfg"]
    return CLIPConfig(
        image_size=vision["image_size"], patch=vision["patch_size"], width=vision["width"],
        layers=vision["layers"], heads=vision["width"] // vision["head_width"], embed_dim=header["embed_dim"],
        text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"],
        context_length=text["context_length"], vocab_size=text["vocab_size"])


@dataclass(frozen=True)
class Recipe:
    """All that makes a reward."""
    kind: Literal["image", "video"]             # scores single frames, or a clip
    model: type[nn.Module]
    config: Callable[[dict], object]            # header of the file -> configuration of the model
    convert: Callable[[State, object], State]   # public names -> ours
    view: View                                  # fits clips to the model's input
    pixels: tuple                               # their mean and standard deviation
    text_length: int                            # L, tokens of a caption
    tokenizer: Callable[[Path, int], Tokenizer] | None = None   # (path of weights, L); None: given to `load`
    frames: tuple[int, ...] = ()                # T that a video reward can take, the usual one first
    source: tuple[str, ...] = ()                # public repository and file
    whole: bool = True                          # the model needs all tensors of the file


VIT_H_14 = dict(kind="image", model=CLIP, config=lambda header: CLIPConfig(), convert=from_clip,
                pixels=CLIP_PIXELS, text_length=77, tokenizer=bpe)
RECIPES = {
    "hpsv2": Recipe(
        **VIT_H_14, view=pad,
        source=("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
    "pickscore": Recipe(
        **VIT_H_14, view=squash,
        source=("yuvalkirstain/PickScore_v1", "model.safetensors")),
    "clip": Recipe(
        **VIT_H_14, view=squash,
        source=("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin")),
    "imagereward": Recipe(
        kind="image", model=ImageReward, config=lambda header: ImageRewardConfig(), convert=from_imagereward,
        view=centre, pixels=CLIP_PIXELS, text_length=35,
        tokenizer=partial(wordpiece, repository="google-bert/bert-base-uncased", extra=("[DEC]", "[ENC]")),
        source=("THUDM/ImageReward", "ImageReward.pt"), whole=False),
    "viclip": Recipe(
        kind="video", model=ViCLIP, config=lambda header: ViCLIPConfig(), convert=from_viclip,
        view=window, pixels=IMAGENET_PIXELS, text_length=32, tokenizer=bpe, frames=(8,),
        source=("OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth")),
    "internvideo2": Recipe(
        kind="video", model=InternVideo2, config=lambda header: InternVideo2Config(),
        convert=from_internvideo2, view=window, pixels=IMAGENET_PIXELS, text_length=40, frames=(8, 4),
        tokenizer=partial(wordpiece, repository="google-bert/bert-large-uncased", sep=False),
        source=("OpenGVLab/InternVideo2-Stage2_1B-224p-f4", "InternVideo2-stage2_1b-224p-f4.pt"),
        whole=False),
    "shapes-clip": Recipe(
        kind="image", model=CLIP, config=toy_clip, convert=from_clip,
        view=squash, pixels=TOY_PIXELS, text_length=24),
    "shapes-viclip": Recipe(
        kind="video", model=ViCLIP, config=lambda header: ViCLIPConfig(**header), convert=from_viclip,
        view=squash, pixels=TOY_PIXELS, text_length=24, frames=(4,)),
}
PUBLIC = [name for name, recipe in RECIPES.items() if recipe.source]


def recipe_of(name: str) -> Recipe:
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(PUBLIC)}"
        raise ValueError(f"no reward {name!r}; {remedy}")
    return RECIPES[name]


def check_frames(name: str, frames: int | None) -> None:
    """Raises ValueError unless the reward can take this number of frames; None is the usual one."""
    allowed = recipe_of(name).frames
    if frames is not None and frames not in allowed:
        raise ValueError(f"{name} takes {' or '.join(map(str, allowed)) or 'single'} frames, not {frames}")


# ---- loading -----------------------------------------------------------------------------------------------
def parse_spec(spec: str) -> tuple[str, str | None, float | None]:
    """What follows --reward: NAME, NAME=FILE, NAME:WEIGHT or NAME=FILE:WEIGHT -> (name, path, weight)."""
    name, equals, path = spec.partition("=")
    if equals:
        file, colon, tail = path.rpartition(":")
        if colon and is_number(tail):                       # else the colon belongs to the file's name
            path, weight = file, float(tail)
        else:
            weight = None
        if not path:
            raise ValueError(f"--reward {spec} names no file; without one, --reward {name} downloads it")
    else:
        name, colon, tail = spec.partition(":")
        if colon and not is_number(tail):
            raise ValueError(f"--reward {spec}: the weight {tail!r} is not a number; e.g. {name}:0.5")
        weight = float(tail) if colon else None

    recipe_of(name)
    if weight is not None and not math.isfinite(weight):
        raise ValueError(f"the weight {tail} of reward {name!r} is not a finite number")
    return name, path or None, weight


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load(name: str, path: str | Path | None = None, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None, tokenizer: Tokenizer | None = None, frames: int | None = None,
         grad_checkpointing: bool = False, config: object = None) -> Reward:
    """A `Reward`, frozen.

    path: a file, a folder, None = the public file. dtype: None = bfloat16 on CUDA, else float32. tokenizer:
    which the toy's rewards need. frames: 4 or 8 for internvideo2. config: for models of another size.
    """
    # what can be wrong without reading the weights
    recipe, device = recipe_of(name), torch.device(device)
    check_frames(name, frames)
    if not (tokenizer or recipe.tokenizer):
        raise ValueError(f"{name} reads the toy's captions; real clips take {', '.join(PUBLIC)}")
    path = find(recipe, path)
    tokenizer = tokenizer or recipe.tokenizer(path, recipe.text_length)

    # the model's configuration
    state, header = read_named(path), read_header(path) if path.suffix == ".safetensors" else {}
    try:
        config = config or recipe.config(header)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a file of {name}: its header says {header!s:.120} "
                         f"({error})") from error
    if frames:
        config = replace(config, frames=frames)

    # its weights: no time or memory is spent on an initialisation
    with without_memory():
        model = recipe.model(config)
    try:
        state = recipe.convert(flat(state), config)
    except (KeyError, RuntimeError, IndexError) as error:   # names or shapes that no such model has
        raise ValueError(f"{path}: not the weights of this {recipe.model.__name__}, or not all: "
                         f"{str(error).splitlines()[0]}") from error
    fill(model, state, path, device, allow_unused=not recipe.whole)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    reward = Reward(name, freeze(model, device, dtype), tokenizer)
    reward.checkpoint(grad_checkpointing)
    return reward


def untrained(name: str, device: str | torch.device, dtype: torch.dtype, frames: int | None = None) -> Reward:
    """A reward without its weights, to count time and memory: centre crop, and one caption for all."""
    recipe = recipe_of(name)
    check_frames(name, frames)
    config = recipe.config({})
    if frames:
        config = replace(config, frames=frames)
    ids = torch.ones(1, recipe.text_length, dtype=torch.long)
    model = freeze(recipe.model(config), device, dtype)
    reward = Reward(name, model, lambda captions: ids.expand(len(captions), -1))
    reward.view = lambda clips, S, generators: recipe.view(clips, S)
    return reward


def find(recipe: Recipe, path: str | Path | None) -> Path:
    """The weights file: `path`, what a folder `path` holds, or (no path) the public one."""
    if not path:
        if not recipe.source:
            raise ValueError("the toy's rewards need the path of their file")
        return download(*recipe.source)
    path = Path(path).expanduser()
    names = [*recipe.source[1:], "open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin"]
    found = next((path / name for name in names if (path / name).exists()), path)
    if not found.is_file():
        public = f"; it is {recipe.source[1]} of huggingface.co/{recipe.source[0]}" if recipe.source else ""
        raise ValueError(f"there is no file of weights at {path}{public}")
    return found


def freeze(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves the model; its parameters are never trained, and those of FLOAT32 layers keep their precision."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.data = p.data.to(device, torch.float32 if isinstance(module, FLOAT32) else dtype)
            p.requires_grad_(False)
    return model.eval()
