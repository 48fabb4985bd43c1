"""Says what a run on this machine would use and why, and what would break it or slow it down.

Nothing is decided here a second time: device, collectives, layers, kernels and optimizer are read off one optimizer
step of a toy model, made by the code that trains.
"""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_psft.errors import UserError, counted, first_line
from megatron_psft.metrics.provenance import installed_version

if TYPE_CHECKING:  # seconds to import, which `--help` does not wait for
    from megatron_psft.distributed.device import Platform
    from megatron_psft.distributed.environment import Setting

Level = Literal["ok", "skipped", "warning", "problem"]

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_GIB = 1  # docker gives 64 MiB unless asked for more


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check has found: `problem` would break a run, or make it something else than was asked for; `skipped`
    was not looked at."""

    level: Level
    text: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One thing that a run uses here, and why."""

    what: str
    chosen: str
    reason: str


def check_versions() -> list[Finding]:
    """Whether each library is there in a version that this package asks for."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("megatron_psft") or []
    except metadata.PackageNotFoundError:
        return [
            Finding(level="warning", text="megatron_psft is not installed, so no version is checked: pip install -e .")
        ]
    findings = []
    for requirement in map(Requirement, lines):
        found, wanted = installed_version(requirement.name), requirement.specifier
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if found is None and is_wanted:
            findings.append(
                Finding(level="problem", text=f"{requirement} is not installed: pip install '{requirement}'")
            )
        elif found is not None and not wanted.contains(found, prereleases=True):
            remedy = f"pip install '{requirement.name}{wanted}'"
            text = f"{requirement.name} {found} is not in the range that is supported, {wanted}: {remedy}"
            findings.append(Finding(level="problem", text=text))
    return findings or [Finding(level="ok", text="all libraries that are needed are there, in supported versions")]


def check_device(environment: Mapping[str, str]) -> list[Finding]:
    """Whether a GPU lies idle beside a torch that cannot use it; to be asked before a device is chosen."""
    import torch

    from megatron_psft.distributed.device_choice import has_hidden_gpu, unusable_gpu

    if torch.cuda.is_available():
        return []
    trouble = unusable_gpu(environment)
    if trouble is not None:
        text = f"{trouble}; runs are refused unless --device cpu says that they are to compute on the CPU"
        return [Finding(level="problem", text=text)]
    if has_hidden_gpu(environment):
        return [Finding(level="warning", text="CUDA_VISIBLE_DEVICES hides all GPUs: runs ignore them; unset it")]
    return []


def check_environment(is_gpu: bool, environment: Mapping[str, str]) -> list[Finding]:
    """Variables that turn a GPU's run slow; `environment` is as it was before anything was set here."""
    if not is_gpu:
        return []
    findings = []
    connections = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # what a run sets where it is absent
    if connections != "1":
        text = (
            f"CUDA_DEVICE_MAX_CONNECTIONS is {connections}: with tensor_model_parallel_size or context_parallel_size "
            "above 1, computation starts before the communication that it should hide; unset it, or set it to 1"
        )
        findings.append(Finding(level="warning", text=text))
    if environment.get("TRITON_INTERPRET") == "1":
        text = "TRITON_INTERPRET is 1: kernels are interpreted on the CPU, thousands of times as slow; unset it"
        findings.append(Finding(level="problem", text=text))
    return findings


def check_bf16(is_gpu: bool) -> list[Finding]:
    """Whether bf16 has instructions of its own here."""
    import torch

    if is_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        text = "this GPU has no bf16 arithmetic: it is emulated, and slow; --bf16 false computes in fp32"
        return [Finding(level="warning", text=text)]
    if not is_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        text = "this CPU has no bf16 instructions: --bf16 is hundreds of times as slow as fp32, which is the default"
        return [Finding(level="warning", text=text)]
    use = "it is the default" if is_gpu else "--bf16 is worth a try, and fp32 the default"
    return [Finding(level="ok", text=f"bf16 has instructions of its own: {use}")]


