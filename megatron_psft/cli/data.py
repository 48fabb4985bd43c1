"""Prints what a training step gets: records decoded, label tokens marked, and the statistics of the data; or what the
cache of tokenized data holds.

Takes the flags, or the config.yaml, of the training run; `--help` has examples.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.paths import PathText
from megatron_psft.config.rules import validate_records
from megatron_psft.config.schema import Config
from megatron_psft.data.places import check_places
from megatron_psft.errors import UserError, counted

if TYPE_CHECKING:  # they take seconds to import, and `--help` answers at once
    from transformers import PreTrainedTokenizerBase

    from megatron_psft.data.cache_folders import CacheFolder
    from megatron_psft.data.dataset import TokenizedDataset
    from megatron_psft.data.example import Example
    from megatron_psft.data.loader import BatchLoader
    from megatron_psft.data.micro_batch import MicroBatch
    from megatron_psft.data.packing import PackPlan

EXAMPLES = """examples:
  the first rows of a run, before or after it:
    psft data --config runs/first/config.yaml
    psft data --tokenizer Qwen/Qwen2.5-7B-Instruct --data train.jsonl more.parquet=0.3
  row by row, without shuffling, the ids, positions and labels of each token:
    psft data --tokenizer DIR --data train.jsonl --no-shuffle --rows 1 --tokens
  into a pager, in colour:
    psft data --tokenizer DIR --data train.jsonl --color always | less -R
  what the cache of tokenized data holds, and room in it:
    psft data --cache list
    psft data --cache prune --older-than-days 30

Flags that say how to train, and not on what, are taken so that a training command can be repeated; they change nothing
here. In place of colour, ⟦ ⟧ enclose label tokens."""

GREEN, RESET = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class ShownWeights(WeightsConfig):
    """Where the tokenizer comes from. No weights are read."""

    load_hf: PathText = ""
    """Hugging Face folder or hub ID; its tokenizer is used where `tokenizer` is absent. Where it is here, records
    are told that are longer than its model was made for."""
    save: PathText = ""
    """Run folder of the training command; nothing is written here."""


@dataclass(frozen=True, kw_only=True)
class ShownData(DataConfig):
    """What is trained on; only `cache` does without `data`."""

    data: tuple[PathText, ...] = ("",)
    """Records of the training command."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache of tokenized data, `data_cache_dir`, instead of rows."""

    cache: Literal["list", "prune"] | None = None
    """list: print each folder of the cache with its size, the days since its last use, and its source. prune: remove
    those whose source has changed or is gone, and what was left unfinished. A folder that a run uses stays."""
    older_than_days: int | None = None
    """prune: also remove folders that were not used for this many days."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "older_than_days")
        if self.older_than_days is not None and self.cache != "prune":
            raise UserError(f"older_than_days ({self.older_than_days}) has no effect without --cache prune; remove it")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What to print."""

    rows: int = 4
    """Rows of the global batch to print."""
    step: int = 1
    """Optimizer step, from 1, whose global batch is shown."""
    tokens: bool = False
    """Print a line per token with its position, id and label instead of the text."""
    color: Literal["auto", "always", "never"] = "auto"
    """Green label tokens: on a terminal only, always, or never."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rows", "step")


@dataclass(frozen=True, kw_only=True)
class ShowDataConfig(Config):
    """The run's configuration, and what to show of its data."""

    weights: ShownWeights = ShownWeights()
    data: ShownData = ShownData()
    show: ShowConfig = ShowConfig()
    cache: CacheConfig = CacheConfig()


def main(argv: Sequence[str]) -> int:
    """Prints to stdout and returns the exit code: 0, or 2 after a user's mistake."""
    configure_output()
    try:
        return run_command(ShowDataConfig, run, argv, prog="psft data", epilog=EXAMPLES)
    except BrokenPipeError:  # the pager was left
        sys.stderr.close()
        return 0


