"""One rank of any cluster on a CPU: its model, its optimizer, a pass of the old policy and a step, with the sizes of
tensors, not their memory.

The process group is torch's fake one, of 8 or 512 ranks, of which this process is one; tensors are fake, with shapes
and storages of which nothing is allocated. Layers, wrapper, optimizer, schedule and head are those of training, in bf16
with the portable layers. A ledger above all of it writes down what every operation allocates, and every collective
instead of making it.

Where fake tensors cannot follow, as what comes next depends on values, an answer is assumed:
- every label token has a gradient, none is clipped (`nonzero`),
- experts are equally busy: a router's choices are even over experts and ranks (`masked_select`, tokens per expert),
- a number read from the device, as the norm of the gradients, is 1,
- an object gathered from all ranks is this rank's, on each.
Bounds of rows and other small integers are real. Not followed at all are Transformer Engine's layers, which need CUDA,
NCCL's buffers, and what values in a kernel's scratch memory take.

Models are cut to few layers and rows to half, and plans with them (`cut`): a layer more is the same again. Of the ranks
those are built that differ in their place (`distinct_ranks`).
"""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_psft.data.example import Example
from megatron_psft.data.micro_batch import MicroBatch, fill_rows
from megatron_psft.data.rows import packed_row
from megatron_psft.diagnostics.plan import Plan
from megatron_psft.distributed.device import Platform, detect
from megatron_psft.distributed.grid import Parallel, initialize_parallel
from megatron_psft.model.gpt import build_model, virtual_size
from megatron_psft.model.parameters import is_expert, named_parameters
from megatron_psft.objectives.objective import Objective
from megatron_psft.scoring.old_policy import CurrentPolicy
from megatron_psft.train.optimizer import build_optimizer, update
from megatron_psft.train.pipeline import Pipeline
from tests.diagnostics.dry_run_answers import answers

_REAL_NUMBERS = 65536
"""Integers that are made are real up to so many: bounds, positions, orders of experts."""


@dataclass(frozen=True)
class Call:
    """A collective, or a message of two stages."""

    name: str
    ranks: tuple[int, ...]
    """Of its group; of a message, sender and receiver."""
    sizes: tuple[tuple[int, str], ...]
    """Elements and dtype of each tensor, what is sent and what is received."""


@dataclass(frozen=True)
class Bucket:
    """A part of a gradient buffer that is reduced at once."""

    ranks: tuple[int, ...]
    elements: int
    are_experts: bool


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What one rank has built and done."""

    place: Parallel
    parameters: int
    buckets: tuple[Bucket, ...]
    state_bytes: int
    """Of weights, gradients and the optimizer's state, once all is built."""
    pass_peak_bytes: int
    """Within the old policy's pass over the same rows, with these."""
    peak_bytes: int
    """Within the step, with these."""
    saved_bytes: float
    """What the rank would write of a checkpoint."""
    calls: tuple[Call, ...]
    """Of the pass and the step, in order."""


