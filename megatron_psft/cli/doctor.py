"""Says what runs on this machine would use and why, and what would break them or slow them down.

The exit code is 0, or 1 where something would break a run.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import run_command
from megatron_psft.config.paths import PathText
from megatron_psft.diagnostics import doctor
from megatron_psft.diagnostics.doctor import Finding
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.errors import UserError
from megatron_psft.hf import hub
from megatron_psft.metrics.provenance import installed_version, versions

EXAMPLES = """examples:
  this machine:
    psft doctor
  and whether a model can be trained with its tokenizer, and is computed as transformers does:
    psft doctor --model Qwen/Qwen2.5-7B-Instruct
    psft doctor --model runs/first/hf --tokenizer tokenizer/

On a cluster, run it where runs go: srun --nodes 1 --gpus-per-node 1 psft doctor"""


@dataclass(frozen=True, kw_only=True)
class ModelToCheck:
    """A model to look at beside the machine."""

    model: PathText | None = None
    """Hugging Face folder or hub ID that a run would start from; no model is looked at if unset. Where its weights
    are on this machine, what a run would compute of them is compared with transformers."""
    tokenizer: PathText | None = None
    """Folder or hub ID of the tokenizer; `model` if unset."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.model is None:
            raise UserError(f"tokenizer ({self.tokenizer}) has no effect without model; name both")

    def folders(self) -> tuple[Path, Path] | None:
        """Of model and tokenizer. Raises UserError where there are none."""
        if self.model is None:
            return None
        tokenizer = self.model if self.tokenizer is None else self.tokenizer
        return (
            hub.model_folder("model", self.model, with_weights=False),
            hub.model_folder("tokenizer", tokenizer, with_weights=False),
        )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The whole command."""

    check: ModelToCheck = ModelToCheck()


def main(argv: Sequence[str]) -> int:
    """Prints the report; returns 0, 1 where it has a problem, or 2 after a user's mistake."""
    configure_output(level=logging.ERROR)
    return run_command(DoctorConfig, examine, argv, prog="psft doctor", epilog=EXAMPLES)


def examine(config: DoctorConfig) -> int:
    """Prints the report and returns the exit code. Raises UserError for a model that is not there."""
    environment = dict(os.environ)  # before anything is set
    settings = prepare_environment()  # before torch is imported
    print_table("versions", {name: found or "not installed" for name, found in versions().items()})
    if settings:
        print_table("environment of a run", {setting.name: doctor.describe_setting(setting) for setting in settings})
    findings = doctor.check_versions()
    if None in map(installed_version, ("torch", "megatron-core")):
        return report(findings)  # nothing further could be imported
    folders = config.check.folders()  # a name that is none is told before what takes seconds
    findings += examine_machine(environment)
    if folders is not None:
        model, tokenizer = folders
        findings += examine_model(model) + doctor.check_tokenizer(tokenizer, model)
    return report(findings)


def examine_model(folder: Path) -> list[Finding]:
    """Whether a model can be trained, and is computed as transformers does; says what it does while that takes time."""
    findings = doctor.check_model(folder)
    if findings[0].level == "problem":
        return findings
    print(f"comparing {folder} with transformers\n", flush=True)
    return findings + doctor.check_logits(folder)


def examine_machine(environment: Mapping[str, str]) -> list[Finding]:
    """Prints what there is and what is used of it; returns what was found to be so or so."""
    from megatron_psft.distributed.device import detect

    findings = doctor.check_device(environment)
    try:
        platform = detect(0)
    except UserError as error:  # a broken Transformer Engine ends a run at its start
        return [*findings, Finding(level="problem", text=str(error))]
    print_table("machine", doctor.describe_machine(platform))
    findings += doctor.check_apex() + doctor.check_environment(platform.is_gpu, environment)
    bf16 = doctor.check_bf16(platform.is_gpu)
    findings += bf16 + doctor.check_shared_memory()

    def step() -> dict[str, str]:
        from megatron_psft.train.toy_step import toy_step

        return toy_step(platform, bf16=platform.is_gpu and bf16[0].level == "ok")

    made_with, failures = doctor.attempt("an optimizer step of a toy model", step)
    if made_with is not None:
        used = doctor.what_is_used(platform, made_with)
        print_table("what a run uses here", {choice.what: f"{choice.chosen} ({choice.reason})" for choice in used})
        findings.append(Finding(level="ok", text="a toy model has made an optimizer step with all of these"))
    return findings + failures


def print_table(title: str, lines: Mapping[str, str]) -> None:
    print(title)
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"  {name:<{width}}  {text}")
    print()


def report(findings: Sequence[Finding]) -> int:
    """Prints the findings, the worst last, and returns the exit code."""
    print("checks")
    for level in ("ok", "skipped", "warning", "problem"):
        for finding in findings:
            if finding.level == level:
                print(f"  {level + ':':<9} {finding.text}")
    return int(any(finding.level == "problem" for finding in findings))
