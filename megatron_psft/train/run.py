"""A training run from its configuration: read, build, train, export."""

import logging
from pathlib import Path

import torch

from megatron_psft.config.schema import Config, config_to_yaml
from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel
from megatron_psft.hf import export
from megatron_psft.metrics.provenance import versions
from megatron_psft.model.fp8 import check_machine
from megatron_psft.train.assemble import build_run
from megatron_psft.train.inputs import describe, read_in_turn
from megatron_psft.train.loop import train

log = logging.getLogger(__name__)


def run(config: Config, platform: Platform, rank: int, local_rank: int) -> int:
    """Trains as `config` says, on all ranks of the default process group; `local_rank` counts those of a node.

    Returns:
        0, or the number of the signal that ended the run early; then the same command goes on from there.

    Raises:
        UserError: on every rank alike.
        RankError: on this rank, whatever the others do.
    """
    on_every_rank(lambda: check_machine(config.precision, platform))
    inputs = read_in_turn(config, rank, local_rank)
    log.info("%s", platform.describe())
    describe(inputs, packing=config.data.packing)
    ready = build_run(config, inputs, platform)
    _write_config(config, ready.parallel)
    signum = train(ready)
    if signum:
        return signum
    if config.weights.export_hf is not None:
        ready.pipeline.gather_parameters()
        export.export(
            ready.state.chunks,
            Path(config.weights.export_hf),
            shape=inputs.shape,
            dtype=torch.bfloat16 if config.precision.bf16 else inputs.weights.dtype,
            model_folder=inputs.model_folder,
            tokenizer_folder=inputs.tokenizer_folder,
            parallel=ready.parallel,
        )
        log.info("exported %s", config.weights.export_hf)
    return 0


def _write_config(config: Config, parallel: Parallel) -> None:
    if not parallel.is_main:
        return
    head = "".join(f"# {name} {version}\n" for name, version in versions().items() if version)
    (Path(config.weights.save) / "config.yaml").write_text(head + config_to_yaml(config), encoding="utf-8")
