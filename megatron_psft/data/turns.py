"""What a record says of an assistant's turn, and whether a rendering of it still says so.

Templates rewrite turns: they trim them, move reasoning from the content into a block of their own, or leave it out.
Blanks at the ends, and around the marks of reasoning, are the template's affair; everything else is what the user wants
to be learned.
"""

from typing import Literal

from megatron_psft.data.marks import EMPTY_BLOCK, MARK, OPEN_AT_END, OPENING
from megatron_psft.data.messages import Message

Part = Literal["reasoning", "content"]


def missing_part(message: Message, label: str) -> Part | None:
    """What of an assistant's `message` its rendered `label` has not; None if it has all.

    Reasoning under a key of its own must stand there as it is, and so must the content; only where the content itself
    has marks of reasoning the template may change what is around these.
    """
    reasoning = message.get("reasoning_content", "").strip()
    if reasoning:
        found = _find_outside_marks(reasoning, label)
        if found < 0:
            return "reasoning"
        label = f"{label[:found]}\0{label[found + len(reasoning) :]}"  # else an answer is found in its own reasoning
    if any(call["function"]["name"] not in label for call in message.get("tool_calls", ())):
        return "content"
    content = message["content"].strip()
    if content in label and (not reasoning or content in _without_marks(label) or MARK.search(content)):
        return None
    return _missing_piece(content, label)


def _missing_piece(content: str, label: str) -> Part | None:
    """The same for a content that does not stand in the label as it is, piece by piece between marks of reasoning."""
    if not MARK.search(content):
        return "content"
    pieces = MARK.split(content)
    label = _without_marks(label)
    end = len(label)
    for number, piece in reversed(list(enumerate(pieces))):  # the answer first: it may say what the reasoning says
        end = label.rfind(piece, 0, end)
        if end < 0:
            return "content" if number == len(pieces) - 1 else "reasoning"
    return None


def _find_outside_marks(text: str, label: str) -> int:
    """Where `text` stands in the label, but for within a mark; -1 where it does not."""
    return label.find(text) if MARK.search(text) else _without_marks(label).find(text)


def _without_marks(text: str) -> str:
    """The text with other characters for its marks, so that places stay the same."""
    return MARK.sub(lambda mark: "\0" * len(mark[0]), text)


def has_reasoning(message: Message) -> bool:
    """Whether a turn says more than its answer, in the content or beside it."""
    return "reasoning_content" in message or MARK.search(message["content"]) is not None


def skip_empty_block(message: Message, label: str) -> int:
    """Characters of an empty block of reasoning that `label` begins with, if the template and not the user wrote it.

    The label may begin within the block, whose opening is then part of the generation prompt.
    """
    if "reasoning_content" in message or MARK.match(message["content"]):
        return 0
    if (block := EMPTY_BLOCK.match(label)) is None:
        return 0
    content = label.find(message["content"])  # whose own blanks stay
    return min(block.end(), content) if content > 0 else block.end()


def continue_prompt(prompt: str, content: str) -> str | None:
    """What the model writes after a generation prompt to say `content`, whose reasoning the prompt may have opened.

    None after a prompt that has closed its reasoning already.
    """
    if EMPTY_BLOCK.search(prompt[-80:]) and not OPEN_AT_END.search(prompt):
        return None
    content = content.lstrip()
    if OPEN_AT_END.search(prompt) and (opening := OPENING.match(content)):
        return content[opening.end() :]
    return content
