"""Tensors on their way to a writer in host memory: copied beside what the GPU computes, and not copied without need."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 64 * 2**20


class Staging:
    """Copies through two pinned buffers, of which one is filled while the other is emptied.

    On a GPU a stream of its own fills them: copies into pageable memory, or on the stream that trains, would wait for
    all kernels queued before and hold up all behind.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        is_cuda = device.type == "cuda"
        self._device, self._size = device, buffer_bytes
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda) for _ in range(2)
        ]

    def follow(self) -> None:
        """Has later copies wait for what the current stream was given until now, and for nothing that comes after."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copies the first tensor of each pair, of any device, into the second, contiguous in host memory, of the same
        dtype and size. When this returns the former may change."""
        filled: deque[tuple[Tensor, Tensor, Any]] = deque()
        with self._on_stream():
            for number, (source, target) in enumerate(self._pieces(pairs)):
                if len(filled) == len(self._buffers):
                    _empty(*filled.popleft())
                buffer = self._buffers[number % len(self._buffers)][: source.numel()]
                buffer.copy_(source, non_blocking=True)
                filled.append((buffer, target, None if self._stream is None else self._stream.record_event()))
            while filled:
                _empty(*filled.popleft())

    def _pieces(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """All bytes, a buffer's worth at a time."""
        for source, target in pairs:
            cut = (
                tensor.detach().contiguous().flatten().view(torch.uint8).split(self._size)
                for tensor in (source, target)
            )
            yield from zip(*cut, strict=True)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _empty(buffer: Tensor, target: Tensor, is_filled: Any) -> None:
    if is_filled is not None:
        is_filled.synchronize()
    target.copy_(buffer)


def with_own_storage(tensor: Tensor) -> Tensor:
    """A part of a tensor on the CPU as one that is all of its storage, over the same memory where it is contiguous.

    By way of numpy: DLPack takes pinned memory, such as an offloading optimizer's, for CUDA's.
    """
    if not tensor.numel():
        return tensor
    flat = torch.from_numpy(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return flat.view(tensor.dtype).view(tensor.shape)
