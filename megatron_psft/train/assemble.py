"""Turns a configuration into a run that is ready to train, and a trained run into a Hugging Face folder."""

import logging
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_psft.checkpoint.find import StartPoint, find_checkpoint, find_weights
from megatron_psft.checkpoint.identity import WEIGHTS_ONLY_STEP, Identity, run_identity, start_identity
from megatron_psft.checkpoint.state import TrainState, load_checkpoint
from megatron_psft.config.resume import settings_of
from megatron_psft.config.schema import Config, ObjectiveConfig
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.dealing import ByTokens
from megatron_psft.data.given import parse_weighted_path
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.packing import PackPlan, plan_of
from megatron_psft.data.source_names import source_names
from megatron_psft.distributed.collective import on_rank_zero
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel, initialize_parallel
from megatron_psft.errors import UserError, counted
from megatron_psft.head.layer import HeadOutput
from megatron_psft.hf.adapter import AdapterBase
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.metrics.clipped_tokens import ClippedTokens
from megatron_psft.model import fp8
from megatron_psft.model.build import build_model
from megatron_psft.objectives.objective import Objective
from megatron_psft.scoring.agreement import ScoringAgreement, precision_of
from megatron_psft.scoring.host_memory import check_host_memory
from megatron_psft.scoring.old_policy import OldPolicyWindow
from megatron_psft.scoring.packs import from_packs, to_packs
from megatron_psft.scoring.reference import FOLDER, START, ReferencePass
from megatron_psft.scoring.top_tokens import num_columns
from megatron_psft.scoring.values import VALUES, RecordValues
from megatron_psft.sources.source import ModelSource
from megatron_psft.train.evaluate import Evaluation
from megatron_psft.train.initial import adapter_base, fill_weights, starts_with_base
from megatron_psft.train.inputs import Inputs
from megatron_psft.train.optimizer import build_optimizer, build_scheduler
from megatron_psft.train.pipeline import LabelledBatch, Observer, Pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, ready to train."""

    config: Config
    source: ModelSource
    parallel: Parallel
    pipeline: Pipeline
    state: TrainState
    agreement: ScoringAgreement | None
    """Of the old policy's pass and training; None where every ratio is 1."""
    loader: BatchLoader
    evaluation: Evaluation
    reference: ReferencePass | None
    """What the training loader's `ref_log_probs` come from, where the objective needs them."""
    base: AdapterBase | None
    """The model beside which adapters are trained; None where the whole model is."""
    began_with_base: bool
    """As in `StartPoint`."""
    identity: Identity
    decode: Callable[[int], str]
    """A token's text from its id."""
    start: StartPoint | None
    """The checkpoint that the run goes on from, or whose weights it starts from; None for Hugging Face weights."""
    first_step: int
    """Steps that were completed before, in an earlier process."""
    train_iters: int
    side_files: SideFiles | None
    export_dtype: torch.dtype


def build_run(config: Config, inputs: Inputs, platform: Platform) -> Run:
    """Builds model, optimizer and loaders, and fills them from the newest checkpoint or from Hugging Face weights;
    collective."""
    source = inputs.source
    parallel = initialize_parallel(
        config.parallel, virtual_size=source.virtual_size(config), seed=config.batch.seed, device=platform.device
    )
    base = adapter_base(config, inputs)
    identity = run_identity(
        config,
        source.identity(parallel.tensor_size),
        data_fingerprint=inputs.dataset.fingerprint(),
        train_iters=inputs.train_iters,
        base=None if base is None else base.weights,
    )
    start = _start_point(config, source, identity, inputs.train_iters, base)
    first_step = 0 if start is None else start.step
    chunks = build_model(source, config, platform, parallel)
    fill_weights(chunks, config, inputs, start, base, parallel)
    optimizer = build_optimizer(config, chunks)
    clipped_tokens = _clipped_tokens(config, source.vocab_size, first_step, parallel)
    agreement = _scoring_agreement(config, parallel)
    observers = _observers(config.objective, clipped_tokens, agreement)
    pipeline = Pipeline(chunks=chunks, parallel=parallel, observers=observers, sources=_sources(config))
    loader = _loader(config, inputs, inputs.dataset, inputs.plan, parallel, is_training=True)
    began_with_base = base is not None and starts_with_base(config, start)
    initial = replace(pipeline, without_adapters=True) if began_with_base else None
    reference = _reference(config, inputs, pipeline, initial, parallel, identity, start)
    state = TrainState(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, inputs.train_iters),
        window=_window(config, inputs.train_iters, pipeline, loader, parallel),
        clipped_tokens=clipped_tokens,
    )
    if start is not None and first_step != WEIGHTS_ONLY_STEP:
        planned_lr = load_checkpoint(start.checkpoint, state, loader, parallel)
        _describe_resumption(start, inputs.train_iters, planned_lr, state.optimizer.param_groups[0]["lr"])
    return Run(
        config=config,
        source=source,
        parallel=parallel,
        pipeline=pipeline,
        state=state,
        agreement=agreement,
        loader=loader if reference is None else loader.with_ref_log_probs(reference.values, reference.values.columns),
        reference=reference,
        evaluation=_evaluation(config, inputs, pipeline, initial, parallel),
        base=base,
        began_with_base=began_with_base,
        identity=identity,
        decode=lambda token_id: str(inputs.tokenizer.decode([token_id])),
        start=start,
        first_step=first_step,
        train_iters=inputs.train_iters,
        side_files=inputs.side_files,
        export_dtype=torch.bfloat16 if config.precision.bf16 else source.dtype,
    )


