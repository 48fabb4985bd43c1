"""Peak memory of training steps over what `psft plan` says of them, in several layouts.

On the CPU peak memory is the growth of the peak resident set since before the model was built, in fresh processes, of
the rank that takes most; records fill their rows, and every token is a label.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from common import GIB, Meter, emit, emit_machine, give_memory_back_at_once, in_fresh_process, parse_size
from toys import write_texts, write_tokenizer

STEPS = 2  # the first brings Adam's state to life and scores the second
CPU_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1344,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
GPU_SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
EXTRA: dict[str, dict[str, int]] = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 672},
}
DISTRIBUTED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
SPECS: dict[str, list[dict[str, Any]]] = {
    "cpu": [
        {"name": "one_rank", "family": "qwen2", "ranks": 1, "seq_length": 2048, "flags": []},
        {
            "name": "tensor_parallel",
            "family": "qwen3",
            "ranks": 2,
            "seq_length": 2048,
            "flags": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
        },
        {
            "name": "pipeline",
            "family": "llama",
            "ranks": 2,
            "seq_length": 1024,
            "flags": ["--pipeline-model-parallel-size", 2, "--recompute-granularity", "selective"],
        },
        {
            "name": "recomputed",
            "family": "qwen2",
            "ranks": 2,
            "seq_length": 2048,
            "flags": [*DISTRIBUTED, *FULL],
        },
        {
            "name": "experts",
            "family": "qwen3_moe",
            "ranks": 2,
            "seq_length": 1024,
            "flags": ["--expert-model-parallel-size", 2, *DISTRIBUTED],
        },
    ],
    "gpu": [
        {"name": "one_rank", "family": "qwen2", "ranks": 1, "seq_length": 8192, "flags": ["--bf16"]},
        {"name": "recomputed", "family": "qwen2", "ranks": 1, "seq_length": 16_384, "flags": ["--bf16", *FULL]},
    ],
    "tiny": [{"name": "one_rank", "family": "qwen2", "ranks": 1, "seq_length": 256, "flags": []}],
}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measured and planned peak, in bytes, of the rank that takes most; collective."""
    import psutil
    import torch._dynamo  # as an optimizer does: it is no part of what is measured
    import torch.distributed as dist

    from megatron_psft.config.schema import parse_config
    from megatron_psft.diagnostics.plan import Plan
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.train.assemble import build_run
    from megatron_psft.train.inputs import read_inputs
    from megatron_psft.train.loop import train_step

    def resident_bytes() -> int:
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss

    give_memory_back_at_once()
    config, place = parse_config([str(value) for value in spec["argv"]]), detect(int(os.environ["LOCAL_RANK"]))
    with process_group(place, spec["ranks"]):
        inputs = read_inputs(config, is_main=False)
        before = resident_bytes()
        run = build_run(config, inputs, place)
        built = resident_bytes()
        with Meter() as meter:
            for step in range(STEPS):
                train_step(run, step)
        peak = torch.tensor(float(built - before + meter.peak_bytes), device=place.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        planned = Plan(config=config, shape=inputs.source.shape, world_size=spec["ranks"], platform=place).peak
    return {"measured": peak.item(), "planned": planned.total, "moment": planned.moment}


def prepared(spec: dict[str, Any], shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The spec with the command line of a run, for which the files are written."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    families = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    family, extra = families[spec["family"]], EXTRA.get(spec["family"], {})
    family(**shape, **extra, tie_word_embeddings=spec["family"] == "qwen3").save_pretrained(folder / "model")
    argv = ["--load-hf", folder / "model", "--random-init", "--tokenizer", write_tokenizer(folder / "tokenizer")]
    argv += ["--data", write_texts(folder / "texts.jsonl", 16, words=2 * spec["seq_length"])]
    argv += ["--save", folder / "run", "--data-cache-dir", folder / "cache", "--seq-length", spec["seq_length"]]
    argv += ["--overlong", "truncate", "--loss-on", "all", "--train-iters", STEPS, "--global-batch-size", 2]
    argv += ["--old-policy-interval", 2, *spec["flags"]]
    return {**spec, "argv": [str(value) for value in argv]}


def main() -> None:
    size = parse_size(__doc__)
    emit_machine()
    for spec in SPECS[size]:
        with tempfile.TemporaryDirectory() as folder:
            full = prepared(spec, GPU_SHAPE if size == "gpu" else CPU_SHAPE, Path(folder))
            found = in_fresh_process(measure, full, ranks=spec["ranks"])
        emit(
            f"plan_over_measured_{spec['name']}",
            found["planned"] / found["measured"],
            "peak memory",
            planned_gib=round(found["planned"] / GIB, 3),
            measured_gib=round(found["measured"] / GIB, 3),
            moment=found["moment"],
            **{name: spec[name] for name in ("family", "ranks", "seq_length")},
            flags=" ".join(map(str, spec["flags"])),
        )


if __name__ == "__main__":
    main()
