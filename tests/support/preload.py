"""What the ranks of the pool are born with: imports, and what a process finds out once. The fork server imports it."""

import gc

gc.disable()

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402  # as an optimizer does
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.auto.tokenization_auto  # noqa: E402, F401

from megatron_psft.distributed.megatron_import import import_megatron  # noqa: E402

import_megatron()

import megatron.core.dist_checkpointing.strategies.torch  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

import megatron_psft.cli.train  # noqa: E402
import megatron_psft.train.run  # noqa: E402, F401
from megatron_psft.config import flags, schema  # noqa: E402
from megatron_psft.data import cache  # noqa: E402
from megatron_psft.metrics import provenance  # noqa: E402

provenance.versions()
cache._hash_of_code()
flags.field_docs(schema.Config)

gc.freeze()
gc.enable()
