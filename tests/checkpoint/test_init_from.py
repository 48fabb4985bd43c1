"""`--init-from`: a new run from the weights of another one, whatever that was trained on, for and in which layout."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_psft.checkpoint.folders import step_folder, step_folders
from megatron_psft.scoring.reference import FOLDER
from megatron_psft.scoring.values import VALUES
from tests.support import tiny
from tests.support.marks import slow
from tests.support.runs import DIST_OPT, PP2, TP2_SP, inputs, metrics_of, refuse, train

__all__ = ["inputs"]  # the fixture

# Of the new runs: another objective, other batches, another schedule.
_OTHER = """
    --objective sft --old-policy-interval 8 --sft-warmup-iters 0 --global-batch-size 2 --packing --seed 5
    --train-iters 2 --lr 5e-4 --lr-warmup-iters 0
"""
OTHER = tuple(_OTHER.split())


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A run of three steps on two ranks, with checkpoints of the last two and an fp32 export in `hf`."""
    save = tmp_path_factory.mktemp("finished") / "run"
    flags = ("--train-iters", "3", "--save-interval", "1", "--keep-last", "2", "--export-hf", str(save / "hf"))
    train(pool, 2, inputs.argv(save, *DIST_OPT, *flags))
    return save


@pytest.fixture(scope="module")
def others(inputs, tmp_path_factory):
    """The same model and other records."""
    return replace(inputs, data=tiny.write_records(tmp_path_factory.mktemp("others") / "records.jsonl", 9, seed=3))


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [slow(1, ()), (2, TP2_SP), slow(2, PP2), slow(1, ("--bf16",))],
    ids=["one", "TP2-SP", "PP2", "bf16"],
)
def test_it_starts_as_from_the_export_of_the_same_weights(pool, tmp_path, inputs, others, finished, world_size, layout):
    """To the bit, as the export is of fp32; and needs no weights of `load_hf`."""
    flags = (*OTHER, *layout)
    train(pool, world_size, others.argv(tmp_path / "expected", *flags, "--load-hf", str(finished / "hf")))
    bare = shutil.copytree(inputs.model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    argv = others.argv(tmp_path / "found", *flags, "--load-hf", str(bare), "--init-from", str(finished))
    assert f"weights from {step_folder(finished, 3)}" in train(pool, world_size, argv)
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")
    assert [line["step"] for line in metrics_of(tmp_path / "found")] == [1, 2]
    assert [path.name for path in step_folders(finished)] == ["step_0000002", "step_0000003"], "it stays as it was"


@pytest.mark.slow
def test_its_reference_is_the_model_of_these_weights_and_it_resumes_as_itself(pool, tmp_path, others, finished):
    flags = (*OTHER, "--objective", "sft-kl", "--save-interval", "1")
    train(pool, 1, others.argv(tmp_path / "expected", *flags, "--load-hf", str(finished / "hf")))
    run = tmp_path / "run"
    argv = others.argv(run, *flags, "--init-from", str(step_folder(finished, 3)))
    train(pool, 1, argv)
    expected = metrics_of(tmp_path / "expected")
    assert metrics_of(run) == expected
    assert (run / FOLDER / VALUES).read_bytes() == (tmp_path / "expected" / FOLDER / VALUES).read_bytes()
    shutil.rmtree(step_folder(run, 2))
    said = train(pool, 1, argv)
    assert f"resumed from {step_folder(run, 1)}, step 1 of 2" in said
    assert "changed since" not in said
    assert metrics_of(run) == expected
    # Where `save` holds a checkpoint it has no effect, be it another or none.
    shutil.rmtree(step_folder(run, 2))
    said = train(pool, 1, others.argv(run, *flags))
    assert (
        f"init_from: {step_folder(finished, 3)} -> unset (no effect: the weights are those of the checkpoint)" in said
    )
    assert metrics_of(run) == expected


def test_what_it_cannot_start_from_is_refused(pool, tmp_path, inputs, finished):
    other_model = tiny.build_model(tmp_path / "model", "qwen3", tied=True, rms_norm_eps=1e-3)
    new = tmp_path / "new"
    line = refuse(pool, inputs.argv(new, "--init-from", str(finished), "--load-hf", str(other_model)))
    assert "had model norm_eps (1e-05), this one has (0.001)" in line
    line = refuse(pool, inputs.argv(new, "--init-from", str(finished / "hf")))
    assert f"init_from ({finished / 'hf'}) must be a complete step folder or a run folder that holds one" in line
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    (step_folder(damaged, 3) / ".metadata").write_bytes(b"x")
    line = refuse(pool, inputs.argv(new, "--init-from", str(damaged)))
    assert f"init_from ({damaged}) must be an intact checkpoint: {step_folder(damaged, 3) / '.metadata'} has 1" in line
    assert line.endswith(f"the newest intact one is --init-from {step_folder(damaged, 2)}")
    assert not new.exists()
