"""Gradients of a whole run by Megatron-Core's pipeline, and by autograd on one process."""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_psft.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    WeightsConfig,
)
from megatron_psft.metrics.sums import BatchSums
from megatron_psft.objectives.objective import Objective
from tests.support import oracle

SEQ_LENGTH, ROWS, CLIP = 22, 2, 0.28


def by_autograd(model: torch.nn.Module, records, objective: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    columns: dict[str, list[Tensor]] = {"loss": [], "log_prob": [], "entropy": [], "ratio": []}
    for ids, label_mask, before in records:
        log_probs, entropy = oracle.label_statistics(model, ids, label_mask)
        ratio = (log_probs - before).exp()
        loss = -log_probs if objective == "sft" else -torch.minimum(ratio, torch.tensor(1 + CLIP))
        for column, values in zip(columns.values(), (loss, log_probs, entropy, ratio), strict=True):
            column.append(values)
    loss, log_probs, entropy, ratio = (torch.cat(column) for column in columns.values())
    model.zero_grad()
    loss.mean().backward()
    sums = {
        "loss": loss.sum(),
        "denominator": torch.tensor(len(loss)),
        "nll": -log_probs.sum(),
        "entropy": entropy.sum(),
        "ratio_mean": ratio.sum(),
        "clip_fraction": (ratio > 1 + CLIP).sum(),
        "approx_kl": (ratio - 1 - ratio.log()).sum(),
        "label_tokens": torch.tensor(len(loss)),
        "ratio_max": ratio.max(),
    }
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients, {name: value.item() for name, value in sums.items()}


@contextmanager
def ready(folder: Path, parallel_config: ParallelConfig, *, fused_head: bool = True):
    """Place, model chunks, schedule and optimizer of this rank of a pool, for the length of a block."""
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group
    from megatron_psft.hf.weights import SafetensorsFolder, fill_parameters
    from megatron_psft.model.gpt import build_model, virtual_size
    from megatron_psft.model.shape import read_shape
    from megatron_psft.train.optimizer import build_optimizer
    from megatron_psft.train.pipeline import Pipeline

    config = Config(
        weights=WeightsConfig(load_hf="unread", save="unwritten"),
        data=DataConfig(data=("unread",), seq_length=SEQ_LENGTH),
        batch=BatchConfig(train_iters=10),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_style="constant"),
        parallel=parallel_config,
        objective=ObjectiveConfig(fused_head=fused_head),
    )
    here, shape = detect(0), read_shape(folder)
    with process_group(here, int(os.environ["WORLD_SIZE"])):
        place = initialize_parallel(
            parallel_config, virtual_size=virtual_size(shape, config), seed=1, device=here.device
        )
        chunks = build_model(shape, config, here, place)
        fill_parameters(chunks, SafetensorsFolder(folder, shape), shape, place)
        optimizer = build_optimizer(config, chunks)
        pipeline = Pipeline(chunks=chunks, parallel=place)
        yield SimpleNamespace(place=place, shape=shape, chunks=chunks, pipeline=pipeline, optimizer=optimizer)


def gradients_of(run: SimpleNamespace) -> dict[str, Tensor]:
    from megatron_psft.model.parameters import named_parameters

    return {name: parameter.main_grad.clone() for name, parameter in named_parameters(run.chunks)}


class GradientSource:
    """Gradients in place of weights: what maps the one to Megatron-Core's parameters maps the other."""

    def __init__(self, gradients: dict[str, Tensor]) -> None:
        self._gradients = gradients

    def read(self, piece) -> Tensor:
        return self._gradients[piece.name][piece.index]


def objective_of(name: str, **settings) -> Objective:
    return Objective(config=ObjectiveConfig(objective=name, clip_ratio_high=CLIP, **settings))


SUMS = ("loss", "denominator", "nll", "entropy", "ratio_mean", "clip_fraction", "approx_kl", "label_tokens")


def totals(per_rank: list[list[BatchSums]]) -> dict[str, float]:
    entries = [entry for sums in per_rank for entry in sums]
    sums = {name: sum(float(entry.totals[name]) for entry in entries) for name in SUMS}
    return {**sums, "ratio_max": max((ratio for entry in entries for ratio in entry.ratios.tolist()), default=0.0)}
