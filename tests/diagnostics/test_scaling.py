"""Time told from assumed speeds, against arithmetic by hand; and the page has what the command prints."""

import json
import re
from dataclasses import replace

import pytest

from megatron_psft.cli.plan import main
from megatron_psft.config.schema import BatchConfig, RecomputeConfig
from megatron_psft.diagnostics.scaling import Scaling, Traffic
from megatron_psft.diagnostics.speeds import Speeds
from megatron_psft.errors import UserError
from tests.diagnostics.plans import EXPERTS, make_plan
from tests.support.cli import REPOSITORY
from tests.support.recipes import RECIPES, SHAPES, plan_of

ROW = 4096 * 1024 * 2  # bytes of a micro-batch's hidden states


def make_scaling(*args, gpus_per_node=8, speeds=None, **options) -> Scaling:
    return Scaling(plan=make_plan(*args, **options), speeds=speeds or Speeds(), gpus_per_node=gpus_per_node)


def sent(scaling: Scaling) -> dict[str, Traffic]:
    return {it.name: it for it in scaling.traffic}


@pytest.fixture(scope="module")
def page() -> dict[str, dict[int, dict[str, str]]]:
    """`[model][gpus]`: the lines of docs/scaling.md."""
    text = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = {}
    for model, table in re.findall(r"^### (\S+)\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found[model] = {
            int(gpus): {label: cells[at] for label, *cells in rows if cells[at]} for at, gpus in enumerate(header[1:])
        }
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_page_has_what_the_command_prints(path, page, tmp_path, capsys):
    plan = plan_of(path)
    model = plan.config.weights.load_hf
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[model]))
    flags = ["--config", str(path), "--load-hf", str(tmp_path), "--gpus", str(plan.world_size), "--explain"]
    assert main(flags) == 0
    head, printed = capsys.readouterr().out.split("not measured:\n")
    lines = dict(re.fullmatch(r"  (.+?)  +(\S.*)", line).groups() for line in printed.splitlines())
    of_page = dict(page[model.split("/")[1]][plan.world_size])
    assert f", {of_page.pop('layout')} on {plan.world_size} GPUs\n" in head
    assert of_page == lines
    peak = re.search(r"^  sum +([\d.]+)$", head, re.MULTILINE)
    assert float(peak[1]) == pytest.approx(float(lines["memory of the fullest GPU, GiB"]), abs=0.051)


def test_the_page_goes_from_1_to_512_gpus(page):
    assert {model: list(columns) for model, columns in page.items()} == {
        model.split("/")[1]: [1, 2, 4, 8, 64, 512] for model in SHAPES
    }


def test_nothing_is_sent_where_there_is_nobody():
    alone = make_scaling()
    assert alone.traffic == []
    assert alone.bubble == 0
    assert alone.step_seconds == alone.compute_seconds + alone.update_seconds


