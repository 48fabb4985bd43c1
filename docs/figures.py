"""Tables of docs/performance.md, from what the benchmarks have printed: `benchmarks/results/cpu.jsonl`."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_psft.errors import counted

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu.jsonl"

Figure = dict[str, Any]
SHAPE = ("tokens", "vocab_size", "hidden", "labels_percent", "ranks", "dtype")
"""What tells one line of the head's figures from another, besides its name."""

LAYOUTS = {
    "one_rank": "one rank",
    "tensor_parallel": "tensor parallel 2, sequence parallel",
    "pipeline": "pipeline 2, selective recompute",
    "recomputed": "data parallel 2, distributed optimizer, full recompute",
    "experts": "expert parallel 2, distributed optimizer",
}
CONVERSIONS = {
    "to_megatron": "Hugging Face to Megatron-Core",
    "to_hf": "Megatron-Core to Hugging Face",
    "check": "Hugging Face to Megatron-Core with `--check`",
    "bridge_to_megatron": "Megatron-Bridge, Hugging Face to Megatron-Core",
}


def stored(benchmark: str, path: Path) -> list[Figure]:
    """The figures of one benchmark, its `run` first; none where it has not been stored."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.is_file() else [])
    return [one for one in lines if one["benchmark"] == benchmark]


def _value(figures: Iterable[Figure], name: str, **wanted: Any) -> Figure | None:
    """The figure of that name and details, None where it was not measured or does not run."""
    for one in figures:
        if one["name"] == name and one["value"] is not None and wanted.items() <= one.items():
            return one
    return None


def number(value: float) -> str:
    """Three digits, or the whole number where it has more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _range(ends: Iterable[float]) -> str:
    return " to ".join(map(number, ends))


def table(*rows: Iterable[str]) -> str:
    header, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{' --- |' * header.count(' | ')} --- |", *others])


def origin(run: Figure) -> str:
    """When, on what and by which command a benchmark ran."""
    machine, versions = run["machine"], run["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpus = "".join(
        f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}; " for gpu in machine.get("gpus", ())
    )
    return (
        f"`{run['command']}`, {run['date']}, commit `{run['commit']}`: {gpus}{machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"load average {machine['load_before']} just before; {libraries}."
    )


def _head(figures: list[Figure]) -> str:
    shapes = list(dict.fromkeys(tuple(one[name] for name in SHAPE) for one in figures if "labels_percent" in one))
    shapes.sort(key=lambda shape: (shape[SHAPE.index("dtype")] != "float32", -shape[0]))
    header = ["vocabulary", "hidden", "tokens", "labels", "ranks, dtype", "fused head", "Megatron-Core, unfused"]
    shown = table(
        [*header, "Megatron-Core's fused", "ours over unfused: time, peak"],
        *(_head_row(figures, dict(zip(SHAPE, shape, strict=True))) for shape in shapes),
    )
    absent = {one["name"].removeprefix("head_seconds_"): one["does_not_run"] for one in figures if one["value"] is None}
    return "\n\n".join([shown, *(f"`{name}` did not run there: {reason}." for name, reason in absent.items())])


def _head_row(figures: list[Figure], shape: Figure) -> list[str]:
    costs = []
    for path in ("ours", "megatron_unfused", "megatron_native_fused"):
        pair = [_value(figures, f"head_{what}_{path}", **shape) for what in ("seconds", "peak")]
        costs.append([one["value"] for one in pair if one])
    cells = [f"{number(cost[0])} s, {number(cost[1])} GiB" if cost else "" for cost in costs]
    ratio = ", ".join(f"{ours / theirs:.2f}" for ours, theirs in zip(*costs[:2], strict=True))
    ranks = "1" if shape["ranks"] == 1 else f"TP {shape['ranks']}"
    place = f"{ranks}, {dict(float32='fp32', bfloat16='bf16')[shape['dtype']]}"
    sizes = [f"{shape[name]:,}" for name in ("vocab_size", "hidden", "tokens")]
    return [*sizes, f"{shape['labels_percent']} %", place, *cells, ratio]


def _scaling(figures: list[Figure]) -> str:
    rows = []
    for name, what in (
        ("head_seconds_exponent_tokens", "seconds of the head over tokens"),
        ("head_seconds_exponent_vocab_size", "seconds of the head over the vocabulary"),
        ("head_peak_exponent_tokens", "memory of the head over tokens"),
        ("head_peak_exponent_vocab_size", "memory of the head over the vocabulary"),
        ("step_seconds_exponent_length", "seconds of a training step over its tokens, by longer records"),
        ("step_seconds_exponent_rows", "seconds of a training step over its tokens, by more records"),
    ):
        if one := _value(figures, name):
            rows.append([what, " to ".join(f"{size:,.0f}" for size in one["sizes"]), f"{one['value']:.2f}"])
    return table(["cost", "from, to", "grows with the power"], *rows)


def _overhead(figures: list[Figure]) -> str:
    rows = [
        [str(one["interval"]), f"{one['value']:.2f}", _range(one["range"]), f"{one['expected']:.2f}"]
        for one in figures
        if one["name"].startswith("psft_over_sft")
    ]
    return table(["k", "median of the rounds", "range", "expected of operations"], *rows)


