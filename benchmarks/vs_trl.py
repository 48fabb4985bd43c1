"""Tokens per second and loss curve of whole SFT steps, ours and TRL's: same model, records, labels, batch and threads.

TRL gets the records as token ids with their label mask, as our chat renderer makes them. Tokens are those that are no
padding. Each trains in a process of its own; the first step warms up and does not count.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import FailedError, emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, write_model, write_problems, write_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 256,
        "num_layers": 4,
        "vocab_size": 8192,
        "rows": 16,
        "micro_batch_size": 4,
        "steps": 6,
        "bf16": False,
    },
    "gpu": {
        "hidden_size": 2048,
        "num_layers": 24,
        "vocab_size": 151_936,
        "rows": 128,
        "micro_batch_size": 16,
        "steps": 20,
        "bf16": True,
    },
}
LR = 1e-4


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes model, tokenizer, records and the records' tokens into the folder that `spec` names."""
    from megatron_psft import build
    from megatron_psft.config import parse_config

    folder = Path(spec["folder"])
    sizes = {name: spec[name] for name in ("hidden_size", "num_layers", "vocab_size")}
    write_model(folder / "model", **sizes)
    write_tokenizer(folder / "tokenizer")
    write_problems(folder / "problems.jsonl", spec["rows"] * (spec["steps"] + 1))
    inputs = build.read_inputs(parse_config([str(value) for value in _argv(spec)]), show_progress=False)
    examples = [inputs.dataset[index] for index in range(len(inputs.dataset))]
    rows = [
        {"input_ids": example.tokens.tolist(), "completion_mask": [int(flag) for flag in example.label_mask]}
        for example in examples
    ]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"records": len(rows)}


def _argv(spec: dict[str, Any]) -> list[Any]:
    folder = Path(spec["folder"])
    argv = ["--load-hf", folder / "model", "--tokenizer", folder / "tokenizer", "--data", folder / "problems.jsonl"]
    argv += ["--save", folder / "run", "--objective", "sft", "--no-shuffle", "--lr", LR, "--lr-decay-style", "constant"]
    argv += ["--global-batch-size", spec["rows"], "--micro-batch-size", spec["micro_batch_size"]]
    return [*argv, "--train-iters", spec["steps"] + 1, *(["--bf16"] if spec["bf16"] else [])]


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    from megatron_psft.trainer import train_step

    with training_run(_argv(spec)) as run:
        lines, marks = [], []
        for step in range(spec["steps"] + 1):
            lines.append(train_step(run, step))
            marks.append(time.perf_counter())
    return {
        "seconds": marks[-1] - marks[0],
        "tokens": sum(line["tokens"] for line in lines[1:]),
        "loss_tokens": sum(line["loss_tokens"] for line in lines[1:]),
        "losses": [line["nll"] for line in lines],
    }


def train_trl(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(spec["folder"])
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=spec["micro_batch_size"],
        gradient_accumulation_steps=spec["rows"] // spec["micro_batch_size"],
        max_steps=spec["steps"] + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_length=None,
        packing=False,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=spec["bf16"],
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16 if spec["bf16"] else torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    counted = rows[spec["rows"] :]
    return {
        "seconds": marks[-1] - marks[0],
        "tokens": sum(len(row["input_ids"]) - 1 for row in counted),
        "loss_tokens": sum(sum(row["completion_mask"][1:]) for row in counted),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    with tempfile.TemporaryDirectory() as temporary:
        spec = {**SIZES[size], "folder": temporary}
        in_fresh_process(prepare, spec)
        ours = in_fresh_process(train_ours, spec)
        details = {name: value for name, value in SIZES[size].items()} | {"packing": False}
        emit("tokens_per_second", ours["tokens"] / ours["seconds"], "tokens/s", losses=ours["losses"], **details)
        try:
            theirs = in_fresh_process(train_trl, spec)
        except FailedError as error:
            emit("tokens_per_second_over_trl", None, "ours / TRL", does_not_run=str(error), **details)
        else:
            emit("tokens_per_second_trl", theirs["tokens"] / theirs["seconds"], "tokens/s", losses=theirs["losses"])
            assert (ours["tokens"], ours["loss_tokens"]) == (theirs["tokens"], theirs["loss_tokens"])
            gap = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            ratio = theirs["seconds"] / ours["seconds"]
            emit("tokens_per_second_over_trl", ratio, "ours / TRL", largest_loss_gap=round(gap, 7), **details)
