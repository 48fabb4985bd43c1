"""Low-rank adapters (LoRA, E. Hu et al., arXiv 2106.09685) on the linear layers of a Megatron-Core model.

Beside a frozen weight W stand two thin matrices A and B: the layer computes x W' + scale * x A' B'. As in `peft`, each
projection has its own pair, although Megatron-Core fuses queries, keys and values, and gate and up projection: adapters
come from `peft` and go there as they are. Modules and parameters are called as by Megatron-Bridge's `CanonicalLoRA`.

As `end.py` does, this takes over `forward` of a layer on the instance, of whatever class it is: the portable layers,
and Transformer Engine's, which may have the norm before them in them.

Under tensor parallelism the thin matrix at the side that is not cut is replicated. Of a column-parallel layer that is
A, whose output goes to all ranks' parts of B; of a row-parallel one B, to which all ranks' parts of A add up. With
sequence parallelism each rank gives such a matrix the gradient of its part of the positions, and Megatron-Core sums
them as it does those of norms.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_psft.config.lora import ALL_LINEAR, LoraConfig
from megatron_psft.config.schema import Config
from megatron_psft.errors import UserError, nearest_name_hint
from megatron_psft.model.parameters import is_adapter
from megatron_psft.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear layer as Hugging Face has it, which may be a part of one of Megatron-Core's."""

    name: str
    """In a `Names`."""
    module: str
    """Megatron-Core's, within a layer."""
    adapter: str
    """Name of its pair of matrices among those of the module; empty where the module is this projection alone."""
    in_features: int
    out_features: int
    is_row_parallel: bool = False
    """Whether tensor parallelism cuts what goes in, and not what comes out."""

    def hf_module(self, shape: ModelShape, layer: int | str) -> str:
        """What Hugging Face calls it, as `model.layers.3.self_attn.q_proj`."""
        names = shape.family.names
        return f"{names.layer.format(layer)}.{getattr(names, self.name)}"

    def target(self, shape: ModelShape) -> str:
        """The last part of that, which every layer has, as `q_proj`."""
        return self.hf_module(shape, 0).rpartition(".")[2]


def projections(shape: ModelShape) -> tuple[Projection, ...]:
    """Those that may have adapters, in the order of Megatron-Core's rows; experts have none."""
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys, qkv, mlp = shape.num_query_groups * shape.head_dim, "self_attention.linear_qkv", "mlp.linear_fc1"
    found = [
        Projection(name="q", module=qkv, adapter="adapter_q", in_features=hidden, out_features=queries),
        Projection(name="k", module=qkv, adapter="adapter_k", in_features=hidden, out_features=keys),
        Projection(name="v", module=qkv, adapter="adapter_v", in_features=hidden, out_features=keys),
        Projection(
            name="attention_output",
            module="self_attention.linear_proj",
            adapter="",
            in_features=queries,
            out_features=hidden,
            is_row_parallel=True,
        ),
    ]
    if shape.experts is None:
        ffn = shape.ffn_hidden_size
        found += [
            Projection(name="gate", module=mlp, adapter="adapter_gate", in_features=hidden, out_features=ffn),
            Projection(name="up", module=mlp, adapter="adapter_up", in_features=hidden, out_features=ffn),
            Projection(
                name="down",
                module="mlp.linear_fc2",
                adapter="",
                in_features=ffn,
                out_features=hidden,
                is_row_parallel=True,
            ),
        ]
    return tuple(found)


def targeted(config: LoraConfig, shape: ModelShape) -> tuple[Projection, ...]:
    """The projections that get adapters; none without them.

    Raises:
        UserError: a target that no layer has, or one of experts, or a rank that the smallest side has no room for.
    """
    if not config.has_adapters:
        return ()
    known = projections(shape)
    names = {name for it in known for name in (it.target(shape), it.module.rpartition(".")[2])}
    chosen: set[Projection] = set()
    for name in config.lora_target_names:
        if shape.experts is not None and name in _OF_MLPS:
            raise UserError(
                f"lora_targets ({name}) would put adapters on experts, which is not supported; choose of "
                f"{', '.join(it.target(shape) for it in known)}"
            )
        if name != ALL_LINEAR and name not in names:
            hint = nearest_name_hint(name, [*names, ALL_LINEAR])
            raise UserError(
                f"lora_targets ({name}) is no linear layer of a {shape.model_type} model; there are "
                f"{', '.join(sorted(names))}{hint}"
            )
        chosen |= {it for it in known if name in (ALL_LINEAR, it.target(shape), it.module.rpartition(".")[2])}
    for it in known:
        smaller = min(it.in_features, it.out_features)
        if it in chosen and config.lora_rank > smaller:
            raise UserError(
                f"lora_rank ({config.lora_rank}) must be at most {smaller}, the smaller side of {it.target(shape)}; "
                "lower it"
            )
    return tuple(it for it in known if it in chosen)


