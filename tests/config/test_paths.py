"""`~` and environment variables mean the same in every path of every command, and hub IDs stay what they are."""

import ast
from dataclasses import Field, fields
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_psft.cli.main import COMMANDS
from megatron_psft.config.flags import is_path, parse_flags
from megatron_psft.config.paths import escape_path, expand_path
from megatron_psft.config.schema import config_to_yaml, parse_config
from megatron_psft.errors import UserError
from tests.support.configs import flag, parse, write_yaml

TEXTS = {
    *("prompt_key", "completion_key", "answer_key", "system_prompt", "ignore_keys", "chat_template_kwargs"),
    *("wandb_project", "mlflow_experiment", "recompute_modules", "objective", "lora_targets"),
}
"""Fields of text that is no path. A new field of text is either added here or a `PathText`."""


def root_of(command: str) -> type:
    """The dataclass that a command reads its flags into."""
    module = import_module(f"megatron_psft.cli.{command}")
    calls = (node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Call))
    (name,) = {call.args[0].id for call in calls if ast.unparse(call.func) in ("run_command", "parse_flags")}
    return getattr(module, name)


def is_text(field: Field) -> bool:
    """Whether the field holds free text: a string, or several."""
    parts = [field.type, *get_args(field.type)]
    return any(part is str or str in get_args(part) for part in parts)


FIELDS = {
    command: [f for section in get_type_hints(root_of(command)).values() for f in fields(section)]
    for command in COMMANDS
}
PATHS = [(command, field) for command, found in FIELDS.items() for field in found if is_path(field)]


def test_each_field_of_text_is_a_path_or_said_to_be_none():
    odd = {field.name for found in FIELDS.values() for field in found if is_text(field) and not is_path(field)} - TEXTS
    assert odd == set(), "type them PathText, or list them above"
    assert not {field.name for _, field in PATHS} & TEXTS
    paths = {(command, field.name) for command, field in PATHS}
    assert {("train", "save"), ("train", "data"), ("convert", "to_hf"), ("plot", "runs"), ("rollout", "out")} <= paths


@pytest.mark.parametrize(("command", "field"), PATHS, ids=lambda item: getattr(item, "name", item))
@pytest.mark.parametrize("text", ["~/a b", "${WHERE}/a b"])
def test_every_path_of_every_command_is_expanded(command, field, text, monkeypatch, tmp_path):
    """In flags and in YAML files alike, before the section's own rules see it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    root = root_of(command)
    for section in get_type_hints(root).values():
        monkeypatch.setattr(section, "__init__", lambda self, **values: self.__dict__.update(values) or None)
    monkeypatch.setattr(root, "__init__", lambda self, **sections: self.__dict__.update(sections))
    required = [w for f in FIELDS[command] if f.name != field.name for w in (flag(f.name), "1") if is_path(f)]
    required += ["--gpus", "1"] if command == "plan" else []
    config = write_yaml(tmp_path, f"{field.name}: {text}")
    for words in ([flag(field.name), text], ["--config", config]):
        parsed = parse_flags(root, [*required, *words])
        value = next(vars(s)[field.name] for s in vars(parsed).values() if field.name in vars(s))
        assert value == ((f"{tmp_path}/a b",) if isinstance(value, tuple) else f"{tmp_path}/a b")


@pytest.mark.parametrize(
    "text", ["Qwen/Qwen2.5-7B", "org/set:config@split=0.5", "a~b/c~", "./~/a", "plain.jsonl=2", "a$"]
)
def test_other_names_stay_as_they_are(text):
    assert expand_path("data", text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/a", r"save \(\$NOT_SET/a\) names the environment variable NOT_SET, which is not set; set it, or"),
        ("a/${NOT_SET}", "NOT_SET, which is not set"),
        ("$EMPTY/a", "EMPTY, which is empty"),
        ("${EMPTY:-b}/a", "environment variable EMPTY:-b, which is not set"),
        ("${HOME/b", r"save \(\$\{HOME/b\) has a \$\{ without its \}; close it"),
        ("${}/a", "environment variable {}, which is not set"),
        ("$HOM_E/a", "HOM_E, which is not set; did you mean HOME?"),
        ("~nobody-of-this-name/a", "begins with ~nobody-of-this-name, which is nobody's home here; write ./~nobody-of"),
    ],
)
def test_what_cannot_be_expanded_is_an_error_that_names_it(text, message, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=message):
        parse("--save", text)


def test_a_weight_goes_with_an_expanded_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SHARE", "0.5")
    data = parse("--data", "~/a.jsonl=2", "$HOME/b.jsonl=$SHARE", "org/set").data.data
    assert data == ("/home/me/a.jsonl=2", "/home/me/b.jsonl=0.5", "org/set")


def test_the_file_of_settings_is_a_path_too(monkeypatch, tmp_path):
    write_yaml(tmp_path, "seed: 7")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--config", "~/recipe.yaml").batch.seed == 7
    assert parse("--config=$HOME/recipe.yaml").batch.seed == 7


def test_config_yaml_keeps_what_was_meant(monkeypatch, tmp_path):
    """Another user, or another machine, reads the same paths."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ODD", "a$b~")
    config = parse("--save", "$ODD/~/run", "--data", "~/a.jsonl=2", "c$$d")
    assert (config.weights.save, config.data.data) == ("a$b~/~/run", ("/home/me/a.jsonl=2", "c$d"))
    path = write_yaml(tmp_path, config_to_yaml(config))
    assert "data_cache_dir: /home/me/.cache/megatron_psft" in config_to_yaml(config)
    monkeypatch.setenv("HOME", "/home/you")
    monkeypatch.delenv("ODD")
    assert parse_config(["--config", path]) == config


def test_escaping_undoes_expanding():
    for path in ("a$b", "$HOME", "$$", "${x}", "a"):
        assert expand_path("save", escape_path(path)) == path
