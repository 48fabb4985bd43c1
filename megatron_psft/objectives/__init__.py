"""Objectives: token losses, each declared beside its function in a file of builtin/, and what they are given.

Tensors in, tensors out. No process group, no Megatron-Core, no host copies. All files but `labels` and `objective` can
be imported without torch, as the configuration is made from the declarations.

May import no other room."""
