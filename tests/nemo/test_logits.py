"""`psft doctor` and `--check-logits` compare models from Megatron-Bridge with transformers, too."""

import pytest

from megatron_psft.diagnostics import logits
from tests.nemo import bridge_models
from tests.nemo.bridge import needs_bridge
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow

pytestmark = needs_bridge


@pytest.mark.parametrize(
    "family",
    [it if it == "gemma3_text" else slow(it, both=True) for it in (*bridge_models.FAMILIES, *bridge_models.VARIANTS)],
)
def test_a_model_from_bridge_is_the_one_of_transformers(source_pool, tmp_path, family):
    has_choice = not family.startswith(("deepseek_v3", "nemotron_h"))
    epsilon = {"rms_norm_eps": 1e-3} if has_choice else {}  # which no layer takes by default
    folder = bridge_models.build_model(tmp_path / "model", family, **epsilon)
    (found,) = source_pool.run(logits.compare, 1, folder)
    assert found.agreeing == found.positions, found


@pytest.mark.slow
@pytest.mark.both
def test_a_run_compares_its_model_from_bridge(source_pool, tmp_path):
    model = bridge_models.build_model(tmp_path / "model", "gemma3_text")
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    records = tiny.write_records(tmp_path / "records.jsonl", 4, max_exchanges=6, seed=3)
    argv = ["--load-hf", model, "--tokenizer", tokenizer, "--data", records, "--save", tmp_path / "save"]
    argv += ["--train-iters", 1, "--global-batch-size", 1, "--seq-length", 512, "--check-logits"]
    argv += LAYOUTS["TP2-SP"].flags
    exits = source_pool.run(run_cli, 2, [str(value) for value in argv])
    assert exits[0].code == 0, exits[0].err
    assert "tokens differ from transformers' by at most " in exits[0].err
