"""PSFT in Megatron-Bridge, NeMo's stack for language models: a forward step, a callback, recipes.

from megatron_psft.nemo.recipes import qwen25_7b_psft_config
from megatron_psft.nemo.train import finetune

config = qwen25_7b_psft_config()
config.checkpoint.pretrained_checkpoint = "Qwen2.5-7B-Instruct"
config.psft.old_policy_interval = 4
finetune(config)

May import config, objectives, distributed, head, model, metrics, scoring, checkpoint,
diagnostics.
"""

from importlib.util import find_spec

if find_spec("megatron.bridge") is None:
    raise ImportError("megatron_psft.nemo needs megatron-bridge: pip install megatron-bridge, on Python 3.12")
