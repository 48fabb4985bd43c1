"""The answers for the CPU, given in pool workers, and that a machine with a GPU is left alone."""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import megatron.core.optimizer  # by itself it adds names to `torch`, when it is first imported
import megatron.core.utils
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from megatron_psft.distributed import cpu_shims
from megatron_psft.distributed.device import Platform, detect
from megatron_psft.errors import UserError


def _detect_twice():
    first = detect(0)
    modes = len(_get_current_function_mode_stack())
    second = detect(3)
    return first, second, second.describe(), len(_get_current_function_mode_stack()) - modes, torch.cuda.is_available()


def test_without_a_gpu_everything_is_on_the_cpu_however_often_it_is_asked(pool):
    ((first, second, text, modes_added, is_available),) = pool.run(_detect_twice, 1)
    assert first == second == Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
    assert not first.is_gpu
    chosen = "gloo collectives; portable PyTorch layers; PyTorch Adam; gradient accumulation not fused"
    assert text == f"CPU, 1 thread; {chosen}"
    assert modes_added == 0
    assert not is_available


def _make_tensors():
    detect(0)
    like = torch.zeros(2, dtype=torch.float64)
    made = {
        "tensor": torch.tensor([1.5, 2.5], device="cuda"),
        "zeros": torch.zeros(2, device="cuda:1"),
        "ones": torch.ones(2, device=torch.device("cuda")),
        "full": torch.full((2,), 7.0, device=torch.device("cuda", 3)),
        "arange": torch.arange(2, device=torch.cuda.current_device()),
        "zeros_like": torch.zeros_like(like, device="cuda"),
        "new_ones": like.new_ones(2, device="cuda"),
        "to": like.to(device="cuda", dtype=torch.float32),
        "cuda": like.cuda(),
        "cuda of a rank": like.cuda(0, non_blocking=True),
        "explicitly on the cpu": torch.ones(2, device="cpu"),
        "nowhere in particular": torch.ones(2),
    }
    devices = {tensor.device.type for tensor in made.values()} | {torch.empty(1, device="cuda").device.type}
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in made.items()}, devices, like.cuda() is like


def test_tensors_for_cuda_are_made_on_the_cpu_with_the_same_values(pool):
    ((made, devices, is_same),) = pool.run(_make_tensors, 1)
    assert devices == {"cpu"}
    assert made == {
        "tensor": (torch.float32, [1.5, 2.5]),
        "zeros": (torch.float32, [0.0, 0.0]),
        "ones": (torch.float32, [1.0, 1.0]),
        "full": (torch.float32, [7.0, 7.0]),
        "arange": (torch.int64, [0, 1]),
        "zeros_like": (torch.float64, [0.0, 0.0]),
        "new_ones": (torch.float64, [1.0, 1.0]),
        "to": (torch.float32, [0.0, 0.0]),
        "cuda": (torch.float64, [0.0, 0.0]),
        "cuda of a rank": (torch.float64, [0.0, 0.0]),
        "explicitly on the cpu": (torch.float32, [1.0, 1.0]),
        "nowhere in particular": (torch.float32, [1.0, 1.0]),
    }
    assert is_same


def _build_on_meta():
    detect(0)
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 3)
        tensors = {
            "weight": layer.weight,
            "bias": layer.bias,
            "zeros": torch.zeros(2),
            "tensor": torch.tensor([1.0]),
            "for cuda": torch.zeros(1, device="cuda"),
        }
    return {name: tensor.device.type for name, tensor in tensors.items()}, torch.zeros(1).device.type


def test_meta_is_still_the_default_device_where_it_is_asked_for(pool):
    (devices,) = pool.run(_build_on_meta, 1)
    on_meta = dict.fromkeys(("weight", "bias", "zeros", "tensor"), "meta")
    assert devices == (on_meta | {"for cuda": "cpu"}, "cpu")


