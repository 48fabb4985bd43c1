"""What code a run was made with."""

import subprocess

import torch

from megatron_psft import __version__
from megatron_psft.metrics import provenance

found_now = provenance.versions.__wrapped__  # what a process finds that has not asked before


def test_libraries_have_the_versions_that_they_say_themselves():
    found, own = found_now()["torch"], torch.__version__
    assert found.split("+")[0] == own.split("+")[0]  # some wheels leave out what they were built for


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(provenance, "LIBRARIES", ("torch", "no-such-library"))
    found = found_now()
    assert list(found) == ["megatron_psft", "torch", "no-such-library"]
    assert found["no-such-library"] is None


def test_a_checkout_names_its_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    package = tmp_path / "megatron_psft"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "metrics" / "provenance.py"))
    assert found_now()["megatron_psft"] == __version__
    (package / "versions.py").write_text("1\n")

    def git(*args: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for args in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*args)
    commit = git("rev-parse", "--short=12", "HEAD")
    assert found_now()["megatron_psft"] == f"{__version__} (commit {commit})"
    (package / "versions.py").write_text("2\n")
    assert found_now()["megatron_psft"] == f"{__version__} (commit {commit}-dirty)"
