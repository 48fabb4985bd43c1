"""Applies a tokenizer's chat templates: which of them, with which variables, and whether it writes what a record has.

A template that has no place for something a record says, such as reasoning, calls of tools or a role, leaves it out in
silence. So before the first record that has it comes a probe: a small conversation with a sentinel in that place. What
probes find is remembered for each template and set of variables.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from megatron_psft.data.keys import REASONING_KEYS, THINKING_KEY
from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.records import Record
from megatron_psft.errors import UserError, nearest_name_hint, reason_of

if TYPE_CHECKING:  # transformers takes seconds to import, and the caller has the tokenizer already
    from transformers import PreTrainedTokenizerBase

SENTINEL = "k7Qplaceholder0Xv"  # letters and digits only: no template trims, escapes or parses them
_VALUE = "v3Wplaceholder8Yk"  # of the argument of a call, whose name is the sentinel

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises: `raise_exception()`, or anything from within a filter that a value does not suit."""

_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%Y', '2024') | "
    "replace('%b', 'Jul') | replace('%B', 'July') | replace('%A', 'Friday') | replace('%H', '00') | replace('%M', '00')"
    " }}{% endmacro %}{{ '' }}"
)
"""Goes before every template, so that today is 26 Jul 2024, Llama 3's default, for those that print it. With the real
date a resumed run would train on other tokens than the run it continues, and so would two ranks around midnight. It has
to be a macro: transformers lets no function through to a template."""

_MOST_VARIANTS = 1000  # of variables, whose probes are remembered

_ASKED: Message = {"role": "user", "content": "?"}
_ANSWERED: Message = {"role": "assistant", "content": "!"}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": SENTINEL, "description": "", "parameters": {}}}
_CALL_ID = "000000000"  # Mistral's templates want nine letters or digits


_NO_THINKING = (THINKING_KEY, False)
_WORD = re.compile(r"[A-Za-z_]\w*")


def _unread(variables: Mapping[str, Any], texts: Iterable[str]) -> list[str]:
    """Which variables no template of `texts` reads. That there is to be no thinking is true where nobody asks."""
    known = {word for text in texts for word in _WORD.findall(text)}
    return sorted(name for name, value in variables.items() if name not in known and (name, value) != _NO_THINKING)


def read_template(path: str) -> str:
    """The text of a template's file. Raises UserError where it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template ({path}) must be a file with a Jinja template: {reason_of(error)}") from None
    if not text.strip():
        raise UserError(f"chat_template ({path}) must not be empty")
    return text


def template_texts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The tokenizer's chat templates by name; a single one is `default`."""
    found = tokenizer.chat_template
    if not found:
        return {}
    return dict(found) if isinstance(found, dict) else {"default": cast(str, found)}


def reserved_variables(tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> list[str]:
    """Which of `variables` are what rendering itself hands to a template or to transformers."""
    if not variables:
        return []
    known = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "kwargs"}
    return sorted(known & set(variables))


