"""Checks training on one node of GPUs: layouts over NCCL, fp8, host memory of a save, a resume, a killed rank.

    python examples/cluster-check/run.py --gpus 8

Prints a line per check as it ends; README.md beside this says what each should say. The exit code is 1 if any failed.
"""

import argparse
import importlib.util
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

# The scripts of these folders are no packages.
sys.path[:0] = [str(HERE), str(REPOSITORY / "examples" / "digits")]

import digits  # noqa: E402
from node import STEPS, Node, Steps  # noqa: E402

SAVED_STEP = 2
GIB = 2**30
SIZES = {
    "cuda": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12},
    "cpu": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}

LAYOUTS = {
    "TP4": "--tensor-model-parallel-size 4",
    "TP2": "--tensor-model-parallel-size 2",
    "DP": "",
    "PP2": "--pipeline-model-parallel-size 2",
    "CP2": "--context-parallel-size 2",
    "TP2-SP-PP2": "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--use-distributed-optimizer",
}
"""Flags by name; the GPUs that are left are data-parallel."""
SAVED_IN, RESUMED_IN = "--use-distributed-optimizer", "--tensor-model-parallel-size 2 --use-distributed-optimizer"
PRECISIONS = {"fp32": "--no-bf16", "bf16": "--bf16"}
RECIPES = ("tensorwise", "delayed", "blockwise")

BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 5e-2}
"""Relative difference of a step's NLL between two runs that should agree: tested for fp32 on CPUs, else guessed."""
GRADIENT_FACTOR = 10
"""The same for the norm of its gradient, in which fewer errors cancel."""
MEMORY_SLACK_GIB = 0.5
"""Per rank, for what a save takes beside its copy: libraries of the process that writes."""
END_SECONDS = 60
"""From SIGKILL of one rank to the end of all: torchrun kills the others 30 s after it has told them."""


class SkippedError(Exception):
    """A check has nothing to run on here; the text says why."""


def compare(reference: Steps, found: Steps, bound: float) -> str:
    """Says how far two runs are apart, over all steps. Raises ValueError where that is more than `bound`, relative, and
    where the reference learns so little that a wrong gradient would not show."""
    if not reference or [it["step"] for it in reference] != [it["step"] for it in found]:
        raise ValueError(f"{len(found)} steps beside {len(reference)} of the reference")
    first, last = reference[0]["nll"], reference[-1]["nll"]
    nll, gradient = (_largest_difference(reference, found, name) for name in ("nll", "grad_norm"))
    text = f"NLL {nll:.1e} (bound {bound:.0e}), grad norm {gradient:.1e} (bound {GRADIENT_FACTOR * bound:.0e}) apart"
    if not (nll <= bound and gradient <= GRADIENT_FACTOR * bound):  # NaN is out of bounds too
        raise ValueError(text)
    if len(reference) > 1 and first - last <= bound * first:
        raise ValueError(f"shows nothing: the reference's NLL goes from {first:.4f} to {last:.4f}")
    return f"{text}; NLL {first:.4f} to {last:.4f}"


