"""Megatron-Bridge's fine-tuning loop with PSFT."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.finetune import finetune as bridge_finetune
from megatron.bridge.training.state import GlobalState

from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.diagnostics.out_of_memory import what_was_asked
from megatron_psft.distributed.collective import is_out_of_memory, naming_lost_peers
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.distributed.failure import ending_together
from megatron_psft.distributed.megatron_lines import read_with
from megatron_psft.distributed.orphans import end_with_launcher
from megatron_psft.distributed.rendezvous import Meeting, meet
from megatron_psft.errors import DivergenceError
from megatron_psft.nemo.config import PsftConfigContainer
from megatron_psft.nemo.forward_step import BridgeStep, PsftForwardStep
from megatron_psft.nemo.old_policy import OldPolicyCallback
from megatron_psft.nemo.vision import bridge_step_of, sees, set_right


def finetune(
    config: PsftConfigContainer, bridge_step: BridgeStep | None = None, callbacks: Sequence[Callback] = ()
) -> None:
    """Trains from `config.checkpoint.pretrained_checkpoint`, a Hugging Face folder or a Megatron-Core checkpoint, or
    resumes from `config.checkpoint.load`.

    Args:
        config: from a recipe, or `PsftConfigContainer.of` a recipe of Bridge's.
        bridge_step: Bridge's forward step for the model; if unset, that of text models, or of those with a
            vision part.
        callbacks: further ones.

    A rank of several that fails by itself ends all processes, with an error line and the exit codes of `psft train`:
    once Bridge has aborted its process groups, the others within seconds.

    Raises:
        UserError: on every rank.
        DivergenceError: in a single process.
        SystemExit: as Bridge's loop ends early; 128 plus the signal's number where a signal was the cause, for which
            Bridge has 0.
    """
    prepare_environment()  # for a script that has not, still before CUDA is used
    if bridge_step is None:
        bridge_step = bridge_step_of(config)
    if sees(config):
        set_right(config)
    forward_step = PsftForwardStep(config.psft, bridge_step)
    end_with_launcher()
    end = _EarlyEnd()
    callbacks = [end, OldPolicyCallback(config.psft, forward_step), *callbacks]
    with (
        ending_together(_meet(config)),
        read_with(DataReader),
        end.told_by_code(),
        _explained(),
        naming_lost_peers("training"),
    ):
        bridge_finetune(config, forward_step, callbacks=callbacks)


def _meet(config: PsftConfigContainer) -> Meeting:
    """The ranks that torchrun has started. Any other process, as one of Slurm's that Bridge itself finds the peers of,
    counts as a single one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1
    return meet(int(os.environ.get("RANK", 0)), world_size, config.dist.distributed_timeout_minutes)


_NOT_FINITE = re.compile(r"found (NaN|Inf) in ")
"""Megatron's words for a loss or a gradient norm that is not finite."""


_TAKES_LESS = (
    "lower it by ddp.use_distributed_optimizer, model.recompute_granularity full, optimizer.optimizer_cpu_offload, a "
    "smaller train.micro_batch_size or sequence length, or a larger model.tensor_model_parallel_size with "
    "model.sequence_parallel; psft plan says what the like run of psft train takes"
)


@contextmanager
def _explained() -> Iterator[None]:
    """Bridge raises a bare RuntimeError for divergence, on the rank that meets it, and torch names no setting where
    memory is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _NOT_FINITE.search(str(error)):
            raise DivergenceError(f"{error}; resume from the last checkpoint with a lower lr") from error
        if is_out_of_memory(error):
            raise MemoryError(f"{what_was_asked(error, torch.device('cuda'))}; {_TAKES_LESS}") from error
        raise


class _EarlyEnd(Callback):
    """Whether it was a signal that ended Bridge's loop before its time."""

    def __init__(self) -> None:
        self._state: GlobalState | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        self._state = context.state

    @contextmanager
    def told_by_code(self) -> Iterator[None]:
        """Has a loop that a signal ended exit as processes do that a signal ends."""
        try:
            yield
        except SystemExit as request:
            # There may be none. Its own question to all ranks needs their group, which Bridge has taken down.
            handler = None if self._state is None else self._state.signal_handler
            if request.code == 0 and handler is not None and handler._signal_received:
                raise SystemExit(128 + handler.sig) from None
            raise
