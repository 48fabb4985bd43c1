"""The keys of rows and messages besides those of the formats: which are heeded, which are refused, which are harmless.

A key that changes what is learned must not be dropped in silence. Of a message, every key that is not in these lists is
refused if it has a value. Rows of public sets have many columns that nobody wants read, so of a row only these are
refused: those in its list, misspelt ones, and unknown switches, keyword arguments, masks, and lists of messages.
`--ignore-keys` is the way on. docs/data.md has the lists as a table.
"""

import re
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

from megatron_psft.errors import nearest_name_hint


class KeyGroup(NamedTuple):
    """Keys with one meaning. `text` is what heeded ones do, or what to do in place of refused ones. `of_answer`: they
    are about what is learned, which a prompt says nothing of."""

    names: tuple[str, ...]
    text: str
    of_answer: bool = False


SYSTEM_KEYS = ("system", "system_prompt", "system_message")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
"""Names under which rows and chat templates, some these and some those, have a turn's reasoning; the first is ours."""
LEARN_KEYS = ("weight", "train", "loss", "training", "trainable")
KWARGS_KEY, THINKING_KEY = "chat_template_kwargs", "enable_thinking"

_GIVE_WEIGHT = "give weight 0 to messages that are not to be learned"
_NOT_TEXT = KeyGroup(
    (
        *("images", "image", "img", "image_path", "image_paths", "image_url", "image_urls", "pixel_values"),
        *("videos", "video", "audios", "audio", "input_audio"),
    ),
    "only text is trained on",
)

_REASONING = KeyGroup(
    (*REASONING_KEYS, "thoughts", "think", "cot", "chain_of_thought", "rationale", "scratchpad"),
    "give reasoning as reasoning_content of the assistant's message, a switch as enable_thinking",
    of_answer=True,
)

ROW_HEEDED = (
    KeyGroup(SYSTEM_KEYS, "the system message; one of them, unless they say the same"),
    KeyGroup(("tools",), "functions that may be called, for the chat template"),
    KeyGroup(("advantage",), "weight of the record"),
    KeyGroup((KWARGS_KEY, THINKING_KEY), "variables for the chat template"),
)
ROW_REFUSED = (
    _NOT_TEXT,
    KeyGroup(("functions", "function_call"), "give schemas of functions under tools, calls as tool_calls of a message"),
    KeyGroup(("history",), "give earlier turns as messages"),
    KeyGroup(("documents",), "write them into the messages"),
    _REASONING,
    KeyGroup(
        (
            *("loss_mask", "label_mask", "completion_mask", "assistant_masks", "mask", "input_ids", "attention_mask"),
            *("train_on", "loss_on", "target_turns"),
        ),
        _GIVE_WEIGHT,
        of_answer=True,
    ),
    KeyGroup(LEARN_KEYS[1:], "give them to messages, or leave the row out", of_answer=True),
    KeyGroup(
        ("weight", "weights", "sample_weight", "loss_weight", "loss_scale"), "advantage weighs a record", of_answer=True
    ),
    KeyGroup(("chat_template",), "a run has one template"),
)

MESSAGE_HEEDED = (
    KeyGroup(("role", "content"), "role and text; the text may be a list of parts of type text"),
    KeyGroup(("from", "value"), "the same in ShareGPT's form"),
    KeyGroup(REASONING_KEYS, "the reasoning before the content; one of them, unless they say the same"),
    KeyGroup(("tool_calls",), "calls of functions"),
    KeyGroup(("tool_call_id", "name"), "of a tool's turn, for the chat template"),
    KeyGroup(LEARN_KEYS, "0 or false: no token of this message is a label; 1 or true says nothing; others are refused"),
)
MESSAGE_REFUSED = (
    _NOT_TEXT,
    KeyGroup(("name",), "outside a tool's turn write it into the content"),
    KeyGroup(("function_call",), "give it as tool_calls"),
    KeyGroup(("tools", "functions"), "give them under the row's tools"),
    KeyGroup(("reasoning_details",), "give the text as reasoning_content"),
    KeyGroup(("refusal",), "give it as content"),
    KeyGroup(
        ("loss_scale", "loss_weight", "loss_mask", "mask", "train_detail", "training_detail"), "give weight 0 or 1"
    ),
)

