"""Trackers get every value of every step, a resumed run goes on in the same place, and a failed one says so."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_psft.config.rules import validate
from megatron_psft.config.schema import LoggingConfig
from megatron_psft.errors import RankError, UserError
from megatron_psft.metrics.trackers import Trackers
from tests.support.configs import parse

NAMES = ("loss", "grad_norm")


def values(step: int, run: int) -> dict[str, float]:
    return {"loss": step + run / 8, "grad_norm": 0.5 * step}


def write_steps(config: LoggingConfig, folder, first_step: int, last_step: int, run: int, **options) -> None:
    trackers = Trackers(config, folder, first_step=first_step, **options)
    for step in range(first_step, last_step + 1):
        trackers.log(step, values(step, run))
    trackers.close(has_failed=False)


def write_twice(config: LoggingConfig, folder) -> None:
    """Four steps, of which a second process repeats two before it goes on to the fifth."""
    write_steps(config, folder, 1, 4, run=0, description={"lr": 1e-3, "train_iters": 4})
    write_steps(config, folder, 3, 5, run=1, description={"lr": 1e-3, "train_iters": 5})


LAST = [values(1, 0), values(2, 0), *(values(step, 1) for step in (3, 4, 5))]
"""What is known of each step in the end."""


def test_tensorboard_holds_every_value_of_every_step_once(tmp_path):
    folder = tmp_path / "events"
    write_twice(LoggingConfig(tensorboard_dir=str(folder)), tmp_path)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(NAMES)
    for name in NAMES:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in LAST])
    assert [path.name for path in tmp_path.iterdir()] == ["events"]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    module = pytest.importorskip("mlflow")
    before = module.get_tracking_uri()
    module.set_tracking_uri(f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield module
    module.set_tracking_uri(before)


def test_mlflow_has_one_run_with_every_step_settings_and_state(mlflow, tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    write_twice(LoggingConfig(mlflow_experiment="psft"), folder)
    client = mlflow.MlflowClient()
    (experiment,) = mlflow.search_experiments(filter_string="name = 'psft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"lr": "0.001", "train_iters": "4"}
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json") == {"lr": 1e-3, "train_iters": 5}
    for name in NAMES:
        last = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert [last[step] for step in range(1, 6)] == pytest.approx([line[name] for line in LAST])


def test_mlflow_is_told_of_a_failure(mlflow, tmp_path):
    trackers = Trackers(LoggingConfig(mlflow_experiment="psft"), tmp_path, first_step=1)
    trackers.log(1, values(1, 0))
    trackers.close(has_failed=True)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert mlflow.get_run(run_id).info.status == "FAILED"


def test_a_run_that_mlflow_does_not_know_any_more_is_one_error(mlflow, tmp_path):
    (tmp_path / "trackers.json").write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(UserError, match=r"mlflow_experiment \(psft\): .*0123456789abcdef.*trackers.json in save"):
        Trackers(LoggingConfig(mlflow_experiment="psft"), tmp_path, first_step=1)


def test_wandb_resumes_the_run_it_began(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "first"
    folder.mkdir()
    began, kept = [], []
    original = wandb.init

    def init(**kwargs):
        run = original(**kwargs)
        finish = run.finish
        # Once finished, a run tells nothing any more.
        monkeypatch.setattr(
            run, "finish", lambda **how: kept.append((dict(run.config), dict(run.summary))) or finish(**how)
        )
        began.append(run)
        return run

    monkeypatch.setattr(wandb, "init", init)
    write_twice(LoggingConfig(wandb_project="psft"), folder)
    first, second = began
    assert (first.id, first.name, first.project) == (second.id, "first", "psft")
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": first.id}
    for (config, summary), run, last_step in zip(kept, (0, 1), (4, 5), strict=True):
        assert config == {"lr": 1e-3, "train_iters": last_step}
        assert {name: summary[name] for name in ("step", *NAMES)} == {"step": last_step, **values(last_step, run)}
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("CUSTOMER_UNAUTHORIZED", UserError),
        ("PERMISSION_DENIED", UserError),
        ("INVALID_PARAMETER_VALUE", UserError),
        ("INTERNAL_ERROR", RankError),  # also where no server answers
        ("REQUEST_LIMIT_EXCEEDED", RankError),
        ("TEMPORARILY_UNAVAILABLE", RankError),
    ],
)
def test_what_mlflow_refuses_is_a_mistake_and_a_lost_server_is_none(mlflow, tmp_path, monkeypatch, code, kind):
    from mlflow.protos import databricks_pb2

    def refuse(_):
        raise mlflow.MlflowException("planted", error_code=getattr(databricks_pb2, code))

    monkeypatch.setattr(mlflow, "set_experiment", refuse)
    with pytest.raises(kind, match=r"^mlflow_experiment \(psft\): .*planted"):
        Trackers(LoggingConfig(mlflow_experiment="psft"), tmp_path, first_step=1)


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        ("UsageError", "api_key not configured (no-tty). call wandb.login(key=[your_api_key])", UserError),
        ("AuthenticationError", "The API key is invalid", UserError),
        ("ValueError", "API key must have 40+ characters, has 7.", UserError),
        ("CommError", "failed to upsert bucket: returned error 404: entity nobody not found", UserError),
        ("CommError", "returned error 403: permission denied", UserError),
        ("CommError", "Run initialization has timed out after 90.0 sec.", RankError),
        ("CommError", "returned error 502: bad gateway", RankError),
    ],
)
def test_what_wandb_refuses_is_a_mistake_and_a_lost_server_is_none(tmp_path, monkeypatch, error, text, kind):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise getattr(wandb.errors, error, ValueError)(text)

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(kind, match=r"^wandb_project \(psft\): "):
        Trackers(LoggingConfig(wandb_project="psft"), tmp_path, first_step=1)


@pytest.mark.parametrize("field", ["wandb_project", "mlflow_experiment"])
def test_a_tracker_that_is_not_installed_is_a_mistake_before_anything_is_read(field, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    flags = ["--train-iters", "2", f"--{field.replace('_', '-')}", "psft"]
    with pytest.raises(UserError, match=rf"^{field} \(psft\) needs the package .*pip install"):
        validate(parse(*flags), 1)
