"""The smallest layout that a run fits in, told by its plan."""

from dataclasses import replace
from itertools import product

from megatron_psft.diagnostics.plan import Plan
from megatron_psft.errors import UserError


def smallest_layout(plan: Plan, *, bytes_per_rank: float, ranks_per_node: int) -> Plan | None:
    """The plan with the fewest ranks per model replica that fits, all else equal; None where none does.

    Tensor parallelism, within a node and with sequence parallelism, comes before context parallelism, and that before
    the pipeline: in this order they save most for the ranks they take. Experts are split over ranks of a node, which
    takes no ranks from elsewhere. The optimizer's state is always distributed.
    """
    powers = [2**exponent for exponent in range(plan.world_size.bit_length())]
    expert_sizes = [1] if plan.shape.experts is None else [size for size in powers if size <= ranks_per_node]
    layouts = [
        (stages, context, tensor, experts)
        for stages, context, tensor, experts in product(powers, powers, powers, expert_sizes)
        if tensor <= ranks_per_node and tensor * context * stages <= plan.world_size
    ]
    for sizes in sorted(layouts, key=lambda sizes: (sizes[0] * sizes[1] * sizes[2], *sizes)):
        stages, context, tensor, experts = sizes
        parallel = replace(
            plan.config.parallel,
            tensor_model_parallel_size=tensor,
            sequence_parallel=tensor > 1,
            context_parallel_size=context,
            pipeline_model_parallel_size=stages,
            num_layers_per_virtual_pipeline_stage=None,
            expert_model_parallel_size=experts,
            expert_tensor_parallel_size=None if plan.shape.experts is None else 1,
            use_distributed_optimizer=True,
        )
        try:
            found = replace(plan, config=replace(plan.config, parallel=parallel))
        except UserError:  # the model or the batch cannot be cut like that
            continue
        if found.peak.total <= bytes_per_rank:
            return found
    return None
