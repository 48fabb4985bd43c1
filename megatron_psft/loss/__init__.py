"""Token losses: tensors in, tensors out. No process group, no Megatron-Core, no host copies.

May import config."""
