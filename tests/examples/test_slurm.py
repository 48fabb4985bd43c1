"""The batch script under stand-ins for Slurm and torchrun: what it would run, and when it goes back into the queue."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_psft.config.rules import validate
from megatron_psft.config.schema import parse_config
from tests.support import tiny
from tests.support.cli import REPOSITORY
from tests.support.scripts import installed

SCRIPT = REPOSITORY / "examples" / "slurm" / "psft.sbatch"
NODES, GPUS = 2, 8

# srun starts a task for each node of TASKS, in the background as slurmstepd would, so that a signal can find it; the
# first that fails ends the others (--kill-on-bad-exit), and the highest code is srun's.
STUBS = {
    "srun": """
        printf '%s\\n' "$@" > "$CALLS/srun"
        while [[ $1 == --* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac; done
        tasks=() highest=0
        for node in $TASKS; do
            SLURM_NODEID=$node SLURM_GPUS_ON_NODE=$GPUS "$@" &
            tasks+=($!)
        done
        printf '%s\\n' "${tasks[@]}" > "$CALLS/task"
        for _ in "${tasks[@]}"; do
            wait -n
            code=$?
            if [[ $code -ne 0 && $highest -eq 0 ]]; then kill -TERM "${tasks[@]}" 2>/dev/null; fi
            if [[ $code -gt $highest ]]; then highest=$code; fi
        done
        exit $highest
    """,
    "scontrol": """
        printf '%s\\n' "$*" >> "$CALLS/scontrol"
        if [[ $1 == show ]]; then printf '%s\\n' $SLURM_JOB_NODELIST; fi
    """,
    "scancel": """
        printf '%s\\n' "$*" >> "$CALLS/scancel"
        kill -TERM $(cat "$CALLS/task")
    """,
    # As torchrun, which ends with 1 whatever its processes did. ENDS_0 is what becomes of it on node 0: "never", or the
    # code that a process leaves, if any does, and torchrun's own.
    "torchrun": """
        if [[ $1 == --help ]]; then echo "$TORCHRUN_KNOWS"; exit; fi
        trap 'echo TERM >> "$CALLS/signals"; exit 1' TERM
        printf '%s\\n' "$@" > "$CALLS/torchrun.$SLURM_NODEID"
        env > "$CALLS/environment"
        mv "$CALLS/torchrun.$SLURM_NODEID" "$CALLS/torchrun"
        echo "$SLURM_NODEID" >> "$CALLS/began"
        ends=ENDS_$SLURM_NODEID
        read -r left code <<< "${!ends:-- $TORCHRUN_ENDS_WITH}"
        while [[ $left == never || $code == never ]]; do sleep 0.05; done
        until [[ $(wc -l < "$CALLS/began") -eq $(wc -w <<< "$TASKS") ]]; do sleep 0.05; done
        if [[ $left != - ]]; then (set -o noclobber; echo "$left" > "$PSFT_EXIT_CODE_FILE"); fi
        exit "$code"
    """,
}


class Job:
    """The script, running."""

    def __init__(self, folder: Path, *arguments: str, torchrun_ends_with: str | None, **environment: str) -> None:
        """With torchrun itself where it is not told how to end."""
        self.calls, programs = folder / "calls", folder / "bin"
        for made in (self.calls, programs):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        real = (
            {"torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"'} if torchrun_ends_with is None else {}
        )
        for name, body in {**STUBS, **real}.items():
            (programs / name).write_text("#!/usr/bin/env bash\n" + body)
            (programs / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-a node-b",
            "SLURM_JOB_NUM_NODES": str(NODES),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "HOME": str(folder),
            "CALLS": str(self.calls),
            "TASKS": "1",
            "GPUS": str(GPUS),
            "TORCHRUN_ENDS_WITH": torchrun_ends_with or "",
            "TORCHRUN_KNOWS": "--shutdown-timeout",
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env={**slurm, **environment}, stderr=subprocess.PIPE, text=True
        )

    def called(self, program: str) -> list[str]:
        """Lines that a stand-in has left: its arguments one by one, or call by call."""
        path = self.calls / program
        return path.read_text().splitlines() if path.exists() else []

    def preempt(self) -> None:
        """Slurm signals the tasks; the script sees nothing but their exit code."""
        for task in self.called("task"):
            os.kill(int(task), signal.SIGTERM)

    def wait_for_torchrun(self, count: int = 1) -> None:
        wait_until(lambda: len(self.called("began")) == count, 120)

    def end(self) -> int:
        _, error = self.process.communicate(timeout=120)
        assert error == ""
        return self.process.returncode

    @property
    def was_requeued(self) -> bool:
        return "requeue 123456" in self.called("scontrol")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    jobs = []

    def run(*arguments: str, torchrun_ends_with: str | None = "0", **environment: str) -> Job:
        jobs.append(Job(tmp_path, *arguments, torchrun_ends_with=torchrun_ends_with, **environment))
        return jobs[-1]

    yield run
    for job in jobs:
        job.process.kill()


def test_bash_and_shellcheck_find_nothing():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run([installed("shellcheck"), str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def as_torchrun_reads(arguments: list[str]) -> argparse.Namespace:
    """By the parser of the installed torch, and with what newer ones have."""
    parser = get_args_parser()
    if "--shutdown-timeout" not in parser.format_help():
        parser.add_argument("--shutdown-timeout", type=int)
    return parser.parse_args(arguments)


def test_no_job_number_leads_to_a_port_that_linux_hands_out():
    line = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("MASTER_PORT="))
    loop = f'for SLURM_JOB_ID in {{1..40000}} 4294967295; do {line}; echo "$MASTER_PORT"; done'
    ports = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, check=True).stdout.split()
    assert (min(map(int, ports)), max(map(int, ports))) == (20000, 31999)  # from 32768 on they are Linux's


def test_each_node_runs_a_command_that_torchrun_and_the_trainer_understand(start):
    recipe = "examples/recipes/qwen2.5-7b-instruct-8xh100.yaml"
    job = start("--config", recipe, "--data", "/shared/a b.jsonl", "--save", "/shared/run", "--global-batch-size", "16")
    assert job.end() == 0
    launch = as_torchrun_reads(job.called("torchrun"))
    assert (launch.nnodes, launch.node_rank, launch.nproc_per_node) == (str(NODES), 1, str(GPUS))
    assert (launch.master_addr, launch.master_port) == ("node-a", 20000 + 123456 % 12000)
    assert launch.training_script == "pretrain_psft.py"
    config = parse_config(launch.training_script_args)
    validate(config, NODES * GPUS)
    assert config.data.data == ("/shared/a b.jsonl",)
    assert config.weights.save == "/shared/run"
    assert config.data.data_cache_dir == f"{job.calls.parent}/.cache/megatron_psft"
    assert not job.was_requeued


def test_torchrun_waits_for_a_checkpoint_but_less_long_than_slurm(start):
    job = start()
    job.end()
    patience = as_torchrun_reads(job.called("torchrun")).shutdown_timeout
    notice = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert 30 < patience < int(notice[1])


def test_a_torchrun_that_cannot_wait_is_not_asked_to(start):
    job = start(TORCHRUN_KNOWS="--max-restarts")
    _, error = job.process.communicate(timeout=120)
    assert job.process.returncode == 0
    assert error.startswith("this torchrun kills what has not ended 30 seconds after a signal")
    assert "--shutdown-timeout" not in job.called("torchrun")


def test_the_network_and_the_caches_are_where_the_job_says(start, tmp_path):
    cache = tmp_path / "shared"
    job = start(NETWORK_INTERFACE="ib0", SHARED_CACHE=str(cache))
    job.end()
    environment = dict(line.split("=", 1) for line in job.called("environment") if "=" in line)
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert environment["HF_HOME"] == f"{cache}/huggingface"
    assert environment["PSFT_EXIT_CODE_FILE"] == f"{cache}/psft_exit_codes/123456.0"
    assert f"{cache}/megatron_psft" in job.called("torchrun")


def test_a_container_sees_the_code_and_the_caches(start, tmp_path):
    cache = tmp_path / "shared"
    job = start(CONTAINER_IMAGE="psft.sqsh", CONTAINER_MOUNTS="/data:/data", SHARED_CACHE=str(cache))
    job.end()
    options = job.called("srun")
    assert options[options.index("--container-image") + 1] == "psft.sqsh"
    mounts = options[options.index("--container-mounts") + 1].split(",")
    assert mounts == [f"{REPOSITORY}:{REPOSITORY}", f"{cache}:{cache}", "/data:/data"]


@pytest.mark.parametrize(
    ("left", "is_requeued"), [(1, False), (2, False), (3, False), (4, True), (130, False), (143, True)]
)
def test_the_code_that_a_process_leaves_says_what_becomes_of_the_job(start, left, is_requeued):
    job = start(ENDS_1=f"{left} 1")
    assert job.end() == left
    assert job.was_requeued == is_requeued


def test_processes_that_are_killed_without_a_word_are_a_loss(start):
    job = start(ENDS_1="- 1")
    assert job.end() == 4
    assert job.was_requeued


def test_a_node_without_torchrun_is_a_mistake(start):
    job = start(ENDS_1="- 127")
    assert job.end() == 2
    assert not job.was_requeued


@pytest.mark.parametrize(
    ("ends", "code", "is_requeued"), [("2 1", 2, False), ("3 1", 3, False), ("1 1", 1, False), ("- 1", 4, True)]
)
def test_a_node_that_fails_is_the_cause_though_the_others_are_signalled(start, ends, code, is_requeued):
    """srun ends the others, which is no preemption; their codes are as high as that of one."""
    job = start(TASKS="0 1", ENDS_0="never", ENDS_1=ends)
    assert job.end() == code
    assert job.called("signals") == ["TERM"]
    assert job.was_requeued == is_requeued


def test_a_preemption_of_several_nodes_is_one(start):
    job = start(TASKS="0 1", torchrun_ends_with="never")
    job.wait_for_torchrun(count=2)
    job.preempt()
    assert job.end() == 143
    assert job.was_requeued


def test_losses_are_counted_over_the_starts_of_a_job_and_preemptions_are_not(start):
    requeued = []
    for restart, left in enumerate([4, 143, 143, 143, 4, 4, 4]):
        job = start(ENDS_1=f"{left} 1", SLURM_RESTART_COUNT=str(restart))
        _, error = job.process.communicate(timeout=120)
        assert job.process.returncode == left
        requeued.append(job.was_requeued)
    assert requeued == [True] * 6 + [False]
    assert error == "4 starts have lost a peer, a disk or a node: the job stays away\n"
    job = start(ENDS_1="4 1")  # another job, of the same number
    assert job.end() == 4
    assert job.was_requeued


def test_a_site_chooses_how_often_a_loss_is_put_back(start):
    job = start(ENDS_1="4 1", MAX_REQUEUES="0")
    _, error = job.process.communicate(timeout=120)
    assert (job.process.returncode, error[:8], job.was_requeued) == (4, "1 starts", False)


def test_a_job_that_ends_well_leaves_no_codes(start, tmp_path):
    start(ENDS_1="143 1").end()
    job = start(SLURM_RESTART_COUNT="1")
    assert job.end() == 0
    assert list((tmp_path / ".cache/psft_exit_codes").iterdir()) == []


def test_a_preempted_job_saves_and_goes_back_into_the_queue(start):
    job = start(torchrun_ends_with="never")
    job.wait_for_torchrun()
    job.preempt()
    assert job.end() == 143
    assert job.called("signals") == ["TERM"]
    assert job.was_requeued


def test_near_the_end_of_its_time_a_job_saves_and_goes_back_into_the_queue(start):
    job = start(torchrun_ends_with="never")
    job.wait_for_torchrun()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 143
    assert job.called("scancel") == ["--signal=TERM 123456"]
    assert job.called("signals") == ["TERM"]
    assert job.was_requeued


def test_a_cancelled_job_stays_away(start):
    """Slurm then signals the script as well as the tasks."""
    job = start(torchrun_ends_with="never")
    job.wait_for_torchrun()
    job.process.send_signal(signal.SIGTERM)
    job.preempt()
    assert job.end() == 143
    assert not job.was_requeued


@pytest.mark.slow
def test_a_preempted_run_goes_on_where_it_was(start, tmp_path):
    """With torchrun and the trainer themselves, on one node, whose job is preempted twice."""
    flags = f"--load-hf {tiny.build_model(tmp_path / 'model', 'qwen2', num_hidden_layers=1)} --train-iters 100000"
    flags += f" --tokenizer {tiny.build_tokenizer(tmp_path / 'tokenizer')} --save {tmp_path / 'run'}"
    flags += f" --data {tiny.write_records(tmp_path / 'data.jsonl', 16)} --seq-length 256 --global-batch-size 2"
    node = {"SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_NUM_NODES": "1", "TASKS": "0", "GPUS": "2"}
    flags += " --device cpu"  # Slurm says that there are GPUs
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def steps() -> list[int]:
        path = tmp_path / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    for _ in range(2):
        before = len(steps())
        job = start(*flags.split(), torchrun_ends_with=None, **node, **cpu)
        wait_until(lambda before=before: len(steps()) > before + 2, 600)
        job.preempt()
        _, error = job.process.communicate(timeout=300)
        assert job.process.returncode == 143, error
        assert job.was_requeued
        assert "ended by SIGTERM" in error
    assert "resumed from" in error
    assert steps() == list(range(1, len(steps()) + 1))
