"""Megatron-Bridge's configuration with PSFT's settings beside it, and the rules across the two."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.cuda_graph import is_full_iteration_cuda_graph

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.errors import UserError
from megatron_psft.objectives.declare import Requirement
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.registry import OBJECTIVES as BUILTIN
from megatron_psft.objectives.registry import with_settings
from megatron_psft.scoring.old_policy import objective_at

_ABSENT: frozenset[Requirement] = frozenset({"reference", "records", "nll_z"})
"""What Megatron-Bridge's batches do not carry."""

OBJECTIVES = tuple(name for name in BUILTIN if not ObjectiveConfig(objective=name).needs & _ABSENT)
"""Built-in objectives that Bridge's batches suffice for."""

_SETTINGS = {setting.name: setting for name in OBJECTIVES for setting in BUILTIN[name].settings}

REPEATABLE_LOADERS = ("single", "cyclic", "batch")
"""Bridge's loaders whose samples follow from the number of samples consumed before."""


@dataclass(kw_only=True)
@with_settings(_SETTINGS)
class PsftConfig:
    """What `ObjectiveConfig` (config/schema.py) says of the token loss, as far as Bridge's batches suffice.

    Not frozen, as none of Bridge's sections is: recipes and command lines assign to fields.
    """

    objective: str = ObjectiveConfig.objective
    """One of `OBJECTIVES`, or MODULE:FUNCTION for one of your own that needs neither the initial model, nor whole
    records, nor the rest of a batch."""
    clip_ratio_high: float = ObjectiveConfig.clip_ratio_high
    """PSFT: a token has no gradient once its probability exceeds the old policy's by more than this share."""
    old_policy_interval: int | str = ObjectiveConfig.old_policy_interval
    """PSFT: optimizer steps between updates of the old policy, or `fixed`."""
    sft_warmup_iters: int = ObjectiveConfig.sft_warmup_iters
    """PSFT: first optimizer steps, trained with plain SFT."""
    fused_head: bool = ObjectiveConfig.fused_head
    """Compute loss and gradient in chunks of label tokens, and never all of the logits."""

    def objective_at(self, step: int) -> Objective:
        """What optimizer step `step` (from 0) trains with.

        Raises:
            UserError: a value out of range, or an objective that Bridge's batches do not suffice for.
        """
        if isinstance(self.old_policy_interval, str) and self.old_policy_interval != "fixed":
            raise UserError(f"psft.old_policy_interval ({self.old_policy_interval}) must be an integer or fixed")
        if self.objective_config.needs & _ABSENT:
            raise UserError(
                f"psft.objective ({self.objective}) must be one of {', '.join(OBJECTIVES)}: any other needs the "
                "initial model, whole records or the rest of a batch, which Megatron-Bridge's batches do not carry; "
                "`psft train` has all"
            )
        return objective_at(self.objective_config, step)

    @property
    def objective_config(self) -> ObjectiveConfig:
        """The same settings as the trainer has them."""
        return ObjectiveConfig(**asdict(self))


@dataclass(kw_only=True)
class PsftConfigContainer(ConfigContainer):
    """Bridge's `ConfigContainer`, overridden and written as theirs, with a section `psft`."""

    psft: PsftConfig = field(default_factory=PsftConfig)

    @classmethod
    def of(cls, config: ConfigContainer, **psft: Any) -> "PsftConfigContainer":
        """Takes over a Bridge configuration, section by section, and sets what PSFT relies on; `psft` are settings."""
        sections = {section.name: getattr(config, section.name) for section in fields(config) if section.init}
        own = cls(**sections, psft=PsftConfig(**psft))
        # One denominator over micro-batches and ranks: the gradient must not depend on the layout.
        own.model.calculate_per_token_loss = True
        own.ddp.average_in_collective = False
        return own

    def validate(self) -> None:
        """Bridge's rules, then ours.

        Raises:
            UserError: names the field, its value, the rule and the remedy.
        """
        self.psft.objective_at(0)
        super().validate()
        for name, found, wanted, reason in _rules(self):
            if found != wanted:
                raise UserError(f"{name} ({found}) must be {wanted}: {reason}")
        if self.dataset.dataloader_type not in REPEATABLE_LOADERS:
            raise UserError(
                f"dataset.dataloader_type ({self.dataset.dataloader_type}) must be one of "
                f"{', '.join(REPEATABLE_LOADERS)}: the old policy reads the batches of its window ahead of training"
            )


def _rules(config: PsftConfigContainer) -> list[tuple[str, Any, Any, str]]:
    """Field, value found, value wanted, reason."""
    one_policy = "the two passes of one policy must agree, so that the ratio after a sync is 1"
    return [
        (
            "model.calculate_per_token_loss",
            config.model.calculate_per_token_loss,
            True,
            "the loss is divided by the label tokens of the global batch",
        ),
        (
            "ddp.average_in_collective",
            config.ddp.average_in_collective,
            False,
            "gradients are summed, and divided once",
        ),
        ("model.hidden_dropout", config.model.hidden_dropout, 0.0, one_policy),
        ("model.attention_dropout", config.model.attention_dropout, 0.0, one_policy),
        ("peft.dropout", getattr(config.peft, "dropout", 0.0), 0.0, one_policy),
        ("model.mtp_num_layers", config.model.mtp_num_layers or 0, 0, "PSFT has one loss, of the next token"),
        (
            "model.overlap_moe_expert_parallel_comm",
            config.model.overlap_moe_expert_parallel_comm,
            False,
            "its schedule bypasses the forward step",
        ),
        (
            "model.cuda_graph_impl over a full iteration",
            is_full_iteration_cuda_graph(config.model),
            False,
            "the number of label tokens differs from one micro-batch to the next",
        ),
        (
            "train.rampup_batch_size",
            config.train.rampup_batch_size,
            None,
            "the old policy reads ahead in global batches of one size",
        ),
        (
            "train.decrease_batch_size_if_needed",
            config.train.decrease_batch_size_if_needed,
            False,
            "the old policy reads ahead in global batches of one size",
        ),
    ]
