"""Tokenizes texts piece by piece, where that gives the tokens of the whole, and remembers the pieces.

A byte-level BPE tokenizer splits a text by a regular expression and merges within each part alone. For the expressions
of `_PATTERNS` no part goes on with a blank or a mark after a letter or digit, or with a space after anything but
blanks. So a text may be cut at all these places, and each piece tokenized by itself. Most pieces are words that have
been seen before, and a tokenizer, which goes through its text several times over, has little left to do.
"""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
_PATTERNS = frozenset({_GPT2, _QWEN, _LLAMA3})

# The left is no blank to anybody: what one is differs between the engines of regular expressions, as does what a letter
# is beyond ASCII.
_CUT = re.compile(r"(?<=[\w!-~])(?= )|(?<=[A-Za-z0-9])(?=[\n!-/:-@\[-`{-~])")

_LONGEST_WORD = 32  # characters; longer pieces hardly come twice
_MOST_WORDS = 100_000  # some 25 MB


class Encoded(NamedTuple):
    """`tokens`: int32 [length]; `offsets`: int32 [length, 2], the characters [start, end) of each."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int32]


class WordCache:
    """Tokenizes texts with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        self._backend = tokenizer.backend_tokenizer
        self.can_cut = _can_cut(description)
        """Whether pieces of a text have the tokens of the whole."""
        added = sorted((token["content"] for token in description["added_tokens"]), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)).join("()") if added else "(?!)")
        self._words: dict[str, tuple[bytes, bytes]] = {}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens that the tokenizer has for each whole text, without special tokens around it."""
        pieces_of = [self._pieces(text) for text in texts]
        words = self._words
        unknown = list({piece for pieces in pieces_of for piece in pieces if piece not in words})
        found = dict(zip(unknown, self._tokenize(unknown), strict=True))
        encoded = [_join(pieces, [words.get(piece) or found[piece] for piece in pieces]) for pieces in pieces_of]
        if len(words) > _MOST_WORDS:
            words.clear()
        words.update((word, value) for word, value in found.items() if len(word) <= _LONGEST_WORD)
        return encoded

    def encode_cut(self, text: str, places: Sequence[int]) -> Encoded:
        """The tokens of one text, none of which lies across one of `places`, in order."""
        borders = [0, *places, len(text)]
        parts = [text[start:end] for start, end in pairwise(borders)]
        encoded = self.encode(parts)
        return Encoded(
            np.concatenate([part.tokens for part in encoded]),
            np.concatenate([part.offsets + start for part, start in zip(encoded, borders, strict=False)]),
        )

    def _pieces(self, text: str) -> list[str]:
        if not self.can_cut:
            return [text]
        parts = self._added.split(text)  # what lies between added tokens, and every other one such a token
        return [piece for i, part in enumerate(parts) for piece in ([part] if i % 2 else _CUT.split(part)) if piece]

    def _tokenize(self, texts: list[str]) -> list[tuple[bytes, bytes]]:
        """Tokens and offsets of each text, int32 as `Encoded` has them."""
        self._backend.no_truncation()  # what is too long is the dataset's decision
        self._backend.no_padding()
        encoded = self._backend.encode_batch(texts, add_special_tokens=False)  # the template has written them
        return [(np.array(e.ids, np.int32).tobytes(), np.array(e.offsets, np.int32).tobytes()) for e in encoded]


def _join(pieces: Sequence[str], values: Sequence[tuple[bytes, bytes]]) -> Encoded:
    tokens = np.frombuffer(b"".join(tokens for tokens, _ in values), dtype=np.int32)
    offsets = np.frombuffer(b"".join(offsets for _, offsets in values), dtype=np.int32).reshape(-1, 2)
    starts = np.cumsum([0, *map(len, pieces)], dtype=np.int32)[:-1]
    counts = [len(tokens) // np.dtype(np.int32).itemsize for tokens, _ in values]
    return Encoded(tokens, offsets + np.repeat(starts, counts)[:, None])


def _can_cut(tokenizer: dict[str, Any]) -> bool:
    """Whether pieces have the tokens of the whole; `tokenizer` is a tokenizer.json."""
    model, normalizer = tokenizer["model"], tokenizer["normalizer"] or {"type": "NFC"}
    if model["type"] != "BPE" or model["dropout"] or normalizer["type"] != "NFC":
        return False
    special = ("lstrip", "rstrip", "single_word", "normalized")  # an added token with one of these looks around itself
    if any(token[name] for token in tokenizer["added_tokens"] for name in special):
        return False
    splitter = tokenizer["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    *splits, bytes_step = steps
    if bytes_step.get("type") != "ByteLevel" or bytes_step["add_prefix_space"]:
        return False
    patterns = [_GPT2] if bytes_step["use_regex"] else []
    for split in splits:
        if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
            return False
        patterns.append(split["pattern"].get("Regex"))
    return len(patterns) == 1 and patterns[0] in _PATTERNS
