"""Every recipe built and stepped rank by rank without its GPUs: bytes are those of the plan, and ranks agree."""

import re
from unittest import mock

import pytest

from megatron_psft.config.schema import parse_config
from tests.diagnostics.dry_run import complaints, cut, distinct_ranks, steps_of
from tests.diagnostics.dry_run_bytes import row_of, stored
from tests.support.cli import REPOSITORY
from tests.support.marks import slow
from tests.support.recipes import RECIPES, plan_of

QUICK = "qwen3-4b-base-8xh100"
PATHS = {path.stem: path for path in RECIPES}


def check_bytes(plan, steps) -> None:
    for step in steps:
        stage = step.place.pipeline_rank
        memory = plan.memory(stage)
        assert step.parameters == plan.num_parameters(stage)
        # Padding to what replicas share evenly, and rotary frequencies.
        assert step.state_bytes == pytest.approx(memory.weights + memory.gradients + memory.optimizer, rel=0.001)
        assert step.peak_bytes == pytest.approx(memory.total, rel=0.1)
        assert step.state_bytes < step.pass_peak_bytes < step.peak_bytes
    assert max(step.saved_bytes for step in steps) == pytest.approx(plan.saved_bytes, rel=0.001)
    assert max(step.peak_bytes for step in steps) == pytest.approx(plan.peak.total, rel=0.1)


@pytest.mark.parametrize("name", [name if name == QUICK else slow(name) for name in PATHS])
def test_a_recipe_takes_what_is_planned_and_its_ranks_agree(pool, name):
    plan = cut(plan_of(PATHS[name]))
    (steps,) = pool.run(steps_of, 1, plan, distinct_ranks(plan))
    check_bytes(plan, steps)
    assert row_of(plan, steps) == pytest.approx(stored()[name], rel=0.001, abs=1e-4), "write docs/dry_run.csv anew"
    assert complaints(plan, steps) == []
    groups = {call.ranks for step in steps for call in step.calls}
    assert tuple(range(plan.world_size)) in groups  # they stop together
    assert {bucket.are_experts for step in steps for bucket in step.buckets} == {False, plan.shape.experts is not None}


@pytest.mark.parametrize("name", ["psft", "sft", "sft-kl"])
def test_a_run_of_the_paper_has_the_layout_of_its_recipe(name):
    config = parse_config(["--data", "x", "--save", "x", "--config", str(REPOSITORY / f"examples/paper/{name}.yaml")])
    recipe = plan_of(PATHS["qwen2.5-7b-instruct-8xh100"]).config
    assert (config.weights.load_hf, config.parallel) == (recipe.weights.load_hf, recipe.parallel)


@pytest.mark.parametrize(
    ("name", "stages", "options"),
    [
        (QUICK, 2, {}),
        slow("qwen2.5-7b-instruct-64xh100", 4, {}),
        slow("qwen2.5-7b-instruct-64xh100", 4, {"num_layers_per_virtual_pipeline_stage": 1}),
    ],
)
def test_neighbouring_stages_send_what_the_other_receives(pool, name, stages, options):
    """No recipe has a pipeline: these are recipes with one."""
    sizes = {"pipeline_model_parallel_size": stages, **options}
    plan = cut(plan_of(PATHS[name]), micro_batches=4, **sizes)
    per_stage = plan.world_size // stages
    (steps,) = pool.run(steps_of, 1, plan, range(0, plan.world_size, per_stage))
    assert complaints(plan, steps) == []
    check_bytes(plan, steps)
    sent = [call.ranks for call in steps[0].calls if call.name == "send"]
    # An activation for each micro-batch and chunk, in the old policy's pass and in the step.
    assert sent.count((0, per_stage)) == 2 * 4 * (2 if options else 1)


def tied_gradients_stay():
    """The gradient of the output layer stays on the last stage, which has it in common with the first."""
    return mock.patch("megatron.core.distributed.finalize_model_grads._allreduce_word_embedding_grads")


def context_ranks_are_left_out():
    """Gradients are reduced over data-parallel ranks alone."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups_of = ProcessGroupCollection.setup_process_groups_for_ddp

    def groups(*args, **options):
        return {**groups_of(*args, **options), "intra_dp_cp_group": parallel_state.get_data_parallel_group()}

    return mock.patch.object(ProcessGroupCollection, "setup_process_groups_for_ddp", groups)


@pytest.mark.parametrize(
    ("sizes", "ranks", "fault", "said"),
    [
        (
            {"pipeline_model_parallel_size": 2},
            (0, 4),
            tied_gradients_stay,
            "group of 2 from 0 to 4: rank 0 makes 2 collectives and rank 4 1; they part at 0",
        ),
        (
            {"context_parallel_size": 2},
            (0,),
            context_ranks_are_left_out,
            r"rank 0: a bucket is reduced over \(0, 2, 4, 6\)",
        ),
    ],
)
def test_a_planted_fault_is_found(pool, sizes, ranks, fault, said):
    plan = cut(plan_of(PATHS[QUICK]), micro_batches=2, **sizes)
    (steps,) = pool.run(steps_of, 1, plan, ranks, fault, ranks[-1:])
    assert any(re.match(said, complaint) for complaint in complaints(plan, steps)), complaints(plan, steps)
