"""Models on the ranks of the pool: layouts, and the way from a Hugging Face folder to Megatron-Core's model chunks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config, ParallelConfig, PrecisionConfig


@dataclass(frozen=True)
class Layout:
    """How ranks share a model and its batches; its text names it, as in `TP2-SP-PP2`."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    per_chunk: int | None = None
    """Layers per chunk of an interleaved pipeline."""
    sequence: bool = True
    """Whether sequence parallelism goes with tensor parallelism."""
    expert: int = 1
    """Over the data-parallel ranks, and others where these are too few."""
    expert_tensor: int | None = None
    optimizer: Literal["distopt", "reduce", "overlap"] | None = None
    """The distributed optimizer, the overlapped reduction of gradients, or all that can be overlapped."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def parallel(self) -> ParallelConfig:
        """As the configuration has it."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1 and self.sequence,
            pipeline_model_parallel_size=self.pipeline,
            num_layers_per_virtual_pipeline_stage=self.per_chunk,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
            use_distributed_optimizer=self.optimizer in ("distopt", "overlap"),
            overlap_grad_reduce=self.optimizer in ("reduce", "overlap"),
            overlap_param_gather=self.optimizer == "overlap",
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """As the command line has it."""
        found: list[str] = []
        for field in fields(ParallelConfig):
            value = getattr(self.parallel, field.name)
            if value != field.default:
                flag = "--" + field.name.replace("_", "-")
                found += [flag] if value is True else [flag, str(value)]
        return tuple(found)

    def __str__(self) -> str:
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context), ("DP", self.data))
        names = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.tensor > 1 and self.sequence:
            names.insert(1, "SP")
        if self.expert > 1:
            names.append(f"EP{self.expert}")
        if self.expert_tensor is not None:
            names.append(f"ETP{self.expert_tensor}")
        if self.per_chunk is not None:
            names.append(f"VPP{self.per_chunk}")
        if self.optimizer is not None:
            names.append(self.optimizer)
        return "-".join(names) or "one"


LAYOUTS = {
    str(layout): layout
    for layout in (
        Layout(),
        Layout(tensor=2),
        Layout(tensor=2, sequence=False),
        Layout(tensor=2, sequence=False, data=2),
        Layout(tensor=2, sequence=False, pipeline=2),
        Layout(tensor=2, pipeline=2),
        Layout(tensor=2, pipeline=2, data=2),
        Layout(tensor=2, pipeline=2, data=2, optimizer="distopt"),
        Layout(tensor=2, context=2),
        Layout(pipeline=2),
        Layout(pipeline=2, per_chunk=1),
        Layout(pipeline=2, data=2),
        Layout(pipeline=2, data=2, per_chunk=1, optimizer="overlap"),
        Layout(pipeline=2, context=2),
        Layout(pipeline=2, context=2, data=2, optimizer="distopt"),
        Layout(context=2),
        Layout(context=4),
        Layout(context=2, data=2, optimizer="reduce"),
        Layout(data=2),
        Layout(data=4),
        Layout(data=2, optimizer="distopt"),
        Layout(data=2, optimizer="reduce"),
        Layout(data=2, optimizer="overlap"),
        Layout(data=2, expert=2),
        Layout(data=4, expert=2),
        Layout(data=2, expert=2, optimizer="overlap"),
        Layout(tensor=2, data=2, expert=2),
        Layout(tensor=2, data=2, expert=4, expert_tensor=1),
        Layout(tensor=2, expert_tensor=1),
        Layout(tensor=2, expert=2, expert_tensor=1),
        Layout(tensor=2, pipeline=2, data=2, expert=2, optimizer="overlap"),
        Layout(pipeline=2, data=2, expert=2),
        Layout(pipeline=2, data=2, expert=2, per_chunk=1),
        Layout(context=2, expert=2),
    )
}
"""By name, all in which something is compared; layouts that must be refused stand in the tests of refusals."""


NO_ADAPTERS = LoraConfig()


def make_config(layout: Layout, *, bf16: bool = False, lora: LoraConfig = NO_ADAPTERS) -> Config:
    return Config(
        lora=lora,
        weights=WeightsConfig(load_hf="unused", save="unused"),
        data=DataConfig(data=("unused",)),
        parallel=layout.parallel,
        precision=PrecisionConfig(bf16=bf16),
    )


class Rank:
    """One rank of a layout, ready to build models of `num_layers` layers."""

    def __init__(self, layout: Layout, platform, parallel) -> None:
        self.layout = layout
        self.platform = platform
        self.parallel = parallel

    def build(self, folder: Path, *, bf16: bool = False, weights=None, lora: LoraConfig = NO_ADAPTERS):
        """Returns the chunks, filled from `folder` or from `weights`, adapters as at the start of a run, and what they
        were built from."""
        from megatron_psft.hf.adapter import RandomAdapters
        from megatron_psft.hf.weights import SafetensorsFolder, fill_parameters
        from megatron_psft.model.gpt import build_model
        from megatron_psft.model.shape import read_shape

        shape = read_shape(folder)
        chunks = build_model(shape, make_config(self.layout, bf16=bf16, lora=lora), self.platform, self.parallel)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(torch.nan)  # a weight that is not filled is seen
        fill_parameters(chunks, weights or SafetensorsFolder(folder, shape), shape, self.parallel)
        if lora.has_adapters:
            fill_parameters(chunks, RandomAdapters(shape, lora, 7), shape, self.parallel, adapters=True)
        return chunks, shape


@contextmanager
def rank_of(layout: Layout, *, num_layers: int = 4) -> Iterator[Rank]:
    """Joins the ranks of a `pool.run` to `layout`."""
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group

    here = detect(0)
    with process_group(here, int(os.environ["WORLD_SIZE"])):
        per_chunk = layout.per_chunk
        place = initialize_parallel(
            layout.parallel,
            virtual_size=None if per_chunk is None else num_layers // layout.pipeline // per_chunk,
            seed=1,
            device=here.device,
        )
        yield Rank(layout, here, place)
