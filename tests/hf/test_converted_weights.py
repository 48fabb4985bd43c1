"""Converted weights train as their source does, in any layout; trained weights convert as their run exports them."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_psft.checkpoint.folders import step_folder
from megatron_psft.hf.conversion import outline_of
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.converting import (
    Inputs,
    assert_refused,
    assert_same_tensors,
    convert,
    converted,
    dtypes_of,
    inputs,
    tensors_of,
    train,
)
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.runs import metrics_of

__all__ = ["convert", "converted", "inputs"]  # the fixtures

TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")
DIST_OPT = ("--use-distributed-optimizer",)
BF16 = ("--bf16",)


@pytest.mark.parametrize(
    ("family", "tied", "world_size", "layout"),
    [
        ("qwen3", True, 1, ()),
        slow("qwen2", False, 2, TP2),
        slow("llama", False, 2, PP2),
        slow("qwen2", False, 2, VPP),
        slow("qwen3", True, 4, (*TP2, *PP2)),
    ],
    ids=["one", "TP2-SP", "PP2", "PP2-VPP", "TP2-PP2"],
)
def test_a_checkpoint_that_is_converted_once_trains_in_any_layout(
    pool, converted, tmp_path, inputs, family, tied, world_size, layout
):
    """To the bit as from the Hugging Face folder, of which it needs nothing any more."""
    source = tiny.build_model(tmp_path / "source", family, tied=tied)
    train(pool, world_size, inputs.argv(source, tmp_path / "expected", *layout))
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    shutil.rmtree(source)
    argv = inputs.argv(checkpoint, tmp_path / "found", "--random-init", "--load", checkpoint, *layout)
    assert f"weights from {checkpoint}" in train(pool, world_size, argv)
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")
    assert [line["step"] for line in metrics_of(tmp_path / "found")] == [1, 2, 3]


@pytest.mark.parametrize("family", [slow("qwen3_moe"), slow("mixtral")])
def test_experts_spread_over_ranks_and_come_back(pool, converted, tmp_path, inputs, family):
    source = tiny.build_model(tmp_path / "source", family)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    layout = ("--expert-model-parallel-size", "2")
    train(pool, 2, inputs.argv(source, tmp_path / "expected", *layout))
    argv = inputs.argv(source, tmp_path / "found", "--random-init", "--load", checkpoint, *layout)
    train(pool, 2, [*argv, "--export-hf", str(tmp_path / "exported")])
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")
    assert_same_tensors(
        converted("--from-megatron", tmp_path / "found", "--to-hf", tmp_path / "hf"), tmp_path / "exported"
    )


@pytest.mark.parametrize(
    ("dtype", "flags"), [slow(torch.float32, BF16), slow(torch.bfloat16, ()), slow(torch.bfloat16, BF16)]
)
def test_a_run_may_compute_in_another_precision(pool, converted, tmp_path, inputs, dtype, flags):
    source = tiny.build_model(tmp_path / "source", "qwen2", dtype=dtype)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    train(pool, 1, inputs.argv(source, tmp_path / "expected", *flags))
    train(pool, 1, inputs.argv(source, tmp_path / "found", "--random-init", "--load", checkpoint, *flags))
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")


@pytest.mark.parametrize("tensor_size", [slow(1), slow(3)])
def test_a_vocabulary_that_is_padded_otherwise_loads_too(pool, converted, tmp_path, inputs, tensor_size):
    """Three ranks split no multiple of 8 x 128 evenly."""
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "num_hidden_layers": 2}
    source = tiny.build_model(tmp_path / "source", "qwen2", **shape)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    layout = ("--tensor-model-parallel-size", str(tensor_size))
    train(pool, tensor_size, inputs.argv(source, tmp_path / "expected", *layout))
    argv = inputs.argv(source, tmp_path / "found", "--random-init", "--load", checkpoint, *layout)
    train(pool, tensor_size, argv)
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")
    back = converted("--from-megatron", tmp_path / "found", "--to-hf", tmp_path / "back", "--load-hf", source)
    assert tensors_of(back)["lm_head.weight"].shape == (tiny.VOCAB_SIZE, 96)


@pytest.mark.slow
def test_the_run_that_starts_from_it_resumes_as_itself(pool, converted, tmp_path, inputs):
    source = tiny.build_model(tmp_path / "source", "llama")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    flags = ("--save-interval", "1", "--objective", "sft-kl", "--old-policy-interval", "8")
    train(pool, 1, inputs.argv(source, tmp_path / "plain", *flags))
    argv = inputs.argv(source, tmp_path / "run", "--random-init", "--load", checkpoint, *flags)
    train(pool, 1, argv)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")
    shutil.rmtree(step_folder(tmp_path / "run", 3))
    assert f"resumed from {step_folder(tmp_path / 'run', 2)}, step 2 of 3" in train(pool, 1, argv)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("world_size", "flags", "dtype", "tied"),
    [
        (1, (), torch.float32, False),
        slow(1, (), torch.bfloat16, True),
        slow(2, (*TP2, *DIST_OPT), torch.bfloat16, True),
        slow(2, (*PP2, *BF16), torch.float32, False),
        slow(4, (*TP2, *VPP, *DIST_OPT), torch.float32, True),
    ],
    ids=["one", "bf16 files", "TP2-SP-distopt bf16 files", "PP2-bf16", "TP2-PP2-VPP-distopt"],
)
def test_a_training_checkpoint_becomes_what_the_run_exported(
    pool, convert, converted, tmp_path, inputs, world_size, flags, dtype, tied
):
    source = tiny.build_model(tmp_path / "source", "qwen3" if tied else "qwen2", tied=tied, dtype=dtype)
    run, exported = tmp_path / "run", tmp_path / "exported"
    train(pool, world_size, inputs.argv(source, run, "--export-hf", exported, "--save-interval", "2", *flags))
    found = converted("--from-megatron", run, "--to-hf", tmp_path / "found")
    assert_same_tensors(found, exported)
    assert {path.name for path in found.iterdir()} == {path.name for path in exported.iterdir()}
    for path in exported.glob("*.json"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    assert convert("--from-megatron", run, "--to-hf", exported, "--check").code == 0
    earlier = convert("--from-megatron", step_folder(run, 2), "--to-hf", exported, "--check")
    assert earlier.code == 1
    assert f"differs: {next(iter(tensors_of(exported)))}: " in earlier.out


@pytest.mark.slow
def test_the_weights_of_a_run_start_another_on_other_data(pool, converted, tmp_path, inputs):
    source = tiny.build_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    run, direct = tmp_path / "run", tmp_path / "direct"
    train(pool, 1, inputs.argv(source, run, "--export-hf", direct))
    checkpoint = converted("--from-megatron", run, "--to-megatron", tmp_path / "ckpt")
    assert sum(path.stat().st_size for path in checkpoint.glob("*.distcp")) < 0.6 * sum(
        path.stat().st_size for path in step_folder(run, 3).glob("*.distcp")
    )
    # In full precision: what trains on them starts where the run was, and not at its export, which is rounded.
    full = converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "full", "--dtype", "float32")
    assert dtypes_of(full) == {torch.float32}
    assert_same_tensors(converted("--from-megatron", checkpoint, "--to-hf", tmp_path / "twice"), direct)
    others = Inputs(tokenizer=inputs.tokenizer, data=tiny.write_records(tmp_path / "others.jsonl", 12, seed=5))
    train(pool, 1, others.argv(full, tmp_path / "expected"))
    train(pool, 1, others.argv(source, tmp_path / "found", "--load", checkpoint))
    assert metrics_of(tmp_path / "found") == metrics_of(tmp_path / "expected")


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, as it names them."""
    from megatron.core import dist_checkpointing

    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    with process_group(detect(0), 1):
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def test_the_format_is_that_of_training_checkpoints(pool, converted, tmp_path, inputs):
    """A run that learns nothing saves the same tensors under the same names."""
    source = tiny.build_model(tmp_path / "source", "qwen3")
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    train(pool, 1, inputs.argv(source, tmp_path / "run", "--lr", "0"))
    ours, theirs = (pool.run(plain_tensors, 1, folder)[0] for folder in (checkpoint, step_folder(tmp_path / "run", 3)))
    assert len(ours) > 8
    assert set(ours) == {name for name in theirs if name.startswith(("embedding.", "decoder.", "output_layer."))}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


