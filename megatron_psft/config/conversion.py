"""Settings of `psft convert`: where weights come from, and as what they are written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_psft.config.flags import require_absent, require_positive
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is read: `from_hf` or `from_megatron`."""

    from_hf: PathText | None = None
    """Hugging Face folder or hub ID with config, safetensors and, where there is one, the tokenizer."""
    from_megatron: PathText | None = None
    """Run folder, of which the newest checkpoint is read, or one step folder of it, or a folder that this command
    wrote."""
    load_hf: PathText | None = None
    """Folder or hub ID whose config.json and generation config go with the weights of `from_megatron`; if unset,
    those that it holds itself, or that its run was started with. Of adapters it must be the model that they were
    trained on, whose weights are read there with `lora_merge`, unless the run started from a checkpoint."""
    tokenizer: PathText | None = None
    """Folder or hub ID whose tokenizer goes with the weights; if unset, the run's where `load_hf` is, too, or the
    one beside config.json."""

    def __post_init__(self) -> None:
        require_one(self, "from_hf", "from_megatron")
        if self.load_hf is not None and self.from_megatron is None:
            raise UserError(f"load_hf ({self.load_hf}) goes with from_megatron; remove it")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What is written: `to_hf` or `to_megatron`."""

    to_hf: PathText | None = None
    """Hugging Face folder to write; it must not exist."""
    to_megatron: PathText | None = None
    """Folder to write a checkpoint of weights to; it must not exist. `psft train` takes it with --load."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of what is written; if unset, that of the source, but for `to_hf` of an fp32 checkpoint the one
    that config.json names, as in its run's own export."""
    max_shard_gb: float | None = None
    """Size limit of one file of `to_hf`, in 10^9 bytes; 5 if unset. A tensor that is larger has its own file."""
    lora_merge: bool = False
    """Write the whole model with the adapters of `from_megatron` added to its weights; if unset, `to_hf` of a
    checkpoint that holds adapters is a peft adapter."""
    via_bridge: bool = False
    """Convert as a run with `model_source` bridge reads and writes its model, which takes memory for all of it. Of
    `from_megatron`, that may also be a checkpoint of Megatron-Bridge's own loop, the model's folder with its weights
    is needed: `load_hf`, if unset that of its run."""
    check: bool = False
    """Write nothing, but compare what would be written with what is there, tensor by tensor by SHA-256, and say which
    differ."""

    def __post_init__(self) -> None:
        name, path = self.place
        if self.check and not path.is_dir():
            raise UserError(f"{name} ({path}) must be an existing folder to be checked")
        if not self.check:
            require_absent(self, name, "folder")
        for name in ("dtype", "max_shard_gb", "lora_merge", "check"):
            if self.via_bridge and getattr(self, name):
                raise UserError(f"{name} ({getattr(self, name)}) has no effect with via_bridge; remove it")
        if self.max_shard_gb is not None:
            require_positive(self, "max_shard_gb")
            if self.to_hf is None or self.check:
                raise UserError(f"max_shard_gb ({self.max_shard_gb}) goes with writing to_hf; remove it")

    @property
    def place(self) -> tuple[str, Path]:
        """The field that is set, and its folder."""
        name = require_one(self, "to_hf", "to_megatron")
        return name, Path(getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The whole command."""

    source: SourceConfig
    target: TargetConfig


def require_one(section: object, *names: str) -> str:
    """Returns the one of the named fields that is set. Raises UserError where it is not one."""
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        raise UserError(f"{' and '.join(given) or 'neither'} given; give one of {', '.join(names)}")
    return given[0]
