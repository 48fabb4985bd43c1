"""Distributed checkpoints: what is saved, by whom it is written, and which one a run resumes from.

May import config, data, distributed, model, metrics and scoring."""
