"""Which part of which Hugging Face tensor is which part of a Megatron-Core parameter.

One description serves both directions. Every local parameter is a stack of pieces along its first dimension, each piece
a block of one Hugging Face tensor; loading reads the pieces and stacks them, export writes the stack's blocks back.
Megatron-Core fuses Q, K and V per query group, and gate and up projection per tensor-parallel rank. Experts, which have
parallel sizes of their own, go by their number in the whole model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_psft.config.lora import LoraConfig
from megatron_psft.model.adapters import projections, targeted
from megatron_psft.model.families import Names, VisionTower
from megatron_psft.model.shape import ModelShape

# Parameters that every tensor-parallel rank holds whole, and their names in a `Names`. Transformer Engine fuses two of
# the norms into the linear that follows.
_REPLICATED = {
    "input_layernorm.weight": "attention_norm",
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "pre_mlp_layernorm.weight": "mlp_norm",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm",
}
_ADAPTER = re.compile(r"(\w+\.linear_\w+)\.adapter\.(?:(adapter_\w+)\.)?linear_(in|out)\.weight")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(linear_fc[12])\.weight")


class _MlpNames(NamedTuple):
    """Of the projections of a plain MLP, or of an expert, within a layer."""

    gate: str
    up: str
    down: str

    @classmethod
    def of(cls, names: Names, expert: int | None = None) -> "_MlpNames":
        if expert is None:
            return cls(names.gate, names.up, names.down)
        return cls(*(name.format(expert) for name in (names.expert_gate, names.expert_up, names.expert_down)))


@dataclass(frozen=True)
class Piece:
    """The block `tensor[rows, columns]` of a Hugging Face tensor; ranges are (start, stop), None is all columns."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def index(self) -> tuple[slice, ...]:
        """The block as an index into the tensor, or into a lazily read slice of it."""
        rows = slice(*self.rows)
        return (rows,) if self.columns is None else (rows, slice(*self.columns))


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and dimensions of every tensor of the Hugging Face checkpoint, in the order of the layers."""
    hidden, names = shape.hidden_size, shape.family.names
    q_rows, kv_rows = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {embedding_name(shape): (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        block: dict[str, tuple[int, ...]] = {f"{names.attention_norm}.weight": (hidden,)}
        for projection, rows in ((names.q, q_rows), (names.k, kv_rows), (names.v, kv_rows)):
            block[f"{projection}.weight"] = (rows, hidden)
            if shape.qkv_bias:
                block[f"{projection}.bias"] = (rows,)
        if shape.qk_norm:
            block[f"{names.q_norm}.weight"] = block[f"{names.k_norm}.weight"] = (shape.head_dim,)
        block[f"{names.attention_output}.weight"] = (hidden, q_rows)
        block[f"{names.mlp_norm}.weight"] = (hidden,)
        block |= _mlp_tensors(shape, layer)
        tensors.update({f"{names.layer.format(layer)}.{name}": dims for name, dims in block.items()})
    tensors[f"{names.final_norm}.weight"] = (hidden,)
    if not shape.tied_embeddings:
        tensors[head_name(shape)] = (shape.vocab_size, hidden)
    return tensors


def adapter_tensors(shape: ModelShape, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and dimensions of every tensor of a `peft` adapter, in the order of the layers."""
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_layers):
        for it in targeted(config, shape):
            name = it.hf_module(shape, layer)
            tensors[adapter_name(name, "A")] = (config.lora_rank, it.in_features)
            tensors[adapter_name(name, "B")] = (it.out_features, config.lora_rank)
    return tensors


