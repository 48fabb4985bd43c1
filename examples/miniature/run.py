"""The paper in miniature: fine-tunes small models on one skill in several ways and measures what they learn and forget.

Everything is made here: records, tokenizer, models. Two processes train side by side, one thread each. Run it as
`make miniature`; results stay in runs/miniature. Runs that an earlier call of the same scripts finished there are not
made again.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORKERS = 2

# The scripts of these folders are no packages; the trainer is imported from the repository's root.
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("shared", "digits")), str(REPOSITORY)]

import chains  # noqa: E402
import digits  # noqa: E402
import grpo  # noqa: E402
import plan as plans  # noqa: E402
import points  # noqa: E402
import worker  # noqa: E402
from claim import claim  # noqa: E402
from tqdm import tqdm  # noqa: E402

Task = tuple[Callable[[Any], worker.Results], Any]


class _Parser(argparse.ArgumentParser):
    """Answers a mistake as the trainer does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str]) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two methods, few steps: shows that all works")
    plan = plans.QUICK if parser.parse_args(argv).quick else plans.FULL
    folder = REPOSITORY / "runs" / ("miniature-quick" if plan is plans.QUICK else "miniature")
    started = time.monotonic()
    # Before a worker imports torch: two processes of two threads each would be slower on two cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    scripts = [HERE / f"{name}.py" for name in ("chains", "plan", "worker", "grpo")]
    claim(folder, [*scripts, HERE.parent / "digits" / "digits.py", *sorted(HERE.glob("*.yaml"))])
    try:
        with pool() as workers:
            results, rl_results = measure(plan, folder, workers)
    except KeyboardInterrupt:
        print("ended by Ctrl-C: the same command goes on from the runs that are finished", file=sys.stderr)
        return 130
    import report  # late, as it takes seconds to import

    print(f"\n{report.write(plan, folder, results, rl_results)}\n\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def measure(plan: plans.Plan, folder: Path, workers: ProcessPoolExecutor) -> tuple[worker.Results, worker.Results]:
    """Makes all runs of the plan, then GRPO; returns what was measured in both."""
    seeds = [prepare(plan, folder / f"seed-{seed}", seed) for seed in plan.seeds]
    followers = {base: [(worker.run, job) for job in runs] for base, runs in seeds}
    print("1. A base for each seed, then all methods from it at several learning rates.", flush=True)
    total = len(followers) + sum(map(len, followers.values()))
    results = perform([(worker.run, base) for base in followers], workers, total, followers)
    print(f"2. GRPO, {plan.rl.rounds} rounds, from SFT's model and from PSFT's.", flush=True)
    found = points.points(results)
    rl_tasks: list[Task] = []
    for method in (plans.SFT, plans.PSFT):
        (_, lr, length), _ = points.chosen(found, method.name)
        starts = [job for _, runs in seeds for job in runs if (job.method, job.lr) == (method, lr)]
        rl_tasks += [(grpo.run, grpo.RlJob(start=start, length=length, rl=plan.rl)) for start in starts]
    return results, perform(rl_tasks, workers, len(rl_tasks))


def perform(
    tasks: Iterable[Task], workers: ProcessPoolExecutor, total: int, followers: dict[Any, list[Task]] | None = None
) -> worker.Results:
    """Has all tasks done, and after each those that follow its job; returns what they measured."""
    waiting, results = deque(tasks), []
    running: dict[Future[worker.Results], Any] = {}
    with tqdm(total=total, unit="run", dynamic_ncols=True, disable=None) as bar:
        while waiting or running:
            # No more than are worked on: what a pool has queued, it would also do after Ctrl-C.
            while waiting and len(running) < WORKERS:
                function, job = waiting.popleft()
                running[workers.submit(function, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                measured = future.result()
                results += measured
                bar.write(line(measured))
                bar.update()
                waiting.extend((followers or {}).get(running.pop(future), ()))
    return results


def prepare(plan: plans.Plan, folder: Path, seed: int) -> tuple[plans.Job, list[plans.Job]]:
    """Writes data, tokenizer and model description of a seed; returns the base's job and those of its runs."""
    files = chains.write_data(folder / "data", plan.sizes, seed=seed)
    chains.write_tokenizer(folder / "tokenizer")
    digits.write_model_config(folder / "init", folder / "tokenizer", num_hidden_layers=3, max_position_embeddings=128)
    return plans.jobs(plan, folder, files, seed)


@contextmanager
def pool() -> Iterator[ProcessPoolExecutor]:
    """Workers; after an error or Ctrl-C no new run begins, and those under way end."""
    workers = ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"), initializer=worker.start)
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


def line(measured: worker.Results) -> str:
    """What a run measured, for the terminal."""
    first, last = measured[0], measured[-1]
    name = f"seed {last['seed']}  {last['method']}" + (f", lr {last['lr']}" if last["lr"] else "")
    if "reward" in first:
        rewards = " ".join(f"{100 * result['reward']:.0f}" for result in measured)
        return f"{name:<32} reward, %: {rewards}; then target {last['target']:.0f} %, general {last['general']:.0f} %"
    values = (f"step {m['step']}: target {m['target']:.0f} %, general {m['general']:.0f} %" for m in measured)
    return f"{name:<32} {'; '.join(values)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
