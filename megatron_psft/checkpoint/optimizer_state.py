"""The optimizer's state as a checkpoint has it: the same whether a run offloads it or not."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_psft.checkpoint.sharded_rows import ShardedRows

# What a parameter group of the optimizer that offloads says of where and how it is updated.
_PLACEMENT = {"fused", *inspect.signature(HybridDeviceOptimizer.__init__).parameters} - {"self", "params", "kwargs"}


def sharded_optimizer_state(optimizer: MegatronOptimizer, weights: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """`optimizer.sharded_state_dict(weights, **options)`, which any run can load, whether it offloads or not."""
    for chained in optimizer.chained_optimizers:
        if isinstance(chained, DistributedOptimizer):  # which asks itself for this when it makes its sharded state
            chained.sharded_param_state_fully_reshardable = ShardedRows(chained).sharded_state
    state = optimizer.sharded_state_dict(weights, **options)
    for group in _saved_groups(optimizer, state):
        for name in _PLACEMENT & group.keys():
            del group[name]
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Fills the optimizer from what `dist_checkpointing` loaded for its sharded state. May change the model's weights,
    which are to be loaded after it."""
    # The distributed optimizer copies every tensor of Adam's state from the checkpoint. torch's `step`, the same for
    # all parameters, is not among them: it is set aside meanwhile.
    parameter_states = [part.pop("param_state", None) for part in _saved_parts(optimizer, loaded)]
    # What a flag sets is this run's affair: "resume with a lower lr" has to work.
    own = optimizer.param_groups[0]
    for group in _saved_groups(optimizer, loaded):
        group.update({name: own[name] for name in {"max_lr", "min_lr", "betas", "eps"} | _PLACEMENT if name in own})
    optimizer.load_state_dict(loaded)
    inner = [chained.optimizer for chained in optimizer.chained_optimizers]
    # The fused Adams count steps per group.
    states = [state for each in inner for state in each.state.values() if "step" in state]
    steps = [state.pop("step") for state in states]
    for chained, parameter_state in zip(optimizer.chained_optimizers, parameter_states, strict=True):
        if parameter_state is not None:
            ShardedRows(chained).fill(parameter_state)
    for state, step in zip(states, steps, strict=True):
        # Megatron-Core hands the same tensor to all parameters, each of which would advance it.
        state["step"] = step.clone()


def _saved_parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """A model with experts has an optimizer for these and one for the rest, and the state of each under its number."""
    return [state] if len(optimizer.chained_optimizers) == 1 else [state[i] for i in sorted(state)]


def _saved_groups(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for part in _saved_parts(optimizer, state):
        yield from part.get("optimizer", part)["param_groups"]
