"""`psft convert --via-bridge`, there and back."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.nemo import cpu
from tests.nemo.bridge import needs_bridge
from tests.support import tiny
from tests.support.cli import Exit

pytestmark = needs_bridge


@pytest.fixture
def convert(bridge_pool) -> Callable[..., Exit]:
    def on_one_rank(*flags: object) -> Exit:
        argv = ["--via-bridge", *map(str, flags)]
        return bridge_pool.run(cpu.run, 1, "tests.nemo.convert_by_bridge", argv)[0]

    return on_one_rank


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_there_and_back_nothing_changes(convert, tmp_path, family):
    source = tiny.build_model(tmp_path / "source", family, dtype=torch.bfloat16)
    tiny.build_tokenizer(source)
    for flags in (
        ("--from-hf", source, "--to-megatron", tmp_path / "megatron"),
        ("--from-megatron", tmp_path / "megatron", "--load-hf", source, "--to-hf", tmp_path / "back"),
    ):
        done = convert(*flags)
        assert done.code == 0, done.out[-2000:] + done.err[-9000:]
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron", "source"]


@pytest.mark.slow
@pytest.mark.both
def test_mistakes_are_one_line(convert, tmp_path):
    source = tiny.build_model(tmp_path / "source", "qwen2")
    nowhere = convert("--from-hf", source, "--to-megatron", "/dev/null/x")
    assert "error: to_megatron (/dev/null/x) must be a folder that can be written" in nowhere.err
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    for flags, message in (
        (("--from-hf", source, "--to-megatron", tmp_path / "new"), f"error: from_hf ({source}) must be of a family"),
        (
            ("--from-megatron", source, "--load-hf", source, "--to-hf", tmp_path / "new"),
            f"error: load_hf ({source}) must be of a family",
        ),
    ):
        assert message in convert(*flags).err
    assert not (tmp_path / "new").exists()