class _Allocations(TorchDispatchMode):
    """Counts the elements of tensors that are made with memory."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.numbers += result.numel()
        return result


def _outline_on_a_machine_with_a_gpu(folder: Path) -> tuple[int, int, set[str]]:
    """Parameters of the outline, elements that were given memory meanwhile, and the devices of the former."""
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: pytest.fail("the GPU was taken")
    with _Allocations() as allocated:
        outline = outline_of(read_shape(folder))
    parameters = [entry.data for entry in outline.values()]
    return sum(p.numel() for p in parameters), allocated.numbers, {p.device.type for p in parameters}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_what_a_checkpoint_holds_is_found_without_memory_and_without_the_gpu(tmp_path, family):
    folder = tiny.build_model(tmp_path / "model", family)
    pool = Pool()  # of its own, as its workers are told lies
    try:
        ((numbers, allocated, devices),) = pool.run(_outline_on_a_machine_with_a_gpu, 1, folder)
    finally:
        pool.close()
    assert devices == {"meta"}
    assert allocated < numbers / 20


def test_a_run_that_has_lost_its_model_needs_one_named(pool, convert, converted, tmp_path, inputs):
    source = tiny.build_model(tmp_path / "source", "qwen2")
    run, exported = tmp_path / "run", tmp_path / "exported"
    train(pool, 1, inputs.argv(source, run, "--export-hf", exported))
    source.rename(tmp_path / "moved")
    argv = ("--from-megatron", run, "--to-hf", tmp_path / "new")
    assert_refused(convert(*argv), f"load_hf ({source}) must be an existing folder")
    (run / "config.yaml").unlink()
    assert_refused(convert(*argv), "load_hf must be given", "config.yaml")
    found = converted(*argv, "--load-hf", tmp_path / "moved", "--tokenizer", inputs.tokenizer)
    assert_same_tensors(found, exported)
    assert {path.name for path in found.iterdir()} == {path.name for path in exported.iterdir()}


def test_weights_of_another_model_or_damaged_ones_do_not_train(pool, converted, tmp_path, inputs):
    source = tiny.build_model(tmp_path / "source", "qwen2", num_hidden_layers=2)
    other = tiny.build_model(tmp_path / "other", "qwen2", num_hidden_layers=3)
    checkpoint = converted("--from-hf", source, "--to-megatron", tmp_path / "ckpt")
    argv = inputs.argv(other, tmp_path / "run", "--load", checkpoint)
    assert_refused(pool.run(run_cli, 1, argv)[0], f"{checkpoint}: ", "model num_layers (2), this one has (3)")
    (checkpoint / "__2_0.distcp").unlink()
    argv = inputs.argv(source, tmp_path / "run", "--load", checkpoint)
    assert_refused(pool.run(run_cli, 1, argv)[0], f"load ({checkpoint}) must be an intact checkpoint", "__2_0.distcp")
