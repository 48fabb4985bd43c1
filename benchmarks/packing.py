"""How full packs are and how fast they are made, beside TRL's packing strategies on the same records in one run.

    python benchmarks/packing.py --data FILE.jsonl ... --tokenizer DIR [--seq-length 16384] [--copies 10]

Prints one JSON object per figure. Fill is the share of the packs' room that the records' tokens take up. (The trainer
itself reports a little less: a record's last token is a label only and takes no room.)
Preparation is everything from the files to packs with label masks: TRL's is that of its `SFTTrainer`. It is timed on
`--copies` copies of the records, so that what only costs once does not count. TRL's packing also copies the tokens into
the packs, which the trainer here does batch by batch while it trains. Needs TRL (`pip install -e '.[rl]'`).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from common import emit
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.dealing import by_tokens
from megatron_psft.data.packing import PackPlan, best_fit

Result = TypeVar("Result")

STRATEGIES = ("bfd", "wrapped")
MIN_SECONDS = 0.5
"""Short actions are repeated for so long, and their mean is taken."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="files of {messages} records")
    parser.add_argument("--tokenizer", required=True, help="folder with a Hugging Face tokenizer")
    parser.add_argument("--seq-length", type=int, default=16384, help="room of a pack, in tokens")
    parser.add_argument("--copies", type=int, default=10, help="copies of the records that preparation is timed on")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "copies.jsonl"
        many.write_bytes(b"".join(Path(path).read_bytes() for path in options.data) * options.copies)
        own_rate = own_figures(options.data, many, tokenizer, options.seq_length)
        try:
            import trl  # noqa: F401
        except ImportError:
            print(
                "error: trl is not installed, so there is nothing to compare with; pip install -e '.[rl]'",
                file=sys.stderr,
            )
            return 2
        trl_rate = trl_figures(options.data, many, tokenizer, options.seq_length, Path(folder))
    emit("prepare_speed_over_trl_bfd", own_rate / trl_rate, "ratio")
    return 0


def own_figures(data: Sequence[str], many: Path, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> float:
    """This package's figures; returns the records prepared per second."""
    dataset = tokenized(data, tokenizer, seq_length)
    plan = best_fit(dataset.lengths - 1, seq_length)
    fill = int(dataset.lengths.sum()) / (len(plan) * seq_length)
    emit("fill", fill, "share", packs=len(plan), records=len(dataset), seq_length=seq_length)
    seconds, dataset = timed(lambda: tokenized([str(many)], tokenizer, seq_length))
    emit("tokenize", len(dataset) / seconds, "records/s", records=len(dataset))
    pack_seconds, _ = timed(lambda: order_of(best_fit(dataset.lengths - 1, seq_length)))
    emit("pack", len(dataset) / pack_seconds, "records/s", records=len(dataset))
    rate = len(dataset) / (seconds + pack_seconds)
    emit("prepare", rate, "records/s", records=len(dataset))
    lengths = np.random.default_rng(0).choice(dataset.lengths - 1, 1_000_000)
    seconds, _ = timed(lambda: order_of(best_fit(lengths, seq_length)))
    emit("pack_a_million_lengths", seconds, "s")
    records_figures(lengths[:9_600], seq_length)
    return rate


def records_figures(lengths: np.ndarray, seq_length: int) -> None:
    """Steps of 32 records on 8 replicas: what the slowest replica computes, over the mean of all or the longest
    record, below which no deal of whole records comes; and the time to deal out a step."""
    steps = lengths[: len(lengths) // 32 * 32].reshape(-1, 32)

    def slowest(step: np.ndarray) -> int:
        dealt = by_tokens(step, ranks=8, room=seq_length)
        return max(sum(max(int(step[row].sum()), 1) for row in rows) for rows in dealt)

    seconds, cost = timed(lambda: sum(map(slowest, steps)))
    bound = sum(max(step.mean() * 4, step.max()) for step in steps)
    emit("records_cost_over_bound", cost / bound, "ratio", records=steps.size)
    emit("deal_out_a_step_of_records", seconds / len(steps), "s", records=32)


def order_of(plan: PackPlan) -> object:
    return plan.shuffled(1, 0)


def tokenized(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> TokenizedDataset:
    """The records, tokenized anew into a cache that nobody else has, on all cores."""
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(data=tuple(paths), seq_length=seq_length, overlong="truncate", data_cache_dir=cache)
        return build_dataset(paths, tokenizer, config, field="data", seed=0, show_progress=False)


def trl_figures(
    data: Sequence[str], many: Path, tokenizer: PreTrainedTokenizerBase, seq_length: int, folder: Path
) -> float:
    """TRL's figures; returns the records that it prepares per second with best-fit packing, in the faster way."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    plain = prepared_by_trl(read(data, folder), tokenizer, seq_length).select_columns(["input_ids", "labels"])
    for strategy in STRATEGIES:
        packed = pack_dataset(plain, seq_length, strategy)
        fill = sum(map(len, packed["input_ids"])) / (len(packed) * seq_length)
        emit(f"trl_{strategy}_fill", fill, "share", packs=len(packed), records=len(plain), seq_length=seq_length)
    longer = datasets.concatenate_datasets([plain] * (count_lines(many) // len(plain)))
    for strategy in STRATEGIES:
        seconds, _ = timed(lambda strategy=strategy: pack_dataset(longer, seq_length, strategy))
        emit(f"trl_{strategy}_pack", len(longer) / seconds, "records/s", records=len(longer))
    rates = []
    for processes in sorted({1, os.cpu_count() or 1}):
        options: dict[str, Any] = {"packing": True, "processes": processes}
        seconds, _ = timed(
            lambda options=options: prepared_by_trl(read([many], folder), tokenizer, seq_length, **options)
        )
        rates.append(len(longer) / seconds)
        emit("trl_bfd_prepare", rates[-1], "records/s", records=len(longer), processes=processes)
    return max(rates)


def read(paths: Sequence[str | Path], folder: Path) -> Any:
    import datasets

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        dataset = datasets.load_dataset(
            "json", data_files=[str(path) for path in paths], split="train", cache_dir=cache
        )
        return dataset.select_columns(["messages"]).map(keep_in_memory=True)


def prepared_by_trl(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, seq_length: int, *, packing: bool = False, processes: int = 1
) -> Any:
    """What `SFTTrainer` makes of the records before it trains, by its own method; it needs no model for that."""
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=get_training_chat_template(tokenizer), completion_only_loss=False
    )
    config = SFTConfig(
        max_length=seq_length,
        assistant_only_loss=True,
        packing_strategy="bfd",
        dataset_num_proc=processes if processes > 1 else None,
        report_to=[],
        bf16=False,
        use_cpu=True,
    )
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, packing, None, "train")


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def timed(action: Callable[[], Result]) -> tuple[float, Result]:
    """Mean seconds of an action, and its last result."""
    started, runs = time.perf_counter(), 0
    while True:
        result = action()
        runs += 1
        elapsed = time.perf_counter() - started
        if elapsed > MIN_SECONDS:
            return elapsed / runs, result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
