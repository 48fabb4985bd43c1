"""One sequence of token ids with the mask of the tokens to learn, and what was found while it was made."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # transformers takes seconds to import, and the caller has the tokenizer already
    from transformers import PreTrainedTokenizerBase


class Notes(NamedTuple):
    """Counts of what a user should know about a record, though it is trained on."""

    without_reasoning: int = 0
    """Assistant turns that are no labels, since the chat template drops their reasoning."""
    special_tokens: int = 0
    """1 where special tokens stand in what the record says, and not only in what the template adds."""
    cut_blanks: int = 0
    """Answers whose first blanks would have been one token with the prompt's end, and were kept apart."""
    joined_blanks: int = 0
    """Answers whose first blanks are one token with the prompt's end, and so no label."""
    extra_sequences: int = 0
    """Sequences of a record beyond its first."""

    def plus(self, other: "Notes") -> "Notes":
        """The sum, count by count."""
        return Notes(*(first + second for first, second in zip(self, other, strict=True)))


NO_NOTES = Notes()


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized sequence. `tokens`: int32 [length]; `label_mask`: bool [length], true where a token is a label."""

    tokens: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    advantage: float = 1.0
    second_start: int | None = None
    """Where the rejected sequence of a preference pair begins, right after the chosen one. None for other records."""
    notes: Notes = NO_NOTES

    @property
    def sequences(self) -> tuple["Example", ...]:
        """What must not see each other: both sides of a pair, else the record itself."""
        cut = self.second_start
        if cut is None:
            return (self,)
        sides = (slice(None, cut), slice(cut, None))
        return tuple(Example(tokens=self.tokens[side], label_mask=self.label_mask[side]) for side in sides)

    @classmethod
    def of_pair(cls, chosen: "Example", rejected: "Example") -> "Example":
        """Two sequences as one record."""
        return cls(
            tokens=np.concatenate([chosen.tokens, rejected.tokens]),
            label_mask=np.concatenate([chosen.label_mask, rejected.label_mask]),
            second_start=len(chosen.tokens),
            notes=chosen.notes.plus(rejected.notes),
        )


def label_runs(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[bool, str]]:
    """The decoded text, cut where labels start and end: (is a label, text) pairs, for people to check a mask by eye."""
    edges = np.flatnonzero(np.diff(example.label_mask)) + 1
    pieces = zip(np.split(example.tokens, edges), np.split(example.label_mask, edges), strict=True)
    return [
        # The clean-up would print "a ." as "a.", which is not what is trained on.
        (bool(mask[0]), cast(str, tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)))
        for tokens, mask in pieces
    ]
