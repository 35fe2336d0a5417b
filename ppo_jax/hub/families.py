"""Model families: one table of names each, read in both directions, and what their `config.json` says to `ModelConfig`.

A row of a table is a name in their safetensors file and a path in our tree of parameters. `{i}` runs over the layers. A
path with `query+key+value` is their fused matrix: ours stand side by side along the last axis, or head by head. Our
kernels are `[in, out]`: torch's `Linear` stores the transpose, GPT-2's `Conv1D` the same. Rows whose parameter a model
does not have (biases, an untied vocabulary projection, a score) drop out. Paths are those of a `Decoder`, also where it
is a part of a `RewardModel`, and of the head beside it.

A new family is a table, a `Family` and an entry of `FAMILIES`; those after GPT-2 are in `families_gpt.py`. Source:
transformers 5.23.0, `configuration_*.py` and `modeling_*.py` of each.
"""

import dataclasses
from collections.abc import Mapping

from ppo_jax.hub.codecs import (
    UNROTATED,
    Fields,
    Raw,
    either,
    gemma_activation,
    nullable,
    query_scalar,
    read_count,
    same_window,
    some_windows,
)
from ppo_jax.hub.families_gpt import GPT2, GPT_NEOX, OPT
from ppo_jax.hub.family import Family, Row, embedding, linear, norm, without
from ppo_jax.hub.keys import Key, positions_key, words
from ppo_jax.hub.rope import rope_codec
from ppo_jax.models import Decoder, RewardModel

LLAMA = Family(
    architectures={Decoder: "LlamaForCausalLM", RewardModel: "LlamaForSequenceClassification"},
    prefix="model.",
    rows=(
        *embedding("model.embed_tokens", "embed"),
        *norm("model.layers.{i}.input_layernorm", "layer_{i}/attention_norm"),
        *linear("model.layers.{i}.self_attn.q_proj", "layer_{i}/attention/query"),
        *linear("model.layers.{i}.self_attn.k_proj", "layer_{i}/attention/key"),
        *linear("model.layers.{i}.self_attn.v_proj", "layer_{i}/attention/value"),
        *linear("model.layers.{i}.self_attn.o_proj", "layer_{i}/attention/output"),
        *norm("model.layers.{i}.post_attention_layernorm", "layer_{i}/mlp_norm"),
        *linear("model.layers.{i}.mlp.gate_proj", "layer_{i}/mlp/gate"),
        *linear("model.layers.{i}.mlp.up_proj", "layer_{i}/mlp/up"),
        *linear("model.layers.{i}.mlp.down_proj", "layer_{i}/mlp/down"),
        *norm("model.norm", "final_norm"),
        *linear("lm_head", "lm_head"),
        *linear("score", "score_head"),
    ),
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    keys={
        "vocab_size": Key("vocab_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "num_kv_heads": Key("num_key_value_heads", default=None),  # null: as many as query heads
        "head_dim": Key("head_dim", default=None),  # null: hidden_size / num_attention_heads
        "width": Key("hidden_size"),
        "mlp_width": Key("intermediate_size"),
        "max_positions": Key("max_position_embeddings", default=2048),
        "norm_eps": Key("rms_norm_eps", float, 1e-6),
        "activation": Key("hidden_act", str, "silu"),
        "attention_bias": Key("attention_bias", bool, False),
        "mlp_bias": Key("mlp_bias", bool, False),
        "tie_embeddings": Key("tie_word_embeddings", bool, False),
        "init_std": Key("initializer_range", float, 0.02),
    },
    codecs=(rope_codec(),),
    implied={},
    only={"rope_interleaved": (False,)},
    # pretraining_tp cut products in parts, in transformers 4; max_sequence_length is of the first conversions.
    irrelevant=words("attention_dropout is_llama_config pretraining_tp max_sequence_length"),
)

_QK_NORMS = (
    *norm("model.layers.{i}.self_attn.q_norm", "layer_{i}/attention/query_norm"),
    *norm("model.layers.{i}.self_attn.k_norm", "layer_{i}/attention/key_norm"),
)
_NO_BIASES = {field: key for field, key in LLAMA.keys.items() if field not in ("attention_bias", "mlp_bias")}


MISTRAL = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "MistralForCausalLM", RewardModel: "MistralForSequenceClassification"},
    keys={**_NO_BIASES, **positions_key(131_072), "num_kv_heads": Key("num_key_value_heads", default=8)},
    codecs=(same_window(absent=4096), rope_codec()),
    only={},
    irrelevant=words("attention_dropout"),
)


