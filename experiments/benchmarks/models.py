"""The language models that are measured, here and in torch: one shape, random parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.models import Decoder, ModelConfig, RewardModel
from ppo_jax.types import Params

PAD, EOS = 0, 1


def _gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary, num_layers=layers, num_heads=heads, width=width, mlp_width=4 * width,
        max_positions=positions, positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip


SHAPES = {
    "gpt2": _gpt2(12, 768, 12, 50257, 1024),  # the small one: 124 million parameters
    "tiny": _gpt2(6, 384, 6, 8192, 128),  # 13.8 million
    "stories15m": ModelConfig(
        vocab_size=32000, num_layers=6, num_heads=6, width=288, mlp_width=768, max_positions=256
    ),
    "llama-1b": ModelConfig(
        vocab_size=128256, num_layers=16, num_heads=32, num_kv_heads=8, width=2048, mlp_width=8192,
        max_positions=8192, rope_theta=500_000.0,
    ),
}  # fmt: skip


def random_params(model: Decoder | RewardModel, seed: int = 0) -> Params:
    """Parameters as at the beginning of a pretraining."""
    tokens, pad_id = jnp.zeros((1, 2), jnp.int32), (PAD,) if isinstance(model, RewardModel) else ()
    init = jax.jit(lambda key: model.init(key, tokens, tokens == 0, *pad_id)["params"])
    return init(jax.random.key(seed))


def in_torch(model: Decoder | RewardModel, dtype: str) -> Any:
    """The same model in transformers, with random parameters of its own, on the GPU if torch has one."""
    import torch
    import transformers

    from ppo_jax.hub.configs import write_config

    raw = write_config(model, dtype, {"bos_token_id": EOS + 1, "eos_token_id": EOS, "pad_token_id": PAD})
    no_dropout = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if raw["model_type"] == "gpt2"}
    config = transformers.AutoConfig.for_model(**raw | no_dropout)
    is_reward = isinstance(model, RewardModel)
    auto = transformers.AutoModelForSequenceClassification if is_reward else transformers.AutoModelForCausalLM
    built = auto.from_config(config, dtype=getattr(torch, dtype))
    return built.to("cuda" if torch.cuda.is_available() else "cpu")


def weights(config: ModelConfig) -> tuple[int, int]:
    """Numbers that every token is multiplied by: (in the layers, in the vocabulary projection)."""
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = config.width * (heads + config.mlp_width * (3 if config.gated_mlp else 2))
    return config.num_layers * layer, config.width * config.vocab_size


def attention(config: ModelConfig, keys: float) -> float:
    """Floating-point operations of one query over so many keys, in all layers."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * keys
