"""`megatron_psft.finetune`: training from Python, on records that the caller holds."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import megatron_psft as psft
from megatron_psft.distributed import rendezvous
from megatron_psft.distributed.exit_code import FILE_VARIABLE
from tests.support import tiny
from tests.support.cli import REPOSITORY
from tests.support.marks import slow
from tests.support.pool import WorkerError

RECORDS = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(2, 10)]
SMALL = {"train_iters": 2, "global_batch_size": 4, "seq_length": 128, "lr": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.build_model(folder, "qwen2")
    return tiny.build_tokenizer(folder)


def test_the_package_imports_no_torch_before_a_call():
    script = "import sys, megatron_psft as p; p.finetune, p.UserError; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == ["False"]


@pytest.mark.parametrize(
    ("records", "settings", "text"),
    [
        (RECORDS, {"learning_rate": 1e-5, "epochs": 1}, "unknown setting learning_rate; "),
        (RECORDS, {}, "exactly one of train_iters and epochs must be set"),
        (RECORDS, {"epochs": "3"}, "epochs ('3') must be an integer"),
        (RECORDS, {"epochs": 1, "data": "a.jsonl"}, "data (a.jsonl) and records are both given; remove one"),
        (None, {"epochs": 1}, "missing records; give a list of dicts, or name files by data"),
        ([], {"epochs": 1}, "records ([]) must hold at least one record"),
        (["text"], {"epochs": 1}, "records[0] (str) must be a dict"),
        ([*RECORDS[:2], {"prompt": {1}}], {"epochs": 1}, "records[2] must hold values that JSON has: "),
        ([{"prompt": float("nan")}], {"epochs": 1}, "records[0] must hold values that JSON has: "),
    ],
)
def test_a_mistake_is_an_exception_and_writes_nothing(tmp_path, records, settings, text):
    with pytest.raises(psft.UserError) as caught:
        psft.finetune(records, load_hf="hf", save=tmp_path / "run", **settings)
    assert str(caught.value).startswith(text)
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_refused(tmp_path):
    found = []

    def call():
        with pytest.raises(psft.UserError, match="only the main thread"):
            psft.finetune(RECORDS, load_hf="hf", save=tmp_path / "run", epochs=1)
        found.append(True)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == [True]


def _calls(model: Path, folder: Path) -> None:
    """Several in this process, a refused one and an interrupted one among them."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from megatron_psft.metrics.run_log import RunLog

    first = psft.finetune(RECORDS, load_hf=model, save=folder / "first", **SMALL)
    assert [line["step"] for line in first.metrics] == [1, 2]
    assert first.export == folder / "first" / "hf"
    assert not dist.is_initialized()
    with pytest.raises(psft.UserError, match="training data"):
        psft.finetune(RECORDS[1:], load_hf=model, save=folder / "first", **SMALL)
    again = psft.finetune(iter(RECORDS), load_hf=model, save=folder / "first", **SMALL)  # as every step is done
    assert again == first
    # Another run of the same: nothing of the first one is left in the process.
    settings = {**SMALL, "export_hf": None, "save_interval": 1}
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        record = RunLog.record

        def interrupted(self, step, values):
            record(self, step, values)
            os.kill(os.getpid(), signal.SIGINT)

        RunLog.record = interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        psft.finetune(RECORDS, load_hf=model, save=folder / "second", **settings)
    assert not dist.is_initialized()
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        RunLog.record = record
    second = psft.finetune(RECORDS, load_hf=model, save=folder / "second", **settings)
    assert second.export is None
    assert [line["nll"] for line in second.metrics] == [line["nll"] for line in first.metrics]
    AutoModelForCausalLM.from_pretrained(first.export)


@pytest.mark.parametrize("world_size", [1, slow(2)])
def test_calls_in_one_process_follow_each_other(pool, model, tmp_path, world_size):
    pool.run(_calls, world_size, model, tmp_path)
    (file,) = (tmp_path / "second").glob("records-*.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == RECORDS


def _call_in_which_a_rank_fails(model: Path, folder: Path) -> None:
    """The last rank fails by itself, while rank 0 of two waits, as it would for NCCL, for what does not end."""
    import torch

    from megatron_psft.distributed import failure
    from megatron_psft.train import run

    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    os.environ[FILE_VARIABLE] = str(folder / "code")
    failure._INTERVAL_SECONDS, failure._GRACE_SECONDS = 0.05, 0.5

    def fail(*_: object) -> None:
        if not is_last:
            time.sleep(600)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has no more")

    run.run = fail
    psft.finetune(RECORDS, load_hf=model, save=folder / "run", device="cpu", **SMALL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_without_memory_says_what_takes_less_and_ends_the_others(pool, model, tmp_path, world_size):
    with pytest.raises(WorkerError) as caught:
        pool.run(_call_in_which_a_rank_fails, world_size, model, tmp_path)
    text = caught.value.failures[world_size - 1]
    note = text.splitlines()[-1]
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. " in text
    assert note.startswith(f"rank {world_size - 1}: out of host memory, asked for 2.32 GiB; this process had ")
    assert "; planned were 0.0 GiB, in the " in note
    assert "; lower it by --use-distributed-optimizer, " in note
    if world_size == 2:
        assert caught.value.failures[0] == "died with exit code 4"
        assert (tmp_path / "code").read_text() == "1\n"
    else:
        assert not (tmp_path / "code").exists(), "whoever calls may go on"


def test_ranks_wait_for_each_other_as_long_as_asked(monkeypatch, tmp_path):
    waited = []

    def meet(rank: int, world_size: int, timeout_minutes: float) -> None:
        waited.append(timeout_minutes)
        raise psft.UserError("met")

    monkeypatch.setattr(rendezvous, "meet", meet)
    with pytest.raises(psft.UserError, match="met"):
        psft.finetune(RECORDS, load_hf="hf", save=tmp_path, device="cpu", distributed_timeout_minutes=2.5, **SMALL)
    assert waited == [2.5]


def _run_snippet(text: str, folder: Path) -> dict:
    os.chdir(folder)
    names: dict = {}
    exec(text, names)
    return {"metrics": names["run"].metrics, "export": names["run"].export}


def test_the_readme_snippet_runs(pool, model, tmp_path):
    (text,) = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    assert text.count(name) == 1
    (found,) = pool.run(_run_snippet, 1, text.replace(name, str(model)), tmp_path)
    assert (tmp_path / found["export"] / "config.json").is_file()
    nlls = [line["nll"] for line in found["metrics"]]
    assert nlls[-1] < nlls[0]


_SCRIPT = """
import sys
from megatron_psft import finetune

print("imported")
records = [{"prompt": "3 + 4?", "completion": str(number)} for number in range(5000)]
options = {"train_iters": 2, "save_interval": 1, "async_save": True, "data_workers": 2, "packing": False}
run = finetune(records, load_hf=sys.argv[1], save=sys.argv[2], global_batch_size=4, seq_length=64, **options)
print(run.export)
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(model, tmp_path):
    """Although processes tokenize, keep what writers answer, and write."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "-W", "ignore", tmp_path / "script.py", model, tmp_path / "run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, *others, last = done.stdout.splitlines()
    assert (first, last) == ("imported", str(tmp_path / "run" / "hf"))
    assert first not in others