def run(config: ShowDataConfig) -> None:
    """Raises UserError for what training would refuse, and for a cache that cannot be changed."""
    if config.cache.cache is None:
        show_data(config)
        return
    root = Path(config.data.data_cache_dir)
    try:
        if config.cache.cache == "list":
            list_cache(root)
        else:
            prune_cache(root, config.cache.older_than_days)
    except OSError as error:
        raise UserError(f"data_cache_dir ({root}) cannot be read or changed: {error}; check its permissions") from None


def list_cache(root: Path) -> None:
    """Prints a line per folder, the longest unused first, and the sum."""
    from megatron_psft.data.cache_folders import cache_folders

    folders = cache_folders(root)
    for folder in folders:
        print(describe_folder(folder))
    print(f"{counted(len(folders), 'folder')} in {root}, {sum(folder.size for folder in folders) / 2**30:.2f} GiB")


def prune_cache(root: Path, older_than_days: int | None) -> None:
    """Removes, with a line for each folder, and prints the sum."""
    from megatron_psft.data.cache_folders import cache_folders, remove, to_prune

    removed = removed_bytes = 0
    folders = cache_folders(root)
    for folder in to_prune(folders, older_than_days):
        if remove(folder):
            removed, removed_bytes = removed + 1, removed_bytes + folder.size
            print(f"removed {describe_folder(folder)}")
        else:
            print(f"in use  {describe_folder(folder)}")
    print(f"removed {removed} of {counted(len(folders), 'folder')} in {root}, {removed_bytes / 2**30:.2f} GiB")


def describe_folder(folder: "CacheFolder") -> str:
    first, others = next(iter(folder.sources), ""), len(folder.sources) - 1
    source = f"{first} and {others} more" if others > 0 else first
    state = "" if folder.state == "current" else f"({folder.state})"
    text = f"{folder.path.name[:32]}  {folder.size / 2**20:>10.1f} MiB  {folder.idle_days:>5.0f} days  {source} {state}"
    return text.rstrip()


def show_data(config: ShowDataConfig) -> None:
    """Prints statistics and rows. Raises UserError for data or a tokenizer that training would refuse."""
    from megatron_psft.data.dataset import beyond_positions, build_dataset
    from megatron_psft.data.packing import plan_of
    from megatron_psft.data.statistics import describe_packing
    from megatron_psft.hf import hub

    if config.data.data == ShownData().data:
        raise UserError("missing --data; give it as a flag or in the --config file")
    if not config.weights.tokenizer_source:
        raise UserError("missing --tokenizer or --load-hf; name the folder or hub ID of the tokenizer")
    check_places(config.data)
    field = "load_hf" if config.weights.tokenizer is None else "tokenizer"
    tokenizer_folder = hub.model_folder(field, config.weights.tokenizer_source, with_weights=False)
    tokenizer = hub.load_tokenizer(tokenizer_folder)
    dataset = build_dataset(
        config.data.data,
        tokenizer,
        config.data,
        field="data",
        seed=config.batch.seed,
        show_progress=True,
        are_pairs=config.objective.needs_pairs,
    )
    print(dataset.statistics())
    if text := beyond_positions("data", dataset, max_positions_of(config.weights, tokenizer_folder)):
        print(text)
    validate_records(config, len(dataset))
    plan = plan_of(dataset.sequence_lengths, config.data, packs_each_step=config.packs_each_step)
    if config.packs_each_step:
        print(describe_packing(plan, config))
    if passes := passes_of(config, len(plan)):
        print(passes)
    loader = build_loader(config, dataset, plan, tokenizer)
    in_color = config.show.color == "always" or (config.show.color == "auto" and sys.stdout.isatty())
    rows = zip(
        loader.micro_batches(config.show.step - 1), loader.micro_batch_lengths(config.show.step - 1), strict=True
    )
    for number, (row, lengths) in enumerate(islice(rows, config.show.rows), 1):
        examples = list(records_of(row, lengths.tolist()))
        sizes = f"{counted(len(examples), 'record')}, {counted(row.num_tokens, 'token')}"
        print(f"\n── step {config.show.step}, row {number}: {sizes}")
        names = ("chosen", "rejected") if config.objective.needs_pairs else ("record",)
        for name, example in zip(cycle(names), examples, strict=False):
            print(describe(name, example))
            show = show_tokens if config.show.tokens else show_text
            show(example, tokenizer, in_color)


