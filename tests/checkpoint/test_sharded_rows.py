"""What each rank holds, writes and reads of a checkpoint: its own share, and little more."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import default_planner

from megatron_psft.checkpoint import saver
from megatron_psft.checkpoint.sharded_rows import _Share
from megatron_psft.checkpoint.unpickle import DataReader
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.marks import slow
from tests.support.runs import DIST_OPT, ONE, forget_steps_from, inputs, metrics_of

__all__ = ["inputs"]  # the fixture

FEW_STEPS = ("--train-iters", "3", "--save-interval", "2")
TP2, EP2 = ("--tensor-model-parallel-size", "2"), ("--expert-model-parallel-size", "2")


@pytest.mark.parametrize(
    ("family", "flags"),
    [slow("qwen3", DIST_OPT), slow("qwen3", ONE), ("qwen3", (*DIST_OPT, *TP2)), slow("qwen3_moe", (*DIST_OPT, *EP2))],
    ids=["DP4", "DP4-undistributed", "TP2-DP2", "EP2-DP2"],
)
def test_a_rank_holds_writes_and_reads_its_own_share(pool, tmp_path, inputs, family, flags):
    """Also where one tensor, as here the embedding, is larger than a share of all that ranks hold alike."""
    run = tmp_path / "run"
    model = tiny.build_model(tmp_path / "model", family, tied=family == "qwen3", vocab_size=4096)
    inputs = replace(inputs, model=model)
    argv = inputs.argv(run, *flags, *FEW_STEPS)
    writes, _, told, asks, compared = zip(*pool.run(bytes_moved, 4, argv), strict=True)
    assert max(told) < min(writes) / 4, "ranks tell each other rows that are cut, and not what these are part of"
    assert asks == ([True, False],) * 4, "whether the parts make whole tensors is asked once"
    assert compared[0][0] > 0, "and answered"
    assert compared[0][1:] == [0]
    stored = stored_bytes(run / "step_0000003")
    # Files also have a few hundred bytes around every tensor.
    assert 0.5 * stored < sum(writes) < stored
    assert max(writes) <= 1.1 * sum(writes) / 4
    assert tensors_in(run / "step_0000003") == tensors_in(run / "step_0000002"), "a later table is as complete"
    expected = metrics_of(run)
    forget_steps_from(run, 3)
    for _, read, *_ in pool.run(bytes_moved, 4, argv):
        assert 0 < read <= 1.1 * stored / 4
    assert metrics_of(run) == expected


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 50), st.integers(1, 12), st.integers(1, 9))
def test_ranks_agree_on_what_they_have_of_rows_that_are_cut(world_size, chunk, offset, rows, width):
    """However many ranks a row goes through: no word is said about it before its values are."""
    chunk += -(-(offset + rows * width) // world_size)  # the bucket holds the parameter
    shares = {}
    for rank in range(world_size):
        start, end = max(0, rank * chunk - offset), min(rows * width, (rank + 1) * chunk - offset)
        if start < end:
            shares[rank] = _Share(index=0, parameter=None, start=start, end=end, width=width, chunk=chunk)
    heads = {rank: share.head() for rank, share in shares.items()}
    sent = {(rank, rank - distance): count for rank, (distance, count) in heads.items() if distance}
    awaited = {(rank + distance, rank): count for rank, share in shares.items() for distance, count in share.rest()}
    assert sent == awaited
    assert all(count > 0 for count in sent.values())
    begun = sum(share.whole_rows_end - share.first_row + any(share.rest()) for share in shares.values())
    assert begun == rows


def tensors_in(checkpoint: Path) -> dict[str, object]:
    """By the checkpoint's table, of what a later step has, too."""
    table = DataReader(checkpoint).read_metadata()
    assert {index.fqn for index in table.storage_data} == table.state_dict_metadata.keys()
    return {name: found for name, found in table.state_dict_metadata.items() if not name.startswith("old_log_probs")}


def stored_bytes(checkpoint: Path) -> int:
    """Of all tensors, as they lie in files."""
    reader = DataReader(checkpoint)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    return sum(part.length for part in reader.storage_data.values())


def bytes_moved(argv: list[str]) -> tuple[int, int, int, list[bool], list[int]]:
    """Bytes of the tensors that this rank writes in the last save of a run, which are those that it holds a copy of
    where there is one; bytes that it reads of the checkpoint that the run goes on from; bytes of the largest object
    that it tells other ranks; whether each save had the parts of all ranks told to all; and of how many tensors it
    compared these."""
    moved, asks, compared = Counter[str](), [], []
    tell = distributed_c10d._object_to_tensor
    plan, read, save = saver._plan, DataReader.read_data, dist_checkpointing.save
    compare = default_planner._validate_global_plan

    def planned(*args, **kwargs):
        request = plan(*args, **kwargs)
        moved["written"] = sum(tensor.nbytes for *_, (_, pairs) in request.async_fn_args[1] for _, tensor in pairs)
        return request

    def reading(self, load_plan, planner):
        moved["read"] += sum(self.storage_data[index].length for index in {i.storage_index for i in load_plan.items})
        return read(self, load_plan, planner)

    def telling(*args, **kwargs):
        pickled, size = tell(*args, **kwargs)
        moved["told"] = max(moved["told"], int(size))
        return pickled, size

    def asking(*args, **kwargs):
        asks.append(kwargs["validate_access_integrity"])
        return save(*args, **kwargs)

    def comparing(plans, metadata):
        compared.append(len(metadata.state_dict_metadata))
        return compare(plans, metadata)

    asking.__wrapped__ = save  # whose signature says which Megatron-Core it is of
    with (
        mock.patch.object(saver, "_plan", planned),
        mock.patch.object(DataReader, "read_data", reading),
        mock.patch.object(distributed_c10d, "_object_to_tensor", telling),
        mock.patch.object(dist_checkpointing, "save", asking),
        mock.patch.object(default_planner, "_validate_global_plan", comparing),
    ):
        done = run_cli(argv)
        assert done.code == 0, done.err
    return moved["written"], moved["read"], moved["told"], asks, compared
