"""A model's answers to questions: tasks, results with intervals, lm-evaluation-harness, two models compared.

May import config, data, hf, metrics, rollout."""
