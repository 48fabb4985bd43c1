"""What tells one model's weights, and one vocabulary, from another, at the cost of a few reads of each tensor."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megatron_psft.errors import UserError, reason_of

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerBase

_PIECE = 4096
"""Bytes that are read in the middle of a tensor, and at its start."""


def weights_fingerprint(folder: Path, field: str) -> str:
    """A hash over name, type, size and some bytes of each tensor in the safetensors files of a folder, however they are
    cut into files. Training changes nearly all values, so that some bytes of each tensor tell.

    Raises UserError, with the configuration's `field`, where a file cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                found |= _tensors(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{field}: {path} must be a readable safetensors file: {reason_of(error)}") from None
    return _digest(json.dumps(sorted(found.items())).encode())


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash over which id stands for which token."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def _tensors(file: BinaryIO) -> dict[str, str]:
    """A hash of each tensor of a safetensors file, by its name."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        pieces = []
        for place in (begin, (begin + end) // 2):
            file.seek(8 + length + place)
            pieces.append(file.read(min(_PIECE, end - place)))
        found[name] = _digest(json.dumps([tensor["dtype"], tensor["shape"]]).encode() + b"".join(pieces))
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
