"""Chat records -> token ids and the mask of the tokens to learn, for any chat template.

Everything is decided on the rendered *text*; tokens come last. `spans.py` finds each assistant turn in it. A call of a
tool and a reasoning that the template writes are part of the turn. Each label is compared with what the record says
(`turns.py`): a turn whose reasoning the template drops, as many do with earlier turns, is no label, and a record whose
last turn loses it, or whose contents are changed, is bad.

With `keep_reasoning` a turn is rendered as the last of its own conversation, which is what the model sees when it
writes it. What a template drops even there, as DeepSeek-R1's does, is written after the generation prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from megatron_psft.config.inputs import DataConfig, TemplateConfig
from megatron_psft.data.example import NO_NOTES, Example, Notes
from megatron_psft.data.keys import REASONING_KEYS
from megatron_psft.data.marks import closing_of, unclosed_mark
from megatron_psft.data.messages import Message, RecordError
from megatron_psft.data.plain_text import PlainText, unmark
from megatron_psft.data.records import NOTHING_TO_LEARN, Record
from megatron_psft.data.spans import Conversation, Span, TurnFinder
from megatron_psft.data.template import SENTINEL, ChatTemplates, read_template
from megatron_psft.data.text_ends import TextEnds
from megatron_psft.data.turns import continue_prompt, has_reasoning, missing_part, skip_empty_block
from megatron_psft.data.word_cache import Encoded, WordCache
from megatron_psft.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and the caller has the tokenizer already
    from transformers import PreTrainedTokenizerBase

LOST_REASONING = "the chat template drops the reasoning of a turn that is to be learned"
"""A record's reason to be bad."""

_SHORT = 40  # characters; nothing longer stands between a template's special tokens

LossOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """How records become text and labels, beside the tokenizer; the fields of `DataConfig` of these names."""

    chat_template: str | None = None
    """The template's text; the tokenizer's own if None."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    keep_reasoning: bool = False
    loss_on_empty_think: bool = True
    split_special_tokens: bool = False

    @classmethod
    def of_template(cls, config: TemplateConfig, *, keep_reasoning: bool = False) -> "RenderSettings":
        """With the template and variables that flags name. Raises UserError where the file cannot be read."""
        text = None if config.chat_template is None else read_template(config.chat_template)
        return cls(chat_template=text, template_kwargs=config.template_variables, keep_reasoning=keep_reasoning)

    @classmethod
    def of_data(cls, config: DataConfig) -> "RenderSettings":
        """A run's. Raises UserError where the template's file cannot be read."""
        return replace(
            cls.of_template(config, keep_reasoning=config.keep_reasoning),
            loss_on_empty_think=config.loss_on_empty_think,
            split_special_tokens=config.split_special_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """The text of one sequence and the character spans [start, end) of it that are labels."""

    text: str
    label_spans: tuple[Span, ...]
    plain: tuple[int, ...] = ()
    """Where special tokens start that are plain text."""
    is_conversation: bool = True
    """False for a plain text, around which the tokenizer's own tokens come."""
    notes: Notes = NO_NOTES


