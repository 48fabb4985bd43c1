"""Trains: one loop for every objective, with the old policy, evaluation and checkpoints around it."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_psft.checkpoint.folders import export_folder
from megatron_psft.checkpoint.saver import Saver
from megatron_psft.config.resume import settings_of
from megatron_psft.distributed.collective import naming_lost_peers, on_every_rank, on_rank_zero
from megatron_psft.distributed.signals import StopRequested, StopSignals
from megatron_psft.metrics import flops
from megatron_psft.metrics.clip_watch import ClipWatch
from megatron_psft.metrics.provenance import versions
from megatron_psft.metrics.reduce import reduce_metrics
from megatron_psft.metrics.run_log import RunLog, line_of_step
from megatron_psft.metrics.trackers import Trackers
from megatron_psft.scoring.batch_nll import with_nll_z
from megatron_psft.scoring.old_policy import objective_at
from megatron_psft.train.assemble import Run, export_model
from megatron_psft.train.evaluate import drift_reached
from megatron_psft.train.optimizer import update
from megatron_psft.train.profile import StepProfiler

log = logging.getLogger(__name__)


def train(run: Run, started_at: float) -> StopRequested | None:
    """Trains from `first_step` to `train_iters` and leaves a checkpoint; collective.

    Args:
        run: ready to train.
        started_at: when the process began, by `time.monotonic()`, in seconds.

    Returns:
        None, or what ended the run early, with its last step completed and saved.
    """
    steps = _Steps(total=run.train_iters, completed=run.first_step, saved=run.first_step)
    deadline = started_at + 60 * (run.config.batch.exit_duration_in_mins or math.inf)
    with (
        StopSignals(run.parallel.device, deadline=deadline) as stop,
        _saver(run) as saver,
        on_every_rank(lambda: _run_log(run)) as run_log,
        _profiler(run) as profiler,
    ):
        try:
            if not steps.all_completed:
                steps.drift_reached = _begin(run, stop, run_log)
            while not steps.are_over:
                stop.check()
                step = steps.completed
                with naming_lost_peers(f"step {step + 1}"):
                    with profiler.watch(step + 1):
                        values = train_step(run, step, between_batches=stop.check, before_update=saver.wait_for_copy)
                    steps.completed += 1
                    if steps.are_due(run.config.data.eval_interval):
                        values |= run.evaluation()
                        steps.drift_reached = drift_reached(values, run.config.data.stop_at_drift)
                if run_log:
                    run_log.record(steps.completed, values)
                saver.poll()
                if steps.are_due(run.config.weights.save_interval) or steps.are_over:
                    save(run, saver, run_log, steps.completed)
                    steps.saved = steps.completed
                if steps.are_due(run.config.weights.export_steps):
                    export_model(run, export_folder(Path(run.config.weights.save), steps.completed))
                steps.say_end_by_drift()
            stop.check()
        except StopRequested as request:
            if steps.saved < steps.completed:
                save(run, saver, run_log, steps.completed)
            if request.signum is not None:
                return request
            return None if steps.are_over else _time_is_up(run, steps, request)
    return None


def _begin(run: Run, stop: StopSignals, run_log: RunLog | None) -> str | None:
    """What comes before the first step of this start: the reference's pass, and of a run that is new an evaluation.

    Returns the drift that has ended the run in an earlier start, if any.
    """
    if run.reference is not None:
        with naming_lost_peers("the reference's pass"):
            run.reference.complete(between_batches=stop.check)
    if run.first_step == 0 and run.evaluation:
        stop.check()
        with naming_lost_peers("the evaluation before the first step"):
            values = run.evaluation.before_training()
        if run_log:
            run_log.record(0, values)
    elif run.evaluation:
        with naming_lost_peers("what the initial model says of drift sets"):
            run.evaluation.complete_start()
    return _drift_before(run)


def _drift_before(run: Run) -> str | None:
    """The drift that has ended the run at the step that it goes on from, which is said. Collective."""
    if run.first_step == 0 or not run.evaluation.drift:
        return None
    line = on_rank_zero(lambda: line_of_step(Path(run.config.weights.save), run.first_step))
    reached = drift_reached(line, run.config.data.stop_at_drift)
    if reached is not None:
        done = (run.first_step, run.train_iters)
        log.warning("WARNING: nothing to do: %s at step %d of %d; raise or remove it to go on", reached, *done)
    return reached


def _time_is_up(run: Run, steps: "_Steps", request: StopRequested) -> StopRequested:
    """Says what `request`, which it returns, has ended."""
    has_progress = steps.completed > run.first_step
    log.log(
        logging.INFO if has_progress else logging.WARNING,
        "%sended after step %d of %d, as exit_duration_in_mins (%g) is over: the same command goes on from there",
        "" if has_progress else "WARNING: no step was completed: ",
        steps.completed,
        steps.total,
        run.config.batch.exit_duration_in_mins,
    )
    return request


@dataclass
class _Steps:
    """How far a run is."""

    total: int
    completed: int
    saved: int
    """Completed steps that are in a checkpoint."""
    drift_reached: str | None = None
    """What says that the model is as far from the initial one as `stop_at_drift`, if it is."""

    @property
    def all_completed(self) -> bool:
        return self.completed >= self.total

    @property
    def are_over(self) -> bool:
        """Whether no step is to come."""
        return self.all_completed or self.drift_reached is not None

    def say_end_by_drift(self) -> None:
        """Says that steps are left out, where the drift ends the run."""
        if self.drift_reached is not None and not self.all_completed:
            done = (self.completed, self.total)
            log.info("ended after step %d of %d: %s; raise or remove it to go on", *done, self.drift_reached)

    def are_due(self, interval: int | None) -> bool:
        """Whether what comes every `interval` steps, if ever, comes after those that are completed."""
        return interval is not None and self.completed % interval == 0


def train_step(
    run: Run,
    step: int,
    *,
    between_batches: Callable[[], None] = lambda: None,
    before_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Makes optimizer step `step` (from 0) and returns its line of metrics.jsonl; collective.

    `between_batches` is called between the batches that a sync scores, before anything has changed, `before_update`
    when weights and optimizer are about to.
    """
    pipeline, state, needs = run.pipeline, run.state, run.config.objective.needs
    with _timer() as total:
        micro_batches = run.loader.micro_batches(step)
        pipeline.zero_grad()
        state.optimizer.zero_grad()
        with _timer() as scoring:
            if state.window.syncs_before(step):
                pipeline.gather_parameters()
                state.window.sync(step, between_batches=between_batches)
                if run.agreement is not None and run.agreement.is_due:
                    run.agreement.expect(state.window.score(step))
            if "nll_z" in needs:
                micro_batches = with_nll_z(micro_batches, pipeline, run.parallel)
        objective = objective_at(run.config.objective, step)
        sums = pipeline.train(micro_batches, state.window.at(step), objective=objective)
        metrics = reduce_metrics(sums, micro_batches, run.parallel, step + 1, needs=needs, sources=pipeline.sources)
        metrics |= {} if run.agreement is None else run.agreement.report(step + 1)
        lr = state.optimizer.param_groups[0]["lr"]
        before_update()
        grad_norm = update(state.optimizer, step + 1, run.parallel.device)
        state.scheduler.step(increment=1)
    window_step = state.window.window_step(step)
    return {
        **metrics,
        **({} if window_step is None else {"window_step": window_step}),
        "grad_norm": grad_norm,
        "lr": lr,
        "step_seconds": total.seconds,
        **({"old_policy_seconds": scoring.seconds} if "old" in needs else {}),
        "tokens_per_second": metrics["tokens"] / total.seconds,
        **_gpu_values(run, step, total.seconds - scoring.seconds),
    }


