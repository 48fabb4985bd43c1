"""Does it help? Fine-tunes a real model by several methods, each at several learning rates, and draws what each has
learned against how far it has gone from the model it began with.

    python examples/evidence/run.py                              # SmolLM2-135M-Instruct on support tickets
    python examples/evidence/run.py --data near=tickets.jsonl far=long_thoughts.jsonl --held-out 16
    python examples/evidence/run.py --size gpu --model Qwen/Qwen2.5-0.5B-Instruct --data far=long_thoughts.jsonl

A set of `--data` is a file of JSON Lines, whose last records are held out. Every run leaves a file in `<out>/results`,
with what was measured at each evaluation; the same command leaves out what is there, so that it goes on after Ctrl-C.
`<out>/report.md`, its pictures and `<out>/results.jsonl`, which has all results in one file, are written anew after
every run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent

# The scripts of these folders are no packages; the trainer is imported from the repository's root.
sys.path[:0] = [str(HERE), str(EXAMPLES / "demo"), str(EXAMPLES / "smollm2"), str(REPOSITORY)]

import fetch  # noqa: E402
import general  # noqa: E402
import tickets  # noqa: E402

from megatron_psft.atomic import replace_file  # noqa: E402
from megatron_psft.errors import counted  # noqa: E402


@dataclass(frozen=True)
class Size:
    """How much of everything; a run has `steps` of `records` records, and is evaluated `evaluations` times."""

    steps: int
    records: int
    seq_length: int
    evaluations: int
    lrs: Sequence[str]
    drift_tokens: int


SIZES = {
    "tiny": Size(steps=2, records=2, seq_length=512, evaluations=1, drift_tokens=8, lrs=("1e-4",)),
    "cpu": Size(
        steps=32, records=4, seq_length=512, evaluations=4, drift_tokens=32, lrs=("1e-5", "3e-5", "1e-4", "3e-4")
    ),
    "gpu": Size(
        steps=128, records=32, seq_length=4096, evaluations=8, drift_tokens=256, lrs=("3e-6", "1e-5", "3e-5", "1e-4")
    ),
}
TICKETS = "tickets="
"""The set that the demo draws; its fields can be checked, so that its runs have a target score too."""
ADAPTERS = ("--lora-rank", "16", "--lora-alpha", "32", "--lora-merge")
METHODS: dict[str, Sequence[str]] = {
    "SFT": ("--objective", "sft"),
    "SFT-KL": ("--objective", "sft-kl"),
    "DFT": ("--objective", "dft"),
    "PSFT, k = 4": ("--old-policy-interval", "4"),
    "PSFT, k = 8": ("--old-policy-interval", "8"),
    "PSFT, fixed": ("--old-policy-interval", "fixed"),
    "warm-up, then PSFT, k = 4": ("--old-policy-interval", "4", "--sft-warmup-iters", "WARMUP"),
    "warm-up, then PSFT, fixed": ("--old-policy-interval", "fixed", "--sft-warmup-iters", "WARMUP"),
    "SFT, LoRA": ("--objective", "sft", *ADAPTERS),
    "PSFT, k = 4, LoRA": ("--old-policy-interval", "4", *ADAPTERS),
}
"""Flags of each; WARMUP is a quarter of the steps."""
MEASURED = ("valid_nll/target", "valid_entropy/target", "drift/general", "drift_stderr/general")
"""At each evaluation; of the steps before it the mean clip fraction goes with them."""


@dataclass(frozen=True)
class Job:
    """A run of the trainer."""

    data: str
    method: str
    lr: str
    seed: int

    @property
    def name(self) -> str:
        method = "".join(letter if letter.isalnum() else "-" for letter in self.method.lower())
        return f"{self.data}_{method}_{self.lr}_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    out: Path
    model: str
    size: Size
    jobs: Sequence[Job]
    sets: dict[str, str]
    num_held_out: int

    def result(self, job: Job) -> Path:
        return self.out / "results" / f"{job.name}.json"


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(min(len(os.sched_getaffinity(0)), 16)))
    sets = dict(pair.split("=", 1) for pair in options.data)
    methods = [method for method in METHODS if not options.methods or method in options.methods]
    size = SIZES[options.size]
    jobs = [
        Job(data, method, lr, seed)
        for seed in options.seeds for data in sets for lr in options.lrs or size.lrs for method in methods
    ]  # fmt: skip
    plan = Plan(Path(options.out), options.model or str(fetch.smollm2()), size, jobs, sets, options.held_out)
    try:
        write_data(plan)
        for job in waiting(plan):
            perform(plan, job)
            write_report(plan)
    except KeyboardInterrupt:
        print("ended by Ctrl-C: the same command goes on from the runs that are finished", file=sys.stderr)
        return 130
    print(write_report(plan))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR|ID", help="SmolLM2-135M-Instruct if unset")
    parser.add_argument("--data", nargs="+", metavar="NAME=PATH", default=[TICKETS], help=f"{TICKETS} is the demo's")
    parser.add_argument("--held-out", type=int, default=16, help="last records of each set, not trained on")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="all if unset")
    parser.add_argument("--lrs", nargs="+", metavar="LR", help="those of the size if unset")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--out", default=str(REPOSITORY / "runs" / "evidence"))
    return parser.parse_args(argv)


def write_data(plan: Plan) -> None:
    """Cuts each set into what is trained on and what is held out, and has the model answer the general requests."""
    folder, num_held_out = plan.out / "data", plan.num_held_out
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in plan.sets.items():
        count = plan.size.steps * plan.size.records + num_held_out
        drawn = (json.dumps(record) for record in tickets.records(count, seed=0))
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path else list(drawn)
        if len(lines) <= num_held_out:
            sys.exit(f"error: {path} must have more than the {counted(num_held_out, 'record')} that are held out")
        for part, kept in (("train", lines[:-num_held_out]), ("held_out", lines[-num_held_out:])):
            (folder / f"{name}_{part}.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    prompts, answers = folder / "general.jsonl", folder / "own_answers.jsonl"
    requests = (json.dumps({"prompt": request.prompt}) for request in general.REQUESTS)
    prompts.write_text("".join(f"{line}\n" for line in requests), encoding="utf-8")
    if not answers.exists():
        call("rollout", "--drift-set", "--model", plan.model, "--prompts", prompts, "--out", answers,
             "--num-samples", 1, "--max-new-tokens", plan.size.drift_tokens)  # fmt: skip


def held_out_tickets(plan: Plan, name: str) -> list[dict[str, str]]:
    """Of a set that the demo draws; of others no answer can be checked."""
    path = plan.out / "data" / f"{name}_held_out.jsonl"
    lines = [] if plan.sets[name] else path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def score_base(plan: Plan) -> dict[str, dict[str, float]]:
    """What the initial model can do, by set; asked once."""
    path = plan.out / "base.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in plan.sets:
        if name not in found:
            from score import scores  # late, as it takes seconds to import

            found[name] = scores(plan.model, held_out_tickets(plan, name))
            replace_file(path, json.dumps(found, indent=1))
    return found


def waiting(plan: Plan) -> Iterator[Job]:
    """Those jobs that have no result, with a line on how far all are."""
    todo = [job for job in plan.jobs if not plan.result(job).exists()]
    started = time.monotonic()
    for done, job in enumerate(todo):
        each = (time.monotonic() - started) / max(done, 1)
        left = f", about {each * (len(todo) - done) / 60:.0f} minutes left" if done else ""
        print(
            f"\n{len(plan.jobs) - len(todo) + done} of {counted(len(plan.jobs), 'run')} done{left}; {job.name}",
            flush=True,
        )
        yield job


def perform(plan: Plan, job: Job) -> None:
    """Trains, asks the model, and keeps what was measured; weights and checkpoints go."""
    from score import scores  # late, as it takes seconds to import

    data, run, size = plan.out / "data", plan.out / "runs" / job.name, plan.size
    flags = [str(size.steps // 4) if flag == "WARMUP" else flag for flag in METHODS[job.method]]
    call(
        "train", "--load-hf", plan.model, "--data", data / f"{job.data}_train.jsonl", "--save", run, "--seed", job.seed,
        "--valid-data", f"target={data / f'{job.data}_held_out.jsonl'}",
        "--drift-data", f"general={data / 'own_answers.jsonl'}", "--eval-interval", size.steps // size.evaluations,
        "--train-iters", size.steps, "--global-batch-size", size.records, "--global-batch-unit", "records",
        "--seq-length", size.seq_length, "--overlong", "truncate", "--lr", job.lr, "--lr-decay-style", "constant",
        "--lr-warmup-iters", size.steps // 8, "--weight-decay", 0, "--keep-last", 1,
        "--log-interval", size.steps, "--export-hf", run / "hf", *flags,
    )  # fmt: skip
    said = scores(run / "hf", held_out_tickets(plan, job.data))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plan.result(job).parent.mkdir(exist_ok=True)
    replace_file(plan.result(job), json.dumps({**asdict(job), **said, "points": points(lines)}, indent=1))
    for weights in (*run.glob("step_*"), run / "hf"):
        shutil.rmtree(weights)


def points(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """What each evaluation has measured, the one before the first step too."""
    found, clipped = [], []
    for line in lines:
        clipped += [line["clip_fraction"]] if "clip_fraction" in line else []
        if MEASURED[0] in line:
            mean = {"clip_fraction": sum(clipped) / len(clipped)} if clipped else {}
            found.append({"step": line["step"], **{name: line[name] for name in MEASURED if name in line}, **mean})
            clipped = []
    return found


def write_report(plan: Plan) -> Path:
    import frontier  # late, as it takes seconds to import

    results = [json.loads(plan.result(job).read_text()) for job in plan.jobs if plan.result(job).exists()]
    base = score_base(plan)
    lines = [json.dumps(line) for line in ({"base": base}, *results)]
    replace_file(plan.out / "results.jsonl", "".join(f"{line}\n" for line in lines))
    return frontier.write(results, base, plan.out)


def call(command: str, *words: Any) -> None:
    """A command of `psft`; ends this one where it fails."""
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_psft", command, *map(str, words)], cwd=REPOSITORY
    ) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted, too, and ends in good order
            raise
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
