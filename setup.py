"""Writes the commit that a wheel is built from into it; all that describes the package is in pyproject.toml."""

import runpy
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # which is a checkout, and asks git
            return
        sys.path.insert(0, str(ROOT))
        commit = runpy.run_path(str(ROOT / "megatron_psft" / "metrics" / "provenance.py"))["commit"]()
        if commit is not None:
            target = Path(self.build_lib, "megatron_psft", "metrics", "commit.txt")
            target.write_text(f"{commit}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithCommit})
