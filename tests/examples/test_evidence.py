"""The sweep's results and its report; the runs themselves are `psft train`."""

import importlib.util
import sys

import pytest

from tests.support.cli import REPOSITORY

FOLDER = REPOSITORY / "examples" / "evidence"


@pytest.fixture(scope="module")
def sweep():
    """Its run.py, under another name than those of other examples."""
    spec = importlib.util.spec_from_file_location("evidence_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


def line(step, nll=None, clipped=None):
    evaluated = {"valid_nll/target": nll, "valid_entropy/target": 0.5, "drift/general": step / 10}
    evaluated["drift_stderr/general"] = 0.01
    found = {"step": step, "loss": 1.0, **(evaluated if nll is not None else {})}
    return found if clipped is None else {**found, "clip_fraction": clipped}


def test_a_point_has_the_clipped_share_since_the_one_before(sweep):
    lines = [line(0, 2.0), line(1, clipped=0.0), line(2, 1.0, 0.2), line(3, clipped=0.3), line(4, 1.5, 0.5)]
    points = sweep.points(lines)
    assert [(point["step"], point.get("clip_fraction")) for point in points] == [(0, None), (2, 0.1), (4, 0.4)]


def test_the_report_ranks_runs_and_methods_by_their_best_evaluation_and_not_their_last(sweep, tmp_path):
    import frontier

    late = [line(0, 2.0), line(2, 0.7), line(4, 1.5)]
    steady = [line(0, 2.0), line(2, 1.0, 0.1), line(4, 0.72, 0.3)]
    results = [
        {"data": "far", "method": method, "lr": lr, "seed": 3, "kept": kept, "points": sweep.points(lines)}
        for method, lr, kept, lines in (
            ("PSFT, k = 8", "1e-4", 0.75, steady),
            ("SFT", "1e-4", 0.5, late),
            ("SFT", "1e-5", 0.9, [line(0, 2.0), line(4, 1.9)]),
        )
    ]
    rows = frontier.write(results, {"far": {"kept": 0.8}}, tmp_path).read_text().splitlines()
    assert "The initial model: target NLL 2.000, kept 0.80." in rows
    assert [row for row in rows if row.startswith(("| SFT", "| PSFT"))] == [
        "| SFT | 0.700 | 1e-4, 2 | 0.200 | 0.200 | none | 1 of 2 runs |",
        "| PSFT, k = 8 | 0.720 | 1e-4, 4 | 0.400 | 0.400 | 0.75 | 1 of 1 run |",
        "| SFT | 1e-4 | 3 | 0.700 | 2 | 0.200 | 1.500 | 0.400 ± 0.010 | 0.500 |  | 0.50 |  |",
        "| PSFT, k = 8 | 1e-4 | 3 | 0.720 | 4 | 0.400 | 0.720 | 0.400 ± 0.010 | 0.500 | 0.300 | 0.75 |  |",
        "| SFT | 1e-5 | 3 | 1.900 | 4 | 0.400 | 1.900 | 0.400 ± 0.010 | 0.500 |  | 0.90 |  |",
    ]
    assert (tmp_path / "frontier_far.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_a_colour_and_a_line_of_its_own(sweep):
    import frontier

    assert frontier.STYLES.keys() == sweep.METHODS.keys()
    assert len(set(frontier.STYLES.values())) == len(sweep.METHODS)


@pytest.mark.parametrize(("text", "points"), [(None, 1.0), ("not JSON", 0.0)])
def test_scores_are_shares_of_right_answers(sweep, monkeypatch, text, points):
    import score

    record = score.tickets.records(1, seed=0)[0]
    right = {request.prompt: "Paris" for request in score.general.REQUESTS} | {record["prompt"]: record["completion"]}

    class Asked:
        def __init__(self, model):
            assert model == "folder"

        def answers(self, chats, *, max_new_tokens):
            return [text or right[chat[0]["content"]] for chat in chats]

    monkeypatch.setattr(score.ask, "Model", Asked)
    found = score.scores("folder", [record])
    assert found["fields"] == points
    assert found["kept"] == pytest.approx(
        sum(request.is_right(text or "Paris") for request in score.general.REQUESTS) / 36
    )
    assert "fields" not in score.scores("folder", [])


def test_runs_that_have_a_result_are_not_made_again(sweep, tmp_path, capsys):
    jobs = [sweep.Job("far", "SFT", lr, 0) for lr in ("1e-5", "1e-4", "1e-3")]
    plan = sweep.Plan(tmp_path, "model", sweep.SIZES["tiny"], jobs, {"far": "far.jsonl"}, 16)
    plan.result(jobs[1]).parent.mkdir()
    plan.result(jobs[1]).write_text("{}")
    assert list(sweep.waiting(plan)) == [jobs[0], jobs[2]]
    assert "1 of 3 runs done; far_sft_1e-5_0" in capsys.readouterr().out


def test_a_model_has_not_drifted_from_its_own_answers_and_another_has(sweep, tmp_path):
    import score

    from megatron_psft.cli import rollout
    from tests.support import tiny

    own, other = (tiny.build_model(tmp_path / str(seed), "qwen2", seed=seed) for seed in (0, 1))
    for folder in (own, other):
        tiny.build_tokenizer(folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    argv = f"--model {own} --prompts {tmp_path}/prompts.jsonl --drift-set --num-samples 1 --max-new-tokens 8"
    answers = tmp_path / "answers.jsonl"
    assert rollout.main([*argv.split(), "--out", str(answers)]) == 0
    assert score.drift(own, answers) == pytest.approx(0, abs=1e-5)
    assert score.drift(other, answers) > 0.01


def test_what_is_rejected_has_one_wrong_field(sweep):
    import random

    import rl

    record, other = rl.tickets.records(2, seed=0)
    for seed in range(20):
        wrong = rl.with_a_wrong_field(record, other, random.Random(seed))
        assert rl.tickets.right_fields(wrong, record["completion"]) == len(rl.tickets.FIELDS) - 1
