"""How what the trainer and the oracle have learned is compared."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support import tiny


def assert_same_logits(exported: Path, model: torch.nn.Module) -> None:
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits
        wanted = model(tokens).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
