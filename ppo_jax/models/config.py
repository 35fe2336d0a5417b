"""`ModelConfig`: every number and every choice that makes the one decoder into a particular model."""

import dataclasses

from ppo_jax.errors import check

_CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    "vocab_size num_layers num_heads num_kv_heads head_dim width mlp_width max_positions rope_theta norm_eps init_std "
    "lora_scale"
).split()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with pre-normalisation. The defaults are Llama's choices.

    Raises:
        InputError: a field outside its range, by name, with its value and what was expected.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    mlp_width: int
    max_positions: int
    num_kv_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: width / num_heads
    positions: str = "rotary"
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate x) * up x) instead of down(act(up x))
    attention_bias: bool = False  # on query, key and value
    attention_output_bias: bool = True  # on output too, where attention_bias is
    qk_norm: bool = False  # queries and keys are normalised, each head by itself, before they are rotated
    mlp_bias: bool = False
    tie_embeddings: bool = True  # the vocabulary projection is the embedding, transposed
    init_std: float = 0.02  # of kernels and embeddings at initialisation
    lora_scale: float = 1.0  # of an adapter, where the parameters hold one; see `LoRAConfig.scale`
    dtype: str = "float32"  # of the matrix products; logits, norms' statistics and losses are float32 always
    param_dtype: str = (
        "float32"  # bfloat16: the optimizer keeps what is trained in float32, or small updates would be lost
    )

    def __post_init__(self) -> None:
        """Fills the derived defaults in and refuses what cannot be."""
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        if not self.head_dim and self.num_heads > 0:
            check("width", self.width, self.width % self.num_heads == 0, f"a multiple of num_heads ({self.num_heads})")
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        for name in _POSITIVE:
            check(name, getattr(self, name), getattr(self, name) > 0, "a positive number")
        for name, allowed in _CHOICES.items():
            check(name, getattr(self, name), getattr(self, name) in allowed, "one of " + ", ".join(allowed))
        on_output, without = self.attention_output_bias, "True with attention_bias=False, which has none anywhere"
        check("attention_output_bias", on_output, on_output or self.attention_bias, without)
        kv_heads, head_dim = self.num_kv_heads, self.head_dim
        check("num_kv_heads", kv_heads, self.num_heads % kv_heads == 0, f"a divisor of num_heads ({self.num_heads})")
        check(
            "head_dim",
            head_dim,
            self.positions == "learned" or head_dim % 2 == 0,
            "an even number for rotary positions",
        )
