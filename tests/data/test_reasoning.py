"""Reasoning is a label, or the turn is none and is counted, or the record is bad; never trained around in silence."""

import json

import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import Record
from megatron_psft.errors import UserError
from tests.data import templates, toys
from tests.data.cached import build
from tests.data.toys import byte_tokenizer, conversation, label_texts, label_texts_of

LOST = "drops the reasoning of a turn that is to be learned"
CHANGED = "changes what a turn says"


def thought(reasoning: str, answer: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def sequences(record: Record, tokenizer, loss_on="assistant", **settings) -> list[list[str]]:
    renderer = ChatRenderer(tokenizer, loss_on, RenderSettings(keep_reasoning=True, **settings))
    return [label_texts_of(example, tokenizer) for example in renderer.tokenize(renderer.render(record))]


def without_labels(record: Record, *turns: int) -> Record:
    return Record(messages=record.messages, source=record.source, unlearned=frozenset(turns))


@pytest.mark.parametrize(
    ("template", "record", "error"),
    [
        (templates.R1, conversation("Hi?", thought("A", "Yes.")), LOST),
        (templates.R1, conversation("Hi?", thought("4", "4")), LOST),  # the answer says what the reasoning says
        (templates.R1, conversation("Hi?", "So.</think>Yes."), LOST),  # as sampled after a prompt with <think>
        (templates.QWEN3, conversation("Hi?", thought("A", "Yes."), "Why?"), LOST),
        (templates.QWEN3, conversation("Hi?", thought("The tag </think> ends it.", "Yes.")), LOST),
        (templates.QWEN3, conversation("Hi?", "Well. " + thought("A", "Yes.")), LOST),
        (templates.QWEN3, without_labels(conversation("Hi?", thought("A", "Yes."), "Why?", "So."), 3), LOST),
        (templates.QWEN3, without_labels(conversation("Hi?", thought("A", "Yes."), "Why?", "So."), 1), None),
        (templates.GLM, conversation("Hi?", thought("a</think>b", "Yes.")), LOST),
    ],
)
def test_a_record_whose_last_turn_loses_its_reasoning_is_refused(template, record, error):
    if error is None:
        assert label_texts(record, template.tokenizer())
        return
    for loss_on in ("assistant", "last", "all"):
        if loss_on == "assistant" or not record.unlearned:
            with pytest.raises(RecordError, match=error):
                label_texts(record, template.tokenizer(), loss_on)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("template", [templates.QWEN3, templates.R1])
def test_reasoning_that_never_ends_is_refused_where_the_template_deals_with_reasoning(template, loss_on):
    record = conversation("Hi?", "Yes.", "Why?", "<think>\nBecause")
    with pytest.raises(RecordError, match=r"opens <think> and never closes it \(messages\[3\]\)"):
        label_texts(record, template.tokenizer(), loss_on)
    assert label_texts(without_labels(record, 3), template.tokenizer())
    assert "<think>\nBecause" in label_texts(record, templates.CHATML.tokenizer(), loss_on)[-1]
    other = conversation("Hi?", "[THINK]Because")  # a mark that this template knows nothing of
    assert "[THINK]Because" in label_texts(other, template.tokenizer(), loss_on)[-1]


NO_TAGS = toys.CHATML.replace("{{ m.content }}", "{{ m.content | striptags }}")


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize(("template", "answer"), [(NO_TAGS, "a <b>bold</b> word"), (NO_TAGS, "a  b")])
def test_a_record_whose_content_is_changed_is_refused(template, answer, loss_on):
    with pytest.raises(RecordError, match=CHANGED):
        label_texts(conversation("Hi?", answer), byte_tokenizer(template), loss_on)
    assert "Yes." in label_texts(conversation("Hi?", "Yes."), byte_tokenizer(template), loss_on)[0]


def test_contents_beside_a_call_that_the_template_drops_are_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    record = Record(
        messages=(
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Let me add.", "tool_calls": [call]},
        ),
        source="toy:1",
    )
    with pytest.raises(RecordError, match=CHANGED):
        label_texts(record, templates.LLAMA3.tokenizer())
    assert "Let me add." in label_texts(record, templates.QWEN25.tokenizer())[0]


@pytest.mark.parametrize("reasoning", ["final", "a", "Well, I think so."])
def test_reasoning_is_not_found_in_what_the_template_writes_itself(reasoning):
    turns = conversation("Hi?", "Yes.", "Why?", "So.").messages
    record = Record(messages=(turns[0], {**turns[1], "reasoning_content": reasoning}, *turns[2:]), source="toy:1")
    assert label_texts(record, templates.GPT_OSS.tokenizer()) == ["<|channel|>final<|message|>So.<|return|>"]


@pytest.mark.parametrize("name", ["QWEN3", "GLM"])
def test_reasoning_may_speak_of_its_own_mark(name):
    published = getattr(templates, name)
    reasoning = "The tag </think> ends it."
    record = Record(
        messages=(
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": reasoning},
        ),
        source="toy:1",
    )
    assert reasoning in label_texts(record, published.tokenizer())[0]


def test_loss_on_all_has_no_turn_that_loses_its_reasoning_and_none_that_is_not_to_be_learned():
    tokenizer = templates.QWEN3.tokenizer()
    record = conversation("Hi?", thought("A", "Yes."), "Why?", "So.", "Oh?", "No.")
    texts = label_texts(without_labels(record, 3), tokenizer, "all")
    start, end = "<|im_start|>assistant\n", "<|im_end|>"
    assert [text[-len(start) :] for text in texts[:2]] == [start, start]
    assert "Yes." not in "".join(texts)
    assert "So." not in "".join(texts)
    assert texts[-1].endswith(f"{start}<think>\n\n</think>\n\nNo.{end}\n")


def test_a_kept_turn_follows_what_the_model_sees_when_it_writes_it():
    tokenizer = templates.QWEN3.tokenizer()
    record = conversation("Hi?", thought("A", "Yes."), "Why?", thought("B", "So."))
    renderer = ChatRenderer(tokenizer, "assistant", RenderSettings(keep_reasoning=True))
    for index, rendering in zip((1, 3), renderer.render(record), strict=True):
        ((start, _),) = rendering.label_spans
        assert rendering.text[:start] == renderer.render_prompt(record.messages[:index])
    assert "A" not in rendering.text


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["Hi?", "So.</think>Yes."], [["So.</think>Yes.<|end_of_sentence|>"]]),
        (["Hi?", thought("A", "Yes.")], [["A\n</think>\n\nYes.<|end_of_sentence|>"]]),
        (
            ["Hi?", "Yes.", "Why?", thought("A", "So.")],
            [["Yes.<|end_of_sentence|>", "A\n</think>\n\nSo.<|end_of_sentence|>"]],
        ),
    ],
)
def test_what_r1s_template_drops_stands_after_the_generation_prompt(contents, expected):
    tokenizer = templates.R1.tokenizer()
    assert sequences(conversation(*contents), tokenizer) == expected


