"""The package as people install it: a wheel in an environment of its own, outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.cli import REPOSITORY

pytestmark = pytest.mark.slow

BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
GIT = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]


def elsewhere() -> dict[str, str]:
    """The environment of somebody who has no checkout: pip would take ours for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution and wheel, made of a copy with a history of its own."""
    copy = tmp_path_factory.mktemp("copy") / "megatron_psft"
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, copy, ignore=skipped)
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run([*GIT, *words], cwd=copy, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with the wheel; all other packages are those of the tests' own."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(built[1])], check=True, env=elsewhere())
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    # A line of a .pth file is a folder whose own .pth files are not read: the tests' editable install stays out.
    (site_packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    return python


@pytest.fixture
def run(python, tmp_path):
    """Runs a program of the fresh environment from a folder outside of the checkout; returns what it printed."""

    def run(program: str, *words: object) -> str:
        command = [python.parent / program, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=elsewhere(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_wheel_holds_the_package_alone_and_says_what_it_is(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        fields = Parser().parsestr(wheel.read(metadata).decode())
    assert {name.split("/")[0] for name in names} == {"megatron_psft", metadata.split("/")[0]}
    ours = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "megatron_psft").rglob("*")]
    ours = {str(path) for path in ours if path.suffix in (".py", ".typed", ".html", ".css", ".js")}
    assert ours <= set(names)
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert fields["Requires-Python"] == "<3.13,>=3.11"
    assert "Programming Language :: Python :: 3.12" in fields.get_all("Classifier")
    assert fields.get_payload().startswith("# megatron_psft")


def test_source_distribution_holds_what_the_checkout_holds(built):
    with tarfile.open(built[0]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    skipped = (".git", ".venv", "runs", "build", "dist", "__pycache__", "_cache", ".egg-info", ".hypothesis")
    folders = [path for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.endswith(skipped)]
    folders = [path for path in folders if not path.name.startswith(".venv")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in REPOSITORY.iterdir() if path.is_file() and path.name != ".git"]
    ours = {str(path.relative_to(REPOSITORY)) for path in files if "__pycache__" not in path.parts}
    assert ours - packed == set()


def test_installed_command_lists_examines_and_knows_its_commit(run, python, built):
    checkout = built[0].parents[1]
    found = subprocess.run([*GIT, "rev-parse", "--short=12", "HEAD"], cwd=checkout, capture_output=True, text=True)
    code = "import megatron_psft; print(megatron_psft.__file__)"
    assert run("python", "-c", code).startswith(str(python.parents[1]))
    assert "commands:\n  train " in run("psft", "--help")
    report = run("psft", "doctor")
    assert f"(commit {found.stdout.strip()})" in report
    assert "  ok:       a toy model has made an optimizer step with all of these\n" in report


def test_installed_command_trains(run, tmp_path):
    """With processes for data and for saves, which import the console script anew."""
    tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    tiny.build_tokenizer(tmp_path / "tokenizer")
    tiny.write_records(tmp_path / "records.jsonl", 1500)  # more than are tokenized before processes are started
    flags = ["--load-hf", "model", "--tokenizer", "tokenizer", "--data", "records.jsonl", "--data-cache-dir", "cache"]
    flags += ["--data-workers", "2", "--global-batch-size", "2", "--seq-length", "512", "--save", "run"]
    flags += ["--async-save", "--save-interval", "1", "--keep-last", "9"]
    run("psft", "train", *flags, "--train-iters", "2")
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_0000001", "step_0000002"]