_OF_MLPS = (ALL_LINEAR, "gate_proj", "up_proj", "down_proj", "linear_fc1", "linear_fc2", "w1", "w2", "w3")


class _Matrix(torch.nn.Module):
    def __init__(self, rows: int, columns: int, *, like: Tensor, cut: int | None, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))
        if cut is not None:
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=cut, stride=1)
        elif sequence_parallel:
            # Each rank has the gradient of its positions: Megatron-Core sums them, as of norms.
            setattr(self.weight, "sequence_parallel", True)  # noqa: B010 (no attribute of a Parameter)


class _Pair(torch.nn.Module):
    """A (`linear_in`) and B (`linear_out`) of one projection on a rank."""

    def __init__(self, of: Projection, rank: int, *, like: Tensor, tensor_size: int, sequence_parallel: bool) -> None:
        super().__init__()
        columns, rows = of.in_features, of.out_features
        cut_in, cut_out = (1, None) if of.is_row_parallel else (None, 0)
        if of.is_row_parallel:
            columns //= tensor_size
        else:
            rows //= tensor_size
        options: dict[str, Any] = {"like": like, "sequence_parallel": sequence_parallel}
        self.linear_in = _Matrix(rank, columns, cut=cut_in, **options)
        self.linear_out = _Matrix(rows, rank, cut=cut_out, **options)
        self._cuts = {"linear_in.weight": cut_in, "linear_out.weight": cut_out}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron-Core's modules have it."""
        axes = {name: axis for name, axis in self._cuts.items() if axis is not None}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)  # type: ignore[no-any-return]


