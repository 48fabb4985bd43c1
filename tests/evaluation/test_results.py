"""Figures against hand arithmetic and enumeration, and a folder of results that comes back as it was written."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from megatron_psft.errors import UserError
from megatron_psft.evaluation.results import (
    CORRECT,
    Estimate,
    Generation,
    ResultsFolder,
    TaskResult,
    estimate,
    estimate_share,
    group_by_question,
    known_ks,
    markdown_table,
    normal_estimate,
    pass_at_k,
    question_passes,
    results_table,
    summarize,
)


def answers(*rewards: list[float]) -> list[Generation]:
    """Checked answers, a list of rewards to each question."""
    return [
        Generation(
            question=question,
            sample=sample,
            prompt=[{"role": "user", "content": f"question {question}"}],
            answer="3",
            text="it is 3",
            scores={CORRECT: reward},
            tokens=10 * (sample + 1),
            is_finished=sample > 0,
        )
        for question, group in enumerate(rewards)
        for sample, reward in enumerate(group)
    ]


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 2), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, right):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1024, 1, 512) == 0.5  # factorials of which no float holds
    assert pass_at_k(1024, 1023, 2) == 1.0


def test_the_ks_are_powers_of_two_and_all():
    assert [known_ks(n) for n in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]


def test_an_interval_is_the_normal_one_of_the_questions():
    values = [0.25, 0.5, 1.0, 0.25]
    margin = 1.96 * math.sqrt(0.375 / 3 / 4)  # squared distances from 0.5 sum to 0.375
    found = estimate(values)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - margin, 0.5 + margin))
    assert estimate_share(values) == found
    assert normal_estimate(-2.0, 0.5) == Estimate(value=-2.0, low=-2.98, high=-1.02)


def test_an_interval_of_shares_stays_between_0_and_1():
    found = estimate_share([0.0, 0.0, 0.0, 0.5])
    assert (found.low, found.value) == (0.0, 0.125)
    assert found.high == pytest.approx(0.125 + 1.96 * 0.125)  # the deviation is 0.25, that of four questions' mean half
    assert estimate_share([1.0, 1.0, 0.5]).high == 1.0


def test_questions_all_wrong_or_all_right_have_wilsons_interval():
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    n, z = 30, 1.96
    for p in (0.0, 1.0):
        middle, half = p + z**2 / (2 * n), z * math.sqrt(z**2 / (4 * n**2))
        expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
        found = estimate_share([p] * n)
        assert (found.low, found.value, found.high) == pytest.approx((expected[0], p, expected[1]), abs=1e-12)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_what_tells_no_spread_has_no_interval(values):
    assert estimate(values) == estimate_share(values) == Estimate(value=0.5)


def test_a_question_counts_once_however_its_answers_are_alike():
    result = summarize("toy.jsonl", answers([1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]))
    assert (result.questions, result.samples_per_question) == (3, 4)
    assert list(result.metrics) == ["mean@4", "pass@2", "pass@4"]
    assert result.metrics["mean@4"] == estimate_share([0.5, 0.0, 1.0])
    assert result.metrics["pass@2"] == estimate_share([5 / 6, 0.0, 1.0])
    assert result.metrics["pass@4"] == estimate_share([1.0, 0.0, 1.0])
    assert result.unfinished == 0.25
    assert result.mean_tokens == 25


def test_one_answer_each_has_a_mean_alone():
    assert list(summarize("toy.jsonl", answers([1], [0])).metrics) == ["mean@1"]


def test_partly_right_is_not_right():
    groups = group_by_question(answers([0.5, 0.9], [1.0, 0.5]))
    assert question_passes(groups, 2) == [0.0, 1.0]


def test_questions_may_lie_scattered():
    mixed = [answers([1, 0], [0, 1])[index] for index in (2, 0, 3, 1)]
    assert [[a.question for a in group] for group in group_by_question(mixed)] == [[1, 1], [0, 0]]


def test_a_folder_gives_back_what_was_written(tmp_path):
    folder = ResultsFolder(tmp_path / "new" / "results")
    settings = {"model": "m", "seed": 1}
    assert not folder.has_results
    folder.begin(settings)
    # U+2028 ends a line for str.splitlines, but not in JSON lines.
    written = [*answers([1, 0]), Generation(question=1, sample=0, prompt="über\u2028uns", answer="", text="a\nb")]
    folder.write_generations("toy", written)
    result = summarize("toy.jsonl", written[:2])
    folder.add_results({"toy": result})
    other = TaskResult(source="lm-eval", questions=4, metrics={"acc": Estimate(value=0.5)}, versions={"vllm": None})
    folder.add_results({"other": other})
    again = ResultsFolder(tmp_path / "new" / "results")
    again.begin(settings)
    assert again.results() == {"toy": result, "other": other}
    assert again.read_generations("toy") == written
    assert again.read_generations("other") == []
    assert again.settings() == settings
    table = (tmp_path / "new" / "results" / "results.md").read_text()
    assert "| toy | 1 | mean@2 | 0.5000 |  | 50.0% | 15 |\n" in table
    assert "| other | 4 | acc | 0.5000 |  |  |  |\n" in table
    assert table.index("| other |") < table.index("| toy |")


def test_the_table_has_the_mean_and_all_samples():
    table = results_table({"toy": summarize("toy.jsonl", answers([1, 0, 0, 1], [0, 0, 1, 1]))})
    assert [line.split(" | ")[2] for line in table.splitlines()[2:4]] == ["mean@4", "pass@4"]


def test_a_folder_takes_one_set_of_settings(tmp_path):
    ResultsFolder(tmp_path).begin({"model": "a", "seed": 1})
    with pytest.raises(UserError, match=r"holds results with seed 1, not 2; name another folder"):
        ResultsFolder(tmp_path).begin({"model": "a", "seed": 2})


def test_damaged_files_are_named(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.begin({})
    folder.write_generations("toy", answers([1, 0]))
    path = tmp_path / "generations" / "toy.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:20])
    with pytest.raises(UserError, match=r"toy\.jsonl:2 must be a generation"):
        folder.read_generations("toy")
    path.write_text(json.dumps({"question": 1}))
    with pytest.raises(UserError, match=r"toy\.jsonl:1 must be a generation"):
        folder.read_generations("toy")
    for text in ("{", "[]", '{"toy": 3}', '{"toy": {}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"results\.json must be what `psft evaluate` has written"):
            folder.results()


def test_a_place_that_cannot_be_written_is_told():
    with pytest.raises(UserError, match=r"out \(/dev/null/x\) must be a folder that can be written"):
        ResultsFolder(Path("/dev/null/x")).begin({})


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table([["a", "b"], ["x|y", "2"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 2 |"


def test_the_mean_of_standard_errors_is_that_of_question_means():
    """The clustered standard error of n answers each equals the plain one of the questions' means."""
    rewards = [[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    found = summarize("toy.jsonl", answers(*rewards)).metrics["mean@4"]
    overall = statistics.fmean(itertools.chain(*rewards))
    clusters = [sum(reward - overall for reward in group) for group in rewards]
    error = math.sqrt(sum(total**2 for total in clusters) * 5 / 4) / 20  # with the correction for few clusters
    assert found.high is not None
    assert found.high - found.value == pytest.approx(1.96 * error)
