"""Copies of a GPU's tensors on a stream of their own."""

import pytest
import torch

from megatron_psft.checkpoint.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_follow_what_was_queued_before_and_wait_for_nothing_else(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    staging = Staging(device, 10_000)
    large = torch.randn(8192, 8192, device=device)
    sources = [torch.zeros(size, 3, dtype=dtype, device=device) for size in (1, 5_000, 100_000)]
    targets = [torch.empty(source.shape, dtype=dtype) for source in sources]
    torch.mm(large, large)  # what comes next is not done yet when the copies are asked for
    for number, source in enumerate(sources):
        source.fill_(number + 1)
    staging.follow()
    done = torch.cuda.Event()
    for _ in range(100):
        torch.mm(large, large)
    done.record()
    staging.copy(zip(sources, targets, strict=True))
    assert not done.query(), "the copies are there before training's kernels are done"
    for number, target in enumerate(targets):
        assert (target == number + 1).all()
