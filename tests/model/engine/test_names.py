"""Transformer Engine's layers, as far as Python goes, against the portable ones: a run or a checkpoint of either is the
other's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import importing

ENGINE = Path(sys.prefix) / "engine"
MODELS = ("dense", "tied", "experts")
_NORM = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}
"""Norms and the layers that Transformer Engine makes them a part of."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.both,
    pytest.mark.skipif(not ENGINE.is_dir(), reason="make install puts Transformer Engine's Python there"),
]


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-W", "ignore", "-m", "tests.model.engine.names"]
    done = subprocess.run(command, env=importing(ENGINE), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", [*MODELS, "adapters"])
def test_parameters_have_the_shapes_and_marks_of_portable_layers(found, model):
    """In a layout of TP 2 with sequence parallelism, and EP 4; names differ in norms only, which the layers that follow
    them hold."""
    engine, portable = (found["parameters"][model][kind] for kind in ("engine", "portable"))
    assert (engine.pop("has engine"), portable.pop("has engine")) == (True, False)
    # All of its products, as long as their weights are trained.
    assert engine.pop("adds to main_grad") == [model != "adapters"]
    assert portable.pop("adds to main_grad") == []
    renamed = {}
    for name, value in portable.items():
        norm = re.fullmatch(r"(decoder\.layers\.\d+\.)(input_layernorm|pre_mlp_layernorm)\.weight", name)
        fused = f"{norm[1]}{_NORM[norm[2]]}.layer_norm_weight" if norm else name
        renamed[fused if fused in engine else name] = value
    assert engine == renamed


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_have_the_same_keys(found, model):
    engine, portable = (found["checkpoint"][model][kind] for kind in ("engine", "portable"))
    assert engine == portable
    assert any(key.startswith("ShardedTensor optimizer.state.exp_avg.decoder") for key in engine)


@pytest.mark.parametrize("reader", ["engine", "portable"])
def test_weights_and_states_of_the_other_layers_experts_are_read(found, reader):
    differing = found["not as written"]
    assert any(".experts." in name and "exp_avg" in name for name in differing["before"])
    assert any(".router." in name for name in differing["before"])
    assert differing[reader] == []
