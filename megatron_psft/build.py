"""Turns a configuration into a run that is ready to train, and a trained run into a Hugging Face folder."""

import logging
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_psft import __version__
from megatron_psft.checkpoint import Identity, TrainState, find_checkpoint, load_checkpoint, read_step
from megatron_psft.config import Config, config_to_yaml, validate_train_iters
from megatron_psft.data.chat import Example, label_runs
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.loader import BatchLoader
from megatron_psft.errors import UserError
from megatron_psft.hf import export, hub
from megatron_psft.hf.weights import RandomWeights, SafetensorsFolder, fill_parameters
from megatron_psft.model.gpt import build_model, check_layout, padded_vocab_size, virtual_size
from megatron_psft.model.shape import ModelShape, read_shape
from megatron_psft.old_policy import OldPolicyWindow
from megatron_psft.optimizer import build_optimizer, build_scheduler
from megatron_psft.parallel import Parallel, initialize_parallel, together
from megatron_psft.platform import Platform
from megatron_psft.schedule import Schedule
from megatron_psft.trainer import Run, train

log = logging.getLogger(__name__)

_SHOWN_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a run reads, checked, before anything is built."""

    model_folder: Path
    tokenizer_folder: Path
    shape: ModelShape
    weights: SafetensorsFolder | RandomWeights
    dataset: TokenizedDataset
    valid_dataset: TokenizedDataset | None
    tokenizer: PreTrainedTokenizerBase
    train_iters: int


def run(config: Config, platform: Platform, rank: int) -> None:
    """Trains as `config` says, on all ranks of the default process group.

    Raises:
        UserError: on every rank alike.
    """
    inputs = together(lambda: read_inputs(config, show_progress=rank == 0))
    _describe(inputs, platform)
    ready = build_run(config, inputs, platform)
    _write_config(config, ready.parallel)
    train(ready)
    if config.weights.export_hf is not None:
        ready.schedule.gather_parameters()
        export.export(
            ready.state.chunks,
            Path(config.weights.export_hf),
            shape=inputs.shape,
            dtype=torch.bfloat16 if config.precision.bf16 else inputs.weights.dtype,
            model_folder=inputs.model_folder,
            tokenizer_folder=inputs.tokenizer_folder,
            parallel=ready.parallel,
        )
        log.info("exported %s", config.weights.export_hf)


def read_inputs(config: Config, *, show_progress: bool) -> Inputs:
    """Reads model description, tokenizer and data.

    Raises:
        UserError: anything that is missing, broken or does not fit together.
    """
    model_folder = hub.model_folder("load_hf", config.weights.load_hf, with_weights=not config.weights.random_init)
    tokenizer_folder = hub.model_folder("tokenizer", config.weights.tokenizer_source, with_weights=False)
    shape = read_shape(model_folder)
    check_layout(shape, config)
    _prepare_folders(config, model_folder, tokenizer_folder)
    random_init = config.weights.random_init
    weights = RandomWeights(shape, config.batch.seed) if random_init else SafetensorsFolder(model_folder, shape)
    tokenizer = _read_tokenizer(tokenizer_folder, shape)
    dataset = _read_dataset(config, config.data.data, tokenizer, show_progress)
    valid = _read_dataset(config, config.data.valid_data, tokenizer, show_progress) if config.data.valid_data else None
    train_iters = config.batch.train_iters
    if train_iters is None:
        assert config.batch.epochs is not None
        train_iters = -(-config.batch.epochs * len(dataset) // config.batch.global_batch_size)
        validate_train_iters(config, train_iters)
    return Inputs(
        model_folder=model_folder,
        tokenizer_folder=tokenizer_folder,
        shape=shape,
        weights=weights,
        dataset=dataset,
        valid_dataset=valid,
        tokenizer=tokenizer,
        train_iters=train_iters,
    )


def build_run(config: Config, inputs: Inputs, platform: Platform) -> Run:
    """Builds model, optimizer and loaders, and fills them from the newest checkpoint or from Hugging Face weights;
    collective."""
    shape = inputs.shape
    parallel = initialize_parallel(
        config.parallel, virtual_size=virtual_size(shape, config), seed=config.batch.seed, device=platform.device
    )
    identity = _identity(config, inputs, parallel)
    checkpoint, first_step = together(lambda: _resume_point(config, identity, inputs.train_iters))
    chunks = build_model(shape, config, platform, parallel)
    if checkpoint is None:
        fill_parameters(chunks, inputs.weights, shape, parallel)
    optimizer = build_optimizer(config, chunks)
    schedule = Schedule(chunks=chunks, device=platform.device, clip_ratio_high=config.objective.clip_ratio_high)
    loader = _loader(config, inputs, inputs.dataset, parallel, is_training=True)
    state = TrainState(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, inputs.train_iters),
        window=_window(config, inputs.train_iters, schedule, loader, show_progress=parallel.is_main),
    )
    valid_loader = None
    if inputs.valid_dataset is not None:
        valid_loader = _loader(config, inputs, inputs.valid_dataset, parallel, is_training=False)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, loader, parallel)
        log.info("resumed from %s, step %d of %d", checkpoint, first_step, inputs.train_iters)
    return Run(
        config=config,
        shape=shape,
        parallel=parallel,
        schedule=schedule,
        state=state,
        loader=loader,
        valid_loader=valid_loader,
        identity=identity,
        first_step=first_step,
        train_iters=inputs.train_iters,
    )


def _window(
    config: Config, train_iters: int, schedule: Schedule, loader: BatchLoader, *, show_progress: bool
) -> OldPolicyWindow:
    objective = config.objective

    def score(step: int) -> list[Tensor]:
        scored = schedule.score(loader.micro_batches(step, objective.old_policy_micro_batch_size))
        # In training's micro-batches, whatever they were scored in.
        return list(torch.cat([stats.log_probs for stats in scored]).split(loader.micro_batch_size)) if scored else []

    interval = train_iters if objective.old_policy_interval == "fixed" else objective.old_policy_interval
    # SFT is warm-up all the way.
    warmup_iters = train_iters if objective.objective == "sft" else objective.sft_warmup_iters
    return OldPolicyWindow(
        interval=interval, warmup_iters=warmup_iters, train_iters=train_iters, score=score, show_progress=show_progress
    )


def _resume_point(config: Config, identity: Identity, train_iters: int) -> tuple[Path | None, int]:
    """The checkpoint to start from, if any, and its completed steps."""
    load = config.weights.load
    checkpoint = find_checkpoint(Path(config.weights.save), None if load is None else Path(load))
    if checkpoint is None:
        return None, 0
    step = read_step(checkpoint, identity)
    if step > train_iters:
        raise UserError(f"train_iters ({train_iters}) must not be below the {step} steps of {checkpoint}; raise it")
    return checkpoint, step


def _identity(config: Config, inputs: Inputs, parallel: Parallel) -> Identity:
    """What must not change between a checkpoint and the run that resumes from it."""
    identity = {f"model {name}": value for name, value in asdict(inputs.shape).items()}
    identity |= {
        "padded vocabulary": padded_vocab_size(inputs.shape.vocab_size, parallel.tensor_size),
        "training data": inputs.dataset.fingerprint(),
        "global_batch_size": config.batch.global_batch_size,
        "shuffle": config.data.shuffle,
        "seed": config.batch.seed,
        "bf16": config.precision.bf16,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
    }
    if config.objective.old_policy_interval == "fixed":
        # Its log-probabilities were computed for these steps, by weights that are gone.
        identity["train_iters"] = inputs.train_iters
    return identity


def _loader(
    config: Config, inputs: Inputs, dataset: TokenizedDataset, parallel: Parallel, *, is_training: bool
) -> BatchLoader:
    return BatchLoader(
        dataset,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=parallel.data_rank,
        data_parallel_size=parallel.data_size,
        shuffle=config.data.shuffle and is_training,
        seed=config.batch.seed,
        wrap=is_training,
        # Sequence parallelism cuts the sequence into equal parts.
        pad_to_multiple_of=parallel.tensor_size if config.parallel.sequence_parallel else 1,
        pad_token_id=inputs.tokenizer.pad_token_id or 0,
    )


def _describe(inputs: Inputs, platform: Platform) -> None:
    """Says what the run computes on and what it trains on, with one record as the model gets it."""
    log.info("%s", platform.describe())
    log.info("training data: %s", inputs.dataset.statistics())
    if inputs.valid_dataset is not None:
        log.info("validation data: %s", inputs.valid_dataset.statistics())
    first = inputs.dataset[0]
    shown = Example(tokens=first.tokens[:_SHOWN_TOKENS], label_mask=first.label_mask[:_SHOWN_TOKENS])
    runs = label_runs(shown, inputs.tokenizer)
    log.info("first record, labels in ⟦⟧:\n%s", "".join(f"⟦{text}⟧" if is_label else text for is_label, text in runs))


def _prepare_folders(config: Config, model_folder: Path, tokenizer_folder: Path) -> None:
    save = Path(config.weights.save)
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"save ({config.weights.save}) must be a folder that can be written: {error.strerror}"
        ) from None
    if config.weights.export_hf is not None:
        inputs = {"save": save, "load_hf": model_folder, "tokenizer": tokenizer_folder}
        export.check_target(Path(config.weights.export_hf), inputs)


def _read_tokenizer(folder: Path, shape: ModelShape) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer ({folder}) must be a folder with a Hugging Face tokenizer: {reason}") from None
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"tokenizer ({folder}) has {len(tokenizer)} tokens, more than the model's vocabulary ({shape.vocab_size}); "
            "name the tokenizer that belongs to the model"
        )
    return tokenizer


def _read_dataset(
    config: Config, paths: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, show_progress: bool
) -> TokenizedDataset:
    data = config.data
    return build_dataset(
        paths,
        tokenizer,
        seq_length=data.seq_length,
        overlong=data.overlong,
        prompt_key=data.prompt_key,
        completion_key=data.completion_key,
        loss_on=data.loss_on,
        skip_bad_records=data.skip_bad_records,
        show_progress=show_progress,
    )


def _write_config(config: Config, parallel: Parallel) -> None:
    if not parallel.is_main:
        return
    libraries = ("megatron-core", "torch", "transformers")
    versions = f"# megatron_psft {__version__}\n" + "".join(f"# {name} {version(name)}\n" for name in libraries)
    (Path(config.weights.save) / "config.yaml").write_text(versions + config_to_yaml(config), encoding="utf-8")
