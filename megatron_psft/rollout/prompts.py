"""Rows -> prompts with known answers, for rollouts and reinforcement learning."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_psft.config.paths import PathText
from megatron_psft.data.chat import ChatRenderer
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.keys import KWARGS_KEY, SYSTEM_KEYS, THINKING_KEY
from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.records import parse_row, parse_with
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError
from megatron_psft.rollout.rewards import Verifier


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked, and what the right answers are."""

    prompts: tuple[PathText, ...]
    """JSON Lines, JSON or Parquet files, folders of them, or hub IDs. A row has `answer_key`, and `prompt_key` or else
    messages."""
    prompt_key: str = "prompt"
    """Name of the prompt in a row: a text, or a list of messages whose last, if it is an assistant's, is left out."""
    answer_key: str = "answer"
    """Name of the known answer in a row, a text or a number; a dot goes into an object."""
    system_prompt: str | None = None
    """System message of all prompts, instead of their own; each prompt's if unset."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows and messages to read as if they were not there. A key of a message that is not supported is refused
    otherwise."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that the model is to go on with, and the answer that is right. `source` is `path:N`."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The row's own variables for the chat template."""


def read_prompts(config: PromptConfig, verifier: Verifier) -> list[Prompt]:
    """All prompts in file order. Raises UserError that names the first row that is none."""
    prompts: list[Prompt] = []
    bad: list[BadRecord] = []
    for path in config.prompts:
        for row in open_rows(path):
            prompt = parse_prompt(row, config, verifier)
            if isinstance(prompt, Prompt):
                prompts.append(prompt)
            else:
                bad.append(prompt)
    if bad:
        number = len(bad) + len(prompts)
        raise UserError(f"prompts must hold usable rows only, {len(bad)} of {number} are not; the first is {bad[0]}")
    if not prompts:
        raise UserError(f"prompts ({' '.join(config.prompts)}) must hold at least one row")
    return prompts


def parse_prompt(row: Row | BadRecord, config: PromptConfig, verifier: Verifier) -> Prompt | BadRecord:
    """The prompt that a row is, or why it is none."""
    found = parse_with(lambda value, _: parse_value(value, config, verifier), row)
    if isinstance(found, BadRecord):
        return found
    asked, answer = found
    # With an answer in place it is a record, and is checked as such.
    whole = {**asked, "messages": [*asked["messages"], {"role": "assistant", "content": "?"}]}
    keys = RecordKeys(system_prompt=config.system_prompt, ignored=config.ignore_keys)
    record = parse_row(Row(source=row.source, value=whole), keys)
    if isinstance(record, BadRecord):
        return record
    return Prompt(
        messages=record.messages[:-1], answer=answer, source=row.source, template_kwargs=record.template_kwargs
    )


def parse_value(row: object, config: PromptConfig, verifier: Verifier) -> tuple[dict[str, Any], str]:
    """Conversation and known answer of a row; the conversation's messages are not checked. Raises RecordError."""
    if not isinstance(row, dict):
        raise RecordError("not an object", f"found {type(row).__name__}")
    if row.get("tools") and "tools" not in config.ignore_keys:
        raise RecordError("tools are not supported in prompts")
    asked = row.get(config.prompt_key, row.get("messages"))
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not isinstance(asked, list):
        raise RecordError("no prompt", f"wanted: a text or a list under {config.prompt_key}, or messages")
    if asked and isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
        asked = asked[:-1]
    answer = find_answer(row, config.answer_key)
    if answer is None:
        raise RecordError("no answer", f"wanted: a text or a number under {config.answer_key}")
    try:
        verifier.check(answer)
    except ValueError as error:
        raise RecordError("answer that the verifier cannot use", f"{answer!r:.60} {error}") from None
    kept = {key: row.get(key) for key in (*SYSTEM_KEYS, KWARGS_KEY, THINKING_KEY)}
    return {"messages": asked, **kept}, answer


def render_prompt(field: str, prompt: Prompt, renderer: ChatRenderer) -> str:
    """The text that the model goes on with. Raises UserError, which names the configuration's `field`, for what the
    chat template refuses."""
    try:
        return renderer.render_prompt(prompt.messages, prompt.template_kwargs)
    except RecordError as error:
        raise UserError(f"{field} must be what the chat template can write: {prompt.source}: {error}") from None


def find_answer(row: dict[str, Any], key: str) -> str | None:
    """The known answer as text, where there is one under `key`, whose dots go into objects."""
    value: object = row
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
