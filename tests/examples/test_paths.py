"""Paths in the examples' flags: `~` and variables mean what they mean to `psft`."""

import importlib

import pytest

from megatron_psft.config.flags import parse_flags
from tests.support.cli import REPOSITORY

COMMANDS = {
    "mixed/mix": ("Config", ["--method", "luffy", "--demonstrations {}", "--rollouts {}", "--out {}"]),
    "mixed/grpo": ("Config", ["--prompts {}", "--model {}", "--out {}", "--rounds", "1", "--prompts-per-round", "1"]),
    "rl_cold_start/convert_prompts": ("Config", ["--prompts {}", "--framework", "verl", "--out {}"]),
    "rl_cold_start/dpo": ("Config", ["--model {}", "--pairs {}", "--out {}"]),
    "nemo/finetune_psft": (
        "FinetuneConfig",
        ["--recipe", "qwen25_7b", "--pretrained-checkpoint {}", "--data {}", "--save {}"],
    ),
    "nemo/launch_nemo_run": (
        "LaunchConfig",
        ["--executor", "local", "--container-image {}", "--container-mounts {}"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_is_expanded_whichever_flag_has_it(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "in/there")
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / command.split("/")[0]))
    name = f"examples.{command.replace('/', '.')}"
    module = importlib.import_module(name)
    root, words = COMMANDS[command]
    argv = [part for word in words for part in word.format("~/$PLACE/x").split()]
    config = repr(parse_flags(getattr(module, root), argv))
    num_paths = sum("{}" in word for word in words)
    assert config.count(f"{tmp_path}/in/there/x") == num_paths, config
