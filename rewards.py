"""Reward models, R_img(x, c) and R_vid(x, c): how well does a clip x fit its caption c, and how good does it look?

    reward = load("hpsv2", "HPS_v2.1_compressed.pt")
    scores = reward(clips, captions)                   # clips (B, T, 3, H, W) in [0, 1] -> (B,), higher is better

The pixels carry gradient, the parameters never do. B clips, T frames, H W pixels, N patches of a frame, L tokens, D width, E features.
"""
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------ parts that the transformers share
class LayerNorm(nn.LayerNorm):
    """In float32, whatever the dtype of the tokens: its parameters stay float32 too (`to_dtype`)."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """OpenAI CLIP's cheaper GELU; ViCLIP was trained with it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention over tokens (B, L, D)."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, hidden, act=nn.GELU, eps=1e-5, causal=False):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps), LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, hidden), act(), nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Blocks(nn.ModuleList):
    """A stack of blocks. With `remat` the backward pass recomputes each block instead of keeping its activations."""

    remat = False

    def forward(self, x, *args):
        for block in self:
            recompute = self.remat and torch.is_grad_enabled()
            x = checkpoint(block, x, *args, use_reentrant=False) if recompute else block(x, *args)
        return x


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)             # (B, L, D) -> (B, heads, L, D / heads)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                             # and back


def patches(conv, frames):
    """Frames (B, T, 3, H, W) -> tokens (B, T, N, D) of the patches that `conv` cuts and projects."""
    B, T = frames.shape[:2]
    return conv(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (B, T))


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


class VideoTower(nn.Module):
    """Joint space-time attention over one class token and the T * N patches of a clip."""

    def __init__(self, c: ViCLIPConfig):
        super().__init__()
        N = (c.image_size // c.patch) ** 2
        self.conv1 = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + N, c.width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, c.frames, c.width))
        self.ln_pre, self.ln_post = LayerNorm(c.width), LayerNorm(c.width)
        self.blocks = Blocks(Block(c.width, c.heads, 4 * c.width, QuickGELU) for _ in range(c.layers))
        self.proj = nn.Parameter(torch.zeros(c.width, c.embed_dim))

    def forward(self, frames):
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

    def forward(self, ids):
        x = self.blocks(self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]])
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection


class ViCLIP(nn.Module):
    def __init__(self, config: ViCLIPConfig = ViCLIPConfig()):
        super().__init__()
        self.config = config
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
        """Normalised frames (B, T, 3, H, W) -> features (B, E), not of unit length."""
        T, size = self.config.frames, self.config.image_size
        assert frames.shape[1:] == (T, 3, size, size), f"frames {tuple(frames.shape)} for {self.config}"
        return self.vision_encoder(frames)

    def encode_text(self, ids):
        """Token ids (B, L), L <= context_length -> features (B, E), not of unit length."""
        return self.text_encoder(ids)

    def save(self, path):
        save_file(self.state_dict(), path, metadata={"config": json.dumps(asdict(self.config))})

    @classmethod
    def from_file(cls, path, device="cpu"):
        """A file of `save`: the configuration stands in its header."""
        with safe_open(path, "pt", device=str(device)) as file:
            config = ViCLIPConfig(**json.loads(file.metadata()["config"]))
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)
        return model
