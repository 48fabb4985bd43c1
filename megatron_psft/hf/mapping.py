"""Which part of which Hugging Face tensor is which part of a Megatron-Core parameter.

One description serves both directions. Every local parameter is a stack of pieces along its first dimension, each piece
a block of one Hugging Face tensor; loading reads the pieces and stacks them, export writes the stack's blocks back.
Megatron-Core fuses Q, K and V per query group, and gate and up projection per tensor-parallel rank. Experts, which have
parallel sizes of their own, go by their number in the whole model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_psft.model.shape import ModelShape

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_FINAL_NORM = "model.norm.weight"

# Parameters that every tensor-parallel rank holds whole. Transformer Engine fuses two of the norms into the linear that
# follows.
_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(linear_fc[12])\.weight")


@dataclass(frozen=True)
class _MlpNames:
    """Of the projections of a plain MLP, or of an expert."""

    prefix: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def weight(self, projection: str) -> str:
        return f"{self.prefix}.{getattr(self, projection)}.weight"


_PLAIN_MLP = _MlpNames("mlp")


def _expert(model_type: str, number: int) -> _MlpNames:
    if model_type == "mixtral":
        return _MlpNames(f"block_sparse_moe.experts.{number}", gate="w1", up="w3", down="w2")
    return _MlpNames(f"mlp.experts.{number}")


def _router(model_type: str) -> str:
    return "block_sparse_moe.gate.weight" if model_type == "mixtral" else "mlp.gate.weight"


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
    hidden = shape.hidden_size
    q_rows, kv_rows = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {_EMBEDDING: (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        block: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for projection, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            block[f"self_attn.{projection}_proj.weight"] = (rows, hidden)
            if shape.qkv_bias:
                block[f"self_attn.{projection}_proj.bias"] = (rows,)
        if shape.qk_norm:
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (shape.head_dim,)
        block["self_attn.o_proj.weight"] = (hidden, q_rows)
        block["post_attention_layernorm.weight"] = (hidden,)
        block |= _mlp_tensors(shape, layer)
        tensors.update({f"model.layers.{layer}.{name}": dims for name, dims in block.items()})
    tensors[_FINAL_NORM] = (hidden,)
    if not shape.tied_embeddings:
        tensors[_HEAD] = (shape.vocab_size, hidden)
    return tensors


def _mlp_tensors(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    experts, hidden = shape.experts, shape.hidden_size
    block: dict[str, tuple[int, ...]] = {}
    if experts is None or not shape.has_experts(layer):
        mlps, ffn = [_PLAIN_MLP], shape.ffn_hidden_size
    else:
        block[_router(shape.model_type)] = (experts.count, hidden)
        mlps = [_expert(shape.model_type, number) for number in range(experts.count)]
        ffn = experts.ffn_hidden_size
    for mlp in mlps:
        block[mlp.weight("gate")] = block[mlp.weight("up")] = (ffn, hidden)
        block[mlp.weight("down")] = (hidden, ffn)
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
    if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        name = _EMBEDDING if parameter.startswith("embedding") or shape.tied_embeddings else _HEAD
        start = min(tensor_rank * local_rows, shape.vocab_size)
        return [Piece(name, (start, min(start + local_rows, shape.vocab_size)))]
    if parameter == "decoder.final_layernorm.weight":
        return [Piece(_FINAL_NORM, (0, shape.hidden_size))]
    _, _, layer, suffix = parameter.split(".", 3)
    prefix = f"model.layers.{layer}."
    if suffix in _REPLICATED:
        return [Piece(prefix + _REPLICATED[suffix], (0, local_rows))]
    experts, expert = shape.experts, _EXPERT.fullmatch(suffix)
    if experts is not None and suffix == "mlp.router.weight":
        return [Piece(prefix + _router(shape.model_type), (0, local_rows))]
    if experts is not None and expert is not None:
        mlp = _expert(shape.model_type, int(expert[1]))
        return _mlp_pieces(
            prefix, mlp, expert[2], shape.hidden_size, _part(experts.ffn_hidden_size, tensor_rank, tensor_size)
        )
    module, _, kind = suffix.rpartition(".")
    if module in ("mlp.linear_fc1", "mlp.linear_fc2") and kind == "weight":
        own = _part(shape.ffn_hidden_size, tensor_rank, tensor_size)
        return _mlp_pieces(prefix, _PLAIN_MLP, module.removeprefix("mlp."), shape.hidden_size, own)
    if suffix == "self_attention.linear_proj.weight":
        own = _part(shape.num_attention_heads * shape.head_dim, tensor_rank, tensor_size)
        return [Piece(prefix + "self_attn.o_proj.weight", (0, shape.hidden_size), own)]
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
        return [Piece(prefix + mlp.weight(half), own) for half in ("gate", "up")]
    return [Piece(prefix + mlp.weight("down"), (0, hidden), own)]


def _qkv_pieces(prefix: str, kind: str, shape: ModelShape, tensor_rank: int, tensor_size: int) -> Iterator[Piece]:
    """Per query group: its query heads, its key head, its value head."""
    groups = shape.num_query_groups // tensor_size
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    for group in range(tensor_rank * groups, (tensor_rank + 1) * groups):
        for projection, heads in (("q", heads_per_group), ("k", 1), ("v", 1)):
            rows = heads * shape.head_dim
            yield Piece(f"{prefix}self_attn.{projection}_proj.{kind}", (group * rows, (group + 1) * rows))


def scatter(shard: torch.Tensor, shard_pieces: list[Piece], tensors: dict[str, torch.Tensor]) -> None:
    """Writes a shard's rows into the Hugging Face tensors they come from; padding rows are left out."""
    row = 0
    for piece in shard_pieces:
        rows = piece.rows[1] - piece.rows[0]
        tensors[piece.name][piece.index] = shard[row : row + rows]
        row += rows
