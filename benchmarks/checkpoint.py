"""What a checkpoint costs a run: waiting for it, writing it in the background, checking and loading it.

Trains a small model on records of random letters and prints one JSON line per figure. One thread trains, so that on two
cores the background writer has one for itself, and the allocator keeps what is freed, both as on a machine with GPUs.
Then several ranks do so, which share the optimizer and a global batch of a record each.

    python benchmarks/checkpoint.py [--size long]

`--size gpu` trains half a billion parameters on one GPU, and prints each figure at once: few saves, and which processes
hold memory of the GPU meanwhile. `gpu-tiny` does the same with a small model, on a CPU where there is no GPU.
"""

import ctypes
import json
import logging
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from common import GIB, FailedError, emit_machine, in_fresh_process, parse_size, reporting
from processes import emit_gpu_memory, emit_open_gpus
from throughput import command_line
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import training_run
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from megatron_psft.checkpoint.find import find_checkpoint
from megatron_psft.checkpoint.folders import step_folders
from megatron_psft.checkpoint.saver import Saver
from megatron_psft.checkpoint.state import load_checkpoint
from megatron_psft.config.resume import settings_of
from megatron_psft.config.schema import parse_config
from megatron_psft.distributed.collective import on_every_rank, on_rank_zero
from megatron_psft.distributed.device import detect
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.distributed.grid import process_group
from megatron_psft.train.assemble import Run, build_run
from megatron_psft.train.inputs import read_inputs
from megatron_psft.train.loop import train_step

_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
SIZES: dict[str, dict[str, int]] = {
    # Medians are taken of the trials, as the time of a step varies by more than a save costs; `long` takes 20 minutes.
    "cpu": {"hidden_size": 512, "steps": 4, "trials": 8, "ranks": 4},
    "long": {"hidden_size": 512, "steps": 4, "trials": 60, "ranks": 4},
    "tiny": {"hidden_size": 64, "steps": 1, "trials": 2, "ranks": 2},
}
_DISTRIBUTED = ["--objective", "sft", "--use-distributed-optimizer"]
ON_GPU: dict[str, dict[str, Any]] = {
    "gpu": {"shape": "0.5B", "seq_length": 16_384, "rows": 4, "steps": 3, "flags": ["--bf16", *_DISTRIBUTED]},
    "gpu-tiny": {"shape": "cpu", "seq_length": 64, "rows": 2, "steps": 1, "flags": _DISTRIBUTED},
}
_SECONDS_ON_GPU = 52.0
_ROOM_BYTES = 32 * GIB
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def emit(name: str, value: float | None, unit: str, **details: Any) -> None:
    """Prints a figure, and of how many ranks it is."""
    common.emit(name, value, unit, ranks=int(os.environ.get("WORLD_SIZE", "1")), **details)


def main() -> None:
    name = parse_size(__doc__, (*SIZES, *ON_GPU))
    if name in ON_GPU:
        main_on_gpu(ON_GPU[name], seconds=_SECONDS_ON_GPU if name == "gpu" else None)
        return
    torch.set_num_threads(1)
    emit_machine()
    for ranks in (1, SIZES[name]["ranks"]):
        in_fresh_process(measure, SIZES[name], ranks=ranks)


