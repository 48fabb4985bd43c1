"""How a run's processes share the work of reading, and that they agree on what they have read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.hf.folder import MANIFEST
from megatron_psft.model.shape import read_max_positions
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.recipes import SHAPES


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=1)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 8)
    return folder


def command_line(inputs: Path, run: Path, data: Path) -> list[str]:
    flags = {"load-hf": inputs / "model", "tokenizer": inputs / "tokenizer", "data": data, "save": run / "save"}
    flags |= {"data-cache-dir": run / "cache", "train-iters": 1, "global-batch-size": 2}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def _count_tokenized(argv: list[str]) -> tuple[Exit, int]:
    """Runs the command line, and counts the sources that this rank has tokenized."""
    from megatron_psft.data import cache

    tokenize, calls = cache.tokenize_chunks, []

    def counted(*args):
        calls.append(None)
        return tokenize(*args)

    cache.tokenize_chunks = counted
    try:
        return run_cli(argv), len(calls)
    finally:
        cache.tokenize_chunks = tokenize


def _run_as_node(argv_by_rank: list[list[str]]) -> Exit:
    """Runs this rank's command line as the first process of a node of its own."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    return run_cli(argv_by_rank[rank])


@pytest.mark.slow
def test_one_process_of_a_node_tokenizes_for_all(pool, inputs, tmp_path):
    argv = command_line(inputs, tmp_path, inputs / "records.jsonl")
    results = pool.run(_count_tokenized, 2, argv)
    assert [exit.code for exit, _ in results] == [0, 0], results[0][0].err
    assert [count for _, count in results] == [1, 0]
    assert "passes  records" in results[0][0].err
    assert "1 step of 2 packs makes " in results[0][0].err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "1 of 1 record is bad"), (b"", "holds no record")],
)
def test_a_mistake_that_the_first_process_finds_ends_all(pool, inputs, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    results = pool.run(_count_tokenized, 2, command_line(inputs, tmp_path, tmp_path / "bad.jsonl"))
    assert [exit.code for exit, _ in results] == [2, 2]
    assert [count for _, count in results] == [1, 0]
    (error,) = [line for line in results[0][0].err.splitlines() if line.startswith("error: ")]
    assert message in error + results[0][0].err
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("field", ["data", pytest.param("valid_data", marks=pytest.mark.slow)])
def test_nodes_with_other_data_are_refused(pool, inputs, tmp_path, field):
    other = tiny.write_records(tmp_path / "other.jsonl", 8, seed=1)
    argvs = []
    for rank, data in enumerate([inputs / "records.jsonl", other]):
        argv = command_line(inputs, tmp_path / str(rank), data if field == "data" else other)
        valid = ["--eval-interval", "1", "--valid-data", str(other), f"general={data}"]
        argvs.append(argv if field == "data" else [*argv, *valid])
    exits = pool.run(_run_as_node, 2, argvs)
    assert [exit.code for exit in exits] == [2, 2]
    assert f"error: {field} must be the same on all nodes, but rank 0 has 8 records and rank 1 has 8" in exits[0].err


def test_a_node_without_the_data_ends_all(pool, inputs, tmp_path):
    argvs = [
        command_line(inputs, tmp_path / str(rank), data)
        for rank, data in enumerate([inputs / "records.jsonl", tmp_path / "gone.jsonl"])
    ]
    exits = pool.run(_run_as_node, 2, argvs)
    assert [exit.code for exit in exits] == [2, 2]
    assert "gone.jsonl) does not exist" in exits[0].err


@pytest.mark.parametrize("field", ["data", "valid_data", "config", "save", "load_hf", "load_lora", "working directory"])
def test_an_export_into_a_folder_of_the_run_is_refused(pool, inputs, tmp_path, field):
    """Also where it has been exported to before."""
    project = tmp_path / "project"
    project.mkdir()
    data = tiny.write_records(project / "train.jsonl" if field == "data" else tmp_path / "train.jsonl", 8)
    argv = [*command_line(inputs, tmp_path / "run", data), "--export-hf", str(project)]
    if field == "valid_data":
        valid = tiny.write_records(project / "valid.jsonl", 4)
        argv += ["--valid-data", str(data), f"held-out={valid}=0.5", "--eval-interval", "1"]
    if field == "config":
        (project / "run.yaml").write_text("seed: 3")
        argv += ["--config", str(project / "run.yaml")]
    if field == "save":
        argv += ["--save", str(project / "run")]
    if field == "load_hf":
        argv += ["--load-hf", str(tiny.build_model(project / "model", "qwen2", num_hidden_layers=1))]
    if field == "load_lora":
        argv += ["--lora-rank", "2", "--load-lora", str(project)]
    if field == "working directory":
        argv[-1] = str(Path.cwd().parent)
    for _ in range(2):
        (exit,) = pool.run(run_cli, 1, argv)
        assert exit.code == 2
        assert f"error: export_hf ({argv[argv.index('--export-hf') + 1]}) is or holds " in exit.err
        assert field in exit.err.replace("--config", "config")
        assert not (project / "config.json").exists()
        (project / MANIFEST).write_text(json.dumps({"complete": True, "files": {}}))


@pytest.mark.parametrize(
    ("change", "positions"),
    [
        ({}, 512),
        ({"max_position_embeddings": None}, None),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 64,
                }
            },
            512,
        ),
    ],
)
def test_positions_are_those_that_config_json_counts(tmp_path, change, positions):
    """`max_position_embeddings` is what a scaled model reaches, as transformers and vLLM have it of Llama 3's, or what
    one with yarn had before."""
    shape = SHAPES["Qwen/Qwen2.5-7B-Instruct"] | {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(shape | change))
    assert read_max_positions(tmp_path) == positions


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "starts.jsonl"])
def test_a_file_of_somebody_else_in_the_run_folder_is_not_written_to(pool, inputs, tmp_path, name):
    save = tmp_path / "run" / "save"
    save.mkdir(parents=True)
    (save / name).write_text('{"mine": 1}\n')
    data = tiny.write_records(tmp_path / "train.jsonl", 8)
    (exit,) = pool.run(run_cli, 1, command_line(inputs, tmp_path / "run", data))
    assert exit.code == 2
    assert f"error: save ({save}) holds {name}, which no run wrote" in exit.err
    assert [(path.name, path.read_text()) for path in save.iterdir()] == [(name, '{"mine": 1}\n')]


