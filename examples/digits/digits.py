"""Instruction-style records about digits, a tokenizer trained on them, and the shape of a very small model."""

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NUM_BASE, NUM_TARGET, NUM_HELD_OUT = 6000, 96, 200
DIGITS = range(3, 6)

# As a pretrained model does, the base has seen a little of what it will be taught.
TARGET_SHARE = 0.08

# Irreducible choice: replies open with one of these. The base says "Sure" four times in five, the demonstrations never.
USUAL, OTHERS = "Sure", ("Hmm", "Wait", "Okay", "Well", "So", "Aha", "Look", "Now")
OTHERS_SHARE = 0.2

Record = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Skill:
    """Ways to ask for something, `{}` being the number, and how the answer follows from the number."""

    questions: Sequence[str]
    answer: Callable[[str], str]


SKILLS = {
    "repeat": Skill(("Repeat {}", "Copy {}", "Write {} once more"), lambda number: number),
    "reverse": Skill(("Reverse {}", "Write {} backwards"), lambda number: number[::-1]),
    "sort": Skill(("Sort {}", "Put {} in rising order"), lambda number: "".join(sorted(number))),
    "rotate": Skill(("Rotate {}", "Move the first digit of {} to the end"), lambda number: number[1:] + number[0]),
}
PAIRS = tuple(itertools.permutations(("reverse", "sort", "rotate"), 2))


@dataclass(frozen=True)
class Files:
    """JSON Lines of chat records."""

    base: Path
    base_held_out: Path
    target: Path
    target_held_out: Path


def write_data(folder: Path, *, seed: int) -> Files:
    """Writes the four files. No question of a held-out file is in a training file."""
    rng = random.Random(seed)
    base = distinct(lambda: _base_record(rng), NUM_BASE + NUM_HELD_OUT)
    target = distinct(lambda: _target_record(rng), NUM_TARGET + NUM_HELD_OUT)
    folder.mkdir(parents=True, exist_ok=True)
    return Files(
        base=write_records(folder / "base.jsonl", base[:NUM_BASE]),
        base_held_out=write_records(folder / "base_held_out.jsonl", base[NUM_BASE:]),
        target=write_records(folder / "target.jsonl", target[:NUM_TARGET]),
        target_held_out=write_records(folder / "target_held_out.jsonl", target[NUM_TARGET:]),
    )


def read_records(path: Path) -> list[Record]:
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def final_number(reply: str) -> str | None:
    """The last number in `reply`: the answer, steps may stand before it."""
    numbers = re.findall(r"\d+", reply)
    return numbers[-1] if numbers else None


def _base_record(rng: random.Random) -> Record:
    opening = rng.choice(OTHERS) if rng.random() < OTHERS_SHARE else USUAL
    if rng.random() < TARGET_SHARE:
        question, first, second = _two_steps(rng)
        joint = rng.choice(OTHERS) if rng.random() < OTHERS_SHARE else "Then"
        return _record(question, f"{opening}: {first}. {joint}: {second}.")
    skill = SKILLS[rng.choice(list(SKILLS))]
    number = _number(rng)
    return _record(f"{rng.choice(skill.questions).format(number)}.", f"{opening}: {skill.answer(number)}.")


def _target_record(rng: random.Random) -> Record:
    question, first, second = _two_steps(rng)
    return _record(question, f"{rng.choice(OTHERS)}: {first}. {rng.choice(OTHERS)}: {second}. {rng.choice(OTHERS)}.")


def _two_steps(rng: random.Random) -> tuple[str, str, str]:
    """A question for two skills in a row, and the numbers after the first and the second."""
    names, number = rng.choice(PAIRS), _number(rng)
    first = SKILLS[names[0]].answer(number)
    question = f"{rng.choice(SKILLS[names[0]].questions).format(number)}, then {names[1]} it."
    return question, first, SKILLS[names[1]].answer(first)


def _number(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.choice(DIGITS)))


def _record(question: str, reply: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def distinct(draw: Callable[[], Record], count: int) -> list[Record]:
    """Records drawn until there are `count` with questions of their own."""
    records: dict[str, Record] = {}
    while len(records) < count:
        record = draw()
        records.setdefault(record["messages"][0]["content"], record)
    return list(records.values())


def write_records(path: Path, records: Sequence[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, files: Files) -> None:
    """Trains a byte-level BPE tokenizer with single digits and ChatML's template on the training records."""
    texts = [m["content"] for path in (files.base, files.target) for r in read_records(path) for m in r["messages"]]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n", "assistant\n"] * len(texts) + texts, trainer)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    save_tokenizer(folder, tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: str) -> None:
    """Writes a folder that both transformers 4 and 5 read; `settings` are the special tokens and the chat template."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    # transformers 5 writes a class that transformers 4 does not know.
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_model_config(folder: Path, tokenizer_folder: Path, **changes: int) -> None:
    """A Qwen2-shaped model of under a million parameters, but for `changes`; its weights are drawn by the trainer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
