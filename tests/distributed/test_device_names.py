"""Our own code names its device: the CPU's answers to `torch.cuda` are for Megatron-Core."""

import re

from tests.support.cli import REPOSITORY

CUDA = re.compile(r"torch\.cuda\.[\w.]+|\.cuda\(|\"cuda[^\"]*\"|'cuda[^']*'")
# Questions that are the same with and without the answers.
HARMLESS = {"torch.cuda.is_available"}
COMPARED = re.compile(r"type [!=]= \"cuda\"")
ANSWERS = ("distributed/device.py", "distributed/device_choice.py", "distributed/cpu_shims.py")
# Asked on a GPU only, of a device that is named; or no device but a key.
JUSTIFIED = {
    "cli/plan.py": {'"cuda"'},
    "checkpoint/staging.py": {"torch.cuda.Stream", "torch.cuda.current_stream", "torch.cuda.stream"},
    "checkpoint/state.py": {"torch.cuda.get_rng_state", "torch.cuda.set_rng_state"},
    "config/schema.py": {'"cuda"'},
    "diagnostics/doctor.py": {
        "torch.cuda.is_bf16_supported",
        "torch.cuda.device_count",
        "torch.cuda.get_device_properties",
        "torch.cuda.nccl.version",
    },
    "diagnostics/out_of_memory.py": {
        "torch.cuda.get_device_properties",
        "torch.cuda.max_memory_allocated",
        "torch.cuda.max_memory_reserved",
    },
    "evaluation/lm_eval.py": {'"cuda"'},
    "head/chunked.py": {'"cuda"'},
    "metrics/flops.py": {"torch.cuda.get_device_name"},
    "model/fp8.py": {"torch.cuda.get_device_capability", "torch.cuda.get_device_name"},
    "nemo/train.py": {"'cuda'"},
    "rollout/sampling.py": {'"cuda"', "torch.cuda.empty_cache"},
    "train/loop.py": {"torch.cuda.max_memory_allocated"},
}


def test_cuda_is_named_only_where_it_is_there():
    package = REPOSITORY / "megatron_psft"
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name not in ANSWERS:
            spots = set(CUDA.findall(COMPARED.sub("", path.read_text()))) - HARMLESS
            found |= {name: spots} if spots else {}
    assert found == JUSTIFIED