HARMLESS = (
    *("id", "uuid", "guid", "key", "index", "idx", "rank", "turn", "position", "hash", "parent", "children", "split"),
    *("source", "sources", "dataset", "data_source", "origin", "license", "version", "url", "link", "path", "file"),
    *(
        "metadata",
        "meta",
        "extra",
        "extra_info",
        "info",
        "tags",
        "tag",
        "category",
        "categories",
        "labels",
        "annotations",
    ),
    *("model", "generator", "author", "user", "username", "country", "state", "header", "lang", "language", "locale"),
    *("date", "time", "timestamp", "created", "modified", "duration", "latency", "usage", "logprobs", "cost"),
    *("tokens", "token_count", "length", "len", "chars", "words", "rating", "score", "scores", "reward", "quality"),
    *("difficulty", "level", "type", "problem_type", "question_type", "domain", "subject", "topic", "task", "ability"),
    *("reward_model", "emojis", "emoji", "toxicity", "detoxify", "review_result"),
    *("toxic", "redacted", "deleted", "synthetic", "verified", "valid", "correct", "truncated", "finish_reason"),
    *("passed", "success", "successful", "solved", "resolved", "complete", "completed", "finished", "reviewed"),
    *("flagged", "harmful", "safe", "unsafe", "duplicate", "contaminated", "translated", "multi_turn", "multiturn"),
    *("stop_reason", "cache_control", "parallel_tool_calls", "used_in_training", "skip_prompt_formatting"),
)
"""Of rows and messages."""
HARMLESS_STARTS = ("is_", "has_", "was_", "num_", "n_")
HARMLESS_ENDS = (
    *("_id", "_ids", "_index", "_hash", "_at", "_time", "_date", "_count", "_counts", "_tokens", "_length", "_score"),
    *("_scores", "_rating", "_reward", "_url", "_name", "_lang", "_language", "_identifier", "_version", "_source"),
    *("_is_valid", "_is_correct", "_verified", "_correct"),
)

_LEARN_WORDS = frozenset({*LEARN_KEYS, "learn", "learned", "mask", "masks", "masked", "weights", "labels", "trained"})
_FLAG_WORDS = _LEARN_WORDS | {"label", "target", "targets", "learnable", "supervised", "ignore", "ignored"}
"""What is_target or a list under `label` may mean; label_id and target_name are harmless."""
_SWITCHES = frozenset({"true", "false", "yes", "no", "on", "off", "0", "1", "0.0", "1.0"})
_REASONING_WORDS = frozenset({*_REASONING.names, *(f"{name}s" for name in _REASONING.names)})
_SETTING_WORDS = frozenset(HARMLESS) - {"path"} | {
    *("effort", "budget", "mode", "style", "format", "config", "depth", "status", "kind", "prompt", "enabled"),
}
"""Last words of names that are about reasoning and do not hold it, as `reasoning_effort`."""
_NEAR = 0.88  # one letter of eight: "advantages" and "tool", not "system_id"
_LONGEST_KEY = 64  # characters; what is longer is no misspelling, and not kept in the caches below


def _names(groups: Iterable[KeyGroup]) -> frozenset[str]:
    return frozenset(name for group in groups for name in group.names)


_ROW_HEEDED, _MESSAGE_HEEDED = _names(ROW_HEEDED), _names(MESSAGE_HEEDED)


def is_empty(value: object) -> bool:
    """True for what says nothing; empty lists are what columnar files put where a row has none."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def message_key_problem(key: str, value: object) -> str | None:
    """Why a message's key outside of the heeded ones is refused, given its value, which is not empty; None for a
    harmless one."""
    key = key[: _LONGEST_KEY + 1]
    if _is_learn_value(key, value):
        return _refusal("message", key, "is not supported as false, 0 or a mask: give weight 0 or 1")
    return _message_name_problem(key)


@lru_cache(maxsize=4096)
def _message_name_problem(key: str) -> str | None:
    if (text := _find(key, MESSAGE_REFUSED)) is not None:
        return _refusal("message", key, f"is not supported: {text}")
    if _is_harmless(key):
        return None
    return _refusal("message", key, f"is not known{_hint(key, _MESSAGE_HEEDED)}")


def row_key_problem(key: str, value: object, optional: tuple[str, ...], *, is_prompt: bool) -> str | None:
    """Why a row's key outside of its format is refused, given its value, which is not empty; None for a harmless one.
    `optional` are keys of the format that the row might have had. `is_prompt`: nothing of the row is learned."""
    if key in _ROW_HEEDED:
        return None
    key = key[: _LONGEST_KEY + 1]
    problem = _row_name_problem(key, optional, is_prompt)
    if problem is None and not is_prompt and (text := _answer_problem(key, value)):
        problem = _refusal("row", key, f"is not supported: {text}")
    if problem is None and isinstance(value, bool | list | dict) and _is_suspect(key, value, is_prompt):
        problem = _refusal("row", key, f"is not known{_hint(key, {*_ROW_HEEDED, *optional})}")
    return problem


@lru_cache(maxsize=4096)
def _row_name_problem(key: str, optional: tuple[str, ...], is_prompt: bool) -> str | None:
    """Why it is refused whatever its value."""
    if (text := _find(key, (group for group in ROW_REFUSED if not (is_prompt and group.of_answer)))) is not None:
        return _refusal("row", key, f"is not supported: {text}")
    known = [name for name in (*sorted(_ROW_HEEDED), *optional) if _is_near(key, name)]
    if key.lower().startswith("system") and not _is_harmless(key):
        known = known or [SYSTEM_KEYS[0]]
    if known or key.lower().endswith("kwargs"):
        return _refusal("row", key, "is not known" + (f"; did you mean {known[0]}?" if known else ""))
    return None


def _answer_problem(key: str, value: object) -> str | None:
    """What to do in place of a row's key that by its words and value is reasoning, or says what is learned."""
    if _is_reasoning_name(key) and _has_text(value):
        return _REASONING.text
    is_learn_value = isinstance(value, bool | list) and _is_learn_value(key, value)
    return _GIVE_WEIGHT if is_learn_value or _is_learn_switch(key, value) else None


