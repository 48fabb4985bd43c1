"""The plan against models that are built, tensors that autograd saves, and arithmetic by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import (
    BatchConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecomputeConfig,
)
from megatron_psft.diagnostics.layouts import smallest_layout
from megatron_psft.diagnostics.plan import GIB, Plan
from megatron_psft.errors import UserError
from megatron_psft.metrics.flops import forward_flops
from tests.diagnostics.plans import CPU, EXPERTS, GPU, SHAPE, make_plan
from tests.support import tiny
from tests.support.layouts import Layout, make_config, rank_of
from tests.support.marks import slow


def _built_parameters(folder: Path, layout: Layout) -> tuple[int, int, dict]:
    with rank_of(layout) as rank:
        chunks, shape = rank.build(folder)
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        return rank.parallel.pipeline_rank, count, shape


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [
        slow("qwen2", False, Layout()),
        slow("qwen3", True, Layout(tensor=2, pipeline=2), both=True),
        slow("llama", False, Layout(tensor=2)),
        slow("qwen3", True, Layout()),
        slow("qwen2", True, Layout(pipeline=2)),
        ("qwen3_moe", False, Layout()),
    ],
)
def test_parameters_are_those_of_the_built_model(pool, tmp_path, family, tied, layout):
    folder = tiny.build_model(tmp_path / "model", family, tied=tied)
    config = replace(make_config(layout), batch=BatchConfig(train_iters=1))
    for stage, count, shape in pool.run(_built_parameters, layout.world_size, folder, layout):
        planned = Plan(config=config, shape=shape, world_size=layout.world_size, platform=CPU)
        assert planned.num_parameters(stage) == count


def test_states_take_18_bytes_of_a_bf16_parameter_and_16_of_one_in_fp32():
    plan = make_plan()
    count = plan.num_parameters(0)
    assert (plan.peak.weights, plan.peak.gradients, plan.peak.optimizer) == (2 * count, 4 * count, 12 * count)
    fp32 = make_plan(sections={"precision": PrecisionConfig()}).peak
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * count, 4 * count, 8 * count)


def test_the_distributed_optimizer_spreads_its_states_over_data_and_context_ranks():
    plan = make_plan(8, context_parallel_size=2, use_distributed_optimizer=True)
    assert plan.data_size == 4
    assert plan.peak.optimizer == 12 * plan.num_parameters(0) / 8
    assert make_plan(8, context_parallel_size=2).peak.optimizer == 12 * plan.num_parameters(0)


def test_what_is_offloaded_of_the_optimizer_is_not_on_the_device():
    for fraction in (0.25, 1.0):
        optimizer = OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=fraction)
        plan = make_plan(8, use_distributed_optimizer=True, sections={"optimizer": optimizer})
        assert plan.peak.optimizer == 12 * plan.num_parameters(0) / 8 * (1 - fraction)


def test_a_checkpoint_is_written_in_even_shares():
    """14 bytes of a bf16 parameter, its fp32 copy and two averages among them; 12 in fp32, or 16 with that copy."""
    count = make_plan().num_parameters(0)
    assert make_plan().saved_bytes == 14 * count
    assert make_plan(8, use_distributed_optimizer=True).saved_bytes == 14 * count / 8
    fp32 = {"precision": PrecisionConfig()}
    assert make_plan(8, sections=fp32).saved_bytes == 12 * count / 8
    assert make_plan(8, sections=fp32, use_distributed_optimizer=True).saved_bytes == 16 * count / 8
    split = make_plan(8, pipeline_model_parallel_size=2, use_distributed_optimizer=True)
    assert split.saved_bytes == 14 * max(split.num_parameters(0), split.num_parameters(1)) / 4


def test_activations_by_hand():
    """Per token and layer with Transformer Engine: 4 hidden states, 3 queries, 3 keys, 3 inner; and the last norm's."""
    per_layer = 4 * 1024 + 3 * 1024 + 3 * 256 + 3 * 4096
    assert make_plan().peak.activations == 4096 * 2 * (8 * per_layer + 1024)
    split = make_plan(2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.peak.activations == make_plan().peak.activations / 2
    unsplit = make_plan(2, tensor_model_parallel_size=2)
    assert unsplit.peak.activations == 4096 * 2 * (8 * (4 * 1024 + (3 * 1024 + 3 * 256 + 3 * 4096) / 2) + 1024)
    assert make_plan(2, context_parallel_size=2).peak.activations == make_plan().peak.activations / 2


def test_experts_are_split_over_their_own_ranks():
    """Of 8 ranks each has a quarter of the experts, whose states two ranks share, and all else, shared by all."""
    plan = make_plan(8, shape=EXPERTS, expert_model_parallel_size=4, use_distributed_optimizer=True)
    experts = 7 * 16 * 3 * 1024 * 512 // 4
    other = plan.num_parameters(0) - experts
    assert other == make_plan(shape=EXPERTS).num_parameters(0) - 4 * experts
    assert plan.peak.optimizer == 12 * (experts / 2 + other / 8)


def test_each_expert_keeps_the_tokens_that_are_sent_to_it():
    """Two experts a token, in place of one plain MLP: their input, two halves of the inner part, and the product."""
    plain, inner = 3 * 4096, 2 * (1024 + 3 * 512)
    difference = make_plan(shape=EXPERTS).peak.activations - make_plan().peak.activations
    assert difference == 7 * 4096 * 2 * (inner - plain)


def _saved_bytes(folder: Path, layers: int) -> tuple[float, int]:
    """What autograd saves in a forward pass besides parameters, and the planned size of a layer."""
    from benchmarks.toys import training_run

    argv = f"--load-hf {folder}/model{layers} --tokenizer {folder}/tokenizer --data {folder}/data.jsonl"
    argv += f" --save {folder}/run{layers} --data-cache-dir {folder}/cache --loss-on all --overlong truncate"
    argv += " --seq-length 128 --train-iters 2 --global-batch-size 1 --old-policy-interval 1"
    with training_run(argv.split()) as run:
        own = {parameter.untyped_storage().data_ptr() for parameter in run.pipeline.chunks[0].parameters()}
        sizes = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        from megatron_psft.train.loop import train_step

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_step(run, 0)
        plan = Plan(config=run.config, shape=run.source.shape, world_size=1, platform=CPU)
        return sum(sizes.values()), plan._layer_activations(0)


@pytest.mark.parametrize("family", ["qwen2", slow("qwen3"), slow("llama")])
def test_a_layers_activations_are_what_autograd_saves(pool, tmp_path, family):
    tiny.build_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "add one", "completion": "two " * 200}) + "\n")
    saved = {}
    for layers in (2, 4):
        tiny.build_model(tmp_path / f"model{layers}", family, num_hidden_layers=layers)
        ((saved[layers], planned),) = pool.run(_saved_bytes, 1, tmp_path, layers)
    # A few numbers per token, as norms and softmax keep, are not counted: more in models as small as this one.
    assert (saved[4] - saved[2]) / 2 == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize(
    ("parallel", "stage", "micro_batches", "chunks"),
    [
        ({"pipeline_model_parallel_size": 4}, 0, 8, 4),
        ({"pipeline_model_parallel_size": 4}, 3, 8, 1),
        ({"pipeline_model_parallel_size": 4}, 0, 2, 2),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}, 0, 8, 5),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}, 1, 8, 3),
        ({}, 0, 8, 1),
    ],
)
def test_early_stages_hold_more_micro_batches(parallel, stage, micro_batches, chunks):
    stages = parallel.get("pipeline_model_parallel_size", 1)
    plan = make_plan(
        stages, sections={"batch": BatchConfig(train_iters=1, global_batch_size=micro_batches)}, **parallel
    )
    assert plan._chunks_in_flight(stage) == chunks


