"""Asks a model the questions of maths sets and of lm-evaluation-harness, and keeps its answers and what they are
worth."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_psft.config.flags import require_at_least
from megatron_psft.config.inputs import TemplateConfig
from megatron_psft.config.paths import PathText
from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.keys import KWARGS_KEY, SYSTEM_KEYS, THINKING_KEY
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError, counted, nearest_name_hint
from megatron_psft.evaluation.lm_eval import Harness
from megatron_psft.evaluation.results import CORRECT, Generation, ResultsFolder, summarize
from megatron_psft.hf.hub import ModelConfig
from megatron_psft.metrics.provenance import versions
from megatron_psft.progress import progress
from megatron_psft.rollout.prompts import Prompt, PromptConfig, find_answer, parse_prompt, render_prompt
from megatron_psft.rollout.rewards import Verifier, VerifierName, build_verifier
from megatron_psft.rollout.sampling import Answer, Sampler, SamplingConfig

if TYPE_CHECKING:  # seconds to import, which `--help` does not wait for
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_PARTS = ("train", "valid", "validation", "dev", "test")
_FILE_SUFFIXES = (".parquet", ".jsonl", ".json")
_LAYOUTS = (
    ("prompt", "reward_model.ground_truth"),  # verl's
    ("question", "answer"),  # GSM8K's
    ("problem", "answer"),  # of MATH-500 and AIME on the hub
    ("prompt", "answer"),
)
"""Keys of question and known answer; the first pair counts that a file's first row has."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked, and what makes an answer right."""

    tasks: tuple[PathText, ...]
    """Maths sets: JSON Lines, JSON or Parquet files of questions and known answers; and names of lm-evaluation-harness
    tasks, such as ifeval."""
    limit: int | None = None
    """Questions of each task, its first ones; all if unset."""
    verifier: VerifierName = "math"
    """Maths sets: what makes an answer right: math, its last expression equals the known answer; exact, its text
    does."""
    prompt_key: str | None = None
    """Maths sets: name of the question in a row, a text or a list of messages. Needs `answer_key`. Where absent, the
    row tells: verl's prompt, GSM8K's question, or problem."""
    answer_key: str | None = None
    """Maths sets: name of the known answer in a row; a dot goes into an object. Needs `prompt_key`."""
    system_prompt: str | None = None
    """Maths sets: system message of all questions, instead of their own; each question's if unset."""
    ignore_keys: tuple[str, ...] = ()
    """Maths sets: keys of rows and messages to read as if they were not there. A key of a message that is not supported
    is refused otherwise."""
    include_path: PathText | None = None
    """lm-evaluation-harness: folder of further task definitions, its YAML files."""
    apply_chat_template: bool = True
    """lm-evaluation-harness: ask within the tokenizer's chat template, and not by plain text."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "limit")
        if (self.prompt_key is None) != (self.answer_key is None):
            raise UserError(
                f"prompt_key ({self.prompt_key}) and answer_key ({self.answer_key}) must be set together; add the other"
            )
        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise UserError(f"include_path ({self.include_path}) must be an existing folder; check the path")

    @property
    def files(self) -> list[str]:
        """The tasks that are files."""
        return [task for task in self.tasks if _is_file(task)]

    @property
    def names(self) -> list[str]:
        """The tasks of lm-evaluation-harness."""
        return [task for task in self.tasks if not _is_file(task)]


@dataclass(frozen=True, kw_only=True)
class EvaluationSampling(SamplingConfig):
    """How maths sets are answered. Of these, engine, sizes and seed count for lm-evaluation-harness too, whose tasks
    say the rest themselves."""

    num_samples: int | None = None  # type: ignore[assignment]
    """Answers per question; if unset, as many as the file repeats it."""

    def of(self, num_samples: int) -> SamplingConfig:
        """The sampler's settings for so many answers per question."""
        return SamplingConfig(**{**asdict(self), "num_samples": num_samples})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that tells one evaluation from another, and where it is kept."""

    model: ModelConfig
    tasks: TaskConfig
    template: TemplateConfig
    sampling: EvaluationSampling
    out: str

    def __post_init__(self) -> None:
        if self.tasks.names and self.template != TemplateConfig():
            raise UserError(
                "chat_template and chat_template_kwargs are for maths sets only, and tasks has "
                f"{', '.join(self.tasks.names)} of lm-evaluation-harness; evaluate these by a command of their own"
            )

    def settings(self, model_folder: Path) -> dict[str, Any]:
        """What must not change within one folder of results. JSON values.

        What the answers themselves tell is left out, as are sizes, which may change so that an answer fits into memory.
        """
        stats = [(path.name, path.stat()) for path in sorted(model_folder.glob("*.safetensors"))]
        weights = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        tasks, sampling = self.tasks, self.sampling
        rendering = RenderSettings.of_template(self.template)
        # Only where set, so that results of earlier versions can be added to.
        newer = {
            "chat_template": rendering.chat_template and hashlib.sha256(rendering.chat_template.encode()).hexdigest(),
            "chat_template_kwargs": dict(rendering.template_kwargs),
            "ignore_keys": list(tasks.ignore_keys),
        }
        return {
            **{name: value for name, value in newer.items() if value},
            "model": str(model_folder.resolve()),
            "weights": hashlib.sha256(weights.encode()).hexdigest()[:12],
            "tokenizer": self.model.tokenizer,
            **{name: getattr(tasks, name) for name in ("limit", "verifier", "system_prompt", "apply_chat_template")},
            **{name: getattr(sampling, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")},
            "engine": "vllm" if sampling.uses_vllm else "transformers",
        }


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """A file's questions, each once."""

    name: str
    source: str
    questions: Sequence[Prompt]
    num_samples: int
    """Answers to each."""


