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

_Fragment = tuple[int, int, _Tensors]
"""Flat elements of a row that begins on another rank: the parameter's number, the first element, and what they are."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Elements [start, end) of the flattened parameter `index`, which this rank updates. `width`: elements of a row."""

    index: int
    parameter: torch.nn.Parameter
    start: int
    end: int
    width: int

    @property
    def first_row(self) -> int:
        """Of those that begin within the share."""
        return -(-self.start // self.width)

    @property
    def whole_rows_end(self) -> int:
        """The row after the last one that lies in the share whole."""
        return max(self.first_row, self.end // self.width)


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
        index = 0
        for buffer, ranges_of_dtype in zip(self._optimizer.buffers, self._optimizer.gbuf_ranges, strict=True):
            (buckets,) = ranges_of_dtype.values()
            own = {
                parameter: ranges["param"] for bucket in buckets for parameter, ranges in bucket["param_map"].items()
            }
            for parameter in buffer.param_index_map:
                if parameter in own and own[parameter].end > own[parameter].start:
                    elements = own[parameter]
                    width = parameter.numel() // len(parameter)
                    yield _Share(index=index, parameter=parameter, start=elements.start, end=elements.end, width=width)
                index += 1

    def _rows_to_save(self, shares: Sequence[_Share]) -> dict[int, list["_Rows"]]:
        states = {share.index: self._states_of(share) for share in shares}
        pieces = self._pieces_of_cut_rows(states)
        return {share.index: _rows_of(share, states[share.index], pieces) for share in shares}

    def _states_of(self, share: _Share) -> _Tensors:
        tensors = self._optimizer._get_main_param_and_optimizer_states(share.parameter)
        return {state: tensors[state].detach().float() for state in _STATES}

    def _pieces_of_cut_rows(self, states: Mapping[int, _Tensors]) -> list[_Fragment]:
        """What all ranks have of rows that begin on the rank before, a row or less of each parameter that is cut; on
        the CPU. Every rank knows where all others' lie, so that the values travel alone, in one collective."""
        group = self._optimizer.data_parallel_group
        cuts = [list(self._cuts(rank)) for rank in range(dist.get_world_size(group))]
        sizes = [len(_STATES) * sum(stop - start for _, start, stop in own) for own in cuts]
        if not any(sizes):
            return []
        rank, device = dist.get_rank(group), self._optimizer.buffers[0].grad_data.device
        values = [
            states[index][name][: stop - start].to(device) for index, start, stop in cuts[rank] for name in _STATES
        ]
        sent = torch.cat([*values, torch.zeros(max(sizes) - sizes[rank], device=device)])
        gathered = [torch.empty_like(sent) for _ in cuts]
        dist.all_gather(gathered, sent, group=group)
        pieces = []
        for found, flat in zip(cuts, gathered, strict=True):
            lengths = [stop - start for _, start, stop in found for _ in _STATES]
            parts = iter(flat.cpu()[: sum(lengths)].split(lengths))
            pieces += [(index, start, {name: next(parts) for name in _STATES}) for index, start, _ in found]
        return sorted(pieces, key=lambda piece: piece[:2])

    def _cuts(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """Of each parameter whose share on a data-parallel rank begins within a row: its number, and from which flat
        element on how far this row goes there."""
        world_size = dist.get_world_size(self._optimizer.data_parallel_group)
        index = 0
        for buffer in self._optimizer.buffers:
            for parameter, (first, last, bucket_number) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_number]
                size = bucket.grad_data.numel() // world_size
                begin = bucket.offset + rank * size
                start, end = max(begin, first) - first, min(begin + size, last) - first
                width = parameter.numel() // len(parameter)
                stop = min(-(-start // width) * width, end)
                if start < stop:
                    yield index, start, stop
                index += 1


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a parameter from `first` on. `tensors`: flat, None to be loaded."""

    first: int
    count: int
    tensors: _Tensors | None = None


def _rows_to_load(share: _Share) -> list[_Rows]:
    first = share.start // share.width
    return [_Rows(first=first, count=-(-share.end // share.width) - first)]


def _rows_of(share: _Share, states: _Tensors, pieces: Sequence[_Fragment]) -> list[_Rows]:
    """The rows that begin in the share: those in the middle as they lie there, and the one that its end cuts."""
    first, end, width = share.first_row, share.whole_rows_end, share.width
    rows = []
    if first < end:
        inner = slice(first * width - share.start, end * width - share.start)
        rows.append(
            _Rows(first=first, count=end - first, tensors={name: values[inner] for name, values in states.items()})
        )
    if end * width < share.end:
        cut = slice(end * width - share.start, None)
        rest = [found for index, start, found in pieces if index == share.index and start // width == end]
        tensors = {
            name: torch.cat([values[cut].cpu(), *(found[name] for found in rest)]) for name, values in states.items()
        }
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
