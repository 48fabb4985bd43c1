"""How an objective is declared: what it needs, its settings, its formula and its source, right above its function."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

ExtraStat = Literal["top_entropy", "sum_squares"]
"""Statistics of `LabelStats` that are computed only for objectives that need them."""

Requirement = Literal["old", "reference", "records", "pairs", "nll_z", "ref_top", ExtraStat]
"""What an objective needs beyond log-probability and entropy: the old policy, the initial model's log-probabilities,
the other tokens of a record, records that are preference pairs, how improbable a record is among those of its global
batch, the initial model's most probable tokens (`kl_top_k` of them), or a statistic (`ExtraStat`)."""

Range = Literal["positive", "non-negative", "probability", "positive probability"]
"""Values that a number may have."""

Settings: TypeAlias = Any
"""The run's `ObjectiveConfig`, from which a function reads its settings by name. `Any`, as no type checker sees the
fields that declarations add."""

TokenLoss: TypeAlias = "Callable[[LabelStats, LabelInputs, Settings], Tensor]"
"""Losses of label tokens, before aggregation, in the shape of the log-probabilities."""

Clipped: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None, Settings], Tensor]"
"""From log-probabilities, the old ones, advantages (None where all are 1) and settings: which label tokens a trust
region leaves without a gradient, bool."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of one or several objectives: a field of `ObjectiveConfig`, a flag and a YAML key."""

    name: str
    default: float | str
    """A number, or one of `choices`."""
    help: str
    """Its text in --help, after the names of the objectives that have it."""
    range: Range | None = None
    """Of a number; None for any."""
    choices: tuple[str, ...] = ()
    """What text it may be; none for a number."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What the rest of the package knows of an objective."""

    loss: TokenLoss
    title: str
    """A few words, for --help."""
    formula: str
    """The loss of a label token, or of a pair, for docs/objectives.md."""
    source: str
    """Papers and code, for docs/objectives.md."""
    requirements: AbstractSet[Requirement] | Callable[[Settings], AbstractSet[Requirement]]
    settings: tuple[Setting, ...]
    takes_advantages: bool
    """Whether records may have an advantage, which the loss then takes account of."""
    is_clipped: Clipped | None
    """Its trust region; None for PPO's clip of the ratio, by `clip_ratio_high` and `clip_ratio_low`."""

    def needs(self, config: Settings) -> frozenset[Requirement]:
        """What it needs under the run's settings; pairs are made of whole records, and one reference says all."""
        needs = frozenset(self.requirements(config) if callable(self.requirements) else self.requirements)
        if "pairs" in needs:
            needs |= {"records"}
        return needs | {"reference"} if "ref_top" in needs else needs


def objective(
    *,
    title: str = "",
    formula: str = "",
    source: str = "",
    needs: AbstractSet[Requirement] | Callable[[Settings], AbstractSet[Requirement]] = frozenset(),
    settings: tuple[Setting, ...] = (),
    takes_advantages: bool = False,
    is_clipped: Clipped | None = None,
) -> Callable[[_Function], _Function]:
    """Declares the function below it, of type `TokenLoss`, as an objective.

    Args:
        title: a few words for --help.
        formula: the loss of a label token.
        source: papers and code.
        needs: what the function reads of its arguments beyond `log_probs`, `entropy`, `advantages` and settings; or a
            function that tells from the settings.
        settings: what it reads of the run's settings. Of an objective outside of this package they must be settings
            of built-in ones, imported from their files: flags are known before any other module is imported.
        takes_advantages: whether it reads `advantages`. Otherwise, records that have one are refused.
        is_clipped: of one that needs `"old"`: which tokens its trust region leaves without a gradient, for
            `clip_fraction`. `clip_ratio_high` and `clip_ratio_low` are refused then. The bounds of these if None.
    """

    def declare(function: _Function) -> _Function:
        function.declaration = Declaration(  # type: ignore[attr-defined]
            loss=function,
            title=title,
            formula=formula,
            source=source,
            requirements=needs,
            settings=settings,
            takes_advantages=takes_advantages,
            is_clipped=is_clipped,
        )
        return function

    return declare


def declaration_of(function: Callable[..., Any]) -> Declaration:
    """What `objective` declared of a function; without it, an objective that needs nothing and has no settings."""
    if not hasattr(function, "declaration"):
        function = objective()(function)
    declaration: Declaration = function.declaration  # type: ignore[attr-defined]
    return declaration


def unknown_requirements(needs: AbstractSet[str]) -> list[str]:
    """Those that no objective can have."""
    return sorted(needs - set(get_args(Requirement)))
