"""The paper's runs as files, and its data preparation on a few records."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from examples.paper import prepare
from megatron_psft.config.paper import EVALUATED_STEPS, RUNS
from megatron_psft.config.resume import settings_of
from megatron_psft.config.schema import parse_config
from tests.support import tiny
from tests.support.cli import REPOSITORY

FOLDER = REPOSITORY / "examples" / "paper"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_papers_settings_and_exports_what_the_paper_evaluates(name):
    config = parse_config(["--data", "t.jsonl", "--save", "run", "--config", str(FOLDER / f"{name}.yaml")])
    settings = settings_of(config)
    assert {field: settings[field] for field in RUNS[name]} == RUNS[name]
    assert EVALUATED_STEPS[name] % config.weights.export_steps == 0


@pytest.fixture
def run(tmp_path, capsys):
    tiny.build_tokenizer(tmp_path / "tokenizer")

    def run(source, *flags):
        argv = [
            "--source",
            source,
            "--tokenizer",
            tmp_path / "tokenizer",
            "--out",
            tmp_path / "new" / "out.jsonl",
            *flags,
        ]
        code = prepare.main([str(word) for word in argv])
        return code, capsys.readouterr()

    run.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    run.out = tmp_path / "new" / "out.jsonl"
    return run


def conversation(question: str, answer: str, system: str = prepare.SYSTEM_PROMPT) -> list[dict]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, (system, question, answer), strict=True)]


def tokens_of(tokenizer, question: str, answer: str) -> tuple[int, int]:
    """Of prompt and answer, by the template alone."""
    turns = conversation(question, answer)
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, whole)]
    return lengths[0], lengths[1] - lengths[0]


def test_what_is_longer_than_either_limit_is_left_out_and_the_order_stays(run, tmp_path):
    """The author's form: prompt, demonstration and what else verl wants. The limits are those of the third record."""
    texts = [("add one", "3"), ("x + y = " * 9, "3"), ("how many lemon", "17 when 42"), ("add one", "zero is 3 " * 9)]
    rows = [
        {
            "data_source": "math",
            "prompt": conversation(question, "", system="another")[:-1],
            "reward_model": {"ground_truth": "3", "style": "rule"},
            "extra_info": {"index": number, "split": "train"},
            "demonstration": answer,
        }
        for number, (question, answer) in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompt_tokens, answer_tokens = tokens_of(run.tokenizer, *texts[2])
    limits = ["--max-prompt-tokens", prompt_tokens, "--max-answer-tokens", answer_tokens]
    code, said = run(tmp_path / "rows.parquet", *limits)
    assert code == 0, said.err
    assert "2 of 4 records" in said.out
    assert (
        f"1 with a prompt of more than {prompt_tokens} tokens, 1 with an answer of more than {answer_tokens}"
        in said.out
    )
    found = [json.loads(line)["messages"] for line in run.out.read_text().splitlines()]
    assert found == [conversation(*texts[0]), conversation(*texts[2])]
    run.out.unlink()
    code, said = run(
        tmp_path / "rows.parquet", "--max-prompt-tokens", prompt_tokens, "--max-answer-tokens", answer_tokens - 1
    )
    assert "1 of 4 records" in said.out


def test_answers_may_stand_under_another_key(run, tmp_path):
    """The form of the set on the hub that the author's was made of."""
    turns = conversation("add one", "3", system="a long one")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": turns[:-1], "target": turns[-1:]}))
    code, said = run(tmp_path / "rows.jsonl", "--completion-key", "target")
    assert code == 0, said.err
    assert json.loads(run.out.read_text()) == {"messages": conversation("add one", "3")}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"prompt": "add one", "completion": "3"}], ["--max-answer-tokens", "1"], "must have a record that is short"),
        ([{"prompt": "add one", "completion": "3"}, {"prompt": "x"}], [], "rows.jsonl:2"),
        ([{"prompt": "add one", "completion": "3"}], ["--max-prompt-tokens", "0"], "must be at least 1"),
        ([], ["--source", "none.jsonl"], "source (none.jsonl) does not exist"),
    ],
    ids=["all too long", "bad record", "no tokens", "no file"],
)
def test_a_mistake_writes_nothing(run, tmp_path, rows, flags, message):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = run(tmp_path / "rows.jsonl", *flags)
    assert code == 2
    assert said.err.startswith("error: ")
    assert message in said.err
    assert not run.out.exists()
