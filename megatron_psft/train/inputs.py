"""Reads and checks everything that a run reads, before anything is built."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_psft.checkpoint.folders import export_folder, step_folders, step_of
from megatron_psft.config.rules import validate_advantages, validate_records, validate_train_iters
from megatron_psft.config.schema import Config
from megatron_psft.data.dataset import TokenizedDataset, beyond_positions, build_dataset
from megatron_psft.data.drift_sets import DriftSet, read_drift_set
from megatron_psft.data.example import Example, label_runs
from megatron_psft.data.given import given_paths
from megatron_psft.data.packing import PackPlan, plan_of
from megatron_psft.data.places import folder_of
from megatron_psft.data.splits import SplitUse
from megatron_psft.data.statistics import describe_packing, describe_passes
from megatron_psft.distributed.collective import on_every_rank, patient_group
from megatron_psft.errors import InfrastructureError, UserError, counted, folder_error
from megatron_psft.hf import folder, hub
from megatron_psft.hf.fingerprint import vocabulary_fingerprint, weights_fingerprint
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.tokenizer import check_rows, needed_rows
from megatron_psft.sources.choice import choose_source
from megatron_psft.sources.source import ModelSource
from megatron_psft.train.exported import side_files_of

log = logging.getLogger(__name__)

_SHOWN_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a run reads, checked, before anything is built."""

    model_folder: Path
    source: ModelSource
    dataset: TokenizedDataset
    plan: PackPlan
    valid_sets: Mapping[str, TokenizedDataset]
    """By name, which is empty for records without one."""
    drift_sets: Mapping[str, DriftSet]
    """As `valid_sets`."""
    tokenizer: PreTrainedTokenizerBase
    train_iters: int
    side_files: SideFiles | None
    """Of an export, if there will be one."""


def read_in_turn(config: Config, rank: int, local_rank: int) -> Inputs:
    """`read_inputs` in the first process of each node, which tokenizes what the cache has not, then in the others,
    which find it there; collective."""
    inputs: Inputs | None = None
    error: UserError | InfrastructureError | None = None
    if local_rank == 0:
        try:
            inputs = read_inputs(config, is_main=rank == 0)
        except (UserError, InfrastructureError) as failure:
            error = failure
    has_failed = _wait_for_all(error is not None)

    def finish() -> Inputs | None:
        if error is not None:
            raise error
        # Where one failed, the others would do its work again, and fail.
        return read_inputs(config, is_main=False) if inputs is None and not has_failed else inputs

    inputs = on_every_rank(finish)
    assert inputs is not None
    _check_same_data(inputs)
    return inputs


