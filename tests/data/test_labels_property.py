"""For random chats with reasoning and calls, the text of the labels is what the chat says, written out by hand."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.records import Record
from tests.data import templates, toys
from tests.data.toys import byte_tokenizer, label_texts_of

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0<>")
# No blanks at the ends, which are the template's affair.
words = st.text(characters, min_size=1, max_size=12).map(str.strip).filter(bool)
words |= st.sampled_from(["0", "10", "0" * 60])  # so that one is often found in another
thoughts = st.one_of(words, st.tuples(words, words).map(" </think> ".join), st.tuples(words, words).map("<think>".join))
calls = st.lists(st.tuples(st.sampled_from(["add", "find"]), st.dictionaries(words, words, max_size=2)), max_size=2)
turns = st.tuples(words, words, st.none() | thoughts, calls)
chats = st.lists(turns, min_size=1, max_size=3)

KEEPS_ALL = toys.TOOLS.replace("m.reasoning_content and loop.last", "m.reasoning_content")


def record_of(chat) -> Record:
    messages = []
    for asked, answer, reasoning, made in chat:
        turn = {"role": "assistant", "content": answer}
        if reasoning is not None:
            turn["reasoning_content"] = reasoning
        if made:
            functions = [{"name": name, "arguments": arguments} for name, arguments in made]
            turn["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        messages += [{"role": "user", "content": asked}, turn]
    return Record(messages=tuple(messages), source="toy:1")


def labels_of(record, tokenizer, **more) -> list[list[str]]:
    renderer = ChatRenderer(tokenizer, "assistant", RenderSettings(**more))
    return [label_texts_of(example, tokenizer) for example in renderer.tokenize(renderer.render(record))]


KEEPS_ALL_TOKENIZER = byte_tokenizer(KEEPS_ALL)
QWEN3_TOKENIZER = templates.QWEN3.tokenizer()
R1_TOKENIZER = templates.R1.tokenizer()


def as_json(arguments) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@given(chats)
@settings(max_examples=60, deadline=None)
def test_a_template_that_keeps_everything_has_it_in_one_sequence(chat):
    def wanted(answer, reasoning, made):
        written = "".join(f"<call>{name}{as_json(arguments)}</call>" for name, arguments in made)
        return ("" if reasoning is None else f"<think>{reasoning}</think>") + answer + written + "<|im_end|>"

    expected = [[wanted(*turn[1:]) for turn in chat]]
    assert labels_of(record_of(chat), KEEPS_ALL_TOKENIZER) == expected
    assert labels_of(record_of(chat), KEEPS_ALL_TOKENIZER, keep_reasoning=True) == expected


def qwen3_text(answer, reasoning, made, *, with_block: bool) -> str:
    block = f"<think>\n{reasoning or ''}\n</think>\n\n" if with_block else ""
    written = "".join(
        f'\n<tool_call>\n{{"name": "{name}", "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in made
    )
    return f"{block}{answer}{written}<|im_end|>"


@given(chats)
@example([("0", "10", "0", []), ("0", "0", None, [])])
@example([("0", "Sum: " + "0" * 60, "0" * 60, [("add", {"a": "0"})]), ("0", "0", "0", [])])
@example([("0", "10", "0" * 60, [("add", {"a": "0" * 60})]), ("0", "0", "0", [])])
@settings(max_examples=60, deadline=None)
def test_qwen3_has_all_reasoning_or_leaves_the_turn_out(chat):
    *earlier, last = [turn[1:] for turn in chat]
    kept = [qwen3_text(*turn, with_block=False) for turn in earlier if turn[1] is None]
    assert labels_of(record_of(chat), QWEN3_TOKENIZER) == [[*kept, qwen3_text(*last, with_block=True)]]
    found = labels_of(record_of(chat), QWEN3_TOKENIZER, keep_reasoning=True)
    if any(turn[1] for turn in earlier):
        assert found == [[qwen3_text(*turn[1:], with_block=True)] for turn in chat]
    else:
        assert found == [[*kept, qwen3_text(*last, with_block=True)]]


@given(st.lists(st.tuples(words, words, thoughts), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_r1_has_all_reasoning_after_its_prompt(chat):
    contents = [(asked, f"<think>\n{reasoning}\n</think>\n\n{answer}") for asked, answer, reasoning in chat]
    record = Record(
        messages=tuple(
            {"role": role, "content": content}
            for turn in contents
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ),
        source="toy:1",
    )
    expected = [[f"{reasoning}\n</think>\n\n{answer}<|end_of_sentence|>"] for _, answer, reasoning in chat]
    assert labels_of(record, R1_TOKENIZER, keep_reasoning=True) == expected
