"""Rotary position embedding: its base and the stretching of its frequencies, as a `config.json` has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies; field names as in `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class YarnRopeScaling:
    """YaRN's stretching of the slow rotary frequencies (arXiv 2309.00071); field names as in `config.json`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    """Rotations within the original positions from which on a frequency is kept."""
    beta_slow: float
    """Rotations up to which it is divided by `factor`."""
    attention_factor: float
    """That queries and keys are multiplied by, after the rotation."""
    truncate: bool
    """Whether the blended dimensions begin and end at whole numbers."""

    def blended(self, dimensions: int, theta: float) -> tuple[float, float]:
        """Of `dimensions` / 2 frequencies with base `theta`, the last that is kept and the first that is divided, not
        always whole numbers; in between they are blended."""
        first, last = (
            dimensions
            * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dimensions - 1)
        return first, last + 0.001 if first == last else last


RopeScaling = Llama3RopeScaling | YarnRopeScaling

_SECTIONS = [16, 24, 24]
"""Where a file does not say; what else transformers assumes has the same sum, which is all that text depends on."""

_SUPPORTED = ("default", "llama3", "yarn")


def read_rope(
    config: Mapping[str, Any], default_theta: float, source: str, *, sections_of: int | None = None
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, in the spelling of transformers 4 or 5.

    Args:
        config: the parsed `config.json` of a model of text.
        default_theta: base where it does not say.
        source: names it in errors.
        sections_of: number of frequencies that are dealt out to time, height and width (`mrope_section`), which are one
            and the same on text; None where they are not.

    Raises:
        UserError: a kind of scaling, or a field of one, that is not computed.
    """
    parameters = _parameters(config, source)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if sections_of is not None:
        _check_sections(parameters, sections_of, source)
        rope_type = "default" if rope_type == "mrope" else rope_type
    if rope_type == "default":
        return theta, None
    if rope_type not in _SUPPORTED:
        raise UserError(f"{source}: rope_type ({rope_type}) is not supported; supported are {', '.join(_SUPPORTED)}")
    numbers = _Numbers(config, parameters, rope_type, source)
    return theta, _llama3(numbers) if rope_type == "llama3" else _yarn(numbers, config)


def _parameters(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    newer, older = (_object(config, name, source) for name in ("rope_parameters", "rope_scaling"))
    for name, value in newer.items() if older else ():
        # transformers leaves all of `rope_parameters` out then, its base too.
        kept = older.get(name, config.get(name))
        if kept != value:
            raise UserError(
                f"{source}: rope_parameters and rope_scaling ({older}) are both given and have other values of {name} "
                f"({value} and {kept}); write all into rope_parameters and remove rope_scaling"
            )
    parameters = older or newer
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor ({parameters['partial_rotary_factor']}) is not supported; only 1.0 is"
        )
    return parameters


def _object(config: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {name} ({value}) must be a JSON object")
    of_layers = next((key for key, inner in value.items() if isinstance(inner, Mapping)), None)
    if of_layers is not None:
        raise UserError(f"{source}: {name} with settings of its own for {of_layers} is not supported")
    return value


def _check_sections(parameters: Mapping[str, Any], frequencies: int, source: str) -> None:
    sections = parameters.get("mrope_section", _SECTIONS)
    is_list = isinstance(sections, list) and all(isinstance(size, int) for size in sections)
    if not is_list or len(sections) != 3 or sum(sections) != frequencies:
        raise UserError(
            f"{source}: mrope_section ({sections}) of rope_parameters must be three numbers that add up to "
            f"{frequencies}, half of head_dim"
        )


class _Numbers:
    """The numbers of a scaling; UserError names one that is missing or none."""

    def __init__(self, config: Mapping[str, Any], parameters: Mapping[str, Any], kind: str, source: str) -> None:
        self._config, self._parameters, self._kind, self._source = config, parameters, kind, source

    def __call__(self, name: str, default: float | None = None) -> float:
        value = self._parameters.get(name)
        return self._checked(name, default if value is None else value)

    def has(self, *names: str) -> bool:
        return all(self._parameters.get(name) for name in names)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._parameters.get(name, default))

    def original_positions(self, default: object = None) -> int:
        """What stands outside of the scaling wins, as in transformers."""
        name = "original_max_position_embeddings"
        return int(self._checked(name, self._config.get(name) or self._parameters.get(name) or default))

    def _checked(self, name: str, value: Any) -> float:
        if value is None:
            raise UserError(f"{self._source}: the {self._kind} rope scaling has no {name}, which it must have")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{self._source}: {name} ({value}) of the rope scaling must be a positive number")
        return float(value)


def _llama3(numbers: _Numbers) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=numbers("factor"),
        low_freq_factor=numbers("low_freq_factor"),
        high_freq_factor=numbers("high_freq_factor"),
        original_max_position_embeddings=numbers.original_positions(),
    )


def _yarn(numbers: _Numbers, config: Mapping[str, Any]) -> YarnRopeScaling:
    factor = numbers("factor")
    attention_factor = _magnitude(factor)
    if numbers.has("mscale", "mscale_all_dim"):
        attention_factor = _magnitude(factor, numbers("mscale")) / _magnitude(factor, numbers("mscale_all_dim"))
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=numbers.original_positions(default=config.get("max_position_embeddings")),
        beta_fast=numbers("beta_fast", 32.0),
        beta_slow=numbers("beta_slow", 1.0),
        attention_factor=numbers("attention_factor", attention_factor),
        truncate=numbers.flag("truncate", True),
    )


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