def test_a_call_after_kept_reasoning_is_a_label():
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    record = Record(
        messages=(
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": thought("A", "Well."), "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "So 2."},
        ),
        source="toy:1",
    )
    written = '<|tool_call_begin|>add\n```json\n{"x": 1}\n```<|tool_call_end|><|end_of_sentence|>'
    (first, *_), *rest = sequences(record, templates.R1.tokenizer())
    assert first == "A\n</think>\n\nWell." + written
    assert rest == [["So 2.<|end_of_sentence|>"]]


def test_reasoning_that_the_prompt_has_closed_cannot_be_kept():
    closed = templates.R1._replace(template=templates.R1.template.replace("<think>\n{%", "<think>\n\n</think>\n\n{%"))
    with pytest.raises(RecordError, match=LOST):
        sequences(conversation("Hi?", thought("A", "Yes.")), closed.tokenizer())


def test_turns_that_are_not_to_be_learned_get_no_sequence():
    tokenizer = templates.QWEN3.tokenizer()
    record = conversation("Hi?", thought("A", "Yes."), "Why?", thought("B", "So."), "Oh?", thought("C", "No."))
    assert len(sequences(record, tokenizer)) == 3
    assert sequences(without_labels(record, 1), tokenizer) == [
        [thought("B", "So.") + "<|im_end|>"],
        [thought("C", "No.") + "<|im_end|>"],
    ]
    assert sequences(record, tokenizer, "last") == [[thought("C", "No.") + "<|im_end|>"]]


