"""Output layer, softmax and token loss in one: log-probs and gradients of labels without ever holding all the logits.

The logits of a few hundred label tokens exist at a time. Where the loss of a token follows from its own
log-probability, its gradient is formed right there, in the forward pass and in the place of the logits: three matrix
products in all, as many as the plain path has, and no logits to keep or to compute again. A token without a gradient,
as one that PSFT has clipped, takes no part in two of the three.

Dimension letters: n label tokens, h hidden size, v columns of the vocabulary on this rank, with padding.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.head.kernels import GradientFactors, ShardPasses, shard_passes
from megatron_psft.head.products import add_product_, logits_dtype, product
from megatron_psft.head.shards import ShardExtras, ShardSoftmax, ShardTokens, join_shards, shard_width
from megatron_psft.objectives.declare import ExtraStat
from megatron_psft.objectives.labels import LabelStats

ChunkLoss = Callable[[LabelStats, slice], Tensor]
"""Loss of each of some label tokens, `[m]`, from their statistics and from which of the n they are. It must not mix
tokens: the gradient of one log-probability is taken from its own loss."""

# Bytes of fp32 logits that exist at a time. CPU: where the products and sweeps of a chunk run fastest
# (docs/performance.md), and little beside the weight. CUDA (not measured): a chunk has to have some thousand rows for
# the products to be worth more than the pass over the weight's gradient that each chunk makes.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}


class FusedLoss(NamedTuple):
    """Loss and statistics of n label tokens."""

    loss: Tensor
    """Sum of the token losses, fp32 scalar; carries the gradient."""
    stats: LabelStats
    """`[n]`, without a gradient."""


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: ChunkLoss,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    extra_stats: AbstractSet[ExtraStat] = frozenset(),
    top_ids: Tensor | None = None,
) -> FusedLoss:
    """The summed token loss of label tokens, its gradients formed on the way; collective over `group`.

    Where `weight` has a `main_grad`, as Megatron-Core's data-parallel wrapper gives it, the gradient of the weight is
    added to it in this very call. Then the loss must be propagated back once, with gradient 1; anything else raises
    in the backward pass.

    Args:
        hidden: `[n, h]`, last hidden states at the label tokens; n may be 0.
        weight: `[v, h]` of the same dtype; rank r of `group` holds rows `r * v` to `(r + 1) * v` of the matrix.
        labels: `[n]` int64 ids below `vocab_size`.
        token_loss: the objective.
        vocab_size: true vocabulary size; rows from there on are padding: no probability, no gradient.
        group: tensor-parallel group over which the vocabulary is split. The gradient of `hidden` is this rank's part of
            a sum over it.
        extra_stats: further statistics to compute.
        top_ids: `[n, k]` int64, tokens whose log-probabilities, and that of all others together, `token_loss` may use,
            too; of each label token k different ones.
    """
    shard = _Shard.of(weight, vocab_size, group, extra_stats)
    assert torch.is_grad_enabled(), "without gradients there is nothing to fuse: use fused_label_stats"
    loss, *stats = _FusedLoss.apply(hidden, weight, labels, shard, token_loss, top_ids)
    return FusedLoss(loss, LabelStats(*stats))


def fused_label_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    extra_stats: AbstractSet[ExtraStat] = frozenset(),
    top_k: int = 0,
) -> LabelStats:
    """Statistics of label tokens, `[n]`: to score them, or for an objective that weighs a token by others; collective.

    `log_probs` is differentiable: the backward pass computes the logits again, chunk by chunk, at the price of a fourth
    matrix product. Arguments are those of `fused_loss`, and `top_k`: of how many of the most probable tokens to say
    ids and log-probabilities.
    """
    shard = _Shard.of(weight, vocab_size, group, extra_stats)
    return LabelStats(*_FusedLabelStats.apply(hidden, weight, labels, shard, top_k))


class _Chunk(NamedTuple):
    """Some of the label tokens, `[m]`, with their logits."""

    rows: slice
    """Which of the n."""
    values: Tensor
    """`[m, columns]`, what the first pass has made of the logits."""
    label_index: Tensor
    stats: LabelStats
    softmax: ShardSoftmax
    top_index: Tensor | None
    """`[m, k]`, columns on this rank of the tokens that were named, as `label_index` of the label."""
    room: Tensor | None
    """`[m, columns]` of the dtype of the hidden states, where the gradient of the logits may be written: the place of
    the logits if that is theirs. None where none is asked for."""

    @property
    def is_in_place(self) -> bool:
        return self.room is not None and self.room.dtype == self.values.dtype


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """This rank's columns of the vocabulary."""

    weight: Tensor
    """`[columns, h]`, those of the true vocabulary, without the graph."""
    num_columns: int
    """With padding, the same on all ranks."""
    first_column: int
    group: dist.ProcessGroup
    passes: ShardPasses
    extra_stats: AbstractSet[ExtraStat]

    @classmethod
    def of(
        cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup, extra_stats: AbstractSet[ExtraStat]
    ) -> "_Shard":
        num_columns, rank = len(weight), dist.get_rank(group)
        return cls(
            weight=weight.detach()[: shard_width(num_columns, vocab_size, rank)],
            num_columns=num_columns,
            first_column=rank * num_columns,
            group=group,
            passes=shard_passes(weight.device),
            extra_stats=extra_stats,
        )

    def chunks(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        top_ids: Tensor | None = None,
        top_k: int = 0,
        with_extras: bool = True,
        with_gradients: bool = True,
    ) -> Iterator[_Chunk]:
        """Computes logits and softmax of some rows at a time, all in the same memory; collective: every rank of the
        group has the same rows, and cuts them by a number of columns that is the same too."""
        size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * self.num_columns))
        memory = self._memory(min(size, len(labels)), logits_dtype(hidden))
        room = memory if memory.dtype == hidden.dtype else None
        if with_gradients and room is None:
            room = self._memory(len(memory), hidden.dtype)
        for start in range(0, len(labels), size):
            rows = slice(start, min(start + size, len(labels)))
            logits = product(hidden[rows], self.weight.t(), memory[: rows.stop - start])
            label_index = labels[rows] - self.first_column
            top_index = None if top_ids is None else top_ids[rows] - self.first_column
            tokens = self._tokens(logits, top_index, top_k)
            extras = ShardExtras.of(logits, self.extra_stats if with_extras else frozenset(), tokens)
            values, sums = self.passes.sums(logits, label_index)
            stats, softmax = join_shards(sums, self.group, extras)
            yield _Chunk(rows, values, label_index, stats, softmax, top_index, room)

    def _tokens(self, logits: Tensor, top_index: Tensor | None, top_k: int) -> ShardTokens | None:
        if top_index is not None:
            return ShardTokens.named(logits, top_index)
        return ShardTokens.most_probable(logits, top_k, self.first_column) if top_k else None

    def _memory(self, rows: int, dtype: torch.dtype) -> Tensor:
        """`[rows, columns]`, rows as far apart as with padding: matrix units want them aligned, and a true vocabulary
        may be odd."""
        memory = torch.empty(rows, self.num_columns, dtype=dtype, device=self.weight.device)
        return memory[:, : len(self.weight)]


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Where the gradients of a call go."""

    hidden: Tensor
    """`[n, h]`, in the dtype of the hidden states."""
    weight: Tensor | None
    """`[v, h]`, added to: the weight's `main_grad`, or zeros in fp32 where it has none. None where it is frozen."""
    is_main_grad: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "_Gradients":
        if not weight.requires_grad:
            return cls(hidden=torch.empty_like(hidden), weight=None, is_main_grad=False)
        main_grad = getattr(weight, "main_grad", None)
        zeros = torch.zeros(weight.shape, device=weight.device) if main_grad is None else main_grad
        return cls(hidden=torch.empty_like(hidden), weight=zeros, is_main_grad=main_grad is not None)

    def add_chunk(
        self, shard: _Shard, chunk: _Chunk, hidden: Tensor, grad_log_probs: Tensor, of_top: "_OfTop | None" = None
    ) -> None:
        """Forms the gradient of a chunk's logits in their place, and both products with it.

        Args:
            shard: whose columns the logits are of.
            chunk: used up.
            hidden: `[n, h]`, all rows.
            grad_log_probs: `[m]`, of the loss by the log-probabilities of the chunk.
            of_top: of the loss by the others that were named, if any were.
        """
        hidden, grad_hidden = hidden[chunk.rows], self.hidden[chunk.rows]
        if of_top is not None:
            gradient = _logit_gradient_of_all(shard, chunk, grad_log_probs, of_top)
            torch.mm(gradient, shard.weight, out=grad_hidden)
            self._add_to_weight(shard, gradient, hidden)
            return
        # The host has to know their number. A GPU waits for it, once a chunk, and saves two products for each row.
        active = grad_log_probs.nonzero().squeeze(1)
        if len(active) == len(grad_log_probs):
            gradient = self._logit_gradient(shard, chunk, grad_log_probs, None)
            torch.mm(gradient, shard.weight, out=grad_hidden)
        else:
            order = _close_gaps(active) if chunk.is_in_place else active
            gradient = self._logit_gradient(shard, chunk, grad_log_probs, order)
            hidden = hidden[order]
            grad_hidden.zero_()
            grad_hidden[order] = torch.mm(gradient, shard.weight)
        self._add_to_weight(shard, gradient, hidden)

    def _add_to_weight(self, shard: _Shard, gradient: Tensor, hidden: Tensor) -> None:
        if self.weight is not None:
            add_product_(self.weight[: len(shard.weight)], gradient.t(), hidden)

    def _logit_gradient(self, shard: _Shard, chunk: _Chunk, grad_log_probs: Tensor, order: Tensor | None) -> Tensor:
        factors = chunk.softmax.gradient_factors(grad_log_probs, chunk.label_index)
        if order is not None:
            factors = GradientFactors(*(column[order] for column in factors))
        assert chunk.room is not None
        return shard.passes.gradient(chunk.values, order, factors, chunk.room[: len(factors.maximum)])

    def returned(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What a backward function returns for hidden states and weight, all times `scale` (scalar) if given."""
        if not self.is_main_grad:
            factor = 1.0 if scale is None else scale
            of_weight = None if self.weight is None else (self.weight * factor).to(weight.dtype)
            return self.hidden * factor, of_weight
        if scale is not None:
            torch._assert_async(scale == 1, "the fused head's loss must be propagated back with gradient 1")
        return self.hidden, _added_to_main_grad(weight)


class _OfTop(NamedTuple):
    """Derivatives of the loss by a chunk's `top_log_probs` `[m, k]` and `rest_log_probs` `[m]`."""

    top: Tensor
    rest: Tensor


def _logit_gradient_of_all(shard: _Shard, chunk: _Chunk, grad_log_probs: Tensor, of_top: _OfTop) -> Tensor:
    """The gradient of a chunk's logits in their place, where it flows through the label and the named tokens.

    With G the sum of all derivatives, that of a named token is its own derivative - p G, and that of another p (the
    rest's derivative / the rest's probability - G); the label has its own besides. Named tokens' are written over what
    the pass has made of them: added in bf16, what nearly cancels would be lost.
    """
    stats, softmax, top_index = chunk.stats, chunk.softmax, chunk.top_index
    assert top_index is not None
    assert chunk.room is not None
    assert stats.top_log_probs is not None
    assert stats.rest_log_probs is not None
    others = of_top.top.sum(dim=1) + of_top.rest
    of_rest = of_top.rest / stats.rest_log_probs.exp() - others
    factors = GradientFactors(
        softmax.maximum,
        (of_rest - grad_log_probs) * softmax.share,
        grad_log_probs * softmax.other_probs + of_rest * stats.log_probs.exp(),
        chunk.label_index,
    )
    gradient = shard.passes.gradient(chunk.values, None, factors, chunk.room[: len(others)])
    probs = stats.top_log_probs.exp()
    is_label = top_index == chunk.label_index.unsqueeze(1)
    by_label = torch.where(is_label, softmax.other_probs.unsqueeze(1), -probs) * grad_log_probs.unsqueeze(1)
    of_named = of_top.top - probs * others.unsqueeze(1) + by_label
    rows, places = ((top_index >= 0) & (top_index < gradient.shape[1])).nonzero(as_tuple=True)
    gradient[rows, top_index[rows, places]] = of_named[rows, places].to(gradient.dtype)
    return gradient


def _close_gaps(active: Tensor) -> Tensor:
    """Which row comes to each of the first places, so that the active ones, ascending `[a]` int64, stand there without
    a gap, and none of them moves that has such a place already; `[a]` int64."""
    order = torch.arange(len(active), device=active.device)
    movers = active[active >= len(active)]
    is_free = torch.ones_like(order, dtype=torch.bool)
    is_free[active[: len(active) - len(movers)]] = False
    order[is_free] = movers
    return order


def _added_to_main_grad(weight: Tensor) -> Tensor | None:
    """Megatron-Core's protocol for a gradient that is in `main_grad` already: a flag, and a tensor that fires the
    parameter's hook and is not read."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Tied to the embedding of the same stage: its gradient fires the hook, and is added.
    return None if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _differentiate(token_loss: ChunkLoss, chunk: _Chunk) -> tuple[Tensor, Tensor, _OfTop | None]:
    """Summed loss of the chunk, and its gradient by the chunk's log-probabilities."""
    stats = chunk.stats
    leaves = [stats.log_probs]
    if stats.top_log_probs is not None and stats.rest_log_probs is not None:
        leaves += [stats.top_log_probs, stats.rest_log_probs]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        loss = token_loss(stats, chunk.rows).sum()
    gradient, *of_top = torch.autograd.grad(loss, leaves, materialize_grads=len(leaves) > 1)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return loss.detach(), gradient, _OfTop(*of_top) if of_top else None


def _join(stats: list[LabelStats], like: Tensor, extra_stats: AbstractSet[ExtraStat], top_k: int = 0) -> LabelStats:
    def column(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([like.new_zeros(0, *shape, dtype=dtype), *(getattr(chunk, name) for chunk in stats)])

    joined = LabelStats(column("log_probs"), column("entropy"), **{name: column(name) for name in sorted(extra_stats)})
    if not top_k:
        return joined
    return joined._replace(
        top_ids=column("top_ids", top_k, dtype=torch.int64),
        top_log_probs=column("top_log_probs", top_k),
        rest_log_probs=column("rest_log_probs"),
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: _Shard,
        token_loss: ChunkLoss,
        top_ids: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.of(hidden, weight)
        loss, stats = hidden.new_zeros((), dtype=torch.float32), []
        for chunk in shard.chunks(hidden, labels, top_ids=top_ids):
            chunk_loss, grad_log_probs, of_top = _differentiate(token_loss, chunk)
            gradients.add_chunk(shard, chunk, hidden, grad_log_probs, of_top)
            loss += chunk_loss
            stats.append(chunk.stats)
        ctx.gradients, ctx.weight = gradients, weight
        every = _join(stats, hidden, shard.extra_stats)
        ctx.mark_non_differentiable(every.log_probs, *every.non_differentiable)
        return loss, *every

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.returned(ctx.weight, grad_loss), None, None, None, None


class _FusedLabelStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard, top_k: int) -> LabelStats:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.shard = shard
        chunks = shard.chunks(hidden, labels, top_k=top_k, with_gradients=False)
        stats = _join([chunk.stats for chunk in chunks], hidden, shard.extra_stats, top_k)
        ctx.mark_non_differentiable(*stats.non_differentiable)
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        gradients = _Gradients.of(hidden, weight)
        for chunk in ctx.shard.chunks(hidden, labels, with_extras=False):
            gradients.add_chunk(ctx.shard, chunk, hidden, grad_log_probs[chunk.rows])
        return *gradients.returned(weight), None, None, None
