"""The logits check: whether a run's model, as it is spread over the ranks, says what transformers says of the same
tokens. It is asked on request, before the first step."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_psft.config.schema import Config
from megatron_psft.data.example import Example
from megatron_psft.data.micro_batch import fill_rows
from megatron_psft.data.rows import RowLayout, packed_row, separate_rows
from megatron_psft.diagnostics import transformers_model
from megatron_psft.diagnostics.logits import BOUND, differences
from megatron_psft.distributed.collective import on_rank_zero, patient_group, sum_over_context
from megatron_psft.distributed.context_split import aligned_length
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel
from megatron_psft.distributed.host_memory import available_bytes
from megatron_psft.errors import UserError
from megatron_psft.train.assemble import Run, row_multiple
from megatron_psft.train.inputs import Inputs

log = logging.getLogger(__name__)

_TOKENS = 64
_NOISE_FACTOR = 4
"""By how much the run may be farther from fp32 than transformers' own bf16 is, on average: kernels round in other
places. SmolLM2-135M is 0.9 times as far, 7 times with a tenth of its rotary base, 14 times with gate and up projection
of one layer swapped, and 123 times with a final norm of ones; a projection scaled by 1.1 is within the bound."""


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """What transformers says of the tokens."""

    log_probs: NDArray[np.float32]
    """`[n]`, of each token after those before it, in fp32."""
    bf16_gap: float | None
    """By how much its own bf16 differs from that on average, in nats; None where nothing is to be judged by it."""


def check_logits(run: Run, inputs: Inputs, platform: Platform) -> None:
    """Compares log-probabilities of the first tokens of the first record; collective.

    In fp32 each must be transformers' up to rounding. In bf16, and with Transformer Engine, which takes TF32 for fp32,
    their mean difference must be at most `_NOISE_FACTOR` times what bf16 makes of transformers' model.

    Raises:
        UserError: on all ranks, where they differ by more, or transformers' model cannot be asked.
    """
    if run.base is None and run.start is not None:
        log.info("logits check: none, as the run does not start from load_hf but from %s", run.start.checkpoint)
        return
    tokens = inputs.dataset[0].sequences[0].tokens[: _TOKENS + 1]
    is_exact = not (run.config.precision.bf16 or platform.has_transformer_engine)
    with patient_group() as group:  # rank 0 reads all of the model
        ask = partial(_ask_transformers, inputs.model_folder, tokens, run.source.vocab_size, with_bf16=not is_exact)
        expected = on_rank_zero(ask, group)
    largest, mean = _measure(run, inputs, platform, tokens, expected.log_probs)
    number = len(tokens) - 1
    if expected.bf16_gap is None:
        found, bound, what = largest, BOUND, f"of {number} tokens differ from transformers' by at most"
    else:
        bound = _NOISE_FACTOR * expected.bf16_gap
        found, what = mean, f"of {number} tokens differ from transformers' fp32 by a mean of"
    if found > bound:
        raise UserError(
            f"check_logits (True): log-probabilities {what} {found:.3g}, and {bound:.3g} is allowed: the run would "
            f"train another model than load_hf ({run.config.weights.load_hf}) is elsewhere; see what psft doctor "
            "--model says of it, and if the difference stays in fp32 (bf16 false) and on one rank"
        )
    log.info("logits check: log-probabilities %s %.2g (up to %.2g)", what, found, bound)


def _ask_transformers(folder: Path, tokens: NDArray[np.int32], vocab_size: int, *, with_bf16: bool) -> _Expected:
    needed, available = transformers_model.needed_bytes(folder, "load_hf") / 2**30, available_bytes() / 2**30
    if needed > available:
        raise UserError(
            f"check_logits (True) needs {needed:.3g} GiB of rank 0's host memory for transformers' model, which has "
            f"{available:.3g} GiB left; remove it, or ask psft doctor --model on a machine with more"
        )
    model = transformers_model.load_model(folder)
    rows = model.get_input_embeddings().num_embeddings
    if rows != vocab_size:
        raise UserError(
            f"check_logits (True): the model has {vocab_size} rows of its vocabulary with resize_vocab, and {rows} in "
            "transformers, so that they cannot be compared; remove one of the two"
        )
    ids = torch.from_numpy(tokens.astype(np.int64))[None]

    def of_labels() -> Tensor:
        return transformers_model.log_probs(model, ids[:, :-1])[0].gather(1, ids[0, 1:, None])[:, 0]

    exact, gap = of_labels(), None
    if with_bf16:
        model.to(torch.bfloat16)
        gap = float((of_labels() - exact).abs().mean())
    return _Expected(log_probs=exact.numpy(), bf16_gap=gap)


def _measure(
    run: Run, inputs: Inputs, platform: Platform, tokens: NDArray[np.int32], expected: NDArray[np.float32]
) -> tuple[float, float]:
    """The largest of `differences`, and the mean of absolute ones in nats, of the data-parallel replica where it is
    largest; collective."""
    parallel, pipeline = run.parallel, run.pipeline
    if run.base is not None:
        pipeline = replace(pipeline, without_adapters=True)
    layout = _row(len(expected), run.config, parallel, is_gpu=platform.is_gpu)
    example = Example(tokens=tokens, label_mask=np.ones(len(tokens), dtype=np.bool_))
    batch = fill_rows([example], layout, inputs.tokenizer.pad_token_id or 0)
    pipeline.gather_parameters()
    # An interleaved pipeline wants a multiple of its stages.
    scored = pipeline.score([batch] * parallel.pipeline_size)
    sums = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    if scored:
        ours, theirs = scored[0].log_probs.cpu(), torch.from_numpy(layout.fill([expected], padding=0.0))
        relative = differences(ours, theirs)
        absolute = (ours - theirs).abs().nan_to_num(nan=torch.inf)
        sums = torch.stack([relative.max(), absolute.sum()]).double().to(parallel.device)
    total = sum_over_context(sums[1:].clone(), parallel) / len(expected)
    found = torch.cat([sums[:1], total])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    largest, mean = found.tolist()
    return largest, mean


def _row(length: int, config: Config, parallel: Parallel, *, is_gpu: bool) -> RowLayout:
    """A row of that many tokens as the run's own are, as short as the layout lets it be."""
    size, multiple = parallel.context_size, row_multiple(config, on_gpu=is_gpu)
    multiple = lcm(aligned_length(1, size), size * multiple)
    seq_length = -(-length // multiple) * multiple
    if config.data.packing or size > 1:
        return packed_row([length], seq_length=seq_length, context_rank=parallel.context_rank, context_size=size)
    return separate_rows(1, rows=1, seq_length=seq_length)
