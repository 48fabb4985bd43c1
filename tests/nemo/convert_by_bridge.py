"""`psft convert` where Bridge's models have no layers of Transformer Engine:
`cpu.run("tests.nemo.convert_by_bridge", FLAGS)`."""

import functools
from collections.abc import Sequence

from megatron.bridge.models import gpt_provider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_psft.cli import convert

FUSIONS = ("apply_rope_fusion", "gradient_accumulation_fusion", "persist_layer_norm")


@functools.cache
def use_portable_layers() -> None:
    """Gives all models of Bridge's Megatron-Core's own layers."""
    provide = gpt_provider.GPTModelProvider.provide

    def provide_portable(provider, *args, **kwargs):
        for name in FUSIONS:
            setattr(provider, name, False)
        return provide(provider, *args, **kwargs)

    gpt_provider.GPTModelProvider.provide = provide_portable
    gpt_provider.transformer_engine_layer_spec = lambda config, **_: get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )


def main(argv: Sequence[str]) -> int:
    use_portable_layers()
    return convert.main(argv)
