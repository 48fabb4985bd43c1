"""The folder of an example's results is emptied when its scripts or settings have changed."""

from examples.shared import claim


def test_what_the_same_scripts_have_left_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, "REPOSITORY", tmp_path)
    folder, script = tmp_path / "runs" / "demo", tmp_path / "run.py"

    def claimed(text: str, *settings: str) -> bool:
        """Whether what lay in the folder is still there."""
        script.write_text(text)
        claim.claim(folder, [script], *settings)
        is_kept = (folder / "left").exists()
        (folder / "left").touch()
        return is_kept

    assert [claimed("a", "model"), claimed("a", "model")] == [False, True]
    assert [claimed("a", "other"), claimed("b", "other"), claimed("b", "other")] == [False, False, True]
    assert capsys.readouterr().out.count("Writing below runs/demo (emptied first).") == 3
