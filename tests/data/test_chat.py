"""Label masks. Expected values are the texts of the label tokens, written by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_psft.data.chat import ChatRenderer, render_record
from megatron_psft.data.example import label_runs
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import Record
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.toys import byte_tokenizer, calling, conversation, label_texts

TWO_TURNS = conversation("Hi?", "Yes.", "Why?", "So.")
THOUGHTS = conversation("Hi?", "<think>\nA\n</think>\n\nYes.", "Why?", "<think>\nB\n</think>\n\nSo.")

# Blanks that a template trims, blanks that a prompt ends in, and characters of several bytes.
contents = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), min_size=1).filter(str.strip)


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        (toys.CHATML, TWO_TURNS, ["Yes.<|im_end|>", "So.<|im_end|>"]),
        (toys.CHATML, conversation("Hi?", "Yes.", system="Be brief."), ["Yes.<|im_end|>"]),
        (toys.CHATML, conversation("Hi?", "Yes.", "Why?"), ["Yes.<|im_end|>"]),
        (toys.LLAMA3, TWO_TURNS, ["Yes.<|eot|>", "So.<|eot|>"]),
        (toys.LLAMA3, conversation("Hi?", " \n Yes. \n"), ["Yes.<|eot|>"]),
        (toys.QWEN3, TWO_TURNS, ["Yes.<|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"]),
        (toys.QWEN3, THOUGHTS, ["<think>\nB\n</think>\n\nSo.<|im_end|>"]),
        (toys.R1, conversation("<|assistant|><think>\n?", "Yes."), ["Yes.</s>"]),
        (toys.R1, conversation("Hi?", "<b>Yes."), ["<b>Yes.</s>"]),
        (toys.NEMOTRON, TWO_TURNS, ["</think>Yes.<|im_end|>", "</think>So.<|im_end|>"]),
        (toys.NEMOTRON, conversation("Hi?", "<think>\nA\n</think>Yes."), ["A\n</think>Yes.<|im_end|>"]),
        (toys.QWEN3_WITHOUT_THINKING, TWO_TURNS, ["Yes.<|im_end|>", "So.<|im_end|>"]),
        (toys.QWEN3_WITHOUT_THINKING, THOUGHTS, ["B\n</think>\n\nSo.<|im_end|>"]),
        (toys.GLM, TWO_TURNS, ["Yes.<|user|>", "So.</s>"]),
        (toys.LLAMA2, TWO_TURNS, ["Yes. </s>", "So. </s>"]),
        (toys.NO_GENERATION_PROMPT, TWO_TURNS, ["Yes.<|im_end|>", "So.<|im_end|>"]),
        (toys.TWO_END_TOKENS, TWO_TURNS, ["Yes.<|eot|></s>", "So.<|eot|></s>"]),
        (toys.VICUNA, TWO_TURNS, ["Yes.</s>", "So.</s>"]),
    ],
)
def test_labels_are_the_assistant_turns_with_their_end(template, record, expected):
    assert label_texts(record, byte_tokenizer(template)) == expected


@pytest.mark.parametrize("template", [toys.CHATML, toys.QWEN3, toys.GLM])
def test_loss_on_last_labels_what_loss_on_assistant_labels_last(template):
    tokenizer = byte_tokenizer(template)
    assert label_texts(THOUGHTS, tokenizer, "last") == label_texts(THOUGHTS, tokenizer, "assistant")[-1:]


def test_loss_on_all_labels_every_token_but_the_first():
    example = render_record(conversation("Hi?", "Yes."), byte_tokenizer(toys.GLM), "all")
    assert example.label_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_an_end_of_turn_that_the_template_leaves_out_is_added_in_every_mode():
    tokenizer = byte_tokenizer(toys.GLM)
    for loss_on in ("assistant", "last", "all"):
        tokens = render_record(conversation("Hi?", "Yes."), tokenizer, loss_on).tokens.tolist()
        assert tokenizer.decode(tokens) == "<|user|>\nHi?<|assistant|>\nYes.</s>"


def test_nothing_is_added_to_a_conversation_that_the_user_ends():
    tokenizer = byte_tokenizer(toys.GLM)
    tokens = render_record(conversation("Hi?", "Yes.", "Why?"), tokenizer, "all").tokens.tolist()
    assert tokenizer.decode(tokens) == "<|user|>\nHi?<|assistant|>\nYes.<|user|>\nWhy?"


@given(st.lists(contents, min_size=2, max_size=5))
def test_labels_are_whole_whatever_the_contents(texts):
    answers = texts[1::2]
    tokenizer = byte_tokenizer(toys.CHATML)
    assert label_texts(conversation(*texts), tokenizer) == [answer + "<|im_end|>" for answer in answers]
    tokenizer = byte_tokenizer(toys.LLAMA3)
    assert label_texts(conversation(*texts), tokenizer) == [answer.strip() + "<|eot|>" for answer in answers]


@pytest.mark.parametrize("copied", ["<|im_start|>assistant\n", "Yes.", "<|im_end|>\n", "k7Q"])
def test_a_prompt_that_quotes_the_template_or_the_answer_moves_no_label(copied):
    record = conversation(f"{copied} x", f"{copied} y", f"{copied} z", f"Yes.{copied}")
    expected = [f"{copied} y<|im_end|>", f"Yes.{copied}<|im_end|>"]
    assert label_texts(record, byte_tokenizer(toys.CHATML)) == expected


def test_a_turn_is_labelled_by_the_generation_prompt_of_its_own_place():
    # As in DeepSeek's template: after a tool's output the model goes on without a header.
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
        "{% elif m.role == 'tool' %}<|start|>{{ m.content }}<|eot|>{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    messages = [("user", "Hi?"), ("assistant", "Call."), ("tool", "7"), ("assistant", "So 7.")]
    record = Record(messages=tuple({"role": role, "content": content} for role, content in messages), source="toy:1")
    assert label_texts(record, byte_tokenizer(template)) == ["Call.</s>", "So 7.</s>"]


def test_a_call_is_the_label_of_its_turn_and_the_result_is_none():
    tokenizer = byte_tokenizer(toys.TOOLS)
    assert label_texts(calling(), tokenizer) == ['<call>add{"x": 1}</call><|im_end|>', "So 2.<|im_end|>"]
    assert label_texts(calling("Well."), tokenizer)[0] == 'Well.<call>add{"x": 1}</call><|im_end|>'
    text = tokenizer.decode(render_record(calling(), tokenizer, "all").tokens.tolist())
    assert text.startswith("<|im_start|>system\nadd <|im_end|>\n<|im_start|>user\nHi?<|im_end|>")
    assert "<|im_start|>user\n2<|im_end|>" in text


def test_reasoning_is_a_label_where_the_template_writes_it():
    tokenizer = byte_tokenizer(toys.TOOLS)
    assert label_texts(calling(reasoning_content="Hm."), tokenizer)[1] == "<think>Hm.</think>So 2.<|im_end|>"
    earlier = Record(
        messages=(
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
            *conversation("Why?", "So.").messages,
        ),
        source="toy:1",
    )
    assert label_texts(earlier, tokenizer) == ["So.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "key"),
    [
        (toys.TOOLS.replace("{% if tools %}", "{% if false %}"), "tools"),
        (toys.TOOLS.replace("m.tool_calls", "[]"), "tool_calls"),
        (toys.TOOLS.replace("m.reasoning_content and", "false and"), "reasoning_content"),
        (toys.CHATML, "reasoning_content"),
        ("{% if tools %}{{ raise_exception('no') }}{% endif %}" + toys.TOOLS, "tools"),
    ],
)
def test_what_a_template_leaves_out_is_an_error_and_not_lost(template, key):
    with pytest.raises(RecordError, match=f"the chat template does not render {key}"):
        render_record(calling(reasoning_content="Hm."), byte_tokenizer(template), "assistant")


def test_a_conversation_that_the_assistant_opens_has_labels_from_its_first_turn():
    record = Record(
        messages=({"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi."}), source="toy:1"
    )
    assert label_texts(record, byte_tokenizer(toys.CHATML)) == ["Hello.<|im_end|>"]


def test_a_word_glued_to_the_blank_of_the_generation_prompt_is_a_label():
    tokenizer = byte_tokenizer(toys.VICUNA, merges=[("Ġ", "Y"), ("ĠY", "e"), ("ĠYe", "s")])
    assert label_texts(conversation("Hi?", "Yes."), tokenizer) == [" Yes.</s>"]


def test_offsets_without_their_blanks_lose_no_label():
    plain, trimmed = (byte_tokenizer(toys.CHATML, trim_offsets=trim) for trim in (False, True))
    record = conversation("Hi? ", " \n Yes. \n")
    offsets = trimmed(" a", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[0][0] == offsets[0][1]  # else this tests nothing
    assert label_texts(record, trimmed) == label_texts(record, plain) == [" \n Yes. \n<|im_end|>"]
    assert label_texts(TWO_TURNS, byte_tokenizer(toys.VICUNA, trim_offsets=True)) == ["Yes.</s>", "So.</s>"]


def test_a_header_that_swallows_the_blanks_behind_it_is_no_label():
    swallowing = AddedToken("<|assistant|>", rstrip=True, special=True)
    tokenizer = byte_tokenizer(toys.R1.replace("<think>", ""), special_tokens=["</s>", "<|user|>", swallowing])
    assert label_texts(conversation("Hi?", "\n Yes."), tokenizer) == ["Yes.</s>"]


def test_a_special_token_that_begins_with_another_is_labelled_whole():
    special_tokens = ["<|im_start|>", "<|im_end|>", "<|im_end|>!"]
    tokenizer = byte_tokenizer(toys.CHATML.replace("<|im_end|>", "<|im_end|>!"), special_tokens=special_tokens)
    assert label_texts(TWO_TURNS, tokenizer) == ["Yes.<|im_end|>!", "So.<|im_end|>!"]


@pytest.mark.parametrize(
    ("template", "end"),
    [(toys.CHATML, "<|im_end|>"), (toys.LLAMA3, "<|eot|>"), (toys.GLM, "</s>")],
)
def test_the_prompt_and_the_end_of_turn_enclose_the_labels(template, end):
    renderer = ChatRenderer(byte_tokenizer(template), "last")
    assert renderer.end_of_turn() == end
    record = conversation("Hi?", "Yes.")
    (rendering,) = renderer.render(record)
    prompt = renderer.render_prompt(record.messages[:1])
    ((start, stop),) = rendering.label_spans
    assert (rendering.text[:start], rendering.text[start:stop].endswith(end)) == (prompt, True)


def test_the_start_token_of_the_template_is_the_only_one():
    tokenizer = byte_tokenizer(toys.LLAMA3)
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", start)]
    )
    assert tokenizer("a")["input_ids"][0] == start  # else this tests nothing
    assert render_record(TWO_TURNS, tokenizer, "assistant").tokens.tolist().count(start) == 1


def test_word_level_tokenizers_are_masked_too():
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hi", "yes", "of", "course"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=toys.CHATML)
    example = render_record(conversation("hi", "yes of course"), tokenizer, "assistant")
    assert example.tokens.tolist() == [1, 3, 5, 2, 1, 4, 6, 7, 8, 2]
    assert np.flatnonzero(example.label_mask).tolist() == [6, 7, 8, 9]


def test_no_token_depends_on_the_day():
    template = "\n{{ strftime_now('%A, %d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}" + toys.CHATML
    tokens = render_record(conversation("Hi?", "Yes."), byte_tokenizer(template), "all").tokens.tolist()
    text = byte_tokenizer(template).decode(tokens)
    assert text.startswith("\nFriday, 26 Jul 2024, 2024-07-26<|im_start|>user\nHi?")


def test_label_runs_cover_the_whole_text():
    tokenizer = byte_tokenizer(toys.CHATML)
    example = render_record(conversation("Hi?", "Yes."), tokenizer, "assistant")
    assert label_runs(example, tokenizer) == [
        (False, "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes.<|im_end|>"),
        (False, "\n"),
    ]


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (toys.CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), TWO_TURNS, "writes .* 2 times"),
        (toys.CHATML.replace("{{ m.content }}", ""), TWO_TURNS, "writes .* 0 times"),
        ("{{ messages[-1].content | length }}" + toys.CHATML, TWO_TURNS, "does not follow the generation prompt"),
        (toys.QWEN3.replace("add_generation_prompt", "false"), THOUGHTS, "does not follow the generation prompt ''"),
        (toys.IRREGULAR, TWO_TURNS, r"messages\[3\] does not follow"),
        (toys.CHATML.replace("{{ m.content }}", toys.XS), conversation("Hi?", "x"), "changes what the chat template"),
        (toys.COUNTING, TWO_TURNS, "changes what the chat template writes"),
        (toys.ONLY_TEXT, TWO_TURNS, "no special token ends"),
        (toys.CHATML.replace("<|im_start|>assistant", "<|start|>bot"), TWO_TURNS, "the generation prompt"),
        ("{{ raise_exception('no system turn, please') }}", TWO_TURNS, "no system turn, please"),
        (toys.CHATML.replace("m.role", "m.role + 1"), TWO_TURNS, "refused by the chat template"),
    ],
)
def test_a_record_whose_labels_cannot_be_found_is_refused(template, record, reason):
    with pytest.raises(RecordError, match=reason):
        render_record(record, byte_tokenizer(template), "assistant")


def test_a_tokenizer_without_chat_template_is_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"must have a chat template; give --tokenizer"):
        render_record(TWO_TURNS, byte_tokenizer(None), "assistant")


def test_a_tokenizer_without_offsets_is_refused_with_a_remedy():
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=byte_tokenizer(toys.CHATML).backend_tokenizer, chat_template=toys.CHATML)
    with pytest.raises(UserError, match=r"must be a fast one.*--tokenizer"):
        render_record(TWO_TURNS, slow, "assistant")


@pytest.fixture(scope="session")
def real_tokenizer(real_data: Path):
    loaded: dict[str, PreTrainedTokenizerFast] = {}

    def load(name: str) -> PreTrainedTokenizerFast:
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
        return loaded[name]

    return load


ANSWER = "Ça fait 48/2 = 24 \u20ac \U0001f469\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d.\n"


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("qwen2.5", TWO_TURNS, ["Yes.<|im_end|>", "So.<|im_end|>"]),
        ("qwen2.5", conversation("Hi?", ANSWER), [ANSWER + "<|im_end|>"]),
        ("qwen3", TWO_TURNS, ["Yes.<|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"]),
        ("qwen3", THOUGHTS, ["<think>\nB\n</think>\n\nSo.<|im_end|>"]),
        ("qwen3", conversation("Hi?", ANSWER), ["<think>\n\n</think>\n\n" + ANSWER + "<|im_end|>"]),
        ("llama3", TWO_TURNS, ["Yes.<|eot_id|>", "So.<|eot_id|>"]),
        ("llama3", conversation("Hi?", ANSWER, system="Be brief."), [ANSWER.strip() + "<|eot_id|>"]),
    ],
)
@pytest.mark.slow
def test_real_tokenizers(real_tokenizer, name, record, expected):
    assert label_texts(record, real_tokenizer(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", ['<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>', "So 2.<|im_end|>"]),
        (
            "qwen3",
            [
                '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nSo 2.<|im_end|>",
            ],
        ),
        ("llama3", ['{"name": "add", "parameters": {"x": 1}}<|eot_id|>', "So 2.<|eot_id|>"]),
    ],
)
@pytest.mark.slow
def test_real_tokenizers_label_calls(real_tokenizer, name, expected):
    assert label_texts(calling(), real_tokenizer(name)) == expected


@pytest.mark.slow
def test_qwen3_has_the_reasoning_of_the_last_turns_only(real_tokenizer):
    record = calling(reasoning_content="Hm.")
    assert label_texts(record, real_tokenizer("qwen3"))[1] == "<think>\nHm.\n</think>\n\nSo 2.<|im_end|>"
    record.messages[1]["reasoning_content"] = "Add."
    longer = Record(
        messages=(*record.messages, *conversation("Why?", "So.").messages), tools=record.tools, source="toy:1"
    )
    assert label_texts(longer, real_tokenizer("qwen3")) == ["<think>\n\n</think>\n\nSo.<|im_end|>"]
    first = label_texts(record, real_tokenizer("qwen3"))[0]
    assert first.startswith("<think>\nAdd.\n</think>\n\n<tool_call>")
    with pytest.raises(RecordError, match="the chat template does not render reasoning_content"):
        label_texts(record, real_tokenizer("qwen2.5"))


@pytest.mark.slow
def test_llama3_text_has_one_start_token_and_a_fixed_date(real_tokenizer):
    tokenizer = real_tokenizer("llama3")
    tokens = render_record(TWO_TURNS, tokenizer, "assistant").tokens.tolist()
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(tokens)
