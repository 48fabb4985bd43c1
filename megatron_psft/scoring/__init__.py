"""Log-probabilities under other weights than those being trained: the old policy's window, the reference at the start.

May import config, objectives, distributed, data, head, metrics."""