@lru_cache(maxsize=4096)
def _is_reasoning_name(key: str) -> bool:
    words = [word.rstrip("0123456789") for word in _words(key)]
    return not (_REASONING_WORDS.isdisjoint(words) or words[-1] in _SETTING_WORDS or _is_harmless(key))


def _has_text(value: object) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())


def _is_learn_value(key: str, value: object) -> bool:
    """True where a key that is harmless with other values, as `labels` with texts, says with this one what is
    learned."""
    if key.lower() not in HARMLESS or _LEARN_WORDS.isdisjoint(_words(key)):
        return False
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], int | float)
    return isinstance(value, bool | int | float) and not value


def _is_learn_switch(key: str, value: object) -> bool:
    """True for a switch that is written as a number or a text, as `mask_history: 1`, and is about what is learned."""
    if not isinstance(value, str | int | float) or str(value).lower() not in _SWITCHES:
        return False
    name = key.lower()
    is_count = name in HARMLESS or name.startswith(("num_", "n_")) or name.endswith(HARMLESS_ENDS)
    return not is_count and not (_LEARN_WORDS - {"labels", "weights"}).isdisjoint(_words(key))


def _is_suspect(key: str, value: bool | list[object] | dict[object, object], is_prompt: bool) -> bool:
    """True for a value that may be a switch, a mask of what is learned, or messages."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return ("role" in first and "content" in first) or ("from" in first and "value" in first)
    is_mask = not is_prompt and isinstance(first, int | float) and not _FLAG_WORDS.isdisjoint(_words(key))
    return (isinstance(value, bool) or is_mask) and not _is_harmless(key)


def refused_beside(key: str, format_name: str, place: str) -> str:
    """The reason for a key with a text that a format without a place for it would drop; `place` has one."""
    return _refusal("row", key, f"is not read in the format {format_name!r}: write it into {place}")


def _find(key: str, groups: Iterable[KeyGroup]) -> str | None:
    """The text of the group that `key` is in."""
    return next((group.text for group in groups if is_one_of(key, group.names)), None)


@lru_cache(maxsize=4096)
def is_one_of(key: str, names: tuple[str, ...]) -> bool:
    """True where `key` is one of the names, be it in capitals, camelCase, in the plural or with a number."""
    name = "_".join(_words(key)).rstrip("0123456789").rstrip("_")
    return name in names or name.removesuffix("s") in names


def _refusal(where: str, key: str, why: str) -> str:
    way = f"--ignore-keys {shown_key(key)} leaves it out"
    return f"{where} key {shown_key(key)} {why}{' ' if why.endswith('?') else '; '}{way}"


def shown_key(key: str) -> str:
    """A key for an error text: quoted where it is no name, and cut where it is long."""
    return key if key.isidentifier() and len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]!r}"


def _hint(key: str, known: Collection[str]) -> str:
    return nearest_name_hint(key, sorted(known)) if len(key) <= _LONGEST_KEY else ""


def _is_harmless(key: str) -> bool:
    name = key.lower()
    if name in HARMLESS:
        return True
    if name.startswith(HARMLESS_STARTS):
        return _FLAG_WORDS.isdisjoint(_words(key))
    return name.endswith(HARMLESS_ENDS) and _LEARN_WORDS.isdisjoint(_words(key))


def _words(key: str) -> list[str]:
    """Of a name in snake_case, kebab-case or camelCase."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:_LONGEST_KEY].replace("CoT", "Cot"))
    return re.split("[-_ ]", name.lower())


def _is_near(key: str, name: str) -> bool:
    """True where `key` may be meant as `name`: but for case, hyphens and a letter or two they are the same."""
    if len(key) > _LONGEST_KEY:
        return False
    first, second = ("".join(_words(text)) for text in (key, name))
    return SequenceMatcher(None, first, second).ratio() >= _NEAR


def key_table() -> str:
    """The Markdown table of docs/data.md."""
    rows = [("where", "keys", "what they do, or what to do instead")]
    rows += [("---", "---", "---")]
    for use, groups in (
        ("row: heeded", ROW_HEEDED),
        ("row: refused", ROW_REFUSED),
        ("message: heeded", MESSAGE_HEEDED),
        ("message: refused", MESSAGE_REFUSED),
    ):
        rows += [(use, ", ".join(f"`{name}`" for name in group.names), group.text) for group in groups]
    names = [*HARMLESS, *(f"{start}*" for start in HARMLESS_STARTS), *(f"*{end}" for end in HARMLESS_ENDS)]
    rows.append(("harmless", ", ".join(f"`{name}`" for name in names), "of messages; of rows also as true or false"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
