"""What is set before torch is imported, on GPUs and where the user has not."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_psft.distributed import environment
from megatron_psft.distributed.environment import gpu_settings, place_flight_recorder, prepare_environment
from tests.support.cli import REPOSITORY

NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path) -> None:
    """A machine with a GPU and 24 cores, whose user has set nothing."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(environment, "_GPU_SIGNS", (tmp_path / "nvidiactl", tmp_path / "version"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)))
    for name in (*NAMES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)


def values(given: dict[str, str], launcher: dict[str, str] | None = None) -> dict[str, str]:
    return {setting.name: setting.value for setting in gpu_settings(given, launcher=launcher)}


def test_what_the_user_has_not_set_is_set(on_a_gpu):
    settings = prepare_environment()
    assert ", ".join(map(str, settings)) == "CUDA_DEVICE_MAX_CONNECTIONS=1, PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


@pytest.mark.parametrize("allocator", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays_and_is_said(on_a_gpu, monkeypatch, allocator):
    given = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", allocator: "max_split_size_mb:64", "OMP_NUM_THREADS": "3"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [str(setting) for setting in prepare_environment()] == [
        f"{name}={value} (given)" for name, value in given.items()
    ]
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == given


@pytest.mark.parametrize(
    ("given", "launcher", "threads"),
    [
        ({}, None, None),  # a lone process has torch's own choice
        ({"LOCAL_WORLD_SIZE": "8"}, None, "3"),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, {"PATH": "/bin"}, "3"),
        ({"LOCAL_WORLD_SIZE": "64", "OMP_NUM_THREADS": "1"}, {}, "1"),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, None, "1"),  # nobody can tell who has set it
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "5"}, {}, "5"),  # not torchrun's value
    ],
)
def test_cores_are_divided_among_ranks_unless_the_user_has(on_a_gpu, given, launcher, threads):
    assert values(given, launcher).get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("given", "tf32"),
    [
        ({}, None),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "0"),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "0"}, "0"),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "1"}, "1"),
    ],
)
def test_the_images_tf32_is_off_unless_asked_for(given, tf32):
    assert values(given).get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == tf32


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_nothing_changes_where_gpus_are_hidden(on_a_gpu, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    before = dict(os.environ)
    assert prepare_environment() == []
    assert dict(os.environ) == before


def test_nothing_changes_where_there_is_no_gpu(on_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_GPU_SIGNS", (tmp_path / "none", tmp_path / "nvidiactl"))  # a container without
    before = dict(os.environ)
    assert prepare_environment() == []
    assert dict(os.environ) == before


def test_the_flight_recorder_writes_into_the_runs_folder_unless_the_user_has_another(monkeypatch, tmp_path):
    for name in environment._DUMPS:
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    place_flight_recorder(tmp_path / "run" / "flight_recorder")
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "flight_recorder" / "rank_")
    assert (tmp_path / "run" / "flight_recorder").is_dir()
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere/rank_")
    place_flight_recorder(tmp_path / "other")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
    assert not (tmp_path / "other").exists()


_LAUNCHER = """
import os, subprocess, sys
os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun does, where it is absent
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "TORCHELASTIC_RUN_ID": "test"}, check=True)
"""


@pytest.mark.parametrize(("given", "seen"), [({}, "None"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_a_rank_sees_what_torchrun_was_started_with(given, seen):
    rank = "from megatron_psft.distributed.environment import _launchers_environment as found\n"
    rank += "print(found().get('OMP_NUM_THREADS'))"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", _LAUNCHER, rank]
    done = subprocess.run(command, cwd=REPOSITORY, env={**clean, **given}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{seen}\n"


_FIRST_IMPORT = """
import importlib.abc, os, sys
from pathlib import Path
from megatron_psft.distributed import environment

environment._GPU_SIGNS = (Path(sys.argv[1]),)

class First(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "megatron.bridge"):  # the latter looks for itself, and may not be installed
            print(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), os.environ.get("PYTORCH_ALLOC_CONF"))
            os._exit(7)

sys.meta_path.insert(0, First())
sys.argv = sys.argv[2:]
"""
ENTRIES = {
    "pretrain_psft.py": "import runpy; runpy.run_path('pretrain_psft.py', run_name='__main__')",
    "psft train": "from megatron_psft.cli.main import main; sys.exit(main(['train', *sys.argv[1:]]))",
    "torchrun -m megatron_psft": "import runpy; runpy.run_module('megatron_psft', run_name='__main__')",
    "finetune": "import megatron_psft\n"
    "megatron_psft.finetune([{'prompt': 'a', 'completion': 'b'}], load_hf='m', save=sys.argv[-3], train_iters=1)",
    "psft doctor": "from megatron_psft.cli.main import main; sys.exit(main(['doctor']))",
    "examples/nemo": "import runpy; sys.argv[1:] = ['--recipe', 'qwen3_4b', '--pretrained-checkpoint', 'x']\n"
    "runpy.run_path('examples/nemo/finetune_psft.py', run_name='__main__')",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_sets_it_before_torch_is_imported(tmp_path: Path, entry: str) -> None:
    (tmp_path / "nvidiactl").touch()
    code = textwrap.dedent(_FIRST_IMPORT) + ENTRIES[entry]
    flags = ["--load-hf", "m", "--data", "d", "--save", str(tmp_path / "run"), "--train-iters", "1"]
    clean = {name: value for name, value in os.environ.items() if name not in (*NAMES, "CUDA_VISIBLE_DEVICES")}
    command = [sys.executable, "-c", code, str(tmp_path / "nvidiactl"), "psft", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (7, ["1 expandable_segments:True"]), done.stderr
    if entry == "psft doctor":
        assert "environment of a run\n  CUDA_DEVICE_MAX_CONNECTIONS  1 (a run sets it, unset here; " in done.stdout


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_changes_nothing(tmp_path):
    (tmp_path / "nvidiactl").touch()
    code = textwrap.dedent(_FIRST_IMPORT) + ENTRIES["psft train"]
    flags = ["--load-hf", "m", "--data", "d", "--save", "s", "--train-iters", "1", "--device", "cpu"]
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", code, str(tmp_path / "nvidiactl"), "psft", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "None None\n"), done.stderr
