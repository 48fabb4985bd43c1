"""The images' recipe, checked without an engine: hadolint parses it, and what it copies and pins is there."""

import re
import runpy
import subprocess

import pytest

from tests.support.cli import REPOSITORY
from tests.support.scripts import installed

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
absent_pins = runpy.run_path(str(REPOSITORY / "docker" / "absent_pins.py"))["absent_pins"]


@pytest.fixture(scope="module")
def instructions() -> list[str]:
    """One line each, as a builder joins them."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def test_hadolint_finds_nothing():
    done = subprocess.run([installed("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture(scope="module")
def versions() -> dict[str, str]:
    """Build arguments that constraints/images.env gives."""
    lines = (REPOSITORY / "constraints" / "images.env").read_text().splitlines()
    return dict(line.split("=") for line in lines if line and not line.startswith("#"))


def test_the_image_for_training_is_the_last_one_and_both_bases_are_pinned(instructions, versions):
    stages = [line.split() for line in instructions if line.startswith("FROM ")]
    assert [stage[-1] for stage in stages] == ["cpu", "gpu"]
    assert [stage[1] for stage in stages] == ["${PYTHON_IMAGE}", "${BASE_IMAGE}"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", versions["BASE_IMAGE"])
    assert re.fullmatch(r"python:3\.12-[a-z-]+", versions["PYTHON_IMAGE"])


def test_the_dockerfile_has_no_version_of_its_own(instructions, versions):
    declared = {line.split()[1] for line in instructions if line.startswith("ARG ") and "=" not in line}
    assert declared == {*versions, "COMMIT"}
    # Of GPU architectures and of Python, which names the file with the pins.
    words = [word for line in instructions for word in line.split() if not line.startswith("ARG CUDA_ARCHS")]
    numbers = [word for word in words if re.search(r"==|@v?\d|:\d|=v?\d+\.\d|\d+\.\d+\.\d+", word)]
    assert numbers == []


def test_the_readme_gives_the_versions_to_the_builder(versions):
    """Its command is run but for the builder."""
    readme = (REPOSITORY / "docker" / "README.md").read_text()
    command = next(line for line in readme.splitlines() if line.startswith("versions="))
    shell = ["bash", "-c", f"{command}; printf '%s\\n' $versions"]
    words = subprocess.run(shell, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert words == [word for pair in versions.items() for word in ("--build-arg", "=".join(pair))]
    builds = [line for line in readme.splitlines() if line.startswith("docker build ")]
    assert len(builds) == 2
    assert all(" $versions " in line for line in builds)


def test_all_that_is_copied_or_read_is_in_the_repository(instructions):
    sources = [word for line in instructions if line.startswith("COPY ") for word in line.split()[1:-1]]
    read = [
        word for line in instructions for word in line.split() if re.match(r"(constraints|docker)/.*\.(txt|py)$", word)
    ]
    assert "constraints" in sources
    assert "constraints/py312.txt" in read
    for name in [*sources, *read]:
        assert (REPOSITORY / name).exists(), name


def test_megatron_core_is_pinned():
    pins = (REPOSITORY / "constraints" / "py312.txt").read_text().splitlines()
    assert any(pin.startswith("megatron-core==") for pin in absent_pins(pins, installed=["torch"]))


def test_pins_of_what_the_image_has_are_left_out():
    lines = [
        "# versions",
        "absl-py==2.5.1",
        "Jinja2==3.1.6  # templates",
        "",
        "typing_extensions==4.16.0",
        "torch==2.13.0",
    ]
    assert list(absent_pins(lines, installed=["Torch", "typing.extensions", "numpy"])) == [
        "absl-py==2.5.1",
        "Jinja2==3.1.6",
    ]
