"""A run that is resumed is the run that was not interrupted: to the bit in its layout, to rounding in another."""

import errno
import functools
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from safetensors.torch import load_file

from megatron_psft.checkpoint.folders import step_folder, step_folders
from tests.support import tiny
from tests.support.cli import Exit, run_cli
from tests.support.marks import slow
from tests.support.runs import (
    CP2,
    DIST_OPT,
    ONE,
    OVERLAP,
    PP2,
    TP2_SP,
    forget_steps_from,
    inputs,
    metrics_of,
    refuse,
    train,
)

__all__ = ["inputs"]  # the fixture

VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")
BF16 = ("--bf16",)
OFFLOAD = (*BF16, *DIST_OPT, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5")
PACKING = ("--packing",)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        slow(1, ONE),
        slow(2, TP2_SP),
        slow(2, DIST_OPT),
        (2, VPP),
        slow(2, (*BF16, *OVERLAP)),
        slow(2, (*CP2, *PACKING)),
        slow(2, OFFLOAD),
    ],
    ids=["one", "TP2-SP", "DP2-distopt", "PP2-VPP", "DP2-distopt-overlap-bf16", "CP2-packing", "DP2-offload"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(pool, tmp_path, inputs, world_size, layout):
    """Killed within a window, whose old log-probabilities come from weights that are gone."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (*layout, "--save-interval", "3")
    train(pool, world_size, inputs.argv(whole, *flags, "--export-hf", str(tmp_path / "whole-hf")))
    expected = metrics_of(whole)
    assert [line["step"] for line in expected] == list(range(1, 9))
    assert [line["ratio_max"] == 1 for line in expected] == [True, True, False, False, False, True, False, False]
    assert [line.get("window_step") for line in expected] == [None, 0, 1, 2, 3, 0, 1, 2]
    assert len({line["lr"] for line in expected}) > 6
    shutil.copytree(whole, resumed)
    forget_steps_from(resumed, 4)
    said = train(pool, world_size, inputs.argv(resumed, *flags, "--export-hf", str(tmp_path / "resumed-hf")))
    assert f"resumed from {resumed / 'step_0000003'}, step 3 of 8" in said
    assert metrics_of(resumed) == expected
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed-hf", "whole-hf"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [folder.name for folder in step_folders(resumed)] == ["step_0000003", "step_0000006", "step_0000008"]


@pytest.mark.slow
@pytest.mark.both
def test_a_fixed_old_policy_is_resumed_to_the_bit_and_keeps_its_number_of_steps(pool, tmp_path, inputs):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ("--old-policy-interval", "fixed", "--save-interval", "3", "--train-iters", "6")
    train(pool, 1, inputs.argv(whole, *flags))
    assert [line["ratio_max"] == 1 for line in metrics_of(whole)] == [True, True, False, False, False, False]
    shutil.copytree(whole, resumed)
    forget_steps_from(resumed, 4)
    line = refuse(pool, inputs.argv(resumed, *flags, "--train-iters", "7"))
    assert "had train_iters (6), this one has (7)" in line
    train(pool, 1, inputs.argv(resumed, *flags))
    assert metrics_of(resumed) == metrics_of(whole)


def test_the_last_update_of_every_rank_leaves_with_the_export(pool, tmp_path, inputs):
    """With overlapped gathering it reaches the other ranks only when they need it."""
    exports = []
    for name, flags in (("plain", DIST_OPT), ("overlap", OVERLAP)):
        exports.append(tmp_path / f"{name}-hf")
        train(pool, 2, inputs.argv(tmp_path / name, *flags, "--train-iters", "3", "--export-hf", str(exports[-1])))
    expected, found = (load_file(folder / "model.safetensors") for folder in exports)
    start = load_file(inputs.model / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(start[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "packing", "second"),
    [slow(ONE, ONE, PP2), slow(DIST_OPT, ONE, VPP), slow(ONE, PACKING, CP2)],
    ids=["optimizer-PP2", "distopt-PP2-VPP", "packing-CP2"],
)
def test_a_run_moves_between_layouts(pool, tmp_path, inputs, optimizer, packing, second):
    """Two steps each on TP2, PP2 or CP2, DP2 and one rank, and every change is within a window."""
    stations = [
        ("tp2", 2, TP2_SP, 2),
        ("second", 2, second, 4),
        ("dp2", 2, ("--micro-batch-size", "2"), 6),
        ("one", 1, ONE, 8),
    ]
    flags = (*optimizer, *packing, "--save-interval", "2")
    export = tmp_path / "export"
    found: list[dict[str, float]] = []
    load: tuple[str, ...] = ()
    for name, world_size, layout, stop in stations:
        said = train(pool, world_size, inputs.argv(tmp_path / name, *flags, *layout, *load, "--export-hf", str(export)))
        assert ("resumed from" in said) is (stop > 2)
        lines = metrics_of(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(stop - 1, 9) if load else range(1, 9))
        found += [line for line in lines if stop - 2 < line["step"] <= stop]
        load = ("--load", str(step_folder(tmp_path / name, stop)))
    train(pool, 1, inputs.argv(tmp_path / "whole", *packing, "--export-hf", str(tmp_path / "whole-hf")))
    expected = [
        {name: pytest.approx(value, rel=1e-5, abs=1e-7) for name, value in line.items()}
        for line in metrics_of(tmp_path / "whole")
    ]
    assert found == expected
    moved, whole = (load_file(folder / "model.safetensors") for folder in (export, tmp_path / "whole-hf"))
    for name, tensor in whole.items():
        # Adam divides by the gradient's size: where that is next to nothing, rounding moves a weight by a share of lr.
        torch.testing.assert_close(moved[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_run_may_begin_and_end_to_offload_its_optimizer(pool, tmp_path, inputs):
    """The host's Adam rounds otherwise in fp32, which seldom shows in a weight's bf16."""
    stations = [("half", 2, OFFLOAD, 2), ("plain", 2, (*BF16, *DIST_OPT), 4), ("all", 1, OFFLOAD[:-2], 8)]
    found: list[dict[str, float]] = []
    load: tuple[str, ...] = ()
    for name, world_size, flags, stop in stations:
        train(pool, world_size, inputs.argv(tmp_path / name, *flags, *load, "--save-interval", "2"))
        found += [line for line in metrics_of(tmp_path / name) if len(found) < line["step"] <= stop]
        load = ("--load", str(step_folder(tmp_path / name, stop)))
    train(pool, 2, inputs.argv(tmp_path / "whole", *BF16, *DIST_OPT))
    expected = metrics_of(tmp_path / "whole")
    assert found == [{name: pytest.approx(value, rel=1e-6) for name, value in line.items()} for line in expected]


@pytest.mark.slow
def test_experts_move_between_layouts(pool, tmp_path, inputs):
    """Spread over two ranks, cut by two, over pipeline stages, and all on one."""
    model = tiny.build_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])
    stations = [
        ("ep2", 2, ("--expert-model-parallel-size", "2"), 2),
        ("one", 1, ONE, 4),
        ("tp2", 2, TP2_SP, 6),
        ("pp2", 2, PP2, 7),
        ("ep2-again", 2, ("--expert-model-parallel-size", "2"), 8),
    ]
    flags = (*DIST_OPT, "--save-interval", "1", "--load-hf", str(model))
    found: list[dict[str, float]] = []
    load: tuple[str, ...] = ()
    for name, world_size, layout, stop in stations:
        export = tmp_path / f"{name}-hf"
        train(pool, world_size, inputs.argv(tmp_path / name, *flags, *layout, *load, "--export-hf", str(export)))
        found += [line for line in metrics_of(tmp_path / name) if len(found) < line["step"] <= stop]
        load = ("--load", str(step_folder(tmp_path / name, stop)))
    train(pool, 1, inputs.argv(tmp_path / "whole", *flags, "--export-hf", str(tmp_path / "whole-hf")))
    expected = [
        {name: pytest.approx(value, rel=1e-5, abs=1e-7) for name, value in line.items()}
        for line in metrics_of(tmp_path / "whole")
    ]
    assert found == expected
    moved, whole = (load_file(folder / "model.safetensors") for folder in (export, tmp_path / "whole-hf"))
    for name, tensor in whole.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_resumed_run_with_experts_equals_an_uninterrupted_one_to_the_bit(pool, tmp_path, inputs):
    model = tiny.build_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    flags = ("--load-hf", str(model), "--expert-model-parallel-size", "2", *OVERLAP, "--save-interval", "3")
    train(pool, 2, inputs.argv(tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    forget_steps_from(tmp_path / "resumed", 4)
    train(pool, 2, inputs.argv(tmp_path / "resumed", *flags))
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A run with checkpoints of its steps 6, 7 and 8."""
    save = tmp_path_factory.mktemp("finished") / "run"
    train(pool, 1, inputs.argv(save, "--save-interval", "1", "--keep-last", "3"))
    return save


def test_only_the_newest_checkpoints_are_kept(finished):
    folders = ["step_0000006", "step_0000007", "step_0000008"]
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "starts.jsonl",
        *folders,
    ]
    assert [path.name for path in step_folders(finished)] == folders


