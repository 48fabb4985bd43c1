"""Memory and operations of a run, told from its configuration alone; `psft plan` prints them.

Memory is counted tensor by tensor, as the layers, Megatron-Core's schedules and the head keep them. Not counted is what
the tensors do not show: the CUDA context, NCCL's buffers, libraries' workspaces and the allocator's fragments. The
portable layers' figures are checked against measured peaks on a CPU (benchmarks/plan.py), those of Transformer Engine's
layers are counted from what these save and were not measured. Experts are taken to be equally busy.

Letters: t tensor-parallel ranks; T positions of a micro-batch on a rank, that is after the split over context-parallel
ranks; S of them in the parts that sequence parallelism also splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from megatron_psft.checkpoint.host_memory import saved_bytes
from megatron_psft.config.rules import validate
from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.head.chunked import CHUNK_BYTES
from megatron_psft.head.products import SUMMED_COLUMNS
from megatron_psft.metrics.flops import forward_flops, passes_of_training
from megatron_psft.model.adapters import targeted
from megatron_psft.model.gpt import check_layout, padded_vocab_size, virtual_size
from megatron_psft.model.parameters import is_cut
from megatron_psft.model.shape import ModelShape

GIB = 2**30
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a rank of one pipeline stage at the moment that it holds most."""

    stage: int
    """From 0."""
    moment: str
    weights: float
    gradients: float
    """The fp32 buffer that all micro-batches add to."""
    optimizer: float
    """Adam's two averages and, with bf16, the fp32 weights."""
    activations: float
    """Kept for the backward passes that are still to come."""
    working: float
    """What the moment itself needs."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run on `world_size` ranks takes. Raises UserError, when built, for what training would refuse.

    Sequences are taken to be full: `seq_length` tokens, every one a label, in records as long. Shorter records make for
    less attention, fewer labels for a smaller head.
    """

    config: Config
    shape: ModelShape
    world_size: int
    platform: Platform
    """What the ranks compute on; only its facts are read, and no such device need be here."""

    def __post_init__(self) -> None:
        validate(self.config, self.world_size)
        check_layout(self.shape, self.config)

    # Sizes of the run

    @property
    def _tensor(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def stages(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def data_size(self) -> int:
        return self.config.parallel.data_parallel_size(self.world_size)

    @property
    def num_microbatches(self) -> int:
        """Of a data-parallel rank, per step; with records that are packed step by step, of the longest ones."""
        batch = self.config.batch
        if not self.config.packs_each_step:
            return batch.global_batch_size // (batch.micro_batch_size * self.data_size)
        needed = -(-batch.global_batch_size // self.data_size) / batch.micro_batch_size
        multiple = self.stages if virtual_size(self.shape, self.config) else 1
        return ceil(needed / multiple) * multiple

    @property
    def tokens_per_sequence(self) -> int:
        return self.config.data.seq_length * (2 if self.config.objective.needs_pairs else 1)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or activation."""
        return 2 if self.config.precision.bf16 else FP32

    def tokens(self, micro_batch_size: int) -> float:
        """T."""
        return micro_batch_size * self.tokens_per_sequence / self.config.parallel.context_parallel_size

    @property
    def _sequence_split(self) -> int:
        """T / S."""
        return self._tensor if self.config.parallel.sequence_parallel else 1

    @property
    def _vocab_columns(self) -> int:
        """Of the vocabulary on this rank, with padding."""
        return padded_vocab_size(self.shape.vocab_size, self._tensor) // self._tensor

    # Weights

    @cached_property
    def _chunk_layers(self) -> int:
        """Layers of a model chunk, of which each stage has one without interleaving."""
        return self.shape.num_layers // self.stages // (virtual_size(self.shape, self.config) or 1)

    def layers(self, stage: int) -> list[int]:
        """Layers of a stage, from 0; interleaved chunks are dealt out to the stages in turn."""
        return [layer for layer in range(self.shape.num_layers) if layer // self._chunk_layers % self.stages == stage]

    def _layer_parameters(self, layer: int) -> list[int]:
        """Sizes of a layer's parameters on a rank, without its experts'."""
        parameters = self.shape.layer_parameters(layer)
        return [prod(dims) // (self._tensor if is_cut(name) else 1) for name, dims in parameters.items()]

    def expert_parameters(self, stage: int) -> list[int]:
        """Sizes of the experts' parameters on a rank of `stage`."""
        experts, parallel = self.shape.experts, self.config.parallel
        if experts is None:
            return []
        sizes = [prod(dims) // parallel.expert_tensor_size for dims in self.shape.expert_parameters.values()]
        layers = sum(map(self.shape.has_experts, self.layers(stage)))
        return sizes * (layers * experts.count // parallel.expert_model_parallel_size)

    def shared_parameters(self, stage: int) -> list[int]:
        """Sizes of all other parameters on a rank of `stage`."""
        sizes = [size for layer in self.layers(stage) for size in self._layer_parameters(layer)]
        vocabulary, is_last = self._vocab_columns * self.shape.hidden_size, stage == self.stages - 1
        sizes += [vocabulary] if stage == 0 else []
        # Tied to the embedding of another stage, the output layer has a copy.
        sizes += [vocabulary] if is_last and (self.stages > 1 or not self.shape.tied_embeddings) else []
        return sizes + ([self.shape.hidden_size] if is_last else [])

    def _adapter_parameters(self, stage: int) -> list[int]:
        """Sizes of the adapters' matrices on a rank of `stage`."""
        rank, sizes = self.config.lora.lora_rank, []
        for it in targeted(self.config.lora, self.shape):
            whole, cut = (it.out_features, it.in_features) if it.is_row_parallel else (it.in_features, it.out_features)
            sizes += [rank * whole, rank * cut // self._tensor]
        return sizes * len(self.layers(stage))

    def num_parameters(self, stage: int) -> int:
        """On a rank of `stage`."""
        of_model = sum(self.shared_parameters(stage)) + sum(self.expert_parameters(stage))
        return of_model + sum(self._adapter_parameters(stage))

    def trained(self, stage: int) -> tuple[list[int], list[int]]:
        """Sizes of the parameters on a rank of `stage` that have gradients: experts' in the second list."""
        if self.config.lora.has_adapters:
            return self._adapter_parameters(stage), []
        return self.shared_parameters(stage), self.expert_parameters(stage)

    def optimized(self, stage: int) -> list[float]:
        """Sizes of the parameters whose update a rank of `stage` computes."""
        if self.config.parallel.use_distributed_optimizer:
            return self._shares(stage)
        shared, experts = self.trained(stage)
        return [*shared, *experts]

    def _shares(self, stage: int) -> list[float]:
        """Sizes of the trained parameters on a rank of `stage`, each divided by the ranks that have the same."""
        parallel, ranks = self.config.parallel, self.world_size // self.stages
        expert_replicas = ranks // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
        shared, experts = self.trained(stage)
        return [size * self._tensor / ranks for size in shared] + [size / expert_replicas for size in experts]

    @property
    def saved_bytes(self) -> float:
        """What a rank writes of a checkpoint, and so what it copies to host memory: its share of the weights and of the
        optimizer's state, about even over the ranks of a stage; of the stage with most."""
        is_distributed = self.config.parallel.use_distributed_optimizer
        shares = map(self._shares, range(self.stages))
        return max(saved_bytes(each, itemsize=self.itemsize, is_distributed=is_distributed) for each in shares)

    # Activations

    @property
    def _widths(self) -> tuple[float, float]:
        """Of queries and keys (or values), elements per position on a rank."""
        shape, t = self.shape, self._tensor
        return shape.num_attention_heads * shape.head_dim / t, shape.num_query_groups * shape.head_dim / t

    @property
    def _upcast(self) -> int:
        """What a norm in plain PyTorch keeps besides, in numbers of bf16: on a CPU in fp32 its input, and its values
        before they are multiplied by the weight, which are counted as bf16 elsewhere."""
        return 3 if self.config.precision.bf16 and self.platform.device.type == "cpu" else 0

    def _mlp(self, layer: int, micro_batch_size: int) -> tuple[float, float]:
        """Bytes of a layer's rows as its experts get them, 0 for a plain MLP; and of the inner part of the MLP."""
        positions, experts = self.tokens(micro_batch_size), self.shape.experts
        if experts is None or not self.shape.has_experts(layer):
            return 0.0, positions * self.shape.ffn_hidden_size / self._tensor * self.itemsize
        # A position goes to some experts, and there to every rank that has a part of them.
        rows = positions / self._sequence_split * experts.per_token * self.itemsize
        return rows * self.config.parallel.expert_tensor_size * self.shape.hidden_size, rows * experts.ffn_hidden_size

    def hidden(self, micro_batch_size: int) -> float:
        """Bytes of the hidden states between two layers."""
        return self.tokens(micro_batch_size) / self._sequence_split * self.shape.hidden_size * self.itemsize

    def _layer_activations(self, layer: int) -> float:
        """Bytes that a layer keeps of a micro-batch for its backward pass."""
        shape, parallel, platform = self.shape, self.config.parallel, self.platform
        (queries, keys), size = self._widths, self.config.batch.micro_batch_size
        # What goes into both norms and what comes out of them; plain PyTorch also keeps the values before they are
        # multiplied by the weight.
        norms = (4 if platform.has_transformer_engine else 6 + 2 * self._upcast) * self.hidden(size)
        # The projected row, of which the values are a view; queries and keys with rotary embedding; the output.
        per_token = (queries + 2 * keys) + (queries + keys) + queries
        # Up projection (two halves) and what goes into the down projection; unfused, also both factors of the gate.
        rows, inner = self._mlp(layer, size)
        mlp = rows + inner * (3 if platform.is_gpu else 5)
        if shape.qk_norm:
            per_token += queries  # a copy, as they lie between keys and values
        if not platform.has_transformer_engine:
            # The output of each segment beside the joined one; cosine and sine, for queries and for keys.
            per_token += queries + 4 * shape.head_dim
            per_token += (1 + self._upcast) * (queries + keys) if shape.qk_norm else 0
            if parallel.context_parallel_size > 1:
                per_token += 2 * keys * parallel.context_parallel_size  # the gathered row
            if self.config.recompute.recompute_granularity == "selective":
                per_token -= queries
        # What each adapter's A has made.
        per_token += self.config.lora.lora_rank * len(targeted(self.config.lora, shape))
        return norms + mlp + self.tokens(size) * per_token * self.itemsize

    def _chunks_in_flight(self, stage: int) -> int:
        """Forward passes of model chunks (one per stage without interleaving) whose backward pass is still to come."""
        behind, chunks = self.stages - stage - 1, virtual_size(self.shape, self.config) or 1
        ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * self.stages
        return min(ahead + 1, self.num_microbatches * chunks)

    def _activations(self, stage: int) -> tuple[float, float]:
        """Bytes kept for the backward passes to come, and what a recomputed layer or group of them needs meanwhile."""
        recompute, hidden = self.config.recompute, self.hidden(self.config.batch.micro_batch_size)
        sizes = [self._layer_activations(layer) for layer in self.layers(stage)]
        layers, average, recomputed = self._chunk_layers, sum(sizes) / len(sizes), 0.0
        kept = layers * average
        if recompute.recompute_granularity == "full":
            assert recompute.recompute_num_layers is not None
            size = min(recompute.recompute_num_layers, layers)
            if recompute.recompute_method == "uniform":
                kept, recomputed = -(-layers // size) * hidden, size * max(sizes)
            else:
                kept, recomputed = size * hidden + (layers - size) * average, max(sizes)
        # What a stage has sent on stays until the gradient comes back.
        kept += hidden if self.stages > 1 else 0
        kept *= self._chunks_in_flight(stage)
        if stage == self.stages - 1:
            kept += hidden * (1 if self.platform.has_transformer_engine else 2 + self._upcast)  # the last norm
        return kept, recomputed

    # Moments

    @property
    def _optimizer_bytes(self) -> float:
        """Per parameter; what is offloaded is not on the rank's device."""
        optimizer = self.config.optimizer
        offloaded = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
        return FP32 * (3 if self.config.precision.bf16 else 2) * (1 - offloaded)

    def memory(self, stage: int) -> Memory:
        """On a rank of `stage`."""
        count = self.num_parameters(stage)
        moment, activations, working = max(self._moments(stage), key=lambda found: found[1] + found[2])
        return Memory(
            stage=stage,
            moment=moment,
            weights=count * self.itemsize,
            gradients=sum(map(sum, self.trained(stage))) * FP32,
            optimizer=sum(self.optimized(stage)) * self._optimizer_bytes,
            activations=activations,
            working=working,
        )

    @cached_property
    def peak(self) -> Memory:
        """Of the stage that takes most."""
        return max(map(self.memory, range(self.stages)), key=lambda memory: memory.total)

    def _moments(self, stage: int) -> Iterator[tuple[str, float, float]]:
        """Name, activations and working memory of each moment that may be the fullest."""
        kept, recomputed = self._activations(stage)
        batch, objective = self.config.batch, self.config.objective
        yield "backward pass of a layer", kept, recomputed + self._backward_working(stage)
        if stage == self.stages - 1:
            yield "head", kept, self._head_working(batch.micro_batch_size, with_gradient=True)
        if stage == 0 and not self.config.lora.has_adapters:
            vocabulary = self._vocab_columns * self.shape.hidden_size * self.itemsize
            yield "gradient of the embedding", 0.0, vocabulary + self.hidden(batch.micro_batch_size)
        yield "update", 0.0, self._update_working(stage)
        if objective.needs_old_policy and objective.old_policy_interval != 1:
            size = objective.old_policy_micro_batch_size or batch.micro_batch_size
            forward = self._layer_working(stage, size)
            if stage == self.stages - 1:
                forward = max(forward, self._head_working(size, with_gradient=False))
            yield "old policy's pass", 0.0, forward

    def _layer_working(self, stage: int, micro_batch_size: int) -> float:
        """Inside a layer, at the widest: hidden states, the MLP's inner part, and what it is made of or turns into."""
        mlps = (self._mlp(layer, micro_batch_size) for layer in self.layers(stage))
        return 2 * self.hidden(micro_batch_size) + max(2 * rows + 3 * inner for rows, inner in mlps)

    def _backward_working(self, stage: int) -> float:
        """Gradients of activations, and of the weight that is being worked on where no kernel adds it to the buffer."""
        largest = 0
        if not self.platform.has_transformer_engine:
            sizes = [size for layer in self.layers(stage) for size in self._layer_parameters(layer)]
            if self.config.lora.has_adapters:
                sizes = self._adapter_parameters(stage)
            largest = max(sizes + self.trained(stage)[1])
        return self._layer_working(stage, self.config.batch.micro_batch_size) + largest * self.itemsize

    def _head_working(self, micro_batch_size: int, *, with_gradient: bool) -> float:
        """The last hidden states, the label tokens' rows of them and their gradient, and logits."""
        tokens = self.tokens(micro_batch_size)
        rows = tokens * self.shape.hidden_size * self.itemsize
        gathered = rows if self._sequence_split > 1 else 0.0
        states = self.hidden(micro_batch_size) + gathered + rows * (2 if with_gradient else 1)
        if self.config.objective.fused_head:
            is_bf16, on_gpu = bool(self.config.precision.bf16), self.platform.is_gpu
            if with_gradient and is_bf16 and not (on_gpu or self.config.lora.has_adapters):
                # Products of the weight's gradient before they are added in fp32.
                states += min(SUMMED_COLUMNS, self._vocab_columns) * self.shape.hidden_size * self.itemsize
            # A GPU makes fp32 logits of bf16 states, a CPU copies bf16 logits to fp32; their gradient is bf16 again.
            logit = FP32 + self.itemsize * (is_bf16 and not on_gpu) + self.itemsize * (is_bf16 and with_gradient)
            chunk = CHUNK_BYTES[self.platform.device.type] // (FP32 * self._vocab_columns)
            return states + min(chunk, tokens) * self._vocab_columns * logit
        return states + tokens * self._vocab_columns * (FP32 + self.itemsize)

    def _update_working(self, stage: int) -> float:
        """What Adam needs beside its state."""
        if self.platform.has_transformer_engine:
            return 0.0
        largest, own = max(max(sizes, default=0) for sizes in self.trained(stage)), sum(self.optimized(stage))
        # torch's own makes a denominator of each parameter, on GPUs of all at once.
        return FP32 * (own if self.platform.is_gpu else 2 * min(largest, own))

    # Operations

    @property
    def flops_per_step(self) -> float:
        """Of forward and backward passes over a global batch; neither recomputation nor the old policy's pass."""
        sequences = self.config.batch.global_batch_size * (2 if self.config.objective.needs_pairs else 1)
        return self.passes * forward_flops(self.shape, [self.config.data.seq_length] * sequences)

    @property
    def passes(self) -> int:
        """Forward passes' worth of operations that training takes."""
        return passes_of_training(has_adapters=self.config.lora.has_adapters)

    @property
    def scored_steps(self) -> int | None:
        """Steps that the old policy scores at once, ahead of training on them; None where only the data says it."""
        objective, train_iters = self.config.objective, self.config.batch.train_iters
        if not objective.needs_old_policy:
            return 0
        if objective.old_policy_interval == "fixed":
            return None if train_iters is None else train_iters - objective.sft_warmup_iters - 1
        return objective.old_policy_interval - 1

    @property
    def overhead_bound(self) -> float:
        """Operations of PSFT over those of SFT: a window of k steps scores k - 1 of them, a third of a step each, or
        half of one with adapters."""
        scored = self.scored_steps
        return 1 + 1 / self.passes if scored is None else 1 + scored / (self.passes * (scored + 1))

    @property
    def old_log_prob_bytes(self) -> float:
        """Host memory of a rank of the last stage per step that is scored ahead."""
        return self.num_microbatches * self.tokens(self.config.batch.micro_batch_size) * FP32
