"""On what a run computes: what each rank has is looked at by itself, and decided on for all of them at once."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch

from megatron_psft.distributed.environment import are_hidden, gpu_signs
from megatron_psft.distributed.rendezvous import Meeting
from megatron_psft.errors import InfrastructureError, UserError, counted, first_line

if TYPE_CHECKING:
    from megatron_psft.distributed.device import Platform

Device = Literal["auto", "cuda", "cpu"]

_SHOWN_HOSTS = 8


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a rank has to compute on."""

    rank: int
    host: str
    local_rank: int
    wanted: Device
    """The setting `device` of this rank."""
    num_gpus: int = 0
    """GPUs of the host that torch can use."""
    gpu: str | None = None
    """Identity of the one that is this rank's, if it works and torch tells."""
    trouble: str | None = None
    """Why there is no working GPU for this rank, where there is a sign of one."""

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU works, though perhaps not one for this rank alone."""
        return self.num_gpus > 0 and self.trouble is None


def settle(meeting: Meeting, own: Survey | UserError, local_rank: int) -> "Platform":
    """What this process computes on, as all ranks have decided (`agree`). Raises as `agree`, and UserError on all of
    them for what is broken on the host of any."""
    device = agree(meeting, own)
    # After the device is known: for the CPU, no library is to look for a GPU.
    from megatron_psft.distributed.device import prepare_all

    return prepare_all(meeting, device, local_rank)


def survey(wanted: Device, rank: int, local_rank: int) -> Survey:
    """Looks at this rank's host, and tries its GPU. Does not touch CUDA where the CPU is wanted."""
    place = {"rank": rank, "host": socket.gethostname(), "local_rank": local_rank, "wanted": wanted}
    if wanted == "cpu":
        return Survey(**place)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        trouble = unusable_gpu(os.environ) or (_reason(os.environ) if wanted == "cuda" else None)
        return Survey(**place, trouble=trouble)  # type: ignore[arg-type]
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        return Survey(**place, num_gpus=num_gpus)  # type: ignore[arg-type]
    gpu, trouble = _try_gpu(local_rank)
    return Survey(**place, num_gpus=num_gpus, gpu=gpu, trouble=trouble)  # type: ignore[arg-type]