def _types():
    detect(0)
    parameter = torch.nn.Parameter(torch.ones(1))
    names = [torch.ones(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    cast = torch.tensor([2.5]).type(torch.float64)
    return names, parameter.type(), cast.dtype, cast.tolist(), isinstance(torch.ones(1), torch.cuda.FloatTensor)


def test_types_of_tensors_read_as_on_a_gpu(pool):
    (found,) = pool.run(_types, 1)
    names = ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor"]
    assert found == (names, "torch.cuda.FloatTensor", torch.float64, [2.5], True)


def _use_streams():
    detect(0)
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        total = torch.ones(3, device="cuda").sum()
        event.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.default_stream().wait_event(stream.record_event())
    stream.record_event(event).wait()
    stream.synchronize()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return total.item(), event.query()


def test_streams_and_events_run_in_order(pool):
    assert pool.run(_use_streams, 1) == [(3.0, True)]


def _draw():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    detect(0)
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = [torch.rand(4, device="cuda").tolist()]
    torch.cuda.set_rng_state(state)
    drawn.append(torch.rand(4).tolist())
    tracker = CudaRNGStatesTracker()
    tracker.add("other", 11)
    torch.cuda.set_rng_state(state)
    with tracker.fork("other"):
        forked = torch.rand(4).tolist()
    drawn.append(torch.rand(4).tolist())
    with tracker.fork("other"):
        forked_again = torch.rand(4).tolist()
    return drawn, forked, forked_again


def test_random_states_are_saved_restored_and_forked(pool):
    ((drawn, forked, forked_again),) = pool.run(_draw, 1)

    def uniform(seed: int, count: int) -> list[float]:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()

    assert drawn == [uniform(5, 4)] * 3
    assert forked + forked_again == uniform(11, 8)


def _gradient():
    detect(0)
    weight = torch.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    (weight.cuda() ** 2 * torch.tensor([3.0, 5.0], device="cuda")).sum().backward()
    return weight.is_leaf, weight.grad.tolist()


def test_derivatives_are_what_they_were(pool):
    assert pool.run(_gradient, 1) == [(True, [6.0, 20.0])]


@pytest.fixture
def pretended_gpu(monkeypatch) -> list[int]:
    """A machine whose `torch.cuda` says it is there; the devices that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model T on {device}")
    return chosen


@pytest.mark.parametrize("engine", [None, ModuleSpec("transformer_engine", None)])
def test_a_gpu_is_chosen_and_nothing_is_patched(pretended_gpu, monkeypatch, engine):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: engine)
    if engine is not None:
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"transformer_engine": "2.8.0+abc"}[name])
    names_before = {module: dict(vars(module)) for module in (torch, torch.cuda, torch.cuda.random, torch.Tensor)}
    modes_before = _get_current_function_mode_stack()
    found = detect(3)
    has_all = engine is not None
    version = (2, 8) if has_all else None
    place = {"device": torch.device("cuda", 3), "backend": "nccl", "has_transformer_engine": has_all}
    assert found == Platform(**place, transformer_engine_version=version, fuses_gradients=has_all)
    assert found.is_gpu
    layers, fused = ("Transformer Engine layers", "fused") if has_all else ("portable PyTorch layers", "not fused")
    chosen = f"{layers}; PyTorch Adam; gradient accumulation {fused}"
    assert found.describe() == f"Model T on cuda:3; nccl collectives; {chosen}"
    assert pretended_gpu == [3]
    assert _get_current_function_mode_stack() == modes_before
    for module, before in names_before.items():
        after = dict(vars(module))
        assert [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)] == []


def test_on_the_cpu_no_gpu_is_seen_though_there_is_one(pretended_gpu, monkeypatch):
    for name in ("is_available", "device_count", "current_device", "synchronize", "empty_cache", "FloatTensor"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name, None), raising=False)  # to be put back
    assert torch.cuda.is_available()
    cpu_shims._answer_device_queries()
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
    assert torch.cuda.current_device() == torch.device("cpu")


def test_on_the_cpu_no_library_for_gpus_updates_weights(monkeypatch):
    """Megatron-Core takes what is installed, wherever the model is."""
    local = {
        "multi_tensor_applier": megatron.core.utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": megatron.core.utils.local_multi_tensor_scale,
    }
    expected = {
        megatron.core.optimizer: {
            "Adam": torch.optim.AdamW,
            "SGD": torch.optim.SGD,
            "USING_PYTORCH_OPTIMIZER": True,
        },
        megatron.core.optimizer.clip_grads: local,
        megatron.core.optimizer.optimizer: local,
        megatron.core.optimizer.distrib_optimizer: dict.fromkeys(
            ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"), False
        ),
    }
    for module, names in expected.items():
        for name in names:
            monkeypatch.setattr(module, name, "of Transformer Engine")
    cpu_shims._answer_fused_optimizers()
    for module, names in expected.items():
        assert {name: getattr(module, name) for name in names} == names


@pytest.mark.parametrize(
    ("module", "source"),
    [("transformer_engine.pytorch.optimizers.fused_adam", "Transformer Engine"), ("apex.optimizers", "Apex")],
)
def test_whose_adam_it_is_is_said(monkeypatch, module, source):
    adam = type("FusedAdam", (), {"__module__": module})
    monkeypatch.setattr(megatron.core.optimizer, "Adam", adam)
    here = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
    assert f"; {source} Adam; " in here.describe()


BROKEN_ENGINES = {
    "a library is missing": ("raise OSError('libcudart.so.11.0 is gone')", "", "OSError: libcudart.so.11.0 is gone"),
    "for another torch": ("", "raise ImportError('undefined symbol: _ZN3c1')", "ImportError: undefined symbol: _ZN3c1"),
    "half of it is there": ("", "import transformer_engine_torch_of_nobody", "ModuleNotFoundError: No module named"),
}


@pytest.mark.parametrize("kind", BROKEN_ENGINES)
def test_a_broken_transformer_engine_is_a_mistake_and_not_guessed_around(pretended_gpu, monkeypatch, tmp_path, kind):
    core, pytorch, reason = BROKEN_ENGINES[kind]
    for folder, text in (
        (tmp_path / "transformer_engine", core),
        (tmp_path / "transformer_engine" / "pytorch", pytorch),
    ):
        folder.mkdir()
        (folder / "__init__.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UserError, match="transformer_engine is installed and cannot be imported") as caught:
            detect(0)
    finally:
        sys.modules.pop("transformer_engine", None)
    assert reason in str(caught.value)
    assert "pip uninstall transformer-engine" in str(caught.value)