def test_the_fullest_stage_is_the_peak():
    plan = make_plan(4, pipeline_model_parallel_size=4)
    assert plan.peak.total == max(plan.memory(stage).total for stage in range(4))
    assert plan.peak.stage == 0


def test_recomputation_keeps_the_inputs_of_layers():
    full = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    hidden = 4096 * 1024 * 2
    assert make_plan(sections={"recompute": full}).peak.activations == (8 + 1) * hidden
    pairs = replace(full, recompute_num_layers=2)
    assert make_plan(sections={"recompute": pairs}).peak.activations == (4 + 1) * hidden
    half = replace(full, recompute_method="block", recompute_num_layers=4)
    assert make_plan(sections={"recompute": half}).peak.activations == pytest.approx(
        4 * hidden + (make_plan().peak.activations + hidden) / 2
    )


def test_plain_layers_and_a_plain_head_take_more():
    assert make_plan(platform=replace(GPU, has_transformer_engine=False)).peak.total > make_plan().peak.total
    plain = make_plan(sections={"objective": ObjectiveConfig(fused_head=False)}).peak
    assert plain.moment == "head"
    assert plain.working > 4096 * 32768 * 4  # fp32 logits


def test_with_short_sequences_weights_make_the_peak():
    """torch's Adam has two copies of the largest parameter, here an embedding; Transformer Engine's has none."""
    embedding = 32768 * 1024
    fp32 = make_plan(platform=CPU, seq_length=16, sections={"precision": PrecisionConfig()}).peak
    assert (fp32.moment, fp32.activations, fp32.working) == ("update", 0, 2 * 4 * embedding)
    bf16 = make_plan(seq_length=16).peak
    assert (bf16.moment, bf16.working) == ("gradient of the embedding", 2 * embedding + 16 * 1024 * 2)


