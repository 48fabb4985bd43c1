"""What the package makes of a model folder: `python -m tests.docs.logits_of_family FOLDER TARGET`.

Writes the logits of some tokens, `[1, n, vocabulary]`, and the folder converted to Megatron-Core and back.
"""

import os
import sys
from pathlib import Path

import torch

from megatron_psft.cli import convert
from tests.support.layouts import Layout, rank_of

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def main(model: Path, target: Path) -> None:
    os.environ["WORLD_SIZE"] = "1"
    with rank_of(Layout()) as rank:
        (chunk,), shape = rank.build(model)
        positions = torch.arange(TOKENS.shape[1])[None]
        with torch.no_grad():
            logits = chunk(TOKENS, positions, None)[..., : shape.vocab_size]
    torch.save(logits, target / "logits.pt")
    there, back = ["--from-hf", model, "--to-megatron"], ["--load-hf", model, "--to-hf", target / "back"]
    for flags in ([*there, target / "megatron"], ["--from-megatron", target / "megatron", *back]):
        assert convert.main([str(flag) for flag in flags]) == 0


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
