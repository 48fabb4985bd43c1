"""Which source a run's model comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_psft.errors import UserError, counted
from megatron_psft.model.families import FAMILIES
from megatron_psft.model.shape import ModelShape, read_config, read_shape
from megatron_psft.sources.bridge import BridgeSource
from megatron_psft.sources.bridge_import import REMEDY, has_bridge
from megatron_psft.sources.bridge_rules import FAMILIES as BRIDGE_FAMILIES
from megatron_psft.sources.bridge_rules import check_config
from megatron_psft.sources.native import NativeSource
from megatron_psft.sources.source import ModelSource

ONLY_BRIDGE = tuple(name for name in BRIDGE_FAMILIES if name not in FAMILIES)
"""What is no family of this package's own."""


def choose_source(folder: Path, wanted: Literal["auto", "native", "bridge"]) -> ModelSource:
    """Of the model whose `config.json` is in `folder`; `auto` is Megatron-Bridge for what is not native alone.

    Raises:
        UserError: no source has the model, or the one that does is not installed.
    """
    fields = read_config(folder)
    if isinstance(fields, Mapping) and wanted == "native" and fields.get("model_type") in ONLY_BRIDGE:
        raise UserError(
            f"model_source (native) has no model_type ({fields['model_type']}), of {folder}; Megatron-Bridge builds "
            "such models: leave it out"
        )
    if not isinstance(fields, Mapping) or wanted == "native":
        return NativeSource.of(folder)  # which says what is wrong
    if wanted == "auto" and not _is_of_bridge(folder, fields):
        return NativeSource.of(folder)
    return BridgeSource.of(folder, fields)


def describe_model(folder: Path) -> str:
    """One line on the model that a run would train. Raises UserError where none would."""
    fields = read_config(folder)
    if not isinstance(fields, Mapping) or not _is_of_bridge(folder, fields):
        shape = read_shape(folder)
        return f"{folder} is a {shape.model_type} model of {counted(shape.num_layers, 'layer')}"
    check_config(fields, str(folder / "config.json"))
    return f"{folder} is a {fields['model_type']} model, which Megatron-Bridge builds"


def shape_of(folder: Path, field: str, remedy: str) -> ModelShape:
    """All sizes of the model in `folder`, which `field` names. Raises UserError, with a remedy, for one of which
    Megatron-Bridge alone knows them."""
    fields = read_config(folder, field)
    if isinstance(fields, Mapping) and fields.get("model_type") in ONLY_BRIDGE:
        raise UserError(
            f"{field} ({folder}): model_type ({fields['model_type']}) is built by Megatron-Bridge, which tells no "
            f"sizes beforehand; {remedy}"
        )
    return read_shape(folder, field)


def _is_of_bridge(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Raises UserError for a model that is of no source."""
    model_type = fields.get("model_type")
    if model_type in FAMILIES:
        return False
    if model_type not in ONLY_BRIDGE:
        try:
            read_shape(folder)
        except UserError as error:
            raise UserError(f"{error}; and by Megatron-Bridge {', '.join(ONLY_BRIDGE)}") from None
    if not has_bridge():
        raise UserError(f"{folder}: model_type ({model_type}) is built by Megatron-Bridge alone: {REMEDY}")
    return True
