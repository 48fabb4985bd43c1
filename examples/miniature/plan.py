"""What is compared: methods, learning rates, seeds and lengths, and the command line of each run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chains import ChainFiles, Sizes

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    name: str
    """Of its folders."""
    label: str
    """In tables and pictures."""
    flags: tuple[str, ...]
    lrs: tuple[str, ...]
    """Learning rates it is tried at, rising."""
    clips: bool = False
    """Whether it has a clip fraction to show."""
    depends_on_length: bool = False
    """Whether the first steps of a run depend on how many there are: then a longer run resumes from no shorter one."""


LRS = ("1e-4", "3e-4", "1e-3")


FEWER_LRS = LRS[1:]


def _method(name: str, label: str, *flags: str, **settings: Any) -> Method:
    return Method(**{"name": name, "label": label, "flags": flags, "lrs": LRS, **settings})


def _psft(name: str, label: str, *flags: str, **settings: Any) -> Method:
    return _method(name, label, "--objective", "psft", *flags, **{"clips": True, **settings})


SFT = _method("sft", "SFT", "--objective", "sft", lrs=("3e-5", *LRS))
PSFT = _psft("psft-k8", "PSFT, k = 8", "--old-policy-interval", "8")
METHODS = (
    SFT,
    _method("sft-kl", "SFT-KL", "--objective", "sft-kl", "--kl-coef", "0.5"),
    _method("dft", "DFT", "--objective", "dft"),
    PSFT,
    _psft("psft-k4", "PSFT, k = 4", "--old-policy-interval", "4", lrs=FEWER_LRS),
    _psft("psft-fixed", "PSFT, fixed", "--old-policy-interval", "fixed", lrs=FEWER_LRS, depends_on_length=True),
    _psft("psft-warmup", "PSFT, k = 8, 8 steps of SFT first", "--sft-warmup-iters", "8", lrs=FEWER_LRS),
    _psft("no-clip", "PSFT, k = 8, without clip", "--clip-ratio-high", "1e9", lrs=FEWER_LRS, clips=False),
)


@dataclass(frozen=True, kw_only=True)
class Rl:
    """A short GRPO."""

    rounds: int = 6
    prompts: int = 24
    """Questions per round, new ones in each."""
    samples: int = 8
    """Replies to each."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides on the results."""

    methods: tuple[Method, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    base_steps: int = 400
    lengths: tuple[int, ...] = (32, 64)
    """Optimizer steps at which a run is measured, rising; multiples of 8, where all windows end."""
    sizes: Sizes = field(default_factory=Sizes)
    questions: int = 128
    """Held-out questions of each kind that are asked."""
    rl: Rl = field(default_factory=Rl)


FULL = Plan()
QUICK = Plan(
    methods=(SFT, PSFT),
    seeds=(0,),
    base_steps=40,
    lengths=(16,),
    sizes=Sizes(base=1000, target=32, held_out=32),
    questions=32,
    rl=Rl(rounds=1, prompts=8, samples=4),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of one method at one learning rate, or the base where `method` is None; measured at each of `lengths`."""

    folder: Path
    """Of the seed: data, tokenizer, base and all runs."""
    files: ChainFiles
    seed: int
    method: Method | None = None
    lr: str = ""
    lengths: tuple[int, ...]
    questions: int

    @property
    def name(self) -> str:
        return "base" if self.method is None else f"{self.method.name}-{self.lr}"

    @property
    def base(self) -> Path:
        """The model that the seed's runs start from."""
        return self.folder / "base" / "hf"

    def hf(self, length: int) -> Path:
        """The exported model after `length` steps."""
        return self.base if self.method is None else self.folder / self.name / f"hf-{length}"

    def save(self, length: int) -> Path:
        """The trainer's own folder, in which a longer run finds the shorter one's checkpoint."""
        alone = self.method is not None and self.method.depends_on_length and length < self.lengths[-1]
        return self.folder / self.name / (f"run-{length}" if alone else "run")

    def command(self, length: int) -> list[str]:
        """Flags of `pretrain_psft.py` for training up to `length` steps."""
        if self.method is None:
            flags = ["--config", HERE / "base.yaml", "--load-hf", self.folder / "init", "--data", self.files.base]
        else:
            flags = ["--config", HERE / "target.yaml", *self.method.flags, "--lr", self.lr, "--load-hf", self.base]
            flags += ["--data", self.files.target, "--valid-data", self.files.target_held_out]
            flags += ["--eval-interval", self.lengths[0]]
            flags += ["--log-clipped-tokens", 20] if self.method.clips else []
        flags += ["--tokenizer", self.folder / "tokenizer", "--data-cache-dir", self.folder / "cache"]
        flags += ["--save", self.save(length), "--export-hf", self.hf(length)]
        return [str(flag) for flag in [*flags, "--seed", self.seed, "--train-iters", length]]


def jobs(plan: Plan, folder: Path, files: ChainFiles, seed: int) -> tuple[Job, list[Job]]:
    """The base's job of a seed, and those of the runs that start from it."""
    common = {"folder": folder, "files": files, "seed": seed, "questions": plan.questions}
    base = Job(**common, lengths=(plan.base_steps,))
    runs = [Job(**common, method=method, lr=lr, lengths=plan.lengths) for method in plan.methods for lr in method.lrs]
    return base, runs