def test_a_users_own_empty_block_is_a_label():
    record = conversation("Hi? /no_think", "<think>\n\n</think>\n\nYes.")
    tokenizer = templates.QWEN3.tokenizer()
    renderer = ChatRenderer(tokenizer, "assistant", RenderSettings(loss_on_empty_think=False))
    (example,) = renderer.tokenize(renderer.render(record))
    assert label_texts_of(example, tokenizer) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]


@pytest.fixture
def traces(tmp_path):
    """A row with reasoning in two turns, one with it in the last, one without, and one that two turns lose."""
    rows = [
        ["Hi?", thought("A", "Yes."), "Why?", thought("B", "So.")],
        ["Hi?", "Yes.", "Why?", thought("B", "So.")],
        ["Hi?", "Yes."],
        ["Hi?", thought("A", "Yes."), "Why?", thought("B", "So."), "Oh?", "No."],
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(json.dumps({"messages": list(conversation(*row).messages)}) for row in rows))
    return path


def rows_of(dataset: TokenizedDataset) -> list[str]:
    return [dataset.location(index).rpartition(":")[2] for index in range(len(dataset))]


def test_the_table_counts_turns_that_are_no_labels(traces):
    statistics = build(traces, templates.QWEN3.tokenizer()).statistics()
    assert (statistics.records, statistics.notes.without_reasoning) == (4, 3)
    assert "assistant turns that are no labels, as the chat template drops their reasoning" in str(statistics)
    assert "(--keep-reasoning trains on them): 3" in str(statistics)
    assert "no labels" not in str(build(traces, templates.CHATML.tokenizer()).statistics())


def test_sequences_of_a_record_share_its_place(traces):
    dataset = build(traces, templates.QWEN3.tokenizer(), keep_reasoning=True)
    assert rows_of(dataset) == ["1", "1", "2", "3", "4", "4", "4"]
    assert dataset.statistics().notes.extra_sequences == 3
    assert "need their own to keep their reasoning: 3" in str(dataset.statistics())
    # Again, from the cache, and without the flag from another folder of it.
    assert rows_of(build(traces, templates.QWEN3.tokenizer(), keep_reasoning=True)) == rows_of(dataset)
    assert len(build(traces, templates.QWEN3.tokenizer())) == 4


def test_an_advantage_is_that_of_all_sequences(traces):
    rows = [{**json.loads(line), "advantage": 0.5} for line in traces.read_text().splitlines()]
    traces.write_text("\n".join(map(json.dumps, rows)))
    dataset = build(traces, templates.QWEN3.tokenizer(), keep_reasoning=True)
    assert [dataset[index].advantage for index in range(len(dataset))] == [0.5] * 7


def test_bad_records_are_counted_beside_records_and_not_beside_sequences(traces):
    traces.write_text(traces.read_text() + "\n{")
    with pytest.raises(UserError, match="1 of 5 records is bad"):
        build(traces, templates.QWEN3.tokenizer(), keep_reasoning=True)


def test_a_side_of_a_pair_stays_one_sequence(tmp_path):
    path = tmp_path / "pairs.jsonl"
    config = DataConfig(data=(str(path),), data_cache_dir=str(tmp_path / "cache"), keep_reasoning=True)
    sides = {
        side: list(conversation("Hi?", thought("A", end)).messages)
        for side, end in (("chosen", "4"), ("rejected", "5"))
    }

    def read(published: templates.Published) -> TokenizedDataset:
        tokenizer = published.tokenizer()
        return build_dataset(config.data, tokenizer, config, seed=0, show_progress=False, are_pairs=True, field="data")

    path.write_text(json.dumps(sides))
    tokenizer = templates.R1.tokenizer()
    texts = [label_texts_of(side, tokenizer) for side in read(templates.R1)[0].sequences]
    assert texts == [[f"A\n</think>\n\n{end}<|end_of_sentence|>"] for end in "45"]
    more = [*sides["chosen"], *conversation("Why?", thought("B", "So.")).messages]
    path.write_text(json.dumps({"chosen": more, "rejected": sides["rejected"]}))
    with pytest.raises(UserError, match="a side of a preference pair that needs several sequences"):
        read(templates.QWEN3)


@pytest.mark.parametrize("setting", [{"keep_reasoning": True}, {"loss_on_empty_think": False}])
def test_settings_that_loss_on_all_has_no_use_for_are_refused(setting):
    with pytest.raises(UserError, match="needs loss_on assistant or last"):
        DataConfig(data=("x",), loss_on="all", **setting)
