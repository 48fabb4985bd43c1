"""The step that the doctor reads off what runs use, in a pool worker: it may answer `torch.cuda` for the CPU."""

from unittest import mock

import pytest

from megatron_psft.distributed.device import detect
from megatron_psft.train.toy_step import toy_step


def _trial():
    return toy_step(detect(0), bf16=False)


def test_the_step_tells_what_runs_on_a_cpu_use(pool):
    (found,) = pool.run(_trial, 1)
    assert found == {
        "collectives": "gloo",
        "attention": "megatron_psft.model.layers.Attention",
        "norm": "megatron_psft.model.layers.RMSNorm",
        "loss kernels": "megatron_psft.head.kernels._portable_sums",
        "optimizer": "torch.optim.adamw.AdamW",
        "fusions": "none",
    }


def _trial_with_bad_gradients():
    with mock.patch("torch.nn.functional.silu", lambda x: x * float("nan")):
        return toy_step(detect(0), bf16=False)


def test_a_step_that_goes_wrong_raises(pool):
    with pytest.raises(Exception, match="gradient norm is not finite"):
        pool.run(_trial_with_bad_gradients, 1)
