"""Plain texts as records: whose every token is a label, between the tokens that the tokenizer puts around a text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_psft.cli.data import main
from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.pairs import parse_pair
from megatron_psft.data.records import Record
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.cached import build
from tests.data.spelled import RIGHT, USER, good, reason

TEXTS = ("So it is.", " \n", "two  blanks\n\nand 24 clips, don't\tthey?\n", "你好 é 😀")
LLAMA3_BEGIN, LLAMA3_END = "<|begin_of_text|>", "<|eot_id|>"


def toy(single: str = "$A", **changes: object) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that puts around a text what `single` says."""
    tokenizer = toys.byte_tokenizer(None, **changes)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<|user|>")]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast, **settings: object) -> list[int]:
    """What is trained on; all but the first token are labels."""
    renderer = ChatRenderer(tokenizer, "all", RenderSettings(**settings))
    (example,) = renderer.tokenize(renderer.render(Record(text=text, source="toy:1")))
    assert example.label_mask.tolist() == [False, *[True] * (len(example.tokens) - 1)]
    assert example.tokens.dtype == np.int32
    return example.tokens.tolist()


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("single", ["$A", "<s> $A", "<|user|> <s> $A", "<s> $A </s>"])
def test_the_tokens_are_the_tokenizer_s_own_with_one_end_of_text(text, single):
    tokenizer = toy(single)
    own = tokenizer(text)["input_ids"]
    end = [] if "</s>" in single else [tokenizer.eos_token_id]
    assert tokens_of(text, tokenizer) == own + end


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_neither_begin_nor_end_comes_twice(single):
    tokenizer = toy(single)
    wanted = tokens_of("Hi", tokenizer)
    assert wanted == tokenizer("<s>Hi</s>", add_special_tokens=False)["input_ids"]
    for text in ("<s>Hi", "Hi</s>", "<s>Hi</s>"):
        assert tokens_of(text, tokenizer) == wanted
    inside = tokens_of("Hi</s>Hi", tokenizer)
    assert inside.count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_without_an_end_of_text_adds_none():
    tokenizer = toy(eos_token=None)
    assert tokens_of("Hi", tokenizer) == tokenizer("Hi")["input_ids"]


def test_padding_of_a_tokenizer_s_file_is_not_taken_for_its_own_tokens():
    tokenizer = toy("<s> $A")
    wanted = tokens_of("Hi", tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=tokenizer.eos_token_id, pad_token="</s>")
    assert tokens_of("Hi", tokenizer) == wanted


def test_special_tokens_in_a_text_are_counted_or_stay_text():
    tokenizer = toy("<s> $A")
    renderer = ChatRenderer(tokenizer, "all")
    (rendering,) = renderer.render(Record(text="a</s>", source="toy:1"))
    assert rendering.notes.special_tokens == 1
    plain = tokens_of("a</s>", tokenizer, split_special_tokens=True)
    assert plain[:1] + plain[-1:] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in plain[:-1]
    assert tokenizer.decode(plain[1:-1]) == "a</s>"


@pytest.mark.parametrize(("name", "begin"), [("llama3", LLAMA3_BEGIN), ("qwen2.5", ""), ("qwen3", "")])
@pytest.mark.slow
def test_real_tokenizers(real_data, name, begin):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    before = [tokenizer.convert_tokens_to_ids(begin)] if begin else []
    for text in TEXTS:
        own = tokenizer(text)["input_ids"]
        assert own[: len(before)] == before
        assert tokens_of(text, tokenizer) == [*own, tokenizer.eos_token_id]
        assert tokens_of(f"{begin}{text}{tokenizer.eos_token}", tokenizer) == [*own, tokenizer.eos_token_id]


def test_texts_train_without_a_chat_template_and_are_cut_like_other_records(tmp_path):
    data = write(tmp_path / "a.jsonl", {"text": "x" * 20, "advantage": 0.5}, {"text": "Hi", "url": "https://x.org"})
    for overlong, lengths in (("truncate", [9, 4]), ("drop", [4])):
        dataset = build(data, toy("<s> $A"), loss_on="all", seq_length=9, overlong=overlong)
        assert [len(example.tokens) for example in dataset] == lengths
    with pytest.raises(UserError, match=r"no record of more than seq_length \(9\) tokens.*a.jsonl:1 \(22 tokens\)"):
        build(data, toy("<s> $A"), loss_on="all", seq_length=9)
    first, second = build(data, toy("<s> $A"), loss_on="all")
    assert (first.advantage, second.advantage) == (0.5, 1)
    assert first.label_mask.sum() == 21


