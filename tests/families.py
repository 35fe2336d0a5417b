"""A small model of every family, and of the choices within it."""

from ppo_jax.models import ModelConfig
from ppo_jax.models.rope import LinearScaling, Llama3Scaling, LongScaling, YarnScaling

SIZES = {"vocab_size": 13, "num_layers": 2, "num_heads": 4, "width": 8, "mlp_width": 6, "max_positions": 10}
GEMMA = {"norm_unit_offset": True, "embed_scale": True, "activation": "gelu_tanh", "norm_placement": "both"}
NEOX = {"norm": "layernorm", "gated_mlp": False, "attention_bias": True, "mlp_bias": True}
CONFIGS = {
    "gpt2": ModelConfig(
        **SIZES,
        positions="learned",
        norm="layernorm",
        norm_eps=3e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gpt2_untied": ModelConfig(
        **SIZES,
        positions="learned",
        norm="layernorm",
        activation="relu",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
        init_std=0.1,
    ),
    "llama": ModelConfig(**SIZES, num_kv_heads=2, head_dim=6, rope_theta=500.0, norm_eps=1e-6),
    "llama_untied": ModelConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_embeddings=False, activation="gelu", init_std=0.3
    ),
    "qwen2": ModelConfig(**SIZES, num_kv_heads=2, attention_bias=True, attention_output_bias=False),
    "qwen3": ModelConfig(**SIZES, num_kv_heads=2, head_dim=6, qk_norm="head"),
    "qwen3_untied": ModelConfig(**SIZES, attention_bias=True, qk_norm="head", tie_embeddings=False),
    "mistral": ModelConfig(**SIZES, num_kv_heads=2, layer_windows=(5, 5), family="mistral"),
    "mistral_without_windows": ModelConfig(**SIZES, family="mistral"),
    "mixtral": ModelConfig(**SIZES, num_kv_heads=2, num_experts=4, experts_per_token=2, tie_embeddings=False),
    "mixtral_window": ModelConfig(**SIZES, num_experts=3, experts_per_token=1, layer_windows=(5, 5)),
    "qwen3_moe": ModelConfig(
        **SIZES, head_dim=6, qk_norm="head", num_experts=5, experts_per_token=3, normalize_experts=False
    ),
    "qwen2_window": ModelConfig(**SIZES, attention_bias=True, attention_output_bias=False, layer_windows=(0, 3)),
    "qwen3_yarn": ModelConfig(**SIZES, head_dim=6, qk_norm="head", rope_scaling=YarnScaling(4.0, 8, 1.1, 16.0, 2.0)),
    "llama3": ModelConfig(**SIZES, head_dim=6, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "llama_linear": ModelConfig(**SIZES, rope_scaling=LinearScaling(2.5)),
    "smollm3": ModelConfig(**SIZES, num_kv_heads=2, unrotated_layers=(1,)),
    "smollm3_window": ModelConfig(**SIZES, unrotated_layers=(1,), layer_windows=(0, 4), mlp_bias=True),
    "olmo2": ModelConfig(**SIZES, norm_placement="after", qk_norm="projection", tie_embeddings=False),
    "phi3": ModelConfig(**SIZES, num_kv_heads=2, head_dim=10, rotary_dim=6, family="phi3"),
    "phi3_long": ModelConfig(
        **SIZES | {"width": 16},
        rope_scaling=LongScaling((1.0, 1.5), (2.0, 30.0), 4096, 1.19),
        layer_windows=(7, 7),
        family="phi3",
    ),
    "gemma": ModelConfig(**SIZES, num_kv_heads=1, norm_unit_offset=True, embed_scale=True, activation="gelu_tanh"),
    "gemma_exact_gelu": ModelConfig(**SIZES, norm_unit_offset=True, embed_scale=True, activation="gelu"),
    "gemma2": ModelConfig(**SIZES, **GEMMA, layer_windows=(3, 0), attention_softcap=50.0, final_softcap=30.0),
    "gemma2_without_caps": ModelConfig(**SIZES, **GEMMA, query_pre_attn_scalar=11, head_dim=256, family="gemma2"),
    "gemma3": ModelConfig(
        **SIZES, **GEMMA, qk_norm="head", layer_windows=(3, 0), local_rope_theta=100.0, rope_scaling=LinearScaling(8.0)
    ),
    "gpt_neox": ModelConfig(**SIZES | {"width": 16}, **NEOX, rotary_dim=2, parallel_residual=True, activation="relu"),
    "gpt_neox_in_sequence": ModelConfig(**SIZES, **NEOX | {"attention_bias": False}, activation="gelu"),
    "opt": ModelConfig(**SIZES, **NEOX, positions="learned", position_offset=2, activation="relu"),
}
FAMILY_OF = {  # the first one that can express it; the rest is named as its family
    "gpt2_untied": "gpt2", "llama_untied": "llama", "qwen3_untied": "qwen3", "mistral_without_windows": "mistral",
    "mixtral_window": "mixtral", "qwen2_window": "qwen2", "qwen3_yarn": "qwen3", "llama3": "llama",
    "llama_linear": "llama", "smollm3_window": "smollm3", "phi3_long": "phi3",
    "gemma_exact_gelu": "gemma", "gemma2_without_caps": "gemma2",
    "gemma3": "gemma3_text", "gpt_neox_in_sequence": "gpt_neox",
}  # fmt: skip