def test_a_larger_pass_of_the_old_policy_may_be_the_peak():
    objective = ObjectiveConfig(old_policy_micro_batch_size=8)
    full = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    sections = {"objective": objective, "recompute": full, "data": DataConfig(data=("x",), seq_length=32768)}
    assert make_plan(sections=sections).peak.moment == "old policy's pass"


@pytest.mark.parametrize(
    ("objective", "scored", "bound"),
    [
        (ObjectiveConfig(), 7, 1 + 7 / 24),
        (ObjectiveConfig(old_policy_interval=1), 0, 1.0),
        (ObjectiveConfig(objective="sft"), 0, 1.0),
        (ObjectiveConfig(old_policy_interval="fixed"), 99, 1 + 99 / 300),
    ],
)
def test_the_old_policys_pass_costs_a_third_of_the_steps_it_scores(objective, scored, bound):
    plan = make_plan(sections={"objective": objective})
    assert plan.scored_steps == scored
    assert plan.overhead_bound == pytest.approx(bound)


def test_a_fixed_policy_over_epochs_scores_steps_that_only_the_data_counts():
    objective, batch = ObjectiveConfig(old_policy_interval="fixed"), BatchConfig(epochs=1, global_batch_size=8)
    plan = make_plan(sections={"objective": objective, "batch": batch})
    assert plan.scored_steps is None
    assert plan.overhead_bound == pytest.approx(4 / 3)


def test_old_log_probs_are_four_bytes_for_each_position_of_a_rank():
    assert make_plan(2).old_log_prob_bytes == 4 * 4 * 4096
    assert make_plan(4, context_parallel_size=2).old_log_prob_bytes == 4 * 4 * 2048


def test_operations_are_three_forward_passes_over_full_sequences():
    assert make_plan().flops_per_step == 3 * forward_flops(SHAPE, [4096] * 8)
    pairs = make_plan(sections={"objective": ObjectiveConfig(objective="dpo")})
    assert pairs.flops_per_step == 2 * make_plan().flops_per_step
    assert pairs.tokens_per_sequence == 2 * 4096


