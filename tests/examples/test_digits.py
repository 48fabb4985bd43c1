"""The records and the reporting of the small models on digits."""

import json
import sys

import pytest

from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "digits"))

import compare
import digits


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> digits.Files:
    return digits.write_data(tmp_path_factory.mktemp("data"), seed=3)


def test_no_held_out_question_is_trained_on(files):
    def questions(path):
        return {record["messages"][0]["content"] for record in digits.read_records(path)}

    assert not questions(files.base) & questions(files.base_held_out)
    assert not questions(files.target) & questions(files.target_held_out)
    assert (len(questions(files.target)), len(questions(files.target_held_out))) == (96, 200)


@pytest.mark.parametrize(
    ("skill", "answer"), [("repeat", "3105"), ("reverse", "5013"), ("sort", "0135"), ("rotate", "1053")]
)
def test_skills(skill, answer):
    assert digits.SKILLS[skill].answer("3105") == answer


def test_answer_is_the_last_number():
    assert digits.final_number("Hmm: 0135. Well: 5310. Now.") == "5310"
    assert digits.final_number("Hmm.") is None


def test_same_seed_same_records(files, tmp_path):
    again = digits.write_data(tmp_path, seed=3)
    assert again.base.read_bytes() == files.base.read_bytes()


def test_tokenizer_cuts_numbers_into_digits(files, tmp_path):
    from transformers import AutoTokenizer

    digits.write_tokenizer(tmp_path / "tokenizer", files)
    digits.write_model_config(tmp_path / "model", tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Sort 3105."))[-5:] == ["3", "1", "0", "5", "."]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == len(tokenizer)


def test_table_columns_line_up():
    text = compare.markdown([["", "SFT"], ["new task", "5"]])
    assert text == "|          | SFT |\n| -------- | --- |\n| new task | 5   |"


def test_plot_is_drawn_from_the_metrics(tmp_path):
    for name in ("sft", "psft"):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "entropy": 1 / step, "nll": 2 / step} for step in (1, 2, 3)]
        lines[1] |= {"valid_nll": 0.5, "valid_entropy": 0.25}
        lines.insert(0, {"step": 0, "valid_nll": 0.75, "valid_entropy": 0.125})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = compare.metrics(tmp_path / "sft")
    assert (run["step"], run["valid_step"], run["valid_entropy"]) == ([1, 2, 3], [0, 2], [0.125, 0.25])
    assert compare.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
