# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete commands and flags
"""The command `psft`: finds the command that a line names, and imports that one only."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_psft import __version__

COMMANDS = {
    "train": "trains a model: in one process as it is, in several under torchrun",
    "data": "prints what a training step gets, labels marked; lists and prunes the cache of tokenized data",
    "plot": "draws runs as one HTML report and PNGs",
    "convert": "converts weights between Hugging Face and Megatron-Core, without a training run",
    "evaluate": "asks a model the questions of maths sets and of lm-evaluation-harness tasks",
    "compare": "sets two evaluations side by side, question by question",
    "rollout": "samples answers, scores them and writes them as records with advantages",
    "plan": "prints memory, operations and a layout for a cluster before a run is started",
    "doctor": "says what is installed, what a run here would use and why, and what would break it",
}
"""Each is a module of this room with a `main(argv) -> exit code`."""

HELP = """usage: psft COMMAND FLAGS

Proximal Supervised Fine-Tuning (arXiv 2508.17784) of Hugging Face models on Megatron-Core.

commands:
{commands}

`psft COMMAND --help` explains a command's flags and has examples. A line that begins with a flag trains:
  torchrun --nproc-per-node 8 -m megatron_psft --load-hf DIR --data train.jsonl --save runs/first --epochs 1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (the process's own if None) begins with, and returns its exit code.

    A line that begins with a flag trains; an empty one lists the commands, as --help does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        words = _complete()
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<8}  {text}" for name, text in COMMANDS.items())))
        return 0
    if words[0] == "--version":
        print(f"megatron_psft {__version__}")
        return 0
    name, *flags = words if not words[0].startswith("-") else ["train", *words]
    if name not in COMMANDS:
        return _refuse(name)
    return int(import_module(f"megatron_psft.cli.{name}").main(flags))


def _refuse(name: str) -> int:
    # Late: `psft` itself answers at once.
    from megatron_psft.cli.train import refuse
    from megatron_psft.errors import UserError, nearest_name_hint

    return refuse(UserError(f"unknown command {name}{nearest_name_hint(name, COMMANDS)}; psft --help lists all"))


def _complete() -> list[str]:
    """Answers a shell that asks how the name of a command goes on, and ends; or returns the command that the line has
    named, whose own parser answers for its flags."""
    start = int(os.environ["_ARGCOMPLETE"])  # words of the line that are the program
    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    whole = typed.split() if typed[-1:].isspace() else typed.split()[:-1]
    command = whole[start : start + 1]
    if not command and not typed.split()[-1].startswith("-"):
        import argcomplete

        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("command", choices=list(COMMANDS))
        argcomplete.autocomplete(parser)
    if command and not command[0].startswith("-"):
        os.environ["_ARGCOMPLETE"] = str(start + 1)  # of which argcomplete takes the words after the program
        return command
    return ["train"]
