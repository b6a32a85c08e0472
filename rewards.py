"""Reward models, R_img(x, c) and R_vid(x, c): how well does a clip x fit its caption c, and how good does it look?

    reward = load("hpsv2", "HPS_v2.1_compressed.pt", device="cuda")
    scores = reward(clips, captions)          # clips (B, T, 3, H, W) in [0, 1], B captions -> (B,), higher is better

The pixels carry gradient, so that a generator can climb it; the reward's parameters and the captions never do.
From top to bottom: fitting clips to a model's input; tokens of captions; what the transformers share; the models, each
with `text`, which sees the captions alone, and `score`; their files; and `Reward`, which puts the four together.

B clips, T frames, H W pixels, S side of the model's square input, N patches of a frame, L tokens, D width, E features.
"""
import math
import re
import sys
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.weights import huggingface_text, read_checkpoint, read_tensors, rename


# ------------------------------------------------------------------ clips: (B, T, 3, H, W) -> (B, T, 3, S, S), float32
def resize(clips, height, width):
    """Bicubic with antialiasing: what torchvision does to tensors."""
    if clips.shape[-2:] == (height, width):
        return clips
    frames = F.interpolate(clips.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return frames.unflatten(0, clips.shape[:2])


def squash(clips, S, generator=None):
    """The whole frame, its aspect ratio lost: PickScore, CLIPScore."""
    return resize(clips, S, S)


def pad(clips, S, generator=None):
    """The whole frame between black bars: HPS."""
    H, W = clips.shape[-2:]
    clips = resize(clips, *(max(1, round(n * S / max(H, W))) for n in (H, W)))
    h, w = (S - n for n in clips.shape[-2:])
    return F.pad(clips, (w // 2, w - w // 2, h // 2, h - h // 2))


def centre(clips, S, generator=None):
    """The middle square: ImageReward."""
    return crop(shorter_side(clips, S, int), S)


def window(clips, S, generator=None):
    """The middle square too, or where `generator` says: the video rewards were trained on random crops."""
    return crop(shorter_side(clips, S, round), S, generator)


def shorter_side(clips, S, to_int):
    """Resized so that the shorter side is S. How the longer one is rounded differs between models."""
    H, W = clips.shape[-2:]
    return resize(clips, *(to_int(n * S / min(H, W)) for n in (H, W)))


def crop(clips, S, generator=None):
    """An S x S window, the same for all frames of a clip, another for each clip."""
    spare = [n - S for n in clips.shape[-2:]]
    corners = [[round(n / 2) for n in spare]] * len(clips)
    if generator is not None:
        corners = [[int(torch.randint(n + 1, (), generator=generator)) for n in spare] for _ in clips]
    return torch.stack([clip[..., y:y + S, x:x + S] for clip, (y, x) in zip(clips, corners, strict=True)])


# ------------------------------------------------------------------ captions: B strings -> token ids (B, L)
class WordPiece:
    """BERT's uncased tokenizer. A word becomes its longest known prefix, then the longest known continuation (##...)
    and so on; one that cannot be finished is [UNK]. `extra` tokens follow the list; `sep`: a caption ends in [SEP]."""

    def __init__(self, vocab_file, length, extra=(), sep=True):
        words = Path(vocab_file).read_text(encoding="utf-8").rstrip("\n").split("\n")
        self.ids = {word: i for i, word in enumerate([*words, *extra])}
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if not set(special) <= set(self.ids):
            raise ValueError(f"{vocab_file} is not BERT's vocabulary: it lacks one of {' '.join(special)}")
        self.special = re.compile(f"({'|'.join(map(re.escape, [*special, *extra]))})")
        self.length, self.sep = length, sep

    def __call__(self, captions):
        ids = torch.full((len(captions), self.length), self.ids["[PAD]"])
        for row, caption in zip(ids, captions, strict=True):
            pieces = [self.ids[piece] for piece in self.pieces(caption)]
            line = [self.ids["[CLS]"], *pieces[:self.length - 1 - self.sep], *[self.ids["[SEP]"]] * self.sep]
            row[:len(line)] = torch.tensor(line)
        return ids

    def pieces(self, text):
        parts = self.special.split(text)                            # plain, special, plain, special, ..., plain
        for i, part in enumerate(parts):
            if i % 2:
                yield part
            else:
                for word in self.words(part):
                    yield from self.split(word)

    @staticmethod
    def words(text):
        """Lower case without accents; each punctuation mark and each Chinese character is a word of its own."""
        text = "".join(" " if c.isspace() else c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C")
        text = "".join(f" {c} " if is_chinese(c) else c for c in text.replace("\ufffd", ""))
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
        return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()

    def split(self, word):
        """A word -> its pieces, from its start; ["[UNK]"] if it has none."""
        pieces, rest = [], word if len(word) <= 100 else ""         # a longer word is unknown whatever it is
        while rest:
            prefix = "##" * bool(pieces)
            end = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in self.ids), 0)
            if not end:
                return ["[UNK]"]
            pieces.append(prefix + rest[:end])
            rest = rest[end:]
        return pieces or ["[UNK]"]


CJK = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)]


