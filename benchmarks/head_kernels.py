"""The Triton kernels of the head on a GPU: their errors against fp64, and how much of the memory's speed they reach.

With `--size tiny`, under Triton's interpreter, it only shows that it runs.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import Clock, emit, emit_machine, parse_size
from torch import Tensor

from megatron_psft.head.kernels import portable
from megatron_psft.head.kernels.portable import GradientFactors, ShardSums

# Columns of a rank: Qwen2.5-7B's vocabulary on 1, 4 and 8 ranks, Qwen3's on 1 and 4, one with added tokens, one column.
WIDTHS = {"gpu": (152_064, 151_936, 38_016, 37_984, 19_008, 32_001, 1), "tiny": (301, 1)}
ROWS = {"gpu": (1, 1765), "tiny": (1, 3)}
SHAPES = {"gpu": ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16_384, 16), (16_384, 32)), "tiny": ((4096, 8),)}
TIMED_WIDTHS = {"gpu": (152_064, 38_016, 32_001), "tiny": (301,)}
TIMED_BYTES = {"gpu": 2**30, "tiny": 2**12}  # of fp32 logits: a chunk
_BLOCK = 256  # rows that are checked in fp64 at a time
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if _DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


class Block(NamedTuple):
    """Logits with what their gradient is made of, `[n, v]` and `[n]`."""

    logits: Tensor
    scale: Tensor
    label_gradient: Tensor
    label_index: Tensor


def draw(rows: int, columns: int, dtype: torch.dtype, *, spread: float) -> Block:
    """Random logits within some `spread`, a third of the labels on other ranks and one in the last column."""
    generator = torch.Generator(_DEVICE).manual_seed(rows * columns)
    logits = torch.empty(rows, columns, dtype=dtype, device=_DEVICE)
    for part in logits.split(_BLOCK):
        part.copy_(spread * torch.randn(part.shape, generator=generator, device=_DEVICE))
    scale, label_gradient = torch.randn(2, rows, generator=generator, device=_DEVICE)
    labels = torch.randint(-columns, 2 * columns, (rows,), generator=generator, device=_DEVICE)
    labels[0] = columns - 1
    return Block(logits, scale, label_gradient, labels)


def errors(block: Block, out_dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of each sum, and largest error of a gradient in multiples of what it is rounded to."""
    from megatron_psft.head.kernels import fused

    logits = block.logits.clone()
    _, sums = fused.shard_sums(logits, block.label_index)
    factors = GradientFactors(sums.maximum, block.scale, block.label_gradient, block.label_index)
    in_place = out_dtype == logits.dtype
    out = logits if in_place else torch.full_like(logits, torch.nan, dtype=out_dtype)
    gradient = fused.shard_gradient(logits, None, factors, out)
    worst = dict.fromkeys((*ShardSums._fields, "gradient"), 0.0)
    for start in range(0, len(logits), _BLOCK):
        rows = slice(start, start + _BLOCK)
        values = block.logits[rows].double()
        wanted = portable.shard_sums_(values, block.label_index[rows])  # in fp64, as its argument
        for name, one, other in zip(ShardSums._fields, sums, wanted, strict=True):
            worst[name] = max(worst[name], _relative(one[rows].double(), other))
        portable.shard_gradient_(values, GradientFactors(*(column[rows] for column in factors)))
        bound = torch.finfo(out_dtype).eps * values.abs() + torch.finfo(torch.float32).tiny
        worst["gradient"] = max(worst["gradient"], ((gradient[rows].double() - values).abs() / bound).max().item())
    return worst


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs() / wanted.abs().clamp(min=1e-30)).max().item()


def check(size: str) -> None:
    """Prints the worst errors of each width, dtype and spread."""
    for columns in WIDTHS[size]:
        for dtype, out_dtype in ((torch.float32, torch.bfloat16), (torch.float32,) * 2, (torch.bfloat16,) * 2):
            worst: dict[str, float] = {}
            for rows in ROWS[size]:
                for spread in (1.0, 80.0):
                    found = errors(draw(rows, columns, dtype, spread=spread), out_dtype)
                    worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
            names = {"columns": columns, "logits": str(dtype)[6:], "gradient": str(out_dtype)[6:]}
            _emit_errors(worst, **names)
    if size == "gpu":  # places beyond 2^31, which an int32 could not count
        found = errors(draw(15_000, 152_064, torch.float32, spread=5.0), torch.bfloat16)
        _emit_errors(found, columns=152_064, rows=15_000, logits="float32", gradient="bfloat16")


def _emit_errors(worst: dict[str, float], **details: object) -> None:
    gradient = worst.pop("gradient")
    each = {name: float(f"{value:.3g}") for name, value in worst.items()}
    emit("sums_error", max(worst.values()), "relative, largest", **details, each=each)
    emit("gradient_error", gradient, "roundings to its dtype, largest", **details)


def times(work: Callable[[], object]) -> Iterator[float]:
    """Seconds of repeated calls, after some that warm up, each behind the last."""
    for _ in range(3):
        work()
    for _ in range(10):
        clock = Clock()
        work()
        clock.stop()
        yield clock.seconds


def measure(size: str) -> None:
    """Prints GB/s of both kernels for each shape of a program, and of a copy."""
    from megatron_psft.head.kernels import fused

    defaults = fused.SUMS_SHAPE, fused.GRADIENT_SHAPE
    for columns in TIMED_WIDTHS[size]:
        rows = TIMED_BYTES[size] // (4 * columns) or 1
        block = draw(rows, columns, torch.float32, spread=3.0)
        target = torch.empty_like(block.logits)
        copied = statistics.median(times(lambda: target.copy_(block.logits)))  # noqa: B023
        emit("copy_speed", 2 * target.nbytes / copied / 1e9, "GB/s", columns=columns, rows=rows)
        _, sums = fused.shard_sums(block.logits, block.label_index)
        factors = GradientFactors(sums.maximum, block.scale, block.label_gradient, block.label_index)
        out = torch.empty_like(block.logits, dtype=torch.bfloat16)
        for shape in SHAPES[size]:
            fused.SUMS_SHAPE = fused.GRADIENT_SHAPE = shape
            named = {"columns": columns, "block": shape[0], "warps": shape[1]}
            seconds = statistics.median(times(lambda: fused.shard_sums(block.logits, block.label_index)))  # noqa: B023
            emit("sums_speed", target.nbytes / seconds / 1e9, "GB/s", **named, is_default=shape == defaults[0])
            seconds = statistics.median(times(lambda: fused.shard_gradient(block.logits, None, factors, out)))  # noqa: B023
            speed = (target.nbytes + out.nbytes) / seconds / 1e9
            emit("gradient_speed", speed, "GB/s", **named, is_default=shape == defaults[1])
        fused.SUMS_SHAPE, fused.GRADIENT_SHAPE = defaults


if __name__ == "__main__":
    chosen = parse_size(__doc__, ("gpu", "tiny"))
    emit_machine()
    check(chosen)
    measure(chosen)