def test_a_file_may_mix_texts_and_conversations(tmp_path):
    data = write(tmp_path / "a.jsonl", {"text": "Hi"}, {"messages": [USER, RIGHT], "text": "other"})
    tokenizer = toys.byte_tokenizer(toys.CHATML)
    text, chat = build(data, tokenizer, loss_on="all")
    assert text.tokens.tolist() == tokenizer("Hi</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(chat.tokens.tolist()).startswith("<|im_start|>user\n2+2?<|im_end|>")
    with pytest.raises(UserError, match="must have a chat template"):
        build(data, toy(), loss_on="all")


def test_without_loss_on_all_texts_are_one_line_or_can_be_skipped(tmp_path):
    data = write(tmp_path / "a.jsonl", {"messages": [USER, RIGHT]}, {"text": "Hi"}, {"text": "Hey"})
    with pytest.raises(UserError) as error:
        build(data)
    assert str(error.value) == (
        "data must hold conversations only with loss_on assistant or last, found 2 plain texts in 3 records, the first "
        f"is {data}:2; train on every token of both with --loss-on all, or remove them"
    )
    assert build(data, skip_bad_records=True).statistics().dropped == {
        "bad: plain text is trained on with --loss-on all only": 2
    }
    assert len(build(data, loss_on="all")) == 3  # in the same cache


def test_the_command_shows_them_and_ends_with_2_where_they_are_refused(tmp_path, capsys):
    toy("<s> $A").save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", tmp_path / "tokenizer", "--data", write(tmp_path / "a.jsonl", {"text": "Hi"})]
    flags += ["--data-cache-dir", tmp_path / "cache", "--global-batch-size", "1", "--loss-on"]
    assert main([str(flag) for flag in (*flags, "all")]) == 0
    assert "record of 4 tokens, 3 labels\n<s>⟦Hi</s>⟧\n" in capsys.readouterr().out
    toys.byte_tokenizer(toys.CHATML).save_pretrained(tmp_path / "tokenizer")
    assert main([str(flag) for flag in (*flags, "last")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data must hold conversations only")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": " \n"}, "empty content"),
        ({"text": ["a"]}, "wrong type"),
        ({"text": "a\0b"}, "NUL character"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"text": "a", "advantage": "high"}, "wrong type"),
        ({"text": "a", "weight": 2.0}, "row key weight is not supported: advantage weighs a record"),
        ({"text": "a", "prompt": "b"}, "row key prompt is not read in the format 'text': write it into text"),
        ({"text": "a", "prompt": [USER]}, "row key prompt is not read"),
        ({"text": "a", "system": "b"}, "row key system is not read"),
        ({"text": "a", "tools": [{"name": "f"}]}, "row key tools is not read"),
        ({"text": "a", "enable_thinking": False}, "row key enable_thinking is not read"),
        ({"text": "a", "images": ["b.png"]}, "row key images is not supported"),
    ],
)
def test_what_a_text_cannot_have_is_refused_by_name(row, part):
    assert reason(row, takes_text=True).startswith(part)


def test_keys_of_public_sets_of_texts_are_read_over_and_others_can_be_ignored():
    row = {"text": "a", "meta": {"set": "b"}, "url": "c", "timestamp": "d", "language_score": 0.9, "title": "e"}
    assert good(row, takes_text=True) == Record(text="a", source="a.jsonl:1")
    ignored = good({"text": "a", "prompt": "b"}, takes_text=True, ignored=("prompt",))
    assert ignored == Record(text="a", source="a.jsonl:1")


def test_a_system_prompt_has_no_place_in_a_text():
    assert "--system-prompt" in reason({"text": "a"}, takes_text=True, system_prompt="Be brief.")


def test_a_text_is_no_preference_pair():
    bad = parse_pair(Row(source="a.jsonl:1", value={"text": "a"}), RecordKeys(are_pairs=True))
    assert isinstance(bad, BadRecord)
    assert bad.reason == "no preference pair"
