"""A short GRPO: rounds of sampling, exact rewards and training, each started from the model that the last one left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import chains
import worker
from digits import read_records, write_records
from plan import HERE, Job, Rl

from megatron_psft.rollout.rewards import group_advantages


@dataclass(frozen=True, kw_only=True)
class RlJob:
    """GRPO from one fine-tuned model."""

    start: Job
    """What made the model."""
    length: int
    """Steps after which it is taken."""
    rl: Rl


def run(job: RlJob) -> worker.Results:
    """Trains; measures per round the mean reward of its samples and their entropy, in nats per token, and after the
    last one the accuracies of greedy decoding."""
    folder = job.start.folder / f"grpo-{job.start.name}-{job.length}"
    return worker.once(folder, lambda: _rounds(job, folder))


def _rounds(job: RlJob, folder: Path) -> worker.Results:
    start, results = job.start, []
    model = start.hf(job.length)
    for number in range(job.rl.rounds):
        values, model = _round(job, number, model, folder / f"round-{number + 1}")
        results.append({"method": start.method.name, "lr": start.lr, "seed": start.seed, "round": number + 1, **values})
    results[-1] |= worker.accuracies(model, start.folder / "tokenizer", start.files, start.questions)
    return results


def _round(job: RlJob, number: int, model: Path, folder: Path) -> tuple[dict[str, float], Path]:
    """Samples from `model` and trains it once on what it sampled; returns what was measured, and the new model."""
    import compare
    import torch

    start, rl = job.start, job.rl
    records = read_records(start.files.prompts)[number * rl.prompts : (number + 1) * rl.prompts]
    torch.manual_seed(1000 * start.seed + number)
    replies = compare.generate(
        model,
        [chains.question(record) for record in records],
        tokenizer_folder=start.folder / "tokenizer",
        max_new_tokens=worker.LONGEST_REPLY["target"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=rl.samples,
    )
    groups = [replies[i : i + rl.samples] for i in range(0, len(replies), rl.samples)]
    rewards = [
        [float(chains.answer(reply) == chains.right_answer(record)) for reply in group]
        for record, group in zip(records, groups, strict=True)
    ]
    folder.mkdir()
    data = write_records(folder / "rollouts.jsonl", _samples(records, groups, rewards))
    command = ["--config", HERE / "grpo.yaml", "--load-hf", model, "--tokenizer", start.folder / "tokenizer"]
    command += ["--data", data, "--data-cache-dir", folder / "cache", "--seed", start.seed]
    worker.train([str(flag) for flag in [*command, "--save", folder, "--export-hf", folder / "hf"]])
    worker.remove_checkpoints(folder)
    # Before the first update the policy is the one that sampled.
    entropy = compare.metrics(folder)["entropy"][0]
    return {"reward": mean(map(mean, rewards)), "entropy": entropy}, folder / "hf"


def _samples(
    records: Sequence[chains.Record], groups: Sequence[Sequence[str]], rewards: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Records with the advantage of each reply within its group. Empty replies have no label to train on."""
    return [
        {"messages": [record["messages"][0], {"role": "assistant", "content": reply}], "advantage": advantage}
        for record, group, values in zip(records, groups, rewards, strict=True)
        for reply, advantage in zip(group, group_advantages(values, "grpo"), strict=True)
        if reply.strip()
    ]