def check_apex() -> list[Finding]:
    """PyPI's `apex` is a toolkit for web sites. The one with fused optimizers is NVIDIA's and is built from source."""
    spec = importlib.util.find_spec("apex")  # not imported: the other one needs a web server's libraries
    if spec is None:
        return []
    folders = spec.submodule_search_locations or []
    if any((Path(folder) / "optimizers").is_dir() for folder in folders):
        return []
    text = (
        "apex is installed, but it is not NVIDIA's: PyPI has another project of that name. pip uninstall apex; the "
        "fused optimizer comes with Transformer Engine, or with github.com/NVIDIA/apex built from source"
    )
    return [Finding(level="warning", text=text)]


def check_shared_memory() -> list[Finding]:
    """Ranks of one node exchange data through shared memory."""
    if not _SHARED_MEMORY.is_dir():
        return []
    size = shutil.disk_usage(_SHARED_MEMORY).total / 2**30
    if size >= _SHARED_MEMORY_GIB:
        return [Finding(level="ok", text=f"{_SHARED_MEMORY} has {size:.1f} GiB")]
    text = (
        f"{_SHARED_MEMORY} has {size * 1024:.0f} MiB, in which NCCL and vLLM share buffers between the processes of a "
        f"node; give at least {_SHARED_MEMORY_GIB} GiB: docker run --shm-size 8g, or --ipc host"
    )
    return [Finding(level="warning", text=text)]


def check_model(folder: Path) -> list[Finding]:
    """Whether a model can be trained."""
    from megatron_psft.sources.choice import describe_model

    try:
        text = describe_model(folder)
    except UserError as error:
        return [Finding(level="problem", text=str(error))]
    return [Finding(level="ok", text=text)]


