"""A model's own output layer and loss, taken over on the instance: `GPTModel`, and `HybridModel` where there is one."""

from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_psft.errors import UserError
from megatron_psft.model.end import ask, attach
from megatron_psft.model.shape import ModelShape
from tests.support.layouts import Layout, make_config, rank_of

VOCAB_SIZE = 241  # of 256 columns or more
SHAPE = ModelShape(
    model_type="qwen3",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="float32",
)
ROWS, SEQ_LENGTH = 2, 24

needs_hybrid_model = pytest.mark.skipif(
    find_spec("megatron.core.models.hybrid") is None, reason="this Megatron-Core has no HybridModel"
)


def build_gpt(rank):
    from megatron_psft.model.gpt import build_chunk, transformer_config

    config = make_config(rank.layout)
    megatron_config = transformer_config(SHAPE, config, rank.platform)
    return build_chunk(SHAPE, config, megatron_config, rank.platform, rank.parallel, 0)


def build_hybrid(rank):
    """Layers of attention and MLPs in turn. Its last norm is Transformer Engine's, so ours stands in."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_psft.model.gpt import padded_vocab_size, transformer_config
    from megatron_psft.model.layers import Attention, RMSNorm

    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    layer.self_attention.submodules.core_attention = Attention
    attention = TransformerLayerSubmodules(
        input_layernorm=RMSNorm, self_attention=layer.self_attention, self_attn_bda=layer.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    stack = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    with mock.patch("megatron.core.models.hybrid.hybrid_block.TENorm", RMSNorm):
        return HybridModel(
            config=transformer_config(SHAPE, make_config(rank.layout), rank.platform),
            hybrid_stack_spec=ModuleSpec(module=HybridStack, submodules=stack),
            vocab_size=padded_vocab_size(VOCAB_SIZE, rank.parallel.tensor_size),
            max_sequence_length=SEQ_LENGTH,
            hybrid_layer_pattern="*-*-",
            position_embedding_type="rope",
        )


def measure(build, layout: Layout, fused: bool) -> dict:
    """On one rank: what the attached model answers, and the same from its own logits."""
    from megatron_psft.head.layer import HeadInputs, label_positions

    with rank_of(layout, num_layers=SHAPE.num_layers) as rank:
        model = build(rank)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5, generator=generator)
        tokens, labels = torch.randint(VOCAB_SIZE, (2, ROWS, SEQ_LENGTH), generator=generator)
        mask = torch.rand(ROWS, SEQ_LENGTH, generator=generator) < 0.5
        arguments = (tokens, torch.arange(SEQ_LENGTH).expand(ROWS, -1), None)
        cross_entropy, state = model(*arguments, labels=labels), list(model.state_dict())

        attach(model, vocab_size=VOCAB_SIZE, fused=fused)
        attach(model, vocab_size=VOCAB_SIZE, fused=fused)
        inputs = HeadInputs(
            labels=labels,
            label_positions=label_positions(mask),
            token_loss=lambda stats, part: -stats.log_probs * stats.log_probs.detach(),
        )
        ask(model, lambda found: inputs if torch.equal(found, labels) else None)
        output = model(*arguments, labels=labels)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()

        logits = model(*arguments)  # not asked: all logits, `[b, s, v]`
        shards = [torch.empty_like(logits) for _ in range(layout.tensor)]
        dist.all_gather(shards, logits.detach())
        expected = torch.log_softmax(torch.cat(shards, dim=-1)[..., :VOCAB_SIZE], dim=-1)
        expected = expected.gather(-1, labels[..., None])[..., 0].t()[mask.t()]
        if layout.tensor == 1:
            log_probs = torch.log_softmax(logits[..., :VOCAB_SIZE], dim=-1).gather(-1, labels[..., None])[..., 0]
            (-log_probs * log_probs.detach() * mask).sum().backward()
        return {
            "log_probs": (output.stats.log_probs, expected),
            "loss": (output.loss.detach(), -expected.square().sum()),
            "cross entropy of a pass that is not asked": (model(*arguments, labels=labels), cross_entropy),
            **{
                f"gradient of {name}": (gradients[name], parameter.grad)
                for name, parameter in model.named_parameters()
                if layout.tensor == 1
            },
            "is as it was": type(model.output_layer) is ColumnParallelLinear and list(model.state_dict()) == state,
        }


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, sequence=False)], ids=str)
@pytest.mark.parametrize("build", [build_gpt, pytest.param(build_hybrid, marks=needs_hybrid_model)])
def test_attached_model_answers_as_its_own_logits_say(pool, build, layout, fused):
    for result in pool.run(measure, layout.world_size, build, layout, fused):
        assert result.pop("is as it was")
        assert len(result) > 10 or layout.tensor > 1
        for name, (found, expected) in result.items():
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, name=name: name + text
            )


class Model(LanguageModule):
    """Just as much of one as is looked at before anything is taken over."""

    def __init__(self, output_layer_class=ColumnParallelLinear, **options) -> None:
        torch.nn.Module.__init__(self)
        self.config = SimpleNamespace(**{"mtp_num_layers": None, **options})
        self.post_process = True
        self.output_layer = output_layer_class.__new__(output_layer_class)
        torch.nn.Module.__init__(self.output_layer)


class CappedLinear(ColumnParallelLinear):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(use_mup=True), r"model\.use_mup \(True\) must be False"),
        (Model(mtp_num_layers=1), r"model\.mtp_num_layers \(1\) must be unset"),
        (Model(CappedLinear), r"the output layer \(CappedLinear\) must be Megatron-Core's ColumnParallelLinear itself"),
        (torch.nn.Linear(1, 1), r"the language model \(Linear\) must be a LanguageModule"),
    ],
)
def test_attach_to_other_ends_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        attach(model, vocab_size=VOCAB_SIZE, fused=True)


def test_attach_to_a_language_model_inside_another_takes_over_the_inner_one():
    inner = Model()
    attach(torch.nn.ModuleDict({"language_model": inner}), vocab_size=VOCAB_SIZE, fused=True)
    assert inner.output_layer.forward.__self__ is inner.compute_language_model_loss.__self__ is inner.psft_end


def test_logits_that_a_model_changes_after_its_output_layer_fail():
    model = Model()
    attach(model, vocab_size=VOCAB_SIZE, fused=True)
    ask(model, lambda labels: None)
    handed_on, _ = model.output_layer(torch.zeros(1, 1, 1), weight=torch.zeros(1, 1))
    with pytest.raises(TypeError):
        handed_on * 0.5
