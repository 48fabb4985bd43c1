"""Special tokens that stand in what a record says, as plain text: in contents only, the template's own stay special.

Before rendering, a mark that no text has goes into each special token of the record; so the template takes it for text,
and where it stands in the rendering is known. Then the marks come out, and a copy of the tokenizer, which knows special
tokens under other names only, tokenizes the text with the template's own special tokens renamed.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.word_cache import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ufdd0"  # no character, by Unicode's own word, so that no text has it
_BEFORE, _AFTER = "\ufdd1", "\ufdd2"  # of other names


class Unmarked(NamedTuple):
    """A text without its marks. `plain`: where special tokens start that are text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: tuple[int, ...]


class PlainText:
    """Marks records and tokenizes texts, for one tokenizer whose special tokens `special_token` matches."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special_token: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._special_token = special_token
        self._renamed: Tokenizer | None = None
        self._ids: NDArray[np.int32] = np.empty(0, np.int32)

    def mark(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Message], list[Any]]:
        """Messages and tools with a mark in each special token. Raises RecordError where marks are text already."""
        return cast("list[Message]", self._mark(list(messages))), cast("list[Any]", self._mark(list(tools)))

    def mark_text(self, text: str) -> str:
        """One text with a mark in each special token. Raises RecordError as `mark` does."""
        return cast(str, self._mark(text))

    def _mark(self, value: object) -> object:
        if isinstance(value, str):
            if _MARK in value:
                raise RecordError("U+FDD0, which is no character")
            return self._special_token.sub(lambda token: f"{token[0][:1]}{_MARK}{token[0][1:]}", value)
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str, plain: Sequence[int]) -> Encoded:
        """Tokens and offsets of `text`, in which special tokens that start at `plain` are text.

        Raises RecordError where the tokenizer has no way to write one of them as text.
        """
        if self._renamed is None:
            self._renamed, self._ids = _rename_special_tokens(self._tokenizer)
        is_plain = set(plain)
        renamed = self._special_token.sub(
            lambda token: token[0] if token.start() in is_plain else _other_name(token[0]), text
        )
        encoded = self._renamed.encode(renamed, add_special_tokens=False)
        added = np.array([place for place, character in enumerate(renamed) if character in (_BEFORE, _AFTER)])
        offsets = np.array(encoded.offsets, np.int32).reshape(-1, 2)
        found = Encoded(
            self._ids[np.array(encoded.ids, np.int64)],
            (offsets - np.searchsorted(added, offsets)).astype(np.int32),
        )
        self._check_plain(found, is_plain)
        return found

    def _check_plain(self, found: Encoded, plain: set[int]) -> None:
        special = [place for place, token in self._tokenizer.added_tokens_decoder.items() if token.special]
        starts = found.offsets[np.isin(found.tokens, special), 0].tolist()
        if not plain.isdisjoint(starts):
            raise RecordError("a special token that the tokenizer cannot write as text")


def unmark(text: str, spans: Sequence[tuple[int, int]]) -> Unmarked:
    """Takes the marks out of a rendered text and moves its spans."""
    marks = [place for place, character in enumerate(text) if character == _MARK] if _MARK in text else []

    def moved(place: int) -> int:
        return place - bisect_left(marks, place)

    return Unmarked(
        text=text.replace(_MARK, ""),
        spans=tuple((moved(start), moved(end)) for start, end in spans),
        plain=tuple(moved(place) - 1 for place in marks),
    )


def _other_name(token: str) -> str:
    return f"{_BEFORE}{token}{_AFTER}"


def _rename_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokenizer, NDArray[np.int32]]:
    """A copy of the tokenizer with other names, and for each of its ids the tokenizer's own."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    own_ids = {}
    for token in description["added_tokens"]:
        token["content"] = _other_name(token["content"]) if token["special"] else token["content"]
        own_ids[token["content"]] = token["id"]
    renamed = Tokenizer.from_str(json.dumps(description))
    renamed.no_truncation()
    renamed.no_padding()
    ids = np.arange(max(renamed.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.int32)
    for name, own in own_ids.items():
        ids[renamed.token_to_id(name)] = own
    return renamed, ids