def evaluate(evaluation: Evaluation) -> ResultsFolder:
    """Runs all tasks that the folder has no results of, each kept as soon as it is done; returns the folder.

    Raises UserError for tasks, files, models and folders that cannot be used, before anything is sampled.
    """
    tasks = evaluation.tasks
    _check_names(tasks)
    verifier = build_verifier(tasks.verifier) if tasks.files else None
    sets = [read_questions(file, tasks, evaluation.sampling.num_samples, verifier) for file in tasks.files if verifier]
    harness = Harness(tasks.names, tasks.include_path) if tasks.names else None
    model_folder = evaluation.model.folder()
    tokenizer = evaluation.model.load_tokenizer()
    folder = ResultsFolder(Path(evaluation.out))
    folder.begin(evaluation.settings(model_folder))
    if verifier is not None:
        _answer_sets(sets, evaluation, model_folder, tokenizer, verifier, folder)
    if harness is not None:
        harness.run(
            folder,
            model_folder=model_folder,
            tokenizer_folder=tokenizer.name_or_path,
            sampling=evaluation.sampling,
            limit=tasks.limit,
            apply_chat_template=tasks.apply_chat_template,
        )
    return folder


def read_questions(path: str, tasks: TaskConfig, num_samples: int | None, verifier: Verifier) -> QuestionSet:
    """The distinct questions of a file in order, and how often each is to be answered.

    Raises UserError for a file that is not there, a row that is no question with an answer the verifier can use, and
    where questions are repeated unequally and `num_samples` does not say how many answers are wanted.
    """
    _check_exists(path)
    rows = list(open_rows(path, field="tasks", use="other"))
    if not rows:
        raise UserError(f"tasks ({path}) must hold at least one question")
    keys = _find_keys(path, rows, tasks)
    counts = Counter(_identity(row, keys) for row in rows)
    distinct = {_identity(row, keys): row for row in reversed(rows)}  # the first of each
    config = PromptConfig(
        prompts=(path,),
        prompt_key=keys[0],
        answer_key=keys[1],
        system_prompt=tasks.system_prompt,
        ignore_keys=tasks.ignore_keys,
    )
    questions, bad = [], []
    for identity in list(counts)[: tasks.limit]:
        prompt = parse_prompt(distinct[identity], config, verifier)
        if isinstance(prompt, Prompt):
            questions.append(prompt)
        else:
            bad.append(prompt)
    if bad:
        raise UserError(
            f"tasks ({path}) must hold usable questions only, {len(bad)} of {len(bad) + len(questions)} are not; the "
            f"first is {bad[0]}"
        )
    repeats = sorted(set(counts.values()))
    if num_samples is None and len(repeats) > 1:
        raise UserError(
            f"tasks ({path}) repeats its questions {repeats[0]} to {repeats[-1]} times; say by num_samples how often "
            "each is to be answered"
        )
    return QuestionSet(name=_set_name(path), source=path, questions=questions, num_samples=num_samples or repeats[0])


def _is_file(task: str) -> bool:
    return "/" in task or Path(task).suffix in _FILE_SUFFIXES


def _set_name(path: str) -> str:
    """The file's name without its ending; of one that is named for its part of a set, such as gsm8k/test.jsonl, with
    the folder's."""
    file = Path(path).absolute()
    return f"{file.parent.name}-{file.stem}" if file.stem in _PARTS else file.stem


def _check_names(tasks: TaskConfig) -> None:
    counts = Counter([*map(_set_name, tasks.files), *tasks.names])
    for name, count in counts.items():
        if count > 1:
            raise UserError(
                f"tasks ({' '.join(tasks.tasks)}) must have names of their own, but {name} is there {count} times"
            )


