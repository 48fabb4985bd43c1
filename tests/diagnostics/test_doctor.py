"""Each check on a machine that has what it looks for, and on one that has not."""

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_psft.diagnostics import doctor
from megatron_psft.diagnostics.doctor import Finding
from megatron_psft.distributed import device_choice
from megatron_psft.distributed.environment import Setting
from megatron_psft.errors import UserError
from megatron_psft.metrics import provenance
from tests.support import tiny


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_versions_here_are_in_range():
    if provenance.installed_version("megatron_psft") is None:
        pytest.skip("runs from the source folder alone")
    assert levels(doctor.check_versions()) == ["ok"]


def test_versions_out_of_range_and_missing_ones_are_problems(monkeypatch):
    found = {"torch": "2.5.1+cu124", "transformers": "4.52.0.dev0", "numpy": "2.0", "old": None, "extra": None}
    wanted = ["torch>=2.6", "transformers>=4.50", "numpy", 'old; python_version < "3"', 'extra; extra == "gpu"', "yaml"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "installed_version", found.get)
    first, second = doctor.check_versions()
    assert first == Finding(
        level="problem",
        text="torch 2.5.1+cu124 is not in the range that is supported, >=2.6: pip install 'torch>=2.6'",
    )
    assert second == Finding(level="problem", text="yaml is not installed: pip install 'yaml'")


def test_without_the_package_installed_no_version_is_checked(monkeypatch):
    def requires(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert levels(doctor.check_versions()) == ["warning"]


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_psft.distributed.environment._GPU_SIGNS", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.check_device({}) == []
    (tmp_path / "nvidiactl").touch()
    (finding,) = doctor.check_device({})
    assert finding.level == "problem"
    assert finding.text.startswith(f"{device_choice.unusable_gpu({})}; ")
    assert levels(doctor.check_device({"CUDA_VISIBLE_DEVICES": ""})) == ["warning"]
    assert levels(doctor.check_device({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "1"})) == ["problem"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.check_device({}) == []


@pytest.mark.parametrize(
    ("is_gpu", "environment", "expected"),
    [
        (True, {}, []),
        (True, {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TRITON_INTERPRET": "0"}, []),
        (True, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, ["warning"]),
        (True, {"TRITON_INTERPRET": "1"}, ["problem"]),
        (False, {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TRITON_INTERPRET": "1"}, []),
    ],
)
def test_variables_that_slow_gpus_down_are_told(is_gpu, environment, expected):
    assert levels(doctor.check_environment(is_gpu, environment)) == expected


def test_a_cpu_without_bf16_instructions_is_told(monkeypatch):
    for has_instructions, expected in ((True, "ok"), (False, "warning")):
        mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda answer=has_instructions: answer)
        monkeypatch.setattr(torch.ops, "mkldnn", mkldnn, raising=False)
        assert levels(doctor.check_bf16(is_gpu=False)) == [expected]


def test_a_gpu_without_bf16_is_told(monkeypatch):
    for is_supported, expected in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=is_supported: answer)
        assert levels(doctor.check_bf16(is_gpu=True)) == [expected]


def test_the_other_apex_is_told_and_not_imported(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.check_apex() == []
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_of_another_project\n")
    (finding,) = doctor.check_apex()
    assert finding.level == "warning"
    assert "pip uninstall apex" in finding.text
    (tmp_path / "apex" / "optimizers").mkdir()
    assert doctor.check_apex() == []


def test_little_shared_memory_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    for mebibytes, expected in ((1024, "ok"), (64, "warning")):
        usage = SimpleNamespace(total=mebibytes * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert levels(doctor.check_shared_memory()) == [expected]
    assert "has 64 MiB" in doctor.check_shared_memory()[0].text
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "absent")
    assert doctor.check_shared_memory() == []


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("model") / "model", "qwen2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.build_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def test_a_model_with_its_tokenizer_in_a_folder_of_its_own_is_fine(model, tokenizer):
    assert levels([*doctor.check_model(model), *doctor.check_tokenizer(tokenizer, model)]) == ["ok", "ok"]


def test_a_tokenizer_that_transformers_replaces_is_a_warning(model, tokenizer, tmp_path):
    """transformers 5 does so beside a config.json of model_type qwen2."""
    if int(metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("transformers 4 takes tokenizer.json as it is")
    folder = shutil.copytree(tokenizer, tmp_path / "both")
    shutil.copy(model / "config.json", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (finding,) = doctor.check_tokenizer(folder, folder)
    assert finding.level == "warning"
    assert "Training takes those of the file" in finding.text


def test_a_model_that_is_not_supported_and_a_folder_without_tokenizer_are_problems(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    not_supported, no_tokenizer = [*doctor.check_model(tmp_path), *doctor.check_tokenizer(tmp_path, tmp_path)]
    assert (not_supported.level, no_tokenizer.level) == ("problem", "problem")
    assert "model_type (bert) is not supported" in not_supported.text
    assert "has no tokenizer.json" in no_tokenizer.text


def test_an_id_that_the_model_has_no_row_for_is_a_problem(model, tmp_path):
    (finding,) = doctor.check_tokenizer(tiny.build_sparse_tokenizer(tmp_path / "sparse", 10_000), model)
    assert finding.level == "problem"
    assert "has ids up to 10000 (" in finding.text
    assert f"{tiny.VOCAB_SIZE} rows (vocab_size)" in finding.text
    assert "--resize-vocab" in finding.text


def test_a_broken_tokenizer_is_a_users_mistake(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "broken")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="must be a folder with a Hugging Face tokenizer"):
        doctor.check_tokenizer(folder, folder)


def test_what_a_library_raises_is_the_finding():
    def fail():
        raise RuntimeError("undefined symbol: _ZN2at\nin line 2")

    assert doctor.attempt("an import", lambda: 3) == (3, [])
    result, (finding,) = doctor.attempt("an import", fail)
    assert result is None
    assert finding == Finding(
        level="problem", text="an import fails, and so would a run: RuntimeError: undefined symbol: _ZN2at"
    )


def test_who_sets_a_variable_is_told():
    setting = Setting(name="N", value="1", found="1", reason="why")
    assert doctor.describe_setting(setting) == "1 (given; why)"
    assert doctor.describe_setting(replace(setting, found=None)) == "1 (a run sets it, unset here; why)"
    assert doctor.describe_setting(replace(setting, found="8")) == "1 (a run sets it, 8 here; why)"
