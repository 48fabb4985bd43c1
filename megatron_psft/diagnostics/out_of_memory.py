"""What to say of a run that is out of memory: how much it had, what its plan says, and which settings take less."""

import re
import resource
from collections.abc import Iterator

import psutil
import torch

from megatron_psft.config.schema import Config
from megatron_psft.diagnostics.plan import GIB, Memory, Plan
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.host_memory import limit_bytes
from megatron_psft.errors import first_line
from megatron_psft.hf import hub
from megatron_psft.model.shape import read_shape

_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def explain(error: BaseException, config: Config, platform: Platform, rank: int, world_size: int) -> str:
    """One line for the rank that has met `error`."""
    text = f"rank {rank}: {what_was_asked(error, platform.device)}"
    try:
        shape = read_shape(hub.model_folder("load_hf", config.weights.load_hf, with_weights=False))
        plan = Plan(config=config, shape=shape, world_size=world_size, platform=platform)
        memory = plan.memory(rank * plan.stages // world_size)
    except Exception as trouble:  # whatever it is, it is not what ended the run
        return f"{text}; psft plan says what fits ({first_line(trouble)})"
    return f"{text}; {_planned(memory)}; lower it by {', '.join(_remedies(config, memory))}; psft plan says what fits"


def what_was_asked(error: BaseException, device: torch.device) -> str:
    """Of which memory, and what the process that computes on `device` had of it at most."""
    is_host = device.type != "cuda" or "DefaultCPUAllocator" in str(error) or isinstance(error, MemoryError)
    asked = _ASKED.search(str(error))
    text = f"out of {'host' if is_host else 'GPU'} memory" + (f", asked for {asked[1]}" if asked else "")
    return f"{text}; {_host() if is_host else _gpu(device)}"


def _gpu(device: torch.device) -> str:
    peak, reserved = torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return f"allocated {peak:.1f} GiB at most, reserved {reserved:.1f}, of the {total:.1f} that the GPU has"


def _host() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    limit = limit_bytes()
    if limit is None:
        room = f"of the {psutil.virtual_memory().total / GIB:.1f} that the host has"
    else:
        room = f"of the {limit / GIB:.1f} that its container, Slurm job or pod may have in all"
    return f"this process had {peak:.1f} GiB at most, {room}"


def _planned(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "working memory": memory.working,
    }
    named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"planned were {memory.total / GIB:.1f} GiB, in the {memory.moment} ({named}), without CUDA's and NCCL's own"


def _remedies(config: Config, memory: Memory) -> Iterator[str]:
    """Settings that take less than those of the run, the likeliest first."""
    parallel, batch = config.parallel, config.batch
    are_states_most = memory.weights + memory.gradients + memory.optimizer > memory.activations + memory.working
    if not parallel.use_distributed_optimizer:
        yield "--use-distributed-optimizer"
    if not are_states_most and config.recompute.recompute_granularity != "full":
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    if are_states_most and config.precision.bf16 and not config.optimizer.optimizer_cpu_offload:
        yield "--optimizer-cpu-offload"
    if batch.micro_batch_size > 1:
        yield f"--micro-batch-size below {batch.micro_batch_size}"
    yield f"--seq-length below {config.data.seq_length}"
    yield f"--tensor-model-parallel-size above {parallel.tensor_model_parallel_size} with --sequence-parallel"
