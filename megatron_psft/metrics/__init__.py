"""What a run reports: sums over ranks, metrics.jsonl, trackers, operations, and what code it is made of.

May import config, objectives, distributed, data, model."""
