"""Memory that a checkpoint's writer shares with the trainer."""

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.checkpoint.background import BackgroundCalls, SharedMemory, SharedTensor
from tests.support.pool import Pool

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
tensors = st.lists(
    st.builds(
        lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from(DTYPES),
        st.integers(0, 99),
    ),
    max_size=5,
)


@given(first=tensors, second=tensors)
def test_copies_are_equal_and_have_storages_of_their_own(first, second):
    """The second checkpoint takes the place of the first, and may be larger."""
    memory = SharedMemory()
    for originals in (first, second):
        shared = memory.copies(originals)
        copies = [memory.open(one) for one in shared]
        for original, copy in zip(originals, copies, strict=True):
            assert torch.equal(copy, original)
            assert (copy.dtype, copy.shape) == (original.dtype, original.shape)
            assert copy.untyped_storage().nbytes() == original.nbytes


def test_what_is_not_contiguous_or_has_a_gradient_is_copied_too():
    memory, original = SharedMemory(), torch.arange(12.0).view(3, 4).t().requires_grad_()
    (shared,) = memory.copies([original])
    original.data.zero_()
    assert torch.equal(memory.open(shared), torch.arange(12.0).view(3, 4).t())


def _read(memory: SharedMemory, shared: list[SharedTensor], answer: Connection) -> None:
    answer.send([memory.open(one).tolist() for one in shared])


def test_another_process_reads_what_was_copied_before_it_was_started():
    memory = SharedMemory()
    memory.copies([torch.zeros(2)])
    originals = [torch.arange(5000.0), torch.tensor([[True], [False]]), torch.empty(0, 3)]
    shared = memory.copies(originals)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=_read, args=(memory, shared, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == [original.tolist() for original in originals]
    process.join()
    assert process.exitcode == 0


def _visible_gpus(answer: Connection) -> None:
    answer.send(os.environ.get("CUDA_VISIBLE_DEVICES"))


def _start_from_the_server(*of_ranks: str | None) -> tuple[str | None, str | None, str | None]:
    """What a writer's process sees, and what this one does afterwards."""
    visible = of_ranks[int(os.environ["RANK"])]
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    BackgroundCalls(torch.device("cpu"))
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=_visible_gpus, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    return found, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("PYTHONWARNINGS")


@pytest.mark.slow
def test_writers_see_no_gpu_and_the_trainer_still_does():
    # In a pool of its own: a process has one server, which here no earlier test has started.
    pool = Pool()
    try:
        warnings = os.environ.get("PYTHONWARNINGS")
        assert pool.run(_start_from_the_server, 2, "0,1", None) == [("", "0,1", warnings), ("", None, warnings)]
    finally:
        pool.close()
