"""Layouts in which the trainer is compared with the oracle, as flags, and how what both have learned is compared."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support import tiny

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "1": (1, []),
    "tp2": (2, TP2),
    "tp2-sp": (2, [*TP2, "--sequence-parallel"]),
    "pp2": (2, PP2),
    "pp2-interleaved": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "cp2": (2, CP2),
    "dp2-distributed-optimizer": (2, ["--use-distributed-optimizer"]),
    "dp2-overlapped-reduction": (2, ["--overlap-grad-reduce"]),
    "dp2-overlapped": (2, OVERLAPPED),
    "pp2-interleaved-dp2-overlapped": (4, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1", *OVERLAPPED]),
    "tp2-pp2": (4, [*TP2, *PP2]),
    "tp2-pp2-dp2": (8, [*TP2, "--sequence-parallel", *PP2, "--use-distributed-optimizer"]),
}


def assert_same_logits(exported: Path, model: torch.nn.Module) -> None:
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits
        wanted = model(tokens).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
