"""Flags, the YAML file, and the rules of single fields."""

import os
import re
import subprocess
import sys
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.config.inputs import WeightsConfig
from megatron_psft.config.schema import Config, config_to_yaml, parse_config
from megatron_psft.config.yaml_files import dump
from megatron_psft.errors import UserError
from tests.support.cli import REPOSITORY
from tests.support.configs import flag, other_value, parse, two_texts, write_yaml

FIELDS = [(section, field) for section, cls in get_type_hints(Config).items() for field in fields(cls)]
BOOLEANS = [field.name for _, field in FIELDS if field.type is bool]
SETTABLE = [field for _, field in FIELDS]


def values_of(config: Config) -> dict[str, Any]:
    return {name: value for section in asdict(config).values() for name, value in section.items()}


@pytest.mark.parametrize("field", SETTABLE, ids=lambda field: field.name)
def test_every_flag_and_every_yaml_key_changes_its_field_and_no_other(field: Field, tmp_path: Path) -> None:
    expected = other_value(field)
    if isinstance(expected, bool):
        arguments = [flag(field.name) if expected else flag("no_" + field.name)]
    else:
        arguments = [flag(field.name), *(expected if isinstance(expected, tuple) else [str(expected)])]
    text = f"{field.name}: {list(expected) if isinstance(expected, tuple) else expected}"

    from_flags = parse(*arguments)
    from_yaml = parse("--config", write_yaml(tmp_path, text), given_elsewhere=field.name)

    assert values_of(from_flags) == values_of(parse()) | {field.name: expected}
    assert from_yaml == from_flags


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_can_be_switched_off_again(name: str) -> None:
    assert values_of(parse(flag("no_" + name)))[name] is False


def test_field_names_are_unique_over_sections() -> None:
    names = [field.name for _, field in FIELDS]
    assert len(set(names)) == len(names)


def test_defaults_are_the_papers() -> None:
    config = parse()
    assert (config.objective.clip_ratio_high, config.objective.old_policy_interval) == (0.28, 8)
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.999)
    assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.1, 1.0)


def test_help_prints_the_string_below_each_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside a help text
    modules = {sys.modules[section.__module__] for section in get_type_hints(Config).values()}
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    lines = capsys.readouterr().out.splitlines()
    printed = " ".join(" ".join(lines).split())
    assert stop.value.code == 0
    for section, field in FIELDS:
        below = re.search(rf'^    {field.name}: [^\n]*\n    """(.+?)"""$', source, re.MULTILINE | re.DOTALL)
        texts = [below[1]] if below else []
        texts += [field.metadata["help"]] if "help" in field.metadata else []
        assert texts, f"{field.name} has no string below it"
        assert " ".join(" ".join(texts).split()) in printed
        assert f" {flag(field.name)}" in printed
        assert f"{section}:" in lines


def test_variables_of_the_chat_template_are_json_or_a_mapping(tmp_path: Path) -> None:
    expected = {"enable_thinking": False, "levels": [1, "x"]}
    text = '{"enable_thinking": false, "levels": [1, "x"]}'
    assert parse("--chat-template-kwargs", text).data.template_variables == expected
    path = write_yaml(tmp_path, "chat_template_kwargs:\n  enable_thinking: false\n  levels: [1, x]\n")
    assert parse("--config", path).data.template_variables == expected
    for wrong, rule in (("{", "must be JSON"), ("[1]", "must be a JSON object"), ("enable_thinking", "must be JSON")):
        with pytest.raises(UserError, match=re.escape(f"chat_template_kwargs ({wrong}) {rule}")):
            parse("--chat-template-kwargs", wrong)


def test_old_policy_interval_takes_a_number_or_fixed() -> None:
    assert parse("--old-policy-interval", "4").objective.old_policy_interval == 4
    assert parse("--old-policy-interval", "fixed").objective.old_policy_interval == "fixed"


def test_the_tokenizer_comes_from_load_hf_unless_given() -> None:
    assert parse().weights.tokenizer_source == "hf"
    assert parse("--tokenizer", "words").weights.tokenizer_source == "words"


