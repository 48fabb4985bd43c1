"""Without Megatron-Bridge, one clear error."""

import subprocess
import sys

import pytest

from tests.support.cli import REPOSITORY

# As where it is not installed, wherever this runs.
WITHOUT_BRIDGE = "import sys; sys.modules['megatron.bridge'] = None"


@pytest.mark.parametrize("module", ["nemo", "nemo.recipes", "nemo.train"])
def test_import_names_the_extra(module):
    command = [sys.executable, "-c", f"{WITHOUT_BRIDGE}; import megatron_psft.{module}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = "ImportError: megatron_psft.nemo needs megatron-bridge: pip install megatron-bridge, on Python 3.12"
    assert done.stderr.splitlines()[-1] == last


def test_example_says_so_in_one_line():
    argv = ["--recipe", "qwen25_7b", "--pretrained-checkpoint", "DIR"]
    script = f"{WITHOUT_BRIDGE}; from examples.nemo import finetune_psft; sys.exit(finetune_psft.main({argv}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr == "error: megatron_psft.nemo needs megatron-bridge: pip install megatron-bridge, on Python 3.12\n"
    )