def measure(size: dict[str, int]) -> None:
    """Prints all figures; on each of the ranks."""
    keep_freed_memory()
    logging.disable()
    here, ranks = detect(int(os.environ["LOCAL_RANK"])), int(os.environ["WORLD_SIZE"])
    with process_group(here, ranks), shared_folder() as folder:
        on_rank_zero(lambda: write_inputs(folder, size["hidden_size"]))
        window = 1 + 3 * size["steps"]  # one per trial, after one that warms up
        flags = f"""--load-hf {folder} --random-init --data {folder}/records.jsonl --save {folder}/run --lr 1e-4
            --train-iters {window * (1 + size["trials"])} --global-batch-size {ranks} --no-packing
            --old-policy-interval {window} {"--use-distributed-optimizer" if ranks > 1 else ""}"""
        config = parse_config(flags.split())
        run = build_run(config, on_every_rank(lambda: read_inputs(config, is_main=False)), here)
        measure_run(run, size["steps"], size["trials"])


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder of all ranks, which are on one machine."""
    with ExitStack() as stack:
        yield Path(on_rank_zero(lambda: stack.enter_context(tempfile.TemporaryDirectory())))
        dist.barrier()  # rank 0 removes it


def keep_freed_memory() -> None:
    """Has the C library keep memory for the next step.

    By default it returns much of it to the kernel, by chance of where blocks lie, and a step that gets it back may
    take 1.6 times as long: with a save and without one, and most where a virtual machine's host has to find it.
    """
    library = ctypes.CDLL(None)
    if not (library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("mallopt changed nothing")


def write_inputs(folder: Path, hidden_size: int) -> None:
    """A Qwen2-shaped config, a tokenizer of letters, and records of 64 of them."""
    shape = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": 8}
    heads = {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 64}
    other = {"model_type": "qwen2", "vocab_size": 65536, "tie_word_embeddings": True, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**shape, **heads, **other}))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["<s>", "</s>", *_LETTERS])}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=_TEMPLATE
    )
    fast.save_pretrained(folder)
    rng = random.Random(0)
    with (folder / "records.jsonl").open("w") as file:
        for _ in range(64):
            prompt, completion = ("".join(rng.choices(_LETTERS, k=32)) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def measure_run(run: Run, steps: int, count: int) -> None:
    started = time.perf_counter()
    train_step(run, 0)
    pass_seconds = time.perf_counter() - started
    stored_bytes = sum(tensor.nbytes for tensors in run.state.window.state(1).values() for tensor in tensors)
    window = run.config.objective.old_policy_interval
    for step in range(1, window):
        train_step(run, step)
    trials = _trials(run, window, steps, count)
    emit_median("step_seconds", [trial.plain / steps for trial in trials], "s")
    emit_median("save_stall_seconds", [trial.waiting for trial in trials], "s")
    emit_median("async_save_stall_seconds", [trial.stalled for trial in trials], "s")
    emit_median("async_save_stall_ratio", [trial.stalled / trial.waiting for trial in trials], "ratio")
    emit_median("async_save_extra_seconds", [trial.extra for trial in trials], "s", steps=steps)
    emit_median("async_save_extra_ratio", [trial.extra / trial.waiting for trial in trials], "ratio", steps=steps)
    newest = step_folders(Path(run.config.weights.save))[-1]
    sizes = {path: path.stat().st_size for path in newest.iterdir()}
    emit("parameters", sum(p.numel() for chunk in run.state.chunks for p in chunk.parameters()), "parameters")
    emit("checkpoint_bytes", sum(sizes.values()), "bytes")
    own = f"__{run.parallel.rank}_"  # how Megatron-Core begins the names of a rank's files
    emit_share("written", sum(size for path, size in sizes.items() if path.name.startswith(own)), run)
    emit("old_log_probs_bytes", stored_bytes, "bytes")
    emit("old_policy_pass_seconds", pass_seconds, "s")
    emit("old_weights_bytes", sum(p.numel() * 4 for chunk in run.state.chunks for p in chunk.parameters()), "bytes")
    emit_load_seconds(run, newest)


def emit_median(name: str, values: Sequence[float], unit: str, **details: int) -> None:
    """Prints a median, and where it lies with 95 % confidence: between two of the values, whatever they are
    distributed like (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2)."""
    ordered, count = sorted(values), len(values)
    outside = max(0, math.floor(count / 2 - 1.96 * math.sqrt(count) / 2))  # how many lie below a median is binomial
    interval = [round(ordered[outside], 4), round(ordered[-1 - outside], 4)]
    emit(name, statistics.median(ordered), unit, interval=interval, trials=count, **details)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Seconds that belong together, as the machine's speed drifts."""

    waiting: float
    """What a save takes that is waited for."""
    plain: float
    """Steps without a save: the mean of as many before and after those with one."""
    extra: float
    """How much longer the steps from a save in the background on take, that save included."""
    stalled: float
    """What of it training waited for."""


def _trials(run: Run, window: int, steps: int, count: int) -> list[Trial]:
    """One per window after the first."""
    waited, background = (_saver(run, in_background=in_background) for in_background in (False, True))
    waited.save(0)  # starts the helper process that all saves share
    trials = []
    for trial in tqdm(range(count), unit="trial", disable=None if run.parallel.is_main else True):
        first = window * (1 + trial)
        started = time.perf_counter()
        waited.save(3 * trial + 1)
        waiting = time.perf_counter() - started
        # Not timed: a window's first step; and a save that is waited for forks this process, which slows what follows.
        _train(run, first, 1, background, number=3 * trial + 2)
        background.finish()
        before, _ = _train(run, first + 1, steps, waited)
        beside, stalled = _train(run, first + 1 + steps, steps, background, number=3 * trial + 3)
        background.finish()
        after, _ = _train(run, first + 1 + 2 * steps, steps, waited)
        plain = (before + after) / 2
        trials.append(Trial(waiting=waiting, plain=plain, extra=beside - plain, stalled=stalled))
    emit_share("held", background._queue._tensors.nbytes, run)
    return trials


def emit_share(name: str, own_bytes: int, run: Run) -> None:
    """Prints what the rank with most of something has of it, and that over an even share."""
    found = torch.tensor(own_bytes, dtype=torch.float64)
    most, total = found.clone(), found.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    even = float(total) / run.parallel.world_size
    emit(f"{name}_bytes_per_rank", int(most), "bytes", over_even_share=round(float(most) / even, 3))