def test_a_run_begins_beside_other_files_and_again_by_its_own_config(pool, inputs, tmp_path):
    save = tmp_path / "run" / "save"
    save.mkdir(parents=True)
    (save / "notes.txt").write_text("mine")
    argv = command_line(inputs, tmp_path / "run", tiny.write_records(tmp_path / "train.jsonl", 8))
    assert pool.run(run_cli, 1, argv)[0].code == 0
    own = ["--config", str(save / "config.yaml")]
    (exit,) = pool.run(run_cli, 1, own)
    assert (exit.code, "nothing to do" in exit.err + exit.out) == (0, True)
    for checkpoint in step_folders(save):  # as where a run was killed before its first
        shutil.rmtree(checkpoint)
    assert pool.run(run_cli, 1, own)[0].code == 0
    assert (save / "notes.txt").read_text() == "mine"


def test_an_export_to_come_whose_place_is_taken_is_refused_before_training(pool, inputs, tmp_path):
    taken = tmp_path / "run" / "save" / "step_0000001_hf"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text("{}")
    argv = command_line(inputs, tmp_path / "run", tiny.write_records(tmp_path / "train.jsonl", 8))
    (exit,) = pool.run(run_cli, 1, [*argv, "--save-interval", "1", "--export-interval", "1"])
    assert exit.code == 2
    assert f"error: export_interval ({taken}) holds config.json" in exit.err
    assert not (tmp_path / "run" / "save" / "metrics.jsonl").exists()
