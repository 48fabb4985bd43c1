"""Reads a Hugging Face `config.json` into the shape of a model, or says what of it is not supported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_psft.errors import UserError, nearest_name_hint
from megatron_psft.model.families import FAMILIES, ONLY_SUPPORTED, ExpertFields, Family
from megatron_psft.model.rope import RopeScaling, YarnRopeScaling, read_rope

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The experts of a mixture-of-experts layer, of which a router chooses some for each token."""

    count: int
    per_token: int
    """Experts that compute a token."""
    ffn_hidden_size: int
    """Of one expert."""
    normalizes: bool
    """Whether the router's weights of a token's experts are scaled to add up to 1."""
    dense_layers: tuple[int, ...]
    """Layers, from 0, with a plain MLP in place of experts."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All of a `config.json` that the model is built from."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of a plain MLP."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    initializer_range: float
    """Standard deviation of randomly drawn weights."""
    dtype: str
    """Of the published weights, as torch spells it, e.g. `bfloat16`."""
    experts: ExpertShape | None = None
    """None where every layer has a plain MLP."""
    sliding_window: int | None = None
    """Positions that one sees, itself included; None where it sees all before it."""

    @property
    def family(self) -> Family:
        """What all models of this `model_type` have in common."""
        return FAMILIES[self.model_type]

    def has_experts(self, layer: int) -> bool:
        """Whether `layer`, from 0, is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def layer_parameters(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Dimensions of the parameters of `layer`, from 0, before they are cut, by Megatron-Core's names in it; without
        those of experts."""
        hidden, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        mixed = queries + 2 * self.num_query_groups * self.head_dim
        parameters: dict[str, tuple[int, ...]] = {
            "self_attention.linear_qkv.weight": (mixed, hidden),
            "self_attention.linear_proj.weight": (hidden, queries),
            "input_layernorm.weight": (hidden,),
            "pre_mlp_layernorm.weight": (hidden,),
        }
        if self.qkv_bias:
            parameters["self_attention.linear_qkv.bias"] = (mixed,)
        if self.qk_norm:
            parameters |= {f"self_attention.{name}_layernorm.weight": (self.head_dim,) for name in ("q", "k")}
        if self.experts is not None and self.has_experts(layer):
            return parameters | {"mlp.router.weight": (self.experts.count, hidden)}
        return parameters | _mlp_parameters("mlp", hidden, self.ffn_hidden_size)

    @property
    def expert_parameters(self) -> dict[str, tuple[int, ...]]:
        """The same of one expert; empty without experts."""
        return (
            {}
            if self.experts is None
            else _mlp_parameters("mlp.experts.0", self.hidden_size, self.experts.ffn_hidden_size)
        )


def _mlp_parameters(mlp: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """Gate and up projection are one matrix."""
    return {f"{mlp}.linear_fc1.weight": (2 * ffn, hidden), f"{mlp}.linear_fc2.weight": (hidden, ffn)}


def read_shape(folder: Path, field: str = "load_hf") -> ModelShape:
    """Reads `folder/config.json`; `field` of the configuration names the folder in errors.

    Raises:
        UserError: the file is missing or not JSON, its `model_type` is not supported, or one of its fields asks for
            maths that this version does not compute; the message names the field, its value and what is supported.
    """
    return shape_from_config(read_config(folder, field), str(folder / "config.json"))


def read_max_positions(folder: Path, field: str = "load_hf") -> int | None:
    """Positions of the longest text that the model was made for, `max_position_embeddings` of `folder/config.json`;
    None where it does not say.

    It counts what a rotary scaling has added, as Llama 3's files do; where those of a model with yarn do not, this is
    added.
    """
    config, source = read_config(folder, field), str(folder / "config.json")
    scaling = shape_from_config(config, source).rope_scaling
    value = _language_model(config, FAMILIES[config["model_type"]], source).get("max_position_embeddings")
    if not isinstance(value, int):
        return None
    if isinstance(scaling, YarnRopeScaling):
        return max(value, int(scaling.factor * scaling.original_max_position_embeddings))
    return value


def read_config(folder: Path, field: str = "load_hf") -> Any:
    """What `folder/config.json` holds. Raises UserError where it is missing or not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{field} ({folder}) must hold a config.json; point it to a Hugging Face model folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be JSON: {error}") from None


def shape_from_config(config: Any, source: str) -> ModelShape:
    """The same for a parsed `config.json`; `source` names it in errors."""
    if not isinstance(config, Mapping):
        raise UserError(f"{source} must hold a JSON object, not {type(config).__name__}")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        model_type = config.get("model_type")
        hint = nearest_name_hint(str(model_type), FAMILIES)
        raise UserError(
            f"{source}: model_type ({model_type}) is not supported; supported are {', '.join(FAMILIES)}{hint}"
        )
    config = _language_model(config, family, source)
    _refuse_other_maths(config, family, source)
    hidden_size = _size(config, "hidden_size", source)
    heads = _size(config, "num_attention_heads", source)
    head_dim = _size(config, "head_dim", source, family.defaults.get("head_dim", hidden_size // heads))
    sections_of = None if family.vision is None else head_dim // 2
    default_theta = family.defaults.get("rope_theta", 10000.0)
    rope_theta, rope_scaling = read_rope(config, default_theta, source, sections_of=sections_of)
    groups = _size(config, "num_key_value_heads", source, family.defaults.get("num_key_value_heads", heads))
    if heads % groups:
        raise UserError(f"{source}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise UserError(f"{source}: dtype ({dtype}) is not supported; supported are {', '.join(_DTYPES)}")
    return ModelShape(
        model_type=config["model_type"],
        num_layers=_size(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        ffn_hidden_size=_size(config, "intermediate_size", source),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size", source),
        norm_eps=config.get("rms_norm_eps", family.defaults.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
        dtype=dtype,
        experts=None if family.experts is None else _experts(config, family.experts, family.defaults, source),
        sliding_window=_sliding_window(config, family, source),
    )


def _language_model(config: Mapping[str, Any], family: Family, source: str) -> Mapping[str, Any]:
    """The fields of the language model, of a model with a vision tower too."""
    if family.vision is None:
        return config
    text, model_type = config.get("text_config"), config["model_type"]
    if text is None and family.vision.has_flat_config:
        return config
    if not isinstance(text, Mapping):
        raise UserError(f"{source}: text_config ({text}) must be a JSON object")
    if text.get("model_type") not in (None, model_type, f"{model_type}_text"):
        raise UserError(f"{source}: model_type ({text['model_type']}) of text_config must be {model_type}_text")
    # Either place has some of these, whatever wrote the file.
    outer = {name: config[name] for name in ("dtype", "torch_dtype", "quantization_config") if config.get(name)}
    is_tied = any(part.get("tie_word_embeddings", False) for part in (config, text))
    return {**text, **outer, "model_type": model_type, "tie_word_embeddings": is_tied}


def _sliding_window(config: Mapping[str, Any], family: Family, source: str) -> int | None:
    """Here null says that there is none, and a missing field what the family's class assumes."""
    field = "sliding_window"
    if not family.has_sliding_window or config.get(field, family.defaults.get(field)) is None:
        return None
    return _size(config, field, source, family.defaults.get(field))


def _experts(config: Mapping[str, Any], fields: ExpertFields, defaults: Mapping[str, Any], source: str) -> ExpertShape:
    # transformers takes either name for any family.
    name = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    count = _size(config, name, source, defaults.get(fields.count))
    per_token = _size(config, "num_experts_per_tok", source, defaults.get("num_experts_per_tok"))
    if per_token > count:
        raise UserError(f"{source}: num_experts_per_tok ({per_token}) must be at most {name} ({count})")
    normalizes = fields.normalizes
    if normalizes is None:
        normalizes = bool(config.get("norm_topk_prob", False))
    if normalizes and per_token == 1:
        raise UserError(
            f"{source}: num_experts_per_tok (1) is not supported where the weights of a token's experts are scaled to "
            "add up to 1, as the router would never learn; only 2 or more are"
        )
    num_layers = _size(config, "num_hidden_layers", source)
    named, step = set(config.get("mlp_only_layers") or ()), _size(config, "decoder_sparse_step", source, 1)
    return ExpertShape(
        count=count,
        per_token=per_token,
        ffn_hidden_size=_size(config, fields.ffn_hidden_size, source, defaults.get(fields.ffn_hidden_size)),
        normalizes=normalizes,
        dense_layers=tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step),
    )


def _size(config: Mapping[str, Any], field: str, source: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{source}: {field} is missing; a {config['model_type']} config.json must have it")
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{source}: {field} ({value}) must be a positive integer")
    return value


def _refuse_other_maths(config: Mapping[str, Any], family: Family, source: str) -> None:
    for name, supported in {**ONLY_SUPPORTED, **family.only_supported}.items():
        value = config.get(name, family.defaults.get(name, supported))
        if value != supported:
            raise UserError(
                f"{source}: {name} ({value}) is not supported; this version computes only {name} = {supported}"
            )
    odd_layers = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if odd_layers:
        raise UserError(f"{source}: layer_types ({', '.join(odd_layers)}) is not supported; only full_attention is")
