"""Where assistant turns stand in a rendered conversation, for any chat template.

A conversation is rendered once, as a whole. Where a turn lies in it is found by rendering it again with a sentinel for
that turn's content: what comes before and after the sentinel is not of this turn's content. So turns are found in the
very text that is trained on, also where the template rewrites earlier turns (Qwen3 takes thoughts out of them) or trims
contents. Cutting at the length of a rendered prefix, as is often done, is wrong for such templates.

The labels of a turn start where the generation prompt ends, since from there on the model is on its own: an empty
`<think>` block that a template writes into the turn is a label. They end with the end-of-turn token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.template import SENTINEL, BoundTemplate

_SENTINEL_TURN: Message = {"role": "assistant", "content": SENTINEL}

_NO_MATCH = "(?!)"

Span = tuple[int, int]
"""Characters [start, end)."""


class TurnSpan(NamedTuple):
    """A turn's label, [start, end), and where what the turn says ends within it."""

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that their template takes."""

    template: BoundTemplate
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def text(self, messages: Sequence[Message] | None = None, *, add_generation_prompt: bool = False) -> str:
        """Renders the messages, or others in their place. Raises RecordError where the template does."""
        shown = self.messages if messages is None else messages
        return self.template.render(shown, self.tools, add_generation_prompt)

    def until(self, index: int) -> "Conversation":
        """The conversation up to message `index` and with it."""
        return Conversation(self.template, self.messages[: index + 1], self.tools)

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class _ContentSpan:
    """Characters [start, end) of a turn's content in the rendered text.

    Where not `is_exact`, the template opens this turn otherwise than it opens the sentinel's, as with a `<think>` block
    that is not empty. `start` is then where the two part, within the turn but before the content.
    """

    start: int
    end: int
    is_exact: bool


class TurnFinder:
    """Finds turns by the special tokens of one tokenizer."""

    def __init__(self, special_tokens: Sequence[str], eos_token: str) -> None:
        self._eos = eos_token
        self._special = tuple(special_tokens)
        special = "|".join(map(re.escape, special_tokens)) or _NO_MATCH
        self.special_token = re.compile(special)
        """Matches any special token."""
        # Some templates close a turn with several special tokens in a row; then the eos token is the one that counts.
        self._end_of_turn = re.compile(rf"\s*(?:(?:{special})*?{re.escape(eos_token) or _NO_MATCH}|{special})")

    def close(self, text: str, last: Message) -> str:
        """Appends the eos token where a last assistant turn ends without any, as with GLM, whose turns end at the next
        role's mark: a model that is never shown an end does not stop."""
        is_closed = last["role"] != "assistant" or text.rstrip().endswith(self._special)
        return text if is_closed else text + self._eos

    def find(self, conversation: Conversation, turns: Sequence[int], text: str, closed: str) -> list[TurnSpan]:
        """The label of each of `turns` in the conversation's `text`, which is `closed` with its last end of turn.

        Raises RecordError where one cannot be found.
        """
        spans = []
        for index in turns:
            span = self._find_content(conversation, index, text)
            start = self._find_label_start(conversation, index, text, span)
            spans.append(TurnSpan(start, span.end, self.find_end(closed, span.end, index)))
        return spans

    def find_end(self, text: str, content_end: int, index: int) -> int:
        """The end of the end-of-turn token: the special token right after the content, or after blanks."""
        if (end_of_turn := self._end_of_turn.match(text, content_end)) is None:
            raise RecordError("no label span", f"no special token ends messages[{index}] in the chat template")
        return end_of_turn.end()

    def end_of_turn(self, template: BoundTemplate) -> str:
        """The special token that the model ends its turn with. Raises RecordError where the template has none."""
        text = self.close(template.render([{"role": "user", "content": "?"}, _SENTINEL_TURN]), _SENTINEL_TURN)
        start = text.rindex(SENTINEL) + len(SENTINEL)
        return self.special_token.findall(text[: self.find_end(text, start, index=1)])[-1]

    def after_content(self, conversation: Conversation, index: int, *, with_calls: bool) -> str:
        """What the template writes after the content of turn `index`, if that is the last: its calls, and its end."""
        turn = conversation.messages[index]
        shown = _SENTINEL_TURN
        if with_calls and "tool_calls" in turn:
            shown = {**_SENTINEL_TURN, "tool_calls": turn["tool_calls"]}
        text = self.close(conversation.text([*conversation.messages[:index], shown]), shown)
        if text.count(SENTINEL) != 1:
            raise _not_once(index, text)
        return text.partition(SENTINEL)[2]

    def _find_content(self, conversation: Conversation, index: int, text: str) -> _ContentSpan:
        """The content of turn `index` in `text`, by comparison with the rendering that has a sentinel in its place."""
        messages = conversation.messages
        try:
            other = conversation.text([*messages[:index], _SENTINEL_TURN, *messages[index + 1 :]])
        except RecordError:
            # Some templates refuse a tool's turn after one without a call, which the sentinel is.
            if "tool_calls" in messages[index] and (span := self._find_by_prefixes(conversation, index, text)):
                return span
            raise
        if other.count(SENTINEL) != 1:
            raise _not_once(index, other)
        before, after = other.split(SENTINEL)
        start, end = _common_prefix_length(text, before), len(text) - len(after)
        if not text.endswith(after) or start > end:
            raise RecordError("no label span", f"messages[{index}] changes what the chat template writes elsewhere")
        return _ContentSpan(start=start, end=end, is_exact=start == len(before))

    def _find_by_prefixes(self, conversation: Conversation, index: int, text: str) -> _ContentSpan | None:
        """Turn `index` between its end and that of the turn before, if the text begins as renderings up to these do."""
        before = conversation.text(conversation.messages[:index])
        whole = conversation.text(conversation.messages[: index + 1]).rstrip()
        ends = [token for token in self._special if whole.endswith(token)]
        if not ends or not text.startswith(whole) or not whole.startswith(before):
            return None
        return _ContentSpan(start=len(before), end=len(whole) - len(max(ends, key=len)), is_exact=False)

    def _find_label_start(self, conversation: Conversation, index: int, text: str, span: _ContentSpan) -> int:
        """Where in `text` the generation prompt of turn `index`, whose content is `span`, ends and the model takes
        over."""
        # Many templates cannot render nothing; before an assistant's opening turn any user message shows the prompt.
        shown = conversation.messages[:index] or (Message(role="user", content=SENTINEL),)
        prompted = conversation.text(shown, add_generation_prompt=True)
        if span.is_exact and len(prompted) == span.start and text.startswith(prompted):
            return span.start  # with or without a prompt
        context = conversation.text(shown)
        prompt = prompted[_common_prefix_length(context, prompted) :]
        if not prompt and (span.is_exact or (span.start == len(context) and text.startswith(context))):
            return span.start  # whoever asks the model writes the turn's header, if there is one
        if prompt and text.startswith(prompted):
            return len(prompted)
        if prompt and text.startswith(context):
            # A prompt may go on with "<think>", which templates of reasoning models leave out of some turns.
            shared = _common_prefix_length(prompt, text[len(context) : span.start])
            mark = self.special_token.search(prompt)
            if shared >= (mark.end() if mark else 1):
                return len(context) + shared
        elif prompt:
            earlier = [turn for turn in conversation.turns if turn < index]
            previous_end = self._find_content(conversation, earlier[-1], text).end if earlier else 0
            if (found := text.rfind(prompt, previous_end, span.start)) >= 0:
                return found + len(prompt)
        detail = f"messages[{index}] does not follow the generation prompt {prompt!r:.60}"
        raise RecordError("no label span", detail)


def _not_once(index: int, text: str) -> RecordError:
    return RecordError("no label span", f"the chat template writes messages[{index}] {text.count(SENTINEL)} times")


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