def _try_gpu(index: int) -> tuple[str | None, str | None]:
    """The GPU's identity, if torch tells it; and what it answers to a first operation, if it fails."""
    try:
        torch.ones(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:
        return None, f"cuda:{index} does not work: {first_line(error)}"
    identity = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return (None if identity is None else str(identity)), None


def agree(meeting: Meeting, own: Survey | UserError) -> Literal["cuda", "cpu"]:
    """What all ranks compute on (`choose`), or the mistake of the lowest rank that has made one; alike on every rank.

    Raises:
        UserError, InfrastructureError: on every rank.
        RankError: on this one, where others have not come.
    """
    said = {"mistake": str(own)} if isinstance(own, UserError) else {"survey": asdict(own)}
    answer = json.loads(meeting.agree(json.dumps(said), _decide))
    if "device" in answer:
        return "cuda" if answer["device"] == "cuda" else "cpu"
    kind = UserError if answer["is_mistake"] else InfrastructureError
    raise kind(answer["error"])


def _decide(said: Sequence[str]) -> str:
    found = [json.loads(text) for text in said]
    try:
        for entry in found:
            if "mistake" in entry:
                raise UserError(entry["mistake"])
        return json.dumps({"device": choose([Survey(**entry["survey"]) for entry in found])})
    except (UserError, InfrastructureError) as error:
        return json.dumps({"error": str(error), "is_mistake": isinstance(error, UserError)})


def choose(surveys: Sequence[Survey]) -> Literal["cuda", "cpu"]:
    """What all ranks compute on.

    Args:
        surveys: of all ranks.

    Raises:
        UserError: there is no GPU and one is wanted, or a sign of one that torch cannot use; ranks would share a GPU.
        InfrastructureError: some ranks have no working GPU while others have.
    """
    wanted = {found.wanted for found in surveys}
    if len(wanted) > 1:
        found = "; ".join(f"{name} on {places([s for s in surveys if s.wanted == name])}" for name in sorted(wanted))
        raise UserError(f"device must be the same on all ranks, and is {found}")
    without = [found for found in surveys if not found.has_gpu]
    if wanted == {"cpu"}:
        return "cpu"
    if len(without) == len(surveys):
        return _choose_without_gpu(surveys)
    if without:
        trouble = next((found.trouble for found in without if found.trouble is not None), "torch sees no GPU there")
        raise InfrastructureError(
            f"device: {places(without)} have no working GPU, while the others have: {trouble}; leave that host out, "
            "or fix it; --device cpu computes on the CPU everywhere"
        )
    _check_shared(surveys)
    return "cuda"


def _choose_without_gpu(surveys: Sequence[Survey]) -> Literal["cpu"]:
    troubled = [found for found in surveys if found.trouble is not None]
    if not troubled:
        return "cpu"
    rule = (
        "device (cuda) needs a GPU for each rank"
        if surveys[0].wanted == "cuda"
        else "device (auto) does not take the CPU where there is a sign of a GPU"
    )
    raise UserError(f"{rule}; {places(troubled)}: {troubled[0].trouble}; or compute on the CPU by --device cpu")


def _check_shared(surveys: Sequence[Survey]) -> None:
    """Raises where ranks would share a GPU."""
    beyond = [found for found in surveys if found.local_rank >= found.num_gpus]
    if beyond:
        first = beyond[0]
        text = (
            f"device: {places(beyond)} have no GPU of their own: LOCAL_RANK ({first.local_rank}) must be below the "
            f"{counted(first.num_gpus, 'GPU')} that torch can use on {first.host}; start as many processes per node as "
            "there are GPUs (torchrun --nproc-per-node), and let CUDA_VISIBLE_DEVICES name all of them in each process"
        )
        most = max(found.num_gpus for found in surveys)
        if most > first.num_gpus:  # torchrun has the same number of processes everywhere
            raise InfrastructureError(f"{text}; other hosts have {most}")
        raise UserError(text)
    owners: dict[str, Survey] = {}
    for found in surveys:
        other = owners.setdefault(found.gpu, found) if found.gpu is not None else found
        if other is not found:
            raise UserError(
                f"device: {places([other, found])} would share a GPU, as LOCAL_RANK is {other.local_rank} and "
                f"{found.local_rank}; start them by torchrun, which numbers the processes of a node"
            )


def unusable_gpu(environment: Mapping[str, str]) -> str | None:
    """What says that this host has a GPU, and why torch cannot use it; None without a sign of one, or where
    CUDA_VISIBLE_DEVICES hides it on purpose. To be asked where torch sees no GPU."""
    allotted = environment.get("SLURM_GPUS_ON_NODE", "")
    has_allotment = allotted.isdigit() and int(allotted) > 0
    if are_hidden(environment) and not has_allotment:
        return None
    signs = [f"{path} exists" for path in gpu_signs()]
    if has_allotment:
        signs.append(f"SLURM_GPUS_ON_NODE is {allotted}")
    if "CUDA_VISIBLE_DEVICES" in environment and not are_hidden(environment):
        signs.append(f"CUDA_VISIBLE_DEVICES is {environment['CUDA_VISIBLE_DEVICES']}")
    return f"{', '.join(signs)}, but {_reason(environment)}" if signs else None


def has_hidden_gpu(environment: Mapping[str, str]) -> bool:
    """Whether there is a sign of a GPU, which CUDA_VISIBLE_DEVICES hides."""
    return are_hidden(environment) and bool(gpu_signs())


def _reason(environment: Mapping[str, str]) -> str:
    """Why torch sees no GPU, with what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build for this driver (https://pytorch.org)"
    if are_hidden(environment):
        return "CUDA_VISIBLE_DEVICES hides the GPUs: unset it"
    try:
        torch.cuda.init()
        said = "it sees no GPU"
    except (RuntimeError, AssertionError) as error:
        said = first_line(error)
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it ({said}): see what nvidia-smi "
        "says; the driver may be too old for this build, and a container needs its GPUs handed in, as by docker run "
        "--gpus all"
    )


def places(surveys: Sequence[Survey]) -> str:
    """Ranks by their hosts, as `ranks 0-7 on node-a, ranks 8, 10 on node-b`."""
    by_host: dict[str, list[int]] = {}
    for found in surveys:
        by_host.setdefault(found.host, []).append(found.rank)
    named = [f"{_ranks(ranks)} on {host}" for host, ranks in by_host.items()]
    more = len(named) - _SHOWN_HOSTS
    return ", ".join(named[:_SHOWN_HOSTS] + ([f"and those of {more} more hosts"] if more > 0 else []))


def _ranks(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)
