"""Whether the model that a run would build from a Hugging Face folder is the one that transformers builds from it.

Both say how probable every token of the vocabulary is after a few random ones, one model after the other, so that
memory holds one at a time, in fp32 on the CPU: there the same maths rounds alike, where on a GPU kernels would not.
`python -m megatron_psft.diagnostics.logits FOLDER` prints a `Comparison` as JSON: `psft doctor` asks a process of its
own, which sees no GPU and whose end, say for lack of memory, is not that of the command.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.schema import Config
from megatron_psft.diagnostics import transformers_model
from megatron_psft.distributed.device import Platform, prepare
from megatron_psft.distributed.grid import initialize_parallel, process_group
from megatron_psft.distributed.orphans import signal_with_parent
from megatron_psft.errors import UserError
from megatron_psft.sources.choice import choose_source
from megatron_psft.sources.source import ModelSource

BOUND = 1e-4
"""What `differences` may be in fp32. On SmolLM2-135M, with logits of size 34, they come to 1.2e-5 between two ways in
which transformers computes attention."""

_ROWS, _ROW_TOKENS = 4, 64


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the two models are apart."""

    largest: float
    """Of `differences`."""
    positions: int
    """Tokens after which they were asked."""
    agreeing: int
    """Positions at which no difference is above `BOUND`."""
    vocab_size: int


def differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Differences of log-probabilities; relative to one below -1, as rounding grows with what is rounded. What is no
    number differs infinitely."""
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).nan_to_num(nan=torch.inf)


def compare(folder: Path) -> Comparison:
    """Builds and asks both models; this process sees no GPU from then on. Raises UserError for a folder that holds no
    model that can be trained, or whose weights are not its own."""
    platform = prepare("cpu", 0)
    config = Config(weights=WeightsConfig(load_hf=str(folder), save=""), data=DataConfig(data=("",)))
    source = choose_source(folder, "auto")
    source.check(config)
    source = source.with_weights(folder, config)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.vocab_size, (_ROWS, _ROW_TOKENS), generator=draw)
    ours = own_log_probs(source, config, platform, tokens)
    theirs = transformers_model.log_probs(transformers_model.load_model(folder), tokens)
    if ours.shape != theirs.shape:
        raise UserError(
            f"{folder} has {ours.shape[-1]} rows of its vocabulary here, {theirs.shape[-1]} in transformers"
        )
    worst = differences(ours, theirs).amax(dim=-1)
    return Comparison(
        largest=float(worst.max()),
        positions=worst.numel(),
        agreeing=int((worst <= BOUND).sum()),
        vocab_size=source.vocab_size,
    )


@torch.no_grad()
def own_log_probs(source: ModelSource, config: Config, platform: Platform, tokens: Tensor) -> Tensor:
    """As `transformers_model.log_probs`, of the model that `source` builds and fills, in a world of one process."""
    with process_group(platform, 1):
        parallel = initialize_parallel(config.parallel, virtual_size=None, seed=0, device=platform.device)
        model = source.build_chunk(config, source.transformer_config(config, platform), platform, parallel, 0)
        source.fill([model], parallel)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: Tensor = model(tokens, positions, None)
        return logits[..., : source.vocab_size].float().log_softmax(dim=-1)


def main(argv: Sequence[str]) -> None:
    signal_with_parent(signal.SIGKILL)
    try:
        answer = asdict(compare(Path(argv[0])))
    except UserError as error:
        answer = {"mistake": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
