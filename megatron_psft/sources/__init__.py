"""Where a run's model comes from, behind one interface (source): this package's own families (native), or NVIDIA's
Megatron-Bridge (bridge). Nothing beside this room knows which.

May import config, distributed, model, metrics, checkpoint, hf."""
