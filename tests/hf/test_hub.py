"""`DIR|ID`: a folder is taken as it is, an ID comes from the hub or its cache; the rest is refused by its field."""

from pathlib import Path

import huggingface_hub
import pytest

from megatron_psft.errors import UserError
from megatron_psft.hf import hub


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.model_folder("load_hf", str(tmp_path), with_weights=True) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert hub.model_folder("load_hf", "org/name", with_weights=True) == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.model_folder("load_hf", "~/org", with_weights=True) == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "../model", "~/no-such-model", "~no-such-user/model", "a/b/c"]
)
def test_what_looks_like_a_path_must_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        hub.model_folder("load_hf", name, with_weights=True)
    assert str(caught.value) == f"load_hf ({name}) must be an existing folder or a hub ID; check the path"


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"load_hf \({path}\) must be an existing folder"):
        hub.model_folder("load_hf", str(path), with_weights=True)


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model", "no such model"])
@pytest.mark.parametrize("field", ["load_hf", "tokenizer"])
def test_an_id_that_the_offline_hub_does_not_know_is_named_with_its_field(tmp_path, monkeypatch, field, name):
    """The whole suite runs offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        hub.model_folder(field, name, with_weights=True)
    found, expected = str(caught.value), f"{field} ({name}) is no local folder and the hub has no answer for it: "
    assert found.startswith(expected)
    assert len(found) > len(expected)
    assert "\n" not in found


def test_an_id_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    repository = tmp_path / "models--some-org--some-model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.model_folder("load_hf", "some-org/some-model", with_weights=True) == snapshot


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[list[str]]:
    """The patterns of the files that were asked for."""
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def kept(patterns: list[str]) -> set[str]:
    files = ["config.json", "model-1.safetensors", "pytorch_model.bin", "consolidated.00.pth", "tokenizer.json"]
    files += ["chat_template.jinja", "merges.txt", "tokenizer.model", "model.py", "model.gguf"]
    return set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))


def test_of_a_model_all_but_pickles_and_code_is_downloaded(downloads):
    hub.model_folder("load_hf", "org/name", with_weights=True)
    (patterns,) = downloads
    tokenizer = {"tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model"}
    assert kept(patterns) == {"config.json", "model-1.safetensors", *tokenizer}


def test_of_a_tokenizer_no_weights_are_downloaded(downloads):
    hub.model_folder("tokenizer", "org/name", with_weights=False)
    (patterns,) = downloads
    assert "tokenizer.json" in kept(patterns)
    assert "model-1.safetensors" not in kept(patterns)
