"""Tokens per second of whole SFT steps on a real model: ours, TRL's and a plain loop over transformers, on one batch.

The model is SmolLM2-135M-Instruct, which `examples/smollm2` fetches, the records are those of `examples/demo`; ours and
TRL's train as in vs_trl.py. The plain loop pads a few records at a time to the longest. Each trains in a process of its
own; the first step warms up and does not count, and the losses of all three are compared. They part by some 1e-4 after
a step: transformers gives the embedding of the padding token, which ends this model's turns, no gradient as an input.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, emit, emit_machine, in_fresh_process, parse_size
from vs_trl import ADAM_BETA2, LR, WEIGHT_DECAY, between, largest_gap, now, read_tokens, tokenize, train_ours, train_trl

sys.path[:0] = [str(ROOT / "examples" / name) for name in ("smollm2", "demo")]

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"records": 16, "seq_length": 1024, "steps": 3, "bf16": False},
    "gpu": {"records": 512, "seq_length": 8192, "steps": 20, "bf16": True},
    "tiny": {"records": 4, "seq_length": 512, "steps": 1, "bf16": False},
}
AT_A_TIME = 4
"""Records of a forward pass of the plain loop."""


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Puts model, records and the records' tokens into the folder that `spec` names."""
    import fetch
    import tickets

    folder = Path(spec["folder"])
    for name in ("model", "tokenizer"):
        (folder / name).symlink_to(fetch.smollm2())
    lines = (json.dumps(record) + "\n" for record in tickets.records(spec["records"], seed=0))
    (folder / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    return tokenize(spec)


def train_plainly(spec: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if spec["bf16"] else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(Path(spec["folder"]) / "model", dtype=dtype).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, ADAM_BETA2))
    rows = read_tokens(spec)
    batches = [_padded(rows[start : start + AT_A_TIME], device) for start in range(0, len(rows), AT_A_TIME)]
    num_labels = sum(sum(row["completion_mask"][1:]) for row in rows)
    losses, marks = [], []
    for _ in range(spec["steps"] + 1):
        loss = 0.0
        for batch in batches:
            part = model(**batch, num_items_in_batch=num_labels).loss
            part.backward()
            loss += float(part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(now())
    tokens = spec["steps"] * sum(len(row["input_ids"]) - 1 for row in rows)
    return {**between(marks[0], marks[-1]), "tokens": tokens, "losses": losses}


def _padded(rows: list[dict[str, list[int]]], device: str) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, padding = row["input_ids"], width - len(row["input_ids"])
        labels = [token if flag else -100 for token, flag in zip(ids, row["completion_mask"], strict=True)]
        for name, values, filler in zip(columns, (ids, [1] * len(ids), labels), (0, 0, -100), strict=True):
            columns[name].append(values + [filler] * padding)
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    with tempfile.TemporaryDirectory() as temporary:
        spec = {**SIZES[size], "folder": temporary}
        spec |= in_fresh_process(prepare, spec)
        found = {
            name: in_fresh_process(function, spec)
            for name, function in (("ours", train_ours), ("transformers", train_plainly), ("trl", train_trl))
        }
    ours, details = found.pop("ours"), {**SIZES[size], "packs": spec["packs"]}
    emit("tokens_per_second", ours["tokens"] / ours["seconds"], "tokens/s", losses=ours["losses"], **details)
    for name, theirs in found.items():
        assert theirs["tokens"] == ours["tokens"]
        details |= {"largest_loss_gap": round(largest_gap(ours["losses"], theirs["losses"]), 7)}
        emit(f"tokens_per_second_over_{name}", theirs["seconds"] / ours["seconds"], f"ours / {name}", **details)
        if not torch.cuda.is_available():  # tells more where others use the machine, too
            emit(
                f"cpu_seconds_{name}_over_ours",
                theirs["cpu_seconds"] / ours["cpu_seconds"],
                f"{name} / ours",
                **details,
            )
