"""Hugging Face folders to Megatron-Core parameters and back: names and slices (mapping), reading (weights), writing
(export), both without a run (conversion).

May import config, distributed, model, checkpoint."""
