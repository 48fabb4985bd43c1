"""Starts finetune_psft.py with NeMo-Run, on this machine or through Slurm; `--help` has examples."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).resolve().with_name("finetune_psft.py")
EXAMPLES = """examples; what follows upon -- are the flags of finetune_psft.py:
  this machine:
    python examples/nemo/launch_nemo_run.py --executor local --gpus-per-node 8 -- \\
        --recipe qwen25_7b --pretrained-checkpoint Qwen2.5-7B-Instruct --data DATA --save runs/first
  Slurm, from a login node, this repository on a file system that all nodes share:
    python examples/nemo/launch_nemo_run.py --executor slurm --nodes 4 --account A --partition P \\
        --container-image nemo.sqsh --container-mounts /shared:/shared -- --recipe qwen3_30b_a3b ..."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Where and how large."""

    executor: Literal["local", "slurm"]
    """This machine, or sbatch."""
    gpus_per_node: int = 8
    """Processes per node, one for each GPU."""
    nodes: int = 1
    """Nodes of the job. More than one needs executor slurm."""
    account: str | None = None
    """Slurm account. Needed by executor slurm."""
    partition: str | None = None
    """Slurm partition. Needed by executor slurm."""
    time: str = "04:00:00"
    """Slurm time limit."""
    container_image: PathText | None = None
    """Container that Slurm starts (Pyxis), e.g. NeMo's; none if unset."""
    container_mounts: tuple[PathText, ...] = ()
    """Mounts of the container, as host:container."""
    name: str = "psft"
    """Name of NeMo-Run's experiment."""
    dry_run: bool = False
    """Print what would be started."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "gpus_per_node", "nodes")
        if self.executor == "local" and self.nodes > 1:
            raise UserError(f"nodes ({self.nodes}) must be 1 with executor local; use slurm")
        if self.executor == "slurm" and not (self.account and self.partition):
            raise UserError("account and partition must be given with executor slurm")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The command's only section."""

    job: JobConfig


def main(argv: Sequence[str]) -> int:
    """Starts the job and returns the exit code: 0, or 2 after a user's mistake."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, script_args = argv[:end], list(argv[end + 1 :])
    return run_command(LaunchConfig, lambda config: launch(config.job, script_args), own, epilog=EXAMPLES)


def launch(config: JobConfig, script_args: Sequence[str]) -> None:
    """Runs finetune_psft.py with `script_args`; waits for it on this machine, and not for Slurm."""
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(f"this launcher needs NeMo-Run: pip install nemo-run ({error})") from error

    script = nemo_run.Script(path=str(SCRIPT), entrypoint="python", args=list(script_args))
    with nemo_run.Experiment(config.name) as experiment:
        experiment.add(script, executor=_executor(nemo_run, config), name=config.name)
        if config.dry_run:
            experiment.dryrun()
        else:
            is_local = config.executor == "local"
            experiment.run(detach=not is_local, tail_logs=is_local)


def _executor(nemo_run: Any, config: JobConfig) -> Any:
    environment = {"PYTHONPATH": str(REPOSITORY)}
    if config.executor == "local":
        return nemo_run.LocalExecutor(ntasks_per_node=config.gpus_per_node, launcher="torchrun", env_vars=environment)
    return nemo_run.SlurmExecutor(
        account=config.account,
        partition=config.partition,
        nodes=config.nodes,
        # Slurm starts the ranks itself; Megatron-Bridge reads their places from its variables.
        ntasks_per_node=config.gpus_per_node,
        gpus_per_node=config.gpus_per_node,
        exclusive=True,
        mem="0",
        time=config.time,
        container_image=config.container_image,
        container_mounts=list(config.container_mounts),
        env_vars=environment,
        packager=nemo_run.Packager(),  # nothing is packed: the file system is shared
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
