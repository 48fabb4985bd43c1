"""Proximal Supervised Fine-Tuning (arXiv 2508.17784) on NVIDIA Megatron-Core."""

__version__ = "0.2.0"
