"""The Job against Kubernetes' schema, and what its pods run under a stand-in for torchrun."""

import os
import shlex
import signal
import subprocess
import time

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_psft.config.rules import validate
from megatron_psft.config.schema import parse_config
from tests.support.cli import REPOSITORY
from tests.support.scripts import installed

FOLDER = REPOSITORY / "examples" / "kubernetes"
TORCHRUN = """#!/usr/bin/env bash
trap 'echo TERM > "$CALLS/signal"; exit 1' TERM
printf '%s\\n' "$@" > "$CALLS/arguments"
if [[ -n $LEFT ]]; then echo "$LEFT" > "$PSFT_EXIT_CODE_FILE"; fi
while [[ $CODE == never ]]; do sleep 0.05; done
exit "$CODE"
"""


@pytest.fixture(scope="module")
def parts() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((FOLDER / "psft.yaml").read_text())}


@pytest.fixture
def pod(parts, tmp_path):
    """Starts what a pod runs; returns the process."""
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (container,) = parts["Job"]["spec"]["template"]["spec"]["containers"]
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    processes = []

    def start(code: str, left: str = "") -> subprocess.Popen:
        path = f"{tmp_path}:{os.environ['PATH']}"
        given = {**own, "JOB_COMPLETION_INDEX": "3", "PATH": path, "CALLS": str(tmp_path), "CODE": code, "LEFT": left}
        processes.append(
            subprocess.Popen([*container["command"], *container["args"]], cwd=REPOSITORY, env=given, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_kubernetes_knows_every_field(parts, kind):
    kubernetes_validate.validate(parts[kind], "1.37", strict=True)
    misspelt = {**parts[kind], "spec": {**parts[kind]["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, "1.37", strict=True)


def test_names_and_numbers_agree(parts):
    service, job = parts["Service"], parts["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    name = parts["Job"]["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert int(env["NODES"]) == job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 3 * job["completions"]
    assert int(env["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_runs_a_command_that_torchrun_and_the_trainer_understand(pod, tmp_path):
    assert pod("0").wait(60) == 0
    launch = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines())
    assert (launch.nnodes, launch.node_rank, launch.nproc_per_node) == ("8", 3, "8")
    assert launch.master_addr == "psft-0.psft"
    assert (launch.module, launch.training_script) == (True, "megatron_psft")
    config = parse_config(launch.training_script_args)
    validate(config, world_size=64)
    assert config.weights.save == "/shared/runs/first"


@pytest.mark.parametrize(
    ("code", "left", "ends_with"),
    [("1", "2", 2), ("1", "3", 3), ("1", "4", 4), ("1", "143", 143), ("1", "", 4), ("127", "", 2)],
)
def test_a_pod_ends_with_the_code_of_the_process_that_failed_first(pod, code, left, ends_with):
    assert pod(code, left).wait(60) == ends_with


def test_a_pod_that_is_told_to_end_tells_torchrun(pod, tmp_path):
    process = pod("never")
    deadline = time.monotonic() + 60
    while not (tmp_path / "arguments").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "signal").exists()


def test_the_job_stays_away_after_what_would_end_alike(parts):
    ignored, failed = parts["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert failed["onExitCodes"]["values"] == [1, 2, 3]


def test_bash_and_shellcheck_find_nothing():
    script = FOLDER / "node.sh"
    assert os.access(script, os.X_OK), f"chmod +x {shlex.quote(str(script))}"
    done = subprocess.run([installed("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
