"""Low-rank adapters: the section of the configuration that puts them beside the model's weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_psft.config.flags import require_at_least, require_positive
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError, nearest_name_hint

ALL_LINEAR = "all-linear"

_MODULES: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""What Megatron-Core's linear layers are made of, by Hugging Face's names."""

_OF_EXPERTS = ("w1", "w2", "w3")
"""Other names of layers that get none; the model's own check says why."""


def spelled_out(targets: Iterable[str]) -> set[str]:
    """The projections that values of `lora_targets` name, however they are spelled; unknown names as they are."""
    names = split_names(targets)
    if ALL_LINEAR in names:
        return {part for parts in _MODULES.values() for part in parts}
    return {part for name in names for part in _MODULES.get(name, (name,))}


def split_names(targets: Iterable[str]) -> tuple[str, ...]:
    """The names that values of `lora_targets` hold, one by one."""
    return tuple(name for names in targets for name in names.split(",") if name)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) that are trained in place of the model's own weights."""

    lora_rank: int = 0
    """Rank of the adapters: beside each weight W of `lora_targets`, which stays as it is, two thin matrices A and B are
    trained, of this many rows and columns, and W + scale * B A takes the place of W. 0 trains the whole model."""
    lora_alpha: float = 32.0
    """The adapters' scale times `lora_rank`, or times its root with `lora_rank_stabilized`. Needs `lora_rank`."""
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    """Linear layers that get adapters, by Hugging Face's names (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj) or Megatron-Core's (linear_qkv, linear_proj, linear_fc1, linear_fc2), also joined by commas; all-linear
    is all of them. Of a model with experts only those of attention can be. Needs `lora_rank`."""
    lora_rank_stabilized: bool = False
    """Scale adapters by `lora_alpha` over the root of `lora_rank` (rsLoRA, arXiv 2312.03732). Needs `lora_rank`."""
    lora_init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A is drawn from `seed`: kaiming, peft's default, evenly within 1 / sqrt(columns); gaussian with a standard
    deviation of 1 / `lora_rank`. B is zero, so that a run starts from the model as it is. Needs `lora_rank`."""
    load_lora: PathText | None = None
    """Folder of a peft adapter (adapter_config.json, adapter_model.safetensors) that the adapters start from. Rank,
    scale and targets must be those of the adapter. No effect where `save` or `load` holds a checkpoint."""
    lora_merge: bool = False
    """Export the whole model with the adapters added to its weights, instead of a peft adapter. Needs `lora_rank`."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "lora_rank")
        require_positive(self, "lora_alpha")
        if not self.lora_target_names:
            raise UserError("lora_targets () must name at least one linear layer")
        known = [ALL_LINEAR, *_MODULES, *(part for parts in _MODULES.values() for part in parts)]
        for name in self.lora_target_names:
            if name not in (*known, *_OF_EXPERTS):
                raise UserError(
                    f"lora_targets ({name}) must be linear layers that all families have, of {', '.join(known)}"
                    f"{nearest_name_hint(name, known)}"
                )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and not the whole model."""
        return self.lora_rank > 0

    @property
    def lora_scale(self) -> float:
        """What B A is multiplied with."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.lora_rank_stabilized else self.lora_rank)

    @property
    def lora_target_names(self) -> tuple[str, ...]:
        """`lora_targets` one by one."""
        return split_names(self.lora_targets)
