"""Distributed checkpoints read as data alone: a file of one may hold what it likes, none of it is run.

Torch keeps a checkpoint's table of contents, `.metadata`, as a pickle, and so each value that is no tensor, such as the
states of random generators. A pickle may name any function there is, to be called while it is read. Here only the names
that torch and Megatron-Core write are found; any other is refused with the file that it stands in.
"""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.futures import Future

from megatron_psft.checkpoint.names import rename
from megatron_psft.distributed.collective import Result, on_every_rank
from megatron_psft.distributed.megatron_lines import read_with
from megatron_psft.errors import UserError, first_line

_METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}
"""All that `.metadata` is made of, with either line of Megatron-Core, besides the names of dtypes; module to names."""


_EXTRA_STATE_CLASSES = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "QParams",
        "_FormatHelper",
    },
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
}
"""All that Transformer Engine pickles of a module in fp8; module to names."""


_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""What torch's own unpickler says that it has refused."""


def load(checkpoint: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Core's `dist_checkpointing.load` of the sharded `content`; collective.

    Raises:
        UserError: a file holds what is no data, or is none that was written.
    """
    loaded = _read(checkpoint, lambda: dist_checkpointing.load(content, str(checkpoint)))
    on_every_rank(lambda: _check_extra_states(checkpoint, loaded))
    return loaded


def load_common(checkpoint: Path) -> dict[str, Any]:
    """Megatron-Core's `load_common_state_dict`: what all ranks have alike; collective. Raises UserError as `load`."""
    return _read(checkpoint, lambda: dist_checkpointing.load_common_state_dict(str(checkpoint)))


def _read(checkpoint: Path, action: Callable[[], Result]) -> Result:
    def explained() -> Result:
        _check_small_files(checkpoint)
        reader = DataReader(checkpoint)
        reader.read_metadata()  # torch would say of a failure that there is none
        try:
            with data_only(lambda _: reader):
                return action()
        except CheckpointException as error:  # of all ranks' failures
            for cause, _ in error.failures.values():
                if isinstance(cause, UserError):
                    raise cause from None
            raise

    return on_every_rank(explained)


@contextmanager
def data_only(reader: Callable[[str], "DataReader"]) -> Iterator[None]:
    """Within this context Megatron-Core reads nothing but data from checkpoints, whatever the environment says;
    `reader` answers for the folder of one."""
    variables = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    previous = {name: os.environ.get(name) for name in variables}
    _set_variables(variables)
    try:
        with read_with(reader):
            yield
    finally:
        _set_variables(previous)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class DataReader(FileSystemReader):
    """Torch's reader of the files of a checkpoint, for data alone. Its errors are UserErrors that name the file."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._folder = Path(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """The table of contents, read once. Takes no rank, for which torch would look for a table of its own."""
        if self._metadata is None:
            self._metadata = _read_metadata(self._folder / ".metadata")
            rename(self._metadata)
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hands what is asked for to `planner`, file by file."""
        files = {item.storage_index: self.storage_data[item.storage_index].relative_path for item in plan.items}
        items = sorted(plan.items, key=lambda item: files[item.storage_index])
        for file, group in groupby(items, lambda item: files[item.storage_index]):
            with _explained(self._folder / file):
                super().read_data(replace(plan, items=list(group)), cast(LoadPlanner, _DataPlanner(planner)))
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _DataPlanner:
    """A planner that gets no value but data: its own reading would take any pickle."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, item: Any, value: BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        self._planner.load_bytes(item, value)


class _Unpickler(pickle.Unpickler):
    """Finds the listed names, and dtypes."""

    def __init__(self, file: BinaryIO, classes: Mapping[str, set[str]]) -> None:
        super().__init__(file)
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if name in self._classes.get(module, ()):
            return _load_from_bytes if name.endswith("_load_from_bytes") else super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _load_from_bytes(data: bytes) -> Any:
    """In place of torch's function of this name, which would take any pickle within the pickle."""
    return torch.load(BytesIO(data), weights_only=True)


def _read_metadata(path: Path) -> Metadata:
    with _explained(path), path.open("rb") as file:
        metadata = _Unpickler(file, _METADATA_CLASSES).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"{type(metadata).__name__} instead of Metadata")
        return metadata


def _check_small_files(checkpoint: Path) -> None:
    """Those that Megatron-Core reads besides torch's; its older line has one with what all ranks have alike."""
    path = checkpoint / CONFIG_FNAME
    with _explained(path):
        if json.loads(path.read_text(encoding="utf-8"))["sharded_backend"] != "torch_dist":
            raise ValueError("sharded_backend is not torch_dist")
    path = checkpoint / COMMON_STATE_FNAME
    if path.exists():
        with _explained(path):
            torch.load(path, map_location="cpu", weights_only=True)


def _check_extra_states(checkpoint: Path, loaded: Mapping[str, Any]) -> None:
    """Transformer Engine unpickles the extra state of a module in fp8 when the module gets it."""
    for name, value in _extra_states(loaded):
        with _explained(checkpoint, name):
            if isinstance(value, torch.Tensor):
                if value.numel():
                    _Unpickler(BytesIO(value.detach().cpu().numpy().tobytes()), _EXTRA_STATE_CLASSES).load()
            elif isinstance(value, BytesIO):
                torch.load(BytesIO(value.getvalue()), map_location="cpu", weights_only=True)
            elif value is not None:
                raise TypeError(f"{type(value).__name__} instead of a tensor")


def _extra_states(loaded: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for chunk in loaded.values():
        if isinstance(chunk, Mapping):
            yield from ((name, value) for name, value in chunk.items() if str(name).endswith("_extra_state"))


@contextmanager
def _explained(path: Path, part: str | None = None) -> Iterator[None]:
    """Makes what goes wrong with a file a UserError that names it, and in it `part`."""
    place = str(path) if part is None else f"{path}: {part}"
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # reading what somebody else has written may raise anything
        found = _GLOBAL.search(str(error))
        if isinstance(error, pickle.UnpicklingError):
            what = f"names {found[1]}" if found else "has something else"
            raise UserError(
                f"{place} must hold nothing but data, and {what}, which could run code; nothing of it was run; do not "
                "use what you do not know the origin of"
            ) from None
        reason = first_line(error)
        raise UserError(f"{place} is not as it is written by a run: {reason}; use another checkpoint") from error
