"""Throughput of whole training steps of published shapes, random weights: tokens/s, TFLOP/s, share of peak, memory.

On one GPU in bf16, SFT and PSFT with a window of 8 steps; with `--size cpu` a model that two cores can train, in fp32.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import FailedError, emit, emit_machine, in_fresh_process, parse_size
from toys import training_run, write_texts, write_tokenizer

WINDOW = 8
QWEN = {"vocab_size": 152_064, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        **QWEN,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # As many layers of the 7B model as one GPU of 80 GB holds with Adam's states.
    "7B, 8 of 28 layers": {
        **QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 8,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "cpu": {
        **QWEN,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": ["cpu"], "seq_length": 512, "rows": 2, "flags": []},
    "tiny": {"shapes": ["cpu"], "seq_length": 64, "rows": 2, "flags": []},
    "gpu": {"shapes": ["0.5B", "7B, 8 of 28 layers"], "seq_length": 4096, "rows": 16, "flags": ["--bf16"]},
}


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """Means over one window, after a first step that warms up."""
    from megatron_psft.metrics import flops
    from megatron_psft.train.loop import train_step

    with tempfile.TemporaryDirectory() as name, training_run(_argv(spec, Path(name))) as run:
        train_step(run, 0)
        started = time.perf_counter()
        lines = [train_step(run, step) for step in range(WINDOW, 2 * WINDOW)]
        seconds = time.perf_counter() - started
        lengths = [run.loader.lengths(step).tolist() for step in range(WINDOW, 2 * WINDOW)]
        rate = 3 * sum(flops.forward_flops(run.shape, own) for own in lengths) / seconds
        device = run.parallel.device
        peak = flops.peak_flops(device) if device.type == "cuda" else None
    result = {"tokens_per_second": sum(line["tokens"] for line in lines) / seconds, "training_tflops": rate / 1e12}
    if device.type == "cuda":
        result["max_memory_gib"] = lines[-1]["max_memory_gib"]
    return result if peak is None else result | {"mfu": rate / peak}


def _argv(spec: dict[str, Any], folder: Path) -> list[Any]:
    (folder / "model").mkdir()
    config = {"model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16", **SHAPES[spec["shape"]]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    argv = ["--load-hf", folder / "model", "--random-init", "--tokenizer", write_tokenizer(folder / "tokenizer")]
    data = write_texts(folder / "texts.jsonl", 2 * spec["rows"], words=spec["seq_length"] * 3 // 4)
    argv += ["--data", data, "--save", folder / "run", "--objective", spec["objective"], "--train-iters", 1000]
    return [*argv, "--seq-length", spec["seq_length"], "--global-batch-size", spec["rows"], *spec["flags"]]


if __name__ == "__main__":
    size = parse_size(__doc__)
    emit_machine()
    common = {name: value for name, value in SIZES[size].items() if name != "shapes"}
    for shape in SIZES[size]["shapes"]:
        for objective in ("sft", "psft"):
            spec = {**common, "shape": shape, "objective": objective}
            try:
                figures = in_fresh_process(measure, spec)
            except FailedError as error:
                emit("tokens_per_second", None, "tokens/s", does_not_run=str(error), **spec)
                continue
            units = {"tokens_per_second": "tokens/s", "training_tflops": "TFLOP/s of three forward passes' worth"}
            units |= {"mfu": "of peak", "max_memory_gib": "GiB"}
            for name, value in figures.items():
                emit(name, value, units[name], **spec)
