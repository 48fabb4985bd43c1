"""Before a run: what it will need (plan), what this machine has (doctor), one step of a toy model (toy_step).

May import config, objectives, distributed, data, head, model, metrics, scoring, checkpoint, hf, train."""
