"""AdamW by its formula, the norm by which gradients are clipped, the updates that are refused, and the schedule."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_psft.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    WeightsConfig,
)
from megatron_psft.errors import DivergenceError
from megatron_psft.model.shape import ModelShape

SHAPE = ModelShape(
    model_type="qwen2",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=4,
    vocab_size=50,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=True,
    qk_norm=False,
    tied_embeddings=False,
    initializer_range=0.5,
    dtype="float32",
)
REPLICATED = "norm"
"""In the names of the parameters that all tensor-parallel ranks hold whole; the others are cut."""


def make_config(optimizer: OptimizerConfig | None = None, **sections) -> Config:
    return Config(
        weights=WeightsConfig(load_hf="unread", save="unwritten"),
        data=DataConfig(data=("unread",), seq_length=8),
        batch=BatchConfig(train_iters=10),
        optimizer=optimizer or OptimizerConfig(lr=0.01, lr_decay_style="constant"),
        **sections,
    )


@contextmanager
def built(config: Config, world_size: int, shape: ModelShape = SHAPE):
    """Place, named parameters, optimizer and scheduler of this rank of a pool, for the length of a block."""
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group
    from megatron_psft.hf.weights import RandomWeights, fill_parameters
    from megatron_psft.model.gpt import build_model
    from megatron_psft.model.parameters import named_parameters
    from megatron_psft.train.optimizer import build_optimizer, build_scheduler

    here = detect(0)
    with process_group(here, world_size):
        place = initialize_parallel(config.parallel, virtual_size=None, seed=1, device=here.device)
        chunks = build_model(shape, config, here, place)
        fill_parameters(chunks, RandomWeights(shape, 1), shape, place)
        optimizer = build_optimizer(config, chunks)
        yield SimpleNamespace(
            place=place,
            parameters=dict(named_parameters(chunks)),
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer, 10),
        )


def gradient(name: str, shape: tuple[int, ...], tensor_rank: int, step: int) -> Tensor:
    """What the backward pass shall have left on a rank."""
    rank = 0 if REPLICATED in name else tensor_rank
    generator = torch.Generator().manual_seed(1000 * step + 10 * sum(name.encode()) + rank)
    return torch.randn(shape, generator=generator)


def set_gradients(run: SimpleNamespace, step: int, scale: float = 1.0) -> None:
    for name, parameter in run.parameters.items():
        parameter.main_grad.copy_(scale * gradient(name, tuple(parameter.shape), run.place.tensor_rank, step))


def _train(config: Config, world_size: int, scales: list[float], shape: ModelShape = SHAPE):
    """Updates with gradients of these sizes; returns parameters before and after, norms and learning rates."""
    from megatron_psft.train.optimizer import update

    with built(config, world_size, shape) as run:
        before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        norms, rates = [], []
        for step, scale in enumerate(scales):
            set_gradients(run, step, scale)
            rates.append(run.optimizer.param_groups[0]["lr"])
            norms.append(update(run.optimizer, step + 1, torch.device("cpu")))
            run.scheduler.step(increment=1)
        after = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        return before, after, norms, rates


def norm_of(before: dict[str, Tensor], step: int, scale: float) -> float:
    gradients = [gradient(name, tuple(tensor.shape), 0, step).double() for name, tensor in before.items()]
    return scale * math.sqrt(sum(float((each * each).sum()) for each in gradients))


def adamw(before: dict[str, Tensor], scales: list[float], rates: list[float], options: OptimizerConfig):
    """Loshchilov and Hutter's algorithm in double precision, on gradients scaled down to `clip_grad`."""
    beta1, beta2 = options.adam_beta1, options.adam_beta2
    after = {}
    for name, tensor in before.items():
        weight, mean, square = tensor.double(), torch.zeros(()).double(), torch.zeros(()).double()
        decay = options.weight_decay if tensor.dim() > 1 else 0.0
        for step, (scale, lr) in enumerate(zip(scales, rates, strict=True)):
            norm = norm_of(before, step, scale)
            clip = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
            grad = clip * scale * gradient(name, tuple(tensor.shape), 0, step).double()
            mean = beta1 * mean + (1 - beta1) * grad
            square = beta2 * square + (1 - beta2) * grad * grad
            mean_hat, square_hat = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
            weight = weight - lr * decay * weight - lr * mean_hat / (square_hat.sqrt() + options.adam_eps)
        after[name] = weight
    return after


