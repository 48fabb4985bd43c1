"""The command line as a user meets it: what a mistake costs, and what a run leaves."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_psft.cli import train
from megatron_psft.distributed.exit_code import FILE_VARIABLE
from tests.support import tiny
from tests.support.cli import REPOSITORY, run_cli, run_torchrun

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 12)
    return folder


def command_line(inputs: Path, save: Path, **changes: object) -> list[str]:
    """A small run's flags; `changes` replaces values, and None takes a flag away."""
    flags = {
        "load_hf": inputs / "model",
        "tokenizer": inputs / "tokenizer",
        "data": inputs / "records.jsonl",
        "save": save,
        "train_iters": 4,
        "global_batch_size": 4,
        "lr": 1e-3,
    }
    flags |= changes
    return [
        text
        for name, value in flags.items()
        if value is not None
        for text in ("--" + name.replace("_", "-"), str(value))
    ]


def assert_refused(pool, argv: list[str], *parts: str, world_size: int = 2, code: int = 2) -> None:
    """All ranks exit with `code`, and only rank 0 speaks: one `error:` line that holds all `parts`."""
    exits = pool.run(run_cli, world_size, argv)
    assert [exit.code for exit in exits] == [code] * world_size
    printed = "".join(exit.out + exit.err for exit in exits)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert "Traceback" not in printed
    for part in parts:
        assert part in errors[0], errors[0]


