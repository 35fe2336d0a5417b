"""Model families: one table of names each, read in both directions, and what their `config.json` says to `ModelConfig`.

A row of a table is a name in their safetensors file and a path in our tree of parameters. `{i}` runs over the layers. A
path with `query+key+value` is their fused matrix: ours stand side by side along the last axis. Our kernels are
`[in, out]`: torch's `Linear` stores the transpose, GPT-2's `Conv1D` the same. Rows whose parameter a model does not
have (biases, an untied vocabulary projection, a score) drop out. Paths are those of a `Decoder`, also where it is a
part of a `RewardModel`, and of the head beside it.

A new family is a table, a `Family` and an entry of `FAMILIES`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax.models import Decoder, ModelConfig, RewardModel

Model = Decoder | RewardModel
"""What a folder can hold: a causal language model, or a sequence classifier with one label."""

HEADS = ("lm_head.", "score.")
"""What the names of heads start with: they carry no prefix."""

REQUIRED = object()
"""Default of a config key that has none."""


class Row(NamedTuple):
    """One tensor: its name in the file, its path in our tree, and whether the file holds the transpose."""

    theirs: str
    ours: str
    transposed: bool = False

    def parts(self) -> tuple[str, ...]:
        """Our paths: one, or several that lie side by side in their tensor."""
        fused = next((segment for segment in self.ours.split("/") if "+" in segment), "")
        return tuple(self.ours.replace(fused, name) for name in fused.split("+")) if fused else (self.ours,)


class Key(NamedTuple):
    """A key of `config.json` that a field of `ModelConfig` comes from."""

    name: str
    kind: type = int  # int, float, bool, or str for an activation
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`.

    Attributes:
        architectures: the class of transformers that opens each of our models.
        prefix: what their tensor names start with, where a file without the vocabulary projection may leave it out.
        rows: the table of names.
        ignored: regular expressions of tensors that are no parameters: masks and frequencies, recomputed by everybody.
        keys: field of `ModelConfig` -> key of `config.json`.
        implied: fields of `ModelConfig` that every model of the family has, and that no key says.
        only: keys with the values that we can compute; any other value is an error.
        irrelevant: keys that change nothing in the logits (dropout: training here uses none).
    """

    architectures: Mapping[type, str]
    prefix: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]
    keys: Mapping[str, Key]
    implied: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    irrelevant: frozenset[str]


def words(*lines: str) -> frozenset[str]:
    """All words of some lines."""
    return frozenset(" ".join(lines).split())


def _embedding(theirs: str, ours: str) -> tuple[Row, ...]:
    return (Row(f"{theirs}.weight", f"{ours}/embedding"),)


def _norm(theirs: str, ours: str) -> tuple[Row, ...]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def _linear(theirs: str, ours: str) -> tuple[Row, ...]:
    return Row(f"{theirs}.weight", f"{ours}/kernel", transposed=True), Row(f"{theirs}.bias", f"{ours}/bias")


def _conv1d(theirs: str, ours: str) -> tuple[Row, ...]:
    return Row(f"{theirs}.weight", f"{ours}/kernel"), Row(f"{theirs}.bias", f"{ours}/bias")


ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu": ("gelu", "gelu_python"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
}
"""Our activation -> theirs that are the same function; the first one is written."""

