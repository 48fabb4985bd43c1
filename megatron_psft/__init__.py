"""Proximal Supervised Fine-Tuning (arXiv 2508.17784) on NVIDIA Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_psft.errors import DivergenceError as DivergenceError
    from megatron_psft.errors import InfrastructureError as InfrastructureError
    from megatron_psft.errors import UserError as UserError
    from megatron_psft.train.finetune import Finetuned as Finetuned
    from megatron_psft.train.finetune import finetune as finetune

__version__ = "0.2.0"

_ERRORS = ("DivergenceError", "InfrastructureError", "UserError")
_HOMES = dict.fromkeys(_ERRORS, "megatron_psft.errors")
_HOMES |= dict.fromkeys(("Finetuned", "finetune"), "megatron_psft.train.finetune")
__all__ = ["DivergenceError", "Finetuned", "InfrastructureError", "UserError", "finetune"]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: training takes torch, and seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)
