"""Copies on their way to a checkpoint's writer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.checkpoint.staging import Staging, with_own_storage

CPU = torch.device("cpu")


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    buffer_bytes=st.integers(1, 64),
)
def test_buffers_are_emptied_before_they_are_filled_again(lengths, dtype, buffer_bytes):
    """Tensors smaller and larger than a buffer, whose end may lie within an element."""
    sources = [torch.randint(0, 99, (length, 3)).to(dtype).t() for length in lengths]
    targets = [torch.zeros(3, length, dtype=dtype) for length in lengths]
    staging = Staging(CPU, buffer_bytes)
    staging.follow()
    staging.copy(zip(sources, targets, strict=True))
    assert all(map(torch.equal, targets, sources))
    assert [buffer.nbytes for buffer in staging._buffers] == [buffer_bytes] * 2, "all that is held besides"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_rows_of_a_tensor_get_a_storage_of_their_own_without_a_copy(dtype):
    whole = torch.ones(4, 3, dtype=dtype)
    assert with_own_storage(whole[:0]).shape == (0, 3)
    for part in (whole[1:3], whole[2], whole[0, 0]):
        own = with_own_storage(part)
        assert own.untyped_storage().nbytes() == part.nbytes
        assert torch.equal(own, part)
        own.zero_()
    assert whole.sum() == 3 * 4 - 2 * 3 - 1
