"""Mixes demonstrations and rollouts into records for one training, after LUFFY or HPT.

The rollouts are those of `psft rollout` on the demonstrations' own prompts, with --keep-flat-groups: where every
answer is wrong, or every one is right, is what these methods decide by. A rollout belongs to the demonstration whose
messages before the last turn are its own.

* all: demonstrations with advantage 1, as PSFT has them, and rollouts with their own advantages.
* luffy (arXiv 2504.14945): a demonstration is one more answer of its prompt's group, with reward 1, and advantages are
  those within this larger group. LUFFY's shaping of the demonstrations' ratio is not part of this: they train with the
  clipped ratio, as the rollouts do.
* hpt (arXiv 2509.04419): prompts whose rollouts are right at most at --pass-rate give their demonstration, with
  advantage 1; the others give their rollouts.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from megatron_psft.config.flags import require_absent, run_command
from megatron_psft.config.paths import PathText
from megatron_psft.data.files import Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.records import Record, raise_or_report, read_records
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError
from megatron_psft.rollout.rewards import group_advantages

EXAMPLES = """example:
    psft rollout --model runs/first/hf --prompts train.jsonl --keep-flat-groups --out rollouts.jsonl
    python examples/mixed/mix.py --demonstrations train.jsonl --rollouts rollouts.jsonl --out mixed.jsonl
    torchrun pretrain_psft.py --config examples/mixed/train.yaml --data mixed.jsonl --load-hf runs/first/hf ..."""

RolloutRow = dict[str, Any]
"""What `psft rollout` writes: messages, advantage, reward and more."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """What is mixed, and how."""

    demonstrations: tuple[PathText, ...]
    """Records as `pretrain_psft.py --data` takes them."""
    rollouts: tuple[PathText, ...]
    """Files of `psft rollout`."""
    system_prompt: str | None = None
    """System message of the demonstrations, in place of their own; the one that the rollouts were sampled with."""
    method: Literal["all", "luffy", "hpt"] = "luffy"
    """Everything as it is; demonstrations as answers of their prompt's group; or the one or the others by the share of
    right answers."""
    pass_rate: float = 0.0
    """hpt: mean reward up to which a prompt's demonstration is taken."""
    out: PathText
    """JSON Lines file to write; it must not exist."""

    def __post_init__(self) -> None:
        require_absent(self, "out")
        if not 0 <= self.pass_rate < 1:
            raise UserError(f"pass_rate ({self.pass_rate}) must be at least 0 and below 1")
        if self.pass_rate and self.method != "hpt":
            raise UserError(f"pass_rate ({self.pass_rate}) has no effect with method {self.method}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole command."""

    mix: MixConfig


def main(argv: Sequence[str]) -> int:
    """Writes the records and returns the exit code: 0, or 2 after a user's mistake."""
    return run_command(Config, lambda config: mix(config.mix), argv, epilog=EXAMPLES)


def mix(config: MixConfig) -> None:
    field, keys = "demonstrations", RecordKeys(system_prompt=config.system_prompt)
    demonstrations, bad = read_records(config.demonstrations, keys, field=field)
    counts, total = Counter(record.reason for record in bad), len(bad) + len(demonstrations)
    raise_or_report(field, bad, counts, total, skip_bad_records=None)
    groups = read_groups(config.rollouts)
    matched = sum(key_of(record.messages) in groups for record in demonstrations)
    if config.method != "all" and not matched:
        raise UserError(
            f"method ({config.method}) needs rollouts on the prompts of the demonstrations, and none is; sample with "
            "--prompts of the demonstrations, --keep-flat-groups and the same --system-prompt"
        )
    if config.method == "all":
        mixed = [*map(as_demonstration, demonstrations), *(row for group in groups.values() for row in group)]
    else:
        method = join_group if config.method == "luffy" else choose_side
        mixed = [
            row for record in demonstrations for row in method(record, groups.get(key_of(record.messages)), config)
        ]
    write(mixed, Path(config.out))
    share = sum(row["source"] == "demonstration" for row in mixed)
    print(f"{len(demonstrations)} demonstrations, {matched} of them with rollouts on their prompt")
    print(f"{len(mixed)} records in {config.out}: {share} demonstrations, {len(mixed) - share} rollouts")


def read_groups(paths: Sequence[str]) -> dict[str, list[RolloutRow]]:
    """Rollouts by prompt, with their source noted. Raises UserError for rows that `psft rollout` has not written."""
    groups: dict[str, list[RolloutRow]] = defaultdict(list)
    for row in (row for path in paths for row in open_rows(path, field="rollouts")):
        if (
            not isinstance(row, Row)
            or not isinstance(row.value, dict)
            or not {"messages", "reward"} <= row.value.keys()
        ):
            raise UserError(f"rollouts must be written by `psft rollout`; {row.source} has no reward or no messages")
        groups[key_of(row.value["messages"])].append({**row.value, "source": "rollout"})
    return groups


def key_of(messages: Sequence[Any]) -> str:
    """Tells prompts apart: what stands before the last turn."""
    return json.dumps(list(messages[:-1]), sort_keys=True)


def as_demonstration(record: Record, advantage: float | None = None) -> dict[str, Any]:
    """The row of a demonstration, with its own advantage or another one."""
    in_prompt = {i for i in range(record.prompt_length) if record.messages[i]["role"] == "assistant"}
    unlearned = in_prompt | record.unlearned
    messages = [{**turn, "weight": 0} if i in unlearned else turn for i, turn in enumerate(record.messages)]
    own = record.advantage if advantage is None else advantage
    row: dict[str, Any] = {"messages": messages, "advantage": own, "source": "demonstration"}
    row |= {"tools": list(record.tools)} if record.tools else {}
    return row | ({"chat_template_kwargs": dict(record.template_kwargs)} if record.template_kwargs else {})


def join_group(record: Record, group: list[RolloutRow] | None, config: MixConfig) -> Iterator[dict[str, Any]]:
    """LUFFY: advantages over the rollouts and the demonstration, whose reward is 1. Nothing of a group that is all
    right, where they are 0, nor of a demonstration without rollouts."""
    rewards = [float(row["reward"]) for row in group or ()]
    *advantages, advantage = group_advantages([*rewards, 1.0], "grpo")
    if group is None or min(rewards) == 1:
        return
    yield as_demonstration(record, advantage)
    yield from ({**row, "advantage": value} for row, value in zip(group, advantages, strict=True))


def choose_side(record: Record, group: list[RolloutRow] | None, config: MixConfig) -> Iterator[dict[str, Any]]:
    """HPT: the demonstration where the model fails, else its own answers, without those of advantage 0."""
    if group is None or fmean(row["reward"] for row in group) <= config.pass_rate:
        yield as_demonstration(record)
    else:
        yield from (row for row in group if row["advantage"])


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Under its name only when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