def export_model(run: Run, target: Path) -> None:
    """Writes the model as it is; collective. Raises UserError, on all ranks, where `target` cannot be written."""
    assert run.side_files is not None, "the run was told that it exports"
    run.pipeline.gather_parameters()
    lora, chunks = run.config.lora, run.state.chunks
    options: dict[str, Any] = {"dtype": run.export_dtype, "parallel": run.parallel}
    if run.base is not None and not lora.lora_merge:
        run.source.adapters.export(chunks, target, lora=lora, base=run.base, **options)
    else:
        merged = lora if lora.has_adapters else None
        run.source.export(chunks, target, side_files=run.side_files, merged=merged, **options)
    log.info("exported %s", target)
    if run.base is not None and run.base.name is None and not lora.lora_merge:
        command = shlex.join(
            ["psft", "convert", "--from-megatron", str(run.config.weights.init_from), "--to-hf", "DIR"]
        )
        log.info(
            "the adapter goes with the weights that the run started from, which peft reads once written: %s", command
        )


def _clipped_tokens(config: Config, vocab_size: int, first_step: int, parallel: Parallel) -> ClippedTokens | None:
    if config.logging.log_clipped_tokens is None:
        return None
    return ClippedTokens(vocab_size=vocab_size, first_step=first_step + 1, parallel=parallel)


def _scoring_agreement(config: Config, parallel: Parallel) -> ScoringAgreement | None:
    objective = config.objective
    if not objective.needs_old_policy or objective.old_policy_interval == 1:
        return None
    precision = precision_of(config.precision)
    return ScoringAgreement(
        precision=precision,
        clip_ratio_high=objective.clip_ratio_high,
        parallel=parallel,
        # What fp8 makes of activations depends on their scales, which change as training goes on.
        after_every_sync=config.logging.check_scoring or precision == "fp8",
    )


def _sources(config: Config) -> Sequence[str]:
    """Names of the training set's sources, where it has several."""
    names = source_names([parse_weighted_path(path, field="data").given.path for path in config.data.data])
    return names if len(names) > 1 else ()


def _observers(
    config: ObjectiveConfig, clipped_tokens: ClippedTokens | None, agreement: ScoringAgreement | None
) -> list[Observer]:
    counting = [] if clipped_tokens is None else [_counting(clipped_tokens, config)]
    return counting if agreement is None else [*counting, agreement.observe]


def _counting(clipped_tokens: ClippedTokens, config: ObjectiveConfig) -> Observer:
    """Counts the label tokens that have no gradient."""
    objective = Objective(config=config)

    def count(batch: LabelledBatch, output: HeadOutput) -> None:
        given = batch.given
        if given.old_log_probs is not None:
            clipped_tokens.add(batch.label_ids, objective.is_clipped(output.stats.log_probs, given))

    return count


def _window(
    config: Config, train_iters: int, pipeline: Pipeline, loader: BatchLoader, parallel: Parallel
) -> OldPolicyWindow:
    def prepare(steps: Sequence[int]) -> None:
        kept = sum(loader.positions_per_rank(step) for step in steps) * torch.float32.itemsize
        check_host_memory(kept, len(steps), parallel)

    size = config.objective.old_policy_micro_batch_size

    def score(step: int) -> list[Tensor]:
        scored = [stats.log_probs for stats in pipeline.score_labels(loader.micro_batches(step, size))]
        if not scored or size in (None, loader.micro_batch_size):
            return scored
        return from_packs(loader, step, to_packs(loader, step, scored, size))

    return OldPolicyWindow(
        config.objective, train_iters=train_iters, score=score, prepare=prepare, show_progress=parallel.is_main
    )


