"""The old policy of a Megatron-Bridge run, as a callback: scores a window of global batches ahead of training."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_psft.distributed.collective import on_every_rank
from megatron_psft.nemo.batches import BatchesAhead
from megatron_psft.nemo.config import PsftConfig
from megatron_psft.nemo.forward_step import PsftForwardStep
from megatron_psft.nemo.labels import ScoredLabels
from megatron_psft.nemo.window_files import OfSteps, ScoredWindow, WindowFiles
from megatron_psft.scoring.agreement import ScoringAgreement
from megatron_psft.scoring.old_policy import OldPolicyWindow, Scores


class OldPolicyCallback(Callback):
    """Makes the old policy the current one every `old_policy_interval` steps, before the step is made.

    One forward-only pass, sharded like training, scores the global batches of the rest of the window. What it says of
    the labels lies in host memory of the ranks of the last pipeline stage, beside the labels' ids, and is never
    gathered. With `checkpoint.save` it also lies there, so that a run resumes within a window.

    After the first sync of a start the pass also scores the step's own batch, for the scoring check: `scoring_gap_max`
    and `scoring_gap_p99` go to Bridge's TensorBoard and W&B loggers beside `window_step`, as docs/metrics.md has them.
    """

    def __init__(self, config: PsftConfig, forward_step: PsftForwardStep) -> None:
        """`forward_step` is the one that Bridge trains with, made from the same settings."""
        self._config = config
        self._forward_step = forward_step
        self._window: OldPolicyWindow | None = None
        self._label_ids: OfSteps = {}
        """Which labels the window's scores are of, in host memory."""
        self._files: WindowFiles | None = None
        self._agreement: ScoringAgreement | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Opens the loader, and takes up the window that a checkpoint is from; collective."""
        state, chunks = context.state, context.model
        step, train_iters = state.train_state.step, state.cfg.train.train_iters
        groups = get_pg_collection(chunks)
        self._score_step = partial(self._score, context, BatchesAhead(state, chunks, groups), groups)
        self._agreement = _agreement(self._config, chunks, groups)
        self._window = OldPolicyWindow(
            self._config.objective_config,
            train_iters=train_iters,
            score=self._score_step,
            show_progress=dist.get_rank() == 0,
        )
        sizes = (dist.get_world_size(), groups.tp.size(), groups.pp.size(), groups.cp.size())
        layout = (*sizes, state.cfg.train.micro_batch_size)
        self._files = WindowFiles(layout=layout, interval=self._window.interval, rank=dist.get_rank())
        if step in self._window.window_of(step)[1:]:
            load = Path(state.cfg.checkpoint.load)
            scores, self._label_ids = on_every_rank(partial(self._files.read, load, step))
            self._window.load_state(scores)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Syncs if the step begins a window, and says what it trains with; collective."""
        assert self._window is not None
        assert self._files is not None
        config, step = context.state.cfg, context.state.train_state.step
        if self._window.syncs_before(step):
            if config.ddp.overlap_param_gather:
                # The last update reaches other ranks only during the next forward pass, driven by hooks.
                assert context.optimizer is not None
                context.optimizer.prepare_model_params_for_param_sync()
                for chunk in context.model:
                    chunk.start_param_sync(force_sync=True)
            if self._agreement is not None and self._agreement.is_due:
                self._agreement.expect([log_probs.cpu() for log_probs in self._score_step(step)])
            self._label_ids.clear()
            self._window.sync(step)
            if config.checkpoint.save is not None:
                window = ScoredWindow(self._window.state(step), self._label_ids)
                self._files.write(Path(config.checkpoint.save), step, window)
        old_policy, scored = self._window.at(step), None
        if isinstance(old_policy, Scores):
            pairs = zip(self._label_ids[step], old_policy.log_probs, strict=True)
            scored = [ScoredLabels(*pair) for pair in pairs]
        observe = None if self._agreement is None else self._agreement.observe
        self._forward_step.begin_step(self._config.objective_at(step), scored, observe)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Reports what was measured of the step, before a checkpoint has it; collective.

        Raises:
            UserError: on every rank, where the pass and training disagree by more than the clip's width.
        """
        assert self._window is not None
        step = context.state.train_state.step
        values = {} if self._agreement is None else self._agreement.report(step + 1)
        window = self._window.window_of(step)
        if step in window:
            values["window_step"] = step - window[0]
        _write(context.state, step + 1, values)

    def _score(
        self, context: CallbackContext, batches: BatchesAhead, groups: ProcessGroupCollection, step: int
    ) -> list[Tensor]:
        """As `ScoreStep` has it; keeps the ids of the labels as well."""
        state, chunks = context.state, context.model
        model_config = get_model_config(chunks[0])
        micro_batches, seq_length = batches.micro_batches(step)
        run_schedule = get_forward_backward_func(
            pp_size=groups.pp.size(), vp_size=state.cfg.model.virtual_pipeline_model_parallel_size
        )
        # All parameters are current, and the schedule must not gather them as it does while training.
        param_sync_func, model_config.param_sync_func = model_config.param_sync_func, None
        with torch.no_grad():
            scored: list[ScoredLabels] = run_schedule(
                forward_step_func=partial(self._forward_step.score, state),
                data_iterator=micro_batches,
                model=chunks,
                num_microbatches=get_num_microbatches(),
                seq_length=seq_length,
                decoder_seq_length=seq_length,
                micro_batch_size=state.cfg.train.micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
                p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=model_config),
                pg_collection=groups,
            )
        model_config.param_sync_func = param_sync_func
        self._label_ids[step] = [labels.ids.to("cpu", torch.int32) for labels in scored]
        return [labels.log_probs for labels in scored]


@dataclass(frozen=True, kw_only=True)
class _Place:
    device: torch.device
    reports_sums: bool


def _agreement(
    config: PsftConfig, chunks: list[torch.nn.Module], groups: ProcessGroupCollection
) -> ScoringAgreement | None:
    """As the trainer has it; None where every ratio is 1."""
    objective, model_config = config.objective_config, get_model_config(chunks[0])
    if not objective.needs_old_policy or objective.old_policy_interval == 1:
        return None
    is_last_stage = groups.pp.rank() == groups.pp.size() - 1
    precision = "bf16" if model_config.bf16 or model_config.fp16 else "fp32"
    return ScoringAgreement(
        precision="fp8" if model_config.fp8 else precision,
        clip_ratio_high=objective.clip_ratio_high,
        parallel=_Place(
            device=next(chunks[0].parameters()).device, reports_sums=is_last_stage and groups.tp.rank() == 0
        ),
        after_every_sync=bool(model_config.fp8),
    )


def _write(state: GlobalState, step: int, values: dict[str, float]) -> None:
    """To the loggers themselves: what Bridge logs of a step it averages over those without a value, too."""
    if state.tensorboard_logger is not None:
        for name, value in values.items():
            state.tensorboard_logger.add_scalar(name, value, step)
    if state.wandb_logger is not None:
        state.wandb_logger.log(values, step)
