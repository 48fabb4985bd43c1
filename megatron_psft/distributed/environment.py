"""What torch, CUDA and OpenMP read from the environment as they are loaded: set before that, where the user has not.

Imports no torch. Everything here holds on GPUs only: a run on the CPU changes nothing.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.errors import counted

_GPU_SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""What the driver makes. The second one is there, too, in a container that was started without GPUs."""
_NO_DEVICES = ("", "NoDevFiles", "none", "void")
"""Values of CUDA_VISIBLE_DEVICES that name no GPU; Slurm and container runtimes have words for it."""

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Megatron-Core's tensor and context parallelism rely on 1, up to Hopper."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Torch reads the first that is set; the others are its former names."""
_DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Torch reads the first that is set."""
_IMAGES_TF32, _ASKED_TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A variable as a run on GPUs has it."""

    name: str
    value: str
    found: str | None
    """Before the run; None if unset."""
    reason: str

    @property
    def is_given(self) -> bool:
        """Whether it stays as it was found."""
        return self.value == self.found

    def __str__(self) -> str:
        return f"{self.name}={self.value}" + (" (given)" if self.is_given else "")


def gpu_signs() -> list[Path]:
    """The files by which the driver shows itself on this host."""
    return [path for path in _GPU_SIGNS if path.exists()]


def are_hidden(environment: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (visible.strip() in _NO_DEVICES or visible.strip().startswith("-"))


def prepare_environment() -> list[Setting]:
    """Changes the environment of this process, where a GPU can be reached, to what `gpu_settings` returns. To be called
    before torch is imported, as torch reads TF32 and the number of threads only then."""
    if not _GPU_SIGNS[0].exists() or are_hidden(os.environ):
        return []
    settings = gpu_settings(os.environ, launcher=_launchers_environment())
    os.environ.update({setting.name: setting.value for setting in settings})
    return settings


def place_flight_recorder(folder: Path) -> None:
    """Has torch write the last collectives of each rank to `folder`, when NCCL's watchdog gives a peer up, unless the
    user has named another place. Torch reads the name when it writes, and makes no folder."""
    if not any(name in os.environ for name in _DUMPS):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[_DUMPS[0]] = str(folder / "rank_")


def gpu_settings(environment: Mapping[str, str], *, launcher: Mapping[str, str] | None) -> list[Setting]:
    """What a run on GPUs sets or keeps.

    Args:
        environment: of this process.
        launcher: that torchrun was started with; None without torchrun, or where it cannot be read.
    """
    allocator = next((name for name in _ALLOCATOR if name in environment), _ALLOCATOR[0])
    defaults = {
        _CONNECTIONS: ("1", "one hardware queue: communication starts before the computation that hides it"),
        allocator: ("expandable_segments:True", "rows change length, and segments that grow leave fewer holes"),
    }
    settings = [
        Setting(name=name, value=environment.get(name, value), found=environment.get(name), reason=reason)
        for name, (value, reason) in defaults.items()
    ]
    return [*settings, *_threads(environment, launcher), *_tf32(environment)]


def _threads(environment: Mapping[str, str], launcher: Mapping[str, str] | None) -> Iterator[Setting]:
    """CPU threads of each rank, for what the optimizer and checkpoints do there: torchrun sets 1 unless told."""
    name, ranks = "OMP_NUM_THREADS", int(environment.get("LOCAL_WORLD_SIZE", "1"))
    found = environment.get(name)
    is_torchruns = found == "1" and launcher is not None and name not in launcher
    if found is not None and not is_torchruns:
        yield Setting(name=name, value=found, found=found, reason="CPU threads of a rank")
    elif ranks > 1:
        cores = len(os.sched_getaffinity(0))
        reason = f"{counted(cores, 'core')} for {counted(ranks, 'rank')}"
        yield Setting(name=name, value=str(max(1, cores // ranks)), found=found, reason=reason)


def _tf32(environment: Mapping[str, str]) -> Iterator[Setting]:
    """NVIDIA's images have torch compute fp32 products with 10 bits of mantissa, which nobody has asked for."""
    found = environment.get(_IMAGES_TF32)
    if found is not None:
        is_asked = environment.get(_ASKED_TF32) == "1"
        reason = f"fp32 products are not to be TF32, as in NVIDIA's images; {_ASKED_TF32}=1 asks for it"
        yield Setting(name=_IMAGES_TF32, value=found if is_asked else "0", found=found, reason=reason)


def _launchers_environment() -> dict[str, str] | None:
    """What torchrun, our parent, was started with. What it has set since, for its children, is not in this file."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        text = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # another user's, or no Linux
        return None
    entries = (os.fsdecode(entry).partition("=") for entry in text.split(b"\0") if entry)
    return {name: value for name, _, value in entries}
