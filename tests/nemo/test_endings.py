"""How a run in Megatron-Bridge ends, by its exit code."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_psft.distributed.exit_code import FILE_VARIABLE
from megatron_psft.errors import UserError
from tests.nemo import cpu
from tests.nemo.bridge import needs_bridge
from tests.support.cli import Exit, call_main
from tests.support.pool import WorkerError

pytestmark = needs_bridge

CODES = {
    "nan": 3,
    "inf": 3,
    "peer": 4,
    "mistake": 2,
    "signal": 143,
    "duration": 0,
    "no handler": 0,
    "bug": 1,
    "memory": 1,
}


def _end_as_bridge_does(how: str, callbacks) -> None:
    import torch
    import torch.distributed as dist
    from megatron.bridge.training.losses import masked_next_token_loss
    from megatron.bridge.training.utils.sig_utils import DistributedSignalHandler
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine

    if how in ("nan", "inf"):
        initialize_rerun_state_machine()
        masked_next_token_loss(torch.ones(1), torch.tensor([float(how)]), True, False)
    if how == "peer":
        # As a collective fails: no group of one process does.
        code = compile("raise RuntimeError('Connection closed by peer')", dist.distributed_c10d.__file__, "exec")
        exec(code)
    if how == "mistake":
        raise UserError("train_iters")
    if how == "memory":
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )
    if how == "bug":
        raise KeyError("missing")
    if how == "no handler":
        callbacks[0].on_train_start(SimpleNamespace(state=SimpleNamespace(signal_handler=None)))
        raise SystemExit(0)
    with DistributedSignalHandler() as handler:
        callbacks[0].on_train_start(SimpleNamespace(state=SimpleNamespace(signal_handler=handler)))
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(0)


def _recipe() -> SimpleNamespace:
    from megatron_psft.nemo.config import PsftConfig

    return SimpleNamespace(psft=PsftConfig(), model=None, dist=SimpleNamespace(distributed_timeout_minutes=10))


def _end(how: str, code_file: str) -> Exit:
    cpu.prepare()
    from examples.nemo import finetune_psft
    from megatron_psft.nemo import train

    def loop(config, forward_step, callbacks):
        _end_as_bridge_does(how, callbacks)

    with pytest.MonkeyPatch.context() as patch:  # the process runs other tests after this one
        patch.setenv(FILE_VARIABLE, code_file)
        patch.setattr(train, "bridge_finetune", loop)
        patch.setattr(finetune_psft, "build_recipe", lambda config: _recipe())
        try:
            return call_main(finetune_psft.main, ["--recipe", "qwen3_4b", "--pretrained-checkpoint", "x"])
        except RuntimeError as error:
            return Exit(1, "", repr(error.__cause__))


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.parametrize("how", CODES)
def test_the_end_of_bridges_loop_is_told_by_the_code(bridge_pool, tmp_path, how):
    file = tmp_path / "code"
    (exit,) = bridge_pool.run(_end, 1, how, str(file))
    assert exit.code == CODES[how], exit.err
    assert ("out of GPU memory, asked for 2.00 GiB; allocated " in exit.err) == (how == "memory"), exit.err
    assert ("lower it by ddp.use_distributed_optimizer" in exit.err) == (how == "memory")
    assert (file.read_text() if file.exists() else "0\n") == f"{CODES[how]}\n"


def _fail_for_real(folder: Path) -> None:
    """The example as a process's whole life: rank 1 fails while rank 0 waits, as for NCCL, for what does not end."""
    cpu.prepare()
    from examples.nemo import finetune_psft
    from megatron_psft.distributed import failure
    from megatron_psft.nemo import train

    rank = int(os.environ["RANK"])
    os.environ[FILE_VARIABLE] = str(folder / "code")
    os.dup2(os.open(folder / f"err-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    failure._INTERVAL_SECONDS, failure._GRACE_SECONDS = 0.05, 0.5

    def loop(config, forward_step, callbacks):
        if rank == 0:
            time.sleep(600)
        raise KeyError("missing")

    train.bridge_finetune, finetune_psft.build_recipe = loop, lambda config: _recipe()
    finetune_psft.main(["--recipe", "qwen3_4b", "--pretrained-checkpoint", "x"])


@pytest.mark.slow
@pytest.mark.both
def test_a_rank_that_fails_by_itself_ends_all(bridge_pool, tmp_path):
    with pytest.raises(WorkerError) as caught:
        bridge_pool.run(_fail_for_real, 2, tmp_path)
    texts = [(tmp_path / f"err-{rank}").read_text() for rank in (0, 1)]
    assert caught.value.failures == {0: "died with exit code 4", 1: "died with exit code 1"}, texts
    errors = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: KeyError: 'missing'"]
    assert (tmp_path / "code").read_text() == "1\n"
    assert "rank 0: ended, as rank 1 has failed" in texts[0]
