"""What `--profile` leaves, and that training is the same with it."""

import gzip
import json

import pytest
import torch

from megatron_psft.config.schema import LoggingConfig
from megatron_psft.train.profile import StepProfiler
from tests.support.runs import inputs, metrics_of, train

__all__ = ["inputs"]  # the fixture

CPU = torch.device("cpu")


def profiled(folder, steps, first: int, last: int, *, rank: int = 0, fails_at: int | None = None) -> dict[str, str]:
    """Multiplies in every step of `steps` and exponentiates between them; the files that are left, by name."""
    config = LoggingConfig(profile=True, profile_step_start=first, profile_step_end=last)
    with StepProfiler(config, folder, rank=rank, device=CPU) as profiler:
        for step in steps:
            with profiler.watch(step):
                torch.ones(4, 4) @ torch.ones(4, 4)
                if step == fails_at:
                    raise ArithmeticError
            torch.ones(4).exp()
    return read_files(folder / "profile")


def read_files(folder) -> dict[str, str]:
    return {
        path.name: gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        for path in folder.glob("*")
    }


def count(trace: str, operator: str) -> int:
    return sum(event.get("name") == operator for event in json.loads(trace)["traceEvents"])


@pytest.mark.parametrize(
    ("steps", "stem", "matmuls", "others"),
    [
        (range(1, 9), "steps_3_to_5_rank_0", 3, 2),  # what comes between two of them counts
        (range(4, 9), "steps_4_to_5_rank_0", 2, 1),  # a run that resumed within them
        (range(1, 5), "steps_3_to_4_rank_0", 2, 2),  # a run that ended within them
    ],
)
def test_the_steps_that_were_asked_for_are_profiled(tmp_path, steps, stem, matmuls, others):
    files = profiled(tmp_path, steps, 3, 5)
    assert set(files) == {f"{stem}.json.gz", f"{stem}.txt"}
    trace = files[f"{stem}.json.gz"]
    assert (count(trace, "aten::matmul"), count(trace, "aten::exp")) == (matmuls, others)
    assert "aten::mm" in files[f"{stem}.txt"]


def test_other_ranks_and_runs_beyond_the_steps_leave_nothing(tmp_path):
    assert profiled(tmp_path, range(1, 9), 3, 5, rank=1) == {}
    assert profiled(tmp_path, range(6, 9), 3, 5) == {}


def test_an_error_passes_and_a_later_profile_works(tmp_path):
    with pytest.raises(ArithmeticError):
        profiled(tmp_path, range(1, 9), 3, 5, fails_at=4)
    assert not (tmp_path / "profile").exists()
    assert profiled(tmp_path, range(1, 9), 3, 5)


@pytest.mark.slow
def test_a_run_is_the_same_with_a_profile(pool, tmp_path, inputs):
    flags = ("--train-iters", "4")
    train(pool, 1, inputs.argv(tmp_path / "plain", *flags))
    argv = inputs.argv(tmp_path / "run", *flags, "--profile", "--profile-step-start", "2", "--profile-step-end", "3")
    said = train(pool, 1, argv)
    files = read_files(tmp_path / "run" / "profile")
    assert set(files) == {"steps_2_to_3_rank_0.json.gz", "steps_2_to_3_rank_0.txt"}
    assert f"profiled steps 2 to 3: {tmp_path}/run/profile/steps_2_to_3_rank_0.json.gz" in said
    names = [line.split()[0] for line in files["steps_2_to_3_rank_0.txt"].splitlines() if line.strip()]
    assert "aten::mm" in names
    assert 20 <= len(names) <= 30  # with head, rules and sums
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")
