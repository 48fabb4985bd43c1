"""Does what comes after start better from PSFT? A small round of GRPO and one of DPO from each of some models that
fine-tuning on the demo's tickets has left, with TRL: reward, entropy, drift, and what a model can do afterwards.

    make demo
    python examples/evidence/rl.py --models sft=runs/demo/sft/hf psft=runs/demo/psft/hf

Needs `pip install -e '.[rl]'`. GRPO's reward is 1 for a ticket that is right as a whole; DPO prefers the right ticket
to one of which a field is another ticket's. Every round leaves a file in `<out>`; the same command leaves out what is
there, so that it goes on after Ctrl-C. `<out>/results.jsonl` has them all.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
# The scripts of these folders are no packages; the rewards are those of this checkout.
sys.path[:0] = [str(EXAMPLES / name) for name in ("evidence", "demo", "smollm2")] + [str(REPOSITORY)]

import fetch  # noqa: E402
import general  # noqa: E402
import tickets  # noqa: E402

from megatron_psft.atomic import replace_file  # noqa: E402

SEED = 2  # 0 and 1 draw the tickets that the demo trains on and holds out
NUM_TICKETS = 64
ROUNDS = {
    "grpo": ("--verifier", "exact", "--num-samples", 4, "--max-new-tokens", tickets.MAX_TOKENS, "--lr", 3e-6),
    "dpo": ("--lr", 3e-6, "--seq-length", 512),
}
"""Of each training, flags of its script in examples/rl_cold_start."""
LOGGED = {"grpo": ("reward", "entropy"), "dpo": ("rewards/accuracies", "rewards/margins")}
"""Of each training, what is kept of every step."""


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    out, models = Path(options.out), dict(pair.split("=", 1) for pair in options.models)
    os.environ.setdefault("OMP_NUM_THREADS", str(min(len(os.sched_getaffinity(0)), 16)))
    results = []
    try:
        write_data(out, options.base or str(fetch.smollm2()))
        for name, folder in models.items():
            for training in ("none", *ROUNDS):
                results.append(perform(out, name, Path(folder), training, options))
                print(line(results[-1]), flush=True)
    except KeyboardInterrupt:
        print("ended by Ctrl-C: the same command goes on from the rounds that are finished", file=sys.stderr)
        return 130
    replace_file(out / "results.jsonl", "".join(f"{json.dumps(result)}\n" for result in results))
    print(out / "results.jsonl")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME=DIR", required=True, help="Hugging Face folders")
    parser.add_argument("--base", metavar="DIR|ID", help="what they were trained from; SmolLM2-135M-Instruct if unset")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each training")
    parser.add_argument("--records", type=int, default=16, help="answers, or pairs, of a step")
    parser.add_argument("--out", default=str(REPOSITORY / "runs" / "evidence-rl"))
    return parser.parse_args(argv)


def write_data(out: Path, base: str) -> None:
    """Prompts with their tickets, pairs of a right and a wrong one, and the base's own answers to general requests."""
    out.mkdir(parents=True, exist_ok=True)
    records = tickets.records(NUM_TICKETS, seed=SEED)
    prompts = [{"prompt": record["prompt"], "answer": record["completion"]} for record in records]
    others = [*records[1:], records[0]]
    rng = random.Random(SEED)
    pairs = [
        {"prompt": record["prompt"], "chosen": record["completion"], "rejected": with_a_wrong_field(record, other, rng)}
        for record, other in zip(records, others, strict=True)
    ]
    asked = [{"prompt": request.prompt} for request in general.REQUESTS]
    for name, rows in (("prompts", prompts), ("pairs", pairs), ("general", asked)):
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    if not (out / "own_answers.jsonl").exists():
        call("-m", "megatron_psft", "rollout", "--drift-set", "--model", base, "--prompts", out / "general.jsonl",
             "--out", out / "own_answers.jsonl", "--num-samples", 1, "--max-new-tokens", 32)  # fmt: skip


def with_a_wrong_field(record: tickets.Record, other: tickets.Record, rng: random.Random) -> str:
    """A record's ticket with one of the fields in which the other's differs."""
    right, wrong = json.loads(record["completion"]), json.loads(other["completion"])
    name = rng.choice([name for name in tickets.FIELDS if right[name] != wrong[name]])
    return json.dumps({**right, name: wrong[name]})


def perform(out: Path, name: str, model: Path, training: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, asks the model, and keeps what was found; its weights go."""
    path, trained = out / f"{name}_{training}.json", out / f"{name}_{training}"
    if path.exists():
        return json.loads(path.read_text())
    history: dict[str, list[float]] = {}
    if training != "none":
        shutil.rmtree(trained, ignore_errors=True)
        source = ("--prompts", out / "prompts.jsonl") if training == "grpo" else ("--pairs", out / "pairs.jsonl")
        call(EXAMPLES / "rl_cold_start" / f"{training}.py", "--model", model, *source, *ROUNDS[training],
             "--out", trained, "--train-iters", options.steps, "--global-batch-size", options.records,
             "--micro-batch-size", 4)  # fmt: skip
        steps = json.loads((trained / "trainer_state.json").read_text())["log_history"]
        history = {key: [step[key] for step in steps if key in step] for key in LOGGED[training]}
    from score import drift, scores  # late, as it takes seconds to import

    folder = model if training == "none" else trained
    found = {"start": name, "training": training, **scores(folder, tickets.held_out([]))}
    found |= {"drift": drift(folder, out / "own_answers.jsonl"), **history}
    replace_file(path, json.dumps(found, indent=1))
    shutil.rmtree(trained, ignore_errors=True)
    return found


def line(result: dict[str, Any]) -> str:
    """What a round has found, for the terminal."""
    values = "".join(f", {key} {result[key][0]:.3f} to {result[key][-1]:.3f}" for key in result if key in _SERIES)
    shares = f"fields {result['fields']:.2f}, kept {result['kept']:.2f}, drift {result['drift']:.3f}"
    return f"{result['start']}, then {result['training']}: {shares}{values}"


_SERIES = {key for keys in LOGGED.values() for key in keys}


def call(*words: Any) -> None:
    """A Python script or module; ends this one where it fails."""
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=REPOSITORY) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted, too
            raise
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