def _check_exists(path: str) -> None:
    if not os.path.exists(os.path.expanduser(path)):
        folder = Path(path).parent
        neighbours = [item.name for item in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"tasks ({path}) must be an existing file{nearest_name_hint(Path(path).name, neighbours)}")


def _find_keys(path: str, rows: Sequence[Row | BadRecord], tasks: TaskConfig) -> tuple[str, str]:
    """Keys of question and known answer."""
    if tasks.prompt_key is not None and tasks.answer_key is not None:
        return tasks.prompt_key, tasks.answer_key
    if isinstance(rows[0], BadRecord):
        raise UserError(f"tasks ({path}) must hold usable questions only; the first row is {rows[0]}")
    first = rows[0].value
    for prompt_key, answer_key in _LAYOUTS:
        if isinstance(first, dict) and prompt_key in first and find_answer(first, answer_key) is not None:
            return prompt_key, answer_key
    known = ", ".join(f"{prompt_key} and {answer_key}" for prompt_key, answer_key in _LAYOUTS)
    found = ", ".join(first) if isinstance(first, dict) else "no object"
    raise UserError(f"tasks ({path}) must have rows of {known}; found {found}; name yours by prompt_key and answer_key")


def _identity(row: Row | BadRecord, keys: tuple[str, str]) -> str:
    """What two rows share that ask the same question."""
    if not isinstance(row, Row) or not isinstance(row.value, dict):
        return row.source
    question = row.value.get(keys[0], row.value.get("messages"))
    others = [row.value.get(key) for key in (*SYSTEM_KEYS, KWARGS_KEY, THINKING_KEY)]
    parts = [question, *others, find_answer(row.value, keys[1])]
    return json.dumps(parts, default=str)  # Parquet has types that JSON has not


def _answer_sets(
    sets: Sequence[QuestionSet],
    evaluation: Evaluation,
    model_folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    verifier: Verifier,
    folder: ResultsFolder,
) -> None:
    renderer = ChatRenderer(tokenizer, "last", RenderSettings.of_template(evaluation.template))
    rendered = {
        questions.name: [render_prompt("tasks", prompt, renderer) for prompt in questions.questions]
        for questions in sets
    }
    # Prompts that are too long for the model are refused by the sampler: those come before hours of other sampling.
    with Sampler(model_folder, tokenizer, renderer, evaluation.sampling.of(num_samples=1)) as sampler:
        for questions in sorted(sets, key=lambda found: -max(map(len, rendered[found.name]))):
            _answer_set(questions, rendered[questions.name], sampler, verifier, folder)


def _answer_set(
    questions: QuestionSet, rendered: Sequence[str], sampler: Sampler, verifier: Verifier, folder: ResultsFolder
) -> None:
    """Does what the folder does not have: answers, their check, results."""
    asked, answers = counted(len(questions.questions), "question"), counted(questions.num_samples, "answer")
    log.info("%s: %s, %s each", questions.name, asked, answers)
    generations = folder.read_generations(questions.name)
    if not generations:
        generations = _generations(questions, sampler.sample(rendered, questions.num_samples))
        folder.write_generations(questions.name, generations)  # checking them may take long too
    _check_same_questions(generations, questions, folder)
    if not all(generation.scores for generation in generations):
        generations = _score(generations, verifier, questions.name)
        folder.write_generations(questions.name, generations)
    result = summarize(questions.source, generations)
    folder.add_results({questions.name: replace(result, versions=versions())})


def _generations(questions: QuestionSet, groups: Sequence[Sequence[Answer]]) -> list[Generation]:
    return [
        Generation(
            question=number,
            sample=sample,
            prompt=list(prompt.messages),
            answer=prompt.answer,
            text=answer.text,
            tokens=len(answer.tokens),
            is_finished=answer.is_finished,
        )
        for number, (prompt, answers) in enumerate(zip(questions.questions, groups, strict=True))
        for sample, answer in enumerate(answers)
    ]


def _check_same_questions(generations: Sequence[Generation], questions: QuestionSet, folder: ResultsFolder) -> None:
    """Whether answers that were there already are to these questions."""
    found = [(list(generation.prompt), generation.answer) for generation in generations]
    asked = [(list(prompt.messages), prompt.answer) for prompt in questions.questions]
    if found != [question for question in asked for _ in range(questions.num_samples)]:
        raise UserError(
            f"out ({folder.path}) holds answers to other questions than {questions.source} has, or to another number "
            "of them; name another folder"
        )


def _score(generations: Sequence[Generation], verifier: Verifier, name: str) -> list[Generation]:
    return [
        replace(answer, scores={CORRECT: verifier.score(answer.text, answer.answer)})
        for answer in progress(generations, f"check {name}", unit="answer")
    ]