def is_chinese(c):
    return c >= "\u3400" and any(first <= ord(c) <= last for first, last in CJK)


def is_punctuation(c):
    """Unicode's, and the symbols of ASCII ($ + < = > ^ ` | ~)."""
    return unicodedata.category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())


# ------------------------------------------------------------------ parts that the transformers share
class LayerNorm(nn.LayerNorm):
    """In float32, whatever the dtype of the tokens; its parameters stay float32 too (see `freeze`)."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class LayerScale(nn.Module):
    """How much of a residual branch is let through, per channel."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (x.float() * self.gamma).to(x.dtype)


class Float32Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


FLOAT32 = (nn.LayerNorm, RMSNorm, LayerScale, Float32Linear)        # these keep float32 parameters in a bf16 model


class QuickGELU(nn.Module):
    """OpenAI CLIP's cheaper GELU; ViCLIP was trained with it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def attend(q, k, v, heads, **kwargs):
    """Multi-head attention of queries (B, L, D) to keys and values (B, M, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, heads, L, D / heads)
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention of tokens (B, L, D)."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads, is_causal=self.causal))


class Block(nn.Module):
    """The pre-norm transformer block of BLIP's and ViCLIP's towers."""

    def __init__(self, width, heads, hidden, act=nn.GELU, norm=LayerNorm, causal=False):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=act(), fc2=nn.Linear(hidden, width)))
        self.ls1 = self.ls2 = nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class InternVideo2Block(Block):
    """The same with RMSNorm, also of queries and keys (over all heads at once), without qkv bias, and with LayerScale.
    The tanh GELU is the one of the fused kernel that InternVideo2 was trained with."""

    def __init__(self, width, heads, hidden):
        super().__init__(width, heads, hidden, act=partial(nn.GELU, "tanh"), norm=partial(RMSNorm, eps=1e-6))
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_norm, self.attn.k_norm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)


class Blocks(nn.ModuleList):
    """A stack. With `grad_checkpointing` the backward pass recomputes each block instead of keeping its activations."""

    grad_checkpointing = False

    def forward(self, x, *args):
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, *args, use_reentrant=False) if recompute else block(x, *args)
        return x


def patches(conv, frames):
    """Frames (B, T, 3, S, S) -> tokens (B, T, N, D) of the patches that `conv` cuts and projects."""
    return conv(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])


def cosine(a, b):
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


# ------------------------------------------------------------------ CLIP: HPSv2.1, PickScore, CLIPScore, toy
class CLIP(open_clip.CLIP):
    """open_clip's, with its own configuration: {"embed_dim": E, "vision_cfg": {...}, "text_cfg": {...}}."""

    fields = ("embed_dim", "vision_cfg", "text_cfg")

    def __init__(self, config: dict):
        super().__init__(*(config[key] for key in self.fields), cast_dtype=torch.bfloat16)      # norms in float32
        self.image_size, self.frames = config["vision_cfg"]["image_size"], None

    def text(self, ids):
        L = self.context_length                                     # the mask is no weight: `load` left it on "meta"
        self.attn_mask = torch.full((L, L), -torch.inf, device=ids.device).triu(1)
        return self.encode_text(ids)

    def score(self, frames, text):
        images = self.encode_image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])     # (B, T, E)
        return cosine(images, text[:, None]).mean(dim=1)


# ------------------------------------------------------------------ ViCLIP: CLIP whose image tower reads a clip
@dataclass(frozen=True)
class ViCLIPConfig:
    """The defaults are ViCLIP-L."""
    image_size: int = 224
    patch: int = 14
    frames: int = 8
    width: int = 1024
    layers: int = 24
    heads: int = 16
    embed_dim: int = 768          # of the features that both towers end in
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    context_length: int = 32
    vocab_size: int = 49408
    tubelet: int = 1              # toy only: consecutive frames that a patch spans (ViViT, Arnab et al., 2021)