def _largest_difference(reference: Steps, found: Steps, name: str) -> float:
    differences = [abs(b[name] / a[name] - 1) for a, b in zip(reference, found, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def judge_memory(grown_gib: float, planned_gib: float, ranks: int) -> str:
    """Says what a save took of host memory. Raises ValueError where that is more than planned and some slack."""
    bound = planned_gib + MEMORY_SLACK_GIB * ranks
    text = f"host memory {grown_gib:.2f} GiB more during the save, planned {planned_gib:.2f} (bound {bound:.2f})"
    if grown_gib > bound:
        raise ValueError(text)
    return text


def judge_end(seconds: float, code: int, left: str | None, device: str) -> str:
    """Says how a run ended after one of its ranks was killed; `left` is the code in PSFT_EXIT_CODE_FILE. Raises
    ValueError where docs/resume.md says otherwise."""
    text = (
        f"{seconds:.1f} s until all had ended (bound {END_SECONDS}); torchrun's code {code}, the run's {left or 'none'}"
    )
    if seconds > END_SECONDS or code == 0 or left not in ("4", *([None] if device == "cuda" else [])):
        raise ValueError(text)
    return text


def layouts(gpus: int) -> dict[str, str]:
    """Those of `LAYOUTS` that share a model among `gpus`, the first being the reference."""
    sizes = {name: math.prod(int(word) for word in flags.split() if word.isdigit()) for name, flags in LAYOUTS.items()}
    return {name: LAYOUTS[name] for name, size in sizes.items() if gpus % size == 0}


def doctor(node: Node) -> str:
    found = [line.strip() for line in node.psft("doctor").splitlines()]
    return f"{sum(line.startswith('warning:') for line in found)} warnings"


def layout(node: Node, name: str, precision: str) -> str:
    (first, flags), *_ = layouts(node.gpus).items()
    reference = node.once(f"{first}-{precision}", f"{flags} {PRECISIONS[precision]}")
    found = node.once(f"{name}-{precision}", f"{LAYOUTS[name]} {PRECISIONS[precision]}")
    return f"against {first}: {compare(reference, found, BOUNDS[precision])}"


def bf16(node: Node) -> str:
    (name, flags), *_ = layouts(node.gpus).items()
    runs = [node.once(f"{name}-{precision}", f"{flags} {PRECISIONS[precision]}") for precision in ("fp32", "bf16")]
    return f"against fp32: {compare(*runs, BOUNDS['bf16'])}"


def fp8(node: Node, recipe: str) -> str:
    if node.device == "cpu" or importlib.util.find_spec("transformer_engine") is None:
        raise SkippedError("fp8 is Transformer Engine's, which is not installed or has no GPU here")
    (name, flags), *_ = layouts(node.gpus).items()
    reference = node.once(f"{name}-bf16", f"{flags} --bf16")
    found = node.once(f"{name}-{recipe}", f"{flags} --bf16 --fp8-format hybrid --fp8-recipe {recipe}")
    return f"against bf16: {compare(reference, found, BOUNDS['fp8'])}"


def save(node: Node) -> str:
    """Host memory is the processes' proportional share (PSS), which counts what they share once."""
    flags = node.flags(SAVED_IN, PRECISIONS["fp32"], f"--train-iters {STEPS} --gpus {node.gpus} --gpu-memory-gib 1e6")
    plan = node.psft("plan", *flags)
    planned = float(re.findall(r"copied to (\S+) GiB of a node's host memory", plan)[0])
    before = peak = 0.0

    def look(process: psutil.Popen) -> None:
        nonlocal before, peak
        total = 0
        for it in process.children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                total += it.memory_full_info().pss
        if len(node.steps("save")) < SAVED_STEP - 1:
            before = total / GIB  # the last one counts: weights are read in the beginning
        else:
            peak = max(peak, total / GIB)

    node.train("save", SAVED_IN, PRECISIONS["fp32"], f"--save-interval {SAVED_STEP}", each=look)
    if not (before and peak):
        raise RuntimeError("no process's memory could be read before the save, or none during it")
    return judge_memory(peak - before, planned, node.gpus)


def resume(node: Node) -> str:
    load = f"--load {node.folder}/save/run/step_{SAVED_STEP:07}"
    found = node.train("resume", RESUMED_IN, PRECISIONS["fp32"], load)
    return f"against the run that saved: {compare(node.steps('save')[SAVED_STEP:], found, BOUNDS['fp32'])}"


def kill(node: Node) -> str:
    with node.started("kill", "--train-iters 1000000") as process:
        node.wait(process, until=lambda: len(node.steps("kill")) > SAVED_STEP)
        if process.poll() is not None:
            raise node.failure("kill", process)
        ranks = [it for it in process.children() if "pretrain_psft.py" in it.cmdline()]
        ranks[-1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        node.wait(process, until=lambda: False)
        _, alive = psutil.wait_procs(ranks, timeout=END_SECONDS)
        seconds = time.monotonic() - killed
        for rank in alive:
            rank.kill()
    return judge_end(seconds, process.returncode, node.left_code("kill"), node.device)


def checks(gpus: int) -> dict[str, Callable[[Node], str]]:
    """All of them by name, in their order."""
    found: dict[str, Callable[[Node], str]] = {"doctor": doctor}
    for precision in PRECISIONS:
        for name in list(layouts(gpus))[1:]:
            found[f"layout {name} {precision}"] = partial(layout, name=name, precision=precision)
    found["bf16"] = bf16
    found |= {f"fp8 {recipe}": partial(fp8, recipe=recipe) for recipe in RECIPES}
    return {**found, "save": save, "resume": resume, "kill": kill}


def run_checks(node: Node, chosen: Mapping[str, Callable[[Node], str]]) -> int:
    """Prints a line for each as it ends; one that fails leaves the others. Returns the exit code."""
    code = 0
    for name, check in chosen.items():
        began = time.monotonic()
        try:
            verdict, text = "ok", check(node)
        except SkippedError as error:
            verdict, text = "skip", str(error)
        except Exception as error:
            verdict, text, code = "FAIL", f"{type(error).__name__}: {error}", 1
        print(f"{verdict:<5}{name:<23}{time.monotonic() - began:6.0f} s  {text}", flush=True)
    return code


def prepare(folder: Path, device: str, model: str | None) -> list[str]:
    """Writes data, and unless there is a model, one with a tokenizer; returns the flags that name them."""
    files = digits.write_data(folder / "data", seed=0)
    if model is None:
        digits.write_tokenizer(folder / "tokenizer", files)
        digits.write_model_config(folder / "model", folder / "tokenizer", **SIZES[device], **HEADS)
    named = ["--load-hf", model] if model else ["--load-hf", f"{folder}/model", "--random-init"]
    named += [] if model else ["--tokenizer", f"{folder}/tokenizer"]
    return [*named, "--data", str(files.base)]


def empty(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Makes the folder, or removes what an earlier check has left in it; refuses one that holds anything else."""
    marker = folder / ".cluster-check"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        parser.error(f"--folder {folder} holds files of something else; name another")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one per GPU (2 or more)")
    parser.add_argument("--device", choices=list(SIZES), default="cuda", help="cpu rehearses with a tiny model")
    parser.add_argument("--load-hf", type=Path, help="Hugging Face folder to train; a small random model if unset")
    parser.add_argument("--only", default="", help="regular expression: checks with such a name, not all")
    place = REPOSITORY / "runs" / "cluster-check"
    parser.add_argument("--folder", type=Path, default=place, help="an earlier check in it is removed")
    flags = parser.parse_args(argv)
    folder = flags.folder.resolve()
    empty(parser, folder)
    inputs = prepare(folder, flags.device, str(flags.load_hf.resolve()) if flags.load_hf else None)
    node = Node(gpus=flags.gpus, device=flags.device, folder=folder, inputs=inputs)
    return run_checks(node, {name: it for name, it in checks(flags.gpus).items() if re.search(flags.only, name)})


if __name__ == "__main__":
    sys.exit(main())