def check_logits(folder: Path) -> list[Finding]:
    """Whether the model that a run would build is the one that transformers builds of the same folder, which holds a
    model that can be trained. Takes as long as reading its weights twice."""
    from megatron_psft.diagnostics import transformers_model
    from megatron_psft.distributed.host_memory import available_bytes

    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [_not_compared(f"{folder} holds no weights")]
    try:
        needed, available = transformers_model.needed_bytes(folder, "model") / 2**30, available_bytes() / 2**30
    except UserError as error:
        return [Finding(level="problem", text=str(error))]
    if needed > available:
        return [_not_compared(f"it takes {needed:.3g} GiB of host memory, which has {available:.3g} GiB left")]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_psft.diagnostics.logits", str(folder)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C is this process's, which then ends the other
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        return [_not_compared("the process that compared was killed, as it happens where memory runs out")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [
            Finding(level="problem", text=f"comparing {folder} with transformers fails, and so may a run: {reason}")
        ]
    answer = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in answer:
        return [Finding(level="problem", text=answer["mistake"])]
    return [_describe_logits(folder, **answer)]


def _not_compared(reason: str) -> Finding:
    return Finding(level="skipped", text=f"log-probabilities were not compared with transformers': {reason}")


def _describe_logits(folder: Path, *, largest: float, positions: int, agreeing: int, vocab_size: int) -> Finding:
    """Of a `logits.Comparison`."""
    from megatron_psft.diagnostics.logits import BOUND

    compared = (
        f"of all {vocab_size:,} tokens after each of {positions} random ones differ from those of transformers "
        f"{installed_version('transformers')} by at most {largest:.2g} in fp32 (relative to one below -1; up to "
        f"{BOUND:g} is rounding)"
    )
    if agreeing == positions:
        return Finding(level="ok", text=f"log-probabilities {compared}")
    remedy = (
        "a run would train another model than other programs load; compare config.json and weights with those "
        "published, and report it with the versions above if they are the same"
    )
    level: Level = "problem"
    if agreeing > positions / 2 and _has_experts(folder):
        level = "warning"
        remedy = (
            "rounding alone may give a token of a mixture of experts another expert, and change it and those behind "
            "it; if it is not that, a part of the model is another one here"
        )
    return Finding(
        level=level,
        text=f"{folder}: log-probabilities {compared}, at {positions - agreeing} by more than that: {remedy}",
    )


def _has_experts(folder: Path) -> bool:
    from megatron_psft.model.shape import read_config
    from megatron_psft.sources.bridge_layout import num_experts

    return num_experts(read_config(folder)) is not None


def check_tokenizer(folder: Path, model: Path) -> list[Finding]:
    """Whether the model has a row for each id, and other programs make the tokens of a folder that training makes:
    transformers 5 takes parts of some tokenizers, such as one beside a config.json of model_type qwen2, from the
    family's class and not from the file."""
    from megatron_psft.hf import hub
    from megatron_psft.hf.tokenizer import check_rows

    file = folder / "tokenizer.json"
    if not file.is_file():
        return [Finding(level="problem", text=f"{folder} has no tokenizer.json, and so no fast tokenizer")]
    tokenizer, difference = hub.read_tokenizer(folder)
    try:
        rows = hub.embedding_rows(model)
        if rows is not None:
            check_rows(tokenizer, rows, can_resize=True)
    except UserError as error:
        return [Finding(level="problem", text=str(error))]
    if difference is None:
        return [Finding(level="ok", text=f"transformers makes the tokens of {folder} that its tokenizer.json says")]
    text = (
        f"transformers makes other tokens of {folder} than its tokenizer.json says: {difference[1]}. Training takes "
        "those of the file, and an export loads as such everywhere; other programs that load this folder make the "
        "others"
    )
    return [Finding(level="warning", text=text)]


def attempt(what: str, action: Callable[[], Any]) -> tuple[Any, list[Finding]]:
    """The result of `action`, or a problem that names what it raised."""
    try:
        return action(), []
    except Exception as error:  # whatever a library raises on this machine is what is looked for
        first = first_line(error)
        text = f"{what} fails, and so would a run: {type(error).__name__}: {first}"
        return None, [Finding(level="problem", text=text)]


def describe_setting(setting: "Setting") -> str:
    """Who has set a variable to what, and why."""
    if setting.is_given:
        return f"{setting.value} (given; {setting.reason})"
    return (
        f"{setting.value} (a run sets it, {'unset' if setting.found is None else setting.found} here; {setting.reason})"
    )


def describe_machine(platform: "Platform") -> dict[str, str]:
    """What there is: one line per device, and the libraries that move data between them."""
    import torch
    import torch.distributed as dist

    lines = {
        "python": sys.version.split()[0],
        "CPU": f"{counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')} in use",
    }
    if platform.is_gpu:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            size = f"{found.total_memory / 2**30:.1f} GiB, of which CUDA and NCCL take 2 to 4"
            lines[f"GPU {index}"] = f"{found.name}, {size}, compute capability {found.major}.{found.minor}"
        lines["CUDA"] = str(torch.version.cuda)
    has_nccl = platform.is_gpu and dist.is_nccl_available()
    lines["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not usable without a GPU"
    lines["gloo"] = "available" if dist.is_gloo_available() else "not in this torch"
    return lines


def what_is_used(platform: "Platform", made_with: Mapping[str, str]) -> list[Choice]:
    """What `toy_step` has found at work, with the reason for each."""
    gpu = "torch sees a GPU" if platform.is_gpu else "torch sees no GPU"
    if platform.has_transformer_engine:
        engine = "Transformer Engine is installed"
    else:
        engine = "Transformer Engine is not installed" if platform.is_gpu else "Transformer Engine needs a GPU"
    reasons = {
        "collectives": gpu,
        "attention": engine,
        "norm": engine,
        "loss kernels": "Triton runs on GPUs" if platform.is_gpu else "Triton needs a GPU",
        "optimizer": "Megatron-Core takes Transformer Engine's, or else Apex's, or else torch's",
        "fusions": f"{gpu}; {engine}",
    }
    device = Choice(what="device", chosen=platform.describe().split(";")[0], reason=gpu)
    return [device, *(Choice(what=name, chosen=made_with[name], reason=reason) for name, reason in reasons.items())]
