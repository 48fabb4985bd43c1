"""Chunks of rows -> tokens, in this process and, for sets that are worth it, in several.

About half of a record's time goes into its chat template, which is Python, and more of the tokenizer's threads do not
help there. Processes are spawned and not forked: by the time data is read, this process has threads of its own
(collectives, perhaps CUDA) that a fork would break.
"""

import multiprocessing
import os
import signal
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.chat import ChatRenderer, Rendering
from megatron_psft.data.example import Example, Notes
from megatron_psft.data.files import BadRecord, Chunk
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.data.records import Record, parse_row
from megatron_psft.distributed.orphans import end_with_parent, without_main_script
from megatron_psft.errors import UserError

INDEX = np.dtype(
    [
        ("offset", "<i8"),  # of the record's first token
        ("row", "<i8"),  # its place in the file, from 1; several sequences of one record share it
        ("file", "<i4"),
        ("length", "<i4"),  # in tokens
        ("labels", "<i4"),
        ("first_label", "<i4"),  # the place of the first of them; `length` where the record, or a pair's side, has none
        ("second_start", "<i4"),  # where the rejected sequence of a pair begins; 0 where the record is no pair
        ("advantage", "<f4"),
        ("crc32", "<u4"),
        ("notes", "<u2", (len(Notes._fields),)),
    ]
)
"""What is known of each record without reading its tokens."""

# Starting a process costs seconds: a set of this many chunks is done before.
_CHUNKS_BEFORE_PROCESSES = 4
_CHUNKS_AHEAD = 4  # per process, so that one slow chunk does not idle the others


@dataclass(frozen=True, kw_only=True)
class TokenizedChunk:
    """The records of a chunk, one after the other. `index` (of `INDEX`): offsets count from the chunk's first token,
    and `file` is 0. `tokens`: int32 [total]; `label_mask`: bool [total]."""

    name: str
    size: int
    index: NDArray[np.void]
    tokens: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    bad: tuple[BadRecord, ...]


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A record as text: the sequences of a demonstration, most often one, or both sides of a preference pair. `row`:
    its place in the file, from 1."""

    row: int
    advantage: float
    texts: tuple[Rendering, ...]
    is_pair: bool


@dataclass(frozen=True, kw_only=True)
class ChunkTokenizer:
    """Turns the rows of a chunk into tokens."""

    keys: RecordKeys
    renderer: ChatRenderer

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        """Raises nothing for what is in the rows: a row that cannot be used is in `bad`."""
        parse = parse_pair if self.keys.are_pairs else parse_row
        results = [self._render(parse(row, self.keys)) for row in chunk.rows()]
        rendered = [result for result in results if not isinstance(result, BadRecord)]
        sequences = iter(self.renderer.tokenize([text for record in rendered for text in record.texts]))
        found = [(record.row, example) for record in rendered for example in _examples_of(record, sequences)]
        examples = [example for _, example in found]
        return TokenizedChunk(
            name=chunk.name,
            size=chunk.size,
            index=make_index([row for row, _ in found], examples),
            tokens=np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)]),
            label_mask=np.concatenate([np.empty(0, np.bool_), *(example.label_mask for example in examples)]),
            bad=tuple(result for result in results if isinstance(result, BadRecord)),
        )

    def _render(self, item: Record | Pair | BadRecord) -> _Rendered | BadRecord:
        if isinstance(item, BadRecord):
            return item
        is_pair = isinstance(item, Pair)
        records = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
        try:
            texts = tuple(text for record in records for text in self.renderer.render(record))
            if is_pair and len(texts) != len(records):
                raise RecordError("a side of a preference pair that needs several sequences to keep its reasoning")
        except RecordError as error:
            return BadRecord(source=item.source, reason=error.reason, detail=error.detail)
        row = int(item.source.rpartition(":")[2])
        return _Rendered(row=row, advantage=records[0].advantage, texts=texts, is_pair=is_pair)


def _examples_of(record: _Rendered, sequences: Iterator[Example]) -> list[Example]:
    """Takes what the record needs from the sequences."""
    own = list(islice(sequences, len(record.texts)))
    if record.is_pair:
        return [Example.of_pair(*own)]
    return own if record.advantage == 1 else [replace(one, advantage=record.advantage) for one in own]


def make_index(rows: Sequence[int], examples: Sequence[Example]) -> NDArray[np.void]:
    """The entries of records that lie one after the other, with `row` of each; the `file` is 0."""
    index = np.zeros(len(examples), dtype=INDEX)
    index["row"] = rows
    index["length"] = [len(example.tokens) for example in examples]
    index["offset"] = np.cumsum(index["length"], dtype=np.int64) - index["length"]
    index["labels"] = [np.count_nonzero(example.label_mask) for example in examples]
    index["second_start"] = [example.second_start or 0 for example in examples]
    has_label = index["labels"] > 0
    if index["second_start"].any():
        has_label = np.array([all(side.label_mask.any() for side in example.sequences) for example in examples])
    index["first_label"] = [int(np.argmax(example.label_mask)) if len(example.tokens) else 0 for example in examples]
    index["first_label"] = np.where(has_label, index["first_label"], index["length"])
    index["advantage"] = [example.advantage for example in examples]
    index["notes"] = np.minimum([example.notes for example in examples], 2**16 - 1).reshape(-1, len(Notes._fields))
    index["crc32"] = [checksum(example.tokens, example.label_mask) for example in examples]
    return index


def checksum(tokens: NDArray[np.int32], label_mask: NDArray[np.bool_]) -> int:
    """CRC-32 of one record's tokens and labels."""
    return zlib.crc32(np.ascontiguousarray(label_mask).data, zlib.crc32(np.ascontiguousarray(tokens).data))


def tokenize_chunks(
    chunks: Iterator[Chunk], tokenizer: ChunkTokenizer, num_workers: int
) -> Generator[TokenizedChunk, None, None]:
    """The tokenized chunks, in order, with at most `num_workers` processes.

    Memory is bounded by a few chunks per process. Raises UserError where a process is killed, or `chunks` does.
    """
    yield from map(tokenizer, islice(chunks, _CHUNKS_BEFORE_PROCESSES))
    first = next(chunks, None)
    if first is None:
        return
    chunks = chain([first], chunks)
    if num_workers == 1:
        yield from map(tokenizer, chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_set_up_worker, initargs=(tokenizer,))
    try:
        yield from _in_order(pool, chunks, ahead=num_workers * _CHUNKS_AHEAD)
    except BrokenProcessPool as error:
        raise UserError(
            f"data_workers ({num_workers}): a process that tokenizes was killed, perhaps for lack of memory; "
            "choose fewer with --data-workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[Chunk], ahead: int) -> Iterator[TokenizedChunk]:
    waiting: deque[Future[TokenizedChunk]] = deque()
    for chunk in chunks:
        with without_main_script():  # the first one starts the processes
            waiting.append(pool.submit(_tokenize_in_worker, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Worker:
    """What a spawned process works with: set once, at its start, as a pool's tasks can carry no state."""

    tokenizer: ChunkTokenizer


def _set_up_worker(tokenizer: ChunkTokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough threads
    end_with_parent()
    _Worker.tokenizer = tokenizer


def _tokenize_in_worker(chunk: Chunk) -> TokenizedChunk:
    return _Worker.tokenizer(chunk)