class ChatTemplates:
    """The templates of a tokenizer, or the one given in their place, with the run's variables.

    Raises UserError for a tokenizer without a template for plain conversations.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        texts = template_texts(tokenizer) if template is None else {"default": template}
        if not texts:
            raise UserError(
                f"tokenizer ({tokenizer.name_or_path}) must have a chat template; give --tokenizer the folder of one "
                "that has, such as the instruction-tuned sibling's, or the template's file with --chat-template"
            )
        if "default" not in texts:
            raise UserError(
                f"tokenizer ({tokenizer.name_or_path}) has chat templates named {', '.join(sorted(texts))} and none "
                "named default; give the file of the one to use with --chat-template"
            )
        if taken := reserved_variables(tokenizer, variables or {}):
            raise UserError(
                f"chat_template_kwargs must not have {', '.join(taken)}, which rendering sets itself; remove it"
            )
        if unread := _unread(variables or {}, texts.values()):
            raise UserError(
                f"chat_template_kwargs must name variables of the chat template, which reads no {unread[0]}"
                f"{nearest_name_hint(unread[0], set(_WORD.findall(' '.join(texts.values()))))}; fix or remove it"
            )
        self._tokenizer = tokenizer
        self._texts = texts
        self._variables = dict(variables or {})
        self._bound: dict[tuple[str, str], BoundTemplate] = {}

    def of(self, variables: Mapping[str, Any], *, has_tools: bool) -> "BoundTemplate":
        """The template for a record with these variables of its own, which win over the run's. As in transformers, one
        named `tool_use` is for records with tools."""
        name = "tool_use" if has_tools and "tool_use" in self._texts else "default"
        key = (name, json.dumps(variables, sort_keys=True) if variables else "")
        if key not in self._bound:
            if taken := reserved_variables(self._tokenizer, variables):
                raise RecordError("chat_template_kwargs with names that rendering sets itself", ", ".join(taken))
            if unread := _unread(variables, [self._texts[name]]):
                raise RecordError(f"the chat template reads no variable {unread[0]:.40}")
            if len(self._bound) >= _MOST_VARIANTS:
                self._bound.clear()
            together = {**self._variables, **variables}
            self._bound[key] = BoundTemplate(self._tokenizer, self._texts[name], together)
        return self._bound[key]


class BoundTemplate:
    """One template with its variables, and what is known of what it writes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: str, variables: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._text = _FIXED_DATE + text
        self._variables = variables
        self._error_of: dict[str, RecordError | None] = {}
        self._reasoning_key = REASONING_KEYS[0]
        self._takes_text_arguments = False

    def knows_mark(self, mark: str) -> bool:
        """Whether the template deals with reasoning that stands in contents and ends with `mark`."""
        return mark in self._text

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises RecordError with what the template says where it refuses."""
        try:
            text = self._tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", list(messages)),
                tools=cast("list[dict[str, Any] | Callable[..., Any]]", list(tools)) or None,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except TEMPLATE_ERRORS as error:
            raise RecordError("refused by the chat template", describe_error(error)) from error
        return cast(str, text)

    def prepare(self, record: Record, *, can_inline_reasoning: bool = False) -> tuple[Message, ...]:
        """The record's messages in the form that this template takes.

        `can_inline_reasoning`: reasoning that the template has no key for may become part of the content, as
        `<think>` block, where the template deals with such. Raises RecordError for what the template leaves out.
        """
        used: set[str] = {"tools"} if record.tools else set()
        for message in record.messages:
            used |= {"tool_calls", "reasoning_content"} & message.keys()
            used |= {message["role"]} - {"user", "assistant"}
        if not used:
            return record.messages
        errors = {feature: error for feature in sorted(used) if (error := self._probe(feature)) is not None}
        if can_inline_reasoning and self.knows_mark("</think>") and "reasoning_content" in errors:
            del errors["reasoning_content"]
            _raise_first(errors)
            return self._with_text_arguments(_inline_reasoning(record.messages))
        _raise_first(errors)
        return self._with_reasoning_key(self._with_text_arguments(record.messages))

    def _probe(self, feature: str) -> RecordError | None:
        """Why records that use `feature`, a key or a role, cannot be rendered; None if they can."""
        if feature not in self._error_of:
            find = {"tool_calls": self._find_arguments, "reasoning_content": self._find_reasoning}.get(feature)
            self._error_of[feature] = self._find_feature(feature) if find is None else find()
        return self._error_of[feature]

    def _find_feature(self, feature: str) -> RecordError | None:
        if feature == "tools":
            return self._not_written("tools", (_ASKED, _ANSWERED), (_TOOL,))[1]
        lost = None
        for messages in _role_probes(feature):
            text, error = self._not_written(f"role {feature}", messages, ())
            if error is None:
                return None
            # Where it raises, the record's own rendering has the say: a made-up conversation may lack what it asks for.
            lost = lost if text is None else error
        return lost

    def _find_arguments(self) -> RecordError | None:
        """Finds whether calls' arguments are wanted as an object or as JSON text."""
        first = None
        for as_text in (False, True):
            arguments: Any = {SENTINEL: _VALUE}
            function = {"name": SENTINEL, "arguments": json.dumps(arguments) if as_text else arguments}
            call = cast("Any", {"type": "function", "function": function, "id": _CALL_ID})
            turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            text, error = self._not_written("tool_calls", (_ASKED, turn), ())
            # Python's way to write an object, with single quotes, is nobody's JSON.
            if error is None and text is not None and (_VALUE not in text or f"'{SENTINEL}'" in text):
                error = RecordError(_reason("tool_calls"), "the arguments of a call are lost or no JSON")
            if error is None:
                self._takes_text_arguments = as_text
                return None
            first = first or error
        return first

    def _find_reasoning(self) -> RecordError | None:
        """Finds the key under which the template looks for reasoning."""
        first = None
        for key in REASONING_KEYS:
            turn = cast(Message, {**_ANSWERED, key: SENTINEL})
            error = self._not_written("reasoning_content", (_ASKED, turn), ())[1]
            if error is None:
                self._reasoning_key = key
                return None
            first = first or error
        return first

    def _not_written(
        self, what: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[str | None, RecordError | None]:
        """The rendering, if the template does not raise; and the error if the sentinel is not in it."""
        try:
            text = self.render(messages, tools)
        except RecordError as error:
            return None, RecordError(_reason(what), error.detail)
        return text, None if SENTINEL in text else RecordError(_reason(what))

    def _with_text_arguments(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not self._takes_text_arguments:
            return messages
        return tuple(
            cast(Message, {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]})
            if "tool_calls" in message
            else message
            for message in messages
        )

    def _with_reasoning_key(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self._reasoning_key == REASONING_KEYS[0]:
            return messages
        return tuple(
            cast(Message, {**message, self._reasoning_key: message["reasoning_content"]})
            if "reasoning_content" in message
            else message
            for message in messages
        )


def _raise_first(errors: Mapping[str, RecordError]) -> None:
    for error in errors.values():
        raise RecordError(error.reason, error.detail)  # a new one: a raised error grows a traceback


def describe_error(error: Exception) -> str:
    """A template's own words, with the error's type where it is no template that speaks."""
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _reason(what: str) -> str:
    return f"the chat template does not render {what}"


def _role_probes(role: str) -> list[tuple[Message, ...]]:
    """Conversations with a turn of `role` where such turns stand."""
    if role == "tool":
        call = cast("Any", {"type": "function", "function": {"name": "f", "arguments": {}}, "id": _CALL_ID})
        turn = {"role": role, "content": SENTINEL, "tool_call_id": _CALL_ID, "name": "f"}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [(_ASKED, calling, cast(Message, turn)), (_ASKED, _ANSWERED, cast(Message, turn), _ANSWERED)]
    return [(cast(Message, {"role": role, "content": SENTINEL}), _ASKED, _ANSWERED)]


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _inline_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Reasoning as models of this kind write it, before the answer."""
    moved = []
    for message in messages:
        rest = cast(Message, {key: value for key, value in message.items() if key != "reasoning_content"})
        if "reasoning_content" in message:
            rest["content"] = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"
        moved.append(rest)
    return tuple(moved)
