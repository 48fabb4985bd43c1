"""The comparison with transformers finds a model right, and a fault that was planted in it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_psft.diagnostics import doctor, logits
from megatron_psft.diagnostics.logits import BOUND, Comparison
from megatron_psft.distributed import host_memory
from megatron_psft.errors import UserError
from megatron_psft.model.parameters import named_parameters
from megatron_psft.sources.native import NativeSource
from tests.support import tiny
from tests.support.marks import slow

FAMILIES = ("qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's model, with an epsilon that no layer takes by default."""
    root = tmp_path_factory.mktemp("models")

    def build(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else tiny.build_model(folder, family, rms_norm_eps=1e-3)

    return build


class WithWeightScaled(NativeSource):
    """One that fills a weight of the third layer with what is not there."""

    def fill(self, chunks, parallel) -> None:
        super().fill(chunks, parallel)
        weights = dict(named_parameters(chunks))
        with torch.no_grad():
            weights["decoder.layers.2.self_attention.linear_proj.weight"].mul_(1.01)


def with_weight_scaled(source: NativeSource) -> NativeSource:
    return WithWeightScaled(source.shape, source.max_positions)


def with_other_rope(source: NativeSource) -> NativeSource:
    return replace(source, shape=replace(source.shape, rope_theta=1.1 * source.shape.rope_theta))


def as_it_is(source: NativeSource) -> NativeSource:
    return source


def compare_with(fault: Callable[[NativeSource], NativeSource], folder: Path) -> Comparison | str:
    """What `compare` makes of the folder with a fault planted, or its complaint."""
    choose, logits.choose_source = logits.choose_source, lambda *args: fault(choose(*args))
    try:
        return logits.compare(folder)
    except UserError as error:
        return str(error)
    finally:
        logits.choose_source = choose


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(slow(it) for it in (*tiny.FAMILIES, *tiny.VARIANTS, *tiny.VISION_FAMILIES, "mixtral"))]
)
def test_a_model_is_the_one_of_transformers(pool, model, family):
    (found,) = pool.run(compare_with, 1, as_it_is, model(family))
    assert found.agreeing == found.positions == 256
    assert found.largest < 1e-5
    assert found.vocab_size == tiny.VOCAB_SIZE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", [with_weight_scaled, with_other_rope])
def test_a_planted_fault_is_found(pool, model, family, fault):
    """Also where a mixture of experts has an excuse for some of its tokens."""
    (found,) = pool.run(compare_with, 1, fault, model(family))
    assert found.largest > 10 * BOUND
    assert found.agreeing < found.positions / 10


def test_folders_that_cannot_be_compared_are_mistakes(pool, model, tmp_path):
    """A tensor is missing, which transformers would draw; one is too many."""
    tensors = load_file(model("qwen3") / "model.safetensors")
    name = "model.norm.weight"
    for number, (content, complaint) in enumerate(
        [({it: tensors[it] for it in tensors if it != name}, name), (tensors | {"more": torch.ones(1)}, "more")]
    ):
        folder = shutil.copytree(model("qwen3"), tmp_path / str(number))
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (found,) = pool.run(compare_with, 1, as_it_is, folder)
        assert complaint in found


def test_what_is_no_number_differs():
    ours = torch.tensor([-1.0, -10.0, torch.nan])
    theirs = torch.tensor([-1.5, -20.0, -1.0])
    assert logits.differences(ours, theirs).tolist() == pytest.approx([0.5 / 1.5, 0.5, torch.inf])


def test_what_was_not_compared_is_told(monkeypatch, model, tmp_path):
    (finding,) = doctor.check_logits(tmp_path)
    assert finding.level == "skipped"
    assert finding.text.endswith(f"{tmp_path} holds no weights")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**30)
    (finding,) = doctor.check_logits(model("qwen3"))
    assert finding.level == "skipped"
    assert finding.text.endswith("it takes 1 GiB of host memory, which has 1 GiB left")


def test_weights_that_a_run_would_refuse_are_a_problem(model, tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    (finding,) = doctor.check_logits(tmp_path)
    assert finding.level == "problem"
    assert "holds only pickled weights" in finding.text
    folder = shutil.copytree(model("qwen3"), tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"")
    (finding,) = doctor.check_logits(folder)
    assert finding.level == "problem"
    assert "must be a readable safetensors file" in finding.text


def answer(**changes) -> SimpleNamespace:
    right = Comparison(largest=2e-6, positions=256, agreeing=256, vocab_size=211)
    text = json.dumps({**asdict(right), **changes})
    return SimpleNamespace(returncode=0, stdout=f"a library's own line\n{text}\n", stderr="")


@pytest.mark.parametrize(
    ("family", "done", "level", "text"),
    [
        ("qwen3", answer(), "ok", "differ from those of transformers "),
        ("qwen3", answer(), "ok", " by at most 2e-06 in fp32 "),
        ("qwen3", answer(largest=0.3, agreeing=255), "problem", "at 1 by more than that: a run would train another"),
        ("qwen3_moe", answer(largest=0.3, agreeing=129), "warning", "may give a token of a mixture of experts another"),
        ("qwen3_moe", answer(largest=0.3, agreeing=128), "problem", "a run would train another model"),
        ("qwen3", SimpleNamespace(returncode=0, stdout='{"mistake": "why"}\n', stderr=""), "problem", "why"),
        ("qwen3", SimpleNamespace(returncode=-9, stdout="", stderr=""), "skipped", "was killed"),
        (
            "qwen3",
            SimpleNamespace(returncode=1, stdout="", stderr="Trace\nKeyError: 'x'\n"),
            "problem",
            "KeyError: 'x'",
        ),
        ("qwen3", SimpleNamespace(returncode=-11, stdout="", stderr=""), "problem", "exit code -11"),
    ],
)
def test_what_the_process_has_found_is_the_finding(monkeypatch, model, family, done, level, text):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: done)
    (finding,) = doctor.check_logits(model(family))
    assert finding.level == level
    assert text in finding.text
