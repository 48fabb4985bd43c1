"""Peak memory and time of the output layer with its loss, forward and backward: the fused head and its peers.

Every path starts from the hidden states of all tokens and ends with the gradients of hidden states and output weight.
The weight has its fp32 `main_grad` from before, as in training, and every path adds to it, as Megatron-Core's
data-parallel wrapper makes them. Peak memory is what a path needs beyond all that.
"""

import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import GIB, FailedError, Meter, emit, emit_machine, in_fresh_process, parse_size
from torch import Tensor

VOCAB_SIZE, TINY_VOCAB_SIZE = 152_064, 512
RATIO_SHAPES = {"cpu": (8192, 896), "gpu": (8192, 3584), "tiny": (64, 32)}
"""Tokens and hidden size for which ours is divided by Megatron-Core's."""
OURS, UNFUSED, NATIVE, LIGER, CCE = "ours", "megatron_unfused", "megatron_native_fused", "liger", "apple_cce"
PEERS_OF_ONE_RANK = {LIGER: "liger_kernel", CCE: "cut_cross_entropy"}
"""And the packages that they are of."""

Path = Callable[[Tensor, torch.nn.Parameter, Tensor, Tensor], Tensor]
"""Hidden states `[s, 1, h]`, this rank's rows of the weight, labels and bool mask `[s]`, to the summed loss."""


def _ours(spec: dict[str, Any]) -> Path:
    import torch.distributed as dist

    from megatron_psft.config.schema import ObjectiveConfig
    from megatron_psft.head.layer import HeadInputs, fused_head, label_positions
    from megatron_psft.objectives.labels import LabelInputs
    from megatron_psft.objectives.objective import Objective

    place = {"vocab_size": spec["vocab_size"], "group": dist.group.WORLD, "sequence_parallel": False}
    objective = Objective(config=ObjectiveConfig(objective="sft"))

    def path(hidden: Tensor, weight: torch.nn.Parameter, labels: Tensor, mask: Tensor) -> Tensor:
        inputs = HeadInputs(
            labels=labels[None],
            label_positions=label_positions(mask[None]),
            token_loss=lambda stats, _: objective.token_loss(stats, LabelInputs()),
        )
        return fused_head(hidden, weight, inputs, **place).loss

    return path


def _megatron(spec: dict[str, Any], *, fused: bool) -> Path:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    layer = _layer(spec)

    def path(hidden: Tensor, weight: torch.nn.Parameter, labels: Tensor, mask: Tensor) -> Tensor:
        logits, _ = layer(hidden, weight=weight)
        if fused:
            loss = fused_vocab_parallel_cross_entropy(logits, labels[:, None], layer.tp_group)
        else:
            loss = vocab_parallel_cross_entropy(logits, labels[:, None])
        return (loss[:, 0] * mask).sum()

    return path


def _layer(spec: dict[str, Any]) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=spec["hidden"],
        num_attention_heads=2,  # as many as the largest tensor-parallel size here
        tensor_model_parallel_size=spec["ranks"],
        params_dtype=_dtype(spec),
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    # Without a weight of its own: the benchmark hands it one.
    return ColumnParallelLinear(
        spec["hidden"],
        spec["vocab_size"],
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=True,
    )


def _liger(_: dict[str, Any]) -> Path:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def path(hidden: Tensor, weight: torch.nn.Parameter, labels: Tensor, mask: Tensor) -> Tensor:
        targets = torch.where(mask, labels, -100)
        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden[:, 0], weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]

    return path


def _cce(_: dict[str, Any]) -> Path:
    from cut_cross_entropy import linear_cross_entropy

    def path(hidden: Tensor, weight: torch.nn.Parameter, labels: Tensor, mask: Tensor) -> Tensor:
        targets = torch.where(mask, labels, -100)
        return linear_cross_entropy(hidden[:, 0], weight, targets, reduction="sum", filter_eps=None)

    return path


PATHS: dict[str, Callable[[dict[str, Any]], Path]] = {
    OURS: _ours,
    UNFUSED: lambda spec: _megatron(spec, fused=False),
    NATIVE: lambda spec: _megatron(spec, fused=True),
    LIGER: _liger,
    CCE: _cce,
}


def _dtype(spec: dict[str, Any]) -> torch.dtype:
    return getattr(torch, spec["dtype"])


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """One path, measured in this process; collective over its ranks."""
    from megatron_psft.config.schema import ParallelConfig
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group

    place = detect(int(os.environ["LOCAL_RANK"]))
    with process_group(place, spec["ranks"]):
        initialize_parallel(
            ParallelConfig(tensor_model_parallel_size=spec["ranks"]), virtual_size=None, seed=1, device=place.device
        )
        path = PATHS[spec["path"]](spec)
        weight = torch.nn.Parameter(
            _random(place.device, spec["vocab_size"] // spec["ranks"], spec["hidden"], spec, 0.05)
        )
        weight.main_grad = torch.zeros(weight.shape, device=place.device).add_(1.0)  # touched, hence resident
        _run(path, weight, spec, min(128, spec["tokens"]))  # threads, compilers and autotuners come to life
        results = [_run(path, weight, spec, spec["tokens"]) for _ in range(spec["repeats"])]
    return {
        "seconds": min(result.seconds for result in results),
        "median_seconds": statistics.median(result.seconds for result in results),
        "peak_bytes": max(result.peak_bytes for result in results),
    }


def _random(device: torch.device, rows: int, columns: int, spec: dict[str, Any], scale: float) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows)
    return scale * torch.randn(rows, columns, generator=generator, device=device, dtype=_dtype(spec))


