"""What a shape says of parameters, against models that are built."""

from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.layouts import Layout, rank_of

FAMILIES = (*tiny.FAMILIES, *tiny.MOE_FAMILIES)


def measure(folders: list[Path], tensor_size: int) -> list[tuple]:
    """On one rank, of each model: its shape, and the dimensions of all parameters by their names."""
    from megatron_psft.model.parameters import named_parameters

    models = []
    with rank_of(Layout(tensor=tensor_size)) as rank:
        for folder in folders:
            chunks, shape = rank.build(folder)
            models.append((shape, {name: tuple(parameter.shape) for name, parameter in named_parameters(chunks)}))
    return models


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_shape_lists_the_parameters_of_every_layer_and_which_are_cut(pool, tmp_path, tensor_size):
    from megatron_psft.model.parameters import is_cut

    folders = [tiny.build_model(tmp_path / family, family) for family in FAMILIES]
    for shape, found in pool.run(measure, tensor_size, folders, tensor_size)[0]:
        for layer in range(shape.num_layers):
            prefix = f"decoder.layers.{layer}."
            own = {name.removeprefix(prefix): dims for name, dims in found.items() if name.startswith(prefix)}
            listed = shape.layer_parameters(layer)
            if shape.has_experts(layer):
                listed |= shape.expert_parameters
                own = {name: dims for name, dims in own.items() if ".experts." not in name or ".experts.0." in name}
            assert own.keys() == listed.keys(), shape.model_type
            for name, dims in listed.items():
                size = dims[0] if len(dims) == 1 else dims[0] * dims[1]
                rank_size = own[name][0] if len(dims) == 1 else own[name][0] * own[name][1]
                assert rank_size == size // (tensor_size if is_cut(name) else 1), (shape.model_type, name)
