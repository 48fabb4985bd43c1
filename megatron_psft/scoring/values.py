"""A file of values beside a run, one or several for each token of each record."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_psft.errors import UserError

VALUES = "values.bin"
"""The file's name in its folder."""

_DTYPE = np.dtype("<f4")


class RecordValues:
    """A file of fp32 values, a row for each token that the model reads, record after record; mapped into memory.

    Holds 8 bytes per record.
    """

    def __init__(self, path: Path, lengths: NDArray[np.int64], *, columns: int = 1) -> None:
        """`lengths`: the tokens of each record, int64 [records]; `columns`: the values of each token."""
        self._path = path
        self.columns = columns
        self._ends = np.cumsum(lengths)
        self._values: NDArray[np.float32] | None = None

    @property
    def size_bytes(self) -> int:
        """Of the complete file."""
        return int(self._ends[-1]) * self._row_bytes

    def write(self, file: BinaryIO, record: int, values: NDArray[np.float32]) -> None:
        """Puts the values of a record, as `__call__` has them, into its place in a file that is being made."""
        file.seek(self._start(record) * self._row_bytes)
        file.write(values.astype(_DTYPE, copy=False).tobytes())

    def open(self) -> None:
        """Maps the complete file. Raises UserError where it is not there."""
        found = self._path.stat().st_size if self._path.is_file() else 0
        if found != self.size_bytes:
            raise UserError(
                f"save must be a folder that all nodes share: rank {dist.get_rank()} finds {found} bytes in "
                f"{self._path} instead of {self.size_bytes}"
            )
        values = np.memmap(self._path, _DTYPE, mode="r").view(np.ndarray)  # whose slices are quicker
        self._values = values if self.columns == 1 else values.reshape(-1, self.columns)

    def __call__(self, record: int) -> NDArray[np.float32]:
        """The values of a record, [length], or [length, columns] where there are several."""
        assert self._values is not None
        return self._values[self._start(record) : int(self._ends[record])]

    @property
    def _row_bytes(self) -> int:
        return self.columns * _DTYPE.itemsize

    def _start(self, record: int) -> int:
        """How many tokens lie before a record's first."""
        return int(self._ends[record - 1]) if record else 0
