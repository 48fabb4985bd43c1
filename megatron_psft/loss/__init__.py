"""The loss of a run: its objective bound to its settings. No process group, no Megatron-Core, no host copies.

May import config, objectives."""
