"""GPT-2, GPT-NeoX and OPT: layer norms, biases everywhere, MLPs of two layers. See `ppo_jax.hub.families`."""

from ppo_jax.hub.codecs import same_as
from ppo_jax.hub.family import Family, conv1d, embedding, linear, norm
from ppo_jax.hub.keys import Key, positions_key, words
from ppo_jax.hub.rope import rope_codec
from ppo_jax.models import Decoder, RewardModel

GPT2 = Family(
    architectures={Decoder: "GPT2LMHeadModel", RewardModel: "GPT2ForSequenceClassification"},
    prefix="transformer.",
    rows=(
        *embedding("transformer.wte", "embed"),
        *embedding("transformer.wpe", "positions"),
        *norm("transformer.h.{i}.ln_1", "layer_{i}/attention_norm"),
        *conv1d("transformer.h.{i}.attn.c_attn", "layer_{i}/attention/query+key+value"),
        *conv1d("transformer.h.{i}.attn.c_proj", "layer_{i}/attention/output"),
        *norm("transformer.h.{i}.ln_2", "layer_{i}/mlp_norm"),
        *conv1d("transformer.h.{i}.mlp.c_fc", "layer_{i}/mlp/up"),
        *conv1d("transformer.h.{i}.mlp.c_proj", "layer_{i}/mlp/down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "lm_head"),
        *linear("score", "score_head"),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    keys={
        "vocab_size": Key("vocab_size"),
        "num_layers": Key("n_layer"),
        "num_heads": Key("n_head"),
        "width": Key("n_embd"),
        "mlp_width": Key("n_inner", default=None),  # null: 4 x n_embd
        "max_positions": Key("n_positions", default=1024),
        "norm_eps": Key("layer_norm_epsilon", float, 1e-5),
        "activation": Key("activation_function", str, "gelu_new"),
        "tie_embeddings": Key("tie_word_embeddings", bool, True),
        "init_std": Key("initializer_range", float, 0.02),
    },
    codecs=(same_as("width", "hidden_size"),),
    implied={
        "positions": "learned",
        "norm": "layernorm",
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    irrelevant=words(
        "attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn",
        "n_ctx",  # an old copy of n_positions
        "output_past predict_special_tokens",  # of older versions
        # of other models, in folders that everybody's tests use
        "attention_probs_dropout_prob hidden_act hidden_dropout_prob intermediate_size type_vocab_size",
        "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
    ),
)

GPT_NEOX = Family(
    architectures={Decoder: "GPTNeoXForCausalLM", RewardModel: "GPTNeoXForSequenceClassification"},
    prefix="gpt_neox.",
    rows=(
        *embedding("gpt_neox.embed_in", "embed"),
        *norm("gpt_neox.layers.{i}.input_layernorm", "layer_{i}/attention_norm"),
        *linear("gpt_neox.layers.{i}.attention.query_key_value", "layer_{i}/attention/query+key+value", by_head=True),
        *linear("gpt_neox.layers.{i}.attention.dense", "layer_{i}/attention/output"),
        *norm("gpt_neox.layers.{i}.post_attention_layernorm", "layer_{i}/mlp_norm"),
        *linear("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "layer_{i}/mlp/up"),
        *linear("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "layer_{i}/mlp/down"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *linear("embed_out", "lm_head"),
        *linear("score", "score_head"),
    ),
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    keys={
        "vocab_size": Key("vocab_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "width": Key("hidden_size"),
        "mlp_width": Key("intermediate_size"),
        **positions_key(2048),
        "norm_eps": Key("layer_norm_eps", float, 1e-5),
        "activation": Key("hidden_act", str, "gelu"),
        "attention_bias": Key("attention_bias", bool, True),
        "parallel_residual": Key("use_parallel_residual", bool, True),
        "tie_embeddings": Key("tie_word_embeddings", bool, False),
        "init_std": Key("initializer_range", float, 0.02),
    },
    codecs=(rope_codec(theta_key="rotary_emb_base", partial=("rotary_pct", 0.25)),),
    implied={"norm": "layernorm", "gated_mlp": False, "mlp_bias": True},
    only={},
    irrelevant=words("attention_dropout hidden_dropout classifier_dropout"),
)

OPT = Family(
    architectures={Decoder: "OPTForCausalLM", RewardModel: "OPTForSequenceClassification"},
    prefix="model.",
    rows=(
        *embedding("model.decoder.embed_tokens", "embed"),
        *embedding("model.decoder.embed_positions", "positions"),
        *norm("model.decoder.layers.{i}.self_attn_layer_norm", "layer_{i}/attention_norm"),
        *linear("model.decoder.layers.{i}.self_attn.q_proj", "layer_{i}/attention/query"),
        *linear("model.decoder.layers.{i}.self_attn.k_proj", "layer_{i}/attention/key"),
        *linear("model.decoder.layers.{i}.self_attn.v_proj", "layer_{i}/attention/value"),
        *linear("model.decoder.layers.{i}.self_attn.out_proj", "layer_{i}/attention/output"),
        *norm("model.decoder.layers.{i}.final_layer_norm", "layer_{i}/mlp_norm"),
        *linear("model.decoder.layers.{i}.fc1", "layer_{i}/mlp/up"),
        *linear("model.decoder.layers.{i}.fc2", "layer_{i}/mlp/down"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        *linear("lm_head", "lm_head"),
        *linear("score", "score_head"),
    ),
    ignored=(),
    keys={
        "vocab_size": Key("vocab_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "width": Key("hidden_size"),
        "mlp_width": Key("ffn_dim"),
        **positions_key(2048),
        "activation": Key("activation_function", str, "relu"),
        "tie_embeddings": Key("tie_word_embeddings", bool, True),
        "init_std": Key("init_std", float, 0.02),
    },
    codecs=(same_as("width", "word_embed_proj_dim", written=True),),
    implied={**GPT2.implied, "position_offset": 2},
    only={
        "do_layer_norm_before": (True,),  # 350m has its norms after the sum
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    irrelevant=words("dropout attention_dropout activation_dropout layerdrop"),
)
