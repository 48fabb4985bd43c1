"""What this process computes on."""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from packaging.version import Version

from megatron_psft.distributed.cpu_shims import adapt_to_cpu
from megatron_psft.distributed.megatron_import import import_megatron
from megatron_psft.distributed.megatron_lines import do_without_engine
from megatron_psft.distributed.rendezvous import Meeting
from megatron_psft.errors import UserError, counted, first_line


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Device of this process, its collective backend, and which of NVIDIA's libraries are importable."""

    device: torch.device
    backend: str
    has_transformer_engine: bool
    transformer_engine_version: tuple[int, int] | None = None
    """Major and minor, where it is known."""
    fuses_gradients: bool = False
    """Whether Apex's extension that adds to a weight's gradient within the product is importable, which Megatron-Core's
    own layers need for it; Transformer Engine's need none."""

    @property
    def is_gpu(self) -> bool:
        """True where computation happens on a CUDA device."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        """One line for the log: what was chosen."""
        cpu = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else cpu
        spec = "Transformer Engine" if self.has_transformer_engine else "portable PyTorch"
        fused = "fused" if self.has_transformer_engine or self.fuses_gradients else "not fused"
        return (
            f"{name}; {self.backend} collectives; {spec} layers; {_adam_source()} Adam; gradient accumulation {fused}"
        )


def _adam_source() -> str:
    """Whose Adam Megatron-Core has chosen: on import it takes the first of these that is there."""
    from megatron.core.optimizer import Adam

    sources = {"transformer_engine": "Transformer Engine", "apex": "Apex", "torch": "PyTorch"}
    return sources[Adam.__module__.split(".")[0]]


def _is_importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _engine_version() -> tuple[int, int] | None:
    try:
        version = Version(importlib.metadata.version("transformer_engine"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return version.major, version.minor


def _has_engine() -> bool:
    """Whether Transformer Engine can be imported. Raises UserError where it is installed and cannot: Megatron-Core
    would go on without it while its layers are asked for."""
    if not _is_importable("transformer_engine"):
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that is missing, of another version, or that finds no symbol
        raise UserError(
            f"transformer_engine is installed and cannot be imported ({type(error).__name__}: {first_line(error)}); "
            f"install a build for torch {torch.__version__}, or uninstall it: pip uninstall transformer-engine "
            "transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13"
        ) from error
    return True


def detect(local_rank: int) -> Platform:
    """Takes a GPU where torch sees one, else the CPU, and prepares it; `local_rank` is the process's index on its node.
    For a process by itself: the ranks of a run decide together (device_choice.py)."""
    return prepare("cuda" if torch.cuda.is_available() else "cpu", local_rank)


def prepare(device: Literal["cuda", "cpu"], local_rank: int) -> Platform:
    """Makes this process compute on the device, which is there; for the CPU no GPU is seen from then on. What torch
    reads before it is imported is set by environment.py. Raises UserError for a Transformer Engine that is broken."""
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        has_engine = _has_engine()
        import_megatron()
        if not has_engine:
            do_without_engine()
        return Platform(
            device=torch.device("cuda", local_rank),
            backend="nccl",
            has_transformer_engine=has_engine,
            transformer_engine_version=_engine_version() if has_engine else None,
            # Megatron-Core's own layers, of which the output layer is always one, have no other.
            fuses_gradients=_is_importable("fused_weight_gradient_mlp_cuda"),
        )
    adapt_to_cpu()
    return Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)


def prepare_all(meeting: Meeting, device: Literal["cuda", "cpu"], local_rank: int) -> Platform:
    """`prepare` on every rank. Raises UserError on all of them for what is broken on the host of any."""
    platform, mistake = None, ""
    try:
        platform = prepare(device, local_rank)
    except UserError as error:
        mistake = str(error)
    first = meeting.agree(mistake, lambda said: next(filter(None, said), ""))
    if platform is None or first:
        raise UserError(first)
    return platform
