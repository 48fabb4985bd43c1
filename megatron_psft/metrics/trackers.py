"""Experiment trackers that a run's metrics go to besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each goes on where an earlier process of the same run stopped; `<save>/trackers.json` has the IDs of the trackers' runs.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from megatron_psft.atomic import replace_file
from megatron_psft.config.schema import LoggingConfig
from megatron_psft.errors import RankError, UserError

_IDS_FILE = "trackers.json"
_REFUSED = re.compile(r"\b40[0134]\b|permission denied|not found|unauthori[sz]ed|forbidden", re.IGNORECASE)
"""What W&B's server says where the same start would be refused again."""
_LATER = (408, 409, 429, 499)
"""HTTP's 4xx that are about the moment: timeouts, conflicts, too many requests."""
_LONGEST_PARAMETER = 500  # characters; some MLflow servers refuse longer ones


class Tracker(Protocol):
    """Where the values of steps go."""

    run_id: str | None
    """What the tracker knows the run by; None where it has no such name."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of one step (from 1, or 0 before the first), and does not wait until they have arrived."""

    def close(self, *, has_failed: bool) -> None:
        """Waits for what is under way."""


class Trackers:
    """All trackers of a run, on the one rank that reports."""

    def __init__(
        self, config: LoggingConfig, folder: Path, *, first_step: int, description: Mapping[str, Any] | None = None
    ) -> None:
        """Opens them.

        Args:
            config: which ones.
            folder: of the run, whose name is theirs.
            first_step: of this process, from 1; what a tracker has of it and of later ones is replaced or followed.
            description: settings and versions, kept with the run.

        Raises:
            UserError: a tracker refuses the login, the project or the run. Its package is there: see config/rules.py.
            RankError: its server cannot be reached, or fails.
        """
        ids_path = folder / _IDS_FILE
        ids: dict[str, str] = json.loads(ids_path.read_text(encoding="utf-8")) if ids_path.is_file() else {}
        settings = dict(description or {})
        self._trackers: dict[str, Tracker] = {}
        if config.tensorboard_dir is not None:
            self._trackers["tensorboard"] = _TensorBoard(config.tensorboard_dir, first_step)
        if config.wandb_project is not None:
            self._trackers["wandb"] = _Wandb(config.wandb_project, folder, ids.get("wandb"), settings)
        if config.mlflow_experiment is not None:
            self._trackers["mlflow"] = _Mlflow(config.mlflow_experiment, folder, ids.get("mlflow"), settings)
        found = {name: tracker.run_id for name, tracker in self._trackers.items() if tracker.run_id is not None}
        if found.items() - ids.items():
            replace_file(ids_path, json.dumps({**ids, **found}) + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers.values():
            tracker.log(step, values)

    def close(self, *, has_failed: bool) -> None:
        with ExitStack() as stack:  # each is closed, whatever another one raises
            for tracker in self._trackers.values():
                stack.callback(tracker.close, has_failed=has_failed)


class _TensorBoard:
    run_id: str | None = None

    def __init__(self, folder: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=first_step if first_step > 1 else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, has_failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, folder: Path, run_id: str | None, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=folder,
                id=run_id,
                resume="allow",
                config=dict(settings),
                # What a resumed run was started with may differ, as in its length.
                allow_val_change=True,
            )
        except (wandb.Error, ValueError) as error:
            text = f"wandb_project ({project}): {error}"
            # W&B knows its own checks by type, and the server's answer about a project or its owner in words alone.
            is_mistake = isinstance(error, ValueError | wandb.errors.AuthenticationError | wandb.errors.UsageError)
            if is_mistake or _REFUSED.search(str(error)):
                raise UserError(
                    f"{text}; see wandb login, WANDB_API_KEY, WANDB_ENTITY and the project's name"
                ) from error
            raise RankError(text) from error
        self.run_id: str | None = self._run.id
        # Its own counter only rises, and would drop steps that a resumed run trains again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class _Mlflow:
    def __init__(self, experiment: str, folder: Path, run_id: str | None, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        try:
            mlflow.set_experiment(experiment)
            is_new = run_id is None
            run = mlflow.start_run(run_id=run_id, run_name=folder.resolve().name if is_new else None)
            if is_new:  # parameters cannot change, and a resumed run's may; the artifact below has the newest
                mlflow.log_params({name: str(value)[:_LONGEST_PARAMETER] for name, value in settings.items()})
            mlflow.log_dict(dict(settings), "config.json")
        except mlflow.MlflowException as error:
            text = f"mlflow_experiment ({experiment}): {error}"
            status = error.get_http_status_code()
            if 400 <= status < 500 and status not in _LATER:
                raise UserError(
                    f"{text}; see MLFLOW_TRACKING_URI, its credentials and the experiment; {_IDS_FILE} in save names "
                    "a run to go on with, if there is one, and may be removed"
                ) from error
            raise RankError(text) from error
        self.run_id: str | None = run.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def close(self, *, has_failed: bool) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FAILED" if has_failed else "FINISHED")
