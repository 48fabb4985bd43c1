"""Before a run: what it will need (plan), what this machine has (doctor), one step of a toy model (toy_step).

May import every room but evaluation, report, nemo and cli."""
