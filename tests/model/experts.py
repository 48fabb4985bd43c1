"""The shape of a mixture of experts."""

from megatron_psft.model.shape import ExpertShape, ModelShape

SHAPE = ModelShape(
    model_type="qwen3_moe",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=90,
    num_attention_heads=12,
    num_query_groups=12,
    head_dim=8,
    vocab_size=211,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="float32",
    experts=ExpertShape(count=6, per_token=2, ffn_hidden_size=20, normalizes=True, dense_layers=()),
)
