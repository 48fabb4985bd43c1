"""Evaluation through its command line, of a model that was taught several replies."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_psft.cli.evaluate import EvaluateConfig, main
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.paper import EVALUATION
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit

QUESTIONS = ["add one", "how many lemon", "x + y ="]
REPLIES = ["3", "17", "zero is 3", "when 42"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny.build_tokenizer(folder / "tokenizer")
    model = tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2, vocab_size=200)
    tiny.teach(model, tokenizer, [(question, reply) for question in QUESTIONS for reply in REPLIES])
    write_verl(folder / "toy.parquet", QUESTIONS, repeats=12)
    write_lines(folder / "gsm.jsonl", [{"question": text, "answer": "so\n#### 17"} for text in QUESTIONS])
    return folder


def write_verl(path: Path, questions: list[str], *, repeats: int) -> Path:
    """As the paper's files: all questions, then all again; the known answer in an object."""
    system = {"role": "system", "content": "sum"}
    rows = [
        {"prompt": [system, {"role": "user", "content": text}], "reward_model": {"ground_truth": 3, "style": "rule"}}
        for text in questions * repeats
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(inputs, tmp_path, capsys):
    """Runs the command; a later flag replaces one given here. Returns how it ended."""

    def run(*flags: str | Path) -> Exit:
        argv = ["--model", inputs / "model", "--tokenizer", inputs / "tokenizer", "--out", tmp_path / "out"]
        argv += ["--engine", "transformers", "--max-new-tokens", "16", *flags]
        return Exit(main([str(value) for value in argv]), *capsys.readouterr())

    return run


def assert_refused(exit: Exit, message: str) -> None:
    assert exit.code == 2
    assert exit.err.startswith("error: ")
    assert message in exit.err
    assert exit.err.count("\n") == 1


def test_figures_are_those_of_the_answers_that_are_kept(run, inputs, tmp_path):
    exit = run("--tasks", inputs / "toy.parquet")
    assert exit.code == 0, exit.err
    kept = read_lines(tmp_path / "out" / "generations" / "toy.jsonl")
    assert [(line["question"], line["sample"]) for line in kept] == [(q, s) for q in range(3) for s in range(12)]
    means = []
    for number, question in enumerate(QUESTIONS):
        group = [line for line in kept if line["question"] == number]
        assert all(line["prompt"][1] == {"role": "user", "content": question} for line in group)
        rewards = [float(re.findall(r"\d+", line["text"])[-1:] == ["3"]) for line in group]
        assert [line["scores"] for line in group] == [{"correct": reward} for reward in rewards]
        means.append(fmean(rewards))
    assert 0 < fmean(means) < 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["toy"]["metrics"]
    assert list(found) == ["mean@12", "pass@2", "pass@4", "pass@8", "pass@12"]
    assert found["mean@12"]["value"] == pytest.approx(fmean(means))
    # Both of two draws without putting back are wrong: (1 - mean) * (wrong ones but one) / 11.
    wrong = [12 - round(12 * mean) for mean in means]
    assert found["pass@2"]["value"] == pytest.approx(fmean(1 - count / 12 * (count - 1) / 11 for count in wrong))
    assert results["toy"]["versions"]["torch"]
    assert f"| toy | 3 | mean@12 | {fmean(means):.4f} | " in exit.out
    assert "pass@4" not in exit.out
    assert exit.out.startswith((tmp_path / "out" / "results.md").read_text().rstrip("\n"))


@pytest.mark.parametrize(
    ("flags", "yaml", "changed"),
    [
        ("--preset paper", "", {}),
        ("", "preset: paper", {}),
        ("--num-samples 4 --preset paper", "", {"num_samples": 4}),
        ("--preset paper", "top_p: 1.0\nmax_new_tokens: 2048", {"top_p": 1.0, "max_new_tokens": 2048}),
        ("--temperature 1", "preset: paper\ntemperature: 0.5", {"temperature": 1.0}),
        ("--temperature 1", "", {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1024, "num_samples": None}),
    ],
    ids=["flag", "yaml", "flag over it", "yaml over it", "flag over all", "no preset"],
)
def test_a_preset_gives_what_nobody_says_otherwise(tmp_path, flags, yaml, changed):
    (tmp_path / "evaluate.yaml").write_text(yaml)
    required = ["--model", "m", "--tasks", "t.jsonl", "--out", "o", "--config", str(tmp_path / "evaluate.yaml")]
    sampling = parse_flags(EvaluateConfig, [*required, *flags.split()]).sampling
    assert {name: getattr(sampling, name) for name in EVALUATION} == {**EVALUATION, **changed}


def test_an_unknown_preset_is_refused_with_those_that_there_are(run, tmp_path):
    assert_refused(run("--tasks", "t.jsonl", "--preset", "papers"), "preset ('papers') must be paper")
    assert not (tmp_path / "out").exists()


def test_a_set_of_questions_alone_gets_as_many_answers_as_asked_for(run, inputs, tmp_path):
    exit = run("--tasks", inputs / "gsm.jsonl", "--num-samples", "4", "--limit", "2", "--system-prompt", "add")
    assert exit.code == 0, exit.err
    kept = read_lines(tmp_path / "out" / "generations" / "gsm.jsonl")
    assert [line["question"] for line in kept] == [0] * 4 + [1] * 4
    assert kept[0]["prompt"] == [{"role": "system", "content": "add"}, {"role": "user", "content": QUESTIONS[0]}]
    assert [line["scores"]["correct"] for line in kept] == [float(line["text"] == "17") for line in kept]
    run("--tasks", inputs / "gsm.jsonl", "--out", tmp_path / "once")
    assert len(read_lines(tmp_path / "once" / "generations" / "gsm.jsonl")) == 3


def test_a_file_that_is_named_for_its_part_of_a_set_has_the_name_of_the_folder_too(run, tmp_path):
    (tmp_path / "gsm").mkdir()
    path = write_lines(tmp_path / "gsm" / "test.jsonl", [{"question": "add one", "answer": "3"}])
    assert "| gsm-test | 1 | mean@1 | " in run("--tasks", path).out


def test_keys_and_verifier_are_chosen(run, tmp_path):
    rows = [{"ask": text, "known": {"is": "zero is 3"}} for text in QUESTIONS]
    flags = ["--prompt-key", "ask", "--answer-key", "known.is", "--verifier", "exact", "--num-samples", "12"]
    exit = run("--tasks", write_lines(tmp_path / "own.jsonl", rows), *flags)
    assert exit.code == 0, exit.err
    kept = read_lines(tmp_path / "out" / "generations" / "own.jsonl")
    rewards = [line["scores"]["correct"] for line in kept]
    assert rewards == [float(line["text"] == "zero is 3") for line in kept]
    assert 0 < sum(rewards) < len(rewards)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(run, inputs, tmp_path, monkeypatch):
    flags = ["--tasks", inputs / "toy.parquet", inputs / "gsm.jsonl"]
    whole = run(*flags, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err

    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_psft.rollout.rewards.MathVerifier.score", interrupt)
        stopped = run(*flags)
    assert (stopped.code, stopped.err.splitlines()[-1]) == (130, "ended by SIGINT")
    kept = read_lines(tmp_path / "out" / "generations" / "toy.jsonl")
    assert [line["scores"] for line in kept] == [{}] * 36  # sampled, and not checked yet
    sampled = []

    def count(self, prompts, num_samples):
        sampled.append(len(prompts))
        return sample(self, prompts, num_samples)

    sample = evaluate_sampler().sample
    monkeypatch.setattr(evaluate_sampler(), "sample", count)
    again = run(*flags)
    assert again.code == 0, again.err
    assert sampled == [3]  # of the second set only
    for name in ("results.json", "generations/toy.jsonl", "generations/gsm.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # A third set joins the two.
    run("--tasks", write_verl(tmp_path / "more.parquet", QUESTIONS[:1], repeats=2), "--num-samples", "3")
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())) == ["gsm", "more", "toy"]


def evaluate_sampler() -> type:
    from megatron_psft.rollout.sampling import Sampler

    return Sampler


def test_other_settings_or_questions_need_another_folder(run, inputs, tmp_path):
    path = write_verl(tmp_path / "toy.parquet", QUESTIONS, repeats=2)
    assert run("--tasks", path).code == 0
    assert run("--tasks", path, "--batch-size", "2").code == 0  # does not change what is asked for
    assert_refused(run("--tasks", path, "--temperature", "0.5"), "holds results with temperature 1.0, not 0.5")
    write_verl(path, QUESTIONS[:2], repeats=2)
    assert_refused(run("--tasks", path), "holds answers to other questions than")
    write_verl(path, QUESTIONS, repeats=3)
    assert_refused(run("--tasks", path), "holds answers to other questions than")


def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(run, tmp_path):
    short = write_lines(tmp_path / "short.jsonl", [{"question": "add one", "answer": "3"}])
    long = write_lines(tmp_path / "long.jsonl", [{"question": "add one " * 300, "answer": "3"}])
    assert_refused(run("--tasks", short, long), "max_position_embeddings (512)")
    assert list((tmp_path / "out" / "generations").iterdir()) == []


BAD_SETS = {
    "keys": ([{"ask": "add one", "answer": "3"}], "found ask, answer; name yours by prompt_key and answer_key"),
    "no row": ([], "must hold at least one question"),
    "no maths": (
        [{"question": "a", "answer": "3"}, {"question": "b", "answer": " "}],
        "must hold usable questions only, 1 of 2 are not; the first is",
    ),
    "no answer": ([{"question": "a", "answer": "3"}, {"question": "b"}], "no answer"),
    "uneven": ([{"question": text, "answer": "3"} for text in "aab"], "repeats its questions 1 to 2 times"),
}


@pytest.mark.parametrize("kind", BAD_SETS)
def test_a_bad_set_is_refused(run, tmp_path, kind):
    rows, message = BAD_SETS[kind]
    assert_refused(run("--tasks", write_lines(tmp_path / "set.jsonl", rows)), message)


def test_a_line_that_is_not_json_is_named(run, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "a", "answer": "3"}\n{"question"\n')
    assert_refused(run("--tasks", path), f"{path}:2: not JSON")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing --tasks"),
        (["--tasks", "a.jsonl", "--limit", "0"], "limit (0) must be at least 1"),
        (["--tasks", "a.jsonl", "--num-samples", "0"], "num_samples (0) must be at least 1"),
        (["--tasks", "a.jsonl", "--prompt-key", "q"], "prompt_key (q) and answer_key (None) must be set together"),
        (["--tasks", "a.jsonl", "--include-path", "none"], "include_path (none) must be an existing folder"),
        (["--tasks", "x/toy.jsonl", "y/toy.parquet"], "must have names of their own, but toy is there 2 times"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run, flags, message):
    assert_refused(run(*flags), message)


def test_a_missing_file_is_told_with_the_nearest_one(run, inputs):
    path = inputs / "toys.parquet"
    assert_refused(run("--tasks", path), f"tasks ({path}) must be an existing file; did you mean toy.parquet?")


def test_a_missing_model_is_told(run, inputs):
    exit = run("--tasks", inputs / "toy.parquet", "--model", "./nowhere")
    assert_refused(exit, "model (./nowhere) must be an existing folder or a hub ID")


def test_ids_of_a_tokenizer_that_have_no_row_are_refused(run, inputs, tmp_path):
    tokenizer = tiny.build_sparse_tokenizer(tmp_path / "sparse", 10_000)
    exit = run("--tasks", inputs / "toy.parquet", "--tokenizer", tokenizer)
    assert_refused(exit, f"tokenizer ({tokenizer}) has ids up to 10000 (")
    assert not (tmp_path / "out").exists()


def test_tasks_of_the_harness_need_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exit = run("--tasks", "ifeval")
    assert_refused(
        exit,
        "tasks (ifeval) are no files, and other tasks need lm-eval; check the paths, or pip install 'lm-eval[hf,",
    )


def test_a_chat_template_is_for_maths_sets_only(run):
    exit = run("--tasks", "ifeval", "--chat-template-kwargs", "{}")
    assert exit.code == 2
    assert "chat_template and chat_template_kwargs are for maths sets only" in exit.err
    assert "ifeval of lm-evaluation-harness" in exit.err


def test_help_has_an_example_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "evaluate", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft evaluate --model runs/first/hf --tasks eval/*.parquet" in done.stdout
    assert "Questions of each task, its first ones" in done.stdout
    assert " torch\n" not in done.stderr
