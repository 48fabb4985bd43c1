"""The marks around reasoning that stands in a text, as models and chat templates write them."""

import re
from typing import NamedTuple

_NAMES = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_OPEN, _CLOSE = rf"(?:<{_NAMES}>|\[THINK\]|◁think▷)", rf"(?:</{_NAMES}>|\[/THINK\]|◁/think▷)"

MARK = re.compile(rf"\s*(?:{_OPEN}|{_CLOSE})\s*")
OPENING = re.compile(rf"\s*{_OPEN}\s*")
CLOSING = re.compile(rf"\s*{_CLOSE}\s*")
OPEN_AT_END = re.compile(rf"{_OPEN}\s*$")
EMPTY_BLOCK = re.compile(rf"\s*{_OPEN}?\s*{_CLOSE}\s*")


class Split(NamedTuple):
    """A content that has reasoning before its answer."""

    reasoning: str
    answer: str
    is_opened: bool
    """False where the content has the closing mark only, as is sampled after a prompt that has opened the block."""


def split_content(content: str) -> Split | None:
    """The reasoning that a content begins with and the answer after it; None where no closing mark says so."""
    opening = OPENING.match(content)
    start = opening.end() if opening else 0
    if (closing := CLOSING.search(content, start)) is None:
        return None
    return Split(content[start : closing.start()], content[closing.end() :], opening is not None)


def unclosed_mark(content: str) -> str | None:
    """The mark with which a content begins reasoning that it never ends; None for all others."""
    opening = OPENING.match(content)
    return opening[0].strip() if opening and not CLOSING.search(content) else None


def closing_of(mark: str) -> str:
    """The mark that ends what an opening `mark` begins."""
    return f"{mark[0]}/{mark[1:]}"
