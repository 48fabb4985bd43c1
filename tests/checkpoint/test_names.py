"""Names of a checkpoint's tensors: those of either kind of layers, and of former releases."""

import pytest

from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.model import gpt
from tests.support import tiny
from tests.support.cli import run_cli
from tests.support.runs import forget_steps_from, inputs, metrics_of, train

__all__ = ["inputs"]  # the fixture

FLAGS = ("--train-iters", "4", "--save-interval", "3")


@pytest.mark.slow
@pytest.mark.both
def test_a_checkpoint_of_a_mixture_has_the_names_of_transformer_engine_and_former_ones_are_read(pool, tmp_path, inputs):
    """Its second layer has a plain MLP, whose norm keeps its name."""
    model = tiny.build_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    argv = inputs.argv(tmp_path / "former", *FLAGS, "--load-hf", str(model))
    assert pool.run(stored_by_a_former_release, 1, argv) == [0]
    forget_steps_from(tmp_path / "former", 4)
    train(pool, 1, argv)
    train(pool, 1, inputs.argv(tmp_path / "present", *FLAGS, "--load-hf", str(model)))
    assert metrics_of(tmp_path / "former") == metrics_of(tmp_path / "present")
    former, present = (names_of(tmp_path / run / "step_0000003") for run in ("former", "present"))
    norms = {"decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"}
    assert norms <= present
    assert former == present
    assert b"decoder.layers.0.mlp.linear_fc1.layer_norm" in (tmp_path / "former/step_0000003/.metadata").read_bytes()


def names_of(checkpoint) -> set[str]:
    return set(DataReader(checkpoint).read_metadata().state_dict_metadata)


def stored_by_a_former_release(argv: list[str]) -> int:
    build = gpt._portable_layer

    def former(*args, **kwargs):
        spec = build(*args, **kwargs)
        spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        return spec

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "_portable_layer", former)
        return run_cli(argv).code