def _train(run: Run, first: int, steps: int, saver: Saver, *, number: int | None = None) -> tuple[float, float]:
    """Seconds of `steps` steps from `first` on, after a save of that number if there is one, and how many of these
    seconds training waited for the saver."""
    stalled = 0.0

    def wait_for(work: Callable[[], None]) -> None:
        nonlocal stalled
        dist.barrier()  # ranks that come late to it from what they computed do so without a save, too
        before = time.perf_counter()
        work()
        stalled += time.perf_counter() - before

    started = time.perf_counter()
    if number is not None:
        wait_for(partial(saver.save, number))
    for step in range(first, first + steps):
        train_step(run, step, before_update=partial(wait_for, saver.wait_for_copy))
        wait_for(saver.poll)
    return time.perf_counter() - started, stalled


def _saver(run: Run, *, in_background: bool) -> Saver:
    folder = Path(run.config.weights.save)
    return Saver(
        folder,
        run.state,
        run.identity,
        settings_of(run.config),
        run.loader,
        run.parallel,
        keep_last=1,
        in_background=in_background,
    )


def emit_load_seconds(run: Run, newest: Path) -> None:
    """Prints what checking and loading a checkpoint take."""
    started = time.perf_counter()
    find_checkpoint(Path(run.config.weights.save), None, run.identity, settings_of(run.config))
    checked = time.perf_counter()
    load_checkpoint(newest, run.state, run.loader, run.parallel)
    emit("check_seconds", checked - started, "s")
    emit("load_seconds", time.perf_counter() - checked, "s")


def main_on_gpu(spec: dict[str, Any], *, seconds: float | None) -> None:
    emit_machine()
    prepare_environment()  # as the command line's own process has it
    try:
        in_fresh_process(measure_on_gpu, spec, seconds=seconds)
    except FailedError as error:
        emit("save_stall_seconds", None, "s", does_not_run=str(error))


def measure_on_gpu(spec: dict[str, Any]) -> None:
    """Prints the figures of `--size gpu` as they come."""
    logging.disable()
    with tempfile.TemporaryDirectory(dir=_roomy_folder()) as name, ExitStack() as savers:
        run = savers.enter_context(training_run(command_line(spec, Path(name)), draws_on_device=True))
        # As a run has it: what the background saver starts is ready when the first checkpoint is due.
        waited, background = (savers.enter_context(_saver(run, in_background=each)) for each in (False, True))
        _SavesOnGpu(run, spec["steps"], waited, background).measure()


def _roomy_folder() -> str | None:
    """The host's memory, where it has room for some checkpoints: a disk may take all the time that there is."""
    memory = "/dev/shm"
    has_room = os.path.isdir(memory) and shutil.disk_usage(memory).free > _ROOM_BYTES
    return memory if has_room and "TMPDIR" not in os.environ else None


@dataclass
class _SavesOnGpu:
    """Saves of a run, in turn with steps."""

    run: Run
    steps: int
    """Between two saves."""
    waited: Saver
    background: Saver
    next_step: int = 0

    def measure(self) -> None:
        folder = Path(self.run.config.weights.save)
        emit("parameters", sum(p.numel() for chunk in self.run.state.chunks for p in chunk.parameters()), "parameters")
        self._train(self.waited, 1)  # warms up
        emit("step_seconds", self._train(self.waited, self.steps)[0] / self.steps, "s", when="before any save")
        for which in ("first", "later"):
            with reporting("async_save_stall_seconds", "s", which=which):
                self._save_in_background(which)
        with reporting("save_stall_seconds", "s"):
            started = time.perf_counter()
            self.waited.save(self.next_step)
            emit("save_stall_seconds", time.perf_counter() - started, "s", folder=str(folder.parent))
            emit("step_seconds", self._train(self.waited, 1)[0], "s", when="after a save that is waited for")
        with reporting("checkpoint_bytes", "bytes"):
            newest = step_folders(folder)[-1]
            emit("checkpoint_bytes", sum(path.stat().st_size for path in newest.iterdir()), "bytes")
            emit_load_seconds(self.run, newest)

    def _save_in_background(self, which: str) -> None:
        """The first save makes the memory that it is copied to, which the later ones find."""
        started = time.perf_counter()
        seconds, stalled = self._train(self.background, self.steps, number=self.next_step)
        emit("async_save_stall_seconds", stalled, "s", which=which)
        beside = f"beside the {which} async save, stall left out"
        emit("step_seconds", (seconds - stalled) / self.steps, "s", when=beside)
        if which == "first":
            emit_open_gpus()
            emit_gpu_memory()
        self.background.finish()
        emit("async_save_written_seconds", time.perf_counter() - started, "s", which=which)

    def _train(self, saver: Saver, count: int, *, number: int | None = None) -> tuple[float, float]:
        first = self.next_step
        self.next_step += count
        return _train(self.run, first, count, saver, number=number)


if __name__ == "__main__":
    main()
