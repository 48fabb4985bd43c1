"""The training run: its inputs, its parts, the loop, and the passes of a global batch through Megatron-Core's pipeline.

May import config, objectives, distributed, data, head, model, metrics, scoring, checkpoint, hf,
sources, diagnostics."""
