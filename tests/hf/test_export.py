"""What was read leaves bit for bit, in every layout, as a folder that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_psft.errors import UserError
from megatron_psft.hf.export import MAX_SHARD_BYTES, export
from megatron_psft.hf.folder import MANIFEST
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.weights import RandomWeights, SafetensorsFolder
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.layouts import LAYOUTS, rank_of
from tests.support.marks import slow

INDEX = "model.safetensors.index.json"
EXPORT_LAYOUTS = ("one", slow("TP2-SP"), slow("PP2-VPP1"), "TP2-SP-PP2-DP2")
VOCAB_SIZE = 1000  # both of two tensor-parallel ranks have rows of it, and the second one padding too
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)]
MODEL_IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in MODELS]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model(torch.arange(1, 60)[None]).logits.detach()


def import_and_export(
    layout: str,
    jobs: list[tuple[Path, Path]],
    bf16: bool = False,
    random_init: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_folder: Path | None = None,
) -> None:
    """Each job is where from and where to."""
    with rank_of(LAYOUTS[layout]) as rank:
        for source, target in jobs:
            shape = read_shape(source)
            weights = RandomWeights(shape, 5) if random_init else SafetensorsFolder(source, shape)
            chunks, _ = rank.build(source, bf16=bf16, weights=weights)
            export(
                chunks,
                target,
                shape=shape,
                dtype=weights.dtype,
                side_files=SideFiles(model_folder=source, tokenizer_folder=tokenizer_folder or source),
                parallel=rank.parallel,
                max_shard_bytes=max_shard_bytes,
            )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[str, bool, torch.dtype], Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        (family, tied, dtype): tiny.build_model(
            root / f"{family}-{tied}-{dtype}", family, tied=tied, dtype=dtype, vocab_size=VOCAB_SIZE
        )
        for family, tied in MODELS
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.fixture(scope="module", params=EXPORT_LAYOUTS)
def exported(request, pool, sources, tmp_path_factory) -> dict[tuple[str, bool, str], tuple[Path, Path]]:
    """Model and precision to the folder read and the folder written."""
    layout = request.param
    root = tmp_path_factory.mktemp("exported")
    results = {}
    for precision, dtype, bf16 in (
        ("fp32", torch.float32, False),
        ("bf16 in fp32", torch.bfloat16, False),
        ("bf16", torch.bfloat16, True),
    ):
        jobs = {
            (family, tied, precision): (sources[family, tied, dtype], root / f"{family}-{tied}-{precision}")
            for family, tied in MODELS
        }
        pool.run(import_and_export, LAYOUTS[layout].world_size, layout, list(jobs.values()), bf16)
        results |= jobs
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16 in fp32", "bf16"])
@pytest.mark.parametrize(("family", "tied"), MODELS, ids=MODEL_IDS)
def test_import_and_export_are_bit_exact(exported, family, tied, precision):
    """The same names too: a tied head and the padding of the vocabulary stay behind."""
    source, target = exported[family, tied, precision]
    assert_same_tensors(target, source)
    assert ("lm_head.weight" in tensors_of(target)) is not tied
    assert tensors_of(target)["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 64)
    assert [path.name for path in target.parent.glob(target.name + ".*")] == []


@pytest.mark.parametrize(("family", "tied"), MODELS, ids=MODEL_IDS)
def test_transformers_loads_the_folder_and_computes_the_same(exported, family, tied):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        source, target = exported[family, tied, precision]
        assert torch.equal(logits_of(target, dtype), logits_of(source, dtype))
        assert AutoConfig.from_pretrained(target).dtype is dtype
        model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
        assert model.dtype is dtype
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize(
    "layout",
    [
        *("one", "DP2-EP2", "TP2-SP-EP2-ETP1", "TP2-SP-DP2-EP2", "PP2-DP2-EP2-VPP1"),
        *map(slow, ("TP2-SP", "DP4-EP2")),
    ],
)
def test_experts_are_gathered_from_wherever_they_are(pool, tmp_path, layout):
    jobs = []
    for family in tiny.MOE_FAMILIES:
        source = tiny.build_model(tmp_path / family, family, dtype=torch.bfloat16, vocab_size=VOCAB_SIZE)
        jobs.append((source, tmp_path / f"{family}-exported"))
    # Several files, each with a part of the experts of a layer.
    pool.run(import_and_export, LAYOUTS[layout].world_size, layout, jobs, True, False, 100_000)
    for source, target in jobs:
        assert len(list(target.glob("*.safetensors"))) > 3
        assert_same_tensors(target, source)
        assert torch.equal(logits_of(target), logits_of(source))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE_FAMILIES])
def test_vllm_knows_the_model_of_the_folder(pool, tmp_path, family):
    vllm_config = pytest.importorskip("vllm.config")
    source, target = tiny.build_model(tmp_path / "source", family), tmp_path / "target"
    pool.run(import_and_export, 1, "one", [(source, target)])
    model, wanted = vllm_config.ModelConfig(model=str(target)), AutoConfig.from_pretrained(source)
    assert model.architectures == wanted.architectures
    assert model.get_vocab_size() == wanted.vocab_size
    assert model.get_total_num_kv_heads() == wanted.num_key_value_heads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_do_not_depend_on_the_layout(pool, tmp_path, dtype):
    source = tiny.build_model(tmp_path / "source", "qwen2", dtype=getattr(torch, dtype), vocab_size=VOCAB_SIZE)
    folders = []
    for layout in ("one", "TP2-SP", "PP2"):
        folders.append(tmp_path / layout)
        pool.run(import_and_export, LAYOUTS[layout].world_size, layout, [(source, folders[-1])], False, True)
    for folder in folders[1:]:
        assert_same_tensors(folder, folders[0])
    assert not torch.equal(logits_of(folders[0]), logits_of(source))


@pytest.mark.parametrize("layout", ["one", "TP2-SP-PP2"])
@pytest.mark.parametrize("tied", [False, True])
def test_many_files_have_a_right_index(pool, tmp_path, layout, tied):
    limit = 40_000
    source, target = tiny.build_model(tmp_path / "source", "qwen3", tied=tied), tmp_path / "target"
    pool.run(import_and_export, LAYOUTS[layout].world_size, layout, [(source, target)], False, False, limit)
    files = sorted(target.glob("*.safetensors"))
    count = len(files)
    assert count > 5
    assert [path.name for path in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((target / INDEX).read_text())
    expected = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == expected
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(source).values())
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert_same_tensors(target, source)
    assert torch.equal(logits_of(target), logits_of(source))
    SafetensorsFolder(target, read_shape(target))  # and this trainer reads it again


def test_an_earlier_export_is_replaced_and_leaves_nothing_behind(pool, tmp_path):
    first = tiny.build_model(tmp_path / "first", "llama", seed=1)
    second = tiny.build_model(tmp_path / "second", "llama", seed=2)
    target = tmp_path / "target"
    pool.run(import_and_export, 1, "one", [(first, target)], False, False, 40_000)
    assert (target / INDEX).is_file()
    (target / "README.md").write_text("a model card")
    pool.run(import_and_export, 1, "one", [(second, target)])
    names = {"config.json", "generation_config.json", "model.safetensors", MANIFEST, "README.md"}
    assert {path.name for path in target.iterdir()} == names
    assert_same_tensors(target, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "target"]
    modes = {path.stat().st_mode for path in target.iterdir()}
    assert modes == {(target / "README.md").stat().st_mode}  # safetensors would write for the owner alone


def fail_to_export(layout: str, source: Path, target: Path, nothing: Path) -> str:
    with rank_of(LAYOUTS[layout]) as rank:
        chunks, shape = rank.build(source)
        with pytest.raises(UserError) as caught:
            export(
                chunks,
                target,
                shape=shape,
                dtype=torch.float32,
                side_files=SideFiles(model_folder=nothing, tokenizer_folder=nothing),
                parallel=rank.parallel,
            )
    return str(caught.value)


@pytest.mark.parametrize("layout", ["one", "TP2-SP"])
def test_an_export_that_fails_is_all_ranks_error_and_leaves_the_earlier_one_whole(pool, tmp_path, layout):
    first = tiny.build_model(tmp_path / "first", "llama", seed=1)
    second = tiny.build_model(tmp_path / "second", "llama", seed=2)
    target, nothing = tmp_path / "target", tmp_path / "nothing"
    nothing.mkdir()
    pool.run(import_and_export, 1, "one", [(first, target)])
    size = LAYOUTS[layout].world_size
    errors = pool.run(fail_to_export, size, layout, second, target, nothing)  # after the weights
    assert all("nothing/config.json" in error for error in errors)
    assert_same_tensors(target, first)
    (target / "config.json").write_text("{}")
    errors = pool.run(fail_to_export, size, layout, second, target, second)
    assert errors == [errors[0]] * size
    assert f"({target}): config.json has changed since an export wrote it" in errors[0]
    (target / MANIFEST).unlink()
    errors = pool.run(fail_to_export, size, layout, second, target, second)  # before them
    assert all("name an empty or new folder" in error for error in errors)
    assert_same_tensors(target, first)


def test_a_parent_folder_is_created(pool, tmp_path):
    source = tiny.build_model(tmp_path / "source", "llama")
    pool.run(import_and_export, 1, "one", [(source, tmp_path / "a" / "b" / "target")])
    assert_same_tensors(tmp_path / "a" / "b" / "target", source)


# Of a published folder; each with bytes that no writer of JSON would reproduce.
MODEL_FILES = {"generation_config.json": b'{"temperature":0.70 }'}
TOKENIZER_FILES = {
    "special_tokens_map.json": b'{"eos_token":\t"<|im_end|>"}',
    "added_tokens.json": b'{"<|im_end|>" :2}\r\n',
    "chat_template.jinja": b"{{ messages }}\n\n",
    "vocab.json": b'{"a" : 1}',
    "merges.txt": b"#version: 0.2\r\na b",
    "tokenizer.model": b"\x00\xff",
}


def test_side_files_are_copied_byte_for_byte_each_from_its_folder(pool, tmp_path):
    source, tokenizer, target = tmp_path / "source", tmp_path / "tokenizer", tmp_path / "target"
    tiny.build_model(source, "llama")
    tiny.build_tokenizer(tokenizer)
    for folder, files in ((source, MODEL_FILES), (tokenizer, TOKENIZER_FILES)):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    (source / "tokenizer.json").write_text("not the tokenizer of this run")
    (source / "README.md").write_text("of the model that it was made from")
    (tokenizer / "config.json").write_text("of another model")
    (tokenizer / "generation_config.json").write_text("of another model")
    pool.run(import_and_export, 1, "one", [(source, target)], False, False, MAX_SHARD_BYTES, tokenizer)
    names = {*MODEL_FILES, *TOKENIZER_FILES, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == {*names, "config.json", "model.safetensors", MANIFEST}
    for name in names:
        folder = source if name in MODEL_FILES else tokenizer
        assert (target / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_tokenizer_and_its_template_load_from_the_folder(pool, tmp_path):
    source, tokenizer, target = tmp_path / "source", tmp_path / "tokenizer", tmp_path / "target"
    tiny.build_model(source, "llama")
    tiny.build_tokenizer(tokenizer)
    pool.run(import_and_export, 1, "one", [(source, target)], False, False, MAX_SHARD_BYTES, tokenizer)
    messages = [{"role": "user", "content": "add 3 plus 17"}, {"role": "assistant", "content": "twenty"}]
    found, expected = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=True, return_dict=False)
        for folder in (target, tokenizer)
    )
    assert found == expected
    assert len(expected) > 10


@pytest.mark.parametrize("hub_config", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_config_changes_in_nothing_but_its_dtype(pool, tmp_path, family, hub_config):
    source = tiny.build_model(tmp_path / "source", family, dtype=torch.bfloat16, hub_config=hub_config)
    config = json.loads((source / "config.json").read_text())
    config["something_new"] = {"ü": [1, None, 0.1]}
    (source / "config.json").write_text(json.dumps(config))
    pool.run(import_and_export, 1, "one", [(source, tmp_path / "target")])
    found = json.loads((tmp_path / "target" / "config.json").read_text())
    assert found.pop("torch_dtype") == "bfloat16"
    assert "dtype" not in found
    expected = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    assert found == expected
