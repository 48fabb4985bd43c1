"""The comparison through its command line, of made-up results and of tiny models."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_psft.cli.compare import main
from megatron_psft.evaluation.results import CORRECT, Estimate, Generation, ResultsFolder, TaskResult, summarize
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit


def answers(*rewards: list[float], first: int = 0, right: str = "so 3", wrong: str = "no") -> list[Generation]:
    """Checked answers to questions numbered from `first`, a list of rewards to each."""
    return [
        Generation(
            question=question,
            sample=sample,
            prompt=[{"role": "user", "content": f"what is <{first + question}>?"}],
            answer="3",
            text=right if reward else wrong,
            scores={CORRECT: reward},
            tokens=2,
            is_finished=True,
        )
        for question, group in enumerate(rewards)
        for sample, reward in enumerate(group)
    ]


def write_results(path: Path, tasks: dict[str, list[Generation]], **settings) -> Path:
    folder = ResultsFolder(path)
    folder.begin({"model": path.name, "seed": 1, **settings})
    for name, generations in tasks.items():
        folder.write_generations(name, generations)
        folder.add_results({name: summarize(f"{name}.jsonl", generations)})
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on the folders `first` and `second`. Returns how it ended, and what was written."""

    def run(*flags: str | Path) -> tuple[Exit, str]:
        argv = ["--first", tmp_path / "first", "--second", tmp_path / "second", "--out", tmp_path / "out", *flags]
        exit = Exit(main([str(value) for value in argv]), *capsys.readouterr())
        report = tmp_path / "out" / "compare.md"
        return exit, report.read_text(encoding="utf-8") if report.exists() else ""

    return run


def assert_refused(exit: Exit, message: str) -> None:
    assert exit.code == 2
    assert exit.err.startswith("error: ")
    assert message in exit.err
    assert exit.err.count("\n") == 1


