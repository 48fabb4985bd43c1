"""The model computes what transformers computes, forward and backward, however it is cut."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_psft.errors import UserError
from megatron_psft.model.gpt import check_layout, padded_vocab_size
from megatron_psft.model.shape import ModelShape
from tests.model.layouts import Layout, make_config, rank_of
from tests.support import tiny

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence=False),
    Layout(pipeline=2),
    Layout(pipeline=2, per_chunk=1),
    Layout(data=2),
    Layout(tensor=2, pipeline=2),
]
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)]
MODEL_IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in MODELS]

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
    from megatron_psft.data.loader import MicroBatch

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """Tiny checkpoints; an epsilon that is no default and large enough to be seen."""
    root = tmp_path_factory.mktemp("models")
    return {
        (family, tied): tiny.build_model(
            root / f"{family}-{tied}", family, tied=tied, rms_norm_eps=0.01, vocab_size=VOCAB_SIZE
        )
        for family, tied in MODELS
    }


@pytest.fixture(scope="module")
def references(folders) -> dict[tuple[str, bool], dict]:
    return {key: reference_numbers(folder, key[0]) for key, folder in folders.items()}


def reference_numbers(folder: Path, family: str) -> dict:
    """What transformers computes, one record at a time: no padding, no batching."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    log_probs, entropy, loss, label_count = [], [], torch.zeros(()), 0
    for ids, is_label in make_records():
        distribution = torch.log_softmax(model(ids[None, :-1]).logits[0], dim=-1)
        label_log_probs = distribution.gather(1, ids[1:, None])[:, 0]
        loss = loss - label_log_probs[is_label[1:]].sum()
        label_count += int(is_label[1:].sum())
        log_probs.append(label_log_probs.detach())
        entropy.append(-(distribution.exp() * distribution).sum(-1).detach())
    loss.backward()
    gradients = {name: parameter.grad / label_count for name, parameter in model.named_parameters()}
    return {"log_probs": log_probs, "entropy": entropy, "gradients": tiny.hub_tensors(gradients, family)}


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


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def measured(request, pool, folders) -> dict[tuple[str, bool], list[dict]]:
    """Model to the numbers of every rank."""
    layout = request.param
    by_rank = pool.run(measure, layout.world_size, layout, list(folders.values()), False)
    return {key: [results[index] for results in by_rank] for index, key in enumerate(folders)}


@pytest.mark.parametrize("key", MODELS, ids=MODEL_IDS)
def test_log_probs_and_entropy_of_all_labels_agree_with_transformers(measured, references, key):
    assert_same_statistics(measured[key], references[key])


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


@pytest.mark.parametrize("key", MODELS, ids=MODEL_IDS)
def test_padding_leaves_no_trace(measured, key):
    """The two passes differ in nothing but what stands in the padding."""
    scores = [(result["data_rank"], *result["scores"]) for result in measured[key] if result["scores"]]
    assert scores
    for data_rank, first, second in scores:
        for one, other in zip(first, second, strict=True):
            counts = [length - 1 for length in LENGTHS[data_rank * len(one) :][: len(one)]]
            for row, count in enumerate(counts):
                assert torch.equal(one[row, :count], other[row, :count])
            assert not torch.equal(one, other)


@pytest.mark.parametrize("key", MODELS, ids=MODEL_IDS)
def test_gradient_of_every_parameter_on_every_rank_is_that_of_transformers(measured, references, key):
    assert_same_gradients(measured[key], references[key])


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


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)], ids=str)
def test_bf16_stays_near_fp32(pool, folders, references, layout):
    """Forward and backward, to the few digits that bf16 has."""
    key = ("qwen3", True)
    results = [result for (result,) in pool.run(measure, layout.world_size, layout, [folders[key]], True)]
    expected = torch.cat(references[key]["log_probs"])
    for result in results:
        for log_probs, _ in result["scores"]:
            found = torch.cat([row[: length - 1] for row, length in zip(log_probs, LENGTHS, strict=True)])
            assert float((found - expected).abs().mean()) < 0.03
        for name, shards, gradient in result["gradients"]:
            wanted = torch.cat([references[key]["gradients"][piece.name][piece.index] for piece in shards])
            assert float((gradient[: len(wanted)] - wanted).norm()) <= 0.1 * float(wanted.norm()), name


TINY = ModelShape(
    model_type="qwen3",
    num_layers=12,
    hidden_size=60,
    ffn_hidden_size=24,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=5,
    vocab_size=211,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="float32",
)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=6), Layout(pipeline=4), Layout(pipeline=2, per_chunk=3), Layout(tensor=2, pipeline=12)],
    ids=str,
)
def test_layouts_that_divide_the_model_are_accepted(layout):
    assert check_layout(TINY, make_config(layout)) is None


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        (
            {"num_attention_heads": 10},
            Layout(tensor=3),
            r"num_attention_heads \(10\).*tensor_model_parallel_size \(3\)",
        ),
        ({}, Layout(tensor=4), r"num_query_groups \(6\).*tensor_model_parallel_size \(4\)"),
        ({"ffn_hidden_size": 25}, Layout(tensor=2), r"ffn_hidden_size \(25\).*tensor_model_parallel_size \(2\)"),
        ({}, Layout(pipeline=5), r"num_layers \(12\).*pipeline_model_parallel_size \(5\)"),
        ({}, Layout(pipeline=24), r"num_layers \(12\).*pipeline_model_parallel_size \(24\)"),
        ({}, Layout(pipeline=2, per_chunk=4), r"num_layers_per_virtual_pipeline_stage \(4\).*layers per stage \(6\)"),
        ({}, Layout(pipeline=2, per_chunk=6), r"num_layers_per_virtual_pipeline_stage \(6\).*layers per stage \(6\)"),
        ({}, Layout(pipeline=2, per_chunk=12), r"num_layers_per_virtual_pipeline_stage \(12\).*layers per stage"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(changes, layout, message):
    with pytest.raises(UserError, match=message):
        check_layout(replace(TINY, **changes), make_config(layout))


@settings(deadline=None)
@given(vocab_size=st.integers(1, 300_000), tensor_size=st.integers(1, 64))
def test_the_padded_vocabulary_is_the_least_that_splits_evenly(vocab_size, tensor_size):
    padded = padded_vocab_size(vocab_size, tensor_size)
    step = 1024 if tensor_size in (1, 2, 4, 8) else padded_vocab_size(1, tensor_size)
    assert padded % (128 * tensor_size) == 0
    assert padded - step < vocab_size <= padded


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(151936, 152576), (152064, 152576), (128256, 129024), (1024, 1024), (1025, 2048)]
)
def test_layouts_up_to_eight_tensor_ranks_share_one_padded_vocabulary(vocab_size, expected):
    assert [padded_vocab_size(vocab_size, tensor_size) for tensor_size in (1, 2, 4, 8)] == [expected] * 4
