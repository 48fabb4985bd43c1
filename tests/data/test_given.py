"""Every error about a path of records names the setting that the path was given by: a table of flags and mistakes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_psft.cli import compare, data, evaluate, rollout
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.schema import Config
from megatron_psft.errors import UserError
from megatron_psft.train.inputs import read_inputs
from tests.support import tiny

RECORD = '{"prompt": "add one", "completion": "two"}\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=1)
    tiny.build_tokenizer(folder / "model")
    (folder / "good.jsonl").write_text(RECORD * 2)
    return folder


FILES = {
    "gone.jsonl": None,
    "empty.jsonl": b"",
    "broken.jsonl": b"{\n",
    "none.jsonl": b"{}\n",
    "empty.json": b"[]",
    "broken.json": b"{",
    "broken.parquet": b"PAR1",
    "broken.jsonl.gz": b"\x1f\x8b\x08\x00",
    "table.csv": b"a,b\n",
    "folder": {"table.csv": b"a,b\n"},
    "splits": {"test-a.jsonl": RECORD.encode(), "val.jsonl": RECORD.encode()},
}
"""What a path may lead to that is no file of records."""


def fill(folder: Path, content: object, name: str) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        path.mkdir()
        for inner, part in content.items():
            fill(path, part, inner)
    return path


ANY = {
    "gone.jsonl": "{0} ({1}) does not exist; ",
    "broken.json": "{0} ({1}) must be one JSON array: ",
    "broken.parquet": "{0} ({1}) cannot be read as Parquet: ",
    "broken.jsonl.gz": "{0} ({1}) cannot be read as gzip: ",
    "table.csv": "{0} ({1}) must be a .jsonl, .json or .parquet file; ",
    "folder": "{0} ({1}) is a folder without any .jsonl, .json or .parquet file; ",
    "splits": "{0} ({1}) has ",
    "gone/*.jsonl": "{0} ({1}) is a pattern that matches nothing; ",
    "gone.jsonl@": "{0} ({1}) must have a name before and after : and @; ",
    "http://a.jsonl": "{0} ({1}) must not be an address; ",
}
"""How an error about a path begins, of whatever setting."""

TRAINED = {
    "empty.jsonl": "{0} ({1}) holds no record; ",
    "empty.json": "{0} ({1}) holds no record; ",
    "broken.jsonl": "{0} holds no usable record; ",
    "none.jsonl": "{0} holds no usable record; ",
    "good.jsonl=0": "{0} ({1}) must have a weight above 0, ",
    "good.jsonl=0.1": "{0} ({2}) takes none of 2 records with weight 0.1; ",
}
OWN = {
    "--data": TRAINED,
    "--valid-data": TRAINED,
    "--drift-data": {
        "empty.jsonl": "{0} ({1}) must hold at least 2 answers, found 0; ",
        "broken.jsonl": "{0} must hold the model's own answers: {1}:1: not JSON ",
        "none.jsonl": "{0} must hold the initial model's own answers: {1}:1 has no prompt_tokens; ",
    },
    "--prompts": {
        "empty.jsonl": "{0} ({1}) must hold at least one row",
        "broken.jsonl": "{0} must hold usable rows only, 1 of 1 are not; the first is {1}:1: not JSON",
    },
    "--tasks": {
        "gone.jsonl": "{0} ({1}) must be an existing file",
        "gone/*.jsonl": "{0} ({1}) must be an existing file",
        "gone.jsonl@": "{0} ({1}) must be an existing file",
        "http://a.jsonl": "{0} ({1}) must be an existing file",
        "empty.jsonl": "{0} ({1}) must hold at least one question",
        "broken.jsonl": "{0} ({1}) must hold usable questions only; the first row is {1}:1: not JSON",
        "none.jsonl": "{0} ({1}) must have rows of ",
    },
}
"""How it begins where a setting says more."""


def of_training(flag: str, path: str, inputs: Path, out: Path) -> str:
    """What `psft train` would print; of named sets, too."""
    named = {"--data": path, "--valid-data": f"general={path}", "--drift-data": f"general={path}"}
    argv = ["--load-hf", str(inputs / "model"), "--save", str(out / "run"), "--train-iters", "1"]
    argv += ["--data", str(inputs / "good.jsonl"), "--data-cache-dir", str(out / "cache")] if flag != "--data" else []
    argv += ["--eval-interval", "1"] if flag != "--data" else []
    try:
        read_inputs(parse_flags(Config, [*argv, flag, named[flag]]), is_main=False)
    except UserError as error:
        return f"error: {error}"
    return "no error"


def of_command(main: Callable[[list[str]], int], *flags: str) -> Callable[..., str]:
    """What a command prints of a path behind the last of the flags."""

    def run(flag: str, path: str, inputs: Path, out: Path) -> str:
        places = {"MODEL": inputs / "model", "OUT": out / "out", "GOOD": inputs / "good.jsonl"}
        return str(main([*(str(places.get(word, word)) for word in flags), flag, path]))

    return run


COMMANDS = {
    "train --data": of_training,
    "train --valid-data": of_training,
    "train --drift-data": of_training,
    "data --data": of_command(data.main, "--tokenizer", "MODEL"),
    "rollout --prompts": of_command(rollout.main, "--model", "MODEL", "--verifier", "exact", "--out", "OUT"),
    "evaluate --tasks": of_command(evaluate.main, "--model", "MODEL", "--verifier", "exact", "--out", "OUT"),
    "compare --tasks": of_command(
        compare.main, "--first", "MODEL", "--second", "MODEL", "--verifier", "exact", "--out", "OUT"
    ),
}
MISTAKES = [(command, mistake) for command in COMMANDS for mistake in ANY | OWN[command.split()[1]]]


@pytest.mark.parametrize(("command", "mistake"), MISTAKES)
def test_an_error_begins_with_the_setting_that_the_path_is_of(inputs, tmp_path, capsys, command, mistake):
    flag = command.split()[1]
    name = mistake.split("=")[0]
    if mistake.startswith("http"):
        path = mistake
    elif name == "good.jsonl":
        path = f"{inputs}/{mistake}"
    else:
        path = str(fill(tmp_path, FILES.get(mistake), mistake))
    printed = COMMANDS[command](flag, path, inputs, tmp_path) + "\n" + capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    beginning = (ANY | OWN[flag])[mistake].format(flag[2:].replace("-", "_"), path, path.split("=")[0])
    assert line.startswith(f"error: {beginning}")


@pytest.mark.parametrize("flag", ["--valid-data", "--drift-data"])
def test_a_set_that_is_named_twice_is_refused_by_its_setting(flag):
    argv = ["--load-hf", "m", "--save", "s", "--data", "a.jsonl", "--train-iters", "1", "--eval-interval", "1"]
    with pytest.raises(UserError, match=f"^{flag[2:].replace('-', '_')} names the set general twice; "):
        parse_flags(Config, [*argv, flag, "general=a.jsonl", "general=b.jsonl"])


def test_questions_that_are_named_twice_are_refused_by_their_setting(inputs, tmp_path, capsys):
    paths = [str(tmp_path / "set.jsonl"), str(tmp_path / "set.json")]
    argv = ["--model", str(inputs / "model"), "--out", str(tmp_path / "out"), "--tasks", *paths]
    assert evaluate.main(argv) == 2
    assert f"error: tasks ({' '.join(paths)}) must have names of their own, " in capsys.readouterr().err