def _reference(
    config: Config,
    inputs: Inputs,
    pipeline: Pipeline,
    initial: Pipeline | None,
    parallel: Parallel,
    identity: Identity,
    start: StartPoint | None,
) -> ReferencePass | None:
    """`initial` is the model at the start where it is at hand however far the run is."""
    if not config.objective.needs_reference:
        return None
    save, weights, top_k = Path(config.weights.save), config.weights, config.objective.ref_top_k
    has_begun = initial is None and start is not None and start.resumes(save)
    start_sum = None
    if initial is None and not has_begun:  # of `initial` the identity tells already
        checkpoint, adapter = None if start is None else start.checkpoint, config.lora.load_lora
        seed = config.batch.seed if weights.random_init else None
        start_sum = on_rank_zero(
            lambda: start_identity(checkpoint, inputs.model_folder, seed, None if adapter is None else Path(adapter))
        )
    folder = Path(weights.load_hf)
    return ReferencePass(
        folder=save / FOLDER,
        values=RecordValues(save / FOLDER / VALUES, inputs.plan.lengths, columns=num_columns(top_k)),
        policy=initial or pipeline,
        loader=_loader(config, inputs, inputs.dataset, inputs.plan, parallel, is_training=False),
        parallel=parallel,
        identity={
            **identity,
            "load_hf": str(folder.resolve() if folder.is_dir() else folder),
            "kl_top_k": top_k or None,
            START: start_sum,
        },
        top_k=top_k,
        has_begun=has_begun,
    )


def _start_point(
    config: Config, source: ModelSource, identity: Identity, train_iters: int, base: AdapterBase | None
) -> StartPoint | None:
    """The checkpoint to start from, if any; collective."""
    save, load, init_from = config.weights.save, config.weights.load, config.weights.init_from
    start = find_checkpoint(Path(save), None if load is None else Path(load), identity, settings_of(config))
    if start is None and init_from is not None:
        known = None if base is None else base.checkpoint
        return known or find_weights(Path(init_from), source.weights_identity)
    if start is not None and start.step == WEIGHTS_ONLY_STEP and base is not None:
        raise UserError(f"load ({load}) holds weights alone, which adapters are put beside with --init-from; use that")
    if start is not None and start.step > train_iters:
        raise UserError(
            f"train_iters ({train_iters}) must not be below the {counted(start.step, 'step')} of {start.checkpoint}; "
            "raise it"
        )
    return start


def _describe_resumption(start: StartPoint, train_iters: int, planned_lr: float, lr: float) -> None:
    """Says where the run goes on, and what is not as it was."""
    log.info("resumed from %s, step %d of %d", start.checkpoint, start.step, train_iters)
    if start.step == train_iters:
        return  # nothing that has changed will count
    if start.not_compared is not None:
        log.info("%s", start.not_compared)
    for change in start.changes:
        log.info("changed since the checkpoint: %s", change)
    if not math.isclose(lr, planned_lr, rel_tol=1e-6):
        log.info("learning rate of step %d: %.4g, and %.4g by the earlier schedule", start.step + 1, lr, planned_lr)


def _evaluation(
    config: Config, inputs: Inputs, pipeline: Pipeline, initial: Pipeline | None, parallel: Parallel
) -> Evaluation:
    def loader(dataset: TokenizedDataset) -> BatchLoader:
        plan = plan_of(dataset.sequence_lengths, config.data, packs_each_step=config.packs_each_step)
        return _loader(config, inputs, dataset, plan, parallel, is_training=False)

    return Evaluation(
        valid={name: loader(dataset) for name, dataset in inputs.valid_sets.items()},
        drift={name: (answers, loader(answers.dataset)) for name, answers in inputs.drift_sets.items()},
        eval_iters=config.data.eval_iters,
        pipeline=pipeline,
        initial=initial,
        parallel=parallel,
        folder=Path(config.weights.save),
    )


def _loader(
    config: Config,
    inputs: Inputs,
    dataset: TokenizedDataset,
    plan: PackPlan,
    parallel: Parallel,
    *,
    is_training: bool,
) -> BatchLoader:
    return BatchLoader(
        dataset,
        plan,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        shard=Shard(
            data_rank=parallel.data_rank,
            data_size=parallel.data_size,
            context_rank=parallel.context_rank,
            context_size=parallel.context_size,
            by_tokens=ByTokens.of(parallel) if config.packs_each_step else None,
        ),
        shuffle_seed=config.batch.seed if config.data.shuffle and is_training else None,
        one_row=config.data.packing or parallel.context_size > 1,
        wrap=is_training,
        pad_to_multiple_of=row_multiple(config, on_gpu=parallel.device.type == "cuda"),
        pad_token_id=inputs.tokenizer.pad_token_id or 0,
    )


def row_multiple(config: Config, *, on_gpu: bool) -> int:
    """What the tokens of a row on one rank are a multiple of."""
    # Sequence parallelism cuts the sequence into equal parts.
    multiple = fp8.row_multiple(config.precision)
    multiple *= config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    if not on_gpu or config.data.packing:
        return multiple
    # cuDNN builds a graph for each length of rows that are not packed, and keeps it: 32 lengths are enough.
    return math.lcm(multiple, 2 ** int(math.log2(min(max(config.data.seq_length // 32, 1), 256))))
