"""Distributed checkpoints: what is saved, by whom it is written, and which one a run resumes from.

May import config, distributed, data, model, metrics, scoring."""
