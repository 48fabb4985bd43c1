"""A random Qwen2, a tokenizer and word problems about as long as GSM8K's, for benchmarks of whole training steps."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

_NAMES = ("Ada", "Emmy", "Carl", "Leonhard", "Sofia", "Bernhard")
_THINGS = ("apples", "stamps", "marbles", "tickets", "pencils", "bricks")
_STEPS = ("first", "then", "after that", "at last")


def write_model(folder: Path, *, hidden_size: int, num_layers: int, vocab_size: int) -> Path:
    """Writes a random Qwen2 of usual proportions."""
    from tests.support import tiny

    return tiny.build_model(
        folder,
        "qwen2",
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        vocab_size=vocab_size,
        max_position_embeddings=4096,
    )


def write_tokenizer(folder: Path) -> Path:
    """Writes a byte-level tokenizer of 200 tokens; ids beyond are known to the model alone."""
    from tests.support import tiny

    return tiny.build_tokenizer(folder)


def write_problems(path: Path, count: int, *, seed: int = 0) -> Path:
    """Writes records of prompt and completion; the tokenizer above makes some 150 and 200 tokens of them."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps(_problem(rng)) + "\n")
    return path


def _problem(rng: random.Random) -> dict[str, str]:
    name, thing, total = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(10, 99)
    prompt, completion = [f"{name} has {total} {thing}."], []
    for step in _STEPS[: rng.randint(1, len(_STEPS))]:
        change = rng.randint(2, 99)
        prompt.append(f"{step} {name} gets {change} more.")
        completion.append(f"{step} we add {change} to {total} and so there are {total + change} {thing}.")
        total += change
    prompt.append(f"how many {thing} does {name} have?")
    return {"prompt": " ".join(prompt), "completion": " ".join([*completion, f"the answer is {total}."])}


def write_texts(path: Path, count: int, *, words: int) -> Path:
    """Writes records of about `words` tokens, half of them labels."""
    from tests.support import tiny

    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, completion = (" ".join(rng.choices(tiny.WORDS, k=words // 4)) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


@contextmanager
def training_run(argv: Sequence[Any], *, draws_on_device: bool = False) -> Iterator[Any]:
    """A run of the command line `argv`, ready to make steps, in this process alone.

    `draws_on_device` is for a run with `--random-init`: the CPU, where weights are drawn by seed, takes long for a
    billion.
    """
    from megatron_psft.config.rules import validate
    from megatron_psft.config.schema import parse_config
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.train.assemble import build_run
    from megatron_psft.train.inputs import read_inputs

    config = parse_config([str(value) for value in argv])
    validate(config, 1)
    place = detect(0)
    with process_group(place, 1):
        inputs = read_inputs(config, is_main=False)
        if draws_on_device:
            drawn = _DrawnOnDevice(inputs.source.shape, place.device)
            inputs = replace(inputs, source=replace(inputs.source, weights=drawn))
        yield build_run(config, inputs, place)


class _DrawnOnDevice:
    """Weights of usual sizes, others in each process."""

    def __init__(self, shape: Any, device: Any) -> None:
        from megatron_psft.hf.mapping import hf_tensors

        self._sizes, self._std, self._device = hf_tensors(shape), shape.initializer_range, device
        self.dtype = getattr(torch, shape.dtype)

    def read(self, piece: Any) -> torch.Tensor:
        tensor = torch.empty(self._sizes[piece.name], dtype=self.dtype, device=self._device)
        if tensor.dim() == 1:
            return tensor.fill_(0.0 if piece.name.endswith("bias") else 1.0)[piece.index]
        return tensor.normal_(std=self._std)[piece.index]


def with_objective(run: Any, name: str, *, interval: int = 1) -> Any:
    """The same run with another objective and window of the old policy, at whatever step comes next."""
    from megatron_psft.scoring.old_policy import OldPolicyWindow

    def score(step: int) -> list[Any]:
        return [stats.log_probs for stats in run.pipeline.score_labels(run.loader.micro_batches(step))]

    objective = replace(run.config.objective, objective=name, old_policy_interval=interval)
    window = OldPolicyWindow(objective, train_iters=10**6, score=score)
    config = replace(run.config, objective=objective)
    return replace(run, config=config, state=replace(run.state, window=window))
