"""What the two trainings share: flags, settings of TRL's trainers, and what they leave."""

import os
from dataclasses import dataclass
from typing import Any

from megatron_psft.config.flags import require_absent, require_at_least
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    out: PathText
    """Folder of the trained model in Hugging Face format; it must not exist."""
    train_iters: int = 100
    """Optimizer steps."""
    global_batch_size: int = 64
    """Sequences per optimizer step, over all processes: answers for GRPO, pairs for DPO."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one process."""
    lr: float = 1e-6
    """Learning rate, constant."""
    seed: int = 1234
    """Seed of the order of the data and of sampling."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "train_iters", "global_batch_size", "micro_batch_size")
        if self.seed < 0 or not self.lr > 0:
            raise UserError(f"seed ({self.seed}) must be at least 0 and lr ({self.lr}) greater than 0")
        require_absent(self, "out", "folder")
        together = self.micro_batch_size * self.num_processes
        if self.global_batch_size % together:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size * number of "
                f"processes ({together})"
            )

    @property
    def num_processes(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))  # torchrun and `accelerate launch` set it

    def trl_arguments(self) -> dict[str, Any]:
        """The settings that TRL's GRPOConfig and DPOConfig both take."""
        import torch

        on_gpu = torch.cuda.is_available()
        return {
            "output_dir": self.out,
            "max_steps": self.train_iters,
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.global_batch_size // (self.micro_batch_size * self.num_processes),
            "learning_rate": self.lr,
            "lr_scheduler_type": "constant",
            "seed": self.seed,
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "gradient_checkpointing": on_gpu,  # on a CPU memory is not what lacks
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }


def train_and_save(trainer: Any) -> None:
    """Trains, and leaves model, tokenizer and trainer_state.json, whose log_history has a line per step."""
    trainer.train()
    trainer.save_model()
    trainer.save_state()