def max_positions_of(weights: ShownWeights, tokenizer_folder: Path) -> int | None:
    """Of the longest text that the run's model was made for; None where its config.json is not at hand."""
    from megatron_psft.model.shape import read_max_positions

    folder = tokenizer_folder if weights.tokenizer is None else Path(weights.load_hf)
    return read_max_positions(folder) if weights.load_hf and (folder / "config.json").is_file() else None


def build_loader(
    config: ShowDataConfig, dataset: "TokenizedDataset", plan: "PackPlan", tokenizer: "PreTrainedTokenizerBase"
) -> "BatchLoader":
    """The run's own loader on one rank, a row at a time (a pair's two). Its rows do not depend on the layout, but for
    those of records that are packed step by step."""
    from megatron_psft.data.dealing import ByTokens
    from megatron_psft.data.loader import BatchLoader, Shard

    return BatchLoader(
        dataset,
        plan,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=1,
        shard=Shard(by_tokens=ByTokens() if config.packs_each_step else None),
        shuffle_seed=config.batch.seed if config.data.shuffle else None,
        one_row=config.data.packing,
        pad_to_multiple_of=1,
        pad_token_id=tokenizer.pad_token_id or 0,
    )


def passes_of(config: ShowDataConfig, packs: int) -> str:
    """How often the run takes each record, as far as its flags say how long it is."""
    from megatron_psft.data.statistics import describe_passes

    batch = config.batch
    return describe_passes(
        packs,
        config.batch_unit,
        global_batch_size=batch.global_batch_size,
        train_iters=batch.steps(packs),
        epochs=batch.epochs,
    )


def records_of(batch: "MicroBatch", lengths: "Sequence[int]") -> "Iterator[Example]":
    """The records of a micro-batch, of which the model reads `lengths` tokens, one after the other or in a row each. It
    never reads a record's last token, which is a label only."""
    import numpy as np

    from megatron_psft.data.example import Example

    tokens, labels, mask = (array.flatten().numpy() for array in (batch.tokens, batch.labels, batch.label_mask))
    row_length = 0 if batch.segments is not None else batch.seq_length
    ends = np.cumsum(lengths).tolist()
    for record, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        start = record * row_length if row_length else end - length
        stop = start + length
        yield Example(
            tokens=np.append(tokens[start:stop], labels[stop - 1]).astype(np.int32),
            label_mask=np.concatenate([[False], mask[start:stop]]),
            advantage=1.0 if batch.advantages is None else float(batch.advantages[record]),
        )


def describe(name: str, example: "Example") -> str:
    """The line above a record."""
    labels = counted(int(example.label_mask.sum()), "label")
    line = f"── {name} of {counted(len(example.tokens), 'token')}, {labels}"
    return line if example.advantage == 1 else f"{line}, advantage {example.advantage:g}"


def show_text(example: "Example", tokenizer: "PreTrainedTokenizerBase", in_color: bool) -> None:
    """The decoded record with its labels marked."""
    from megatron_psft.data.example import label_runs

    print("".join(mark(text, in_color) if is_label else text for is_label, text in label_runs(example, tokenizer)))


def show_tokens(example: "Example", tokenizer: "PreTrainedTokenizerBase", in_color: bool) -> None:
    """A line per token: position, id, 1 where it is a label, text."""
    print(f"{'position':>8}  {'id':>7}  label  text")
    for position, (token, is_label) in enumerate(zip(example.tokens.tolist(), example.label_mask, strict=True)):
        text = repr(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        print(f"{position:>8}  {token:>7}  {int(is_label):>5}  {mark(text, in_color) if is_label else text}")


def mark(text: str, in_color: bool) -> str:
    """The text of label tokens, to be told from others."""
    if not in_color:
        return f"⟦{text}⟧"
    # A pager forgets the colour at the end of a line.
    return "\n".join(f"{GREEN}{line}{RESET}" for line in text.split("\n"))
