"""BERT (Devlin et al., 2019), tokenizer and network: ImageReward and InternVideo2 read captions with it."""
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.clip import BlockStack, LayerNorm, attend
from plumbing.errors import reading

# ---- tokenizer ---------------------------------------------------------------------------------------------

SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
CJK = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
       (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)]


class WordPiece:
    """B captions -> token ids (B, length), padded with [PAD].

    A word becomes its longest known prefix, then the longest known continuation (##...) and so on; one that
    cannot be finished is [UNK]. sep: captions end in [SEP]."""

    def __init__(self, vocab_file: str | Path, length: int, sep: bool = True):
        with reading(vocab_file, "BERT's vocabulary"):
            words = Path(vocab_file).read_text(encoding="utf-8").rstrip("\n").split("\n")
            self.ids = {word: i for i, word in enumerate(words)}
            self.pad, self.unknown, self.start, self.end = (self.ids[word] for word in SPECIAL)
        self.length, self.marks = length, 1 + sep                   # marks: tokens at start and end

    def __call__(self, captions: list[str]) -> Tensor:
        ids = torch.full((len(captions), self.length), self.pad)
        for row, caption in zip(ids, captions, strict=True):
            pieces = self.encode(caption)[:self.length - self.marks]
            line = [self.start, *pieces, *[self.end] * (self.marks - 1)]
            row[:len(line)] = torch.tensor(line)
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text's pieces."""
        return [piece for word in words_of(text) for piece in self.split(word)]

    def split(self, word: str) -> list[int]:
        """A word -> its pieces, from its start; [UNK] if it has none, or more than 100 letters."""
        pieces, rest = [], word
        while rest:
            prefix = "##" if pieces else ""
            end = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in self.ids), 0)
            if not end or len(word) > 100:
                return [self.unknown]
            pieces.append(self.ids[prefix + rest[:end]])
            rest = rest[end:]
        return pieces


def words_of(text: str) -> list[str]:
    """Lower case without accents and control characters; what `stands_alone` is a word."""
    visible = (char for char in text if char in "\t\n\r" or unicodedata.category(char)[0] != "C")
    text = unicodedata.normalize("NFD", "".join(visible).replace("\ufffd", ""))     # accents apart, as Mn
    text = "".join(char for char in text if unicodedata.category(char) != "Mn")
    return "".join(f" {char} " if stands_alone(char) else char for char in text.lower()).split()


def stands_alone(char: str) -> bool:
    """Punctuation, as Unicode has it and the symbols of ASCII ($ + < = > ^ ` | ~), and Chinese characters."""
    symbol = "!" <= char <= "~" and not char.isalnum()
    return symbol or unicodedata.category(char)[0] == "P" or any(a <= ord(char) <= b for a, b in CJK)


# ---- network -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BERTConfig:
    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    token_types: int = 0          # 0: the model has no token types; else all tokens are of type 0
    image_width: int = 0          # of the image tokens that every layer attends to; 0: text only


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
