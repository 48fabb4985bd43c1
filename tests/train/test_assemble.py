"""How long rows are."""

import pytest

from megatron_psft.config.schema import parse_config
from megatron_psft.train.assemble import row_multiple

FLAGS = "--load-hf x --save x --data x --train-iters 1 --seq-length"


@pytest.mark.parametrize(
    ("flags", "on_cpu", "on_gpu"),
    [
        ("16384", 1, 1),
        ("16384 --no-packing", 1, 256),
        ("4096 --no-packing", 1, 128),
        ("100 --no-packing", 1, 2),
        ("16 --no-packing", 1, 1),
        ("4096 --no-packing --tensor-model-parallel-size 4 --sequence-parallel", 4, 128),
        ("4096 --tensor-model-parallel-size 4 --sequence-parallel", 4, 4),
        ("100 --no-packing --tensor-model-parallel-size 3 --sequence-parallel", 3, 6),
        ("4096 --no-packing --bf16 --fp8-format hybrid --fp8-recipe delayed", 16, 128),
    ],
)
def test_rows_that_are_not_packed_have_few_lengths_on_a_gpu(flags, on_cpu, on_gpu):
    config = parse_config(f"{FLAGS} {flags}".split())
    assert row_multiple(config, on_gpu=False) == on_cpu
    assert row_multiple(config, on_gpu=True) == on_gpu
