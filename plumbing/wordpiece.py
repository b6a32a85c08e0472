"""BERT's uncased tokenizer, which ImageReward and InternVideo2 read captions with."""
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CJK = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
       (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)]


class WordPiece:
    """B captions -> token ids (B, length), padded with [PAD].

    A word becomes its longest known prefix, then the longest known continuation (##...) and so on; one that
    cannot be finished is [UNK]. extra: tokens that follow the file's. sep: captions end in [SEP].
    """

    def __init__(self, vocab_file: str | Path, length: int, extra: tuple[str, ...] = (), sep: bool = True):
        try:
            words = Path(vocab_file).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{vocab_file} cannot be read as a vocabulary: {error}") from error
        self.ids = {word: i for i, word in enumerate([*words, *extra])}
        missing = [word for word in SPECIAL if word not in self.ids]
        if missing:
            raise ValueError(f"{vocab_file} is not BERT's vocabulary: it lacks {' '.join(missing)}")
        self.special = re.compile(f"({'|'.join(map(re.escape, [*SPECIAL, *extra]))})")
        self.length, self.sep = length, sep

    def __call__(self, captions: list[str]) -> Tensor:
        ids = torch.full((len(captions), self.length), self.ids["[PAD]"])
        for row, caption in zip(ids, captions, strict=True):
            room = self.length - 1 - self.sep
            pieces = [self.ids[piece] for piece in self.pieces(caption)][:room]
            line = [self.ids["[CLS]"], *pieces, *[self.ids["[SEP]"]] * self.sep]
            row[:len(line)] = torch.tensor(line)
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """Special tokens in the text remain whole; all else is split into words, and those into pieces."""
        parts = self.special.split(text)                # plain, special, plain, special, ..., plain
        for i, part in enumerate(parts):
            if i % 2:
                yield part
            else:
                for word in self.words(part):
                    yield from self.split(word)

    @staticmethod
    def words(text: str) -> list[str]:
        """Lower case without accents; each punctuation mark and each Chinese character is a word."""
        # control characters disappear, every kind of space becomes " "
        text = "".join(char for char in text if char in "\t\n\r" or unicodedata.category(char)[0] != "C")
        text = "".join(" " if char.isspace() else char for char in text.replace("\ufffd", ""))

        # accents are marks (Mn) of their own in the decomposed form
        text = "".join(f" {char} " if is_chinese(char) else char for char in text)
        text = unicodedata.normalize("NFD", text)
        text = "".join(char for char in text if unicodedata.category(char) != "Mn")

        return "".join(f" {char} " if is_punctuation(char) else char for char in text.lower()).split()

    def split(self, word: str) -> list[str]:
        """A word -> its pieces, from its start; ["[UNK]"] if it has none."""
        pieces, rest = [], word if len(word) <= 100 else ""         # a longer word is unknown whatever it is
        while rest:
            prefix = "##" if pieces else ""
            end = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in self.ids), 0)
            if not end:
                return ["[UNK]"]
            pieces.append(prefix + rest[:end])
            rest = rest[end:]
        return pieces or ["[UNK]"]


def is_chinese(char: str) -> bool:
    return char >= "\u3400" and any(first <= ord(char) <= last for first, last in CJK)


def is_punctuation(char: str) -> bool:
    """Unicode's, and the symbols of ASCII ($ + < = > ^ ` | ~)."""
    return unicodedata.category(char)[0] == "P" or ("!" <= char <= "~" and not char.isalnum())