def _wait_for_all(has_failed: bool) -> bool:
    """True where any rank has failed. Collective, and not bound to the default group's timeout: to tokenize may take
    hours."""
    flag = torch.tensor([has_failed], dtype=torch.int32, device="cpu")
    with patient_group() as group:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _check_same_data(inputs: Inputs) -> None:
    """Nodes may have copies of their own of the data; raises UserError on all ranks where these differ."""
    mine = [(field, len(dataset), dataset.fingerprint()) for field, dataset in _datasets_of(inputs)]
    found: list[list[tuple[str, int, str]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        for first, other in zip(found[0], theirs, strict=True):
            if first != other:
                field, *counts = first[0], counted(first[1], "record"), counted(other[1], "record")
                raise UserError(
                    f"{field} must be the same on all nodes, but rank 0 has {counts[0]} and rank {rank} has "
                    f"{counts[1]}, or the same number of others; copy the same files to all, or "
                    "give the tokenizer that all have"
                )


def _datasets_of(inputs: Inputs) -> Iterator[tuple[str, TokenizedDataset]]:
    """All that a run reads, each with the setting that names it."""
    yield "data", inputs.dataset
    yield from (("valid_data", valid) for valid in inputs.valid_sets.values())
    yield from (("drift_data", answers.dataset) for answers in inputs.drift_sets.values())


def read_inputs(config: Config, *, is_main: bool) -> Inputs:
    """Reads model description, tokenizer and data; the main process shows its progress, and reads what one has to.

    Raises:
        UserError: anything that is missing, broken or does not fit together.
    """
    model_folder = hub.model_folder("load_hf", config.weights.load_hf, with_weights=config.weights.reads_hf_weights)
    tokenizer_folder = hub.model_folder("tokenizer", config.weights.tokenizer_source, with_weights=False)
    source = choose_source(model_folder, config.weights.model_source)
    own_rows = source.vocab_size
    source.check(config)
    _check_top_k(config, own_rows)
    if config.weights.exports and source.passes_tensors_on:
        model_folder = hub.model_folder("load_hf", config.weights.load_hf, with_weights=True)
        source.check_export(model_folder)
    _prepare_folders(config, model_folder, tokenizer_folder, is_main)
    source = source.with_weights(model_folder, config)
    tokenizer = hub.load_tokenizer(tokenizer_folder)
    if config.weights.resize_vocab:
        source = source.with_rows(needed_rows(tokenizer))
    check_rows(tokenizer, source.vocab_size, can_resize=True)
    drift_sets = _read_drift_sets(config, model_folder, tokenizer, own_rows)
    dataset = _read_dataset(config, "data", config.data.data, tokenizer, is_main)
    valid_sets = {
        name: _read_dataset(config, "valid_data", paths, tokenizer, is_main)
        for name, paths in config.data.valid_sets.items()
    }
    validate_advantages(config, has_advantages=dataset.has_advantages)
    validate_records(config, len(dataset))
    plan = plan_of(dataset.sequence_lengths, config.data, packs_each_step=config.packs_each_step)
    train_iters = config.batch.steps(len(plan))
    assert train_iters is not None
    validate_train_iters(config, train_iters)
    if is_main:
        _check_exports_to_come(config, model_folder, tokenizer_folder, train_iters)
    side_files = None
    if config.weights.exports:
        rows = None if source.vocab_size == own_rows else source.vocab_size
        side_files = side_files_of(config.data, model_folder, tokenizer_folder, tokenizer, dataset, vocab_size=rows)
        if is_main:
            side_files.check()
    return Inputs(
        model_folder=model_folder,
        source=source,
        dataset=dataset,
        plan=plan,
        valid_sets=valid_sets,
        drift_sets=drift_sets,
        tokenizer=tokenizer,
        train_iters=train_iters,
        side_files=side_files,
    )


def describe(inputs: Inputs, config: Config) -> None:
    """Says what the run trains on, with one record as the model gets it."""
    log.info("training data, one epoch, in tokens:\n%s", inputs.dataset.statistics())
    if config.data.packing:
        log.info("%s", describe_packing(inputs.plan, config))
    passes = describe_passes(
        len(inputs.plan),
        config.batch_unit,
        global_batch_size=config.batch.global_batch_size,
        train_iters=inputs.train_iters,
        epochs=config.batch.epochs,
    )
    log.info("%s", passes)
    for name, answers in inputs.drift_sets.items():
        log.info("drift data%s:\n%s", f" {name}" if name else "", answers.dataset.statistics())
    for name, valid in inputs.valid_sets.items():
        log.info("validation data%s:\n%s", f" {name}" if name else "", valid.statistics())
    for field, dataset in _datasets_of(inputs):
        text = beyond_positions(field, dataset, inputs.source.max_positions)
        if text is not None:
            log.warning("%s", text)
    for sequence in inputs.dataset[0].sequences:
        shown = Example(tokens=sequence.tokens[:_SHOWN_TOKENS], label_mask=sequence.label_mask[:_SHOWN_TOKENS])
        runs = label_runs(shown, inputs.tokenizer)
        text = "".join(f"⟦{text}⟧" if is_label else text for is_label, text in runs)
        log.info("first record, labels in ⟦⟧:\n%s", text)


def _check_top_k(config: Config, vocab_size: int) -> None:
    top_k = config.objective.ref_top_k
    if top_k > vocab_size:
        raise UserError(
            f"kl_top_k ({top_k}) must not exceed the {vocab_size} tokens of the model's vocabulary; lower it"
        )


def _prepare_folders(config: Config, model_folder: Path, tokenizer_folder: Path, is_main: bool) -> None:
    save = Path(config.weights.save)
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_error("save", save, error) from None
    if config.weights.export_hf is not None:
        target = Path(config.weights.export_hf)
        folder.check_apart("export_hf", target, _needed_by(config, model_folder, tokenizer_folder))
        folder.check_target("export_hf", target)
        if is_main:
            folder.check_unchanged("export_hf", target)


def _check_exports_to_come(config: Config, model_folder: Path, tokenizer_folder: Path, train_iters: int) -> None:
    """Of `export_interval`. Raises UserError where training would end at one, for what is in its place."""
    save, interval = Path(config.weights.save), config.weights.export_steps
    if interval is None:
        return
    done = max((step_of(folder) for folder in step_folders(save)), default=0)
    for step in range((done // interval + 1) * interval, train_iters + 1, interval):
        target = export_folder(save, step)
        if os.path.lexists(target):
            folder.check_apart("export_interval", target, _needed_by(config, model_folder, tokenizer_folder))
            folder.check_target("export_interval", target)
            folder.check_unchanged("export_interval", target)


def _needed_by(config: Config, model_folder: Path, tokenizer_folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and folders of a run, and the fields that name them."""
    weights, data = config.weights, config.data
    yield from (("save", Path(weights.save)), ("load_hf", model_folder), ("tokenizer", tokenizer_folder))
    for name, path in (("load", weights.load), ("init_from", weights.init_from), ("load_lora", config.lora.load_lora)):
        if path is not None:
            yield name, Path(path)
    yield "data_cache_dir", Path(data.data_cache_dir)
    yield from ((given.field, folder_of(given)) for given in given_paths(data))


def _read_drift_sets(
    config: Config, model_folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> dict[str, DriftSet]:
    sets = config.data.drift_sets
    if not sets:
        return {}
    sampled_from = {"tokenizer": vocabulary_fingerprint(tokenizer)}
    if config.weights.reads_hf_weights and config.weights.load is None:  # else the run starts from other weights
        sampled_from["model"] = weights_fingerprint(model_folder, "load_hf")
    return {
        name: read_drift_set(
            name, paths, sampled_from=sampled_from, vocab_size=vocab_size, seq_length=config.data.seq_length
        )
        for name, paths in sets.items()
    }


def _read_dataset(
    config: Config, field: str, paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, show_progress: bool
) -> TokenizedDataset:
    use: SplitUse = "training" if field == "data" else "other"
    return build_dataset(
        paths,
        tokenizer,
        config.data,
        field=field,
        seed=config.batch.seed,
        show_progress=show_progress,
        are_pairs=config.objective.needs_pairs,
        use=use,
    )
