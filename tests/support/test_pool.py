"""The harness itself: a pool that survives its tests, and an oracle that agrees with arithmetic done by hand."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import oracle, tiny
from tests.support.cli import Exit, call_main, run_torchrun
from tests.support.marks import slow
from tests.support.pool import Pool, WorkerError


def _sum_of_ranks(addend):
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + addend])
    dist.all_reduce(total)
    return total


def _tensor_parallel_rank(size):
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()


def _leave(connection, stack_file):
    """The life of a worker that is killed while it starts."""


def test_a_rank_that_dies_while_it_starts_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.pool._serve", _leave)
        own = Pool()
        with pytest.raises(WorkerError, match="died before it was ready"):
            own.run(_sum_of_ranks, 1, 10)
    assert own.run(_sum_of_ranks, 1, 10) == [10], "the next call has another"
    own.close()


def test_ranks_reduce_and_return_their_results_in_order(pool):
    assert [int(total) for total in pool.run(_sum_of_ranks, 4, 10)] == [46] * 4


def test_the_next_call_may_have_another_layout(pool):
    assert pool.run(_tensor_parallel_rank, 2, 2) == [(0, 0), (1, 0)]
    assert pool.run(_tensor_parallel_rank, 4, 2) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert pool.run(_tensor_parallel_rank, 1, 1) == [(0, 0)]


def _change_process(name):
    os.environ[name] = "set"
    os.chdir("/")


def _process_state(name):
    return name in os.environ, os.getcwd(), dist.is_initialized(), os.getpid()


def test_nothing_of_a_call_is_left_for_the_next(pool):
    before = pool.run(_process_state, 2, "LEFT_BEHIND")
    pool.run(_change_process, 2, "LEFT_BEHIND")
    assert pool.run(_process_state, 2, "LEFT_BEHIND") == before
    assert before[0][:3] == (False, os.getcwd(), False)


def _fail_on_rank_one():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise KeyError("spilt milk")
    dist.all_reduce(torch.zeros(1))


def _module_of_fsync() -> str:
    return os.fsync.__module__


def test_no_process_that_a_test_starts_waits_for_a_disk(pool, tmp_path):
    """Those of tests/cli/test_wheel.py do, which import nothing of this checkout."""
    (in_pool,) = pool.run(_module_of_fsync, 1)
    command = [sys.executable, "-c", "import os; print(os.fsync.__module__)"]
    started = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [in_pool, started.stdout.strip()] == ["sitecustomize"] * 2
    assert _module_of_fsync().endswith("sitecustomize")
    with open(tmp_path / "closed", "w") as file:
        os.fsync(file.fileno())
        descriptor = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(descriptor)


def test_an_exception_names_its_rank_first_and_the_pool_recovers(pool):
    with pytest.raises(WorkerError, match="spilt milk") as caught:
        pool.run(_fail_on_rank_one, 4)
    assert next(iter(caught.value.failures)) == 1
    assert "_fail_on_rank_one" in caught.value.failures[1]
    assert [int(total) for total in pool.run(_sum_of_ranks, 2, 0)] == [1, 1]


def _hang_on_rank_one():
    if os.environ["RANK"] == "1":
        time.sleep(1000)


@pytest.mark.slow
def test_a_rank_that_hangs_is_shown_where_it_stands_and_the_pool_recovers(pool):
    with pytest.raises(WorkerError) as caught:
        pool.run(_hang_on_rank_one, 2, timeout=5)
    assert list(caught.value.failures) == [1]
    assert "did not finish" in caught.value.failures[1]
    assert "_hang_on_rank_one" in caught.value.failures[1]
    assert [int(total) for total in pool.run(_sum_of_ranks, 2, 0)] == [1, 1]


def _die_on_rank_one():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_reported_and_the_pool_recovers(pool):
    with pytest.raises(WorkerError, match="rank 1: died with exit code -9"):
        pool.run(_die_on_rank_one, 2)
    assert [int(total) for total in pool.run(_sum_of_ranks, 2, 0)] == [1, 1]


def _return_a_generator():
    return (number for number in [1])


def test_a_result_that_cannot_travel_is_an_error_of_the_call(pool):
    with pytest.raises(WorkerError, match="cannot pickle 'generator' object"):
        pool.run(_return_a_generator, 1)


def _main(argv):
    sys.stdout.write(f"rank {os.environ['RANK']}\n")
    os.write(2, b"from C\n")
    if argv == ["return"]:
        return 3
    if argv == ["raise"]:
        raise KeyError("spilt milk")
    sys.exit(None if argv == ["exit"] else "no such flag")


@pytest.mark.parametrize(
    ("argument", "code", "last"), [("return", 3, ""), ("exit", 0, ""), ("text", 1, "no such flag\n")]
)
def test_exit_codes_and_output_are_returned(pool, argument, code, last):
    expected = [Exit(code, f"rank {rank}\n", f"from C\n{last}") for rank in range(2)]
    assert pool.run(call_main, 2, _main, [argument]) == expected


def test_a_command_that_raises_shows_its_output_too(pool):
    with pytest.raises(WorkerError, match=r"(?s)spilt milk.*from C"):
        pool.run(call_main, 1, _main, ["raise"])


@pytest.mark.slow
def test_torchrun_starts_a_script_on_all_ranks(tmp_path):
    script = tmp_path / "script.py"
    # One write each: the parts of a `print` may come between those of another rank.
    script.write_text(
        "import os, sys\n"
        "os.write(1, f\"{os.environ['RANK']} {sys.argv[1:]}\\n\".encode())\n"
        "sys.exit(sys.argv[1] == 'fail')"
    )
    done = run_torchrun([script, "--flag"], 2)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["0 ['--flag']", "1 ['--flag']"])
    assert run_torchrun([script, "fail"], 2).returncode == 1


@pytest.mark.slow
def test_torchrun_is_ended_after_its_time(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(1000)")
    with pytest.raises(subprocess.TimeoutExpired):
        run_torchrun([script], 1, timeout=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def batches(tmp_path_factory, tokenizer):
    path = tiny.write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 96)
    return list(oracle.chatml_batches(path, tokenizer, global_batch_size=8, steps=12))


def test_rendering_by_hand_equals_the_template(tokenizer):
    messages = [{"role": "user", "content": "count two"}, {"role": "assistant", "content": "one two"}]
    ids, label_mask = oracle.chatml_example(messages, tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    labels = [token for token, is_label in zip(ids, label_mask, strict=True) if is_label]
    assert tokenizer.decode(labels) == "one two<|im_end|>"


def test_records_are_uneven(batches):
    lengths = [len(ids) for batch in batches for ids, _ in batch]
    assert max(lengths) > 6 * min(lengths)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoint_is_spelled_as_published_ones_are_and_means_the_same(tmp_path, family):
    hub = tiny.build_model(tmp_path / "hub", family, shard_size="100KB")
    new = tiny.build_model(tmp_path / "new", family, hub_config=False)
    assert '"rope_theta": 1000.0' in (hub / "config.json").read_text()
    assert len(list(hub.glob("*.safetensors"))) > 1
    tokens = torch.arange(100)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (hub, new)]
    assert torch.equal(*logits)


def test_llama_has_kept_blended_and_stretched_frequencies(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.build_model(tmp_path, "llama"))
    inv_freq = model.model.rotary_emb.inv_freq
    slowdown = 1000.0 ** -(torch.arange(0, 16, 2) / 16) / inv_freq
    kept, blended, stretched = slowdown < 1.001, (slowdown > 1.1) & (slowdown < 7), (slowdown - 8).abs() < 0.01
    assert [int(regime.sum()) for regime in (kept, blended, stretched)] == [2, 1, 5]


class _TableModel(torch.nn.Module):
    """Logits of two tokens by position, whatever comes before."""

    def __init__(self, first_token_probabilities):
        super().__init__()
        first = torch.tensor(first_token_probabilities)
        self.table = torch.nn.Parameter(torch.stack([first, 1 - first], dim=1).log())

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table[None, : input_ids.shape[1]])


def test_statistics_equal_arithmetic_by_hand():
    log_probs, entropy = oracle.label_statistics(_TableModel([0.5, 0.75, 0.1]), [1, 0, 0], [False, False, True])
    torch.testing.assert_close(log_probs, torch.tensor([math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]))


def test_only_tokens_within_the_bound_have_a_gradient():
    model, old_model = _TableModel([0.75, 0.25, 0.5]), _TableModel([0.5, 0.5, 0.5])
    loss_of = functools.partial(oracle.token_losses, "psft", clip_ratio_high=0.28)
    metrics = oracle._accumulate_gradients(model, old_model, None, [([1, 0, 0], [False, True, True])], loss_of, 0.28)
    # The ratios are 1.5, which is clipped, and 0.5.
    assert metrics["loss"] == pytest.approx(-(1.28 + 0.5) / 2)
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["clip_fraction"] == pytest.approx(0.5)
    assert metrics["approx_kl"] == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 2)
    # d(-r)/dlogits = -r (onehot - p), halved by the mean.
    expected = torch.tensor([[0.0, 0.0], [-0.25 * 0.75, 0.25 * 0.75], [0.0, 0.0]])
    torch.testing.assert_close(model.table.grad, expected)


def _rounded(history, *names):
    return [[pytest.approx(metrics[name], rel=1e-5) for name in names] for metrics in history]


def test_a_window_of_one_step_has_the_gradient_of_sft(tmp_path, batches):
    hf_dir = tiny.build_model(tmp_path, "qwen2", num_hidden_layers=1)
    names = ("nll", "entropy", "grad_norm", "label_tokens")
    runs = [
        oracle.train(hf_dir, batches[:3], lr=1e-3, objective=objective, old_policy_interval=1)[0]
        for objective in ("psft", "sft")
    ]
    assert [[metrics[name] for name in names] for metrics in runs[0]] == _rounded(runs[1], *names)
    assert [metrics["loss"] for metrics in runs[0]] == [-1.0] * 3


@pytest.mark.slow
def test_windows_start_after_warm_up_and_a_fixed_one_never_ends(tmp_path, batches):
    hf_dir = tiny.build_model(tmp_path, "qwen2", num_hidden_layers=1)

    def steps_at_ratio_one(interval):
        history, _ = oracle.train(hf_dir, batches[:6], lr=1e-3, old_policy_interval=interval, sft_warmup_iters=1)
        return [metrics["step"] for metrics in history if metrics["ratio_max"] == 1]

    assert steps_at_ratio_one(2) == [1, 2, 4, 6]
    assert steps_at_ratio_one("fixed") == [1, 2]


@pytest.mark.parametrize(("family", "tied"), [slow("qwen2", True), slow("llama", False), ("qwen3", True)])
@pytest.mark.slow
def test_parity_over_twelve_steps_means_something(tmp_path, batches, monkeypatch, family, tied):
    """Much is clipped, nothing is near uniform, and a rounding error in the weights stays one in the metrics."""
    hf_dir = tiny.build_model(tmp_path, family, tied=tied)

    def run():
        return oracle.train(hf_dir, batches, lr=oracle.PARITY_LR, old_policy_interval=4)[0]

    history = run()
    load_model = oracle.load_model
    monkeypatch.setattr(oracle, "load_model", lambda hf_dir: _jolted(load_model(hf_dir)))
    jolted = run()
    clip_fractions = [metrics["clip_fraction"] for metrics in history]
    assert clip_fractions[::4] == [0.0] * 3
    assert sum(fraction > 0.1 for fraction in clip_fractions) >= 7
    assert all(metrics["entropy"] < 0.9 * math.log(tiny.VOCAB_SIZE) for metrics in history)
    names = ("loss", "nll", "entropy", "ratio_mean", "grad_norm")
    assert [[metrics[name] for name in names] for metrics in jolted] == _rounded(history, *names)
    assert max(abs(one["nll"] - other["nll"]) for one, other in zip(history, jolted, strict=True)) > 0


@torch.no_grad()
def _jolted(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    return model