MISTAKES = {
    "world size": (
        {},
        [*TP2, *PP2],
        ("world_size (2)", "tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size (4)"),
    ),
    "batch size": ({"global_batch_size": 3}, [], ("global_batch_size (3)", "micro_batch_size", "data_parallel_size")),
    "unknown flag": ({}, ["--clip-ratio-hig", "0.3"], ("--clip-ratio-hig", "did you mean --clip-ratio-high?")),
    "wrong value": ({"lr": "fast"}, [], ("lr", "fast")),
    "missing flag": ({"data": None}, [], ("--data",)),
    "missing data": ({"data": "no/such/file.jsonl"}, [], ("no/such/file.jsonl",)),
    "missing model": ({"load_hf": "./no/such/model"}, [], ("load_hf (./no/such/model)", "existing folder")),
    "missing checkpoint": ({"load": "./no/such/run"}, [], ("load (no/such/run)", "complete step folder")),
    "no effect": (
        {},
        ["--objective", "sft", "--clip-ratio-high", "0.3"],
        ("clip_ratio_high (0.3)", "no effect", "sft"),
    ),
    "context": ({}, ["--context-parallel-size", "4"], ("world_size (2)", "context_parallel_size (4)")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_flags_is_one_line_on_all_ranks(pool, inputs, tmp_path, mistake):
    changes, extra, parts = MISTAKES[mistake]
    assert_refused(pool, command_line(inputs, tmp_path / "run", **changes) + extra, *parts)


def test_layout_that_cuts_heads_or_layers_unevenly_is_refused(pool, inputs, tmp_path):
    three_heads = tiny.build_model(
        tmp_path / "heads", "llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48
    )
    three_layers = tiny.build_model(tmp_path / "layers", "qwen2", num_hidden_layers=3)
    argv = command_line(inputs, tmp_path / "run", load_hf=three_heads)
    assert_refused(pool, argv + TP2, "num_attention_heads (3)", "tensor_model_parallel_size (2)")
    argv = command_line(inputs, tmp_path / "run", load_hf=three_layers)
    assert_refused(pool, argv + PP2, "num_layers (3)", "pipeline_model_parallel_size (2)")


def test_unknown_yaml_key_names_the_nearest(pool, inputs, tmp_path):
    (tmp_path / "run.yaml").write_text("old_policy_intervall: 4\n")
    argv = [*command_line(inputs, tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert_refused(pool, argv, "old_policy_intervall", "did you mean old_policy_interval?")


RECORDS = {
    "empty file": ("", ("no", "record")),
    "broken line": ('{"messages": [\n', (":1",)),
    "no assistant": ('{"messages": [{"role": "user", "content": "add"}]}\n', (":1", "assistant")),
    "wrong type": ('{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "x"}]}\n', (":1",)),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_data_that_cannot_be_trained_on_is_refused(pool, inputs, tmp_path, kind):
    text, parts = RECORDS[kind]
    (tmp_path / "bad.jsonl").write_text(text)
    exits = pool.run(run_cli, 2, command_line(inputs, tmp_path / "run", data=tmp_path / "bad.jsonl"))
    assert [exit.code for exit in exits] == [2, 2]
    assert exits[0].err.count("error: ") == 1
    for part in ("bad.jsonl", *parts):
        assert part in exits[0].err
    assert "Traceback" not in exits[0].err + exits[1].err


def test_bad_records_are_skipped_only_on_demand(pool, inputs, tmp_path):
    data = tmp_path / "mixed.jsonl"
    data.write_text('{"messages": []}\n' + (inputs / "records.jsonl").read_text())
    argv = command_line(inputs, tmp_path / "run", data=data)
    assert_refused(pool, argv, "1", world_size=1)
    (exit,) = pool.run(run_cli, 1, [*argv, "--skip-bad-records"])
    assert exit.code == 0
    assert "mixed.jsonl:1" in exit.err


@pytest.mark.slow
def test_overlong_records_stop_the_run_unless_told_otherwise(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run", seq_length=40)
    assert_refused(pool, argv, "seq_length (40)", "records.jsonl:", "--overlong")
    for choice, said in (("drop", "over-long"), ("truncate", "truncated: ")):
        (exit,) = pool.run(run_cli, 1, [*command_line(inputs, tmp_path / choice, seq_length=40), "--overlong", choice])
        assert exit.code == 0
        assert said in exit.err
        assert "truncated: 0; dropped: none" not in exit.err


def test_pickled_weights_are_not_opened(pool, inputs, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((inputs / "model" / "config.json").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(pool, command_line(inputs, tmp_path / "run", load_hf=folder), "pytorch_model.bin", "safetensors")


def test_unsupported_model_type_is_named(pool, inputs, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert_refused(
        pool, command_line(inputs, tmp_path / "run", load_hf=folder), "model_type (gpt2)", "llama, qwen2, qwen3"
    )


@pytest.mark.slow
def test_checkpoint_of_another_model_is_refused_and_left_alone(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run")
    assert pool.run(run_cli, 1, argv)[0].code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = tiny.build_model(tmp_path / "other", "qwen2", num_hidden_layers=2, intermediate_size=64)
    argv = command_line(inputs, tmp_path / "run", load_hf=other)
    assert_refused(pool, argv, "step_0000004", "model ffn_hidden_size (96)", "(64)")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_second_run_into_the_same_folder_has_nothing_left_to_do(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run")
    (first,) = pool.run(run_cli, 1, argv)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (second,) = pool.run(run_cli, 1, argv)
    assert (first.code, second.code) == (0, 0)
    assert "resumed from" in second.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_run_folder_tells_how_it_was_made(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run", valid_data=inputs / "records.jsonl", eval_interval=2)
    assert pool.run(run_cli, 1, argv)[0].code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    evaluated = [("valid_nll" in line, "valid_entropy" in line) for line in lines]
    assert evaluated == [(True, True), *[(False, False), (True, True)] * 2]
    assert lines[0].keys() == {"step", "valid_nll", "valid_entropy"}
    resolved = (tmp_path / "run" / "config.yaml").read_text()
    assert "clip_ratio_high: 0.28" in resolved
    assert "# megatron-core " in resolved
    # The file is a configuration: it alone repeats the run.
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--save", str(tmp_path / "again")]
    assert pool.run(run_cli, 1, again)[0].code == 0
    repeated = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in repeated[1:]] == [line["loss"] for line in lines[1:]]


@pytest.mark.slow
def test_epochs_count_packs_and_metrics_count_records_and_real_tokens(pool, inputs, tmp_path):
    flags = {"train_iters": None, "epochs": 2, "global_batch_size": 1, "seq_length": 256}
    (packed,) = pool.run(run_cli, 1, command_line(inputs, tmp_path / "packed", **flags))
    (plain,) = pool.run(run_cli, 1, [*command_line(inputs, tmp_path / "plain", **flags), "--no-packing"])
    assert (packed.code, plain.code) == (0, 0)
    found, wanted = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("packed", "plain")
    )
    (said,) = [line for line in packed.err.splitlines() if line.startswith("packing: ")]
    packs = int(said.split()[1])
    assert f"packing: {packs} packs of at most 256 tokens, " in said
    assert len(found) == 2 * packs < len(wanted) == 24
    for name in ("tokens", "label_tokens", "records"):
        assert sum(line[name] for line in found) == sum(line[name] for line in wanted)
    assert "old policy: log-probabilities of " in packed.err


def test_non_finite_loss_stops_all_ranks_and_names_step_and_rank(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run", lr=1e30, clip_grad=1e30)
    assert_refused(pool, argv + TP2, "step 2", "not finite on rank 0", "nothing was updated", code=3)


def test_help_needs_no_torch_and_names_every_section():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "train", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--old-policy-interval" in done.stdout
    assert "import torch" not in done.stderr
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("valid_data", "general=gone.jsonl", "valid_data (gone.jsonl) does not exist; "),
        pytest.param(
            *("lora_targets", "q_porj", "lora_targets (q_porj) must be linear layers that all families have, "),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_torch_is_imported(inputs, tmp_path, flag, value, message):
    argv = command_line(inputs, tmp_path / "run", eval_interval=1, **{flag: value})
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "train", *argv]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message}")
    assert not {" torch", " pyarrow", " transformers"} & {line.rpartition("|")[2] for line in done.stderr.splitlines()}


@pytest.mark.slow
def test_interrupted_run_ends_quietly_and_resumes(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run", train_iters=24, save_interval=4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "pretrain_psft.py", *argv]
    # What started pytest may have it ignore the signal, which a child inherits.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 5):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "ended by SIGINT: the same command resumes" in err
    assert "Traceback" not in err
    (exit,) = pool.run(run_cli, 1, argv)
    assert exit.code == 0
    assert "resumed from" in exit.err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 25))


def test_a_run_that_is_interrupted_while_it_starts_says_so_in_a_line(inputs, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare_environment", interrupt)
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "code"))
    assert train.main(command_line(inputs, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "ended by SIGINT before the run began\n"
    assert (tmp_path / "code").read_text() == "130\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_and_exports(inputs, tmp_path):
    argv = command_line(inputs, tmp_path / "run", export_hf=tmp_path / "hf")
    done = run_torchrun(["pretrain_psft.py", *argv, *TP2, "--sequence-parallel"], 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_torchrun_shows_a_mistake_once_and_its_code_is_left_in_the_file(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "code"))
    done = run_torchrun(["pretrain_psft.py", *command_line(inputs, tmp_path / "run", global_batch_size=3)], 2)
    assert done.returncode == 1
    assert (tmp_path / "code").read_text() == "2\n"
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: global_batch_size (3) must be a multiple of")
    assert "exitcode  : 2" in done.stderr
