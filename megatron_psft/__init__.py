"""Proximal Supervised Fine-Tuning (arXiv 2508.17784) on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
