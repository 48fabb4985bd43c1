"""Answers sampled from a model, the prompts they answer, and their rewards.

May import config, data."""
