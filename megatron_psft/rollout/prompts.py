"""Rows -> prompts with known answers, for rollouts and reinforcement learning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_psft.config.paths import PathText
from megatron_psft.data.chat import ChatRenderer
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import (
    CONVERSATION_FORMATS,
    DEFAULT_PROMPT_KEY,
    PROMPT_FORMAT,
    RecordKeys,
    content_of,
)
from megatron_psft.data.messages import Message, RecordError, Turn, parse_tools
from megatron_psft.data.records import parse_kwargs, parse_with, read_object, with_system_prompt
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError
from megatron_psft.rollout.rewards import Verifier


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked, and what the right answers are."""

    prompts: tuple[PathText, ...]
    """JSON Lines, JSON or Parquet files, folders of them, or hub IDs. A row has `answer_key`, and `prompt_key` or else
    messages (or ShareGPT's conversations)."""
    prompt_key: str = "prompt"
    """Name of the prompt in a row: a text, or a list of messages whose last, if it is an assistant's, is left out."""
    answer_key: str = "answer"
    """Name of the known answer in a row, a text or a number; a dot goes into an object."""
    system_prompt: str | None = None
    """System message of all prompts, instead of their own; each prompt's if unset."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows and messages to read as if they were not there. A key that may change what is asked, and that is
    not supported, is refused otherwise."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that the model is to go on with, and the answer that is right, if one is known. `source` is
    `path:N`."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The row's own variables for the chat template."""


def read_prompts(config: PromptConfig, verifier: Verifier | None) -> list[Prompt]:
    """All prompts in file order; without a verifier no answer need be known. Raises UserError that names the first row
    that is none."""
    prompts: list[Prompt] = []
    bad: list[BadRecord] = []
    for path in config.prompts:
        for row in open_rows(path, field="prompts"):
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


def parse_prompt(row: Row | BadRecord, config: PromptConfig, verifier: Verifier | None) -> Prompt | BadRecord:
    """The prompt that a row is, or why it is none."""
    return parse_with(lambda value, source: _parse_value(value, source, config, verifier), row)


def _parse_value(value: object, source: str, config: PromptConfig, verifier: Verifier | None) -> Prompt:
    keys = RecordKeys(
        prompt=config.prompt_key, system_prompt=config.system_prompt, are_prompts=True, ignored=config.ignore_keys
    )
    row = read_object(value, keys)
    answer = "" if verifier is None else _known_answer(row, config.answer_key, verifier)
    turns = _asked_turns({key: item for key, item in row.items() if key != config.answer_key}, keys)
    if parse_tools(row.get("tools")):
        raise RecordError("tools are not supported in prompts")
    messages = tuple(turn.message for turn in with_system_prompt(row, turns, keys))
    return Prompt(messages=messages, answer=answer, source=source, template_kwargs=parse_kwargs(row))


def _known_answer(row: Mapping[str, Any], key: str, verifier: Verifier) -> str:
    answer = find_answer(row, key)
    if answer is None:
        raise RecordError("no answer", f"wanted: a text or a number under {key}")
    try:
        verifier.check(answer)
    except ValueError as error:
        raise RecordError("answer that the verifier cannot use", f"{answer!r:.60} {error}") from None
    return answer


def _asked_turns(row: Mapping[str, object], keys: RecordKeys) -> tuple[Turn, ...]:
    """What stands under the prompt's key, or else the conversation, without an answer at its end. Raises RecordError,
    also for keys that are refused (`data/keys.py`)."""
    if keys.prompt in row:
        turns = content_of(row, [PROMPT_FORMAT], keys, reason="no prompt")
    elif any(format.keys[0] in row for format in CONVERSATION_FORMATS):
        turns = content_of(row, CONVERSATION_FORMATS, replace(keys, prompt=DEFAULT_PROMPT_KEY), reason="no prompt")
    else:
        hint = "; --prompt-key text asks a plain text" if "text" in row else ""
        raise RecordError("no prompt", f"wanted: a text or a list under {keys.prompt}, or messages{hint}")
    turns = turns[:-1] if turns and turns[-1].message["role"] == "assistant" else turns
    if not turns:
        raise RecordError("no prompt", "nothing comes before the answer")
    return turns


def render_prompt(field: str, prompt: Prompt, renderer: ChatRenderer) -> str:
    """The text that the model goes on with. Raises UserError, which names the configuration's `field`, for what the
    chat template refuses."""
    try:
        return renderer.render_prompt(prompt.messages, prompt.template_kwargs)
    except RecordError as error:
        raise UserError(f"{field} must be what the chat template can write: {prompt.source}: {error}") from None


def find_answer(row: Mapping[str, Any], key: str) -> str | None:
    """The known answer as text, where there is one under `key`, whose dots go into objects."""
    value: object = row
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
