"""Models on the ranks of the pool: layouts, and the way from a Hugging Face folder to Megatron-Core's model chunks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_psft.config.schema import Config, DataConfig, ParallelConfig, PrecisionConfig, WeightsConfig


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; sequence parallelism goes with tensor parallelism unless it is switched off."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    per_chunk: int | None = None
    sequence: bool = True
    expert: int = 1
    """Over the data-parallel ranks, and others where these are too few."""
    expert_tensor: int | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [f"{name}{size}" for name, size in (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))]
        names = [part for part in parts if not part.endswith("1")]
        if self.tensor > 1 and self.sequence:
            names.insert(1, "SP")
        if self.expert > 1:
            names.append(f"EP{self.expert}")
        if self.expert_tensor is not None:
            names.append(f"ETP{self.expert_tensor}")
        if self.per_chunk is not None:
            names.append(f"VPP{self.per_chunk}")
        return "-".join(names) or "one"


def make_config(layout: Layout, *, bf16: bool = False) -> Config:
    return Config(
        weights=WeightsConfig(load_hf="unused", save="unused"),
        data=DataConfig(data=("unused",)),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tensor,
            sequence_parallel=layout.tensor > 1 and layout.sequence,
            pipeline_model_parallel_size=layout.pipeline,
            num_layers_per_virtual_pipeline_stage=layout.per_chunk,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        ),
        precision=PrecisionConfig(bf16=bf16),
    )


class Rank:
    """One rank of a layout, ready to build models of `num_layers` layers."""

    def __init__(self, layout: Layout, platform, parallel) -> None:
        self.layout = layout
        self.platform = platform
        self.parallel = parallel

    def build(self, folder: Path, *, bf16: bool = False, weights=None):
        """Returns the chunks, filled from `folder` or from `weights`, and what they were built from."""
        from megatron_psft.hf.weights import SafetensorsFolder, fill_parameters
        from megatron_psft.model.gpt import build_model
        from megatron_psft.model.shape import read_shape

        shape = read_shape(folder)
        chunks = build_model(shape, make_config(self.layout, bf16=bf16), self.platform, self.parallel)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(torch.nan)  # a weight that is not filled is seen
        fill_parameters(chunks, weights or SafetensorsFolder(folder, shape), shape, self.parallel)
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
            make_config(layout).parallel,
            virtual_size=None if per_chunk is None else num_layers // layout.pipeline // per_chunk,
            seed=1,
            device=here.device,
        )
        yield Rank(layout, here, place)
