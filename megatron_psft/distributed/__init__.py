"""Ranks and groups (the only door to Megatron-Core's parallel state), the device, its stand-ins on a CPU, signals.

May import config."""