BF16 = PrecisionConfig(bf16=True)
DISTRIBUTED = ParallelConfig(use_distributed_optimizer=True)
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}


@pytest.mark.parametrize(
    ("world_size", "parallel", "clip_grad"),
    [(1, ParallelConfig(), 3.0), (2, ParallelConfig(), 3.0), (2, DISTRIBUTED, 3.0), (1, ParallelConfig(), 0.0)],
    ids=["DP1", "DP2", "DP2 distributed", "not clipped"],
)
def test_updates_are_adamw_on_clipped_gradients_without_decay_of_1d_parameters(pool, world_size, parallel, clip_grad):
    options = OptimizerConfig(
        lr=0.02,
        lr_decay_style="linear",
        lr_warmup_iters=2,
        weight_decay=0.3,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_eps=0.01,
        clip_grad=clip_grad,
    )
    scales = [1.0, 0.003, 1.0, 0.02]  # norms far above the bound, and below it
    results = pool.run(_train, world_size, make_config(options, parallel=parallel), world_size, scales)
    for before, after, norms, rates in results:
        assert norms == pytest.approx([norm_of(before, step, scale) for step, scale in enumerate(scales)], rel=1e-5)
        assert min(norms) < 3.0 < max(norms)
        assert rates == pytest.approx([0.0, 0.01, 0.02, 0.02 * 7 / 8])
        expected = adamw(before, scales, rates, options)
        for name, weight in after.items():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("world_size", "parallel", "offloading"),
    [(1, ParallelConfig(), {}), (2, DISTRIBUTED, HALF), (1, DISTRIBUTED, {"optimizer_cpu_offload": True})],
    ids=["plain", "half offloaded", "offloaded"],
)
def test_updates_too_small_for_bf16_add_up(pool, world_size, parallel, offloading):
    options = OptimizerConfig(lr=2e-4, lr_decay_style="constant", weight_decay=0.0, **offloading)
    config = make_config(options, precision=BF16, parallel=parallel)
    scales = [1.0] * 12
    before, after, _, rates = pool.run(_train, world_size, config, world_size, scales)[0]
    expected = adamw(before, scales, rates, options)
    equal, moved = [], []
    for name, weight in after.items():
        rounded = expected[name].to(torch.bfloat16)
        equal.append((weight == rounded).flatten())  # and of dtype bfloat16, or hardly any would be
        moved.append((before[name] != rounded).flatten())
    assert torch.cat(moved).double().mean() > 0.5
    assert torch.cat(equal).double().mean() > 0.999  # a few lie at a rounding boundary


def _decay_only(config: Config):
    from megatron_psft.train.optimizer import update

    with built(config, 1) as run:
        before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        norm = update(run.optimizer, 1, torch.device("cpu"))
        return norm, before, {name: parameter.detach() for name, parameter in run.parameters.items()}


def test_without_gradients_only_matrices_decay(pool):
    config = make_config(OptimizerConfig(lr=0.1, lr_decay_style="constant", weight_decay=0.5))
    ((norm, before, after),) = pool.run(_decay_only, 1, config)
    assert norm == 0.0
    for name, weight in before.items():
        expected = weight if weight.dim() == 1 else weight * (1 - 0.1 * 0.5)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0.0, msg=name)
    assert sum(weight.dim() == 1 for weight in before.values()) == 2 * 3 + 1  # qkv bias and two norms per layer


@pytest.mark.parametrize("optimizer_is_distributed", [False, True])
def test_the_norm_counts_shards_all_and_replicas_once(pool, optimizer_is_distributed):
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=optimizer_is_distributed,
    )
    results = pool.run(_train, 4, make_config(parallel=parallel), 4, [1.0, 0.5])
    shapes = {name: tuple(tensor.shape) for name, tensor in results[0][0].items()}
    for step, scale in enumerate([1.0, 0.5]):
        squares = 0.0
        for name, shape in shapes.items():
            for tensor_rank in range(1 if REPLICATED in name else 2):
                squares += float(gradient(name, shape, tensor_rank, step).double().square().sum())
        for _, _, norms, _ in results:
            assert norms[step] == pytest.approx(scale * math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("optimizer_is_distributed", [False, True])
def test_the_norm_counts_a_matrix_that_two_stages_share_once(pool, optimizer_is_distributed):
    parallel = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=optimizer_is_distributed)
    shape = replace(SHAPE, tied_embeddings=True)
    results = pool.run(_train, 2, make_config(parallel=parallel), 2, [1.0], shape)
    shapes = {name: tuple(tensor.shape) for before, *_ in results for name, tensor in before.items()}
    shapes.pop("output_layer.weight", None)  # the embedding's copy on the last stage
    squares = sum(float(gradient(name, shape, 0, 0).double().square().sum()) for name, shape in shapes.items())
    assert [norms for _, _, norms, _ in results] == [[pytest.approx(math.sqrt(squares), rel=1e-5)]] * 2