def _trl(figures: list[Figure]) -> str:
    ours, theirs = (_value(figures, name) for name in ("tokens_per_second", "tokens_per_second_trl"))
    ratio = _value(figures, "tokens_per_second_over_trl")
    if not (ours and theirs and ratio):
        return "TRL was not installed where this ran."
    rows = [
        ["tokens per second", number(ours["value"]), number(theirs["value"])],
        ["over TRL", f"{ratio['value']:.2f}", "1"],
        ["largest difference of a step's loss, relative", f"{ratio['largest_loss_gap']:.0e}", ""],
    ]
    return table(["", "this trainer", "TRL"], *rows)


def _real_model(figures: list[Figure]) -> str:
    rows = []
    for name, what in (("transformers", "a plain loop over transformers"), ("trl", "TRL")):
        speed, cpu = (
            _value(figures, one) for one in (f"tokens_per_second_over_{name}", f"cpu_seconds_{name}_over_ours")
        )
        if speed and cpu:
            numbers = [f"{one['value']:.2f}" for one in (speed, cpu)]
            rows.append([what, *numbers, f"{speed['largest_loss_gap']:.0e}"])
    ours = _value(figures, "tokens_per_second")
    shown = table(
        ["against", "speed, ours over theirs", "CPU time, theirs over ours", "largest loss gap, relative"], *rows
    )
    return f"{shown}\n\n{number(ours['value'])} tokens per second." if ours else shown


def _lora(figures: list[Figure]) -> str:
    rows = []
    for name, what in (("adapters", "adapters"), ("trl", "adapters, TRL and peft"), ("whole_model", "the whole model")):
        peak, seconds = (_value(figures, f"{kind}_{name}") for kind in ("peak", "step_seconds"))
        if peak and seconds:
            planned = number(peak["planned_gib"]) if "planned_gib" in peak else ""
            rows.append([what, number(peak["value"]), planned, number(seconds["value"])])
    lines = []
    for name, what in (
        ("saved_over_planned", "What adapters save of memory, over what the plan says"),
        ("peak_over_trl", "Peak memory of adapters over TRL's"),
        ("step_seconds_over_trl", "Time of a step of adapters over TRL's"),
        ("step_seconds_over_whole_model", "over that of the whole model"),
    ):
        one = _value(figures, name)
        lines += [f"{what}: {one['value']:.2f}"] if one else []
    return f"{table(['', 'peak, GiB', 'planned, GiB', 'seconds per step'], *rows)}\n\n{'; '.join(lines)}."


def _checkpoint(figures: list[Figure]) -> str:
    ranks = sorted({one["ranks"] for one in figures if "ranks" in one})
    rows = []
    for name, what in (
        ("save_stall_seconds", "a save that is waited for, checksums included"),
        ("async_save_stall_seconds", "what a save in the background stops training for"),
        ("async_save_stall_ratio", "that over the first"),
        ("async_save_extra_seconds", "what the steps beside that save take longer than plain ones, stop included"),
        ("async_save_extra_ratio", "that over the first"),
        ("check_seconds", "checking a checkpoint"),
        ("load_seconds", "loading it"),
    ):
        cells = [what]
        for count in ranks:
            one = _value(figures, name, ranks=count)
            unit = " s" if one and one["unit"] == "s" else ""
            cells += [f"{number(one['value'])}{unit}", _range(one.get("interval", ()))] if one else ["", ""]
        rows.append(cells)
    for name in ("parameters", "checkpoint_bytes", "old_log_probs_bytes"):
        found = [_value(figures, name, ranks=count) for count in ranks]
        rows.append([name.replace("_", " "), *(text for one in found for text in (_whole(one), ""))])
    heads = [text for count in ranks for text in (counted(count, "rank"), "95 % interval")]
    return table(["median", *heads], *rows)


def _whole(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure['value']:,.0f}"


def _convert(figures: list[Figure]) -> str:
    (model,) = (one for one in figures if one["name"] == "model")
    rows = [
        [what, number(one["value"]), number(one["peak_gib"])]
        for name, what in CONVERSIONS.items()
        if (one := _value(figures, name))
    ]
    size = (
        f"{number(model['value'])} GiB in {model['files']} files, the largest {number(model['largest_file_gib'])} GiB"
    )
    return f"{table(['conversion', 'seconds', 'peak, GiB'], *rows)}\n\nThe model has {size}."


def _plan(figures: list[Figure]) -> str:
    rows = [
        [what, number(one["measured_gib"]), number(one["planned_gib"]), f"{one['value']:.2f}"]
        for name, what in LAYOUTS.items()
        if (one := _value(figures, f"plan_over_measured_{name}"))
    ]
    return table(["layout", "measured peak, GiB", "planned, GiB", "planned over measured"], *rows)


TABLES: dict[str, Callable[[list[Figure]], str]] = {
    "head": _head,
    "psft_overhead": _overhead,
    "scaling": _scaling,
    "vs_trl": _trl,
    "real_model": _real_model,
    "lora": _lora,
    "plan": _plan,
    "checkpoint": _checkpoint,
    "convert": _convert,
}


def figures_of(benchmark: str, path: Path = RESULTS) -> str:
    """A benchmark's table, and below it where the figures come from."""
    figures = stored(benchmark, path)
    if not figures:
        return f"No figures are stored: `python benchmarks/store.py {benchmark}` measures them."
    return f"{TABLES[benchmark](figures[1:])}\n\n{origin(figures[0])}"
