"""What tells one run, one model and one set of weights from another."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_psft.model.shape import ModelShape

VERSION = 2
"""Of what a checkpoint holds."""


WEIGHTS_ONLY_STEP = 0
"""Completed steps of a checkpoint that holds nothing but weights: a run starts from it as from Hugging Face weights."""


Identity = Mapping[str, Any]
"""What a run must share with the checkpoint it starts from, field by field; JSON values."""


def model_identity(shape: ModelShape) -> dict[str, Any]:
    """The part of an identity that tells the model."""
    values = json.loads(json.dumps(asdict(shape)))  # as a checkpoint has them
    return {f"model {name}": value for name, value in values.items()}


def weights_identity(shape: ModelShape) -> dict[str, Any]:
    """The identity of a checkpoint that holds nothing but weights: only what their names, sizes and use depend on."""
    unrelated = {"model dtype", "model initializer_range"}
    return {field: value for field, value in model_identity(shape).items() if field not in unrelated}
