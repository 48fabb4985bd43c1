"""The model computes what transformers computes, forward and backward, however it is cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.errors import UserError
from megatron_psft.model.gpt import check_layout, padded_vocab_size
from megatron_psft.model.shape import ModelShape
from tests.model.statistics import (
    LENGTHS,
    VOCAB_SIZE,
    assert_same_gradients,
    assert_same_statistics,
    measure,
    reference_numbers,
)
from tests.support import tiny
from tests.support.layouts import LAYOUTS, Layout, make_config
from tests.support.marks import slow

MODEL_LAYOUTS = [LAYOUTS[name] for name in ("one", "PP2-VPP1", "TP2-SP-PP2")]
MODEL_LAYOUTS += [slow(LAYOUTS[name]) for name in ("TP2-SP", "TP2", "PP2", "DP2")]
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)]
MODELS += [(family, family == "qwen3_vl") for family in (*tiny.VARIANTS, *tiny.VISION_FAMILIES)]
MODEL_IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in MODELS]


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


@pytest.fixture(scope="module", params=MODEL_LAYOUTS, ids=str)
def measured(request, pool, folders) -> dict[tuple[str, bool], list[dict]]:
    """Model to the numbers of every rank."""
    layout = request.param
    by_rank = pool.run(measure, layout.world_size, layout, list(folders.values()), False)
    return {key: [results[index] for results in by_rank] for index, key in enumerate(folders)}


@pytest.mark.parametrize("key", MODELS, ids=MODEL_IDS)
def test_log_probs_and_entropy_of_all_labels_agree_with_transformers(measured, references, key):
    assert_same_statistics(measured[key], references[key])


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


def test_a_window_is_not_cut_over_context_parallel_ranks():
    """Unless no record is longer than it."""
    shape, config = replace(TINY, sliding_window=4095), make_config(Layout(context=2))
    with pytest.raises(UserError, match=r"context_parallel_size \(2\).*seq_length \(4096\).*sliding_window \(4095\)"):
        check_layout(shape, config)
    assert check_layout(shape, make_config(Layout())) is None
    assert check_layout(replace(TINY, sliding_window=4096), config) is None


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
