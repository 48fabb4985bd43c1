"""Tokens per second and loss curve of whole SFT steps, ours and TRL's: same model, records, labels, batch and threads.

TRL gets the records as token ids with their label mask, as our chat renderer makes them. Both pack them by best fit,
and every step trains on all packs, so that packs need not be the same for the loss curves to be. Tokens are those that
are no padding. Each trains in a process of its own; the first step warms up and does not count.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import FailedError, emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, write_model, write_problems, write_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 256,
        "num_layers": 4,
        "vocab_size": 8192,
        "records": 48,
        "seq_length": 2048,
        "steps": 5,
        "bf16": False,
    },
    "gpu": {
        "hidden_size": 2048,
        "num_layers": 24,
        "vocab_size": 151_936,
        "records": 512,
        "seq_length": 8192,
        "steps": 20,
        "bf16": True,
    },
    "tiny": {
        "hidden_size": 64,
        "num_layers": 1,
        "vocab_size": 512,
        "records": 4,
        "seq_length": 512,
        "steps": 1,
        "bf16": False,
    },
}
LR, WEIGHT_DECAY, ADAM_BETA2 = 1e-4, 0.1, 0.999


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes model, tokenizer, records and the records' tokens into the folder that `spec` names."""
    folder = Path(spec["folder"])
    sizes = {name: spec[name] for name in ("hidden_size", "num_layers", "vocab_size")}
    write_model(folder / "model", **sizes)
    write_tokenizer(folder / "tokenizer")
    write_problems(folder / "problems.jsonl", spec["records"])
    return tokenize(spec)


def tokenize(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the tokens of the folder's records; returns how many packs they make."""
    from megatron_psft.config.schema import parse_config
    from megatron_psft.train.inputs import read_inputs

    folder = Path(spec["folder"])
    argv = [*argv_of(spec), "--global-batch-size", 1]
    inputs = read_inputs(parse_config([str(value) for value in argv]), is_main=False)
    examples = [inputs.dataset[index] for index in range(len(inputs.dataset))]
    rows = [
        {"input_ids": example.tokens.tolist(), "completion_mask": [int(flag) for flag in example.label_mask]}
        for example in examples
    ]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"packs": len(inputs.plan)}


def argv_of(spec: dict[str, Any]) -> list[Any]:
    """Flags of our run, but for the size of its batch."""
    folder = Path(spec["folder"])
    argv = ["--load-hf", folder / "model", "--tokenizer", folder / "tokenizer", "--data", folder / "problems.jsonl"]
    argv += ["--save", folder / "run", "--objective", "sft", "--no-shuffle", "--lr", LR, "--lr-decay-style", "constant"]
    argv += ["--seq-length", spec["seq_length"], "--weight-decay", WEIGHT_DECAY, "--adam-beta2", ADAM_BETA2]
    return [*argv, "--train-iters", spec["steps"] + 1, "--bf16", str(spec["bf16"]).lower()]


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    from megatron_psft.train.loop import train_step

    with training_run([*argv_of(spec), "--global-batch-size", spec["packs"]]) as run:
        lines, marks = [], []
        for step in range(spec["steps"] + 1):
            lines.append(train_step(run, step))
            marks.append(now())
    return {
        **between(marks[0], marks[-1]),
        "tokens": sum(line["tokens"] for line in lines[1:]),
        "label_tokens": sum(line["label_tokens"] for line in lines[1:]),
        "losses": [line["nll"] for line in lines],
    }


def train_trl(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import TrainerCallback

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(now())

    packs = len(trl_trainer(spec, gradient_accumulation_steps=1).train_dataset)
    trainer = trl_trainer(spec, gradient_accumulation_steps=packs)
    trainer.add_callback(Clock())
    trainer.train()
    rows = read_tokens(spec)
    return {
        **between(marks[0], marks[-1]),
        "tokens": spec["steps"] * sum(len(row["input_ids"]) - 1 for row in rows),
        "label_tokens": spec["steps"] * sum(sum(row["completion_mask"][1:]) for row in rows),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "packs": packs,
    }


def now() -> tuple[float, float]:
    """Seconds of the clock, and those that this process has had a CPU."""
    return time.perf_counter(), time.process_time()


def between(first: tuple[float, float], last: tuple[float, float]) -> dict[str, float]:
    """What lies between two results of `now`."""
    return {"seconds": last[0] - first[0], "cpu_seconds": last[1] - first[1]}


def read_tokens(spec: dict[str, Any]) -> list[dict[str, list[int]]]:
    text = (Path(spec["folder"]) / "tokens.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def trl_trainer(spec: dict[str, Any], *, gradient_accumulation_steps: int, **options: Any) -> Any:
    """TRL's trainer of the same, which gets `options`, too."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = Path(spec["folder"])
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_steps=spec["steps"] + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta2=ADAM_BETA2,
        max_grad_norm=1.0,
        max_length=spec["seq_length"],
        packing=True,
        packing_strategy="bfd",
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=spec["bf16"],
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    dtype = torch.bfloat16 if spec["bf16"] else torch.float32
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype),
        args=config,
        train_dataset=Dataset.from_list(read_tokens(spec)),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        **options,
    )


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the losses of a step, relative."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    with tempfile.TemporaryDirectory() as temporary:
        spec = {**SIZES[size], "folder": temporary}
        spec |= in_fresh_process(prepare, spec)
        ours = in_fresh_process(train_ours, spec)
        details = {**SIZES[size], "packing": True, "packs": spec["packs"]}
        emit("tokens_per_second", ours["tokens"] / ours["seconds"], "tokens/s", losses=ours["losses"], **details)
        try:
            theirs = in_fresh_process(train_trl, spec)
        except FailedError as error:
            emit("tokens_per_second_over_trl", None, "ours / TRL", does_not_run=str(error), **details)
        else:
            speed = theirs["tokens"] / theirs["seconds"]
            emit("tokens_per_second_trl", speed, "tokens/s", losses=theirs["losses"], packs=theirs["packs"])
            assert (ours["tokens"], ours["label_tokens"]) == (theirs["tokens"], theirs["label_tokens"])
            gap = largest_gap(ours["losses"], theirs["losses"])
            ratio = theirs["seconds"] / ours["seconds"]
            emit("tokens_per_second_over_trl", ratio, "ours / TRL", largest_loss_gap=round(gap, 7), **details)
