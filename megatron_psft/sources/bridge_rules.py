"""What of a `config.json` Megatron-Bridge 0.6 is known to read as transformers does, family by family, and what not.

Bridge checks neither that it has read all of a configuration nor that a setting is one it can build: a window, a
scaling or a bias that it leaves out gives another model, without a word. So a family is taken once it was compared
with transformers, with the settings that were, and everything else is refused by its name. Imports no torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_psft.errors import UserError

Fields = Mapping[str, Any]
"""A `config.json`."""

_SIZES = ("num_hidden_layers", "num_attention_heads", "vocab_size")

Rule = Callable[[Fields], str | None]
"""From a configuration to what is wrong with it: the field with its value, and why."""


_UNREAD = "Megatron-Bridge does not read it"


def only(name: str, *values: Any, why: str = _UNREAD) -> Rule:
    """The field has one of `values`, of which the first is what a missing field means."""

    def check(config: Fields) -> str | None:
        value = config.get(name, values[0])
        return None if value in values else f"{name} ({value}) is not supported: {why}"

    return check


def rope_of(config: Fields) -> Fields:
    """The rotary embedding's parameters, in the spelling of transformers 4 or 5."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found if isinstance(found, Mapping) else {}


def rope_types(*kinds: str) -> Rule:
    """The rotary embedding is of one of these kinds."""

    def check(config: Fields) -> str | None:
        rope = rope_of(config)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in kinds:
            return None
        return f"rope_type ({kind}) is not supported: Megatron-Bridge builds another model than its numbers say"

    return check


