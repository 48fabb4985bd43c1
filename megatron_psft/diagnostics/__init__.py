"""Before a run: what it will need (plan), what this machine has (doctor); and what to say of one that is out of memory.

May import config, distributed, head, model, metrics, checkpoint, hf, sources."""
