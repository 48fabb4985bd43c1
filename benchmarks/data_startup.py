"""Start-up time and memory of a big set: generates records, tokenizes them once, opens them again from the cache.

    python benchmarks/data_startup.py --tokenizer Qwen/Qwen2.5-7B-Instruct --records 1000000 --folder /tmp/startup

Prints one JSON line per figure. Each phase runs in processes of its own, as a training run's ranks would be.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
from common import emit

VOCABULARY = """
add all answer apple because both box check count divide each eleven equals every find first five four from gives half
hence how increases is lemon less let many minus more nine now of one over pears plus price proof seven she so square
sum ten than the then three times total twelve twice two we what when which with x y zero 3 17 42 1/2 = + *
"""
WORDS = VOCABULARY.split()
READ_RECORDS = 20_000
POLL_SECONDS = 0.5


def write_records(path: Path, count: int) -> None:
    """Questions of 5 to 25 words and answers of 10 to 200, uniform in the logarithm, from a fixed seed."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 25)))
            answer = " ".join(rng.choices(WORDS, k=round(10 * 20 ** rng.random())))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def start(data: Path, tokenizer_name: str, cache: Path, workers: int | None) -> dict[str, float]:
    """What a rank does with its data at start, then random reads; seconds and MiB of this process."""
    from transformers import AutoTokenizer

    from megatron_psft.config.inputs import DataConfig
    from megatron_psft.data.dataset import build_dataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    before, started = memory(), time.perf_counter()
    config = DataConfig(data=(str(data),), data_cache_dir=str(cache), data_workers=workers)
    dataset = build_dataset(config.data, tokenizer, config, field="data", seed=0, show_progress=True)
    opened = time.perf_counter()
    dataset.fingerprint()
    statistics = dataset.statistics()
    done = time.perf_counter()
    order = random.Random(0).sample(range(len(dataset)), min(READ_RECORDS, len(dataset)))
    reading = time.perf_counter()
    read = sum(len(dataset[index].tokens) for index in order)
    seconds = time.perf_counter() - reading
    after = memory()
    return {
        "records": len(dataset),
        "tokens": statistics.tokens,
        "open_seconds": opened - started,
        "statistics_seconds": done - opened,
        "tokens_read_per_second": read / seconds,
        "records_read_per_second": len(order) / seconds,
        **{f"{name}_before_mib": value for name, value in before.items()},
        **{f"{name}_mib": value for name, value in after.items()},
    }


def memory() -> dict[str, float]:
    """MiB of this process: resident; its share of shared pages counted (pss); that which is no file's (pss_anon)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {name.rstrip(":"): int(kilobytes) / 1024 for name, kilobytes, *_ in map(str.split, lines)}
    return {"rss": values["Rss"], "pss": values["Pss"], "pss_anon": values["Pss_Anon"]}


def watch_children(peaks: dict[str, float], stop: threading.Event) -> None:
    """Notes the highest sum, and the highest single value, of the memory of all processes below this one."""
    while not stop.wait(POLL_SECONDS):
        sizes = []
        for child in psutil.Process().children(recursive=True):
            try:
                sizes.append(child.memory_full_info().pss / 2**20)
            except psutil.Error:  # it has ended
                continue
        peaks["sum"] = max(peaks.get("sum", 0), sum(sizes))
        peaks["single"] = max(peaks.get("single", 0), max(sizes, default=0))


def in_processes(count: int, *args: object) -> list[dict[str, float]]:
    """`start(*args)` in `count` new processes at once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        return [future.result() for future in [pool.submit(start, *args) for _ in range(count)]]


def measure(data: Path, cache: Path, args: argparse.Namespace) -> None:
    """Runs the phases and prints their figures."""
    peaks: dict[str, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch_children, args=(peaks, stop))
    watcher.start()
    (first,) = in_processes(1, data, args.tokenizer, cache, args.workers)
    stop.set()
    watcher.join()
    ranks = in_processes(args.ranks, data, args.tokenizer, cache, args.workers)
    shape = {"records": int(first["records"]), "tokens": int(first["tokens"]), "data_mib": mib(data)}
    workers = args.workers or os.cpu_count()
    emit("first_start_seconds", first["open_seconds"], "s", workers=workers, **shape)
    emit("tokenizing_rate", first["records"] / first["open_seconds"], "records/s", workers=workers)
    emit("tokenizing_peak_pss_all_processes", peaks["sum"], "MiB", workers=workers)
    emit("tokenizing_peak_pss_one_process", peaks["single"], "MiB", workers=workers)
    emit("cache_size", sum(mib(file) for file in cache.rglob("*.bin")), "MiB")
    for name, unit in (
        ("open_seconds", "s"),
        ("statistics_seconds", "s"),
        ("records_read_per_second", "records/s"),
        ("rss_mib", "MiB"),
        ("pss_mib", "MiB"),
        ("pss_anon_mib", "MiB"),
    ):
        worst = (min if unit == "records/s" else max)(rank[name] for rank in ranks)
        emit(f"cached_start_{name}", worst, unit, ranks=args.ranks)
    grown = max(rank["pss_anon_mib"] - rank["pss_anon_before_mib"] for rank in ranks)
    emit(
        "cached_start_memory_of_the_data",
        grown,
        "MiB",
        ranks=args.ranks,
        bytes_per_record=grown * 2**20 / shape["records"],
    )


def mib(path: Path) -> float:
    return path.stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub ID, with a chat template")
    parser.add_argument("--folder", type=Path, required=True, help="for records and cache; its cache is emptied")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2, help="processes that open the cache at once")
    parser.add_argument("--workers", type=int, help="processes that tokenize; one per usable core if unset")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data, cache = args.folder / f"records_{args.records}.jsonl", args.folder / "cache_of_data_startup"
    if not data.exists():
        write_records(data, args.records)
    shutil.rmtree(cache, ignore_errors=True)
    measure(data, cache, args)


if __name__ == "__main__":
    main()
