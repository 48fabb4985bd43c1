"""Files of settings that include others."""

import pytest

from megatron_psft.config.yaml_files import read_settings
from megatron_psft.errors import UserError
from tests.support.configs import parse


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_the_including_file_wins_over_what_it_includes_wherever_its_line_stands(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", base="include: ../root.yaml\nlr: 2e-6\nmin_lr: 1e-6\n")
    write(tmp_path, root="lr: 1e-6\nseed: 1\nmin_lr: 0\n")
    top = write(tmp_path, top="lr: 3e-6\ninclude: sub/base.yaml\n")
    config = parse("--config", str(top))
    assert (config.optimizer.lr, config.optimizer.min_lr, config.batch.seed) == (3e-6, 1e-6, 1)
    assert parse("--config", str(top), "--lr", "4e-6").optimizer.lr == 4e-6


def test_of_several_bases_the_later_wins_and_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("BASES", str(tmp_path))
    write(tmp_path, first="seed: 1\nlr: 1e-6\n", second="seed: 2\n")
    top = write(tmp_path, top="include: [first.yaml, $BASES/second.yaml]\n")
    config = parse("--config", str(top))
    assert (config.batch.seed, config.optimizer.lr) == (2, 1e-6)


def test_one_base_may_be_included_twice(tmp_path):
    write(tmp_path, base="seed: 1\n", a="include: base.yaml\n", b="include: base.yaml\n")
    top = write(tmp_path, top="include: [a.yaml, b.yaml]\n")
    assert [setting.value for setting in read_settings(top)] == [1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "include: top.yaml"}, r"top\.yaml includes itself, through .*top\.yaml; remove one include"),
        ({"top": "include: a.yaml", "a": "include: b.yaml", "b": "include: top.yaml"}, r"top\.yaml includes .*b\.yaml"),
        ({"top": "include: gone.yaml"}, r"cannot read --config \S*gone\.yaml: No such file or directory$"),
        ({"top": "include: a.yaml", "a": "sede: 1"}, r"a\.yaml: unknown key sede; did you mean seed\?"),
        ({"top": "include: a.yaml", "a": "seed: 1\nseed: 2"}, r"a\.yaml: seed is given 2 times"),
        ({"top": "include: a.yaml\ninclude: b.yaml"}, r"top\.yaml: include is given 2 times"),
        ({"top": "include: 7"}, r"top\.yaml: include \(7\) must be a path, or a list of paths"),
        ({"top": "include: ['']"}, r"top\.yaml: include \(''\) must be a path"),
        ({"top": "include: $NOT_SET/a.yaml"}, "include .* names the environment variable NOT_SET, which is not set"),
    ],
)
def test_a_mistake_names_the_file_that_has_it(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        parse("--config", str(write(tmp_path, **files)))