def adapter_name(module: str, matrix: str) -> str:
    """`peft`'s name of a module's matrix, A or B."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def embedding_name(shape: ModelShape) -> str:
    """The tensor of the embedding."""
    return f"{shape.family.names.embedding}.weight"


def head_name(shape: ModelShape) -> str:
    """The tensor of the output layer, which a checkpoint with tied embeddings need not have."""
    return f"{shape.family.names.head}.weight"


def module_name(name: str, tower: VisionTower | None) -> str:
    """What transformers' modules call a tensor of a file, which may have the spelling of published files."""
    if tower is None or name.startswith(tuple(tower.published)):
        return name
    for ours, theirs in tower.published.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _mlp_tensors(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    experts, hidden, names = shape.experts, shape.hidden_size, shape.family.names
    block: dict[str, tuple[int, ...]] = {}
    if experts is None or not shape.has_experts(layer):
        mlps, ffn = [_MlpNames.of(names)], shape.ffn_hidden_size
    else:
        block[f"{names.router}.weight"] = (experts.count, hidden)
        mlps = [_MlpNames.of(names, number) for number in range(experts.count)]
        ffn = experts.ffn_hidden_size
    for mlp in mlps:
        block[f"{mlp.gate}.weight"] = block[f"{mlp.up}.weight"] = (ffn, hidden)
        block[f"{mlp.down}.weight"] = (hidden, ffn)
    return block


def pieces(parameter: str, shape: ModelShape, *, tensor_rank: int, tensor_size: int, local_rows: int) -> list[Piece]:
    """Describes the shard of `parameter` on one tensor-parallel rank.

    Args:
        parameter: name within the whole model, as `named_parameters` gives it: layers counted from 0 over all pipeline
            stages, and experts over all expert-parallel ranks.
        shape: of the model.
        tensor_rank, tensor_size: of the shard; among the ranks that share an expert where `is_expert`.
        local_rows: first dimension of the shard. Rows that the pieces do not fill are padding of the vocabulary.
    """
    names = shape.family.names
    if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_embedding = parameter.startswith("embedding") or shape.tied_embeddings
        start = min(tensor_rank * local_rows, shape.vocab_size)
        name = embedding_name(shape) if is_embedding else head_name(shape)
        return [Piece(name, (start, min(start + local_rows, shape.vocab_size)))]
    if parameter == "decoder.final_layernorm.weight":
        return [Piece(f"{names.final_norm}.weight", (0, shape.hidden_size))]
    _, _, layer, suffix = parameter.split(".", 3)
    prefix = f"{names.layer.format(layer)}."
    if suffix in _REPLICATED:
        return [Piece(f"{prefix}{getattr(names, _REPLICATED[suffix])}.weight", (0, local_rows))]
    adapter = _ADAPTER.fullmatch(suffix)
    if adapter is not None:
        return [_adapter_piece(layer, adapter, shape, tensor_rank, tensor_size, local_rows)]
    experts, expert = shape.experts, _EXPERT.fullmatch(suffix)
    if experts is not None and suffix == "mlp.router.weight":
        return [Piece(f"{prefix}{names.router}.weight", (0, local_rows))]
    if experts is not None and expert is not None:
        own = _part(experts.ffn_hidden_size, tensor_rank, tensor_size)
        return _mlp_pieces(prefix, _MlpNames.of(names, int(expert[1])), expert[2], shape.hidden_size, own)
    module, _, kind = suffix.rpartition(".")
    if module in ("mlp.linear_fc1", "mlp.linear_fc2") and kind == "weight":
        own = _part(shape.ffn_hidden_size, tensor_rank, tensor_size)
        return _mlp_pieces(prefix, _MlpNames.of(names), module.removeprefix("mlp."), shape.hidden_size, own)
    if suffix == "self_attention.linear_proj.weight":
        own = _part(shape.num_attention_heads * shape.head_dim, tensor_rank, tensor_size)
        return [Piece(f"{prefix}{names.attention_output}.weight", (0, shape.hidden_size), own)]
    if module == "self_attention.linear_qkv":
        return list(_qkv_pieces(prefix, kind, shape, tensor_rank, tensor_size))
    raise KeyError(f"no Hugging Face tensor is known for parameter {parameter}")


def _part(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and stop of a rank's equal part."""
    part = size // ranks
    return rank * part, (rank + 1) * part


def _mlp_pieces(prefix: str, mlp: _MlpNames, linear: str, hidden: int, own: tuple[int, int]) -> list[Piece]:
    """Of an MLP's first or second linear layer, of whose inner dimension a rank has the part `own`."""
    if linear == "linear_fc1":
        return [Piece(f"{prefix}{half}.weight", own) for half in (mlp.gate, mlp.up)]
    return [Piece(f"{prefix}{mlp.down}.weight", (0, hidden), own)]


def _qkv_pieces(prefix: str, kind: str, shape: ModelShape, tensor_rank: int, tensor_size: int) -> Iterator[Piece]:
    """Per query group: its query heads, its key head, its value head."""
    names, groups = shape.family.names, shape.num_query_groups // tensor_size
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    for group in range(tensor_rank * groups, (tensor_rank + 1) * groups):
        for projection, heads in ((names.q, heads_per_group), (names.k, 1), (names.v, 1)):
            rows = heads * shape.head_dim
            yield Piece(f"{prefix}{projection}.{kind}", (group * rows, (group + 1) * rows))


def _adapter_piece(
    layer: str, adapter: re.Match[str], shape: ModelShape, tensor_rank: int, tensor_size: int, local_rows: int
) -> Piece:
    """Tensor parallelism cuts one of the two matrices, that at the side of its weight which is cut."""
    module, pair, side = adapter[1], adapter[2] or "", adapter[3]
    (of,) = (it for it in projections(shape) if (it.module, it.adapter) == (module, pair))
    name, rows = adapter_name(of.hf_module(shape, layer), "A" if side == "in" else "B"), (0, local_rows)
    if of.is_row_parallel:
        return Piece(name, rows, _part(of.in_features, tensor_rank, tensor_size) if side == "in" else None)
    return Piece(name, rows if side == "in" else _part(of.out_features, tensor_rank, tensor_size))


def scatter(shard: torch.Tensor, shard_pieces: list[Piece], tensors: dict[str, torch.Tensor]) -> None:
    """Writes a shard's rows into the Hugging Face tensors they come from; padding rows are left out."""
    row = 0
    for piece in shard_pieces:
        rows = piece.rows[1] - piece.rows[0]
        tensors[piece.name][piece.index] = shard[row : row + rows]
        row += rows
