"""What the ranks of the pool are born with: imports, and what a process finds out once. The fork server imports it."""

import gc

from megatron_psft.distributed.quick_imports import quick_imports

with quick_imports():
    import pytest  # noqa: F401
    import torch._dynamo  # as an optimizer does
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto  # noqa: F401

    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()

    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401

    import megatron_psft.cli.train
    import megatron_psft.train.run  # noqa: F401
    from megatron_psft.config import flags, schema
    from megatron_psft.data import cache
    from megatron_psft.metrics import provenance

    provenance.versions()
    cache._hash_of_code()
    flags.field_docs(schema.Config)
gc.freeze()
