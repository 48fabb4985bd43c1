"""Megatron-Core's AdamW and learning-rate schedule, and the one update that refuses bad numbers."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_psft.config.schema import Config
from megatron_psft.errors import DivergenceError


def build_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over `chunks`; the weights must be final, as fp32 master copies are taken here."""
    options = config.optimizer
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=config.precision.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        optimizer_cpu_offload=options.optimizer_cpu_offload,
        optimizer_offload_fraction=options.optimizer_offload_fraction,
        use_precision_aware_optimizer=options.optimizer_cpu_offload,
    )
    overrides = get_standard_config_overrides(megatron_config)  # no weight decay on 1-D parameters
    optimizer = get_megatron_optimizer(megatron_config, list(chunks), config_overrides=overrides)
    for chained in optimizer.chained_optimizers:
        _create_state(chained.optimizer)
    return optimizer


def build_scheduler(config: Config, optimizer: MegatronOptimizer, train_iters: int) -> OptimizerParamScheduler:
    """Megatron-Core's schedule, counted in optimizer steps of a run of `train_iters`."""
    options = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps(train_iters),
        lr_decay_steps=options.decay_steps(train_iters),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # A resumed run follows its own flags; the checkpoint only says how far it got.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=options.lr_wsd_decay_iters,
        lr_wsd_decay_style="exponential",
    )


def update(optimizer: MegatronOptimizer, step: int, device: torch.device) -> float:
    """Clips the gradients and steps the optimizer; returns the norm before clipping. `device` is this rank's.

    Raises:
        DivergenceError: on every rank and before any weight has changed, where the norm is not finite.
    """
    # Megatron-Core would take the step with a non-finite norm, so the norm is taken once more ahead of it. That reads
    # the gradients, one pass over memory, against the many of forward and backward.
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    culprit = _rank_to_blame(optimizer, norm, device)
    if culprit is not None:
        raise DivergenceError(
            f"step {step}: the gradient norm is not finite, first seen on rank {culprit}; nothing was updated; resume "
            "from the last checkpoint with a lower lr, or check the data of this step"
        )
    optimizer.step()
    return norm


def _rank_to_blame(optimizer: MegatronOptimizer, norm: float, device: torch.device) -> int | None:
    """The lowest rank with a gradient that is not finite, or else with such a norm; None where all is well. Collective.

    The norm is common to a model replica only, but all ranks have to stop together.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    blame = 2 * world_size
    if not math.isfinite(norm):
        # Squares overflow before gradients do, and a bad gradient makes the norm bad on its neighbours.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [getattr(parameter, "decoupled_grad", parameter.grad) for parameter in parameters]  # if offloaded
        is_finite = all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
        blame = rank + world_size if is_finite else rank
    lowest = torch.tensor(blame, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest) % world_size if lowest < 2 * world_size else None


def _create_state(adam: torch.optim.Optimizer) -> None:
    """Creates all of a torch Adam's state up front, as the fused Adams of Transformer Engine and Apex do.

    torch creates it in the first step, but a checkpoint is loaded before that, and Megatron-Core reads the state's
    `step` to do so.
    """
    parts = adam.sub_optimizers if isinstance(adam, HybridDeviceOptimizer) else [adam]
    if not all(isinstance(part, torch.optim.AdamW) for part in parts):
        return  # Megatron-Core creates what a hybrid with a fused Adam lacks
    for part in parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                part.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    if isinstance(adam, HybridDeviceOptimizer):
        adam._sync_sub_optimizers_state_to_hdo()
