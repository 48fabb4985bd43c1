"""The report through its command line."""

import subprocess
import sys

from megatron_psft.cli.doctor import main
from megatron_psft.errors import UserError
from tests.support import tiny
from tests.support.cli import REPOSITORY, Exit, call_main


def run_doctor(pool, *flags: object) -> Exit:
    """In a pool worker, as the command answers `torch.cuda` for the CPU."""
    (exit,) = pool.run(call_main, 1, main, [str(flag) for flag in flags])
    return exit


def test_a_machine_that_trains_is_found_well(pool, tmp_path):
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    model = tiny.build_model(tmp_path / "model", "llama")
    exit = run_doctor(pool, "--model", model, "--tokenizer", tokenizer)
    assert exit.code == 0, exit.out + exit.err
    sections = [
        "versions\n  megatron_psft ",
        "\nmachine\n  python ",
        "\nwhat a run uses here\n  device ",
        "\nchecks\n  ok: ",
    ]
    places = [exit.out.index(section) for section in sections]
    assert places == sorted(places)
    assert "  collectives   gloo (torch sees no GPU)\n" in exit.out
    assert "  optimizer     torch.optim.adamw.AdamW (" in exit.out
    assert "  ok:       a toy model has made an optimizer step with all of these\n" in exit.out
    assert "is a llama model of 4 layers\n" in exit.out
    assert (
        "  ok:       log-probabilities of all 211 tokens after each of 256 random ones differ from those of "
        in exit.out
    )
    assert "problem:" not in exit.out


def test_what_would_break_a_run_ends_in_code_1(pool, tmp_path):
    model = tiny.build_model(tmp_path / "model", "llama")  # without a tokenizer
    (model / "model.safetensors").unlink()
    exit = run_doctor(pool, "--model", model)
    assert exit.code == 1, exit.out + exit.err
    assert f"  skipped:  log-probabilities were not compared with transformers': {model} holds no weights\n" in exit.out
    assert exit.out.splitlines()[-1] == f"  problem:  {model} has no tokenizer.json, and so no fast tokenizer"


def _with_a_broken_engine() -> Exit:
    from megatron_psft.distributed import device

    def detect(local_rank: int) -> None:
        raise UserError("transformer_engine is installed and cannot be imported (why)")

    original, device.detect = device.detect, detect
    try:
        return call_main(main, [])
    finally:
        device.detect = original


def test_a_broken_transformer_engine_is_a_problem(pool):
    (exit,) = pool.run(_with_a_broken_engine, 1)
    assert exit.code == 1, exit.out + exit.err
    assert exit.out.splitlines()[-1] == "  problem:  transformer_engine is installed and cannot be imported (why)"


def test_mistakes_are_one_line_and_code_2(pool):
    exit = run_doctor(pool, "--tokenizer", "x")
    assert (exit.code, exit.err) == (2, "error: tokenizer (x) has no effect without model; name both\n")
    exit = run_doctor(pool, "--model", "./nowhere")
    assert exit.code == 2
    assert exit.err == "error: model (./nowhere) must be an existing folder or a hub ID; check the path\n"
    assert "machine" not in exit.out  # the answer comes before anything that takes seconds


def test_help_has_an_example_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "doctor", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft doctor --model Qwen/Qwen2.5-7B-Instruct" in done.stdout
    assert " torch\n" not in done.stderr
