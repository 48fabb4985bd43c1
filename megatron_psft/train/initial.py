"""The weights that a run starts from: all of them, or those beside which it trains adapters, and these."""

from collections.abc import Sequence
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_psft import sealed
from megatron_psft.checkpoint.find import StartPoint, find_weights
from megatron_psft.checkpoint.identity import WEIGHTS_ONLY_STEP
from megatron_psft.checkpoint.state import load_weights
from megatron_psft.config.schema import Config
from megatron_psft.distributed.collective import on_rank_zero
from megatron_psft.distributed.grid import Parallel
from megatron_psft.hf.adapter import AdapterBase
from megatron_psft.hf.fingerprint import weights_fingerprint
from megatron_psft.train.inputs import Inputs


def adapter_base(config: Config, inputs: Inputs) -> AdapterBase | None:
    """The model beside which a run trains adapters, if it does; collective.

    Checkpoints of such a run do not have it: every start fills it from where the first one did.
    """
    weights = config.weights
    if not config.lora.has_adapters:
        return None
    if weights.init_from is not None:
        start = find_weights(Path(weights.init_from), inputs.source.weights_identity)
        found = on_rank_zero(lambda: sealed.marker_sum(start.checkpoint))
        return AdapterBase(name=None, weights=f"checkpoint {found}", checkpoint=start)
    if weights.random_init:
        return AdapterBase(name=None, weights=f"seed {config.batch.seed}")
    found = on_rank_zero(lambda: weights_fingerprint(inputs.model_folder, "load_hf"))
    return AdapterBase(name=weights.load_hf, weights=found)


def fill_weights(
    chunks: Sequence[DistributedDataParallel],
    config: Config,
    inputs: Inputs,
    start: StartPoint | None,
    base: AdapterBase | None,
    parallel: Parallel,
) -> None:
    """Fills what the checkpoint of a run that goes on, if `start` is one, does not have; collective."""
    weights = start if start is not None and start.step == WEIGHTS_ONLY_STEP else None
    goes_on = start is not None and weights is None
    if base is not None:
        weights = base.checkpoint
    if weights is not None:
        load_weights(weights.checkpoint, chunks, parallel)
    elif base is not None or not goes_on:
        inputs.source.fill(chunks, parallel)
    if base is not None and not goes_on:
        inputs.source.adapters.fill(chunks, config, base, parallel)


def starts_with_base(config: Config, start: StartPoint | None) -> bool:
    """Whether a run of adapters has begun with the model beside them, and so has it at hand without them; not so after
    `load_lora`, or from a checkpoint of another run's adapters."""
    if start is None or start.step == WEIGHTS_ONLY_STEP:
        return config.lora.load_lora is None
    return start.resumes(Path(config.weights.save)) and start.began_with_base
