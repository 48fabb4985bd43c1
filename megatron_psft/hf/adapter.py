"""Adapters as `peft` has them: a folder with adapter_config.json and adapter_model.safetensors, read and written."""

import json
import logging
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_psft.checkpoint.find import StartPoint
from megatron_psft.config.lora import LoraConfig
from megatron_psft.errors import UserError
from megatron_psft.hf.fingerprint import weights_fingerprint
from megatron_psft.hf.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron_psft.hf.mapping import Piece, adapter_name, adapter_tensors
from megatron_psft.hf.weights import open_tensors, save_tensors
from megatron_psft.model.adapters import targeted
from megatron_psft.model.shape import ModelShape

log = logging.getLogger(__name__)

_BASE = "base_model_weights"
"""Field in the file's metadata that tells the base; `peft` does not read it."""

_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
"""Fields of adapter_config.json that change the maths, with the only value that is supported."""


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The model that adapters belong to."""

    name: str | None
    """Folder or hub ID of it; None where it is in no such place."""
    weights: str
    """What tells its weights from others."""
    checkpoint: StartPoint | None = None
    """Whose weights it has, where they are no Hugging Face folder's."""


class RandomAdapters:
    """Adapters as they are before training, the same for any layout: A drawn by its name, B zero."""

    dtype = torch.float32

    def __init__(self, shape: ModelShape, config: LoraConfig, seed: int) -> None:
        self._dims, self._config, self._seed = adapter_tensors(shape, config), config, seed

    def read(self, piece: Piece) -> Tensor:
        """Draws the whole tensor and returns the block."""
        rows, columns = dims = self._dims[piece.name]
        tensor = torch.zeros(dims)
        if piece.name.endswith("lora_A.weight"):
            generator = torch.Generator().manual_seed(zlib.crc32(piece.name.encode()) + self._seed)
            if self._config.lora_init == "gaussian":
                tensor.normal_(std=1 / rows, generator=generator)
            else:
                bound = 1 / math.sqrt(columns)
                tensor.uniform_(-bound, bound, generator=generator)
        return tensor[piece.index]


class AdapterFolder:
    """The tensors of a `peft` adapter."""

    def __init__(self, folder: Path, shape: ModelShape, config: LoraConfig, base: AdapterBase | None = None) -> None:
        """Checks the folder against the model and the run's settings.

        Args:
            folder: that `load_lora` names.
            shape: of the model.
            config: of the run's adapters.
            base: the run's model without them; None to leave it open.

        Raises:
            UserError: a missing or damaged file, or an adapter of another kind, shape, scale or base.
        """
        self._folder = folder
        named = _check_config(folder, config)
        path = folder / ADAPTER_WEIGHTS
        self._file = open_tensors(path, "load_lora")
        self._check_tensors(adapter_tensors(shape, config))
        if base is not None:
            self._check_base(base, named)

    def _check_base(self, base: AdapterBase, named: str | None) -> None:
        """Compares the base with what this trainer has written of it, or with the folder that `peft` has `named`."""
        weights = (self._file.metadata() or {}).get(_BASE)
        if weights is None and base.name is not None and named is not None and any(Path(named).glob("*.safetensors")):
            weights = weights_fingerprint(Path(named), "load_lora: base_model_name_or_path")
        if weights not in (None, base.weights):
            raise UserError(
                f"load_lora ({self._folder}) is an adapter of other weights ({weights}) than those that the run starts "
                f"from ({base.weights}); name the model that it was trained on"
            )
        if weights is None and named not in (None, base.name):
            log.warning(
                "WARNING: load_lora (%s) is an adapter of %s, as its %s says; it is taken to be of this run's model",
                *(self._folder, named, ADAPTER_CONFIG),
            )

    def _check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        names = list(self._file.keys())
        missing = [name for name in expected if name not in names]
        unknown = [name for name in names if name not in expected]
        if missing or unknown:
            raise UserError(
                f"load_lora ({self._folder}) must be an adapter of this model and of lora_targets, but "
                + (f"lacks {missing[0]}" if missing else f"holds {unknown[0]}")
            )
        for name, dims in expected.items():
            found = tuple(self._file.get_slice(name).get_shape())
            if found != dims:
                raise UserError(f"load_lora ({self._folder}): {name} is {found}, but this model makes it {dims}")

    @property
    def dtype(self) -> torch.dtype:
        """Of any tensor, which stands for all."""
        name = next(iter(self._file.keys()))
        return self._file.get_slice(name)[:1].dtype  # type: ignore[no-any-return]

    def read(self, piece: Piece) -> Tensor:
        """Reads only the bytes of the block."""
        return self._file.get_slice(piece.name)[piece.index]  # type: ignore[no-any-return]


def _check_config(folder: Path, config: LoraConfig) -> str | None:
    """Returns what it calls the model that the adapter is of."""
    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"load_lora ({folder}) must hold an {ADAPTER_CONFIG}; point it to a folder that peft has written"
        ) from None
    except ValueError as error:
        raise UserError(f"load_lora: {path} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"load_lora: {path} must hold a JSON object")
    for name, supported in _PLAIN.items():
        if found.get(name, supported) not in (supported, None):
            raise UserError(f"load_lora: {path}: {name} ({found[name]}) is not supported; only {supported} is")
    own = {
        "r": ("lora_rank", config.lora_rank),
        "lora_alpha": ("lora_alpha", config.lora_alpha),
        "use_rslora": ("lora_rank_stabilized", config.lora_rank_stabilized),
    }
    for name, (field, value) in own.items():
        if found.get(name, False) != value:
            raise UserError(
                f"load_lora: {path}: {name} ({found.get(name, False)}) must be {field} ({value}); change the latter"
            )
    named = found.get("base_model_name_or_path")
    return str(named) if named else None


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], shape: ModelShape, config: LoraConfig, base: AdapterBase
) -> None:
    """Writes both files, as `peft` does."""
    alpha = config.lora_alpha
    content = {
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": config.lora_rank_stabilized,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(shape, config),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(tensors, folder / ADAPTER_WEIGHTS, {_BASE: base.weights})


def _target_modules(shape: ModelShape, config: LoraConfig) -> list[str] | str:
    """The last parts of the modules' names; a pattern of all of them where a vision tower has modules of such names."""
    names = [it.target(shape) for it in targeted(config, shape)]
    if shape.family.vision is None:
        return names
    layer = re.escape(shape.family.names.layer).replace(re.escape("{}"), r"\d+")
    return rf"{layer}\.\w+\.({'|'.join(names)})"


def merged(
    name: str, weight: Tensor, adapters: Mapping[str, Tensor], scale: float, block: tuple[slice, ...] = ()
) -> Tensor:
    """A Hugging Face tensor with its adapter added, in fp32; as it is where it has none.

    Args:
        name: of the tensor.
        weight: the tensor, or a block of it.
        adapters: by `peft`'s names.
        scale: of the adapters.
        block: index of the block in the tensor; all of it if empty.
    """
    module = name.removesuffix(".weight")
    a, b = (adapters.get(adapter_name(module, matrix)) for matrix in "AB")
    if a is None or b is None:
        return weight
    return weight.float() + scale * (b.float() @ a.float())[block]
