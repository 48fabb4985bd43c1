"""How what the trainer and the oracle have learned is compared."""

from pathlib import Path

import pytest
import torch

from tests.support import tiny

COMPARED = ("loss", "nll", "entropy", "grad_norm")
_PERCENTILES = ("ratio_p05", "ratio_p50", "ratio_p95")


def assert_same_run(
    found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float = 1e-4, *, has_old_policy: bool = True
) -> None:
    """The lines of two runs' metrics.jsonl agree in every step."""
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, oracle_line in zip(found, wanted, strict=True):
        for name in (*COMPARED, "clip_fraction") if has_old_policy else COMPARED:
            assert line[name] == pytest.approx(oracle_line[name], rel=rel), (line["step"], name)
        for name in _PERCENTILES if has_old_policy else ():
            # A single token's, whose rounding no mean takes away, and the middle of a bin.
            assert line[name] == pytest.approx(oracle_line[name], rel=10 * rel + 3e-3), (line["step"], name)
        for name in ("tokens", "label_tokens", "records"):
            assert line[name] == oracle_line[name]


def assert_same_logits(exported: Path, model: torch.nn.Module, atol: float | None = None) -> None:
    """Within `atol`, or 1e-4 of the largest logit if None."""
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = tiny.load_model(exported, dtype=torch.float32)(tokens).logits
        wanted = model(tokens).logits
    bound = 1e-4 * float(wanted.abs().max()) if atol is None else atol
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)
