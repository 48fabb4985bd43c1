"""Measures the models on digits: a table, a picture and one reply."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import digits
import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_psft.report import palette

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"sft": palette.SFT, "psft": palette.PSFT}
NUM_QUESTIONS = 100


def table(folder: Path, files: digits.Files) -> str:
    """Markdown: exact answers to held-out questions, and what the training of both measured."""
    rows = [["", "base", "SFT", "PSFT"]]
    for label, held_out in (("new task, % right", files.target_held_out), ("old skills, % right", files.base_held_out)):
        rows.append([label, *(f"{accuracy(folder / name / 'hf', held_out):.0f}" for name in ("base", "sft", "psft"))])
    runs = [metrics(folder / name) for name in COLOURS]

    def add(label: str, values: list[float | None], spec: str = ".3f") -> None:
        rows.append([label, "", *("-" if value is None else format(value, spec) for value in values)])

    add("entropy, first step (nats)", [run["entropy"][0] for run in runs])
    add("entropy, mean of the last 6", [mean(run["entropy"][-6:]) for run in runs])
    add("held-out entropy, end (nats)", [run["valid_entropy"][-1] for run in runs])
    add("held-out NLL, lowest (nats)", [min(run["valid_nll"]) for run in runs])
    add("held-out NLL, end", [run["valid_nll"][-1] for run in runs])
    add("tokens clipped, mean share", [mean(run["clip_fraction"]) if "clip_fraction" in run else None for run in runs])
    add("tokens per second, mean", [mean(run["tokens_per_second"][1:]) for run in runs], ".0f")
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Rows of equal length, the first the header, as a table whose columns line up."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def metrics(run: Path) -> dict[str, list[float]]:
    """Each value of metrics.jsonl over the steps of training; evaluated ones are of other steps, under `valid_step`."""
    columns: dict[str, list[float]] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "valid_nll" in line:
            line["valid_step"] = line["step"]
        if line["step"] == 0:  # evaluated before the first one
            del line["step"]
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
    return columns


def accuracy(model_folder: Path, held_out: Path) -> float:
    """Per cent of the first questions of `held_out` whose greedy reply ends with the right number."""
    records = digits.read_records(held_out)[:NUM_QUESTIONS]
    replies = generate(model_folder, [record["messages"][0]["content"] for record in records])
    wanted = [digits.final_number(record["messages"][1]["content"]) for record in records]
    return 100 * mean(digits.final_number(reply) == number for reply, number in zip(replies, wanted, strict=True))


@torch.no_grad()
def generate(
    model_folder: Path,
    questions: Sequence[str],
    *,
    tokenizer_folder: Path | None = None,
    max_new_tokens: int = 40,
    **sampling: Any,
) -> list[str]:
    """Replies of an exported model, greedy ones unless `sampling` has other settings of transformers' `generate`.

    transformers 5 splits words as Qwen does where a tokenizer lies beside the config of a Qwen: one that splits them
    otherwise has to come from a folder of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        **{"do_sample": False, **sampling},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def one_generation(model_folder: Path, held_out: Path) -> tuple[str, str]:
    """The first held-out question and the model's reply."""
    question = digits.read_records(held_out)[0]["messages"][0]["content"]
    return question, generate(model_folder, [question])[0]


def plot(folder: Path) -> Path:
    """Draws entropy and negative log-likelihood over the steps of both runs; returns the PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour in COLOURS.items():
        run = metrics(folder / name)
        for axis, value in zip(axes, ("entropy", "nll"), strict=True):
            axis.plot(run["step"], run[value], color=colour, linewidth=1, alpha=0.9, label=f"{name.upper()}, training")
            axis.plot(
                run["valid_step"], run[f"valid_{value}"], color=colour, linestyle="--", marker="o", markersize=3,
                label=f"{name.upper()}, held out",
            )  # fmt: skip
    for axis, title in zip(axes, ("Entropy", "Negative log-likelihood of the labels"), strict=True):
        axis.set(title=title, xlabel="optimizer step", ylabel="nats per label token", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    path = folder / "entropy_and_loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