def _sizes_on_host(config: Config) -> tuple[int, int]:
    """Elements whose averages and fp32 weights a rank's host has, and of all that the rank updates."""
    with built(config, 2) as run:
        (chained,) = run.optimizer.chained_optimizers
        own = sum(parameter.numel() for group in chained.optimizer.param_groups for parameter in group["params"])
        offloaded = [group for adam in chained.optimizer.cpu_optimizers for group in adam.param_groups]
        return sum(parameter.numel() for group in offloaded for parameter in group["params"]), own


def test_the_share_that_was_asked_for_is_offloaded(pool):
    options = OptimizerConfig(lr=0.01, **HALF)
    for on_host, own in pool.run(_sizes_on_host, 2, make_config(options, parallel=DISTRIBUTED, precision=BF16)):
        assert own / 2 <= on_host < own  # whole parameters, until the half is reached


def _update_with_bad_gradient(config: Config, world_size: int, bad_rank: int, name: str, value: float):
    """The message that stopped this rank, and whether all it holds is as before."""
    from megatron_psft.train.optimizer import update

    with built(config, world_size) as run:
        set_gradients(run, 0)
        update(run.optimizer, 1, torch.device("cpu"))
        held = [*run.parameters.values(), *(each for state in _states(run.optimizer) for each in state.values())]
        before = [tensor.detach().clone() for tensor in held]
        set_gradients(run, 1)
        if run.place.rank == bad_rank:
            run.parameters[name].main_grad.fill_(value)
        message = None
        try:
            update(run.optimizer, 2, torch.device("cpu"))
        except DivergenceError as error:
            message = str(error)
        return message, all(map(torch.equal, before, held))


def _states(optimizer):
    return [state for chained in optimizer.chained_optimizers for state in chained.optimizer.state.values()]


FC1, EMBEDDING = "decoder.layers.1.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("parallel", "bf16", "offloading", "name"),
    [
        (ParallelConfig(), False, {}, FC1),
        (DISTRIBUTED, False, {}, EMBEDDING),  # the second rank updates the second half of what backward reaches last
        (DISTRIBUTED, True, {}, EMBEDDING),
        (DISTRIBUTED, True, HALF, EMBEDDING),
        (ParallelConfig(tensor_model_parallel_size=2), False, {}, FC1),
        (ParallelConfig(pipeline_model_parallel_size=2), True, {}, FC1),
    ],
    ids=["DP2", "DP2 distributed", "DP2 distributed bf16", "DP2 half offloaded", "TP2", "PP2 bf16"],
)
def test_update_with_a_non_finite_gradient_on_one_rank_stops_all_and_changes_nothing(
    pool, parallel, bf16, offloading, name, value
):
    options = OptimizerConfig(lr=0.01, lr_decay_style="constant", **offloading)
    config = make_config(options, parallel=parallel, precision=PrecisionConfig(bf16=bf16))
    results = pool.run(_update_with_bad_gradient, 2, config, 2, 1, name, value)
    message = results[0][0]
    assert message is not None
    assert message.startswith("step 2: the gradient norm is not finite")
    assert "rank 1" in message
    assert results == [(message, True)] * 2


def test_a_norm_that_overflows_is_refused_too(pool):
    (result,) = pool.run(_update_with_bad_gradient, 1, make_config(), 1, 0, "decoder.final_layernorm.weight", 3e38)
    message, is_unchanged = result
    assert message is not None
    assert message.startswith("step 2: the gradient norm is not finite")
    assert is_unchanged