def test_what_training_refuses_has_no_plan():
    with pytest.raises(UserError, match="world_size"):
        make_plan(3, tensor_model_parallel_size=2)
    with pytest.raises(UserError, match="num_query_groups"):
        make_plan(8, tensor_model_parallel_size=8)


def test_the_smallest_layout_fits_and_no_smaller_one_does():
    plan = make_plan(8, seq_length=32768)
    room = 9 * GIB
    found = smallest_layout(plan, bytes_per_rank=room, ranks_per_node=8)
    assert found.peak.total <= room
    size = found.config.parallel.model_parallel_size
    assert size > 1
    for tensor, context, stages in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]:
        if tensor * context * stages < size:
            smaller = make_plan(
                8,
                seq_length=32768,
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                context_parallel_size=context,
                pipeline_model_parallel_size=stages,
                use_distributed_optimizer=True,
            )
            assert smaller.peak.total > room


def test_tensor_parallelism_stays_within_a_node():
    plan = make_plan(8, seq_length=32768)
    found = smallest_layout(plan, bytes_per_rank=9 * GIB, ranks_per_node=1)
    assert found.config.parallel.tensor_model_parallel_size == 1
    assert found.config.parallel.model_parallel_size > 1


def test_experts_are_split_before_anything_else():
    plan = make_plan(8, shape=EXPERTS)
    whole = smallest_layout(plan, bytes_per_rank=64 * GIB, ranks_per_node=8)
    assert whole.config.parallel == replace(
        plan.config.parallel, expert_tensor_parallel_size=1, use_distributed_optimizer=True
    )
    split = smallest_layout(plan, bytes_per_rank=whole.peak.total - 1, ranks_per_node=8)
    assert split.config.parallel == replace(whole.config.parallel, expert_model_parallel_size=2)


def test_where_nothing_fits_there_is_no_layout():
    assert smallest_layout(make_plan(8), bytes_per_rank=GIB / 10, ranks_per_node=8) is None


QWEN_7B = replace(
    SHAPE,
    model_type="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    head_dim=128,
    vocab_size=152064,
    qkv_bias=True,
)


def test_adapters_alone_have_gradients_and_optimizer():
    """A 7B model at 8k tokens on one GPU of 80 GB, which it is far from without adapters."""
    plan = make_plan(shape=QWEN_7B, seq_length=8192, sections={"lora": LoraConfig(lora_rank=32)})
    thin = 28 * 32 * ((3584 + 3584) + 2 * (3584 + 512) + (3584 + 3584) + 3 * (3584 + 18944))
    full = make_plan(shape=QWEN_7B, seq_length=8192)
    peak = plan.peak
    assert plan.num_parameters(0) == full.num_parameters(0) + thin
    assert (peak.gradients, peak.optimizer) == (4 * thin, 12 * thin)
    assert peak.weights == pytest.approx(2 * 7.7e9, rel=0.01)
    assert peak.activations > full.peak.activations > 0
    assert peak.total < 75 * GIB < full.peak.total
    assert plan.saved_bytes == (2 + 12) * thin
    # A CPU makes products of the head's weight in bf16, here without a gradient, before it adds them in fp32.
    for platform, products in ((GPU, 0), (CPU, 2 * 16384 * 3584)):
        with_head, without = (replace(one, platform=platform) for one in (full, plan))
        assert with_head._head_working(1, with_gradient=True) - without._head_working(1, with_gradient=True) == products
    assert plan.flops_per_step == pytest.approx(full.flops_per_step * 2 / 3)
    assert plan.overhead_bound == 1 + 7 / 16


def test_adapters_are_cut_at_one_side():
    lora = LoraConfig(lora_rank=8, lora_targets=("q_proj", "o_proj"))
    sections = {"lora": lora}
    plan = make_plan(2, sections=sections, tensor_model_parallel_size=2)
    assert plan.num_parameters(0) - make_plan(2, tensor_model_parallel_size=2).num_parameters(0) == 8 * (
        8 * 2 * (1024 + 512)
    )
