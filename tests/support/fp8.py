"""A configuration that computes in fp8."""

from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.schema import Config, ParallelConfig, PrecisionConfig


def precision(recipe: str = "delayed", fp8_format: str = "hybrid") -> PrecisionConfig:
    return PrecisionConfig(bf16=True, fp8_format=fp8_format, fp8_recipe=recipe)


def make_config(recipe: str, **parallel: int) -> Config:
    return Config(
        weights=WeightsConfig(load_hf="unused", save="unused"),
        data=DataConfig(data=("unused",)),
        parallel=ParallelConfig(**parallel),
        precision=precision(recipe),
    )
