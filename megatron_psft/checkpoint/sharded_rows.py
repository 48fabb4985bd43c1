"""The distributed optimizer's state, of which each rank saves and loads the rows of its own share.

The distributed optimizer lays the parameters of a model shard end to end and cuts them into one range per data-parallel
rank, wherever that falls. Megatron-Core's format that any layout can read ("fully_reshardable") gathers all ranges on
every rank before a save: 12 bytes of host memory per parameter of the model shard. Here a rank describes the whole rows
(of a parameter's first dimension) that begin in its range, as they lie in the optimizer; only a row that a border cuts
is put together from several ranks. Names, values and whole shapes in the checkpoint are those of that format, the cuts
are not; either reads what the other has written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_psft.checkpoint.parts import cut, tensors_of

_STATES = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of a parameter, fp32, as Megatron-Core names it."""

_Tensors = dict[str, Tensor]
"""One for each of `_STATES`."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Elements [start, end) of the flattened parameter `index`, which this rank updates. `width`: elements of a row;
    `chunk`: of what a rank has of the bucket that the parameter lies in."""

    index: int
    parameter: torch.nn.Parameter
    start: int
    end: int
    width: int
    chunk: int

    @property
    def first_row(self) -> int:
        """Of those that begin within the share."""
        return -(-self.start // self.width)

    @property
    def whole_rows_end(self) -> int:
        """The row after the last one that lies in the share whole."""
        return max(self.first_row, self.end // self.width)

    def head(self) -> tuple[int, int]:
        """Of the row that begins on a rank before this: how many ranks before, and how many elements are here."""
        before = self.start % self.width
        return -(-before // self.chunk), min(self.first_row * self.width, self.end) - self.start if before else 0

    def rest(self) -> Iterator[tuple[int, int]]:
        """Of the row that begins here and ends on a rank behind this: on the how many-th behind, how many elements."""
        if self.whole_rows_end * self.width < self.end:
            missing = (self.whole_rows_end + 1) * self.width - self.end
            for number, gone in enumerate(range(0, missing, self.chunk), start=1):
                yield number, min(self.chunk, missing - gone)


class ShardedRows:
    """One distributed optimizer's state as sharded tensors; all methods are collective over its data-parallel ranks."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer

    def sharded_state(
        self, weights: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any] | None = None
    ) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
        """What to save of the state, or to load, by parameter, state and a number: tensors of the optimizer itself,
        which must not change until they are copied or written, or none of any data. `weights` are the model's sharded
        parameters. Takes the place of Megatron-Core's `sharded_param_state_fully_reshardable`."""
        templates = {
            value.data: value
            for value in nested_values(dict(weights))
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        shares = list(self._shares())
        blocks = {share.index: _rows_to_load(share) for share in shares} if is_loading else self._rows_to_save(shares)
        return {
            share.index: {
                state: dict(enumerate(_sharded(templates[share.parameter], state, blocks[share.index])))
                for state in _STATES
            }
            for share in shares
        }

    @torch.no_grad()
    def fill(self, loaded: Mapping[int, Mapping[str, Mapping[int, Tensor]]]) -> None:
        """Takes up what was loaded for `sharded_state`."""
        for share in self._shares():
            first = share.start // share.width * share.width
            tensors = {}
            for state, parts in loaded[share.index].items():
                flat = torch.cat([parts[number].flatten() for number in sorted(parts)])
                tensors[state] = flat[share.start - first : share.end - first]
            self._optimizer._set_main_param_and_optimizer_states(share.parameter, tensors)
        if isinstance(self._optimizer.optimizer, HybridDeviceOptimizer):
            self._optimizer.optimizer._sync_hdo_state_to_sub_optimizers()

    def _shares(self) -> Iterator[_Share]:
        """This rank's shares of parameters, under numbers that all data-parallel ranks give them."""
        group = self._optimizer.data_parallel_group
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        index = 0
        for buffer in self._optimizer.buffers:
            for parameter, (first, last, bucket_number) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_number]
                chunk = bucket.grad_data.numel() // world_size
                begin = bucket.offset + rank * chunk
                start, end = max(begin, first) - first, min(begin + chunk, last) - first
                if start < end:
                    width = parameter.numel() // len(parameter)
                    yield _Share(index=index, parameter=parameter, start=start, end=end, width=width, chunk=chunk)
                index += 1

    def _rows_to_save(self, shares: Sequence[_Share]) -> dict[int, list["_Rows"]]:
        states = {share.index: self._states_of(share) for share in shares}
        rests = self._rests_of_cut_rows(shares, states)
        return {share.index: _rows_of(share, states[share.index], rests.get(share.index, [])) for share in shares}

    def _states_of(self, share: _Share) -> _Tensors:
        tensors = self._optimizer._get_main_param_and_optimizer_states(share.parameter)
        return {state: tensors[state].detach().float() for state in _STATES}

    def _rests_of_cut_rows(
        self, shares: Sequence[_Share], states: Mapping[int, _Tensors]
    ) -> dict[int, list[Sequence[Tensor]]]:
        """By parameter what ranks behind this have of a row that begins here: of each a tensor per state. Each rank
        hears of those few alone, as a border cuts no more than one row of a bucket."""
        group, device = self._optimizer.data_parallel_group, self._optimizer.buffers[0].grad_data.device
        rank = dist.get_rank(group)
        exchanges: list[dist.P2POp] = []
        received: dict[int, list[Tensor]] = {}
        for share in shares:
            distance, count = share.head()
            if distance:
                sent = torch.cat([states[share.index][name][:count].to(device) for name in _STATES])
                exchanges.append(dist.P2POp(dist.isend, sent, dist.get_global_rank(group, rank - distance), group))
            for distance, count in share.rest():
                there = torch.empty(len(_STATES) * count, device=device)
                exchanges.append(dist.P2POp(dist.irecv, there, dist.get_global_rank(group, rank + distance), group))
                received.setdefault(share.index, []).append(there)
        for work in dist.batch_isend_irecv(exchanges) if exchanges else ():
            work.wait()
        return {index: [there.cpu().chunk(len(_STATES)) for there in parts] for index, parts in received.items()}


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a parameter from `first` on. `tensors`: flat, None to be loaded."""

    first: int
    count: int
    tensors: _Tensors | None = None


def _rows_to_load(share: _Share) -> list[_Rows]:
    first = share.start // share.width
    return [_Rows(first=first, count=-(-share.end // share.width) - first)]


def _rows_of(share: _Share, states: _Tensors, rest: Sequence[Sequence[Tensor]]) -> list[_Rows]:
    """The rows that begin in the share: those in the middle as they lie there, and the one that its end cuts, with the
    `rest` of it."""
    first, end, width = share.first_row, share.whole_rows_end, share.width
    rows = []
    if first < end:
        inner = slice(first * width - share.start, end * width - share.start)
        rows.append(
            _Rows(first=first, count=end - first, tensors={name: values[inner] for name, values in states.items()})
        )
    if rest:
        begun = [states[name][end * width - share.start :].cpu() for name in _STATES]
        parts = zip(begun, *rest, strict=True)
        tensors = {name: torch.cat(found) for name, found in zip(_STATES, parts, strict=True)}
        rows.append(_Rows(first=end, count=1, tensors=tensors))
    return rows


def _sharded(
    template: ShardedTensor | ShardedTensorFactory, state: str, blocks: Sequence[_Rows]
) -> Iterator[ShardedTensor]:
    """Rows of one parameter's state, as the checkpoint's parts of that parameter have them."""
    tensors = tensors_of(template, key=f"optimizer.state.{state}.{template.key}", dtype=torch.float32)
    for block in blocks:
        data = None if block.tensors is None else block.tensors[state].view(block.count, -1)
        yield from cut(tensors, block.first, block.first + block.count, data)
