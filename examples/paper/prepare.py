"""Prepares the paper's training data: records of OpenR1-Math whose prompt and answer are short enough.

A prompt is all that stands before the first label token, as the chat template writes it, and the answer all from there
on, the end of its turn included. Records keep their order, so that the same source gives the same file.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from megatron_psft.atomic import unfinished
from megatron_psft.config.flags import require_absent, require_at_least, run_command
from megatron_psft.config.paper import ANSWER_TOKENS, PROMPT_TOKENS
from megatron_psft.config.paths import PathText
from megatron_psft.data.chat import ChatRenderer, Rendering
from megatron_psft.data.files import BadRecord
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import Record, iter_records, raise_or_report
from megatron_psft.errors import UserError
from megatron_psft.hf.hub import load_tokenizer, model_folder
from megatron_psft.progress import Progress

EXAMPLES = """examples:
  the author's copy of the 8k subset (prompt and demonstration):
    python examples/paper/prepare.py --source wh-zhu/train_openr1_8k --tokenizer Qwen/Qwen2.5-7B-Instruct \\
        --out data/openr1-8k.jsonl
  the set that it was made of, whose answers stand under target:
    python examples/paper/prepare.py --source Elliott/Openr1-Math-46k-8192 --completion-key target \\
        --tokenizer Qwen/Qwen2.5-7B-Instruct --out data/openr1-8k.jsonl"""
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
"""Of the paper's training and test data (its repository's prepare_data.py)."""
Verdict = Literal["kept", "bad", "long prompt", "long answer"]
_AT_A_TIME = 256  # records tokenized together


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is read, what is left out, and where the rest goes."""

    source: PathText
    """Hub ID, file or folder of records, as `pretrain_psft.py --data` takes it."""
    tokenizer: PathText
    """Folder or hub ID of the model's tokenizer, whose tokens are counted."""
    out: PathText
    """JSON Lines file to write; it must not exist."""
    completion_key: str = "completion"
    """Name of the answer in a row; the paper's `demonstration` is found by itself."""
    system_prompt: str = SYSTEM_PROMPT
    """System message of every record, in place of its own."""
    max_prompt_tokens: int = PROMPT_TOKENS
    """Longest prompt that is kept, in tokens, chat template included."""
    max_answer_tokens: int = ANSWER_TOKENS
    """Longest answer that is kept, in tokens, with the end of its turn."""

    def __post_init__(self) -> None:
        require_absent(self, "out")
        require_at_least(1, self, "max_prompt_tokens", "max_answer_tokens")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole command."""

    prepare: PrepareConfig


def main(argv: Sequence[str]) -> int:
    """Writes the records and returns the exit code: 0, or 2 after a user's mistake."""
    return run_command(Config, lambda config: prepare(config.prepare), argv, epilog=EXAMPLES)


def prepare(config: PrepareConfig) -> None:
    out, partial = Path(config.out), unfinished(Path(config.out))
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[Verdict] = Counter()
    bad: list[BadRecord] = []
    try:
        with partial.open("w", encoding="utf-8") as file:
            for item, verdict in judged(config):
                counts[verdict] += 1
                if isinstance(item, BadRecord):
                    bad.append(item)
                elif verdict == "kept":
                    file.write(json.dumps({"messages": item.messages}, ensure_ascii=False) + "\n")
        reasons = Counter(record.reason for record in bad)
        raise_or_report("source", bad, reasons, counts.total(), skip_bad_records=None)
        if not counts["kept"]:
            raise UserError(f"source ({config.source}) must have a record that is short enough; raise the limits")
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    print(
        f"{counts['kept']} of {counts.total()} records in {out}; left out: {counts['long prompt']} with a prompt of "
        f"more than {config.max_prompt_tokens} tokens, {counts['long answer']} with an answer of more than "
        f"{config.max_answer_tokens}"
    )


def judged(config: PrepareConfig) -> Iterator[tuple[Record | BadRecord, Verdict]]:
    """The records of the source in order, and what becomes of each."""
    tokenizer = load_tokenizer(model_folder("tokenizer", config.tokenizer, with_weights=False))
    renderer = ChatRenderer(tokenizer, "assistant")
    keys = RecordKeys(completion=config.completion_key, system_prompt=config.system_prompt)
    items = iter_records([config.source], keys, field="source")
    with Progress("prepare", total=None, unit="record") as progress:
        while batch := list(islice(items, _AT_A_TIME)):
            for item, prompt_tokens, answer_tokens in measured(batch, renderer):
                if isinstance(item, BadRecord):
                    yield item, "bad"
                elif prompt_tokens > config.max_prompt_tokens:
                    yield item, "long prompt"
                else:
                    yield item, "long answer" if answer_tokens > config.max_answer_tokens else "kept"
            progress.update(len(batch))


def measured(
    items: Sequence[Record | BadRecord], renderer: ChatRenderer
) -> Iterator[tuple[Record | BadRecord, int, int]]:
    """Each record with the tokens of its prompt and its answer; a record whose labels cannot be found as a bad one."""
    rendered = [rendered_or_bad(item, renderer) for item in items]
    examples = iter(renderer.tokenize([found for found in rendered if isinstance(found, Rendering)]))
    for item, found in zip(items, rendered, strict=True):
        if isinstance(found, BadRecord):
            yield found, 0, 0
        else:
            example = next(examples)
            prompt_tokens = int(example.label_mask.argmax())
            yield item, prompt_tokens, len(example.tokens) - prompt_tokens


def rendered_or_bad(item: Record | BadRecord, renderer: ChatRenderer) -> Rendering | BadRecord:
    if isinstance(item, BadRecord):
        return item
    try:
        return renderer.render(item)[0]
    except RecordError as error:
        return BadRecord(source=item.source, reason=error.reason, detail=error.detail)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
