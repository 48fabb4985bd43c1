"""The miniature's records, points, tables and commands, and a small run of it; the whole is `make miniature`."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_psft.config.rules import validate
from megatron_psft.config.schema import parse_config
from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "digits"))
sys.path.insert(0, str(REPOSITORY / "examples" / "miniature"))

import chains
import grpo
import plan as plans
import points
import report
from digits import read_records

MINIATURE = REPOSITORY / "examples" / "miniature"
SMALL = chains.Sizes(base=600, target=40, held_out=30, prompts=20)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> chains.ChainFiles:
    return chains.write_data(tmp_path_factory.mktemp("data"), SMALL, seed=3)


@pytest.mark.parametrize(
    ("skill", "answer"),
    [
        ("repeat", "3195"),
        ("reverse", "5913"),
        ("sort", "1359"),
        ("rotate", "1953"),
        ("swap", "5193"),
        ("raise", "4206"),
        ("largest", "9"),
        ("smallest", "1"),
    ],
)
def test_skills(skill, answer):
    assert chains.SKILLS[skill]("3195") == answer


def test_every_answer_follows_from_its_question(files):
    kinds = set()
    for path in (files.base, files.base_held_out, files.target, files.target_held_out, files.prompts):
        for record in read_records(path):
            *names, number, _ = chains.question(record).replace(" then ", " ").split()
            kinds.add(len(names))
            for name in names:
                number = chains.SKILLS[name](number)
            assert chains.right_answer(record) == number, record
    assert kinds == {1, 2, 3}


def test_every_step_of_a_demonstration_is_right(files):
    for record in read_records(files.target):
        *names, number, _ = chains.question(record).replace(" then ", " ").split()
        *steps, last = record["messages"][1]["content"].removesuffix(" .").split(" . ")
        for thought, *step in map(str.split, steps):
            assert thought in chains.THOUGHTS
            if step[0] == "check":
                assert step == ["check", number]
            else:
                name = names.pop(0)
                number = chains.SKILLS[name](number)
                assert step == [name, ":", number]
        assert (names, last) == ([], f"answer {number}")


def test_no_held_out_question_is_trained_on(files):
    def questions(path):
        return {chains.question(record) for record in read_records(path)}

    base, target = questions(files.base), questions(files.target)
    for held_out in (files.base_held_out, files.target_held_out, files.prompts):
        assert not questions(held_out) & (base | target)
    assert not target & base
    assert not questions(files.prompts) & questions(files.target_held_out)


def test_answer_reads_digits_that_stand_apart():
    assert chains.answer("hmm sort : 3 1 . answer 1 3 . answer 0 4 5 1 .") == "0451"
    assert chains.answer("so sort : 1 3 .") is None


def test_same_seed_same_records(files, tmp_path):
    again = chains.write_data(tmp_path, SMALL, seed=3)
    assert again.target.read_bytes() == files.target.read_bytes()
    assert chains.write_data(tmp_path, SMALL, seed=4).target.read_bytes() != files.target.read_bytes()


def test_tokenizer_knows_every_word(files, tmp_path):
    from transformers import AutoTokenizer

    chains.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for path in (files.base, files.target):
        for record in read_records(path):
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.pad_token_id not in ids
            reply = tokenizer.decode(ids, skip_special_tokens=True)
            assert reply.replace(" ", "") == "".join(m["content"] for m in record["messages"]).replace(" ", "")


@pytest.mark.parametrize("plan", [plans.FULL, plans.QUICK])
def test_every_command_is_a_valid_one(plan, files, tmp_path):
    base, runs = plans.jobs(plan, tmp_path, files, 0)
    names = [job.name for job in runs]
    assert len(set(names)) == len(names)
    for job in (base, *runs):
        for length in job.lengths:
            config = parse_config(job.command(length))
            validate(config, 1)
            assert config.batch.train_iters == length
            if job.method is not None:
                assert config.optimizer.lr == float(job.lr)
                assert (config.objective.objective == "psft") == job.method.name.startswith(("psft", "no-clip"))


def test_a_longer_run_goes_on_from_a_shorter_one_where_that_is_the_same(files, tmp_path):
    _, runs = plans.jobs(plans.FULL, tmp_path, files, 0)
    for job in runs:
        short, long = plans.FULL.lengths
        assert (job.save(short) == job.save(long)) == (job.method.name != "psft-fixed")


def test_recipe_of_grpo_is_valid():
    flags = ["--load-hf", "model", "--save", "runs/x", "--data", "rollouts.jsonl"]
    validate(parse_config(["--config", str(MINIATURE / "grpo.yaml"), *flags]), 1)


def test_replies_get_the_advantage_of_their_group_as_rollouts_do():
    records = [{"messages": [{"role": "user", "content": text}]} for text in "ab"]
    samples = grpo._samples(records, [["1", "2", " ", "4"], ["5", "6"]], [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0]])
    assert [sample["messages"][1]["content"] for sample in samples] == ["1", "2", "4", "5", "6"]
    # Of 1, 0, 0, 0: mean 1/4, squares 9/16 + 3/16, over 3: 1/4.
    expected = [0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6), 0.0, 0.0]
    assert [sample["advantage"] for sample in samples] == pytest.approx(expected)


def _result(method, lr, seed, target, general):
    values = {"method": method, "lr": lr, "seed": seed, "step": 64, "target": target, "general": general}
    return {**values, "valid_entropy": 0.3, "valid_nll": 0.4, "clip_fraction": 0.1}


RESULTS = [
    *(_result("sft", "3e-5", seed, 20 + seed, 99) for seed in range(3)),
    *(_result("sft", "3e-4", seed, 40 + seed, 70) for seed in range(3)),
    *(_result("psft-k8", "3e-4", seed, 37 + seed, 80 + 2 * seed) for seed in range(3)),
    *(_result("psft-k8", "1e-3", seed, 45, 60) for seed in range(3)),
    *(_result("psft-k4", "3e-4", seed, 10, 90) for seed in range(3)),
    *(_result("psft-k4", "1e-3", seed, 12, 50) for seed in range(3)),
]


def test_a_method_is_compared_where_it_has_learned_as_much_as_sft_and_kept_most():
    found = points.points(RESULTS)
    assert points.level(found) == 41 - points.MARGIN
    assert points.chosen(found, "sft") == (("sft", "3e-4", 64), True)
    assert points.chosen(found, "psft-k8") == (("psft-k8", "3e-4", 64), True)
    assert points.chosen(found, "psft-k4") == (("psft-k4", "1e-3", 64), False)


def test_best_points_are_those_that_no_other_exceeds_in_both():
    assert points.best([(1, 9), (2, 5), (3, 7), (4, 7), (5, 1)]) == [(1, 9), (4, 7), (5, 1)]


def test_table_has_mean_and_deviation_over_the_seeds():
    methods = tuple(method for method in plans.METHODS if method.name in {"sft", "psft-k8", "psft-k4"})
    lines = report.compared(replace(plans.FULL, methods=methods), points.points(RESULTS)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[1][:5] == ["PSFT, k = 8", "3e-4", "64", "38 ± 1", "82 ± 2"]
    assert rows[2][0] == "PSFT, k = 4 (below)"


def test_a_mistyped_flag_is_one_error_line():
    command = [sys.executable, str(MINIATURE / "run.py"), "--quikc"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        2,
        "error: unrecognized arguments: --quikc",
    )


@pytest.mark.slow
def test_quick_miniature_writes_its_report_and_a_second_call_takes_what_is_there():
    folder = REPOSITORY / "runs" / "miniature-quick"
    command = [sys.executable, str(MINIATURE / "run.py"), "--quick"]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert first.returncode == 0, first.stdout + first.stderr
    text = (folder / "report.md").read_text()
    assert text.strip() in first.stdout
    for name in ("frontier", "entropy", "clip_fraction", "clipped_tokens", "grpo"):
        assert f"![{name}]({name}.png)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-0/*/results.json"))]
    assert all(0 <= result["target"] <= 100 for measured in results for result in measured if "target" in result)
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert again.returncode == 0
    assert (folder / "report.md").read_text() == text
