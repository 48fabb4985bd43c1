"""Chat records -> token ids and the mask of the tokens to learn, for any chat template.

Everything is decided on the rendered *text*; tokens come last. A conversation is rendered once, as a whole. Where an
assistant turn lies in it is found by rendering it again with a sentinel for that turn's content: what comes before and
after the sentinel is not of this turn's content. So turns are found in the very text that is trained on, also where
the template rewrites earlier turns (Qwen3 takes thoughts out of them) or trims contents. Cutting at the length of a
rendered prefix, as is often done, is wrong for such templates.

The labels of a turn start where the generation prompt ends, since from there on the model is on its own: an empty
`<think>` block that a template writes into the turn is a label. They end with the end-of-turn token. A call of a tool
and a reasoning that the template writes are part of the turn's content. A template that has no place for them would
leave out what is to be learned, and that is an error.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.records import Record
from megatron_psft.data.word_cache import WordCache
from megatron_psft.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and the caller has the tokenizer already
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]

_SENTINEL = "k7Qplaceholder0Xv"  # letters and digits only: no template trims, escapes or parses them

_SENTINEL_TURN: Message = {"role": "assistant", "content": _SENTINEL}

_NO_MATCH = "(?!)"

_PROBES: dict[str, tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]] = {
    "tools": (
        ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}),
        ({"type": "function", "function": {"name": _SENTINEL, "description": "", "parameters": {}}},),
    ),
    "tool_calls": (
        (
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": _SENTINEL, "arguments": {}}, "id": "000000000"}
                ],
            },
        ),
        (),
    ),
    "reasoning_content": (
        ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "reasoning_content": _SENTINEL}),
        (),
    ),
}
"""Conversations, and tools, that show whether a template writes what stands under a key at all."""

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises: `raise_exception()`, or anything from within a filter that a value does not suit."""

_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%Y', '2024') | "
    "replace('%b', 'Jul') | replace('%B', 'July') | replace('%A', 'Friday') | replace('%H', '00') | replace('%M', '00')"
    " }}{% endmacro %}{{ '' }}"
)
"""Goes before every template, so that today is 26 Jul 2024, Llama 3's default, for those that print it. With the real
date a resumed run would train on other tokens than the run it continues, and so would two ranks around midnight. It has
to be a macro: transformers lets no function through to a template."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized record. `tokens`: int32 [length]; `label_mask`: bool [length], true where a token is a label."""

    tokens: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    advantage: float = 1.0
    second_start: int | None = None
    """Where the rejected sequence of a preference pair begins, right after the chosen one. None for other records."""

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
        )


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """The text of one record and the character spans [start, end) of it that are labels."""

    text: str
    label_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _ContentSpan:
    """Characters [start, end) of a turn's content in the rendered text.

    Where not `is_exact`, the template opens this turn otherwise than it opens the sentinel's, as with a `<think>` block
    that is not empty. `start` is then where the two part, within the turn but before the content.
    """

    start: int
    end: int
    is_exact: bool