def test_derived_sizes() -> None:
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    config = parse(*layout, "--global-batch-size", "48", "--micro-batch-size", "2")
    assert config.parallel.model_parallel_size == 4
    assert config.parallel.data_parallel_size(world_size=16) == 4


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "lr: 1e-5\nseed: 7\nshuffle: false\ndata: [a.jsonl, b.jsonl]\n")
    config = parse("--config", path, "--seed", "8", "--shuffle", given_elsewhere="data")
    assert (config.optimizer.lr, config.batch.seed, config.data.shuffle) == (1e-5, 8, True)
    assert config.data.data == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 010", 10),
        ("seed: 0o10", 8),
        ("seed: 0x1F", 31),
        ("seed: +7", 7),
        ("prompt_key: yes", "yes"),
        ("prompt_key: 1:30", "1:30"),
        ("prompt_key: 2020-01-02", "2020-01-02"),
        ("prompt_key: 0b11", "0b11"),
        ("save: '010'", "010"),
        ("bf16: TRUE", True),
        ("lr: .5e-3", 5e-4),
        ("lr: 1.", 1.0),
        ("keep_last:", None),
        ("keep_last: ~", None),
    ],
)
def test_yaml_is_read_by_version_1_2(text: str, expected: object, tmp_path: Path) -> None:
    name = text.split(":")[0]
    value = values_of(parse("--config", write_yaml(tmp_path, text), given_elsewhere=name))[name]
    assert (value, type(value)) == (expected, type(expected))


def test_what_is_written_means_the_same_in_both_versions_of_yaml() -> None:
    texts = ["yes", "010", "0o10", "1:30", "1_0", "1e-6", "2020-01-02", "~", "=", "<<", "0x1", "null", ".5", "off", ""]
    written = dump({"texts": texts, "numbers": [8, 1e-6, 1e20], "switch": True, "nothing": None})
    assert yaml.safe_load(written) == {"texts": texts, "numbers": [8, 1e-6, 1e20], "switch": True, "nothing": None}
    config = parse("--system-prompt", "0o10", "--prompt-key", "1:30")
    assert "system_prompt: '0o10'" in config_to_yaml(config)


