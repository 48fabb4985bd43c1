"""What a model says of records, and what transformers says of them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.layouts import Layout, make_config, rank_of

VOCAB_SIZE = 1000  # both of two tensor-parallel ranks have labels, and the second one padded columns too
# Of four records; the padding that makes them equally long is drawn at random, as nothing may depend on it.
LENGTHS = [49, 30, 2, 17]
SEQ_LENGTH = 48


def make_records() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids without 0, the padding id, whose embedding transformers does not train; and which ones are labels."""
    generator = torch.Generator().manual_seed(1)
    records = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        is_label = torch.rand(length, generator=generator) < 0.6
        records.append((ids, is_label))
    records[3][1][:] = False  # a record without a label
    return records


def make_batches(padding_seed: int, data_rank: int, data_size: int) -> list:
    """The records of a data-parallel rank as micro-batches of two rows."""
    from megatron_psft.data.micro_batch import MicroBatch

    generator = torch.Generator().manual_seed(padding_seed)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, len(LENGTHS), SEQ_LENGTH), generator=generator)
    label_mask = torch.zeros(len(LENGTHS), SEQ_LENGTH, dtype=torch.bool)
    for row, (ids, is_label) in enumerate(make_records()):
        count = len(ids) - 1
        tokens[row, :count], labels[row, :count], label_mask[row, :count] = ids[:-1], ids[1:], is_label[1:]
    rows_per_rank = len(LENGTHS) // data_size
    first = data_rank * rows_per_rank
    return [
        MicroBatch(
            tokens=tokens[row : row + 2],
            labels=labels[row : row + 2],
            label_mask=label_mask[row : row + 2],
            position_ids=torch.arange(SEQ_LENGTH).repeat(2, 1),
            record_ids=torch.arange(2)[:, None].expand(2, SEQ_LENGTH),
            label_counts=label_mask[row : row + 2].sum(dim=1),
            num_tokens=0,
        )
        for row in range(first, first + rows_per_rank, 2)
    ]


def reference_numbers(folder: Path, family: str) -> dict:
    """What transformers computes, one record at a time: no padding, no batching."""
    model = tiny.load_model(folder, dtype=torch.float32, attn_implementation="eager")
    log_probs, entropy, loss, label_count = [], [], torch.zeros(()), 0
    for ids, is_label in make_records():
        distribution = torch.log_softmax(model(ids[None, :-1]).logits[0], dim=-1)
        label_log_probs = distribution.gather(1, ids[1:, None])[:, 0]
        loss = loss - label_log_probs[is_label[1:]].sum()
        label_count += int(is_label[1:].sum())
        log_probs.append(label_log_probs.detach())
        entropy.append(-(distribution.exp() * distribution).sum(-1).detach())
    loss.backward()
    gradients = tiny.hub_tensors({name: parameter.grad for name, parameter in model.named_parameters()}, family)
    gradients = {name: gradient / label_count for name, gradient in gradients.items()}
    return {"log_probs": log_probs, "entropy": entropy, "gradients": gradients}


def measure(layout: Layout, folders: list[Path], bf16: bool) -> list[dict]:
    """On one rank: for each model the statistics of this rank's rows, the gradient of every parameter, and its norm."""
    with rank_of(layout) as rank:
        return [measure_model(rank, folder, bf16) for folder in folders]


def measure_model(rank, folder: Path, bf16: bool) -> dict:
    from megatron_psft.config.schema import ObjectiveConfig
    from megatron_psft.hf.mapping import pieces
    from megatron_psft.model.parameters import named_parameters, shard_place
    from megatron_psft.objectives.objective import Objective
    from megatron_psft.scoring.old_policy import NoOldPolicy
    from megatron_psft.train.optimizer import build_optimizer
    from megatron_psft.train.pipeline import Pipeline

    place = rank.parallel
    chunks, shape = rank.build(folder, bf16=bf16)
    pipeline = Pipeline(chunks=chunks, parallel=place)
    # Of every position, padding too, as if all had labels.
    scores = [
        pipeline.score(
            [
                replace(batch, label_mask=torch.ones_like(batch.label_mask))
                for batch in make_batches(seed, place.data_rank, place.data_size)
            ]
        )
        for seed in (2, 3)
    ]
    optimizer = build_optimizer(make_config(rank.layout, bf16=bf16), chunks)
    pipeline.zero_grad()
    sft = Objective(config=ObjectiveConfig(objective="sft"))
    pipeline.train(make_batches(2, place.data_rank, place.data_size), NoOldPolicy(), objective=sft)
    gradients = []
    for name, parameter in named_parameters(chunks):
        tensor_rank, tensor_size = shard_place(name, place)
        shards = pieces(name, shape, tensor_rank=tensor_rank, tensor_size=tensor_size, local_rows=len(parameter))
        gradients.append((name, shards, parameter.main_grad.clone()))
    optimizer.prepare_grads()
    return {
        "data_rank": place.data_rank,
        "scores": [
            [torch.cat(column) for column in zip(*(stats[:2] for stats in score), strict=True)]
            for score in scores
            if score
        ],
        "gradients": gradients,
        "norm": optimizer.get_grad_norm(),
    }


def assert_same_statistics(results: list[dict], reference: dict) -> None:
    seen = set()
    for result in results:
        for log_probs, entropy in result["scores"]:
            for row, (own_log_probs, own_entropy) in enumerate(zip(log_probs, entropy, strict=True)):
                record = result["data_rank"] * len(log_probs) + row
                count = LENGTHS[record] - 1
                for name, found in (("log_probs", own_log_probs), ("entropy", own_entropy)):
                    torch.testing.assert_close(found[:count], reference[name][record], rtol=1e-5, atol=1e-5)
                seen.add(record)
    assert seen == set(range(len(LENGTHS)))


def assert_same_gradients(results: list[dict], reference: dict) -> None:
    """Every element of every parameter, on each rank that has it, and each counted once in the norm."""
    expected = reference["gradients"]
    seen = set()
    for result in results:
        for name, shards, gradient in result["gradients"]:
            wanted = torch.cat([expected[piece.name][piece.index] for piece in shards])
            scale = float(max(expected[piece.name].abs().max() for piece in shards))
            torch.testing.assert_close(
                gradient[: len(wanted)],
                wanted,
                rtol=1e-4,
                atol=2e-6 * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            assert not gradient[len(wanted) :].any(), f"{name}: padding has a gradient"
            seen |= {piece.name for piece in shards}
    assert seen == set(expected)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
    assert [result["norm"] for result in results] == [pytest.approx(norm, rel=1e-5)] * len(results)