class ChatRenderer:
    """Renders and tokenizes records with one tokenizer. Raises UserError for a tokenizer that cannot do it; with
    `loss_on` all, where records may be plain texts, one without a chat template is refused by the first conversation.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, settings: RenderSettings | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer ({tokenizer.name_or_path}) must be a fast one, which knows the text span of each token; "
                "give --tokenizer a folder with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._settings = settings or RenderSettings()
        self._words = WordCache(tokenizer)
        self._loss_on = loss_on
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._finder = TurnFinder(special, tokenizer.eos_token or "")
        self._plain_text = PlainText(tokenizer, self._finder.special_token)
        self._text_ends = TextEnds(tokenizer)
        if loss_on != "all":
            _ = self._templates  # raises where there is none

    @cached_property
    def _templates(self) -> ChatTemplates:
        return ChatTemplates(self._tokenizer, self._settings.chat_template, self._settings.template_kwargs)

    def render(self, record: Record) -> tuple[Rendering, ...]:
        """The conversation as text with its label spans: one sequence, but for `keep_reasoning`, which may need one for
        each turn. Raises RecordError where labels cannot be found, or are not what the record says."""
        if record.text is not None:
            return (self._render_text(record.text),)
        template = self._templates.of(record.template_kwargs, has_tools=bool(record.tools))
        messages = template.prepare(record, can_inline_reasoning=self._settings.keep_reasoning)
        tools = record.tools
        has_special_tokens = self._has_special_tokens(messages)
        if self._settings.split_special_tokens and (has_special_tokens or tools):
            marked, marked_tools = self._plain_text.mark(messages, tools)
            messages, tools = tuple(marked), tuple(marked_tools)
        found = self._render(Conversation(template, messages, tools), record)
        if self._settings.split_special_tokens:
            found = [self._unmarked(rendering) for rendering in found]
        is_control = has_special_tokens and not self._settings.split_special_tokens
        notes = found[0].notes._replace(special_tokens=int(is_control), extra_sequences=len(found) - 1)
        return (replace(found[0], notes=notes), *found[1:])

    def render_prompt(self, messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None) -> str:
        """The text after which the model writes the next assistant turn, under a row's variables if it has any. Raises
        RecordError where the template does."""
        template = self._templates.of(template_kwargs or {}, has_tools=False)
        return template.render(messages, add_generation_prompt=True)

    def end_of_turn(self) -> str:
        """The special token that the model ends its turn with. Raises RecordError where the template has none."""
        return self._finder.end_of_turn(self._templates.of({}, has_tools=False))

    def tokenize(self, renderings: Sequence[Rendering]) -> list[Example]:
        """One Example per rendering; many at once are quicker."""
        encoded = self._words.encode([rendering.text for rendering in renderings])
        return [self._example(*pair) for pair in zip(encoded, renderings, strict=True)]

    def _example(self, encoded: Encoded, rendering: Rendering) -> Example:
        notes = rendering.notes
        if rendering.plain:
            encoded = self._plain_text.encode(rendering.text, rendering.plain)
        if not rendering.is_conversation:
            tokens = self._text_ends.around(encoded.tokens)
            return Example(tokens=tokens, label_mask=np.arange(len(tokens)) > 0, notes=notes)
        if joined := _joined_starts(encoded.offsets, rendering):
            if self._words.can_cut and not rendering.plain:
                encoded = self._words.encode_cut(rendering.text, joined)
                notes = notes._replace(cut_blanks=len(joined))
            else:
                notes = notes._replace(joined_blanks=len(joined))
        return Example(tokens=encoded.tokens, label_mask=_label_mask(encoded.offsets, rendering), notes=notes)

    def _render_text(self, text: str) -> Rendering:
        has_special_tokens = self._finder.special_token.search(text) is not None
        if has_special_tokens and self._settings.split_special_tokens:
            marked = self._plain_text.mark_text(text)
            return self._unmarked(Rendering(text=marked, label_spans=((0, len(marked)),), is_conversation=False))
        notes = Notes(special_tokens=int(has_special_tokens))
        return Rendering(text=text, label_spans=((0, len(text)),), is_conversation=False, notes=notes)

    def _unmarked(self, rendering: Rendering) -> Rendering:
        text, spans, plain = unmark(rendering.text, rendering.label_spans)
        if plain:
            self._plain_text.encode(text, plain)  # raises here, where the record can be named
        return replace(rendering, text=text, label_spans=spans, plain=plain)

    def _has_special_tokens(self, messages: Sequence[Message]) -> bool:
        search = self._finder.special_token.search
        return any(
            search(message["content"])
            or ("reasoning_content" in message and search(message["reasoning_content"]))
            or ("tool_calls" in message and search(str(message["tool_calls"])))
            for message in messages
        )

    def _render(self, conversation: Conversation, record: Record) -> list[Rendering]:
        turns = conversation.turns
        if self._loss_on == "all":
            _refuse_unclosed(conversation, [index for index in turns if index not in record.unlearned])
            return [self._render_all(conversation, record)]
        learned = [
            index
            for index in (turns if self._loss_on == "assistant" else turns[-1:])
            if index >= record.prompt_length and index not in record.unlearned
        ]
        if not learned:
            raise RecordError(NOTHING_TO_LEARN, "--loss-on last takes the last one, which has weight 0 or the like")
        _refuse_unclosed(conversation, learned)
        text, spans, lost = self._label(conversation, learned)
        if not lost:
            return [Rendering(text=text, label_spans=tuple(spans))]
        if self._settings.keep_reasoning:
            return self._render_each(conversation, learned)
        if lost[-1] == turns[-1] or len(lost) == len(learned):
            raise _lost_reasoning(lost[-1])
        kept = tuple(span for index, span in zip(learned, spans, strict=True) if index not in lost)
        return [Rendering(text=text, label_spans=kept, notes=Notes(without_reasoning=len(lost)))]

    def _label(self, conversation: Conversation, learned: Sequence[int]) -> tuple[str, list[Span], list[int]]:
        """The whole text, the labels of the turns to learn, and which of these lose their reasoning. Raises RecordError
        where one loses anything else."""
        messages = conversation.messages
        text = conversation.text()
        closed = self._finder.close(text, messages[-1])
        dropped = _dropped_reasoning(conversation, learned)
        spans, lost = [], []
        for index, span in zip(learned, self._finder.find(conversation, learned, text, closed), strict=True):
            start, label = span.start, closed[span.start : span.content_end]
            message = _without_reasoning(messages[index]) if index in dropped else messages[index]
            missing = missing_part(message, label)
            if missing == "content":
                raise RecordError("the chat template changes what a turn says", f"messages[{index}]")
            if missing == "reasoning" or index in dropped:
                lost.append(index)
            if not self._settings.loss_on_empty_think:
                start += skip_empty_block(messages[index], label)
            spans.append((start, span.end))
        return closed, spans, lost

    def _render_all(self, conversation: Conversation, record: Record) -> Rendering:
        """Everything is a label but for turns that are not to be learned, and those that lose their reasoning."""
        messages, turns = conversation.messages, conversation.turns
        if others := sorted(record.unlearned.difference(turns)):
            detail = f"messages[{others[0]}], {messages[others[0]]['role']}"
            raise RecordError("a turn with weight 0 that cannot be left out of --loss-on all", detail)
        if not record.unlearned and not any(has_reasoning(messages[index]) for index in turns):
            text = self._finder.close(conversation.text(), messages[-1])
            if changed := [index for index in turns if missing_part(messages[index], text)]:
                raise RecordError("the chat template changes what a turn says", f"messages[{changed[0]}]")
            return Rendering(text=text, label_spans=((0, len(text)),))
        text, spans, lost = self._label(conversation, turns)
        lost = [index for index in lost if index not in record.unlearned]
        if turns[-1] in lost:
            raise _lost_reasoning(turns[-1])
        left_out = [span for index, span in zip(turns, spans, strict=True) if index in {*lost, *record.unlearned}]
        edges = [0, *(edge for span in left_out for edge in span), len(text)]
        kept = tuple(span for span in zip(edges[::2], edges[1::2], strict=True) if span[0] < span[1])
        return Rendering(text=text, label_spans=kept, notes=Notes(without_reasoning=len(lost)))

    def _render_each(self, conversation: Conversation, learned: Sequence[int]) -> list[Rendering]:
        """Each turn as the last of its own conversation. Turns share a sequence where that changes nothing of what
        comes before them and of themselves."""
        found: list[Rendering] = []
        for index in reversed(learned):
            text, span = self._render_last(conversation.until(index))
            shared = next((other for other in found if other.text.startswith(text[: span[1]])), None)
            if shared is None:
                found.append(Rendering(text=text, label_spans=(span,)))
            else:
                spans = (span, *shared.label_spans)
                found[found.index(shared)] = replace(shared, label_spans=spans)
        return found[::-1]

    def _render_last(self, conversation: Conversation) -> tuple[str, Span]:
        """A conversation's last turn, an assistant's, with all that it says."""
        index = len(conversation.messages) - 1
        text, (span,), lost = self._label(conversation, [index])
        if not lost:
            return text, span
        message = conversation.messages[index]
        prompt = conversation.text(conversation.messages[:index], add_generation_prompt=True)
        said = continue_prompt(prompt, message["content"])
        if said is None:
            raise _lost_reasoning(index)
        end = self._finder.after_content(conversation, index, with_calls=False)
        calls = self._finder.after_content(conversation, index, with_calls=True).removesuffix(end)
        text = prompt + said + calls
        label_end = self._finder.find_end(text + end, len(text), index)
        if missing_part(message, text[len(prompt) :]) is not None:
            raise _lost_reasoning(index)
        return text + end, (len(prompt), label_end)


def _refuse_unclosed(conversation: Conversation, turns: Sequence[int]) -> None:
    """Raises RecordError for one of `turns` that begins reasoning and never ends it, where the template deals with
    reasoning: it would take all of it for the answer. For other templates it is text as any other."""
    for index in turns:
        mark = unclosed_mark(conversation.messages[index]["content"])
        if mark is not None and conversation.template.knows_mark(closing_of(mark)):
            raise RecordError(f"content that opens {mark} and never closes it", f"messages[{index}]")


def _dropped_reasoning(conversation: Conversation, turns: Sequence[int]) -> set[int]:
    """Those of the `turns` whose reasoning the template does not write at all. It is asked, once, about turns whose
    reasoning may be found in what else stands there: in the answer, in calls, or, as short as it is, in what the
    template itself writes."""
    messages, marks = list(conversation.messages), {}
    for index in turns:
        message = messages[index]
        reasoning = message.get("reasoning_content", "").strip()
        if reasoning and (len(reasoning) < _SHORT or reasoning in message["content"] or "tool_calls" in message):
            marks[index] = f"{SENTINEL}{index}."
            keys = message.keys() & set(REASONING_KEYS)
            messages[index] = cast(Message, {**message, **dict.fromkeys(keys, marks[index])})
    if not marks:
        return set()
    text = conversation.text(messages)
    return {index for index, mark in marks.items() if mark not in text}


def _without_reasoning(message: Message) -> Message:
    return cast(Message, {key: value for key, value in message.items() if key not in REASONING_KEYS})


def _lost_reasoning(index: int) -> RecordError:
    detail = f"messages[{index}]; --keep-reasoning trains on it"
    return RecordError(LOST_REASONING, detail)


def render_record(
    record: Record, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, settings: RenderSettings | None = None
) -> Example:
    """Renders and tokenizes one record of one sequence; for many, keep a ChatRenderer.

    `loss_on`: "assistant", every assistant turn with its end-of-turn token; "last", the last such turn; "all", every
    token but the first, which nothing predicts.

    Raises UserError for a tokenizer without chat template or offsets, RecordError for a record that cannot be masked.
    """
    renderer = ChatRenderer(tokenizer, loss_on, settings)
    (example,) = renderer.tokenize(renderer.render(record))
    return example


def _joined_starts(offsets: NDArray[np.int32], rendering: Rendering) -> list[int]:
    """Starts of labels whose first blanks are in one token with what comes before."""
    text, found = rendering.text, []
    for start, end in rendering.label_spans:
        if 0 < start < end and text[start].isspace():
            first_word = end - len(text[start:end].lstrip())
            is_across = (offsets[:, 0] < start) & (start < offsets[:, 1]) & (offsets[:, 1] <= first_word)
            found += [start] if is_across.any() else []
    return found


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
