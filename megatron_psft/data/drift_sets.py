"""Drift sets: a model's own answers with the log-probabilities that it drew them by, as `psft rollout` writes them.

They are kept as tokens, and not as text: another tokenization of the same text has other probabilities.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.cache import TokenizedSource
from megatron_psft.data.dataset import SourceRecords, TokenizedDataset
from megatron_psft.data.example import Example
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.sources import open_rows
from megatron_psft.data.statistics import count_records
from megatron_psft.data.tokenizing import make_index
from megatron_psft.errors import UserError, counted

PROMPT, TOKENS, LOG_PROBS, SAMPLED_FROM = "prompt_tokens", "tokens", "log_probs", "sampled_from"
"""Keys of a row: lists of token ids, of the answer's log-probabilities in nats, and by what model they were drawn."""

_FIELD = "drift_data"  # the setting that names drift sets
_WRITE = "`psft rollout --drift-set` writes one"


@dataclass(frozen=True, kw_only=True)
class DriftSet:
    """The answers of a drift set. Their tokens, with an end if the model ended them, are the labels."""

    dataset: TokenizedDataset
    nll: NDArray[np.float64]
    """`[records]`, minus the sum of each answer's log-probabilities in the file."""
    tokens: NDArray[np.int64]
    """`[records]`, those of each answer."""


def read_drift_set(
    name: str, paths: Sequence[str], *, sampled_from: Mapping[str, str], vocab_size: int, seq_length: int
) -> DriftSet:
    """Reads all answers of a set.

    Args:
        name: of the set, for the log.
        paths: as of `--data`, without weights.
        sampled_from: what must be so of the model and the tokenizer that the answers were drawn with.
        vocab_size: above all token ids.
        seq_length: tokens of the longest record.

    Raises:
        UserError: names the first row that does not fit.
    """
    examples, nll, longest = [], [], ("", 0)
    for path in paths:
        for row in open_rows(path, field=_FIELD, use="other"):
            example, log_probs = _parse(row, sampled_from, vocab_size)
            examples.append(example)
            nll.append(-math.fsum(log_probs))
            longest = max(longest, (row.source, len(example.tokens)), key=lambda named: named[1])
    if longest[1] > seq_length:
        raise UserError(
            f"{_FIELD} must hold no answer that is longer than seq_length ({seq_length}) with its prompt: the "
            f"longest, {longest[0]}, has {longest[1]} tokens; raise seq_length, or sample shorter ones"
        )
    if len(examples) < 2:
        raise UserError(f"{_FIELD} ({' '.join(paths)}) must hold at least 2 answers, found {len(examples)}; {_WRITE}")
    tokens = np.array([np.count_nonzero(example.label_mask) for example in examples], dtype=np.int64)
    return DriftSet(dataset=_dataset(name, examples), nll=np.array(nll, dtype=np.float64), tokens=tokens)


def _parse(row: Row | BadRecord, sampled_from: Mapping[str, str], vocab_size: int) -> tuple[Example, list[float]]:
    """One row's answer, and its log-probabilities."""
    if isinstance(row, BadRecord):
        raise UserError(f"{_FIELD} must hold the model's own answers: {row}; {_WRITE}")
    problem = _problem(row.value, sampled_from, vocab_size)
    if problem is not None:
        raise UserError(f"{_FIELD} must hold the initial model's own answers: {row.source} {problem}; {_WRITE}")
    assert isinstance(row.value, dict)
    prompt, answer = row.value[PROMPT], row.value[TOKENS]
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Example(tokens=tokens, label_mask=np.arange(len(tokens)) >= len(prompt)), row.value[LOG_PROBS]


def _problem(value: object, sampled_from: Mapping[str, str], vocab_size: int) -> str | None:
    """What keeps a row from being an answer of this model, if anything does."""
    if not isinstance(value, dict):
        return f"is {type(value).__name__}, not an object"
    for key in (PROMPT, TOKENS, LOG_PROBS):
        if not isinstance(value.get(key), list | np.ndarray) or not len(value[key]):
            return f"has no {key}"
    if len(value[TOKENS]) != len(value[LOG_PROBS]):
        return f"has {len(value[LOG_PROBS])} {LOG_PROBS} of {counted(len(value[TOKENS]), 'token')}"
    if not all(_is_token(token, vocab_size) for key in (PROMPT, TOKENS) for token in value[key]):
        return f"has a token id that is not one of the model's, 0 to {vocab_size - 1}"
    if not all(isinstance(log_prob, int | float) and -math.inf < log_prob <= 0 for log_prob in value[LOG_PROBS]):
        return f"has {LOG_PROBS} that are not finite and at most 0"
    found: Any = value.get(SAMPLED_FROM)
    for part, wanted in sampled_from.items():
        if not isinstance(found, dict) or part not in found:
            return f"has no {SAMPLED_FROM} with {part}"
        if found[part] != wanted:
            return f"was sampled from another {part} than the run's"
    return None


def _is_token(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _dataset(name: str, examples: Sequence[Example]) -> TokenizedDataset:
    """The answers as a data set that is held in memory."""
    tokens = np.concatenate([example.tokens for example in examples])
    label_mask = np.concatenate([example.label_mask for example in examples])
    index = make_index(range(1, len(examples) + 1), examples)
    lengths = index["length"].astype(np.int64)
    source = TokenizedSource(
        name=name,
        folder=None,
        tokens=tokens,
        label_mask=label_mask,
        index=index,
        file_names=(name,),
        content=hashlib.sha256(tokens.tobytes() + label_mask.tobytes()).hexdigest(),
        bad_counts={},
    )
    statistics = count_records(
        name, weight=None, lengths=lengths, label_tokens=int(label_mask.sum()), truncated=0, dropped={}
    )
    records = np.arange(len(examples))
    return TokenizedDataset([SourceRecords(source=source, records=records, lengths=lengths, statistics=statistics)])
