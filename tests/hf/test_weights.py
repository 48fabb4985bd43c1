"""Weights are read from safetensors slice by slice, or drawn alike in every layout; anything odd is refused by name."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_psft.errors import UserError
from megatron_psft.hf.mapping import Piece, hf_tensors
from megatron_psft.hf.weights import RandomWeights, SafetensorsFolder
from megatron_psft.model.shape import read_shape
from tests.support import tiny
from tests.support.layouts import Layout, rank_of

INDEX = "model.safetensors.index.json"


def open_folder(folder: Path) -> SafetensorsFolder:
    return SafetensorsFolder(folder, read_shape(folder))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.build_model(tmp_path / "model", "qwen2", num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tiny.build_model(tmp_path / "sharded", "qwen2", num_hidden_layers=2, shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites the one file of `folder`; None takes a tensor out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("name", ["folder", "sharded"])
def test_every_tensor_reads_as_it_stands_in_the_files(request, name):
    folder = request.getfixturevalue(name)
    source = open_folder(folder)
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(source.read(Piece(name, (0, len(tensor)))), tensor)


def test_a_block_is_rows_and_columns(folder):
    source, name = open_folder(folder), "model.layers.1.mlp.down_proj.weight"
    expected = tensors_of(folder)[name]
    assert torch.equal(source.read(Piece(name, (3, 7), (10, 20))), expected[3:7, 10:20])
    assert torch.equal(source.read(Piece(name, (3, 7))), expected[3:7])
    assert torch.equal(source.read(Piece("model.norm.weight", (1, 4))), tensors_of(folder)["model.norm.weight"][1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_files(tmp_path, dtype):
    folder = tiny.build_model(tmp_path, "llama", dtype=dtype)
    assert open_folder(folder).dtype is dtype


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_by_name_and_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"pickled weights \({name}\).*convert them to safetensors"):
        open_folder(folder)


def test_pickled_weights_beside_safetensors_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert open_folder(folder).dtype is torch.float32


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds no model.safetensors and no model.safetensors.index.json; .*random-init"
    ):
        open_folder(folder)


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, **{"model.layers.1.self_attn.q_proj.bias": None})
    with pytest.raises(UserError, match=r"lacks model.layers.1.self_attn.q_proj.bias; a qwen2 checkpoint must have"):
        open_folder(folder)


def test_many_missing_tensors_are_counted(folder):
    change_tensors(folder, **{name: None for name in tensors_of(folder) if ".layers.1." in name})
    with pytest.raises(UserError, match=r"lacks (model\.layers\.1\.\S+, ){2}model\.layers\.1\.\S+ and 9 more"):
        open_folder(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.2.input_layernorm.weight", "score.weight"]
)
def test_an_unknown_tensor_is_named(folder, name):
    change_tensors(folder, **{name: torch.ones(64)})
    with pytest.raises(UserError, match=f"holds {name}, which a qwen2 model does not use"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("model.embed_tokens.weight", (210, 64), (211, 64)),
        ("model.layers.1.mlp.down_proj.weight", (96, 64), (64, 96)),
        ("model.norm.weight", (64, 1), (64,)),
    ],
)
def test_a_tensor_of_another_size_is_named_with_both_sizes(folder, name, found, expected):
    change_tensors(folder, **{name: torch.ones(found)})
    with pytest.raises(UserError) as caught:
        open_folder(folder)
    assert f"{name} is {found}, but config.json makes it {expected}" in str(caught.value)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, kept_bytes):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept_bytes])
    with pytest.raises(UserError, match=f"{path} must be a readable safetensors file"):
        open_folder(folder)


def test_index_that_names_a_missing_file_is_an_error_naming_it(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(UserError, match=f"{path} must be a readable safetensors file"):
        open_folder(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "null", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(UserError) as caught:
        open_folder(sharded)
    assert str(sharded / INDEX) in str(caught.value)


def test_index_that_lists_a_tensor_of_no_file_is_an_error_naming_it(sharded):
    index = json.loads((sharded / INDEX).read_text())
    path = sharded / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file({"lm_head.weight": tensors_of(sharded)["lm_head.weight"], **tensors}, path)
    with pytest.raises(UserError, match=r"lacks model.norm.weight"):
        open_folder(sharded)


def test_a_single_file_goes_before_an_index_as_for_transformers(sharded):
    """`save_pretrained` in few files, over an earlier one in many, leaves the earlier index behind."""
    folder = tiny.build_model(sharded, "qwen2", num_hidden_layers=2, seed=9)
    assert (folder / INDEX).is_file()
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    source = open_folder(folder)
    for name, dims in hf_tensors(read_shape(folder)).items():
        assert torch.equal(source.read(Piece(name, (0, dims[0]))), theirs[name])


def test_old_rotary_tables_are_ignored(folder):
    change_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert open_folder(folder).dtype is torch.float32


def test_a_head_equal_to_the_tied_embedding_is_ignored(tmp_path):
    folder = tiny.build_model(tmp_path, "qwen2", tied=True)
    change_tensors(folder, **{"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"].clone()})
    assert open_folder(folder).dtype is torch.float32


def test_a_head_that_differs_from_the_tied_embedding_is_not_dropped_in_silence(tmp_path):
    """transformers 5 keeps it, with a warning; a model trained without it would be another one."""
    folder = tiny.build_model(tmp_path, "qwen2", tied=True)
    change_tensors(folder, **{"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        open_folder(folder)


@pytest.fixture
def shape(folder):
    return read_shape(folder)


def draw(shape, name: str, seed: int = 7) -> torch.Tensor:
    return RandomWeights(shape, seed).read(Piece(name, (0, hf_tensors(shape)[name][0])))


def test_drawn_weights_have_the_deviation_of_the_config_and_norms_and_biases_are_neutral(shape):
    for name, dims in hf_tensors(shape).items():
        tensor = draw(shape, name)
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones(dims))
        elif name.endswith(".bias"):
            assert torch.equal(tensor, torch.zeros(dims))
        else:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(tensor.mean())) < 0.002


def test_drawn_weights_depend_on_name_and_seed_alone(shape):
    names = [name for name, dims in hf_tensors(shape).items() if len(dims) == 2]
    assert len({draw(shape, name).flatten()[:4].numpy().tobytes() for name in names}) == len(names)
    assert torch.equal(draw(shape, names[1]), draw(shape, names[1]))
    assert not torch.equal(draw(shape, names[1]), draw(shape, names[1], seed=8))


def test_a_block_of_a_drawn_tensor_is_a_block_of_the_whole(shape):
    name = "model.layers.0.mlp.down_proj.weight"
    block = RandomWeights(shape, 7).read(Piece(name, (2, 5), (30, 40)))
    assert torch.equal(block, draw(shape, name)[2:5, 30:40])


class RecordingSource:
    """Remembers which blocks were asked for."""

    def __init__(self, source) -> None:
        self._source = source
        self.blocks: list[Piece] = []

    def read(self, piece: Piece) -> torch.Tensor:
        self.blocks.append(piece)
        return self._source.read(piece)


def record_reads(layout: Layout, folder: Path) -> dict:
    from megatron_psft.model.parameters import named_parameters

    with rank_of(layout) as rank:
        source = RecordingSource(open_folder(folder))
        chunks, _ = rank.build(folder, weights=source)
        parameters = dict(named_parameters(chunks))
        return {
            "blocks": source.blocks,
            "tensor_rank": rank.parallel.tensor_rank,
            "elements": {name: parameter.numel() for name, parameter in parameters.items()},
            "is_finite": all(bool(parameter.isfinite().all()) for parameter in parameters.values()),
        }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2), Layout(pipeline=2, per_chunk=1), Layout(tensor=2, pipeline=2)], ids=str
)
def test_ranks_read_their_own_slices_and_nothing_else(pool, tmp_path, layout, tied):
    folder = tiny.build_model(tmp_path, "qwen3", tied=tied)
    counts = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(folder).items()}
    for result in pool.run(record_reads, layout.world_size, layout, folder):
        for piece in result["blocks"]:
            counts[piece.name][piece.index] += 1
        # The first rank has all 211 rows of the vocabulary, a second one nothing but padding.
        vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"} & set(result["elements"])
        expected = sum(count for name, count in result["elements"].items() if name not in vocabulary)
        expected += len(vocabulary) * (211 * 64 if result["tensor_rank"] == 0 else 0)
        assert sum(counts[piece.name][piece.index].numel() for piece in result["blocks"]) == expected
        assert result["is_finite"]
    for name, count in counts.items():
        copies = layout.tensor if name.endswith("norm.weight") else 1
        if tied and layout.pipeline > 1 and name == "model.embed_tokens.weight":
            copies = 2  # the last stage has one of its own
        assert count.eq(copies).all(), name


@pytest.mark.parametrize(
    "layout", [Layout(data=2, expert=2), Layout(tensor=2, expert=2, expert_tensor=1), Layout(tensor=2)], ids=str
)
def test_ranks_read_their_own_experts_and_nothing_of_the_others(pool, tmp_path, layout):
    folder = tiny.build_model(tmp_path, "qwen3_moe")
    experts = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(folder).items() if ".experts." in name}
    assert len(experts) == 3 * 3 * 8, "three layers of eight experts"
    for result in pool.run(record_reads, layout.world_size, layout, folder):
        for piece in result["blocks"]:
            if piece.name in experts:
                experts[piece.name][piece.index] += 1
        assert result["is_finite"]
        own = sum(count for name, count in result["elements"].items() if ".experts." in name)
        assert own == sum(count.numel() for count in experts.values()) / 2
    assert all(count.eq(1).all() for count in experts.values())


def test_experts_in_one_module_go_by_their_numbers_too():
    """As Transformer Engine has them: `weight0` is the first of this rank's, and not of the model's."""
    from megatron_psft.model.parameters import named_parameters

    linear, layer, chunk = (torch.nn.Module() for _ in range(3))
    for index in range(2):
        linear.register_parameter(f"weight{index}", torch.nn.Parameter(torch.full((1,), float(index))))
    layer.layer_number = 3
    layer.mlp = torch.nn.Module()
    layer.mlp.local_expert_indices = [4, 5]
    layer.mlp.experts = torch.nn.Module()
    layer.mlp.experts.linear_fc1 = linear
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    found = {name: parameter.item() for name, parameter in named_parameters([chunk])}
    assert found == {f"decoder.layers.2.mlp.experts.{expert}.linear_fc1.weight": expert - 4.0 for expert in (4, 5)}
