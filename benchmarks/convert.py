"""Converting a random model to Megatron-Core and back: time, and by how much memory grows.

The model has the shape of Qwen2.5-1.5B but for its number of layers, in bf16; it is in the page cache, as it was
written just before. Memory is the growth of the peak resident set, mapped files included, and imports count neither in
time nor in memory. Where Megatron-Bridge is installed (Python 3.12), `--via-bridge` is measured as well.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import GIB, FailedError, emit, emit_machine, in_fresh_process, parse_size

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SIZES = {
    "cpu": {"num_hidden_layers": 4, "max_shard_gb": 0.5},
    "long": {"num_hidden_layers": 28, "max_shard_gb": 1.0},
    "tiny": {
        "num_hidden_layers": 1,
        "hidden_size": 96,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_shard_gb": 0.0002,
    },
}


def main() -> None:
    size = SIZES[parse_size(__doc__, tuple(SIZES))]
    emit_machine()
    with tempfile.TemporaryDirectory() as name:
        source, checkpoint, target = (str(Path(name) / part) for part in ("source", "checkpoint", "target"))
        in_fresh_process(write_model, {"folder": source, **size})
        files = [path.stat().st_size for path in Path(source).glob("*.safetensors")]
        emit("model", sum(files) / GIB, "GiB", files=len(files), largest_file_gib=round(max(files) / GIB, 3))
        there = ["--from-hf", source, "--to-megatron", checkpoint]
        back = ["--from-megatron", checkpoint, "--to-hf", target, "--max-shard-gb", str(size["max_shard_gb"])]
        for figure, argv in (("to_megatron", there), ("to_hf", back), ("check", [*there, "--check"])):
            emit_cost(figure, in_fresh_process(convert, {"argv": argv}))
        try:
            emit_cost(
                "bridge_to_megatron", in_fresh_process(convert_by_bridge, {"argv": [*there[:3], f"{name}/bridge"]})
            )
        except FailedError as error:
            emit("bridge_to_megatron", None, "s", does_not_run=str(error))


def emit_cost(figure: str, cost: dict[str, float]) -> None:
    emit(figure, cost["seconds"], "s", peak_gib=round(cost["peak_bytes"] / GIB, 3))


def write_model(spec: dict[str, Any]) -> None:
    """Writes random weights, tensor by tensor."""
    import torch

    from megatron_psft.hf.export import write_folder
    from megatron_psft.hf.mapping import Piece, hf_tensors
    from megatron_psft.hf.side_files import SideFiles
    from megatron_psft.hf.weights import RandomWeights
    from megatron_psft.model.shape import shape_from_config

    config = {**CONFIG, **{name: value for name, value in spec.items() if name not in ("folder", "max_shard_gb")}}
    shape = shape_from_config(config, "config")
    weights = RandomWeights(shape, seed=0)
    folder = Path(spec["folder"])
    with tempfile.TemporaryDirectory() as beside:
        (Path(beside) / "config.json").write_text(json.dumps(config))
        write_folder(
            folder,
            ((name, weights.read(Piece(name, (0, dims[0])))) for name, dims in hf_tensors(shape).items()),
            shape=shape,
            dtype=torch.bfloat16,
            side_files=SideFiles(model_folder=Path(beside), tokenizer_folder=Path(beside)),
            max_shard_bytes=int(spec["max_shard_gb"] * 1e9),
        )


def convert(spec: dict[str, Any]) -> dict[str, float]:
    """What the command line costs once everything is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import megatron_psft.hf.conversion  # noqa: F401
    from megatron_psft.cli.convert import main as command

    def run() -> None:
        if command(spec["argv"]):
            raise FailedError("the command failed")

    return cost_of(run)


def convert_by_bridge(spec: dict[str, Any]) -> dict[str, float]:
    """The same once Megatron-Bridge is imported, too."""
    from megatron_psft.distributed.device import prepare
    from megatron_psft.errors import UserError
    from megatron_psft.sources.bridge_import import import_bridge

    prepare("cpu", 0)
    try:
        import_bridge()
    except UserError as error:
        raise FailedError(str(error)) from None
    return convert({"argv": ["--via-bridge", *spec["argv"]]})


def cost_of(action: Callable[[], None]) -> dict[str, float]:
    """Seconds, and growth of this process's memory at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts over at what is resident now
    before, started = status_bytes("VmRSS"), time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere  # whose last line is the result
        try:
            action()
        finally:
            sys.stdout = out
    return {"seconds": time.perf_counter() - started, "peak_bytes": status_bytes("VmHWM") - before}


def status_bytes(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