class VideoTower(nn.Module):
    """Joint space-time attention over one class token and the T * N patches of a clip."""

    def __init__(self, c: ViCLIPConfig):
        super().__init__()
        N = (c.image_size // c.patch) ** 2
        self.tubelet = c.tubelet
        self.conv1 = nn.Conv2d(3 * c.tubelet, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + N, c.width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, c.frames // c.tubelet, c.width))
        self.ln_pre, self.ln_post = LayerNorm(c.width), LayerNorm(c.width)
        self.blocks = Blocks(Block(c.width, c.heads, 4 * c.width, QuickGELU) for _ in range(c.layers))
        self.proj = nn.Parameter(torch.zeros(c.width, c.embed_dim))

    def forward(self, frames):
        frames = frames.unflatten(1, (-1, self.tubelet)).flatten(2, 3)              # (B, T, 3, S, S), with tubelets (B, T/n, 3n, S, S)
        x = patches(self.conv1, frames) + self.positional_embedding[1:]
        x = (x + self.temporal_positional_embedding[:, :, None]).flatten(1, 2)      # (B, T*N, D)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.blocks(self.ln_pre(torch.cat([first, x], dim=1)))
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(nn.Module):
    """CLIP's text encoder: causal, read at the end-of-text token, which has the highest id of the vocabulary."""

    def __init__(self, c: ViCLIPConfig):
        super().__init__()
        D = c.text_width
        self.token_embedding = nn.Embedding(c.vocab_size, D)
        self.positional_embedding = nn.Parameter(torch.zeros(c.context_length, D))
        self.blocks = Blocks(Block(D, c.text_heads, 4 * D, QuickGELU, causal=True) for _ in range(c.text_layers))
        self.ln_final = LayerNorm(D)
        self.text_projection = nn.Parameter(torch.zeros(D, c.embed_dim))

    def states(self, ids):
        """Token ids (B, L) -> what the tower makes of each token (B, L, D)."""
        return self.ln_final(self.blocks(self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]))

    def forward(self, ids):
        return self.whole(ids, self.states(ids))

    def whole(self, ids, states):
        """-> the embedding of the caption (B, E)."""
        return states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)] @ self.text_projection


class ViCLIP(nn.Module):
    """Video-text contrast (InternVid): a CLIP whose vision tower sees the patches of all frames at once."""

    def __init__(self, config: ViCLIPConfig):
        super().__init__()
        self.config, self.image_size, self.frames = config, config.image_size, config.frames
        self.vision_encoder, self.text_encoder = VideoTower(config), TextTower(config)
        self.init()

    @torch.no_grad()
    def init(self):
        """For training from scratch: linear maps keep the variance, the residual branches start small."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "embedding" in name:
                p.normal_(std=0.02)
            elif p.ndim > 1:                                        # the rest are norms, ones already
                residual = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
                p.normal_(std=p[0].numel() ** -0.5 * (0.2 if residual else 1.0))

    def encode_video(self, frames):
        """Normalised frames (B, T, 3, S, S) -> features (B, E), not of unit length."""
        assert frames.shape[1:3] == (self.frames, 3), f"frames {tuple(frames.shape)} for {self.config}"
        return self.vision_encoder(frames)

    def encode_text(self, ids):
        """Token ids (B, L), L <= context_length -> features (B, E), not of unit length."""
        return self.text_encoder(ids)

    text = encode_text

    def score(self, frames, text):
        return cosine(self.encode_video(frames), text)


# ------------------------------------------------------------------ BERT, BLIP's ViT and ImageReward
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

    def __init__(self, c: ViTConfig, block, frames=1):
        super().__init__()
        N = (c.image_size // c.patch) ** 2
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * N, c.width))
        self.blocks = Blocks(block(c.width, c.heads, c.hidden) for _ in range(c.layers))

    def forward(self, frames):
        x = patches(self.patch_embed, frames).flatten(1, 2)         # (B, T*N, D)
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed)


class BERTAttention(nn.Module):
    """Attention to itself or to an image, with the residual and BERT's norm behind it."""

    def __init__(self, c: BERTConfig, source_width):
        super().__init__()
        self.heads = c.heads
        self.query, self.dense = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
        self.key, self.value = nn.Linear(source_width, c.width), nn.Linear(source_width, c.width)
        self.norm = LayerNorm(c.width, eps=1e-12)

    def forward(self, x, source, mask=None):
        y = attend(self.query(x), self.key(source), self.value(source), self.heads, attn_mask=mask)
        return self.norm(x + self.dense(y))


