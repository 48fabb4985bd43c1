"""What is asked of lm-evaluation-harness and made of its answers; for real where it is installed."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_psft.errors import UserError
from megatron_psft.evaluation.lm_eval import Harness, generations_of, result_of
from megatron_psft.evaluation.results import Estimate, ResultsFolder, estimate_share
from megatron_psft.rollout.sampling import SamplingConfig
from tests.support import tiny

TASKS = {"toy_a": ["toy_a"], "toy_b": ["toy_b"], "toys": ["toy_a", "toy_b"], "ifeval": ["ifeval"], "unsafe": ["unsafe"]}


def sample(doc: int, **values) -> dict:
    """One entry of lm-eval's log."""
    entry = {
        "doc_id": doc,
        "target": 42,
        "arguments": [(f"question {doc}", {"until": []})],
        "resps": [[f"answer {doc}"]],
        "filtered_resps": [f"answer {doc}"],
        "filter": "none",
        "metrics": [name for name in values if name != "filter"],
    }
    return {**entry, **values}


@pytest.fixture
def lm_eval(monkeypatch) -> ModuleType:
    """A stand-in with the part of lm-eval's interface that is used; it keeps what it was asked for."""
    module, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    module.__spec__ = ModuleSpec("lm_eval", None)
    module.calls = []

    class TaskManager:
        all_tasks = sorted(TASKS)

        def __init__(self, *, include_path):
            module.include_path = include_path

        def load(self, names):
            (name,) = names
            if name in getattr(module, "lost", ()):
                raise ConnectionError("no route to the hub\nand more")
            return {"tasks": {part: SimpleNamespace(UNSAFE_CODE=part == "unsafe") for part in TASKS[name]}}

    def simple_evaluate(**options):
        module.calls.append(options)
        parts = [part for name in options["tasks"] for part in TASKS[name]]
        return {
            "results": {part: {"alias": part, "acc,none": 0.5, "acc_stderr,none": 0.5} for part in parts},
            "groups": {"toys": {"acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4}} if "toys" in parts else {},
            "samples": {part: [sample(0, acc=1.0), sample(1, acc=0.0)] for part in parts},
        }

    tasks.TaskManager, module.tasks, module.simple_evaluate = TaskManager, tasks, simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return module


def run(names: list[str], folder: Path, **config) -> ResultsFolder:
    results = ResultsFolder(folder)
    results.begin({})
    Harness(names, None).run(
        results,
        model_folder=Path("model"),
        tokenizer_folder="tokenizer",
        sampling=SamplingConfig(engine="transformers", seed=7, batch_size=3),
        limit=5,
        apply_chat_template=True,
    )
    return results


def test_lm_eval_is_asked_once_for_what_is_missing(lm_eval, tmp_path):
    """Against a stand-in: this says what lm-eval is asked for, not what it does."""
    run(["toy_a"], tmp_path)
    results = run(["toy_a", "toy_b"], tmp_path)
    run(["toys"], tmp_path)  # whose parts are both there
    assert [call["tasks"] for call in lm_eval.calls] == [["toy_a"], ["toy_b"]]
    call = lm_eval.calls[0]
    assert call["model"] == "hf"
    assert call["model_args"] == {"pretrained": "model", "tokenizer": "tokenizer", "dtype": "auto"}
    assert (call["limit"], call["batch_size"], call["device"]) == (5, 3, "cpu")
    assert call["apply_chat_template"] is call["fewshot_as_multiturn"] is call["log_samples"] is True
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    assert [call[name] for name in seeds] == [7] * 4
    assert results.results()["toy_b"].metrics == {"acc": estimate_share([1.0, 0.0])}
    assert [answer.text for answer in results.read_generations("toy_b")] == ["answer 0", "answer 1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["toy_c"], r"tasks \(toy_c\) must be a file, or a task of lm-eval.*; did you mean toy_"),
        (["toy_a", "toys"], r"tasks \(toy_a and toys\) both have toy_a; leave one out"),
        (["unsafe"], r"tasks \(unsafe\) would run code that the model writes"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(lm_eval, names, message):
    with pytest.raises(UserError, match=message):
        Harness(names, None)


def test_data_that_is_out_of_reach_is_told_in_one_line(lm_eval):
    lm_eval.lost = ["toy_a"]
    with pytest.raises(UserError, match=r"^tasks \(toy_a\) need what could not be loaded: no route to the hub$"):
        Harness(["toy_a"], None)


def test_ifeval_is_refused_without_the_data_it_would_miss_at_the_end(lm_eval, monkeypatch):
    nltk = ModuleType("nltk")
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    nltk.word_tokenize = str.split
    Harness(["ifeval"], None)

    def fail(text: str):
        raise LookupError("punkt_tab")

    nltk.word_tokenize = fail
    with pytest.raises(UserError, match=r"tasks \(ifeval\) need NLTK's punkt_tab"):
        Harness(["ifeval"], None)


def test_scores_of_all_filters_come_together_and_others_are_left_out():
    samples = [
        sample(3, exact_match=1.0, filter="strict", words=(1, 2)),
        sample(5, exact_match=0.0, filter="strict", words=(1, 2)),
        sample(3, exact_match=1.0, filter="loose", bleu=3.0),
        sample(5, exact_match=1.0, filter="loose", bleu=4.0),
    ]
    figures = {"alias": "toy", "exact_match,strict": 0.5, "exact_match,loose": 1.0, "bleu,loose": 9.0}
    found = generations_of(samples, figures)
    assert [answer.scores for answer in found] == [
        {"exact_match,strict": 1.0, "exact_match,loose": 1.0},
        {"exact_match,strict": 0.0, "exact_match,loose": 1.0},
    ]
    assert [(answer.question, answer.prompt, answer.answer) for answer in found] == [
        (0, "question 3", "42"),
        (1, "question 5", "42"),
    ]
    figures |= {"bleu_stderr,loose": 2.0, "exact_match_stderr,strict": 99.0}
    assert result_of(figures, found).metrics == {
        "exact_match,strict": estimate_share([1.0, 0.0]),
        "exact_match,loose": estimate_share([1.0, 1.0]),
        "bleu,loose": Estimate(value=9.0, low=9.0 - 1.96 * 2, high=9.0 + 1.96 * 2),
    }


def test_the_text_of_a_choice_is_its_likelihoods():
    choice = sample(0, acc=1.0) | {"resps": [[(-1.5, False)], [(-2.5, False)]], "filtered_resps": [-1.5, -2.5]}
    assert generations_of([choice], {"acc,none": 1.0})[0].text == "[-1.5, -2.5]"


CHOICE = """
task: toy_choice
output_type: multiple_choice
test_split: test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["3", "17"]
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
TEXT = """
task: toy_text
output_type: generate_until
test_split: test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.mark.slow  # its imports and index of tasks
def test_a_taught_model_in_the_real_harness(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from megatron_psft.cli.evaluate import main

    questions = {"add one": "3", "how many lemon": "17", "x + y =": "3"}
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    model = tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2, vocab_size=200)
    tiny.teach(model, tokenizer, list(questions.items()))
    rows = [{"question": q, "answer": "3", "gold": int(a == "17")} for q, a in questions.items()]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in (("toy_choice", CHOICE), ("toy_text", TEXT)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    argv = ["--model", model, "--tokenizer", tokenizer, "--engine", "transformers", "--out", tmp_path / "out"]
    argv += ["--tasks", "toy_choice", "toy_text", "--include-path", tmp_path / "tasks"]
    assert main([str(value) for value in argv]) == 0, capsys.readouterr().err
    results = ResultsFolder(tmp_path / "out")
    answers = results.read_generations("toy_text")
    assert [answer.text for answer in answers] == ["3", "17", "3"]
    assert answers[0].prompt == "<|im_start|>user\nadd one<|im_end|>\n<|im_start|>assistant\n"
    assert [answer.scores["exact_match"] for answer in answers] == [1.0, 0.0, 1.0]
    assert results.results()["toy_text"].metrics == {"exact_match": estimate_share([1.0, 0.0, 1.0])}
    assert results.results()["toy_choice"].metrics["acc"].value == 1.0  # the likelier reply is the one taught
