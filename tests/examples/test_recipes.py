"""Every YAML file of the repository is read by the command that it is for, and fits the GPUs that its name says."""

import re
from dataclasses import dataclass

import pytest
import yaml

from megatron_psft.cli.plan import ClusterConfig, saving_line
from megatron_psft.cli.rollout import RolloutConfig
from megatron_psft.config.flags import parse_flags
from megatron_psft.config.paper import RUNS
from megatron_psft.config.resume import settings_of
from megatron_psft.config.rules import validate
from megatron_psft.config.schema import Config
from megatron_psft.config.yaml_files import read_settings
from megatron_psft.diagnostics.layouts import smallest_layout
from megatron_psft.diagnostics.plan import GIB
from tests.support.cli import REPOSITORY
from tests.support.recipes import RECIPES, SHAPES, plan_of, ranks_of

H100 = ClusterConfig(gpus=1)
PARTS = ("weights", "gradients", "optimizer", "activations", "working")


@dataclass(frozen=True)
class Reader:
    """The command that reads a YAML file, as far as the file leaves things to its command line."""

    root: type
    flags: str = ""


TRAINING = Reader(Config, "--load-hf model --data train.jsonl --save run")
READERS = {
    "examples/demo": Reader(Config, f"{TRAINING.flags} --valid-data valid.jsonl"),
    "examples/digits": Reader(Config, f"{TRAINING.flags} --valid-data valid.jsonl"),
    "examples/miniature/grpo.yaml": TRAINING,
    "examples/miniature": Reader(Config, f"{TRAINING.flags} --train-iters 100"),
    "examples/mixed/train.yaml": TRAINING,
    "examples/mixed/rollout.yaml": Reader(RolloutConfig, "--model model --prompts prompts.jsonl --out out.jsonl"),
    "examples/paper": Reader(Config, "--data train.jsonl --save run"),
    "examples/recipes/base": TRAINING,
    "examples/recipes": Reader(Config, "--data train.jsonl --save run"),
}
OTHERS = {
    ".pre-commit-config.yaml",
    "examples/kubernetes/psft.yaml",
    "examples/rl_cold_start/nemo_rl_grpo.yaml",
    "mkdocs.yml",
}
"""Read by other projects' programs."""


def shipped() -> list[str]:
    """But for what make has put into a checkout."""
    made = re.compile(r"\.venv|\.git$|runs$|build$|dist$")
    paths = [path for top in REPOSITORY.iterdir() if not made.match(top.name) for path in [top, *top.rglob("*")]]
    return sorted(str(path.relative_to(REPOSITORY)) for path in paths if path.suffix in (".yml", ".yaml"))


def reader_of(name: str) -> Reader:
    return next(reader for place, reader in READERS.items() if name == place or name.startswith(place + "/"))


@pytest.mark.parametrize("name", shipped())
def test_every_yaml_file_is_read_by_its_command(name):
    if name in OTHERS:
        assert all(isinstance(part, dict) for part in yaml.safe_load_all((REPOSITORY / name).read_text()))
        return
    reader = reader_of(name)
    config = parse_flags(reader.root, [*reader.flags.split(), "--config", str(REPOSITORY / name)])
    if isinstance(config, Config) and not name.startswith("examples/recipes/base/"):  # whose layout is another file's
        validate(config, ranks_of(name))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_nothing_that_its_base_says(path):
    settings = read_settings(path)
    own = {setting.name for setting in settings if setting.file == path}
    assert {setting.file.parent.name for setting in settings} == {"recipes", "base"}
    assert not own & {setting.name for setting in settings if setting.file != path}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_and_says_how(path):
    """Its comment has the arithmetic of the plan, to the decimal."""
    peak = plan_of(path).peak
    assert peak.total < H100.room_bytes
    heading = rf"# GiB of the {H100.gpu_memory_gib} of an H100, as psft plan counts them"
    said = re.search(rf"{heading}: ([\d.]+)\n#   = (.+)\n", path.read_text())
    terms = dict(reversed(term.split(" ")) for term in said[2].split(" + "))
    assert terms == {part: f"{getattr(peak, part) / GIB:.1f}" for part in PARTS}
    assert said[1] == f"{peak.total / GIB:.1f}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_checkpoint_of_a_recipe_fits_the_host(path):
    """A node of eight H100s has a terabyte or two; half of one is left to all else."""
    line = saving_line(plan_of(path), gpus_per_node=8)
    said = re.fullmatch(r".* each GPU's process writes ([\d.]+) GiB, copied to ([\d.]+) GiB of a node's .*", line)
    each, node = map(float, said.groups())
    assert node == pytest.approx(8 * each, rel=0.01)
    assert 0 < node < 512


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_smallest_layout_that_fits(path):
    plan = plan_of(path)
    smallest = smallest_layout(plan, bytes_per_rank=H100.room_bytes, ranks_per_node=8).config.parallel
    size = plan.config.parallel.model_parallel_size
    # No replica is to go without a record of the step's.
    least = max(smallest.model_parallel_size, plan.world_size // plan.config.batch.global_batch_size)
    # A router may send some ranks more than their share of the tokens: with experts there is more room left.
    assert size == least or (plan.shape.experts and size > least)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_papers_settings(path):
    settings = settings_of(plan_of(path).config)
    assert {name: settings[name] for name in RUNS["psft"]} == RUNS["psft"]


def test_each_model_has_recipes_for_8_64_and_512_gpus():
    sizes = {}
    for path in RECIPES:
        sizes.setdefault(plan_of(path).config.weights.load_hf, set()).add(ranks_of(path.name))
    assert sizes == {name: {8, 64, 512} for name in SHAPES}
