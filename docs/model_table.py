"""The table of model families: what of each is compared with transformers, from the tests' own cases."""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_psft.model.families import FAMILIES
from megatron_psft.sources.bridge_rules import FAMILIES as BRIDGE_FAMILIES
from tests.nemo import test_source as bridge
from tests.train import test_parity as parity

MODEL_NAMES = {
    "llama": "Llama 3.x",
    "qwen2": "Qwen2/2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 and its mixtures of experts",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
}
"""As pages write them."""

_CASES = (*parity.DENSE_CASES, *parity.EXPERT_CASES, *parity.VARIANT_CASES, *parity.VISION_CASES)


def model_table() -> str:
    lines = [
        "| models | `model_type` | trained on | trajectories, with both lines of Megatron-Core | with 0.16.1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model_type, family in FAMILIES.items():
        both, first = (_layouts(model_type, on_both) for on_both in (True, False))
        trained = "text; the vision tower passes through" if family.vision else "text"
        lines.append(f"| {MODEL_NAMES[model_type]} | `{model_type}` | {trained} | {both} | {first} |")
    return "\n".join(lines)


_OF_BRIDGE = {
    "gemma3_text": "Gemma 3 (text)",
    "olmoe": "OLMoE",
    "glm4_moe": "GLM-4.5",
    "deepseek_v3": "DeepSeek-V3",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5 (text)",
    "nemotron_h": "Nemotron-H",
}


def bridge_table() -> str:
    lines = ["| models | `model_type` | trajectories | as our own source |", "| --- | --- | --- | --- |"]
    for model_type in BRIDGE_FAMILIES:
        layouts = ", ".join(_of_family(model_type, bridge.CASES))
        name = _OF_BRIDGE.get(model_type) or MODEL_NAMES[model_type]
        same = "4 steps within 1e-6" if model_type in bridge.OF_BOTH else "-"
        lines.append(f"| {name} | `{model_type}` | {layouts} | {same} |")
    return "\n".join(lines)


def _of_family(model_type: str, cases: Iterable[Any]) -> Iterator[str]:
    """The layouts of the family's cases; those of a variant of it, which has a part of its own, bear its name."""
    for case in cases:
        family, layout = getattr(case, "values", case)
        of, _, variant = family.partition("-")
        if of == model_type:
            yield f"{layout} ({variant})" if variant else str(layout)


def _layouts(model_type: str, on_both: bool) -> str:
    marks = {id(case): [mark.name for mark in getattr(case, "marks", ())] for case in _CASES}
    return ", ".join(_of_family(model_type, [it for it in _CASES if on_both is (marks[id(it)] != ["slow"])])) or "-"
