"""Runs tasks of EleutherAI's lm-evaluation-harness (`lm-eval`) and keeps what they find as other results are kept."""

import importlib.util
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_psft.errors import UserError, first_line, nearest_name_hint
from megatron_psft.evaluation.results import Generation, ResultsFolder, TaskResult, estimate_share, normal_estimate
from megatron_psft.metrics.provenance import installed_version, versions
from megatron_psft.rollout.sampling import SamplingConfig

log = logging.getLogger(__name__)

_ROUNDING = 1e-6


class Harness:
    """Tasks by name, each one of the library's or of a folder of one's own: a task, a group or a tag."""

    def __init__(self, names: Sequence[str], include_path: str | None) -> None:
        """Loads the tasks with their data.

        Raises UserError where lm-eval is not installed, does not know a name, or cannot load what a task needs.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"tasks ({' '.join(names)}) are no files, and other tasks need lm-eval; check the paths, or "
                "pip install 'lm-eval[hf,ifeval]'"
            )
        from lm_eval.tasks import TaskManager

        self._manager = TaskManager(include_path=include_path)
        for name in names:
            if name not in self._manager.all_tasks:
                raise UserError(
                    f"tasks ({name}) must be a file, or a task of lm-eval {installed_version('lm-eval')}"
                    f"{nearest_name_hint(name, self._manager.all_tasks)}"
                )
        self._parts = {name: self._load(name) for name in names}
        owners: dict[str, str] = {}
        for name, parts in self._parts.items():
            for part in parts:
                if owners.setdefault(part, name) != name:
                    raise UserError(f"tasks ({owners[part]} and {name}) both have {part}; leave one out")

    def _load(self, name: str) -> list[str]:
        """The tasks that `name` stands for."""
        try:
            tasks = self._manager.load([name])["tasks"]
        except (OSError, ImportError) as error:  # the hub's errors are OSErrors too
            first = first_line(error)
            raise UserError(f"tasks ({name}) need what could not be loaded: {first}") from None
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
            raise UserError(f"tasks ({name}) would run code that the model writes; use lm-eval in a sandbox for it")
        if any(part.startswith("ifeval") for part in tasks):
            _check_sentence_data(name)
        return list(tasks)

    def run(
        self,
        folder: ResultsFolder,
        *,
        model_folder: Path,
        tokenizer_folder: str,
        sampling: SamplingConfig,
        limit: int | None,
        apply_chat_template: bool,
    ) -> None:
        """Runs the tasks that `folder` has no results of, all with one load of the model, and adds what they find."""
        done = folder.results()
        missing = [name for name, parts in self._parts.items() if not done.keys() >= set(parts)]
        if not missing:
            return
        import lm_eval
        import torch

        log.info("lm-eval: %s", " ".join(missing))
        arguments = {"pretrained": str(model_folder), "tokenizer": tokenizer_folder, "dtype": "auto"}
        if sampling.uses_vllm:
            arguments["tensor_parallel_size"] = str(sampling.vllm_tensor_parallel_size)
        found = lm_eval.simple_evaluate(
            model="vllm" if sampling.uses_vllm else "hf",
            model_args=arguments,
            tasks=missing,
            task_manager=self._manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size="auto" if sampling.uses_vllm else sampling.batch_size,
            limit=limit,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            random_seed=sampling.seed,
            numpy_random_seed=sampling.seed,
            torch_random_seed=sampling.seed,
            fewshot_random_seed=sampling.seed,
        )
        results = {**found["results"], **found.get("groups", {})}
        answers = {name: generations_of(found["samples"].get(name, []), results[name]) for name in results}
        for name, generations in answers.items():
            if generations:  # groups have none of their own
                folder.write_generations(name, generations)
        folder.add_results({name: result_of(results[name], generations) for name, generations in answers.items()})


def _check_sentence_data(name: str) -> None:
    """IFEval counts words with data of NLTK's that it tries to download when it is loaded. Where it could not, it goes
    on, and fails when the model has answered everything."""
    import nltk

    try:
        nltk.word_tokenize("One. Two.")
    except LookupError:
        raise UserError(
            f"tasks ({name}) need NLTK's punkt_tab, which could not be downloaded; run `python -m nltk.downloader "
            "punkt_tab` where there is a network, and copy ~/nltk_data"
        ) from None


def generations_of(samples: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[Generation]:
    """What lm-eval logs of a task, question by question, in the order of its questions.

    A question that several filters have looked at is logged by each. Of the metrics those are kept whose mean over
    questions is the figure that is reported; others, such as corpus BLEU, are not made of questions.
    """
    by_question: dict[int, dict[str, float]] = {}
    logged = {sample["doc_id"]: sample for sample in reversed(samples)}
    for sample in samples:
        scores = by_question.setdefault(sample["doc_id"], {})
        for metric in sample["metrics"]:
            if isinstance(sample[metric], bool | int | float):
                scores[_name(f"{metric},{sample['filter']}")] = float(sample[metric])
    figures = {_name(key): value for key, value in result.items() if isinstance(value, int | float)}
    kept = [name for name in figures if all(name in scores for scores in by_question.values())]
    means = {name: statistics.fmean(scores[name] for scores in by_question.values()) for name in kept if by_question}
    kept = [name for name, mean in means.items() if math.isclose(mean, figures[name], abs_tol=_ROUNDING)]
    return [
        Generation(
            question=number,
            sample=0,
            prompt=str(logged[doc]["arguments"][0][0]),
            answer=str(logged[doc]["target"]),
            text=_text(logged[doc]),
            scores={name: by_question[doc][name] for name in kept},
        )
        for number, doc in enumerate(sorted(by_question))
    ]


def result_of(result: Mapping[str, Any], generations: Sequence[Generation]) -> TaskResult:
    """The figures of a task or group. The intervals are of the questions' values, or else of the standard errors that
    lm-eval gives."""
    metrics = {}
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
            continue
        values = [answer.scores[_name(key)] for answer in generations if _name(key) in answer.scores]
        if values and 0 <= min(values) <= max(values) <= 1:
            metrics[_name(key)] = estimate_share(values)
        else:
            stderr = result.get(f"{metric}_stderr,{kind}")
            metrics[_name(key)] = normal_estimate(value, stderr if isinstance(stderr, int | float) else None)
    questions = result.get("sample_len", len(generations))
    return TaskResult(source="lm-eval", questions=questions, metrics=metrics, versions=versions())


def _name(key: str) -> str:
    """lm-eval's `acc,none` is `acc`; `exact_match,strict-match` keeps the filter."""
    return key.removesuffix(",none")


def _text(sample: Mapping[str, Any]) -> str:
    """The answer; of a choice, the log-likelihoods of all."""
    first = sample["resps"][0][0]
    return first if isinstance(first, str) else json.dumps(sample["filtered_resps"], default=str)