def rates(train_iters: int, **options) -> list[float]:
    """Learning rate of each step of a run, by `build_scheduler`."""
    from megatron_psft.train.optimizer import build_scheduler

    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])
    config = make_config(OptimizerConfig(weight_decay=0.2, **options))
    scheduler = build_scheduler(config, optimizer, train_iters)
    found = []
    for _ in range(train_iters):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
        found.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == found[-1]
        scheduler.step(increment=1)
    return found


def test_constant_after_warm_up():
    assert rates(6, lr=0.6, lr_decay_style="constant", lr_warmup_iters=3) == pytest.approx([0, 0.2, 0.4, 0.6, 0.6, 0.6])
    assert rates(3, lr=0.6, lr_decay_style="constant") == pytest.approx([0.6, 0.6, 0.6])


def test_linear_decay_to_the_end_of_the_run():
    assert rates(4, lr=0.8, lr_decay_style="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    found = rates(6, lr=0.9, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=2)
    assert found == pytest.approx([0, 0.45, 0.9, 0.7, 0.5, 0.3])


def test_cosine_decay_to_the_end_of_the_run():
    found = rates(8, lr=1.1, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=2)
    root = math.sqrt(3) / 2
    expected = [0, 0.55, 1.1, *(0.1 + 0.5 * (1 + cosine) for cosine in (root, 0.5, 0, -0.5, -root))]
    assert found == pytest.approx(expected)


def test_wsd_is_warm_up_stable_decay():
    found = rates(10, lr=1.1, min_lr=0.1, lr_decay_style="WSD", lr_warmup_iters=2, lr_wsd_decay_iters=4)
    halves = [2 * 0.5 ** (step / 4) - 1 for step in (1, 2, 3)]
    assert found == pytest.approx([0, 0.55, 1.1, 1.1, 1.1, 1.1, 1.1, *(0.1 + part for part in halves)])


def test_the_decay_may_end_before_the_run_or_after_it():
    """By Megatron-LM's formula: warm-up to `lr`, decay to `min_lr` at the decay's last step, then `min_lr`."""
    found = rates(6, lr=0.9, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=1, lr_decay_iters=3)
    assert found == pytest.approx([0, 0.9, 0.5, 0.1, 0.1, 0.1])
    found = rates(3, lr=1.1, min_lr=0.1, lr_decay_style="cosine", lr_decay_iters=6)
    assert found == pytest.approx([1.1, *(0.1 + 0.5 * (1 + cosine) for cosine in (math.sqrt(3) / 2, 0.5))])
    found = rates(5, lr=1.1, min_lr=0.1, lr_decay_style="WSD", lr_decay_iters=4, lr_wsd_decay_iters=2)
    assert found == pytest.approx([1.1, 1.1, 1.1, 0.1 + 2 * 0.5**0.5 - 1, 0.1])


def test_warm_up_as_a_share_of_the_decay():
    found = rates(8, lr=0.6, lr_decay_style="linear", lr_warmup_fraction=0.25)
    assert found == rates(8, lr=0.6, lr_decay_style="linear", lr_warmup_iters=2)
    found = rates(3, lr=0.6, lr_decay_style="constant", lr_warmup_fraction=0.25, lr_decay_iters=8)
    assert found == pytest.approx([0, 0.3, 0.6])
    # 2.5 steps: Megatron-LM does not round, so the highest rate lies between two steps.
    found = rates(5, lr=1.0, lr_decay_style="linear", lr_warmup_fraction=0.5)
    assert found == pytest.approx([0, 0.4, 0.8, 0.8, 0.4])


def test_a_resumed_schedule_follows_its_own_flags_from_the_step_that_was_reached():
    from megatron_psft.train.optimizer import build_scheduler

    def build(lr: float, train_iters: int):
        optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}])
        config = make_config(OptimizerConfig(lr=lr, lr_decay_style="linear"))
        return optimizer.param_groups[0], build_scheduler(config, optimizer, train_iters)

    _, saved = build(lr=1.0, train_iters=4)
    for _ in range(3):
        saved.step(increment=1)
    group, resumed = build(lr=0.8, train_iters=8)
    resumed.load_state_dict(saved.state_dict())
    found = [group["lr"]]
    resumed.step(increment=1)
    found.append(group["lr"])
    assert found == pytest.approx([0.5, 0.4])
