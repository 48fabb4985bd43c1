"""`psft doctor` compares models from Megatron-Bridge with transformers, too."""

import pytest

from megatron_psft.diagnostics import logits
from tests.nemo import bridge_models
from tests.nemo.bridge import needs_bridge
from tests.support.marks import slow

pytestmark = needs_bridge


@pytest.mark.parametrize(
    "family",
    [it if it == "gemma3_text" else slow(it, both=True) for it in (*bridge_models.FAMILIES, *bridge_models.VARIANTS)],
)
def test_a_model_from_bridge_is_the_one_of_transformers(source_pool, tmp_path, family):
    folder = bridge_models.build_model(tmp_path / "model", family)
    (found,) = source_pool.run(logits.compare, 1, folder)
    assert found.agreeing == found.positions, found