@pytest.mark.parametrize("name", ["data", "valid_data", "recompute_modules"])
def test_a_list_may_be_one_value_in_yaml_and_adds_up_over_flags(name: str, tmp_path: Path) -> None:
    first, second = two_texts(name)
    path = write_yaml(tmp_path, f"{name}: {first}")
    assert values_of(parse("--config", path, given_elsewhere=name))[name] == (first,)
    twice = parse(flag(name), first, flag(name), second, "--seed", "1", flag(name), first)
    assert values_of(twice)[name] == (first, second, first)
    # The command line wins over the file as a whole.
    assert values_of(parse("--config", path, flag(name), second))[name] == (second,)


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_a_boolean_may_be_spelled_out(name: str, text: str, expected: bool) -> None:
    assert values_of(parse(flag(name), text))[name] is expected
    assert values_of(parse(f"{flag(name)}={text}", "--seed", "1"))[name] is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("lr: 1e-5", 1e-5), ("lr: 1.0e-5", 1e-5), ("lr: 0.00001", 1e-5), ("lr: 0", 0.0), ("save_interval: null", None)],
)
def test_yaml_takes_every_spelling_of_a_float_and_null(text: str, expected: float | None, tmp_path: Path) -> None:
    value = values_of(parse("--config", write_yaml(tmp_path, text)))[text.split(":")[0]]
    assert (value, type(value)) == (expected, type(expected))


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    assert parse("--config", write_yaml(tmp_path, "# nothing yet\n")) == parse()


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draws configurations whose values are hard on a YAML writer: odd strings, tiny floats, lists, absent values."""
    name, count = st.text(min_size=1), st.integers(1, 10**9)
    path = name.map(lambda text: text.replace("$", "$$")).filter(lambda text: not text.startswith("~"))
    return parse_config(
        [
            f"--load-hf={draw(path)}",
            f"--save={draw(path)}",
            f"--data={draw(path)}",
            f"--prompt-key={draw(name)}",
            f"--lr={draw(st.floats(0, 1))!r}",
            f"--adam-eps={draw(st.floats(1e-300, 1))!r}",
            f"--global-batch-size={draw(count)}",
            f"--old-policy-interval={draw(st.one_of(st.just('fixed'), count))}",
            draw(st.sampled_from(["--bf16", "--no-bf16"])),
            *draw(st.one_of(st.just([]), count.map(lambda steps: ["--save-interval", str(steps)]))),
        ]
    )


@settings(deadline=None, max_examples=50)  # a busy machine is no failure
@given(config=configs())
def test_config_to_yaml_reads_back_as_the_same_config(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_yaml(tmp_path_factory.mktemp("yaml"), config_to_yaml(config))
    assert parse_config(["--config", path]) == config


def test_config_to_yaml_keeps_several_files(tmp_path: Path) -> None:
    config = parse("--data", "a b", "1e-6", "null", "--valid-data", "x", "y")
    assert parse_config(["--config", write_yaml(tmp_path, config_to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-batchsize", "8"], "unknown argument --global-batchsize; did you mean --global-batch-size?"),
        (["--confg=a.yaml"], "unknown argument --confg; did you mean --config?"),
        (["--no-lr"], "unknown argument --no-lr"),
        (["--seed", "1", "stray"], "unknown argument stray"),
        (["--global-batch-siz", "8"], "unknown argument --global-batch-siz; did you mean --global-batch-size?"),
        (["--global-batch-size", "eight"], "global_batch_size ('eight') must be an integer"),
        (["--global-batch-size", "8.5"], "global_batch_size ('8.5') must be an integer"),
        (["--lr", "fast"], "lr ('fast') must be a finite number"),
        (["--lr", "nan"], "lr (nan) must be a finite number"),
        (["--lr", "inf"], "lr (inf) must be a finite number"),
        (["--objective", "pfst"], "objective ('pfst') must be one of psft, sft, asft, cadft, deft, dft, "),
        (["--recompute-method", "all"], "recompute_method ('all') must be one of uniform, block"),
        (["--old-policy-interval", "never"], "old_policy_interval ('never') must be an integer or fixed"),
        (["--tokenizer", ""], "tokenizer ('') must be a non-empty string"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--bf16=yes"], "bf16 ('yes') must be true or false"),
        (["--bf16", "on"], "bf16 ('on') must be true or false"),
        (["--no-bf16", "true"], "unknown argument true"),
        (["--seed", "1_0"], "seed ('1_0') must be an integer"),
        (["--seed", "0o10"], "seed ('0o10') must be an integer"),
        (["--config", "missing.yaml"], "cannot read --config missing.yaml: No such file or directory"),
    ],
)
def test_a_bad_command_line_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("global_batchsize: 8", "unknown key global_batchsize; did you mean global_batch_size?"),
        ("global-batch-size: 8", "unknown key global-batch-size; did you mean global_batch_size?"),
        ("1: 8", "unknown key 1"),
        ("seed: 1\nlr: 0\nseed: 2", "seed is given 2 times; keep one"),
        ("global_batch_size: '8'", "global_batch_size ('8') must be an integer"),
        ("global_batch_size: 8.0", "global_batch_size (8.0) must be an integer"),
        ("global_batch_size: true", "global_batch_size (True) must be an integer"),
        ("global_batch_size: null", "global_batch_size (None) must be an integer"),
        ("global_batch_size: [8]", "global_batch_size ([8]) must be an integer"),
        ("lr: true", "lr (True) must be a finite number"),
        ("lr: .inf", "lr (inf) must be a finite number"),
        ("bf16: 1", "bf16 (1) must be true or false"),
        ("bf16: 'true'", "bf16 ('true') must be true or false"),
        ("objective: 1", "objective (1) must be one of psft, sft, asft, cadft, deft, dft, "),
        ("tokenizer: 7", "tokenizer (7) must be a non-empty string"),
        ("valid_data: ''", "valid_data (['']) must be a list of non-empty strings"),
        ("valid_data: 7", "valid_data (7) must be a list of non-empty strings"),
        ("valid_data: [a.jsonl, 1]", "valid_data (['a.jsonl', 1]) must be a list of non-empty strings"),
        ("data: []", "must name at least one file"),
        ("- lr", "must map names to values, but holds a list"),
        ("lr: [", "cannot read --config"),
        ("lr: 2020-13-01", "lr ('2020-13-01') must be a finite number"),
        ("lr: 1_0.5", "lr ('1_0.5') must be a finite number"),
        ("seed: 1:30", "seed ('1:30') must be an integer"),
        ("seed: 1_000", "seed ('1_000') must be an integer"),
        ("seed: 0b11", "seed ('0b11') must be an integer"),
        ("bf16: yes", "bf16 ('yes') must be true or false"),
        ("packing: off", "packing ('off') must be true or false"),
        ("lr: !!python/name:os.system", "cannot read --config"),
    ],
)
def test_a_bad_yaml_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse("--config", write_yaml(tmp_path, text), given_elsewhere="data")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(UserError, match="missing --load-hf, --data; "):
        parse_config(["--save", "run"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--save-interval 0", "save_interval (0) must be at least 1"),
        ("--keep-last 0", "keep_last (0) must be at least 1"),
        ("--eval-interval 0", "eval_interval (0) must be at least 1"),
        ("--eval-iters 0", "eval_iters (0) must be at least 1"),
        ("--seq-length 1", "seq_length (1) must be at least 2"),
        ("--train-iters 0", "train_iters (0) must be at least 1"),
        ("--epochs 0", "epochs (0) must be at least 1"),
        ("--global-batch-size 0", "global_batch_size (0) must be at least 1"),
        ("--micro-batch-size -1", "micro_batch_size (-1) must be at least 1"),
        ("--seed -1", "seed (-1) must be at least 0"),
        ("--clip-ratio-high 0", "clip_ratio_high (0.0) must be greater than 0"),
        ("--clip-ratio-low 0", "clip_ratio_low (0.0) must be greater than 0"),
        ("--kl-top-k -1", "kl_top_k (-1) must be at least 0"),
        ("--kl-coef -1", "kl_coef (-1.0) must be at least 0"),
        ("--p-power-q 0", "p_power_q (0.0) must be greater than 0"),
        ("--eaft-alpha -1", "eaft_alpha (-1.0) must be at least 0"),
        ("--trsft-alpha 0", "trsft_alpha (0.0) must be greater than 0"),
        ("--trsft-alpha 2", "trsft_alpha (2.0) must be a probability, between 0 and 1"),
        ("--profit-threshold 1.1", "profit_threshold (1.1) must be a probability, between 0 and 1"),
        ("--old-policy-interval 0", "old_policy_interval (0) must be at least 1"),
        ("--sft-warmup-iters -1", "sft_warmup_iters (-1) must be at least 0"),
        ("--lr -1", "lr (-1.0) must be at least 0"),
        ("--min-lr -1", "min_lr (-1.0) must be at least 0"),
        ("--lr-warmup-iters -1", "lr_warmup_iters (-1) must be at least 0"),
        ("--exit-duration-in-mins 0", "exit_duration_in_mins (0.0) must be greater than 0"),
        ("--profile-step-start 0", "profile_step_start (0) must be at least 1"),
        ("--profile-rank -1", "profile_rank (-1) must be at least 0"),
        ("--profile-step-end 3", "profile_step_end (3) must not be below profile_step_start (10); change one of them"),
        ("--lr-warmup-fraction 1", "lr_warmup_fraction (1.0) must be at least 0 and below 1"),
        ("--lr-warmup-fraction -0.1", "lr_warmup_fraction (-0.1) must be at least 0 and below 1"),
        ("--lr-decay-iters 0", "lr_decay_iters (0) must be at least 1"),
        ("--lr-wsd-decay-iters 0", "lr_wsd_decay_iters (0) must be at least 1"),
        ("--weight-decay -1", "weight_decay (-1.0) must be at least 0"),
        ("--adam-beta1 1", "adam_beta1 (1.0) must be at least 0 and below 1"),
        ("--adam-beta2 -0.5", "adam_beta2 (-0.5) must be at least 0 and below 1"),
        ("--adam-eps 0", "adam_eps (0.0) must be greater than 0"),
        ("--clip-grad -1", "clip_grad (-1.0) must be at least 0"),
        ("--optimizer-offload-fraction 0", "optimizer_offload_fraction (0.0) must be above 0 and at most 1"),
        ("--optimizer-offload-fraction 1.5", "optimizer_offload_fraction (1.5) must be above 0 and at most 1"),
        ("--tensor-model-parallel-size 0", "tensor_model_parallel_size (0) must be at least 1"),
        ("--pipeline-model-parallel-size 0", "pipeline_model_parallel_size (0) must be at least 1"),
        ("--context-parallel-size 0", "context_parallel_size (0) must be at least 1"),
        ("--num-layers-per-virtual-pipeline-stage 0", "num_layers_per_virtual_pipeline_stage (0) must be at least 1"),
        ("--recompute-modules mlp attention", "recompute_modules (attention) must be some of core_attn, mlp, moe"),
        ("--recompute-num-layers 0", "recompute_num_layers (0) must be at least 1"),
        ("--log-interval 0", "log_interval (0) must be at least 1"),
        ("--log-clipped-tokens 0", "log_clipped_tokens (0) must be at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-from a --load b", "init_from (a) starts a run, load (b) goes on with one; remove one of them"),
        ("--init-from a --random-init", "random_init (True) has no effect with init_from (a); remove one of them"),
    ],
)
def test_a_run_starts_from_one_set_of_weights(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert str(error.value) == message


def test_ranges_hold_without_a_command_line_too() -> None:
    with pytest.raises(UserError, match="keep_last"):
        WeightsConfig(load_hf="hf", save="run", keep_last=0)


def test_importing_the_configuration_loads_no_numeric_library() -> None:
    heavy = {"torch", "numpy", "transformers", "megatron", "megatron.core", "datasets"}
    script = f"import sys, megatron_psft.config.rules; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("--old-p", {"--old-policy-interval", "--old-policy-micro-batch-size"}),
        ("--objective p", {"psft", "p-power", "profit"}),
        ("--old-policy-interval f", {"fixed"}),
    ],
)
def test_a_shell_completes_flags_and_choices(tmp_path: Path, typed: str, offered: set[str]) -> None:
    line, answer = f"pretrain_psft.py {typed}", tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    shell |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, str(REPOSITORY / "pretrain_psft.py")]
    subprocess.run(command, env={**os.environ, **shell}, check=True)
    assert {text.strip() for text in answer.read_text().splitlines()} == offered
