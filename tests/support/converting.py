"""What the tests of conversion share: the command, runs, and what folders hold."""

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.cli import Exit, call_main, run_cli


def run_convert(argv: Sequence[str]) -> Exit:
    """What `psft convert ARGV` does; for `pool.run`."""
    from megatron_psft.cli.convert import main

    return call_main(main, argv)


def convert_with_small_files(argv: list[str]) -> Exit:
    """The command where no file may grow beyond 32 KiB, as with a quota used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))
    try:
        return run_convert(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def convert(pool) -> Callable[..., Exit]:
    def run(*argv: str | Path) -> Exit:
        (result,) = pool.run(run_convert, 1, [str(value) for value in argv])
        return result

    return run


@pytest.fixture
def converted(convert) -> Callable[..., Path]:
    """Runs a conversion that must succeed; returns the folder written, which the second pair of arguments names."""

    def run(*argv: str | Path) -> Path:
        result = convert(*argv)
        assert result.code == 0, result.err
        assert " parameters as " in result.out
        return Path(argv[3])

    return run


@dataclass(frozen=True)
class Inputs:
    """What runs are made from."""

    tokenizer: Path
    data: Path

    def argv(self, model: Path, save: Path, *flags: str | Path) -> list[str]:
        shared = f"""
            --load-hf {model} --tokenizer {self.tokenizer} --data {self.data} --save {save} --seq-length 256
            --train-iters 3 --global-batch-size 4 --lr 1e-3 --old-policy-interval 2 --no-packing
        """
        return [*shared.split(), *map(str, flags)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    return Inputs(tokenizer=tiny.build_tokenizer(root / "tokenizer"), data=tiny.write_records(root / "r.jsonl", 10))


def train(pool, world_size: int, argv: list[str]) -> str:
    """Runs to the end; returns what rank 0 said."""
    results = pool.run(run_cli, world_size, argv)
    assert [result.code for result in results] == [0] * world_size, results[0].err
    return results[0].out + results[0].err


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def dtypes_of(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of(folder).values()}


def assert_refused(exit: Exit, *parts: str, code: int = 2) -> None:
    assert exit.code == code, exit.out + exit.err
    (line,) = [line for line in exit.err.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in parts), line
