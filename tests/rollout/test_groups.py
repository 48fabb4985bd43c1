"""What becomes of the answers to one prompt."""

import pytest

from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.rollout.groups import GroupRecords, Tally
from megatron_psft.rollout.prompts import Prompt
from megatron_psft.rollout.rewards import ExactVerifier
from megatron_psft.rollout.sampling import Answer
from tests.data import toys


def group_of(answers: list[Answer], template: str, *, keep_reasoning: bool = False) -> tuple[list[dict], Tally]:
    """The records of made-up answers to "Hi?" under a template."""
    prompt = Prompt(messages=({"role": "user", "content": "Hi?"},), answer="Yes.", source="toy:1")
    settings = RenderSettings(keep_reasoning=keep_reasoning)
    renderer = ChatRenderer(toys.byte_tokenizer(template), "last", settings)
    records = GroupRecords(verifier=ExactVerifier(), renderer=renderer, advantage="grpo", keep_flat_groups=True)
    return list(records.of(prompt, answers)), records.tally


def answer_of(text: str, template: str, pieces: list[str]) -> Answer:
    tokenizer = toys.byte_tokenizer(template)
    prompt = ChatRenderer(tokenizer, "last").render_prompt([{"role": "user", "content": "Hi?"}])
    tokens = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    prompt_tokens = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return Answer(text=text, prompt_tokens=prompt_tokens, tokens=tuple(tokens), is_finished=True)


def test_answers_that_training_reads_otherwise_are_counted():
    plain = answer_of("Yes.", toys.CHATML, ["Yes.", "<|im_end|>"])
    other_end = answer_of("No.", toys.CHATML, ["No.", "<|im_start|>"])
    records, tally = group_of([plain, other_end], toys.CHATML)
    assert (len(records), tally.other_tokens) == (2, 1)
    # R1's template opens the answer with <think> when it asks, and takes the thoughts out of what was answered.
    thought = answer_of("So.</think>Yes.", toys.R1, ["So.</think>Yes.", "</s>"])
    unthought = answer_of("Yes.", toys.R1, ["Yes.", "</s>"])
    records, tally = group_of([thought, unthought], toys.R1)
    assert [record["messages"][1]["content"] for record in records] == ["Yes."]
    assert (tally.other_tokens, tally.left_out) == (1, {"without reasoning in training; see --keep-reasoning": 1})
    records, tally = group_of([thought, unthought], toys.R1, keep_reasoning=True)
    assert (len(records), tally.other_tokens) == (2, 1)


def test_empty_answers_are_left_out():
    empty, full = (answer_of(text, toys.CHATML, [text, "<|im_end|>"]) for text in (" ", "Yes."))
    records, tally = group_of([empty, full], toys.CHATML)
    assert [record["messages"][1]["content"] for record in records] == ["Yes."]
    assert tally.left_out == {"empty or refused by the chat template": 1}
    assert records[0]["advantage"] == pytest.approx(0.5 / (0.5**0.5 + 1e-6))  # of 0 and 1: the empty one counts


def test_a_record_keeps_the_variables_that_its_prompt_was_asked_with():
    answer = answer_of("Yes.", toys.CHATML, ["Yes.", "<|im_end|>"])
    prompt = Prompt(
        messages=({"role": "user", "content": "Hi?"},), answer="Yes.", source="toy:1", template_kwargs={"level": 2}
    )
    renderer = ChatRenderer(toys.byte_tokenizer("{{ level }}" + toys.CHATML), "last")
    records = GroupRecords(verifier=ExactVerifier(), renderer=renderer, advantage="grpo", keep_flat_groups=True)
    (row,) = records.of(prompt, [answer])
    assert row["chat_template_kwargs"] == {"level": 2}
    assert renderer.render_prompt(prompt.messages, prompt.template_kwargs).startswith("2<|im_start|>")
