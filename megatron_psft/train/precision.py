"""Which number format a run computes in, where its settings leave that to the device."""

import logging
from pathlib import Path

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.identity import WEIGHTS_ONLY_STEP
from megatron_psft.config.inputs import WeightsConfig
from megatron_psft.config.rules import validate_precision
from megatron_psft.config.schema import Config, PrecisionConfig
from megatron_psft.distributed.collective import on_rank_zero
from megatron_psft.distributed.device import Platform
from megatron_psft.sealed import DamageError

log = logging.getLogger(__name__)


def settle_precision(config: Config, platform: Platform) -> Config:
    """`config` with `bf16` true or false, and says which; collective.

    An unset `bf16` is what the run that goes on had, else true on GPUs and false on the CPU.

    Raises:
        UserError: it is false, and another setting needs it; on all ranks.
    """
    said = config.precision.bf16
    reason = ""
    if said is None:
        recorded = on_rank_zero(lambda: _recorded(config.weights))
        said, reason = platform.is_gpu, f", the default on {'GPUs' if platform.is_gpu else 'the CPU'}"
        if recorded is not None and recorded[1] != said:
            said, checkpoint = recorded[1], recorded[0]
            reason = f" as before, in {checkpoint}; a new run (--init-from) may have another format"
    settled = config.with_bf16(said)
    validate_precision(settled)
    log.info("precision: %s%s", _describe(settled.precision), reason)
    return settled


def _describe(precision: PrecisionConfig) -> str:
    if not precision.bf16:
        return "fp32 (--bf16 false)"
    fp8 = "" if precision.fp8_format is None else f"fp8 ({precision.fp8_format}, {precision.fp8_recipe}) and "
    return f"{fp8}bf16 with fp32 master weights (--bf16 true)"


def _recorded(weights: WeightsConfig) -> tuple[Path, bool] | None:
    """The newest readable checkpoint of the run that goes on, and whether it computed in bf16."""
    for name in (weights.save, weights.load):
        if name is None:
            continue
        folder = Path(name)
        for checkpoint in [folder] if folders.is_step_folder(folder) else reversed(folders.step_folders(folder)):
            try:
                content = sealed.read_content(checkpoint)
            except DamageError:
                continue
            if content["step"] != WEIGHTS_ONLY_STEP and "bf16" in content["identity"]:
                return checkpoint, bool(content["identity"]["bf16"])
    return None
