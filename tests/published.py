"""`config.json` of published models, less what says nothing of the model, and how many parameters their authors count.

The configurations are those on the hub, of the repositories that the keys name; the counts are those of their
safetensors files there. For Gemma 3 the file of a text-only model is written out: 27B is published with a vision tower,
whose share is not counted.
"""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model that has been published."""

    parameters: int
    config: dict[str, Any]


def _config(model_type: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocab: int, **others: Any):
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | others


LLAMA3 = {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "attention_bias": False,
    "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "use_sliding_window": False, "attention_dropout": 0.0, "max_window_layers": 70, "sliding_window": 131072,
}  # fmt: skip
MOE = {
    "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 40960, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 128,
    "num_experts_per_tok": 8, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False,
}  # fmt: skip
GEMMA2 = {
    "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False,
    "attention_dropout": 0.0, "cache_implementation": "hybrid", "eos_token_id": 1,
}  # fmt: skip
GEMMA3 = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_theta": 1000000,
    "sliding_window_pattern": 6,
}  # fmt: skip
NEOX = {
    "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu",
    "layer_norm_eps": 1e-05, "use_parallel_residual": True, "tie_word_embeddings": False,
}  # fmt: skip
OPT = {
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "prefix": "</s>",
}  # fmt: skip

PUBLISHED = {
    "meta-llama/Llama-3.1-8B": Published(
        8_030_261_248, _config("llama", 32, 4096, 14336, 32, 8, 128256, **LLAMA3, tie_word_embeddings=False)
    ),
    "meta-llama/Llama-3.1-70B": Published(
        70_553_706_496, _config("llama", 80, 8192, 28672, 64, 8, 128256, **LLAMA3, tie_word_embeddings=False)
    ),
    "meta-llama/Llama-3.1-405B": Published(
        405_853_388_800, _config("llama", 126, 16384, 53248, 128, 8, 128256, **LLAMA3, tie_word_embeddings=False)
    ),
    "meta-llama/Llama-3.2-1B": Published(
        1_235_814_400, _config("llama", 16, 2048, 8192, 32, 8, 128256, **LLAMA3, head_dim=64, tie_word_embeddings=True)
    ),
    "mistralai/Mistral-7B-v0.1": Published(
        7_241_732_096,
        _config(
            "mistral", 32, 4096, 14336, 32, 8, 32000, sliding_window=4096, max_position_embeddings=32768,
            rms_norm_eps=1e-05, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False,
        ),
    ),
    "Qwen/Qwen2.5-0.5B": Published(
        494_032_768, _config("qwen2", 24, 896, 4864, 14, 2, 151936, **QWEN, tie_word_embeddings=True)
    ),
    "Qwen/Qwen2.5-72B": Published(
        72_706_203_648, _config("qwen2", 80, 8192, 29568, 64, 8, 152064, **QWEN, tie_word_embeddings=False)
    ),
    "Qwen/Qwen3-8B": Published(
        8_190_735_360,
        _config(
            "qwen3", 36, 4096, 12288, 32, 8, 151936, **QWEN | {"sliding_window": None}, head_dim=128,
            attention_bias=False, rope_scaling=None, tie_word_embeddings=False,
        ),
    ),
    "Qwen/Qwen3-30B-A3B": Published(
        30_532_122_624,
        _config(
            "qwen3_moe", 48, 2048, 6144, 32, 4, 151936, **MOE, moe_intermediate_size=768, max_window_layers=48
        ),
    ),
    "Qwen/Qwen3-235B-A22B": Published(
        235_093_634_560,
        _config(
            "qwen3_moe", 94, 4096, 12288, 64, 4, 151936, **MOE, moe_intermediate_size=1536, max_window_layers=94
        ),
    ),
    "mistralai/Mixtral-8x7B-v0.1": Published(
        46_702_792_704,
        _config(
            "mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-05,
            rope_theta=1000000.0, sliding_window=None, max_position_embeddings=32768, output_router_logits=False,
            router_aux_loss_coef=0.02, attention_dropout=0.0, hidden_act="silu", tie_word_embeddings=False,
        ),
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        3_075_098_624,
        _config(
            "smollm3", 36, 2048, 11008, 16, 4, 128256, max_position_embeddings=65536, rope_theta=5000000.0,
            rms_norm_eps=1e-06, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False,
            sliding_window=None, layer_types=["full_attention"] * 36, max_window_layers=28, pretraining_tp=2,
            attention_bias=False, mlp_bias=False, rope_scaling=None, hidden_act="silu",
        ),
    ),
    "allenai/OLMo-2-1124-7B": Published(
        7_298_617_344,
        _config(
            "olmo2", 32, 4096, 11008, 32, 32, 100352, max_position_embeddings=4096, rms_norm_eps=1e-06,
            rope_theta=500000, rope_scaling=None, attention_bias=False, hidden_act="silu", tie_word_embeddings=False,
        ),
    ),
    "microsoft/Phi-3-mini-4k-instruct": Published(
        3_821_079_552,
        _config(
            "phi3", 32, 3072, 8192, 32, 32, 32064, max_position_embeddings=4096, sliding_window=2047,
            original_max_position_embeddings=4096, rms_norm_eps=1e-05, rope_theta=10000.0, rope_scaling=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attention_bias=False, hidden_act="silu", tie_word_embeddings=False,
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        ),
    ),
    "google/gemma-7b": Published(
        8_537_680_896,
        _config(
            "gemma", 28, 3072, 24576, 16, 16, 256000, head_dim=256, hidden_act="gelu", hidden_activation=None,
            max_position_embeddings=8192, rms_norm_eps=1e-06, rope_theta=10000.0, attention_bias=False,
        ),
    ),
    "google/gemma-2-27b": Published(27_227_128_320, _config("gemma2", 46, 4608, 36864, 32, 16, 256000, **GEMMA2)),
    "google/gemma-3-1b-it": Published(
        999_885_952,
        _config(
            "gemma3_text", 26, 1152, 6912, 4, 1, 262144, **GEMMA3, head_dim=256, query_pre_attn_scalar=256,
            sliding_window=512, rope_scaling=None,
        ),
    ),
    "google/gemma-3-27b-it": Published(
        27_009_346_304,
        _config(
            "gemma3_text", 62, 5376, 21504, 32, 16, 262208, **GEMMA3, head_dim=128, query_pre_attn_scalar=168,
            sliding_window=1024, rope_scaling={"factor": 8.0, "rope_type": "linear"},
        ),
    ),
    "EleutherAI/pythia-6.9b": Published(
        6_857_302_016,
        {name: x for name, x in _config("gpt_neox", 32, 4096, 16384, 32, 0, 50432, **NEOX).items() if x != 0},
    ),
    "facebook/opt-6.7b": Published(
        6_658_473_984,
        {
            "model_type": "opt", "num_hidden_layers": 32, "hidden_size": 4096, "word_embed_proj_dim": 4096,
            "ffn_dim": 16384, "num_attention_heads": 32, "vocab_size": 50272, **OPT,
        },
    ),
}  # fmt: skip
