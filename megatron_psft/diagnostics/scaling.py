"""Time of a run on a cluster, told from its plan and from speeds that are assumed; `psft plan --explain` prints it.

Nothing here was measured. Each number is bytes over a speed, or operations over a speed, of the assumptions in
`speeds.py`: the first cluster that is measured corrects these. Latencies, the imbalance of experts and of the last
stage, which has the head, and the few numbers per token that the head exchanges are not counted.

Ranks are numbered as Megatron-Core does it: tensor-, then context-, data- and pipeline-parallel ones next to each
other; those of experts likewise. A group whose ranks are within a node speaks over NVLink. One that is not goes over
InfiniBand, and a ring over a node's ranks through all their adapters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_psft.diagnostics.plan import FP32, GIB, Plan
from megatron_psft.diagnostics.speeds import Speeds
from megatron_psft.metrics.flops import forward_flops
from megatron_psft.model.gpt import virtual_size

# The update's bytes of HBM per parameter that a rank updates: gradients for two norms and the step, weights and
# averages in fp32 read and written. Written besides are the weights, and zeros into the gradients.
_UPDATE_BYTES = FP32 * (3 + 6)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a GPU sends in a step for one purpose, in bytes, and as much it receives."""

    name: str
    link: Literal["NVLink", "InfiniBand"]
    bytes_per_second: float
    forward: float
    """Within forward passes of training, or before them."""
    backward: float
    hidden_seconds: float = 0.0
    """Of computation that goes on meanwhile, in a step."""
    is_per_pass: bool = True
    """Whether it comes with each micro-batch, and not once a step."""

    @property
    def seconds(self) -> float:
        return (self.forward + self.backward) / self.bytes_per_second

    @property
    def waited_seconds(self) -> float:
        """In which nothing is computed."""
        return max(0.0, self.seconds - self.hidden_seconds)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A plan on a cluster. Seconds are of a GPU, of a step in which all records are full."""

    plan: Plan
    speeds: Speeds
    gpus_per_node: int

    # Computation

    @property
    def _flops_per_second(self) -> float:
        return self.speeds.peak_tflops * 1e12 * self.speeds.reached_share

    @property
    def _forward_seconds(self) -> float:
        return self.plan.flops_per_step / self.plan.passes / self.plan.world_size / self._flops_per_second

    @property
    def _recomputed(self) -> float:
        """Share of the layers of which the forward pass is made again."""
        recompute, layers = self.plan.config.recompute, len(self.plan.layers(0))
        if recompute.recompute_granularity != "full" or recompute.recompute_num_layers is None:
            return 0.0
        if recompute.recompute_method == "uniform":
            return 1.0
        chunks = virtual_size(self.plan.shape, self.plan.config) or 1
        return min(1.0, recompute.recompute_num_layers * chunks / layers)

    @property
    def compute_seconds(self) -> float:
        """Of forward and backward passes, with what is recomputed of them."""
        return self._forward_seconds * (self.plan.passes + self._recomputed)

    @property
    def bubble(self) -> float:
        """Time that a stage waits for the others, as a share of its passes."""
        chunks = virtual_size(self.plan.shape, self.plan.config) or 1
        return (self.plan.stages - 1) / (self.plan.num_microbatches * chunks)

    @property
    def update_seconds(self) -> float:
        """Two norms of the gradients, Adam, new weights, and zeros in place of the gradients."""
        plan, stages = self.plan, range(self.plan.stages)
        own = max(sum(plan.optimized(stage)) for stage in stages) * _UPDATE_BYTES
        every = max(sum(map(sum, plan.trained(stage))) for stage in stages) * (plan.itemsize + FP32)
        return (own + every) / (self.speeds.hbm_gb_per_s * 1e9)

    # Communication

    @property
    def traffic(self) -> list[Traffic]:
        """All that is sent in a step, without what goes to no other rank."""
        parts = (self._tensor_parallel, self._expert_parallel, self._context_parallel, self._pipeline, self._replicas)
        return [traffic for part in parts for traffic in part() if traffic.forward + traffic.backward > 0]

    def _link(self, stride: int, size: int, *, is_ring: bool) -> tuple[Literal["NVLink", "InfiniBand"], float]:
        """What `size` ranks speak over, `stride` apart, and how much one of them sends in a second; `is_ring`: in
        collectives, whose ring leaves a node once for all of its ranks."""
        if stride * size <= self.gpus_per_node:
            return "NVLink", self.speeds.nvlink_gb_per_s * 1e9
        adapters = max(1, self.gpus_per_node // stride) if is_ring else 1
        return "InfiniBand", min(self.speeds.nvlink_gb_per_s, adapters * self.speeds.infiniband_gb_per_s) * 1e9

    @property
    def _rows(self) -> float:
        """Bytes of the hidden states of a rank's positions in a step, not split by sequence parallelism."""
        plan = self.plan
        positions = plan.num_microbatches * plan.tokens(plan.config.batch.micro_batch_size)
        return positions * plan.shape.hidden_size * plan.itemsize

    def _tensor_parallel(self) -> Iterator[Traffic]:
        """An all-gather before and a reduce-scatter after attention and plain MLP, or an all-reduce after, which takes
        both; the same in the backward pass, where sequence parallelism gathers the input again for the gradient of the
        weight; and one of each at embedding and head."""
        parallel, shape = self.plan.config.parallel, self.plan.shape
        size = parallel.tensor_model_parallel_size
        parts = sum(1 if shape.has_experts(layer) else 2 for layer in self.plan.layers(0))
        step = self._rows * (size - 1) / size
        link, speed = self._link(1, size, is_ring=True)
        forward, again = step * 2 * parts, step * parts if parallel.sequence_parallel else 0.0
        yield Traffic(
            name="tensor parallelism",
            link=link,
            bytes_per_second=speed,
            forward=forward + 2 * step,
            backward=forward * (1 + self._recomputed) + again + 2 * step,
        )

    def _expert_parallel(self) -> Iterator[Traffic]:
        """Tokens to their experts and back, and to all ranks that share an expert; the same in the backward pass."""
        plan, parallel, experts = self.plan, self.plan.config.parallel, self.plan.shape.experts
        if experts is None:
            return
        size, shared = parallel.expert_model_parallel_size, parallel.expert_tensor_size
        split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        layers = sum(map(plan.shape.has_experts, plan.layers(0)))
        forward = 2 * layers * experts.per_token * self._rows / split * ((size - 1) / size + shared - 1)
        link, speed = self._link(1, shared * size, is_ring=False)
        backward = forward * (1 + self._recomputed)
        yield Traffic(name="experts' tokens", link=link, bytes_per_second=speed, forward=forward, backward=backward)

    def _context_parallel(self) -> Iterator[Traffic]:
        """Keys and values go round in the forward pass; they and their gradients in the backward pass. Attention to one
        part is computed while the next is on its way."""
        plan, parallel, shape = self.plan, self.plan.config.parallel, self.plan.shape
        size, length = parallel.context_parallel_size, plan.config.data.seq_length
        width = 2 * shape.num_query_groups * shape.head_dim / parallel.tensor_model_parallel_size
        forward = len(plan.layers(0)) * (size - 1) * self._rows / shape.hidden_size * width
        link, speed = self._link(parallel.tensor_model_parallel_size, size, is_ring=False)
        # What grows with the square of the length.
        once, twice = forward_flops(shape, [length]), forward_flops(shape, [2 * length])
        yield Traffic(
            name="context parallelism",
            link=link,
            bytes_per_second=speed,
            forward=forward,
            backward=forward * (2 + self._recomputed),
            hidden_seconds=self.compute_seconds * (twice - 2 * once) / 2 / once,
        )

    def _pipeline(self) -> Iterator[Traffic]:
        """Hidden states to the next stage, and their gradient back."""
        plan, parallel = self.plan, self.plan.config.parallel
        chunks = virtual_size(plan.shape, plan.config) or 1
        sent = plan.num_microbatches * chunks * plan.hidden(plan.config.batch.micro_batch_size)
        sent *= plan.stages > 1
        link, speed = self._link(
            parallel.tensor_model_parallel_size * parallel.context_parallel_size * plan.data_size,
            plan.stages,
            is_ring=False,
        )
        yield Traffic(name="pipeline", link=link, bytes_per_second=speed, forward=sent, backward=sent)

    def _replicas(self) -> Iterator[Traffic]:
        """Gradients in fp32 once a step, during the last backward pass where that is asked for, and with the
        distributed optimizer the new weights, during the first forward pass."""
        plan, parallel = self.plan, self.plan.config.parallel
        ranks, per_expert = plan.world_size // plan.stages, parallel.expert_model_parallel_size
        groups = [
            ("", lambda stage: plan.trained(stage)[0], parallel.tensor_model_parallel_size),
            (" of experts", lambda stage: plan.trained(stage)[1], per_expert * parallel.expert_tensor_size),
        ]
        forward = self._forward_seconds / plan.num_microbatches
        behind = {
            "gradients": 2 * forward if parallel.overlap_grad_reduce else 0.0,
            "weights": forward if parallel.overlap_param_gather else 0.0,
        }
        for suffix, parameters_of, stride in groups:
            size = ranks // stride
            count = max(sum(parameters_of(stage)) for stage in range(plan.stages)) * (size - 1) / size
            link, speed = self._link(stride, size, is_ring=True)
            for what, forward, backward in (
                ("gradients", 0.0, count * FP32 * (1 if parallel.use_distributed_optimizer else 2)),
                ("weights", count * plan.itemsize if parallel.use_distributed_optimizer else 0.0, 0.0),
            ):
                traffic = Traffic(
                    name=what + suffix,
                    link=link,
                    bytes_per_second=speed,
                    forward=forward,
                    backward=backward,
                    hidden_seconds=behind[what],
                    is_per_pass=False,
                )
                # The same computation hides the experts' after it.
                behind[what] = max(0.0, behind[what] - traffic.seconds)
                yield traffic

    # A step

    @property
    def step_seconds(self) -> float:
        """Without the old policy's pass."""
        traffic = self.traffic
        passes = self.compute_seconds + sum(it.waited_seconds for it in traffic if it.is_per_pass)
        once = sum(it.waited_seconds for it in traffic if not it.is_per_pass)
        return passes * (1 + self.bubble) + once + self.update_seconds

    @property
    def scoring_seconds(self) -> float:
        """The old policy's pass over a step's records, spread over all steps of a window."""
        scored = self.plan.scored_steps
        share = 1.0 if scored is None else scored / (scored + 1)
        waited = sum(
            it.waited_seconds * it.forward / (it.forward + it.backward) for it in self.traffic if it.is_per_pass
        )
        return share * (self._forward_seconds + waited) * (1 + self.bubble)

    def mfu(self, seconds: float) -> float:
        """Operations of a step, without what is recomputed or scored, as a share of what the peak has in `seconds`."""
        return self.plan.flops_per_step / self.plan.world_size / (self.speeds.peak_tflops * 1e12) / seconds

    # Checkpoints

    @property
    def storage_seconds(self) -> float:
        """To write a checkpoint, or to read it."""
        total, speeds = self.plan.saved_bytes * self.plan.world_size, self.speeds
        node = self.plan.saved_bytes * min(self.gpus_per_node, self.plan.world_size)
        return max(node / (speeds.storage_gb_per_s * 1e9), total / (speeds.shared_storage_gb_per_s * 1e9))

    @property
    def save_seconds(self) -> float:
        """In which a save holds training up."""
        copying = self.plan.saved_bytes / (self.speeds.host_copy_gb_per_s * 1e9)
        return copying + (0.0 if self.plan.config.weights.async_save else self.storage_seconds)

    @property
    def restart_seconds(self) -> float:
        """From the start of the processes to the first step, without the steps that are made again."""
        return self.speeds.start_seconds + self.storage_seconds