def test_a_save_leaves_torch_to_take_its_checksums_elsewhere(pool, tmp_path, inputs):
    assert pool.run(takes_crc32_after, 1, inputs.argv(tmp_path / "run")) == [True]


def takes_crc32_after(argv: list[str]) -> bool:
    """Whether `torch.save` does, after a run in this process."""
    assert run_cli(argv).code == 0
    return torch.serialization.get_crc32_options()


def test_a_save_copies_nothing_of_a_cpu_before_it_writes(pool, tmp_path, inputs):
    """Gated MLPs, which it divides, included."""
    assert pool.run(bytes_copied_by_plans, 1, inputs.argv(tmp_path / "run")) == [[0]]


def bytes_copied_by_plans(argv: list[str]) -> list[int]:
    """How much Megatron-Core copies while it plans each checkpoint of a run, here of one."""
    plan, clone, copied = dist_checkpointing.save, torch.Tensor.clone, []

    def counted_clone(tensor: torch.Tensor) -> torch.Tensor:
        copied[-1] += tensor.nbytes
        return clone(tensor)

    @functools.wraps(plan)  # its signature says which Megatron-Core it is of
    def counted_plan(*args, **kwargs):
        copied.append(0)
        with mock.patch.object(torch.Tensor, "clone", counted_clone):
            return plan(*args, **kwargs)

    with mock.patch.object(dist_checkpointing, "save", counted_plan):
        assert run_cli(argv).code == 0
    return copied