class BERTLayer(nn.Module):
    """Self-attention, cross-attention to the picture or clip where the layer has it, feed-forward; normalised after each."""

    def __init__(self, c: BERTConfig):
        super().__init__()
        self.attention = BERTAttention(c, c.width)
        if c.image_width:
            self.crossattention = BERTAttention(c, c.image_width)
        self.intermediate, self.output = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)
        self.norm = LayerNorm(c.width, eps=1e-12)

    def forward(self, x, mask, image=None):
        x = self.attention(x, x, mask)
        if image is not None:
            x = self.crossattention(x, image)
        return self.norm(x + self.output(F.gelu(self.intermediate(x))))


class BERT(nn.Module):
    """Token ids (B, L), 0 = padding, and perhaps image tokens (B, M, image_width) -> the state at [CLS] (B, D)."""

    def __init__(self, c: BERTConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.width)
        self.position_embeddings = nn.Embedding(512, c.width)
        self.token_type_embeddings = nn.Embedding(c.token_types, c.width) if c.token_types else None
        self.norm = LayerNorm(c.width, eps=1e-12)
        self.layers = Blocks(BERTLayer(c) for _ in range(c.layers))

    def forward(self, ids, image=None):
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.shape[1]]
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings.weight[0]
        mask = (ids != 0)[:, None, None]                            # (B, 1, 1, L): no one looks at padding
        return self.layers(self.norm(x), mask, image)[:, 0]


@dataclass(frozen=True)
class ImageRewardConfig:
    vit: ViTConfig = ViTConfig(image_size=224, patch=16, width=1024, layers=24, heads=16, hidden=4096)
    bert: BERTConfig = BERTConfig(vocab_size=30524, width=768, layers=12, heads=12, hidden=3072, image_width=1024)