class Ledger(TorchDispatchMode):
    """Counts bytes of storages that live, and notes collectives, of which it makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.calls: list[Call] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_real = bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not is_real:
            out = func(*args, **kwargs)
            made = out if not tensors and isinstance(out, torch.Tensor) else None
            is_real = made is not None and not made.is_floating_point() and made.numel() <= _REAL_NUMBERS
        if is_real:
            with _disable_current_modes():
                return func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _collective(self, func: Any, args: Any) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        group = ProcessGroup.unbox(args[names.index("process_group")])
        ranks = tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group.group_name)))
        name = func._opname.strip("_")
        if name in ("send", "recv"):
            here, peer = dist.get_rank(), ranks[args[2]]
            ranks = (here, peer) if name == "send" else (peer, here)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        self.calls.append(Call(name, ranks, tuple((tensor.numel(), str(tensor.dtype)) for tensor in tensors)))
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def cut(plan: Plan, *, layers_per_chunk: int = 1, micro_batches: int = 1, **parallel: Any) -> Plan:
    """The plan on this CPU, with few layers and micro-batches, rows of half the length, and other parallel sizes if
    given."""
    config = plan.config
    config = replace(config, parallel=replace(config.parallel, **parallel)).with_bf16(True)
    chunks = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        chunks *= 2
        config = replace(
            config, parallel=replace(config.parallel, num_layers_per_virtual_pipeline_stage=layers_per_chunk)
        )
    size = config.batch.micro_batch_size * config.parallel.data_parallel_size(plan.world_size) * micro_batches
    config = replace(config, batch=replace(config.batch, global_batch_size=size))
    config = replace(config, data=replace(config.data, seq_length=plan.config.data.seq_length // 2))
    shape = replace(plan.shape, num_layers=layers_per_chunk * chunks)
    here = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
    return replace(plan, config=config, shape=shape, platform=here)


def distinct_ranks(plan: Plan) -> list[int]:
    """Rank 0, the last member of each of its groups, and a rank of each stage: nothing but its place in a group tells a
    member from the others, and first and last are the places that differ most."""
    parallel = plan.config.parallel
    tensor, context, data = parallel.tensor_model_parallel_size, parallel.context_parallel_size, plan.data_size
    edges = {
        tensor - 1,
        tensor * (context - 1),
        tensor * context * (data - 1),
        parallel.expert_tensor_size * (parallel.expert_model_parallel_size - 1),
    }
    return sorted(edges | {tensor * context * data * stage for stage in range(plan.stages)})


Fault = Callable[[], AbstractContextManager[object]]


def steps_of(plan: Plan, ranks: Sequence[int], fault: Fault = nullcontext, at: Sequence[int] = ()) -> list[RankStep]:
    """Builds and steps each of `ranks`, one after the other, those of `at` with a fault; for a worker of the pool."""
    detect(0)
    found = []
    for rank in ranks:
        with fault() if rank in at else nullcontext():
            found.append(_step(plan, rank))
    return found


def complaints(plan: Plan, steps: Sequence[RankStep]) -> list[str]:
    """What would hang or be wrong: collectives of which members of a group make different ones, messages that are sent
    and not received or the other way round, and buckets that are reduced by others than their replicas."""
    return [*_of_collectives(steps), *_of_messages(steps), *_of_buckets(plan, steps)]


def _of_collectives(steps: Sequence[RankStep]) -> Iterator[str]:
    made: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    for step in steps:
        for call in step.calls:
            for ranks in [call.ranks] if call.name not in ("send", "recv") else []:
                made[ranks].setdefault(step.place.rank, []).append(call)
    for ranks, by_rank in made.items():
        first, *others = [step.place.rank for step in steps if step.place.rank in ranks]
        for other in others:
            theirs, own = by_rank.get(first, []), by_rank.get(other, [])
            if own != theirs:
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, own, strict=False)))
                yield (
                    f"group of {len(ranks)} from {ranks[0]} to {ranks[-1]}: rank {first} makes {len(theirs)} "
                    f"collectives and rank {other} {len(own)}; they part at {same}: {theirs[same : same + 1]} and "
                    f"{own[same : same + 1]}"
                )


def _of_messages(steps: Sequence[RankStep]) -> Iterator[str]:
    built = {step.place.rank for step in steps}
    sides: dict[str, dict[tuple[int, ...], list[Any]]] = {"send": defaultdict(list), "recv": defaultdict(list)}
    for step in steps:
        for call in step.calls:
            if call.name in sides and built.issuperset(call.ranks):
                sides[call.name][call.ranks].append(call.sizes)
    for pair in sides["send"].keys() | sides["recv"].keys():
        sent, received = sides["send"][pair], sides["recv"][pair]
        if sent != received:
            yield f"rank {pair[0]} sends {len(sent)} messages to rank {pair[1]}, which receives {len(received)}"


def _of_buckets(plan: Plan, steps: Sequence[RankStep]) -> Iterator[str]:
    parallel, per_stage = plan.config.parallel, plan.world_size // plan.stages
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    for step in steps:
        for bucket in step.buckets:
            stride = experts if bucket.are_experts else parallel.tensor_model_parallel_size
            first = step.place.rank // per_stage * per_stage
            replicas = tuple(range(first + step.place.rank % stride, first + per_stage, stride))
            if bucket.ranks != replicas:
                yield f"rank {step.place.rank}: a bucket is reduced over {bucket.ranks}, its replicas are {replicas}"
        if sum(bucket.elements for bucket in step.buckets) < step.parameters:
            yield f"rank {step.place.rank}: parameters are in no bucket"


def _step(plan: Plan, rank: int) -> RankStep:
    config = plan.config
    ledger = Ledger()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    with answers(plan), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        virtual = virtual_size(plan.shape, config)
        place = initialize_parallel(config.parallel, virtual_size=virtual, seed=1, device=plan.platform.device)
        chunks = build_model(plan.shape, config, plan.platform, place)
        optimizer = build_optimizer(config, chunks)
        pipeline = Pipeline(chunks=chunks, parallel=place)
        pipeline.zero_grad()
        gc.collect()
        states = ledger.peak = ledger.now
        ledger.calls.clear()
        with _disable_current_modes():
            rows = [_full_row(plan, place)] * plan.num_microbatches
        pipeline.score(rows)
        pass_peak, ledger.peak = ledger.peak, ledger.now
        pipeline.train(rows, CurrentPolicy(), objective=Objective(config=config.objective))
        update(optimizer, step=1, device=plan.platform.device)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        found = RankStep(
            place=place,
            parameters=sum(parameter.numel() for parameter in parameters),
            buckets=tuple(_buckets(chunks)),
            state_bytes=states,
            pass_peak_bytes=pass_peak,
            peak_bytes=ledger.peak,
            saved_bytes=_saved_bytes(chunks, optimizer, place),
            calls=tuple(ledger.calls),
        )
    _take_down()
    return found


def _full_row(plan: Plan, place: Parallel) -> MicroBatch:
    length = plan.config.data.seq_length
    full = np.ones(length + 1)
    example = Example(tokens=full.astype(np.int32), label_mask=full.astype(bool))
    row = packed_row([length], seq_length=length, context_rank=place.context_rank, context_size=place.context_size)
    return fill_rows([example], row, pad_token_id=0)


def _buckets(chunks: Sequence[Any]) -> Iterator[Bucket]:
    for chunk in chunks:
        for buffers, are_experts in ((chunk.buffers, False), (chunk.expert_parallel_buffers, True)):
            for buffer in buffers:
                ranks = tuple(dist.get_process_group_ranks(buffer.data_parallel_group))
                for bucket in buffer.buckets:
                    yield Bucket(ranks, bucket.grad_data.numel(), are_experts)


def _saved_bytes(chunks: Sequence[Any], optimizer: Any, place: Parallel) -> float:
    """The optimizer's states that this rank has, and its share of the weights."""
    states = 0.0
    for each in optimizer.chained_optimizers:
        for group in each.optimizer.param_groups:
            for parameter in group["params"]:
                held = [parameter, *each.optimizer.state[parameter].values()]
                states += sum(tensor.numel() * tensor.itemsize for tensor in held if tensor.numel() > 1)
    for name, parameter in named_parameters(chunks):
        replicas = place.expert_data_size if is_expert(name) else place.data_size * place.context_size
        states += parameter.numel() * parameter.itemsize / replicas
    return states


def _take_down() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.destroy_model_parallel()
    megatron_random.initialize_rng_tracker(force_reset=True)
    dist.destroy_process_group()
    gc.collect()
