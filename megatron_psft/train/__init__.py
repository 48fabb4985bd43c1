"""The training run: its inputs, its parts, the loop, and the passes of a global batch through Megatron-Core's pipeline.

May import every room below it; only diagnostics and cli may import it."""
