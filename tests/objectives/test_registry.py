"""What is declared of objectives, and objectives from outside of the package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_psft.config.rules import validate, validate_advantages
from megatron_psft.config.schema import ObjectiveConfig, config_to_yaml, parse_config
from megatron_psft.errors import UserError
from megatron_psft.objectives import builtin
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.registry import OBJECTIVES, SETTINGS
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.configs import parse, write_yaml
from tests.support.marks import slow

OWN = "tests.objectives.own"
FILES = sorted(Path(builtin.__path__[0]).glob("[!_]*.py"))


def test_every_file_is_an_objective_and_says_what_it_is():
    assert sorted(OBJECTIVES) == sorted(file.stem.replace("_", "-") for file in FILES)
    assert list(OBJECTIVES)[:2] == ["psft", "sft"]
    for name, declaration in OBJECTIVES.items():
        assert declaration.title, name
        assert declaration.formula, name
        assert declaration.source or name == "sft"


def test_objectives_that_share_a_setting_share_its_declaration():
    for declaration in OBJECTIVES.values():
        for setting in declaration.settings:
            assert SETTINGS[setting.name] is setting


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_objective_knows_nothing_of_parallelism(file):
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {"__future__", "typing", "torch", "torch.nn.functional"}
    assert all(name in allowed or name.startswith("megatron_psft.objectives.") for name in imported), imported


def test_declarations_are_read_without_torch():
    script = "import sys, megatron_psft.objectives.registry; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        ("--objective psft", {"old"}),
        ("--objective sft", set()),
        ("--objective asft", {"reference"}),
        ("--objective asft --kl-top-k 8", {"reference", "ref_top"}),
        ("--objective cadft", {"nll_z"}),
        ("--objective iw-sft", {"reference", "records"}),
        ("--objective iw-sft --iw-level token", {"reference"}),
        ("--objective dpo", {"reference", "records", "pairs"}),
        ("--objective eaft", {"top_entropy"}),
        (f"--objective {OWN}:psft_again", {"old"}),
        (f"--objective {OWN}:sft_again", set()),
        (f"--objective {OWN}:iw_sft_again", {"reference", "records"}),
    ],
)
def test_what_an_objective_needs_is_one_fact(flags, needs):
    config = parse(*flags.split()).objective
    objective = Objective(config=config)
    assert objective.needs == config.needs == needs
    assert config.needs_old_policy == ("old" in needs)
    assert config.needs_reference == ("reference" in needs)
    assert config.needs_pairs == ("pairs" in needs)
    assert objective.needs_whole_records == ("records" in needs)
    assert objective.extra_stats == needs & {"top_entropy", "sum_squares"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pfst", "objective ('pfst') must be one of psft, sft, asft, cadft, deft, "),
        ("pfst", ", or MODULE:FUNCTION; did you mean psft?"),
        (":sft_again", "must be one of psft"),
        (f"{OWN}:", "must be one of psft"),
        (
            "no_such_module:loss",
            "objective (no_such_module:loss) cannot be imported: ModuleNotFoundError: No mod",
        ),
        (f"{OWN}:missing", f"objective ({OWN}:missing) does not exist in "),
        (f"{OWN}:no_function", f"objective ({OWN}:no_function) is not a function in "),
        (f"{OWN}:needs_too_much", f"objective ({OWN}:needs_too_much) needs crystal ball, which does not exist"),
        (f"{OWN}:from_top_of_records", f"objective ({OWN}:from_top_of_records) cannot need both records and ref_top"),
        (
            f"{OWN}:has_a_flag",
            f"objective ({OWN}:has_a_flag) has a setting gamma that is no flag; remove it",
        ),
    ],
)
def test_an_objective_that_cannot_be_used_is_refused_in_one_line(name, message):
    with pytest.raises(UserError) as error:
        parse("--objective", name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "fails_on_import.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported: RuntimeError: two lines; fix it, or put"):
        parse("--objective", "fails_on_import:loss")


def test_rules_follow_from_what_an_own_objective_declares():
    def check(flags):
        validate(parse("--train-iters", "10", "--objective", *flags.split()), world_size=1)

    check(f"{OWN}:psft_again --clip-ratio-high 0.3 --old-policy-interval 4 --log-clipped-tokens 3")
    check(f"{OWN}:iw_sft_again --iw-level token")
    check(f"{OWN}:from_top --kl-top-k 8")
    with pytest.raises(UserError, match="needs kl_top_k; set it"):
        check(f"{OWN}:from_top")
    for name, flag in (("sft_again", "clip_ratio_high"), ("psft_again", "kl_coef")):
        with pytest.raises(UserError) as error:
            check(f"{OWN}:{name} --{flag.replace('_', '-')} 0.3")
        assert str(error.value).startswith(f"{flag} (0.3) has no effect with objective {OWN}:{name}; change one")
    validate_advantages(parse("--objective", f"{OWN}:psft_again"), has_advantages=True)
    with pytest.raises(UserError, match="takes no account of the advantages"):
        validate_advantages(parse("--objective", f"{OWN}:sft_again"), has_advantages=True)


def test_the_resolved_configuration_names_an_own_objective(tmp_path):
    config = parse("--objective", f"{OWN}:psft_again")
    path = write_yaml(tmp_path, config_to_yaml(config))
    assert f"objective: {OWN}:psft_again" in Path(path).read_text()
    assert parse_config(["--config", path]) == config


def test_an_own_objective_without_a_declaration_has_its_loss():
    log_probs = torch.tensor([-1.0, -2.0])
    objective = Objective(config=ObjectiveConfig(objective=f"{OWN}:sft_again"))
    losses = objective.token_loss(LabelStats(log_probs, log_probs), LabelInputs(weights=torch.tensor([1.0, 3.0])))
    assert losses.tolist() == [1.0, 6.0]


@pytest.mark.parametrize(
    ("own", "name", "world_size", "layout"),
    [
        slow("psft_again", "psft", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        slow("psft_again", "psft", 2, "--pipeline-model-parallel-size 2"),
        slow("psft_again", "psft", 2, "--use-distributed-optimizer"),
        slow("iw_sft_again", "iw-sft", 2, "--context-parallel-size 2"),
    ],
)
def test_an_own_objective_trains_as_the_built_in_one_it_equals(pool, tmp_path, own, name, world_size, layout):
    tiny.build_model(tmp_path / "model", "qwen2", tied=False)
    tiny.build_tokenizer(tmp_path / "tokenizer")
    tiny.write_records(tmp_path / "train.jsonl", 12)
    argv = ["--load-hf", "model", "--tokenizer", "tokenizer", "--data", "train.jsonl", "--seq-length", "256"]
    argv = [str(tmp_path / text) if (tmp_path / text).exists() else text for text in argv]
    argv += ["--train-iters", "3", "--global-batch-size", "2", "--lr", "1e-3", *layout.split()]
    curves = []
    for objective, save in ((name, tmp_path / "built-in"), (f"{OWN}:{own}", tmp_path / "own")):
        exits = pool.run(run_cli, world_size, [*argv, "--objective", objective, "--save", str(save)])
        assert [exit.code for exit in exits] == [0] * world_size, exits[0].err
        lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["loss"], line["grad_norm"], line.get("clip_fraction")) for line in lines])
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]


def test_an_objective_that_returns_no_loss_per_token_is_refused():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    own = Objective(config=ObjectiveConfig(objective=f"{OWN}:mean"))
    with pytest.raises(
        UserError, match=r"own:mean\) must return a loss for each label token, shape \[2\], and .* \[\]"
    ):
        own.token_loss(LabelStats(log_probs, log_probs.detach()), LabelInputs())