def explained(scaling: Scaling) -> dict[str, str]:
    """What `psft plan --explain` prints and docs/scaling.md shows: label and value of each line."""
    plan = scaling.plan
    step, scoring = scaling.step_seconds, scaling.scoring_seconds
    tokens = plan.config.batch.global_batch_size * plan.tokens_per_sequence / plan.world_size
    lines = {
        "memory of the fullest GPU, GiB": f"{plan.peak.total / GIB:.1f}",
        "operations of a step per GPU, 1e12": f"{plan.flops_per_step / plan.world_size / 1e12:.4g}",
        "computing, s": f"{scaling.compute_seconds:.3g}",
        "pipeline bubble": f"{scaling.bubble:.1%}",
    }
    for it in scaling.traffic:
        size = (it.forward + it.backward) / 1e9
        lines[it.name] = f"{size:.3g} GB, {it.link}, {it.seconds:.3g} s, waits {it.waited_seconds:.3g}"
    lines |= {
        "update, s": f"{scaling.update_seconds:.3g}",
        "step, s": f"{step:.3g}",
        "tokens per second and GPU": f"{tokens / step:,.0f}",
        "expected MFU": f"{scaling.mfu(step):.1%}",
    }
    if plan.scored_steps != 0:
        lines["old policy's pass per step, s"] = f"{scoring:.3g}"
        lines["expected MFU with it"] = f"{scaling.mfu(step + scoring):.1%}"
    saved = plan.saved_bytes * plan.world_size
    lines["checkpoint, GB"] = f"{saved / 1e9:.3g}"
    lines["a save holds training up at most, s"] = f"{scaling.save_seconds:.3g}"
    lines["it is written in, s"] = f"{scaling.storage_seconds:.3g}"
    lines["a restart to its first step, s"] = f"{scaling.restart_seconds:.3g}"
    if (interval := plan.config.weights.save_interval) is not None:
        lost = interval / 2 * (step + scoring)
        lines["steps made again then, on average, s"] = f"{lost:.3g}"
    return lines