class ChatRenderer:
    """Renders and tokenizes records with one tokenizer. Raises UserError for a tokenizer that cannot do it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer ({tokenizer.name_or_path}) must be a fast one, which knows the text span of each token; "
                "give --tokenizer a folder with a tokenizer.json"
            )
        try:
            self._chat_template = _FIXED_DATE + tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"tokenizer ({tokenizer.name_or_path}) must have a chat template; give --tokenizer the folder of one "
                "that has, such as the instruction-tuned sibling's"
            ) from error
        self._tokenizer = tokenizer
        self._words = WordCache(tokenizer)
        self._loss_on = loss_on
        self._is_written: dict[str, bool] = {}
        self._eos = tokenizer.eos_token or ""
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = "|".join(map(re.escape, self._special)) or _NO_MATCH
        self._special_token = re.compile(special)
        # Some templates close a turn with several special tokens in a row; then the eos token is the one that counts.
        self._end_of_turn = re.compile(rf"\s*(?:(?:{special})*?{re.escape(self._eos) or _NO_MATCH}|{special})")

    def render(self, record: Record) -> Rendering:
        """The conversation as one text, and its label spans. Raises RecordError where they cannot be found."""
        self._check_written(record)
        text = self._template(record.messages, record.tools)
        closed = self._close(text, record.messages[-1])
        if self._loss_on == "all":
            return Rendering(text=closed, label_spans=((0, len(closed)),))
        return Rendering(text=closed, label_spans=self._label_spans(record, text, closed))

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes the next assistant turn. Raises RecordError where the template does."""
        return self._template(messages, (), add_generation_prompt=True)

    def end_of_turn(self) -> str:
        """The special token that the model ends its turn with. Raises RecordError where the template has none."""
        text = self._close(self._template([{"role": "user", "content": "?"}, _SENTINEL_TURN], ()), _SENTINEL_TURN)
        start = text.rindex(_SENTINEL) + len(_SENTINEL)
        return self._special_token.findall(text[: self._find_label_end(text, start, index=1)])[-1]

    def tokenize(self, renderings: Sequence[Rendering]) -> list[Example]:
        """One Example per rendering; many at once are quicker."""
        encoded = self._words.encode([rendering.text for rendering in renderings])
        return [
            Example(tokens=tokens, label_mask=_label_mask(offsets, rendering))
            for (tokens, offsets), rendering in zip(encoded, renderings, strict=True)
        ]

    def _check_written(self, record: Record) -> None:
        used = {key for message in record.messages for key in ("tool_calls", "reasoning_content") if key in message}
        for key in sorted(used | ({"tools"} if record.tools else set())):
            if key not in self._is_written:
                messages, tools = _PROBES[key]
                try:
                    self._is_written[key] = _SENTINEL in self._template(messages, tools)
                except RecordError:
                    self._is_written[key] = False
            if not self._is_written[key]:
                raise RecordError(f"the chat template does not render {key}")

    def _template(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", list(messages)),
                tools=cast("list[dict[str, Any] | Callable[..., Any]]", list(tools)) or None,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise RecordError("refused by the chat template", str(error)) from error
        return cast(str, text)

    def _close(self, text: str, last: Message) -> str:
        """Appends the eos token where a last assistant turn ends without any, as with GLM, whose turns end at the next
        role's mark: a model that is never shown an end does not stop."""
        is_closed = last["role"] != "assistant" or text.rstrip().endswith(self._special)
        return text if is_closed else text + self._eos

    def _label_spans(self, record: Record, text: str, closed: str) -> tuple[tuple[int, int], ...]:
        turns = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
        labels: list[tuple[int, int]] = []
        previous_end = 0
        for index in turns:
            span = self._find_content(record, index, text)
            if index >= record.prompt_length and (self._loss_on == "assistant" or index == turns[-1]):
                start = self._find_label_start(record, index, text, previous_end, span)
                labels.append((start, self._find_label_end(closed, span.end, index)))
            previous_end = span.end
        return tuple(labels)

    def _find_content(self, record: Record, index: int, text: str) -> _ContentSpan:
        """The content of turn `index` in `text`, by comparison with the rendering that has a sentinel in its place."""
        other = self._template([*record.messages[:index], _SENTINEL_TURN, *record.messages[index + 1 :]], record.tools)
        if (times := other.count(_SENTINEL)) != 1:
            raise RecordError("no label span", f"the chat template writes messages[{index}] {times} times")
        before, after = other.split(_SENTINEL)
        start, end = _common_prefix_length(text, before), len(text) - len(after)
        if not text.endswith(after) or start > end:
            raise RecordError("no label span", f"messages[{index}] changes what the chat template writes elsewhere")
        return _ContentSpan(start=start, end=end, is_exact=start == len(before))

    def _find_label_start(self, record: Record, index: int, text: str, previous_end: int, span: _ContentSpan) -> int:
        """Where in `text` the generation prompt of turn `index` ends and the model takes over.

        The turn's content is `span`; the assistant turn before it ends at `previous_end`.
        """
        # Many templates cannot render nothing; before an assistant's opening turn any user message shows the prompt.
        shown = record.messages[:index] or [Message(role="user", content=_SENTINEL)]
        context = self._template(shown, record.tools)
        prompted = self._template(shown, record.tools, add_generation_prompt=True)
        prompt = prompted[_common_prefix_length(context, prompted) :]
        if not prompt and span.is_exact:
            return span.start  # whoever asks the model writes the turn's header
        if prompt and text.startswith(prompted):
            return len(prompted)
        if prompt and text.startswith(context):
            # A prompt may go on with "<think>", which templates of reasoning models leave out of some turns.
            shared = _common_prefix_length(prompt, text[len(context) : span.start])
            mark = self._special_token.search(prompt)
            if shared >= (mark.end() if mark else 1):
                return len(context) + shared
        elif prompt and (found := text.rfind(prompt, previous_end, span.start)) >= 0:
            return found + len(prompt)
        detail = f"messages[{index}] does not follow the generation prompt {prompt!r:.60}"
        raise RecordError("no label span", detail)

    def _find_label_end(self, text: str, content_end: int, index: int) -> int:
        """The end of the end-of-turn token: the special token right after the content, or after blanks."""
        if (end_of_turn := self._end_of_turn.match(text, content_end)) is None:
            raise RecordError("no label span", f"no special token ends messages[{index}] in the chat template")
        return end_of_turn.end()


def render_record(record: Record, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn) -> Example:
    """Renders and tokenizes one record; for many, keep a ChatRenderer.

    `loss_on`: "assistant", every assistant turn with its end-of-turn token; "last", the last such turn; "all", every
    token but the first, which nothing predicts.

    Raises UserError for a tokenizer without chat template or offsets, RecordError for a record that cannot be masked.
    """
    renderer = ChatRenderer(tokenizer, loss_on)
    return renderer.tokenize([renderer.render(record)])[0]


def label_runs(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[bool, str]]:
    """The decoded text, cut where labels start and end: (is a label, text) pairs, for people to check a mask by eye."""
    edges = np.flatnonzero(np.diff(example.label_mask)) + 1
    pieces = zip(np.split(example.tokens, edges), np.split(example.label_mask, edges), strict=True)
    return [
        # The clean-up would print "a ." as "a.", which is not what is trained on.
        (bool(mask[0]), cast(str, tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)))
        for tokens, mask in pieces
    ]


def _label_mask(offsets: NDArray[np.int32], rendering: Rendering) -> NDArray[np.bool_]:
    """bool [length]: the tokens that start in a label span, where `offsets` [length, 2] are each one's characters.

    The bytes of one character, cut into several tokens, share its offsets and so its fate.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    # Some tokenizers trim blanks off their offsets: a token starts where the one before ended, or earlier.
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in rendering.label_spans:
        first_word = end - len(rendering.text[start:end].lstrip())
        # A token that glues the generation prompt's last blank to the answer's first word has to be predicted too. Not
        # so a mark of the generation prompt that swallows blanks behind it.
        mask |= ((starts >= start) | (ends > first_word)) & (starts < end)
    mask[:1] = False  # nothing comes before the first token to predict it from
    return mask


def _common_prefix_length(first: str, second: str) -> int:
    """By bisection, as comparing slices is fast and comparing characters in Python is not."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
