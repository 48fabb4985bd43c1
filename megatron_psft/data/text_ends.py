"""What a tokenizer puts around a plain text: its own tokens, such as one that begins a text, and the end of text."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEnds:
    """The tokens around texts, for one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode("a", add_special_tokens=True)
        own = np.flatnonzero(np.array(encoded.special_tokens_mask) == 0)  # none where no token has that letter
        first, end = (own[0], own[-1] + 1) if len(own) else (len(encoded.ids), len(encoded.ids))
        self._before, self._after = (np.array(ids, np.int32) for ids in (encoded.ids[:first], encoded.ids[end:]))
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in self._after:
            self._after = np.append(self._after, np.int32(tokenizer.eos_token_id))

    def around(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """`tokens` of a text, int32 [length], between what the tokenizer adds and an end of text; neither twice, if
        the text has it."""
        has_before = np.array_equal(tokens[: len(self._before)], self._before)
        has_after = np.array_equal(tokens[len(tokens) - len(self._after) :], self._after)
        before, after = (ids[:0] if has else ids for ids, has in ((self._before, has_before), (self._after, has_after)))
        return np.concatenate([before, tokens, after])