def _llama3_numbers(config: Fields) -> str | None:
    """Bridge hands on the factor alone; Megatron-Core has the others of the published models."""
    published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = rope_of(config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    for name, value in published.items():
        if rope.get(name, value) != value:
            return f"{name} ({rope[name]}) of the rope scaling is not supported: Megatron-Bridge takes it as {value}"
    return None


def _window(config: Fields) -> str | None:
    if config.get("use_sliding_window"):
        return f"use_sliding_window (True) is not supported: {_UNREAD}"
    return None


def _five_to_one(config: Fields) -> str | None:
    """Gemma 3's layers: five with a window, then one without, and so on, whatever the file says."""
    found = config.get("layer_types")
    wanted = [
        "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(config["num_hidden_layers"])
    ]
    if found not in (None, wanted):
        return "layer_types other than five of sliding_attention and one of full_attention is not supported: " + _UNREAD
    return None


def _gemma3_rope(config: Fields) -> str | None:
    """A base for each kind of layer, and a linear scaling for those without a window."""
    rope = rope_of(config)
    by_layers = {kind: rope.get(kind) or {} for kind in ("sliding_attention", "full_attention")}
    scalings = by_layers if any(by_layers.values()) else {"full_attention": rope}
    for kind, scaling in scalings.items():
        name = scaling.get("rope_type") or scaling.get("type") or "default"
        if name not in ("default", "linear") or (name, kind) == ("linear", "sliding_attention"):
            return f"rope_type ({name}) of {kind} is not supported: {_UNREAD}"
    return None


def _alternating(config: Fields) -> str | None:
    """gpt-oss: a layer with a window, then one without."""
    found = config.get("layer_types")
    kinds = ("sliding_attention", "full_attention")
    if found not in (None, [kinds[layer % 2] for layer in range(config["num_hidden_layers"])]):
        return "layer_types other than sliding_attention and full_attention in turn is not supported: " + _UNREAD
    return None


def _told_apart(config: Fields) -> str | None:
    """Bridge tells by the sizes which way a matrix of gpt-oss's experts lies."""
    hidden, inner = config.get("hidden_size"), config.get("intermediate_size")
    if inner is not None and hidden == 2 * inner:
        return f"hidden_size ({hidden}) of twice the intermediate_size is not supported: matrices would be turned"
    return None


def _low_rank_queries(config: Fields) -> str | None:
    if config.get("q_lora_rank", 1) is None:
        return "q_lora_rank (None) is not supported: it was not compared"
    return None


def _kinds_of_layers(config: Fields) -> str | None:
    """Nemotron-H's: Mamba, attention, MLP and experts, a character each, as published files have it."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != config["num_hidden_layers"]:
        return f"hybrid_override_pattern ({pattern}) must have a character for each of num_hidden_layers"
    if not set(pattern) <= set("M*-E"):
        return f"hybrid_override_pattern ({pattern}) is not supported: only M, *, - and E were compared"
    return None


_COMMON: tuple[Rule, ...] = (
    only("quantization_config", None, why="quantized weights are not trained"),
    only("attention_dropout", 0.0, why="two passes of one policy would differ"),
    _window,
)
_PLAIN = (*_COMMON, only("hidden_act", "silu", why="it was not compared"))
_NO_BIASES = (only("attention_bias", False), only("mlp_bias", False))
_PLAIN_ROPE = rope_types("default")
_NOT_COMPARED = "it was not compared"
_INFINITIES = (float("inf"), {"__float__": "Infinity"})  # published, and as transformers 5 writes it
_EPSILONS = ("layer_norm_epsilon", "rms_norm_eps")

FAMILIES: Mapping[str, tuple[Rule, ...]] = {
    "llama": (*_PLAIN, *_NO_BIASES, rope_types("default", "llama3"), _llama3_numbers),
    "qwen2": (*_PLAIN, _PLAIN_ROPE),
    "qwen3": (*_PLAIN, *_NO_BIASES, _PLAIN_ROPE),
    "gemma3_text": (
        *(*_COMMON, only("attention_bias", False), _five_to_one, _gemma3_rope),
        only("hidden_activation", "gelu_pytorch_tanh"),
        *(only(name, None) for name in ("final_logit_softcapping", "attn_logit_softcapping")),
        only("use_bidirectional_attention", False, None),
    ),
    "olmoe": (
        *(*_PLAIN, only("attention_bias", False), _PLAIN_ROPE),
        only("clip_qkv", None),
        only("norm_topk_prob", False, why=_NOT_COMPARED),
    ),
    "glm4_moe": (
        *(*_PLAIN, _PLAIN_ROPE),
        only("n_group", 1, why=_NOT_COMPARED),
        only("topk_group", 1, why=_NOT_COMPARED),
        only("norm_topk_prob", True, why=_NOT_COMPARED),
    ),
    "qwen3_moe": (
        *(*_PLAIN, *_NO_BIASES, _PLAIN_ROPE),
        only("mlp_only_layers", [], None, why="Megatron-Bridge would leave the experts of such a layer unfilled"),
        only("decoder_sparse_step", 1),
        only("norm_topk_prob", True, why=_NOT_COMPARED),
    ),
    "mistral": (*_PLAIN, _PLAIN_ROPE),
    "deepseek_v3": (
        *(*_PLAIN, only("attention_bias", False), rope_types("default", "yarn")),
        only("rms_norm_eps", 1e-6, why="transformers has 1e-6 in two norms whatever the file says"),
        only("norm_topk_prob", True, why=_NOT_COMPARED),
        only("moe_layer_freq", 1, why=_NOT_COMPARED),
        _low_rank_queries,
    ),
    "gpt_oss": (
        *(*_PLAIN, rope_types("yarn"), _alternating, _told_apart),
        only("attention_bias", True, why=_NOT_COMPARED),
    ),
    "qwen3_next": (
        *(*_PLAIN, only("attention_bias", False), _PLAIN_ROPE),
        only("mlp_only_layers", [], None, why="Megatron-Bridge would leave the experts of such a layer unfilled"),
        only("decoder_sparse_step", 1),
        only("norm_topk_prob", True, why=_NOT_COMPARED),
    ),
    "qwen3_5_text": (
        *(*_PLAIN, only("attention_bias", False), _PLAIN_ROPE),
        only("attn_output_gate", True),
    ),
    "nemotron_h": (
        *(*_COMMON, _kinds_of_layers),
        only("mlp_hidden_act", "relu2"),
        only("mamba_hidden_act", "silu"),
        *(only(name, False) for name in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias")),
        only("residual_in_fp32", False, why=_NOT_COMPARED),
        only("use_conv_bias", True),
        only("conv_kernel", 4),
        *(only(name, 1e-5, why="a norm of Mamba has 1e-5 in any case") for name in _EPSILONS),
        only("time_step_limit", None, *([0.0, infinity] for infinity in _INFINITIES)),
        only("sliding_window", None),
        only("hidden_dropout", 0.0, why="two passes of one policy would differ"),
        only("num_nextn_predict_layers", 0, why=_NOT_COMPARED),
        *(only(name, 1, why=_NOT_COMPARED) for name in ("n_group", "topk_group", "n_shared_experts")),
        only("norm_topk_prob", True, why=_NOT_COMPARED),
        only("moe_latent_size", None, why=_NOT_COMPARED),
    ),
}
"""Rules by `model_type`."""

ONLY_CONVERTED: Mapping[str, tuple[Rule, ...]] = dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), (_COMMON[0],))
"""Rules of families whose weights come back from Bridge as they were, and whose maths was not compared here."""


def with_language_model(config: Fields) -> Fields:
    """The fields of the language model, whether the model sees besides or not."""
    text = config.get("text_config")
    return {**text, **config} if isinstance(text, Mapping) else config


def check_config(config: Fields, source: str, *, is_trained: bool = True) -> None:
    """Raises UserError for a model that was not compared; `source` names its `config.json`. One that is not trained is
    only converted."""
    model_type = config.get("model_type")
    families = FAMILIES if is_trained else {**FAMILIES, **ONLY_CONVERTED}
    rules = families.get(str(model_type))
    if rules is None:
        raise UserError(
            f"{source}: model_type ({model_type}) was not compared through Megatron-Bridge; those that were are "
            f"{', '.join(families)}"
        )
    if model_type == "nemotron_h" and "hybrid_override_pattern" not in config:
        raise UserError(
            f"{source}: hybrid_override_pattern is missing; a folder that transformers 5 has written has other names, "
            "of fields and of tensors, than the published ones, which Megatron-Bridge reads"
        )
    for name in _SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise UserError(f"{source}: {name} ({config.get(name)}) must be a positive integer")
    for rule in rules:
        mistake = rule(config)
        if mistake is not None:
            raise UserError(f"{source}: {mistake}; choose another model, or --model-source native where it is one")


def is_tied(config: Fields) -> bool:
    """Whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings", config["model_type"] == "gemma3_text"))


def is_passed_on(tensor: str, config: Fields) -> bool:
    """Whether a tensor is of a layer for multi-token prediction, behind or beside those of the model: not trained."""
    if tensor.startswith("mtp."):
        return True
    layer = tensor.removeprefix("model.layers.").partition(".")[0]
    return layer.isdigit() and tensor.startswith("model.layers.") and int(layer) >= config["num_hidden_layers"]