def row(text: str, task: str, metric: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {task} | {metric} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_differences_are_taken_question_by_question(run, tmp_path):
    write_results(tmp_path / "first", {"toy": answers([1, 0], [0, 0], [1, 1], [0, 0])})
    write_results(tmp_path / "second", {"toy": answers([1, 1], [1, 0], [1, 0], [0, 0])})
    exit, report = run()
    assert exit.code == 0, exit.err
    # Differences are 1/2, 1/2, -1/2, 0: their mean 1/8, their squared distances from it sum to 11/16.
    margin = 1.96 * math.sqrt(11 / 16 / 3 / 4)
    interval = f"{0.125 - margin:+.4f} to {0.125 + margin:+.4f}"
    assert row(exit.out, "toy", "mean@2") == ["4", "0.3750", "0.5000", "+0.1250", interval, "2", "1", "1"]
    # Of two draws of two, the second fails on the last question only, the first on two.
    interval = f"{0.25 - 1.96 * 0.25:+.4f} to {0.25 + 1.96 * 0.25:+.4f}"
    assert row(report, "toy", "pass@2") == ["4", "0.5000", "0.7500", "+0.2500", interval, "1", "0", "3"]


def test_questions_are_matched_by_what_they_ask(run, tmp_path):
    """Other numbers of answers, and a first question that only one side has."""
    write_results(tmp_path / "first", {"toy": answers([1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])})
    write_results(tmp_path / "second", {"toy": answers([1, 0], [1, 1], first=1)})
    _, report = run()
    assert row(report, "toy", "mean@2 and mean@4")[:4] == ["2", "0.5000", "0.7500", "+0.2500"]
    assert row(report, "toy", "pass@2")[:4] == ["2", "0.5000", "1.0000", "+0.5000"]
    assert "pass@4" not in report


def test_system_messages_and_templates_are_each_sides_own(run, tmp_path):
    for name in ("first", "second"):
        system = {"role": "system", "content": name}
        maths = [replace(answer, prompt=[system, *answer.prompt]) for answer in answers([1], [0])]
        harness = [replace(answer, prompt=f"<{name}> what?") for answer in answers([1], [0], [0])]
        write_results(tmp_path / name, {"maths": maths, "harness": harness})
    _, report = run()
    assert row(report, "maths", "mean@1")[0] == "2"
    assert row(report, "harness", "mean@1")[0] == "3"


def test_settings_that_differ_are_shown(run, tmp_path):
    write_results(tmp_path / "first", {"toy": answers([1, 0])}, temperature=1.0)
    write_results(tmp_path / "second", {"toy": answers([1, 1])}, temperature=0.6)
    _, report = run()
    assert "| temperature | 1.0 | 0.6 |" in report
    assert "| model | first | second |" in report
    assert "| seed |" not in report


def test_examples_are_of_questions_won_and_lost(run, tmp_path):
    text = {"right": "a\n\nb <3>", "wrong": "0123456789"}
    write_results(tmp_path / "first", {"toy": answers([0, 0], [1, 0], [1, 1], [0, 1], **text)})
    write_results(tmp_path / "second", {"toy": answers([1, 1], [1, 1], [1, 0], [0, 1], **text)})
    _, report = run("--examples", "1", "--max-characters", "8")
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert titles == ["## toy, question 1: correct +1.0000", "## toy, question 3: correct -0.5000"]
    assert "<pre>what is &lt;0&gt;?</pre>" in report
    won = "<td>correct 0<pre>... 23456789</pre></td><td>correct 1<pre>a&#10;&#10;b &lt;3&gt;</pre></td>"
    lost = "<td>correct 1<pre>a&#10;&#10;b &lt;3&gt;</pre></td><td>correct 0<pre>... 23456789</pre></td>"
    assert report.index(won) < report.index(lost)
    _, report = run("--examples", "0")
    assert "## " not in report.replace("# First", "")


def test_equal_answers_are_shown_where_nothing_was_won_or_lost(run, tmp_path):
    for name in ("first", "second"):
        write_results(tmp_path / name, {"toy": answers([1, 0], [0, 0])})
    _, report = run("--examples", "1")
    assert row(report, "toy", "mean@2")[3:] == ["+0.0000", "", "0", "0", "2"]
    assert "## toy, question 1: correct +0.0000" in report


def test_figures_that_are_of_no_question_have_a_difference_alone(run, tmp_path):
    for name, value in (("first", 0.25), ("second", 0.5)):
        folder = ResultsFolder(write_results(tmp_path / name, {}))
        metrics = {"inst_level_acc": Estimate(value=value), "acc": Estimate(value=1.0)}
        folder.add_results({"ifeval": TaskResult(source="lm-eval", questions=1, metrics=metrics)})
        folder.write_generations(
            "ifeval", [Generation(question=0, sample=0, prompt="x", answer="", text=name, scores={"acc": 1.0})]
        )
    _, report = run()
    assert row(report, "ifeval", "inst_level_acc") == ["", "0.2500", "0.5000", "+0.2500", "", "", "", ""]
    assert row(report, "ifeval", "acc")[:2] == ["1", "1.0000"]
    assert "<pre>x</pre>" in report


def test_models_are_evaluated_first(run, tmp_path):
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    for name, reply in (("first", "17"), ("second", "3")):
        model = tiny.build_model(tmp_path / name, "qwen2", num_hidden_layers=2, vocab_size=200)
        tiny.teach(model, tokenizer, [("add one", reply)])
    (tmp_path / "toy.jsonl").write_text(json.dumps({"question": "add one", "answer": "3"}) + "\n")
    flags = [
        "--tokenizer",
        tokenizer,
        "--tasks",
        tmp_path / "toy.jsonl",
        "--num-samples",
        "4",
        "--engine",
        "transformers",
    ]
    exit, report = run(*flags, "--max-new-tokens", "8", "--temperature", "0.01")
    assert exit.code == 0, exit.err
    assert row(report, "toy", "mean@4") == ["1", "0.0000", "1.0000", "+1.0000", "", "1", "0", "0"]
    assert "<td>correct 0<pre>17</pre></td><td>correct 1<pre>3</pre></td>" in report
    assert ResultsFolder(tmp_path / "out" / "second").has_results


def test_what_cannot_be_compared_is_refused(run, tmp_path):
    assert_refused(run()[0], f"first ({tmp_path / 'first'}) must be a results folder of `psft evaluate`")
    write_results(tmp_path / "first", {"toy": answers([1, 0])})
    assert_refused(run()[0], f"second ({tmp_path / 'second'}) must be a results folder of `psft evaluate`")
    assert_refused(run("--tasks", "x.jsonl")[0], f"second ({tmp_path / 'second'}) must be an existing folder or a hub")
    (tmp_path / "second").mkdir()
    assert_refused(run("--tasks", "x.jsonl")[0], "tasks (x.jsonl) must be an existing file")
    write_results(tmp_path / "second", {"other": answers([1, 0])})
    assert_refused(run()[0], "must have a task in common, but have toy and other")
    write_results(tmp_path / "second", {"toy": answers([1, 0], first=5)})
    assert_refused(run()[0], "toy has no question that both were asked")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks", "x.jsonl"],
            "tasks, chat template and sampling have no effect where first",
        ),
        (["--temperature", "0.5"], "tasks, chat template and sampling have no effect"),
        (["--tokenizer", "t"], "tokenizer (t) has no effect"),
        (["--examples", "-1"], "examples (-1) must be at least 0"),
        (["--max-characters", "0"], "max_characters (0) must be at least 1"),
        (["--out", "/dev/null/x"], "out (/dev/null/x) must be a folder that can be written"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run, tmp_path, flags, message):
    for name in ("first", "second"):
        write_results(tmp_path / name, {"toy": answers([1, 0])})
    exit, report = run(*flags)
    assert_refused(exit, message)
    assert report == ""


def test_help_has_an_example_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "compare", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft compare --first results/base --second results/psft" in done.stdout
    assert "differences are second minus first" in done.stdout
    assert " torch\n" not in done.stderr