def save(run: Run, saver: Saver, run_log: RunLog | None, completed_steps: int) -> None:
    """Writes a checkpoint, and the metrics up to it for good; collective."""
    if run_log:
        run_log.sync()
    _write_clipped_tokens(run, completed_steps)
    run.pipeline.gather_parameters()
    saver.save(completed_steps)


def _write_clipped_tokens(run: Run, completed_steps: int) -> None:
    """Before the checkpoint, which holds the same counts; collective."""
    counts, num_tokens = run.state.clipped_tokens, run.config.logging.log_clipped_tokens
    if counts is None:
        return
    assert num_tokens is not None
    counts.gather()
    if run.parallel.is_main:
        folder = Path(run.config.weights.save)
        counts.write(folder, last_step=completed_steps, num_tokens=num_tokens, decode=run.decode)


def _saver(run: Run) -> Saver:
    weights = run.config.weights
    return Saver(
        Path(weights.save),
        run.state,
        run.identity,
        settings_of(run.config),
        run.loader,
        run.parallel,
        keep_last=weights.keep_last,
        in_background=weights.async_save,
        began_with_base=run.began_with_base,
    )


def _profiler(run: Run) -> StepProfiler:
    save, parallel = Path(run.config.weights.save), run.parallel
    return StepProfiler(run.config.logging, save, rank=parallel.rank, device=parallel.device)


def _run_log(run: Run) -> RunLog | nullcontext[None]:
    if not run.parallel.is_main:
        return nullcontext()
    folder, logging = Path(run.config.weights.save), run.config.logging
    description = {**versions(), **settings_of(run.config)}
    first_step = run.first_step + 1
    trackers = Trackers(logging, folder, first_step=first_step, description=description)
    return RunLog(
        folder,
        trackers,
        first_step=first_step,
        train_iters=run.train_iters,
        log_interval=logging.log_interval,
        clip_watch=ClipWatch(run.state.window.window_of),
    )


def _gpu_values(run: Run, step: int, seconds: float) -> dict[str, float]:
    """Throughput of the training pass (forward and backward) and memory, on GPUs only."""
    device = run.parallel.device
    if device.type != "cuda":
        return {}
    passes = flops.passes_of_training(has_adapters=run.config.lora.has_adapters)
    of_step = passes * run.source.forward_flops(run.loader.lengths(step).tolist())
    per_second = of_step / seconds / run.parallel.world_size
    values = {"tflops_per_gpu": per_second / 1e12, "max_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    peak = flops.peak_flops(device)
    return values if peak is None else values | {"mfu": per_second / peak}


class _Timer:
    seconds = 0.0


@contextmanager
def _timer() -> Iterator[_Timer]:
    timer, started = _Timer(), time.perf_counter()
    yield timer
    timer.seconds = time.perf_counter() - started