class ImageReward(nn.Module):
    """BLIP reads the caption with an eye on the image; five linear layers turn what it makes of it into a score."""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        self.image_size, self.frames = config.vit.image_size, None
        norm = partial(LayerNorm, eps=1e-6)
        self.vision, self.norm = ViT(config.vit, partial(Block, norm=norm)), norm(config.vit.width)
        self.bert = BERT(config.bert)
        sizes = [config.bert.width, 1024, 128, 64, 16, 1]           # nothing between them: dropout was all there was
        self.mlp = nn.Sequential(*(Float32Linear(a, b) for a, b in pairwise(sizes)))

    def text(self, ids):
        return ids                                                  # without an image there is nothing to compute

    def score(self, frames, ids):
        """Mean 0 and variance 1 over the images it was trained on. Capped at 2, as T2V-Turbo (and ReFL) does: a frame
        that good has no more gradient."""
        B, T = frames.shape[:2]
        image = self.norm(self.vision(frames.flatten(0, 1)[:, None]))           # (B*T, 1+N, D)
        state = self.bert(ids.repeat_interleave(T, dim=0), image)               # caption b with each of its T frames
        score = (self.mlp(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
        return score.clamp(max=2).view(B, T).mean(dim=1)


# ------------------------------------------------------------------ InternVideo2, stage 2
class AttentionPool(nn.Module):
    """All tokens into one: the mean token asks, all answer."""

    def __init__(self, width, heads, out):
        super().__init__()
        self.heads = heads
        self.norm1_q, self.norm1_k, self.norm1_v = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, out)

    def forward(self, x):
        q = self.q(self.norm1_q(x.mean(dim=1, keepdim=True)))
        return self.proj(attend(q, self.k(self.norm1_k(x)), self.v(self.norm1_v(x)), self.heads))[:, 0]


@dataclass(frozen=True)
class InternVideo2Config:
    vit: ViTConfig = ViTConfig(image_size=224, patch=14, width=1408, layers=40, heads=16, hidden=6144)
    bert: BERTConfig = BERTConfig(vocab_size=30522, width=1024, layers=19, heads=16, hidden=4096, token_types=2)
    pool_dim: int = 768
    embed_dim: int = 512
    frames: int = 8               # or 4, which it was trained with; `stretch` fits the position table


class InternVideo2(nn.Module):
    """A video transformer of 1 B parameters against the first 19 layers of BERT-large (the others look at frames)."""

    def __init__(self, c: InternVideo2Config):
        super().__init__()
        self.image_size, self.frames = c.vit.image_size, c.frames
        self.vision = ViT(c.vit, InternVideo2Block, c.frames)
        self.pool = AttentionPool(c.vit.width, c.vit.heads, c.pool_dim)
        self.bert = BERT(c.bert)
        self.vision_proj = nn.Linear(c.pool_dim, c.embed_dim)
        self.text_proj = nn.Linear(c.bert.width, c.embed_dim)

    def text(self, ids):
        return self.text_proj(self.bert(ids))

    def score(self, frames, text):
        return cosine(self.vision_proj(self.pool(self.vision(frames))), text)


def stretch(table, frames, N):
    """A position table (1, 1 + T*N, D), the class token first, interpolated linearly in time to another T."""
    grid = table[:, 1:].unflatten(1, (-1, N)).permute(0, 2, 3, 1).flatten(1, 2)              # (1, N*D, T)
    grid = F.interpolate(grid.float(), size=frames, mode="linear").unflatten(1, (N, -1))     # (1, N, D, frames)
    return torch.cat([table[:, :1], grid.permute(0, 3, 1, 2).flatten(1, 2)], dim=1)


# ------------------------------------------------------------------ files: public names -> ours, strictly
HUGGINGFACE_VISION = [
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"), (r"^vision_model\.embeddings\.", "visual."),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"), (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^(visual)_projection\.weight", r"\1.proj"), (r"^(text_projection)\.weight", r"\1")]
VICLIP = [
    (r"transformer\.resblocks", "blocks"), (r"\.ln_(\d)", r".norm\1"), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj", ".attn.proj"), (r"\.mlp\.c_fc", ".mlp.fc1"), (r"\.mlp\.c_proj", ".mlp.fc2")]
BERT_NAMES = [
    (r"^bert\.(embeddings|encoder)\.", "bert."), (r"\.layer\.", ".layers."),
    (r"attention\.(self|output)\.", "attention."), (r"\.(intermediate|output)\.dense", r".\1"),
    (r"(\.output)?\.LayerNorm", ".norm")]
IMAGEREWARD = [
    (r"^blip\.visual_encoder\.norm", "norm"), (r"^blip\.visual_encoder", "vision"), (r"^blip\.text_encoder", "bert"),
    (r"patch_embed\.proj", "patch_embed"), (r"^mlp\.layers\.([02467])\b", lambda m: f"mlp.{'02467'.index(m[1])}"),
    *BERT_NAMES]
INTERNVIDEO2 = [
    (r"^vision_encoder\.clip_projector\.(cross_attn\.)?", "pool."), (r"^pool\.([qkv])_bias", r"pool.\1.bias"),
    (r"^vision_encoder", "vision"), (r"patch_embed\.proj", "patch_embed"), (r"^text_encoder\.bert", "bert"),
    *BERT_NAMES]


def from_clip(weights, config):
    """open_clip's names, or those of transformers' CLIPModel, which also transposes the projections."""
    if not any(key.startswith("vision_model.") for key in weights):
        return weights
    weights = huggingface_text(rename(weights, HUGGINGFACE_VISION))
    return {key: w.T if key in ("visual.proj", "text_projection") else w for key, w in weights.items()}


def from_internvideo2(weights, config):
    weights, key = rename(weights, INTERNVIDEO2), "vision.pos_embed"
    N = (config.vit.image_size // config.vit.patch) ** 2
    if key in weights and weights[key].shape[1] != 1 + config.frames * N:
        weights[key] = stretch(weights[key], config.frames, N)
    return weights


def read(path):
    """A weights file, out of whatever it is wrapped in -> ({public name: tensor}, configuration in the header)."""
    if path.suffix == ".safetensors":
        return read_checkpoint(path)
    content = read_tensors(path)
    for wrapper in ("module", "model"):                             # InternVideo2, ViCLIP
        content = content[wrapper] if isinstance(content, dict) and wrapper in content else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors; is it a reward model?")
    content = {key.removeprefix("module."): w for key, w in content.items() if isinstance(w, torch.Tensor)}     # HPS
    return {key: w.squeeze(2) if w.ndim == 5 else w for key, w in content.items()}, {}      # Conv3d over single frames


def build(model_class, config, weights, path):
    """A model that never spends time or memory on an initialisation: made of shapes, then given the file's tensors."""
    with torch.device("meta"):
        model = model_class(config)
    wanted = model.state_dict()
    bad = [f"{key} is missing" for key in wanted if key not in weights]
    bad += [f"{key} is {tuple(weights[key].shape)} instead of {tuple(p.shape)}"
            for key, p in wanted.items() if key in weights and weights[key].shape != p.shape]
    if bad:
        raise ValueError(f"{path} is no {model_class.__name__}: {bad[0]} ({len(bad)} of {len(wanted)} tensors)")
    unused = sorted({".".join(key.split(".")[:2]) for key in weights if key not in wanted})
    if unused:
        print(f"{path}: {len(weights) - len(wanted)} tensors not needed: {', '.join(unused)}", file=sys.stderr)
    model.load_state_dict({key: weights[key] for key in wanted}, assign=True)
    return model


def freeze(model, device, dtype):
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.data = p.data.to(device, torch.float32 if isinstance(module, FLOAT32) else dtype)
            p.requires_grad_(False)
    return model.eval()


def download(repository, file):
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:
        raise ValueError(f"{file} of huggingface.co/{repository} cannot be fetched; name a local file") from error


# ------------------------------------------------------------------ rewards by name
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # mean, standard deviation
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOY_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """How a reward's file becomes its model."""
    model: type
    config: Callable                                                # configuration in the file's header -> of the model
    view: Callable                                                  # fits clips to the model's input
    pixels: tuple                                                   # their mean and standard deviation
    source: tuple = ()                                              # public repository and file
    convert: Callable = lambda weights, config: weights             # public names -> ours
    tokenizer: Callable | None = None                               # path of the weights -> tokenizer


def bpe(length):
    return lambda path: SimpleTokenizer(context_length=length)


def wordpiece(repository, **options):
    """`vocab.txt` beside the weights, else from `repository`."""
    def make(path):
        beside = path.parent / "vocab.txt"
        return WordPiece(beside if beside.exists() else download(repository, "vocab.txt"), **options)
    return make


def vit_h_14(view, *source):
    def config(header):
        return open_clip.get_model_config("ViT-H-14")
    return Recipe(CLIP, config, view, CLIP_PIXELS, source, from_clip, bpe(77))


RECIPES = {
    "hpsv2": vit_h_14(pad, "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "pickscore": vit_h_14(squash, "yuvalkirstain/PickScore_v1", "model.safetensors"),
    "clip": vit_h_14(squash, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin"),
    "imagereward": Recipe(
        ImageReward, lambda header: ImageRewardConfig(), centre, CLIP_PIXELS, ("THUDM/ImageReward", "ImageReward.pt"),
        lambda weights, config: rename(weights, IMAGEREWARD),
        wordpiece("google-bert/bert-base-uncased", length=35, extra=("[DEC]", "[ENC]"))),
    "viclip": Recipe(
        ViCLIP, lambda header: ViCLIPConfig(), window, IMAGENET_PIXELS,
        ("OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth"), lambda weights, config: rename(weights, VICLIP), bpe(32)),
    "internvideo2": Recipe(
        InternVideo2, lambda header: InternVideo2Config(), window, IMAGENET_PIXELS,
        ("OpenGVLab/InternVideo2-Stage2_1B-224p-f4", "InternVideo2-stage2_1b-224p-f4.pt"),
        from_internvideo2, wordpiece("google-bert/bert-large-uncased", length=40, sep=False)),
    "shapes-clip": Recipe(CLIP, lambda header: {key: header[key] for key in CLIP.fields}, squash, TOY_PIXELS),
    "shapes-viclip": Recipe(ViCLIP, lambda header: ViCLIPConfig(**header), squash, TOY_PIXELS)}


def known(name):
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        raise ValueError(f"no reward {name!r}" + (f", did you mean {near[0]}?" if near else f": {', '.join(RECIPES)}"))
    return name


def parse_spec(spec):
    """What follows --reward: "name", "name=FILE", "name:weight", "name=FILE:weight" -> (name, path, weight)."""
    head, _, tail = spec.rpartition(":")
    try:
        spec, weight = (head, float(tail)) if head else (spec, None)
    except ValueError:                                              # the colon belongs to the file's name
        weight = None
    if weight is not None and not math.isfinite(weight):
        raise ValueError(f"the weight {tail} of reward {spec!r} is not a finite number")
    name, _, path = spec.partition("=")
    return known(name), path or None, weight


def find(recipe, path):
    """The weights file: `path`, what a folder `path` holds, or (no path) the public one."""
    if not path:
        if not recipe.source:
            raise ValueError("the toy's rewards need the path of their file")
        return download(*recipe.source)
    path = Path(path).expanduser()
    names = [*recipe.source[1:], "open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin"]
    found = next((path / name for name in names if (path / name).exists()), path)
    if not found.is_file():
        known_as = f"; it is {recipe.source[1]} of huggingface.co/{recipe.source[0]}" if recipe.source else ""
        raise ValueError(f"there is no file of weights at {path}{known_as}")
    return found


def load(name, path=None, device="cpu", dtype=None, tokenizer=None, frames=None, generator=None,
         grad_checkpointing=False, config=None):
    """A `Reward`. path: a file, a folder, None = the public file. dtype: None = bfloat16 on CUDA, else float32.
    tokenizer: captions -> ids (B, L), which the toy's rewards need. frames: 4 or 8 for internvideo2. generator: a CPU
    generator that draws the crop windows of the video rewards, None = centre. config: for models of another size."""
    recipe = RECIPES[known(name)]
    path, device = find(recipe, path), torch.device(device)
    weights, header = read(path)
    try:
        config = config or recipe.config(header)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of {name}: its header says {header}") from error
    if frames and recipe.model is InternVideo2:
        config = replace(config, frames=frames)
    model = build(recipe.model, config, recipe.convert(weights, config), path)
    if frames and frames != (model.frames or frames):
        raise ValueError(f"{name} takes {model.frames} frames, not {frames}")
    if not (tokenizer or recipe.tokenizer):
        raise ValueError(f"{name} needs the toy's tokenizer")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    reward = Reward(name, freeze(model, device, dtype), tokenizer or recipe.tokenizer(path), generator)
    reward.checkpoint(grad_checkpointing)
    return reward


class Reward:
    """reward(clips, captions): clips (B, T, 3, H, W) in [0, 1], any H and W, and B captions -> (B,) float32.

    An image reward scores each frame with its clip's caption and averages over T; a video reward takes T = `frames`."""

    def __init__(self, name, model, tokenizer, generator=None):
        self.name, self.model, self.tokenizer, self.generator = name, model, tokenizer, generator
        self.frames, self.kind = model.frames, "video" if model.frames else "image"
        weight = next(p for p in model.parameters() if p.ndim == 4)                 # of the patches' convolution
        self.device, self.dtype = weight.device, weight.dtype
        self.mean, self.std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in RECIPES[name].pixels)
        self.cache = {}                                             # caption -> what model.text made of it

    def __call__(self, clips, captions):
        self.check(clips, captions)
        with torch.autocast(self.device.type, enabled=False):       # also where the caller trains in bf16
            frames = RECIPES[self.name].view(clips.to(self.device).float(), self.model.image_size, self.generator)
            frames = (frames - self.mean) / self.std
            return self.model.score(frames.to(self.dtype), self.text(captions))

    @torch.no_grad()
    def text(self, captions):
        if len(self.cache) > 10_000:
            self.cache.clear()
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.cache]
        if new:
            self.cache.update(zip(new, self.model.text(self.tokenizer(new).to(self.device)), strict=True))
        return torch.stack([self.cache[caption] for caption in captions])

    def checkpoint(self, on=True):
        """Gradient checkpointing: about a third more time, and the memory of one block instead of all."""
        for module in self.model.modules():
            if hasattr(module, "grad_checkpointing"):               # ours and open_clip's
                module.grad_checkpointing = on

    def check(self, clips, captions):
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise ValueError(f"{self.name} takes clips (B, T, 3, H, W), not {tuple(clips.shape)}")
        if isinstance(captions, str) or len(captions) != len(clips):
            raise ValueError(f"{self.name} takes one caption per clip: {len(clips)} clips, captions {captions!r:.60}")
        if self.frames and clips.shape[1] != self.frames:
            raise ValueError(f"{self.name} takes {self.frames} frames, not {clips.shape[1]}; pick some, evenly spaced")
