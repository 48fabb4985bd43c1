"""Megatron-Bridge's configuration with PSFT's settings beside it, and the rules across the two."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.cuda_graph import is_full_iteration_cuda_graph

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.errors import UserError
from megatron_psft.loss.objectives import Objective
from megatron_psft.scoring.old_policy import objective_at

OBJECTIVES = ("psft", "sft", "dft", "p-power", "eaft", "trsft", "profit", "deft")
"""Those that compare neither with the initial model nor tokens of a record with each other."""

REPEATABLE_LOADERS = ("single", "cyclic", "batch")
"""Bridge's loaders whose samples follow from the number of samples consumed before."""


@dataclass(kw_only=True)
class PsftConfig:
    """What `ObjectiveConfig` (config/schema.py) says of the token loss, as far as Bridge's batches suffice.

    Not frozen, as none of Bridge's sections is: recipes and command lines assign to fields.
    """

    objective: str = "psft"
    """One of `OBJECTIVES`."""
    clip_ratio_high: float = 0.28
    """PSFT: a token has no gradient once its probability exceeds the old policy's by more than this share."""
    old_policy_interval: int | str = 8
    """PSFT: optimizer steps between updates of the old policy, or `fixed`."""
    sft_warmup_iters: int = 0
    """PSFT: first optimizer steps, trained with plain SFT."""
    p_power_q: float = 1.0
    """p-power: q of the loss (1 - p^q) / q."""
    eaft_alpha: float = 1.0
    """eaft: exponent of the entropy that weighs a token."""
    trsft_alpha: float = 0.1
    """trsft: tokens of a probability below it have their gradient scaled down by its share of it."""
    profit_threshold: float = 0.1
    """profit: tokens of a probability below it have no gradient."""
    fused_head: bool = True
    """Compute loss and gradient in chunks of label tokens, and never all of the logits."""

    def objective_at(self, step: int) -> Objective:
        """What optimizer step `step` (from 0) trains with.

        Raises:
            UserError: a value out of range, or an objective that Bridge's batches do not suffice for.
        """
        if self.objective not in OBJECTIVES:
            raise UserError(
                f"psft.objective ({self.objective}) must be one of {', '.join(OBJECTIVES)}: any other needs the "
                "initial model or whole records, which Megatron-Bridge's batches do not carry; `psft train` has all"
            )
        if isinstance(self.old_policy_interval, str) and self.old_policy_interval != "fixed":
            raise UserError(f"psft.old_policy_interval ({self.old_policy_interval}) must be an integer or fixed")
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
