"""What Hopper would run of the Triton kernels, compiled without one."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_no_variant_spills_and_registers_and_shared_memory_stay_in_bounds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.head.kernels.compiling"]
    said = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, stdout=subprocess.PIPE, check=True
    ).stdout
    variants = json.loads(said)
    assert len(variants) == 3 * 3  # the sums, and gradients in bf16 and in fp32; alignments
    for variant in variants:
        assert variant["stack"] == variant["local"] == 0, f"registers are spilled: {variant}"
        assert variant["registers"] <= 128, variant
        assert variant["shared"] <= 1024, variant