def _run_without_room_for_the_table(argv: list[str]) -> Exit:
    with mock.patch.object(FileSystemWriterAsync, "finish", side_effect=OSError(errno.ENOSPC, "No space left")):
        return run_cli(argv)


@pytest.mark.parametrize(
    "background", [pytest.param((), id="waiting"), pytest.param(("--async-save",), id="background")]
)
def test_a_checkpoint_whose_table_cannot_be_written_is_none(pool, tmp_path, inputs, background):
    argv = inputs.argv(tmp_path / "run", *DIST_OPT, "--save-interval", "1", *background)
    first, second = pool.run(_run_without_room_for_the_table, 2, argv)
    assert (first.code, second.code) == (4, 4)
    assert "error: save: a checkpoint could not be written ([Errno 28] No space left); those before it" in first.err
    assert "Traceback" not in first.err + second.err
    assert not list((tmp_path / "run").glob("step_*"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_has_nothing_left_to_do(pool, tmp_path, inputs, finished):
    save = shutil.copytree(finished, tmp_path / "run")
    before = contents(save)
    said = train(pool, 1, inputs.argv(save, "--lr", "5e-4"))
    assert f"resumed from {save / 'step_0000008'}, step 8 of 8" in said
    assert "WARNING: nothing to do: 8 of 8 steps are done" in said
    assert "changed since" not in said  # as nothing will be trained with it
    said = train(pool, 1, inputs.argv(save, "--export-hf", str(tmp_path / "export")))
    assert "WARNING: nothing to do but to export: 8 of 8 steps are done" in said
    assert contents(save) == before
    assert set(load_file(tmp_path / "export" / "model.safetensors")) == set(
        load_file(inputs.model / "model.safetensors")
    )


@pytest.mark.parametrize(
    "flags",
    [
        slow(("--lr", "5e-4")),
        slow(("--min-lr", "5e-4")),
        slow(("--lr-decay-style", "constant")),
        ("--train-iters", "10"),
    ],
    ids=lambda flags: flags[0][2:],
)
def test_a_resumed_run_follows_its_own_schedule(pool, tmp_path, inputs, finished, flags):
    """As the error of a diverged run advises: resume with a lower lr."""
    fresh, resumed = tmp_path / "fresh", tmp_path / "resumed"
    train(pool, 1, inputs.argv(fresh, *flags))
    train(pool, 1, inputs.argv(resumed, *flags, "--load", str(finished / "step_0000006")))
    expected = {line["step"]: line["lr"] for line in metrics_of(fresh) if line["step"] > 6}
    assert {line["step"]: line["lr"] for line in metrics_of(resumed)} == expected


@pytest.mark.parametrize(
    "flags",
    [
        ("--adam-beta1", "0.5"),
        slow(("--adam-beta2", "0.5")),
        slow(("--adam-eps", "1e-3")),
        ("--weight-decay", "0.9"),
        slow(("--clip-grad", "0.01")),
    ],
    ids=lambda flags: flags[0][2:],
)
def test_a_resumed_run_follows_its_own_optimizer(pool, tmp_path, inputs, finished, flags):
    train(pool, 1, inputs.argv(tmp_path / "run", *flags, "--load", str(finished / "step_0000006")))
    before, after = metrics_of(finished)[6:]
    found_before, found_after = metrics_of(tmp_path / "run")
    assert found_before["nll"] == before["nll"]
    assert found_after["nll"] != after["nll"]


@pytest.mark.parametrize("below", ["", "step_0000007"])
def test_load_takes_a_run_folder_or_one_of_its_steps(pool, tmp_path, inputs, finished, below):
    argv = inputs.argv(tmp_path / "new", "--load", str(finished / below))
    said = train(pool, 1, [*argv, "--train-iters", "9"])
    newest = finished / (below or "step_0000008")
    assert f"resumed from {newest}, step {int(newest.name[-7:])} of 9" in said
    # The run that is loaded stays as it is.
    assert [path.name[-1] for path in step_folders(finished)] == ["6", "7", "8"]
    assert [line["step"] for line in metrics_of(tmp_path / "new")] == list(range(int(newest.name[-7:]) + 1, 10))
    if below:  # before its update, of another schedule
        assert metrics_of(tmp_path / "new")[0]["nll"] == metrics_of(finished)[7]["nll"]


def test_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs(pool, tmp_path, inputs, finished):
    other_model = tiny.build_model(tmp_path / "model", "qwen3", tied=True, rms_norm_eps=1e-3)
    other_data = tiny.write_records(tmp_path / "other.jsonl", 10, seed=1)
    runs = {
        "training data (": [],
        "model norm_eps (1e-05), this one has (0.001)": ["--load-hf", str(other_model)],
        "global_batch_size 4, this one has global_batch_size 2;": ["--global-batch-size", "2"],
        "packing False, this one has packing True;": ["--packing"],
    }
    before = contents(finished)
    for difference, flags in runs.items():
        given = replace(inputs, data=other_data) if difference == "training data (" else inputs
        line = refuse(pool, given.argv(finished, *flags))
        assert f"error: {finished / 'step_0000008'}: the run that wrote it had {difference}" in line
        assert "use its settings, or another save folder" in line
    assert contents(finished) == before


def test_a_packed_run_keeps_its_packs(pool, tmp_path, inputs):
    train(pool, 1, inputs.argv(tmp_path, *PACKING, "--train-iters", "3"))
    line = refuse(pool, inputs.argv(tmp_path, *PACKING, "--seq-length", "300"))
    assert "had seq_length 256, this one has seq_length 300" in line
    assert "had packing True, this one has packing False" in refuse(pool, inputs.argv(tmp_path))


def test_a_checkpoint_beyond_the_last_step_is_refused(pool, inputs, finished):
    line = refuse(pool, inputs.argv(finished, "--train-iters", "7"))
    assert line == f"error: train_iters (7) must not be below the 8 steps of {finished / 'step_0000008'}; raise it"


def test_a_load_folder_without_checkpoint_is_refused(pool, tmp_path, inputs):
    for name in ("missing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        line = refuse(pool, inputs.argv(tmp_path / "run", "--load", str(tmp_path / name)))
        assert f"load ({tmp_path / name}) must be a complete step folder or a run folder that holds one" in line


@pytest.mark.parametrize("save", ["model", "model/run"])
def test_an_export_that_would_erase_the_run_is_refused(pool, tmp_path, inputs, save):
    """An export replaces its folder whole."""
    shutil.copytree(inputs.model, tmp_path / "model")
    argv = inputs.argv(tmp_path / save, "--export-hf", str(tmp_path / "model"), "--train-iters", "3")
    assert "export_hf" in refuse(pool, argv)
