"""What the head's constants are worth on a GPU: bytes of a chunk, the dtype of its logits, how the weight's gradient is
summed, and what clipped tokens save.

In the rounds "as it is" the head is as shipped. Errors are those of the log-probabilities against products in fp32.
"""

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import GIB, Meter, emit, emit_machine, parse_size
from torch import Tensor

SHAPES = {
    "gpu": [  # tokens, hidden size, columns: Qwen2.5-7B on one rank, and a rank of four
        {"tokens": 8192, "hidden": 3584, "vocab_size": 152_064},
        {"tokens": 16_384, "hidden": 3584, "vocab_size": 38_016},
    ],
    "tiny": [{"tokens": 64, "hidden": 32, "vocab_size": 512}],
}
CHUNK_MIB = {"gpu": (256, 512, 1024, 2048, 4096), "tiny": (1,)}
REPEATS = {"gpu": 5, "tiny": 1}
CHECKED = 1024  # tokens


class Case:
    """Hidden states, output weight with an fp32 `main_grad`, and labels."""

    def __init__(self, shape: dict[str, int], device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(1)

        def normal(*dims: int) -> Tensor:
            return torch.randn(*dims, generator=generator, device=device)

        self.hidden = normal(shape["tokens"], shape["hidden"]).to(dtype)
        weight = normal(shape["vocab_size"], shape["hidden"]) * (8 / shape["hidden"] ** 0.5)  # logits up to 40
        self.weight: Any = torch.nn.Parameter(weight.to(dtype))
        self.weight.main_grad = torch.zeros(weight.shape, device=device)
        # Labels as likely as a model's: their logits, raised by 35, are about the largest of a row.
        self.labels = torch.randint(shape["vocab_size"], (shape["tokens"],), generator=generator, device=device)
        near = self.hidden.float() + 35 / 64 * self.weight.detach()[self.labels].float()
        self.hidden = near.to(dtype)
        self.order = torch.rand(shape["tokens"], generator=generator, device=device)

    def loss_of(self, active: float) -> Callable[[Any, slice], Tensor]:
        """That of SFT for a share of the tokens, none for the others, as clipping has it."""
        weights = (self.order < active).float()
        return lambda stats, rows: -stats.log_probs * weights[rows]


def run(case: Case, active: float) -> tuple[Meter, Tensor]:
    """One forward and backward pass, and its log-probabilities."""
    import torch.distributed as dist

    from megatron_psft.head.chunked import fused_loss

    hidden = case.hidden.detach().requires_grad_()
    place = {"vocab_size": len(case.weight), "group": dist.group.WORLD}
    with Meter() as meter:
        result = fused_loss(hidden, case.weight, case.labels, case.loss_of(active), **place)
        result.loss.backward()
        case.weight.grad = None
    return meter, result.stats.log_probs


def time_of(case: Case, size: str, active: float = 1.0, **details: Any) -> None:
    """Prints seconds and peak of the head as it is set up now."""
    run(case, active)
    meters = [run(case, active)[0] for _ in range(REPEATS[size])]
    named = {"tokens": len(case.hidden), "hidden": case.hidden.shape[1], "columns": len(case.weight), **details}
    seconds, peak = statistics.median(meter.seconds for meter in meters), max(meter.peak_bytes for meter in meters)
    operations = 2 * case.hidden.numel() * len(case.weight) * (1 + 2 * active)
    speed = float(f"{operations / seconds / 1e12:.4g}")
    emit("head_seconds", seconds, "s", active=active, **named, tflops=speed, peak_gib=float(f"{peak / GIB:.4g}"))


def exact_log_probs(case: Case) -> Tensor:
    """Of the first tokens, from products in fp32 of the same bf16 numbers."""
    logits = case.hidden[:CHECKED].float() @ case.weight.detach().float().t()
    return logits.log_softmax(dim=1).gather(1, case.labels[:CHECKED, None]).squeeze(1)


def emit_error(case: Case, exact: Tensor, **details: Any) -> None:
    """Prints how far log-probabilities are from exact ones."""
    error = (run(case, 1.0)[1][:CHECKED] - exact).abs()
    spread = {"p95": torch.quantile(error, 0.95).item(), "mean": error.mean().item()}
    rounded = {name: float(f"{value:.3g}") for name, value in spread.items()}
    rounded["mean_log_prob"] = round(exact.mean().item(), 3)
    emit("log_prob_error", error.max().item(), "absolute, largest", **details, **rounded)


def sweep(case: Case, size: str) -> None:
    """Prints what each choice costs, one changed at a time."""
    from megatron_psft.head import chunked, products

    exact = exact_log_probs(case)
    device = case.hidden.device.type
    for active in (1.0, 0.5, 0.1):
        time_of(case, size, active, choice="as it is")
    emit_error(case, exact, choice="as it is")
    default = chunked.CHUNK_BYTES[device]
    for mib in CHUNK_MIB[size]:
        chunked.CHUNK_BYTES[device] = mib * 2**20
        time_of(case, size, choice="bytes of a chunk", chunk_mib=mib)
    chunked.CHUNK_BYTES[device] = default
    kept = chunked.logits_dtype
    chunked.logits_dtype = lambda hidden: hidden.dtype
    time_of(case, size, choice="logits in the dtype of hidden states")
    emit_error(case, exact, choice="logits in the dtype of hidden states")
    chunked.logits_dtype = kept
    added = chunked.add_product_
    chunked.add_product_ = products.add_in_pieces_
    time_of(case, size, choice="weight's gradient in pieces")
    chunked.add_product_ = added


def main(size: str) -> None:
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    place = detect(int(os.environ.get("LOCAL_RANK", "0")))
    torch.backends.cuda.matmul.allow_tf32 = False
    with process_group(place, 1):
        for shape in SHAPES[size]:
            sweep(Case(shape, place.device), size)


if __name__ == "__main__":
    chosen = parse_size(__doc__, ("gpu", "tiny"))
    emit_machine()
    main(chosen)