GPT2 = Family(
    architectures={Decoder: "GPT2LMHeadModel", RewardModel: "GPT2ForSequenceClassification"},
    prefix="transformer.",
    rows=(
        *_embedding("transformer.wte", "embed"),
        *_embedding("transformer.wpe", "positions"),
        *_norm("transformer.h.{i}.ln_1", "layer_{i}/attention_norm"),
        *_conv1d("transformer.h.{i}.attn.c_attn", "layer_{i}/attention/query+key+value"),
        *_conv1d("transformer.h.{i}.attn.c_proj", "layer_{i}/attention/output"),
        *_norm("transformer.h.{i}.ln_2", "layer_{i}/mlp_norm"),
        *_conv1d("transformer.h.{i}.mlp.c_fc", "layer_{i}/mlp/up"),
        *_conv1d("transformer.h.{i}.mlp.c_proj", "layer_{i}/mlp/down"),
        *_norm("transformer.ln_f", "final_norm"),
        *_linear("lm_head", "lm_head"),
        *_linear("score", "score_head"),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    keys={
        "vocab_size": Key("vocab_size"),
        "num_layers": Key("n_layer"),
        "num_heads": Key("n_head"),
        "width": Key("n_embd"),
        "mlp_width": Key("n_inner", default=None),  # null: 4 x n_embd
        "max_positions": Key("n_positions"),
        "norm_eps": Key("layer_norm_epsilon", float, 1e-5),
        "activation": Key("activation_function", str, "gelu_new"),
        "tie_embeddings": Key("tie_word_embeddings", bool, True),
        "init_std": Key("initializer_range", float, 0.02),
    },
    implied={
        "positions": "learned",
        "norm": "layernorm",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": False,
        "mlp_bias": True,
    },
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    irrelevant=words(
        "attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn",
        "n_ctx",  # an old copy of n_positions
        "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
    ),
)

LLAMA = Family(
    architectures={Decoder: "LlamaForCausalLM", RewardModel: "LlamaForSequenceClassification"},
    prefix="model.",
    rows=(
        *_embedding("model.embed_tokens", "embed"),
        *_norm("model.layers.{i}.input_layernorm", "layer_{i}/attention_norm"),
        *_linear("model.layers.{i}.self_attn.q_proj", "layer_{i}/attention/query"),
        *_linear("model.layers.{i}.self_attn.k_proj", "layer_{i}/attention/key"),
        *_linear("model.layers.{i}.self_attn.v_proj", "layer_{i}/attention/value"),
        *_linear("model.layers.{i}.self_attn.o_proj", "layer_{i}/attention/output"),
        *_norm("model.layers.{i}.post_attention_layernorm", "layer_{i}/mlp_norm"),
        *_linear("model.layers.{i}.mlp.gate_proj", "layer_{i}/mlp/gate"),
        *_linear("model.layers.{i}.mlp.up_proj", "layer_{i}/mlp/up"),
        *_linear("model.layers.{i}.mlp.down_proj", "layer_{i}/mlp/down"),
        *_norm("model.norm", "final_norm"),
        *_linear("lm_head", "lm_head"),
        *_linear("score", "score_head"),
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
        "max_positions": Key("max_position_embeddings"),
        "norm_eps": Key("rms_norm_eps", float, 1e-6),
        "activation": Key("hidden_act", str, "silu"),
        "attention_bias": Key("attention_bias", bool, False),
        "mlp_bias": Key("mlp_bias", bool, False),
        "rope_theta": Key("rope_theta", float, 10_000.0),
        "tie_embeddings": Key("tie_word_embeddings", bool, False),
        "init_std": Key("initializer_range", float, 0.02),
    },
    implied={
        "positions": "rotary",
        "norm": "rmsnorm",
        "gated_mlp": True,
        "attention_output_bias": True,
        "qk_norm": False,
    },
    only={"pretraining_tp": (1,), "rope_interleaved": (False,), "partial_rotary_factor": (1,)},
    irrelevant=words("attention_dropout is_llama_config"),
)

_QWEN_ONLY = {"use_sliding_window": (False,), "layer_types": ("full_attention",), "partial_rotary_factor": (1,)}
_QWEN_IRRELEVANT = words("attention_dropout sliding_window max_window_layers")  # without use_sliding_window

QWEN2 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Qwen2ForCausalLM", RewardModel: "Qwen2ForSequenceClassification"},
    keys={field: key for field, key in LLAMA.keys.items() if field not in ("attention_bias", "mlp_bias")},
    implied={**LLAMA.implied, "attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    only=_QWEN_ONLY,
    irrelevant=_QWEN_IRRELEVANT,
)

QWEN3 = dataclasses.replace(
    LLAMA,
    architectures={Decoder: "Qwen3ForCausalLM", RewardModel: "Qwen3ForSequenceClassification"},
    rows=(
        *LLAMA.rows,
        *_norm("model.layers.{i}.self_attn.q_norm", "layer_{i}/attention/query_norm"),
        *_norm("model.layers.{i}.self_attn.k_norm", "layer_{i}/attention/key_norm"),
    ),
    keys={field: key for field, key in LLAMA.keys.items() if field != "mlp_bias"}
    | {"head_dim": Key("head_dim", default=128)},
    implied={**LLAMA.implied, "qk_norm": True, "mlp_bias": False},
    only=_QWEN_ONLY,
    irrelevant=_QWEN_IRRELEVANT,
)

FAMILIES: Mapping[str, Family] = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
"""`model_type` of `config.json` -> family."""


def family_that_holds(config: ModelConfig) -> str | None:
    """The first `model_type` whose files can express this model, or None."""
    if config.width % config.num_heads:
        return None  # their classes refuse it, even where head_dim is given
    derived = {"num_kv_heads": config.num_heads, "head_dim": config.width // config.num_heads}
    for model_type, family in FAMILIES.items():
        unsaid = {field: value for field, value in derived.items() if field not in family.keys}
        if all(getattr(config, field) == value for field, value in {**family.implied, **unsaid}.items()):
            return model_type
    return None
