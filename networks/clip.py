"""CLIP's text tower (Radford et al., 2021), and the transformer blocks that it shares with the reward models.

model.py conditions the denoiser on its states before the last layer; rewards.py compares its embedding of a
caption with pictures and clips. B captions, L tokens, D width, E features.
"""
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class LayerNorm(nn.LayerNorm):
    """In float32, whatever the dtype of the tokens and of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """OpenAI CLIP's cheaper GELU; ViCLIP was trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **options) -> Tensor:
    """Multi-head attention of queries (B, L, D) to keys and values (B, M, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, heads, L, D/heads)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Tokens (B, L, D) attend to all tokens; if causal, to those before them."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads, is_causal=self.causal))


class TowerBlock(nn.Module):
    """The pre-norm transformer block of CLIP, ViCLIP and BLIP."""

    def __init__(self, width: int, heads: int, hidden: int, act: Callable[[], nn.Module] = nn.GELU,
                 norm: Callable[[int], nn.Module] = LayerNorm, causal: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, hidden), act=act(), fc2=nn.Linear(hidden, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BlockStack(nn.ModuleList):
    """Blocks in a row. With `grad_checkpointing` the backward pass computes each again; less is kept."""

    grad_checkpointing = False

    def forward(self, x: Tensor, *args) -> Tensor:
        run = recompute if self.grad_checkpointing and torch.is_grad_enabled() else nn.Module.__call__
        for block in self:
            x = run(block, x, *args)
        return x


class TextTower(nn.Module):
    """Token ids (B, L) -> states of all tokens (B, L, D), or the embedding of the caption (B, E).

    embed_dim: E; None: a tower for `penultimate` alone, without its last layer and the projection."""

    def __init__(self, width: int, layers: int, heads: int, context_length: int, vocab_size: int,
                 embed_dim: int | None = None, act: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.before_last, built = layers - 1, layers if embed_dim else layers - 1
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.blocks = BlockStack(TowerBlock(width, heads, 4 * width, act, causal=True) for _ in range(built))
        self.ln_final = LayerNorm(width)
        if embed_dim:
            projection = nn.init.normal_(torch.empty(width, embed_dim), std=width ** -0.5)
            self.text_projection = nn.Parameter(projection)

    def states(self, ids: Tensor, layers: int | None = None) -> Tensor:
        """After all layers, or the first few: (B, L, D)."""
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        return self.ln_final(self.blocks[:layers](x))

    def penultimate(self, ids: Tensor) -> Tensor:
        """Before the last layer: what latent diffusion conditions on."""
        return self.states(ids, self.before_last)

    def pooled(self, ids: Tensor) -> Tensor:
        """Projected, at the end token, which has the vocabulary's highest id: (B, E)."""
        states = self.states(ids)
        return states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)] @ self.text_projection


# ---- tokens ------------------------------------------------------------------------------------------------

@cache
def bpe(path: Path | None = None, length: int = 77):
    """CLIP's tokenizer, which needs no file: B captions -> token ids (B, length)."""
    from open_clip.tokenizer import SimpleTokenizer  # here, for it takes seconds, which the toy saves
    return SimpleTokenizer(context_length=length)


def say_cut(model: str, tokenizer: Callable, captions: list[str], length: int) -> bool:
    """Says that a caption is longer than the `length` tokens which a model reads -> was there one?"""
    if not hasattr(tokenizer, "encode"):                    # the toy's words, and none for motion
        return False
    marks = getattr(tokenizer, "marks", 2)                  # start and end
    longest = marks + max(len(tokenizer.encode(caption)) for caption in captions)
    if longest > length:
        print(f"{model} reads {length} tokens of a caption; longer ones are cut, like one of {longest}",
              file=sys.stderr)
    return longest > length