def test_tensor_parallelism_by_hand():
    """Two rounds in a layer, each with a gather and a scatter either way, and embedding and head."""
    split = make_scaling(2, tensor_model_parallel_size=2)
    once = 8 * ROW / 2  # eight micro-batches, half of each
    assert sent(split)["tensor parallelism"].forward == (8 * 4 + 2) * once
    assert sent(split)["tensor parallelism"].backward == (8 * 4 + 2) * once
    again = make_scaling(2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert sent(again)["tensor parallelism"].backward == (8 * 6 + 2) * once
    full = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    recomputed = make_scaling(2, tensor_model_parallel_size=2, sections={"recompute": full})
    assert sent(recomputed)["tensor parallelism"].backward == (8 * 8 + 2) * once


def test_experts_tokens_by_hand():
    """Seven layers of experts, two a token, to three quarters of which a token has to travel."""
    scaling = make_scaling(4, shape=EXPERTS, expert_model_parallel_size=4)
    assert sent(scaling)["experts' tokens"].forward == 2 * 7 * 2 * 2 * ROW * 3 / 4
    # A plain layer has two parts that tensor parallelism cuts, and one of experts has one.
    split = make_scaling(2, shape=EXPERTS, tensor_model_parallel_size=2, sequence_parallel=True)
    assert sent(split)["tensor parallelism"].forward == ((2 + 7) * 2 + 2) * 8 * ROW / 2
    # Both ranks have half of each expert: each token goes to the other as well.
    assert sent(split)["experts' tokens"].forward == 2 * 7 * 2 * 8 * ROW / 2


def test_keys_and_values_go_round_behind_attention():
    scaling = make_scaling(2, context_parallel_size=2)
    ring = sent(scaling)["context parallelism"]
    assert ring.forward == 8 * 8 * (2048 * 2 * 256 * 2)
    assert ring.backward == 2 * ring.forward
    slow = replace(scaling, speeds=Speeds(nvlink_gb_per_s=1.0))
    (slow_ring,) = (it for it in slow.traffic if it.name == "context parallelism")
    assert ring.waited_seconds == 0
    assert 0 < slow_ring.waited_seconds < slow_ring.seconds
    attention = 2 * 8 * 1024 * 4096**2 / (3 * 2 * 8 * 1024 * 4096**2)
    assert slow_ring.hidden_seconds / slow.compute_seconds < attention


def test_gradients_are_hidden_behind_one_micro_batch_at_most():
    count = make_plan().num_parameters(0)
    plain = make_scaling(8)
    assert sent(plain)["gradients"].backward == 2 * 4 * count * 7 / 8
    assert sent(plain)["gradients"].waited_seconds == sent(plain)["gradients"].seconds
    assert "weights" not in sent(plain)
    flags = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    batch = {"batch": BatchConfig(train_iters=1, global_batch_size=64)}
    overlapped = make_scaling(8, sections=batch, **flags)
    assert sent(overlapped)["gradients"].backward == 4 * count * 7 / 8
    assert sent(overlapped)["weights"].forward == 2 * count * 7 / 8
    assert sent(overlapped)["gradients"].hidden_seconds == pytest.approx(overlapped.compute_seconds * 2 / 3 / 8)
    # What hides the gradients of the rest does not hide those of experts a second time.
    experts = sent(make_scaling(8, shape=EXPERTS, **flags))
    shared, of_experts = experts["gradients"], experts["gradients of experts"]
    assert of_experts.hidden_seconds == pytest.approx(shared.hidden_seconds - shared.seconds)


def test_a_group_within_a_node_has_nvlink_and_a_ring_all_adapters_of_its_ranks():
    speeds = Speeds(nvlink_gb_per_s=100, infiniband_gb_per_s=10)
    links = [
        (make_scaling(8, speeds=speeds), "gradients", ("NVLink", 100e9)),
        (make_scaling(8, speeds=speeds, gpus_per_node=4), "gradients", ("InfiniBand", 40e9)),
        (make_scaling(16, speeds=speeds, tensor_model_parallel_size=4), "gradients", ("InfiniBand", 20e9)),
        (make_scaling(8, speeds=speeds, gpus_per_node=4, context_parallel_size=8), "context parallelism", None),
        (make_scaling(16, speeds=speeds, pipeline_model_parallel_size=2), "pipeline", None),
    ]
    for scaling, name, wanted in links:
        found = sent(scaling)[name]
        assert (found.link, found.bytes_per_second) == (wanted or ("InfiniBand", 10e9))


def test_a_bubble_grows_with_stages_and_shrinks_with_chunks():
    stages = make_scaling(4, pipeline_model_parallel_size=4)
    assert stages.bubble == 3 / 8
    assert stages.step_seconds > stages.compute_seconds * 11 / 8
    chunks = make_scaling(4, pipeline_model_parallel_size=4, num_layers_per_virtual_pipeline_stage=1)
    assert chunks.bubble == 3 / 16
    assert sent(chunks)["pipeline"].forward == 2 * sent(stages)["pipeline"].forward == 2 * 8 * ROW


def test_mfu_is_what_is_reached_but_for_all_that_is_no_computation():
    scaling = make_scaling(speeds=Speeds(reached_share=0.4))
    assert scaling.mfu(scaling.compute_seconds) == pytest.approx(0.4)
    assert scaling.mfu(scaling.step_seconds) < 0.4
    full = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    half = replace(full, recompute_method="block", recompute_num_layers=4)
    for recompute, more in ((full, 4 / 3), (half, 3.5 / 3)):
        again = make_scaling(speeds=scaling.speeds, sections={"recompute": recompute})
        assert again.compute_seconds == pytest.approx(more * scaling.compute_seconds)


def test_the_old_policys_pass_is_a_third_of_the_steps_it_scores():
    scaling = make_scaling()
    assert scaling.scoring_seconds == pytest.approx(7 / 8 * scaling.compute_seconds / 3)


def test_the_update_passes_over_memory():
    count = make_plan().num_parameters(0)
    assert make_scaling().update_seconds == pytest.approx((36 + 6) * count / 2.7e12)
    assert make_scaling(8, use_distributed_optimizer=True).update_seconds == pytest.approx(
        (36 / 8 + 6) * count / 2.7e12
    )


def test_saving_waits_for_storage_unless_it_is_in_the_background():
    scaling = make_scaling(8, use_distributed_optimizer=True)
    assert scaling.storage_seconds == pytest.approx(scaling.plan.saved_bytes * 8 / 2e9)
    weights = replace(scaling.plan.config.weights, async_save=True)
    background = replace(scaling, plan=replace(scaling.plan, config=replace(scaling.plan.config, weights=weights)))
    assert background.save_seconds == pytest.approx(scaling.save_seconds - scaling.storage_seconds)
    shared = replace(scaling, speeds=Speeds(shared_storage_gb_per_s=0.5))
    assert shared.restart_seconds == pytest.approx(90 + 4 * scaling.storage_seconds)


@pytest.mark.parametrize(("name", "value"), [("reached_share", 1.5), ("hbm_gb_per_s", 0.0), ("start_seconds", -1.0)])
def test_a_speed_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match=name):
        Speeds(**{name: value})
