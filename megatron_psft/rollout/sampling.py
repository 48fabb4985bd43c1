"""Samples answers of a Hugging Face model, with vLLM or with transformers.

Both get prompts as token ids and give token ids back; text is made of them in one place. Neither uses what the model's
generation_config.json says of sampling, such as top-k or a repetition penalty: answers come from the model's own
distribution, but for the temperature and top-p asked for. Of that file only the end tokens count.
"""

import gc
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from megatron_psft.config.flags import require_at_least, require_positive
from megatron_psft.data.chat import ChatRenderer
from megatron_psft.errors import UserError, counted, first_line
from megatron_psft.progress import Progress, is_on_terminal

if TYPE_CHECKING:  # seconds to import, which `--help` does not wait for
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_TokenIds = list[int]


class _Sampled(NamedTuple):
    """The tokens of one answer, which may go on after its end, and the log-probability of each if asked for."""

    tokens: _TokenIds
    log_probs: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How answers are sampled."""

    num_samples: int = 8
    """Answers per prompt; they are a group, compared with each other."""
    temperature: float = 1.0
    """Divides the logits; 1 samples from the model as it is."""
    top_p: float = 1.0
    """Samples from the most probable tokens that together have this probability; 1 samples from all."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens, with its end."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples; auto is vLLM where it is installed."""
    batch_size: int = 32
    """transformers: answers sampled at a time."""
    vllm_tensor_parallel_size: int = 1
    """vLLM: GPUs that share the model."""
    seed: int = 1234
    """Seed of the sampling. The same answers come again only with the same engine, sizes and machine."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_samples", "max_new_tokens", "batch_size", "vllm_tensor_parallel_size")
        require_positive(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be greater than 0 and at most 1")
        require_at_least(0, self, "seed")
        if self.uses_vllm and importlib.util.find_spec("vllm") is None:
            raise UserError(f"engine ({self.engine}) must be installed: `pip install vllm`, or --engine transformers")
        unused, engine = ("batch_size", "vllm") if self.uses_vllm else ("vllm_tensor_parallel_size", "transformers")
        if getattr(self, unused) != getattr(type(self), unused):
            raise UserError(f"{unused} ({getattr(self, unused)}) has no effect with engine {engine}; leave it out")

    @property
    def uses_vllm(self) -> bool:
        return self.engine == "vllm" or (self.engine == "auto" and importlib.util.find_spec("vllm") is not None)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sampled answer."""

    text: str
    """Decoded, special tokens included, without the end token."""
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """As sampled, up to the end token and with it."""
    is_finished: bool
    """Whether the model has ended it; otherwise it was cut at the longest length."""
    log_probs: tuple[float, ...] | None = None
    """Of each token, in nats, under the distribution it was drawn from; None where the sampler was not asked."""


class Sampler:
    """Samples answers of one model; prompts are rendered as training renders them. The first call loads the model, and
    `close`, or the end of a `with` block, lets go of it."""

    def __init__(
        self,
        model_folder: Path,
        tokenizer: "PreTrainedTokenizerBase",
        renderer: ChatRenderer,
        config: SamplingConfig,
        *,
        with_log_probs: bool = False,
    ) -> None:
        self._model_folder, self._with_log_probs = model_folder, with_log_probs
        self._tokenizer = tokenizer
        self._config = config
        self._end_tokens = _end_tokens(model_folder, tokenizer, renderer)
        self._engine: _VllmEngine | _TransformersEngine | None = None

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sample(self, prompts: Sequence[str], num_samples: int | None = None) -> list[list[Answer]]:
        """`num_samples` answers to each rendered prompt, in their order; the configuration's number if None.

        Raises UserError where the longest prompt and answer are more than the model's positions.
        """
        prompt_tokens = [self._tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        longest_prompt = max(map(len, prompt_tokens))
        self._check_length(longest_prompt)
        engine = self._loaded(longest_prompt + self._config.max_new_tokens)
        groups = engine.sample(prompt_tokens, self._config.num_samples if num_samples is None else num_samples)
        return [
            [self._answer(tuple(prompt), *sampled) for sampled in group]
            for prompt, group in zip(prompt_tokens, groups, strict=True)
        ]

    def close(self) -> None:
        """Gives the model's memory back; a later call loads it again."""
        if self._engine is None:
            return
        import torch

        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _loaded(self, length: int) -> "_VllmEngine | _TransformersEngine":
        """The engine, with room for so many tokens of a prompt and its answer."""
        if self._engine is not None and self._engine.max_length < length:
            self.close()
        if self._engine is None:
            make = _VllmEngine if self._config.uses_vllm else _TransformersEngine
            self._engine = make(self._model_folder, self._end_tokens, self._config, length, self._with_log_probs)
        return self._engine

    def _answer(self, prompt_tokens: tuple[int, ...], sampled: _TokenIds, log_probs: list[float] | None) -> Answer:
        end = next((place for place, token in enumerate(sampled) if token in self._end_tokens), None)
        content = sampled if end is None else sampled[:end]
        length = len(sampled) if end is None else end + 1
        # The clean-up would write "a ." as "a.", which was not sampled.
        text = self._tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Answer(
            text=cast(str, text),
            prompt_tokens=prompt_tokens,
            tokens=tuple(sampled[:length]),
            is_finished=end is not None,
            log_probs=None if log_probs is None else tuple(log_probs[:length]),
        )

    def _check_length(self, longest_prompt: int) -> None:
        config = _read_json(self._model_folder / "config.json")
        positions = config.get("text_config", config).get("max_position_embeddings")
        if positions is not None and longest_prompt + self._config.max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens ({self._config.max_new_tokens}) and the longest prompt "
                f"({counted(longest_prompt, 'token')}) must be at most max_position_embeddings ({positions}) "
                "together; lower the one or shorten the other"
            )