def _qwen_window(raw: Raw, fields: Fields, layer: int) -> bool:
    return layer >= read_count(raw, "max_window_layers", 28)


_QWEN_CODECS = (some_windows(_qwen_window, "max_window_layers", switch=True, absent=4096), rope_codec())

QWEN2 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Qwen2ForCausalLM", RewardModel: "Qwen2ForSequenceClassification"},
    keys={**_NO_BIASES, **positions_key(32_768)},
    codecs=_QWEN_CODECS,
    implied={"attention_bias": True, "attention_output_bias": False},
    only={},
    irrelevant=words("attention_dropout"),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Qwen3ForCausalLM", RewardModel: "Qwen3ForSequenceClassification"},
    rows=(*LLAMA.rows, *_QK_NORMS),
    keys={
        **_NO_BIASES,
        **positions_key(32_768),
        "attention_bias": Key("attention_bias", bool, False),
        "head_dim": Key("head_dim", default=128),
    },
    codecs=_QWEN_CODECS,
    implied={"qk_norm": "head"},
    only={},
    irrelevant=words("attention_dropout"),
)


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of Llama with a mixture of experts, whose names these are within a layer."""
    projections = {"gate": gate, "up": up, "down": down}
    return (
        *without(LLAMA.rows, "gate", "up", "down"),
        *linear(f"model.layers.{{i}}.{router}", "layer_{i}/mlp/router"),
        *(
            row
            for ours, theirs in projections.items()
            for row in linear(f"model.layers.{{i}}.{expert}.{{j}}.{theirs}", f"layer_{{i}}/mlp/expert_{ours}")
        ),
    )


MIXTRAL = dataclasses.replace(
    MISTRAL,
    architectures={Decoder: "MixtralForCausalLM", RewardModel: "MixtralForSequenceClassification"},
    rows=_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    keys={
        **MISTRAL.keys,
        "num_experts": Key("num_local_experts", default=8),
        "experts_per_token": Key("num_experts_per_tok", default=2),
        "norm_eps": Key("rms_norm_eps", float, 1e-5),
    },
    codecs=(same_window(absent=None), rope_codec(theta=1_000_000.0)),
    irrelevant=words("attention_dropout router_aux_loss_coef output_router_logits router_jitter_noise"),
)

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    architectures={Decoder: "Qwen3MoeForCausalLM", RewardModel: "Qwen3MoeForSequenceClassification"},
    rows=(*_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"), *_QK_NORMS),
    keys={
        **QWEN3.keys,
        "num_kv_heads": Key("num_key_value_heads", default=4),
        "head_dim": Key("head_dim", default=None),
        "mlp_width": Key("moe_intermediate_size", default=768),
        "experts_per_token": Key("num_experts_per_tok", default=8),
        "normalize_experts": Key("norm_topk_prob", bool, False),
    },
    codecs=(either("num_experts", "num_experts", "num_local_experts", absent=128), rope_codec()),
    # Layers without experts, of which no model was published.
    only={"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "use_sliding_window": (False,)},
    irrelevant=words(
        "attention_dropout router_aux_loss_coef output_router_logits sliding_window max_window_layers",
        "intermediate_size",  # of layers without experts
    ),
)

SMOLLM3 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "SmolLM3ForCausalLM", RewardModel: "SmolLM3ForSequenceClassification"},
    keys={
        **LLAMA.keys,
        **positions_key(32_768),
        "num_kv_heads": Key("num_key_value_heads", default=4),
        "tie_embeddings": Key("tie_word_embeddings", bool, True),
    },
    codecs=(
        UNROTATED,
        some_windows(lambda raw, fields, layer: layer in fields["unrotated_layers"], switch=True, absent=None),
        rope_codec(theta=2_000_000.0),
    ),
    only={},
    irrelevant=words("attention_dropout pretraining_tp max_window_layers"),
)

OLMO2 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Olmo2ForCausalLM", RewardModel: "Olmo2ForSequenceClassification"},
    rows=(
        *without(LLAMA.rows, "attention_norm", "mlp_norm"),
        *norm("model.layers.{i}.post_attention_layernorm", "layer_{i}/attention_post_norm"),
        *norm("model.layers.{i}.post_feedforward_layernorm", "layer_{i}/mlp_post_norm"),
        *_QK_NORMS,
    ),
    keys={
        **_NO_BIASES,
        "attention_bias": Key("attention_bias", bool, False),
        "norm_eps": Key("rms_norm_eps", float, 1e-5),
    },
    implied={"norm_placement": "after", "qk_norm": "projection"},
    only={},
    irrelevant=words("attention_dropout"),
)

PHI3 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Phi3ForCausalLM", RewardModel: "Phi3ForSequenceClassification"},
    rows=(
        *without(LLAMA.rows, "query", "key", "value", "gate", "up"),
        *linear("model.layers.{i}.self_attn.qkv_proj", "layer_{i}/attention/query+key+value"),
        *linear("model.layers.{i}.mlp.gate_up_proj", "layer_{i}/mlp/gate+up"),
    ),
    keys={**_NO_BIASES, **positions_key(4096), "norm_eps": Key("rms_norm_eps", float, 1e-5)},
    codecs=(
        same_window(absent=None),
        rope_codec(
            partial=("partial_rotary_factor", 1.0),
            kinds={"longrope": "longrope", "su": "longrope", "yarn": "longrope"},
            original=4096,
        ),
    ),
    only={"full_attn_mod": (1,), "interpolate_factor": (1,)},
    # What `auto_map` names is code of the repository, which nobody runs here.
    irrelevant=words("attention_dropout embd_pdrop resid_pdrop auto_map"),
)

GEMMA = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "GemmaForCausalLM", RewardModel: "GemmaForSequenceClassification"},
    keys={
        **{field: key for field, key in _NO_BIASES.items() if field != "activation"},
        **positions_key(8192),
        "num_kv_heads": Key("num_key_value_heads", default=16),
        "head_dim": Key("head_dim", default=256),
        "attention_bias": Key("attention_bias", bool, False),
        "tie_embeddings": Key("tie_word_embeddings", bool, True),
    },
    codecs=(gemma_activation("hidden_act", gelu_has_tanh=True), rope_codec()),
    implied={"norm_unit_offset": True, "embed_scale": True},
    only={"use_bidirectional_attention": (False,)},
    irrelevant=words("attention_dropout hidden_activation"),
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    architectures={Decoder: "Gemma2ForCausalLM", RewardModel: "Gemma2ForSequenceClassification"},
    rows=(
        *without(LLAMA.rows, "mlp_norm"),
        *norm("model.layers.{i}.post_attention_layernorm", "layer_{i}/attention_post_norm"),
        *norm("model.layers.{i}.pre_feedforward_layernorm", "layer_{i}/mlp_norm"),
        *norm("model.layers.{i}.post_feedforward_layernorm", "layer_{i}/mlp_post_norm"),
    ),
    keys={
        **GEMMA.keys,
        "num_kv_heads": Key("num_key_value_heads", default=4),
    },
    codecs=(
        gemma_activation("hidden_activation"),
        query_scalar(absent=256),
        nullable("attention_softcap", "attn_logit_softcapping", float, absent=50.0),
        nullable("final_softcap", "final_logit_softcapping", float, absent=30.0),
        some_windows(lambda raw, fields, layer: layer % 2 == 0, switch=False, absent=4096),
        rope_codec(),
    ),
    implied={**GEMMA.implied, "norm_placement": "both"},
    irrelevant=words("attention_dropout hidden_act"),  # an old copy of hidden_activation
)


def _gemma3_window(raw: Raw, fields: Fields, layer: int) -> bool:
    return (layer + 1) % read_count(raw, "sliding_window_pattern", 6, least=1) != 0


GEMMA3 = dataclasses.replace(
    GEMMA2,
    architectures={Decoder: "Gemma3ForCausalLM", RewardModel: "Gemma3TextForSequenceClassification"},
    rows=(*GEMMA2.rows, *_QK_NORMS),
    keys={**GEMMA2.keys, **positions_key(131_072)},
    codecs=(
        gemma_activation("hidden_activation"),
        query_scalar(absent=256),
        nullable("attention_softcap", "attn_logit_softcapping", float, absent=None),
        nullable("final_softcap", "final_logit_softcapping", float, absent=None),
        some_windows(_gemma3_window, "sliding_window_pattern", switch=False, absent=4096),
        rope_codec(theta=1_000_000.0, local_theta=10_000.0),
    ),
    implied={**GEMMA2.implied, "qk_norm": "head"},
    irrelevant=words("attention_dropout _sliding_window_pattern"),
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
"""`model_type` of `config.json` -> family."""
