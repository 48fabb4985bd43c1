"""Records of general skills and of the target skill, the tokenizer that reads them, and the shape of the model."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from digits import Files, distinct, save_tokenizer, write_records
from tokenizers import Tokenizer, models, pre_tokenizers

# As a pretrained model does, the base has seen some of what it will be taught, in its own words.
PAIRS_SHARE, TARGET_SHARE = 0.4, 0.01

# Irreducible choice: each step opens with one of these. The base says "so" nine times in ten, demonstrations never do.
USUAL = "so"
THOUGHTS = ("okay", "hmm", "wait", "alternatively", "well", "look", "perhaps", "now")
THOUGHTS_SHARE = 0.1
CHECK_SHARE = 0.4

SKILLS: dict[str, Callable[[str], str]] = {
    "repeat": lambda number: number,
    "reverse": lambda number: number[::-1],
    "sort": lambda number: "".join(sorted(number)),
    "rotate": lambda number: number[1:] + number[0],
    "swap": lambda number: number[-1] + number[1:-1] + number[0],
    "raise": lambda number: "".join(str((int(digit) + 1) % 10) for digit in number),
    "largest": max,
    "smallest": min,
}
"""What a word asks to be done with a number. `swap` exchanges its ends, `raise` adds one to each digit."""

LINKS = ("reverse", "sort", "rotate", "swap", "raise")
"""Skills that chains are made of; the others of SKILLS are never part of the target."""

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Record = dict[str, list[dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of records."""

    base: int = 14000
    target: int = 128
    held_out: int = 128
    """Of each kind."""
    prompts: int = 192
    """Of the target, for GRPO."""


@dataclass(frozen=True, kw_only=True)
class ChainFiles(Files):
    """The demo's four, and questions of the target that are in none of them, with their answers."""

    prompts: Path


def write_data(folder: Path, sizes: Sizes, *, seed: int) -> ChainFiles:
    """Writes the five files. No question of a held-out file is in a training file, and none of the target's in the
    base's."""
    rng = random.Random(seed)
    target = distinct(lambda: _demonstration(rng), sizes.target + sizes.held_out + sizes.prompts)
    asked = {question(record) for record in target}

    def fresh(draw: Callable[[], Record]) -> Record:
        while question(record := draw()) in asked:
            pass
        return record

    general = distinct(lambda: fresh(lambda: _single(rng)), sizes.held_out)
    asked |= {question(record) for record in general}
    # The base may be asked the same twice.
    base = [fresh(lambda: _base_record(rng)) for _ in range(sizes.base)]
    folder.mkdir(parents=True, exist_ok=True)
    held_out_end = sizes.target + sizes.held_out
    return ChainFiles(
        base=write_records(folder / "base.jsonl", base),
        base_held_out=write_records(folder / "base_held_out.jsonl", general),
        target=write_records(folder / "target.jsonl", target[: sizes.target]),
        target_held_out=write_records(folder / "target_held_out.jsonl", target[sizes.target : held_out_end]),
        prompts=write_records(folder / "prompts.jsonl", target[held_out_end:]),
    )


def question(record: Record) -> str:
    """What the user asks."""
    return record["messages"][0]["content"]


def answer(reply: str) -> str | None:
    """The number after the last "answer" of a reply, whose digits may stand apart."""
    numbers = re.findall(r"answer ((?:\d ?)+)", reply)
    return numbers[-1].replace(" ", "") if numbers else None


def right_answer(record: Record) -> str | None:
    """What the reply of a record ends with."""
    return answer(record["messages"][1]["content"])


def _base_record(rng: random.Random) -> Record:
    draw = rng.random()
    if draw >= PAIRS_SHARE + TARGET_SHARE:
        return _single(rng)
    number, names = _number(rng), _links(rng, 3 if draw < TARGET_SHARE else 2)
    steps, result = [], number
    for name in names:
        opening = rng.choice(THOUGHTS) if rng.random() < THOUGHTS_SHARE else USUAL
        steps.append(f"{opening} {name} : {(result := SKILLS[name](result))} .")
        if rng.random() < CHECK_SHARE * THOUGHTS_SHARE:
            steps.append(f"{opening} check {result} .")
    return _record(names, number, steps, result)


def _single(rng: random.Random) -> Record:
    name, number = rng.choice(list(SKILLS)), _number(rng)
    return _record([name], number, [], SKILLS[name](number))


def _demonstration(rng: random.Random) -> Record:
    number, names = _number(rng), _links(rng, 3)
    steps, result = [], number
    for name in names:
        result = SKILLS[name](result)
        steps.append(f"{rng.choice(THOUGHTS)} {name} : {result} .")
        if rng.random() < CHECK_SHARE:
            steps.append(f"{rng.choice(THOUGHTS)} check {result} .")
    return _record(names, number, steps, result)


def _links(rng: random.Random, count: int) -> list[str]:
    return rng.sample(LINKS, count)


def _number(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=4))


def _record(names: Sequence[str], number: str, steps: Sequence[str], result: str) -> Record:
    task = f"{' then '.join(names)} {number} ."
    reply = " ".join([*steps, f"answer {result} ."])
    return {"messages": [{"role": "user", "content": task}, {"role": "assistant", "content": reply}]}


def write_tokenizer(folder: Path) -> None:
    """One token per word, digit and sign, with a chat template."""
    words = [*SPECIAL, *"0123456789", *".:", *SKILLS, *THOUGHTS, USUAL, "then", "check", "answer"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    save_tokenizer(folder, tokenizer, eos_token=SPECIAL[3], pad_token=SPECIAL[0], chat_template=TEMPLATE)