class _VllmEngine:
    def __init__(
        self, model_folder: Path, end_tokens: list[int], config: SamplingConfig, max_length: int, with_log_probs: bool
    ) -> None:
        from vllm import LLM

        self.max_length, self._with_log_probs = max_length, with_log_probs
        self._config, self._end_tokens = config, end_tokens
        self._engine = LLM(
            model=str(model_folder),
            skip_tokenizer_init=True,  # the tokenizer may lie elsewhere, and text is made here
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            max_model_len=max_length,  # memory for the model's longest context may not be there
            seed=config.seed,
        )

    def sample(self, prompts: list[_TokenIds], num_samples: int) -> list[list[_Sampled]]:
        """Each prompt's answers."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=num_samples,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            max_tokens=self._config.max_new_tokens,
            stop_token_ids=self._end_tokens,
            detokenize=False,
            **({"logprobs": 0} if self._with_log_probs else {}),  # of the sampled tokens, and of no others
        )
        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        outputs = self._engine.generate(asked, params, use_tqdm=is_on_terminal())
        return [[self._sampled(answer) for answer in output.outputs] for output in outputs]

    def _sampled(self, answer: Any) -> _Sampled:
        tokens = list(answer.token_ids)
        if not self._with_log_probs:
            return _Sampled(tokens)
        each = zip(tokens, answer.logprobs, strict=True)
        return _Sampled(tokens, [float(step[token].logprob) for token, step in each])


class _TransformersEngine:
    max_length = math.inf

    def __init__(
        self, model_folder: Path, end_tokens: list[int], config: SamplingConfig, _: int, with_log_probs: bool
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

        try:
            sees = hasattr(AutoConfig.from_pretrained(model_folder, trust_remote_code=False), "vision_config")
            auto_class: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model: Any = auto_class.from_pretrained(
                model_folder, dtype="auto", trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"model ({model_folder}) must be a folder with a Hugging Face model: {reason}") from None
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._config, self._with_log_probs = config, with_log_probs
        # Put in its place, as generate() fills what is unset from the model's own.
        self._model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=end_tokens,
            pad_token_id=end_tokens[0],  # masked before the prompt, and cut off after the end
        )

    def sample(self, prompts: list[_TokenIds], num_samples: int) -> list[list[_Sampled]]:
        """As `_VllmEngine.sample`; the tokens may go on after an end token."""
        import torch

        torch.manual_seed(self._config.seed)
        # Longest first: whatever does not fit into memory fails at once, and a batch's prompts are of about one length.
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        queue = [place for place in order for _ in range(num_samples)]
        groups: list[list[_Sampled]] = [[] for _ in prompts]
        with Progress("sample", total=len(queue), unit="answer") as shown:
            for start in range(0, len(queue), self._config.batch_size):
                batch = queue[start : start + self._config.batch_size]
                answers = _generate(self._model, [prompts[place] for place in batch], self._with_log_probs)
                for place, sampled in zip(batch, answers, strict=True):
                    groups[place].append(sampled)
                shown.update(len(batch))
        return groups


def _generate(model: Any, prompts: list[_TokenIds], with_log_probs: bool) -> list[_Sampled]:
    """One answer per prompt, with padding after its end."""
    import torch

    width = max(map(len, prompts))
    padding = [width - len(tokens) for tokens in prompts]  # on the left: answers start in the same column
    pad_token = model.generation_config.pad_token_id
    rows = [[pad_token] * count + tokens for count, tokens in zip(padding, prompts, strict=True)]
    mask = [[0] * count + [1] * (width - count) for count in padding]
    hooks, found = _log_prob_hooks() if with_log_probs else ({}, [])
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            **hooks,
        )
    tokens = output[:, width:].tolist()
    if not with_log_probs:
        return [_Sampled(row) for row in tokens]
    return [_Sampled(*pair) for pair in zip(tokens, torch.cat(found, dim=1).tolist(), strict=True)]


def _log_prob_hooks() -> tuple[dict[str, Any], list["Tensor"]]:
    """What `generate` is given so that each step adds the log-probabilities `[rows, 1]` of what it has sampled to the
    list. It would keep the whole vocabulary of every step itself."""
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    drawn_from: list[Tensor] = []
    found: list[Tensor] = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
            drawn_from[:] = [scores]
            return scores

    class Record(StoppingCriteria):
        """Is asked right after each draw; never stops."""

        def __call__(self, input_ids: "Tensor", scores: Any, **_: Any) -> "Tensor":
            found.append(drawn_from.pop().float().log_softmax(dim=-1).gather(1, input_ids[:, -1:]))
            return input_ids.new_zeros(len(input_ids)).bool()

    hooks = {
        "logits_processor": LogitsProcessorList([Keep()]),
        "stopping_criteria": StoppingCriteriaList([Record()]),
    }
    return hooks, found


def _end_tokens(model_folder: Path, tokenizer: "PreTrainedTokenizerBase", renderer: ChatRenderer) -> list[int]:
    """The ids that end an answer: the one that closes a turn in the chat template, first, as training teaches it; the
    tokenizer's end of text; and those of the model's generation config."""
    stated = _read_json(model_folder / "generation_config.json").get("eos_token_id")
    others = stated if isinstance(stated, list) else [stated]
    tokens = [tokenizer.convert_tokens_to_ids(renderer.end_of_turn()), tokenizer.eos_token_id, *others]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
