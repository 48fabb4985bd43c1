"""Megatron-Core without the compiler until something calls it, on a GPU."""

import subprocess
import sys

import torch
from torch._dynamo.testing import CompileCounter

from megatron_psft.distributed import megatron_import
from megatron_psft.distributed.megatron_import import compile_when_called

IMPORT = """
import sys
import torch
from megatron_psft.distributed.megatron_import import import_megatron

compile = torch.compile
import_megatron()
assert not {"torch._dynamo", "torch._inductor", "wandb", "torch.utils.tensorboard"} & set(sys.modules)
assert torch.compile is compile
import wandb  # trackers of the run's
from torch.utils.tensorboard import SummaryWriter

from megatron.core.fusions.fused_bias_swiglu import swiglu

gate, up = torch.randn(3, 8).chunk(2, -1)
assert torch.equal(swiglu(torch.cat([gate, up], -1)), torch.nn.functional.silu(gate) * up)
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
"""


def test_without_a_gpu_a_fused_function_needs_no_compiler():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


def test_functions_are_compiled_once_and_within_those_that_call_them(monkeypatch):
    monkeypatch.setattr(megatron_import, "_has_gpu", lambda: True)
    counter = CompileCounter()

    @compile_when_called(backend=counter)
    def double(x):
        return 2 * x

    @compile_when_called(backend=counter, fullgraph=True)
    def affine(x):
        """Twice and one."""
        return double(x) + 1

    assert (affine.__name__, affine.__doc__, counter.frame_count) == ("affine", "Twice and one.", 0)
    for value in (1.0, 2.0):
        assert affine(torch.tensor([value])).item() == 2 * value + 1
    assert counter.frame_count == 1
    double(torch.ones(2))
    assert counter.frame_count == 2