class Adapters(torch.nn.Module):
    """Those of one of Megatron-Core's linear layers."""

    def __init__(
        self,
        parts: Sequence[Projection],
        chosen: Sequence[Projection],
        config: LoraConfig,
        *,
        groups: int,
        like: Tensor,
        tensor_size: int,
        sequence_parallel: bool,
    ) -> None:
        """Leaves the matrices to be filled.

        Args:
            parts: the projections that the layer is made of, in the order of its rows.
            chosen: those of all that get adapters.
            config: of the adapters.
            groups: times that the rows of the parts follow one another on a rank, as those of each query group.
            like: a weight of the dtype and on the device that the adapters are to have.
            tensor_size: tensor-parallel ranks.
            sequence_parallel: whether they split positions, too.
        """
        super().__init__()
        self.is_off = False
        self._groups, self._scale = groups, config.lora_scale
        self._is_row, self._sequence_parallel = parts[0].is_row_parallel, sequence_parallel
        ranks = 1 if self._is_row else tensor_size
        self._widths = [part.out_features // (groups * ranks) for part in parts]
        options: dict[str, Any] = {
            "like": like,
            "tensor_size": tensor_size,
            "sequence_parallel": sequence_parallel,
        }
        pairs = [_Pair(part, config.lora_rank, **options) if part in chosen else None for part in parts]
        self._names = [part.adapter for part in parts]
        self._pairs = tuple(pairs)  # a tuple, which registers none of them
        for part, pair in zip(parts, pairs, strict=True):
            if pair is not None and part.adapter:
                self.add_module(part.adapter, pair)
            elif pair is not None:
                for name, matrix in pair.named_children():
                    self.add_module(name, matrix)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Adds what the adapters make of `x` to the layer's output.

        Args:
            x: what goes into the product with the weight, `[s, b, in]`: with sequence parallelism this rank's part of s
                (column-parallel), else its part of `in` (row-parallel).
            output: `[s, b, out]` as the layer has it.
        """
        pairs = [pair for pair in self._pairs if pair is not None]
        thin = F.linear(x, torch.cat([pair.linear_in.weight for pair in pairs])) * self._scale
        thins = iter(self._to_all_ranks(thin).chunk(len(pairs), dim=-1))
        if len(self._pairs) == 1:
            return output + F.linear(next(thins), pairs[0].linear_out.weight)
        rows = output.unflatten(-1, (self._groups, -1)).split(self._widths, dim=-1)
        added = [
            part
            if pair is None
            else part + F.linear(next(thins), pair.linear_out.weight).unflatten(-1, (self._groups, -1))
            for part, pair in zip(rows, self._pairs, strict=True)
        ]
        return torch.cat(added, dim=-1).flatten(-2)

    def _to_all_ranks(self, thin: Tensor) -> Tensor:
        """The product with A where that with B takes it; the identity without tensor parallelism."""
        if self._is_row:
            if self._sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(thin)
            return reduce_from_tensor_model_parallel_region(thin)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(thin)
        return copy_to_tensor_model_parallel_region(thin)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron-Core's modules have it."""
        state: dict[str, Any] = {}
        for name, pair in zip(self._names, self._pairs, strict=True):
            if pair is not None:
                within = f"{prefix}{name}." if name else prefix
                state |= pair.sharded_state_dict(within, sharded_offsets, metadata)
        return state


def add_adapters(
    model: Any, shape: ModelShape, config: Config, chosen: Sequence[Projection], *, tensor_size: int
) -> None:
    """Freezes a chunk of a model, a `GPTModel`, and puts adapters beside the projections `chosen`, to be filled."""
    modules = {it.module: [part for part in projections(shape) if part.module == it.module] for it in chosen}
    for layer in model.decoder.layers:
        for name, parts in modules.items():
            linear = layer.get_submodule(name)
            linear.adapter = Adapters(
                parts,
                chosen,
                config.lora,
                groups=shape.num_query_groups // tensor_size if parts[0].name == "q" else 1,
                like=next(linear.parameters()),
                tensor_size=tensor_size,
                sequence_parallel=config.parallel.sequence_parallel,
            )
            _take_over(linear)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    if model.pre_process and config.recompute.recompute_granularity is not None:
        # What is recomputed has a gradient only where what goes into it has one.
        model.embedding.register_forward_hook(lambda *called: called[-1].requires_grad_(torch.is_grad_enabled()))


def _take_over(linear: Any) -> None:
    """Has a layer add what its adapters say, and save them with it."""
    forward, sharded_state_dict, adapters = linear.forward, linear.sharded_state_dict, linear.adapter
    has_norm = getattr(linear, "layer_norm_weight", None) is not None
    if has_norm:  # Transformer Engine's; what its norm has made is what the adapters take
        linear.return_layernorm_output, linear.return_layernorm_output_gathered = True, False
    post_norm = getattr(linear, "post_layernorm", None)  # of Megatron-Bridge's Gemma 3
    inputs = [] if post_norm is None else _add_before(post_norm, adapters)

    def adapted(input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if post_norm is not None:
            inputs.append(input_)
            return forward(input_, *args, **options)  # type: ignore[no-any-return]
        output, bias = forward(input_, *args, **options)
        if has_norm:
            output, input_ = output
        return (output if adapters.is_off else adapters(input_, output)), bias

    def sharded(
        prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: value for name, value in state.items() if not is_adapter(name)}
        return own | adapters.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)

    linear.forward, linear.sharded_state_dict = adapted, sharded


def _add_before(norm: Any, adapters: Adapters) -> list[Tensor]:
    """Has the norm at the end of a layer take what the adapters add to the layer's product, too. Returns where the
    layer leaves what goes into it, each time before the norm is called."""
    inputs: list[Tensor] = []
    forward = norm.forward

    def adapted(output: Tensor) -> Tensor:
        input_ = inputs.pop()
        return forward(output if adapters.is_off else adapters(input_, output))  # type: ignore[no-any-return]

    norm.forward = adapted
    return inputs


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The model without its adapters, as it was before they were trained."""
    every = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapters)]
    for adapters in every:
        adapters.is_off = True
    try:
        yield
    finally:
        for adapters in every:
            adapters.is_off = False