def _run(path: Path, weight: Any, spec: dict[str, Any], tokens: int) -> Meter:
    hidden = _random(weight.device, tokens, spec["hidden"], spec, 1.0).unsqueeze(1).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(spec["vocab_size"], (tokens,), generator=generator).to(weight.device)
    mask = (torch.arange(tokens) % 10 < spec["labels_percent"] // 10).to(weight.device)
    with Meter() as meter:
        path(hidden, weight, labels, mask).backward()
        # What the data-parallel wrapper's hook does, where the path has not.
        if weight.grad is not None:
            weight.main_grad += weight.grad
            weight.grad = None
    return meter


def specs_of(size: str) -> list[dict[str, Any]]:
    """Shapes, of which every path sees each; no peer runs without a GPU, so that the first one says so for all."""
    base = {"vocab_size": VOCAB_SIZE, "dtype": "bfloat16" if size == "gpu" else "float32"}
    if size == "gpu":
        spec = {**base, "tokens": 8192, "hidden": 3584, "labels_percent": 100, "ranks": 1}
        two = [{**spec, "ranks": 2}] if torch.cuda.device_count() > 1 else []
        return [spec, {**spec, "labels_percent": 30}, *two]
    if size == "tiny":
        spec = {**base, "vocab_size": TINY_VOCAB_SIZE, "tokens": 64, "hidden": 32, "labels_percent": 100, "ranks": 1}
        return [spec, {**spec, "labels_percent": 30}]
    small = {**base, "tokens": 1024, "hidden": 896, "labels_percent": 100, "ranks": 1}
    return [
        small,
        {**small, "ranks": 2},
        # Without instructions for it, products in bf16 are hundreds of times as slow.
        *([{**small, "dtype": "bfloat16"}] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []),
        {**small, "tokens": 512, "hidden": 3584},
        {**small, "tokens": 8192},
        {**small, "tokens": 8192, "labels_percent": 30},
    ]


def run_all(size: str) -> None:
    specs = specs_of(size)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for spec in specs:
        is_long = size == "cpu" and (spec["tokens"] > 1024 or spec["hidden"] > 896)
        for name in PATHS:
            if name in PEERS_OF_ONE_RANK and (spec["ranks"] > 1 or (size != "gpu" and spec is not specs[0])):
                continue
            if is_long and name == NATIVE:
                continue  # the slowest, and seen beside the others where all are quick
            # A long run of a CPU takes half a minute, beside which its noise is small.
            full = {**spec, "path": name, "repeats": 10 if size == "gpu" else 1 if is_long else 2}
            try:
                if importlib.util.find_spec(PEERS_OF_ONE_RANK.get(name, "torch")) is None:
                    raise FailedError(f"{PEERS_OF_ONE_RANK[name]} is not installed")
                result = in_fresh_process(measure, full, ranks=spec["ranks"])
            except FailedError as error:
                emit(f"head_seconds_{name}", None, "s", does_not_run=str(error), **spec)
                continue
            emit(f"head_seconds_{name}", result["seconds"], "s", median=round(result["median_seconds"], 5), **spec)
            emit(f"head_peak_{name}", result["peak_bytes"] / GIB, "GiB", **spec)
            if (spec["tokens"], spec["hidden"], spec["ranks"]) == (*RATIO_SHAPES[size], 1):
                found[name, spec["labels_percent"]] = result
    _emit_ratios(found, size)


def _emit_ratios(found: dict[tuple[str, int], dict[str, float]], size: str) -> None:
    tokens, hidden = RATIO_SHAPES[size]
    shape = {"tokens": tokens, "vocab_size": TINY_VOCAB_SIZE if size == "tiny" else VOCAB_SIZE, "hidden": hidden}
    for name, labels, key in (
        ("head_peak_ratio", 100, "peak_bytes"),
        ("head_time_ratio_all_labels", 100, "seconds"),
        ("head_time_ratio_30pct_labels", 30, "seconds"),
    ):
        ours, theirs = found[OURS, labels][key], found[UNFUSED, labels][key]
        emit(name, ours / theirs, "ours / Megatron-Core unfused", **shape)


def gpu_ceilings() -> None:
    """What the GPU's memory and matrix units can do at most, beside the figures above."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(3):
        target.copy_(source)
        left @ left
    with Meter() as copy:
        for _ in range(20):
            target.copy_(source)
    with Meter() as product:
        for _ in range(20):
            left @ left
    emit("gpu_copy_ceiling", 20 * 2 * source.nbytes / copy.seconds / 1e9, "GB/s")
    emit("gpu_matmul_ceiling", 20 * 2 * 8192**3 / product.seconds / 1e12, "TFLOP/s bf16")


if __name__ == "__main__":
    chosen = parse_size(__doc__)
    emit_machine()
    if chosen == "gpu":
        gpu_ceilings()
    run_all(chosen)
