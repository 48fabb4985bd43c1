"""What each rank of a distributed optimizer holds, writes and reads of a checkpoint: its own share, and little more."""

import math
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.support.cli import run_cli
from tests.support.runs import DIST_OPT, forget_steps_from, inputs, metrics_of

__all__ = ["inputs"]  # the fixture

STATE = "optimizer.state."
FEW_STEPS = ("--train-iters", "3", "--save-interval", "2")


@pytest.mark.parametrize("flags", [DIST_OPT, (*DIST_OPT, "--tensor-model-parallel-size", "2")], ids=["DP4", "TP2-DP2"])
def test_a_rank_saves_and_loads_its_own_share_of_the_state(pool, tmp_path, inputs, flags):
    run = tmp_path / "run"
    argv = inputs.argv(run, *flags, *FEW_STEPS)
    saves, _, asks = zip(*pool.run(state_bytes_moved, 4, argv), strict=True)
    assert asks == ([True, False],) * 4, "whether the parts make whole tensors is asked once"
    numbers = [sum(math.prod(shape) for shape in found.values()) for found in whole_shapes(run / "step_0000003")]
    (whole,) = {4 * number for number in numbers}
    # Twelve bytes of each parameter, and of those that tensor-parallel ranks hold alike those of one of them.
    assert sum(saved["written"] for saved in saves) == 3 * whole
    for saved in saves:
        assert saved["described"] <= 1.3 * 3 * whole / 4
    expected = metrics_of(run)
    forget_steps_from(run, 3)
    for _, loaded, _ in pool.run(state_bytes_moved, 4, argv):
        assert 0 < loaded["described"] <= 1.3 * 3 * whole / 4
    assert metrics_of(run) == expected


def test_all_ranks_write_about_as_much(pool, tmp_path, inputs):
    run = tmp_path / "run"
    pool.run(run_cli, 4, inputs.argv(run, *DIST_OPT, *FEW_STEPS))
    written: Counter[str] = Counter()
    for path in (run / "step_0000003").glob("*.distcp"):
        written[path.name.split("_")[2]] += path.stat().st_size
    assert len(written) == 4
    assert max(written.values()) <= 1.3 * sum(written.values()) / 4


def whole_shapes(checkpoint: Path) -> list[dict[str, tuple[int, ...]]]:
    """Of each state of the optimizer: the whole parameters' shapes by name."""
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    names = ("param", "exp_avg", "exp_avg_sq")
    return [
        {key: value.global_shape for key, value in metadata.items() if key.startswith(f"{STATE}{name}.")}
        for name in names
    ]


def state_bytes_moved(argv: list[str]) -> tuple[dict[str, int], dict[str, int], list[bool]]:
    """What this rank's last save of a run, and what its load, say of the optimizer's state: bytes that are described,
    and bytes that it writes. And whether each save had the parts of all ranks compared."""
    saved, loaded, asks = Counter[str](), Counter[str](), []

    def counting(inner, moved):
        def count(content, *args, **kwargs):
            moved.clear()
            if moved is saved:
                asks.append(kwargs["validate_access_integrity"])
            for value in nested_values(content):
                if isinstance(value, ShardedTensor) and value.key.startswith(STATE):
                    size = math.prod(value.local_shape) * value.dtype.itemsize
                    moved["described"] += size
                    moved["written"] += size if set(value.replica_id) == {0} else 0
            return inner(content, *args, **kwargs)

        count.__wrapped__ = inner  # whose signature says which Megatron-Core it is of
        return count

    with (
        mock.patch.object(dist_checkpointing, "save", counting(dist_checkpointing.save, saved)),
        mock.patch.object(dist_checkpointing, "load", counting(dist_checkpointing.load, loaded)),
    ):
        done = run_cli(argv)
        assert done.code == 0, done.err
    return dict(saved), dict(loaded), asks
