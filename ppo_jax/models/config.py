"""`ModelConfig`: every number and every choice that makes the one decoder into a particular model."""

import dataclasses

from ppo_jax.errors import check
from ppo_jax.models.rope import LongScaling, RopeScaling, YarnScaling

REMATS = ("none", "dots", "full")
_CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("before", "after", "both"),
    "qk_norm": ("none", "head", "projection"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": REMATS,
}
_POSITIVE = (
    "vocab_size num_layers num_heads num_kv_heads head_dim width mlp_width max_positions rope_theta norm_eps init_std "
    "lora_scale"
).split()
_NOT_NEGATIVE = (
    "position_offset local_rope_theta rotary_dim query_pre_attn_scalar attention_softcap final_softcap num_experts "
    "experts_per_token"
).split()
_ONLY = {
    "rotary": {"rope_scaling": None, "rotary_dim": 0, "local_rope_theta": 0.0, "unrotated_layers": ()},
    "learned": {"position_offset": 0},
}
"""What only some positions have, with the values that say nothing."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The defaults are Llama's choices.

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
    position_offset: int = 0  # rows of the table of learned positions that stand before position 0
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # how the frequencies were stretched to a longer context
    rotary_dim: int = 0  # how many numbers of a head are rotated, the first ones; 0: all
    local_rope_theta: float = 0.0  # base in layers with a window, where nothing is stretched; 0: as in the others
    unrotated_layers: tuple[int, ...] = ()  # numbers of layers without positions
    layer_windows: tuple[int, ...] = ()  # by layer: tokens that a token sees, itself included; 0 or (): all before it
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False  # norms multiply by 1 + their scale
    norm_placement: str = "before"  # of attention and MLP, after them (before they are added), or both
    qk_norm: str = "none"  # queries and keys are normalised before they are rotated: each head, or all heads as one
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate x) * up x) instead of down(act(up x))
    num_experts: int = 0  # MLPs, of which each token goes through a few; 0: one, for all tokens
    experts_per_token: int = 0  # how many these are; 0: all of them
    normalize_experts: bool = True  # the weights of a token's experts are divided by their sum
    parallel_residual: bool = False  # the MLP reads what attention reads, instead of what attention has added to
    attention_bias: bool = False  # on query, key and value
    attention_output_bias: bool = True  # on output too, where attention_bias is
    mlp_bias: bool = False
    query_pre_attn_scalar: int = 0  # attention scores are divided by its square root; 0: head_dim
    attention_softcap: float = 0.0  # c: attention scores become c tanh(scores / c); 0: they stay
    final_softcap: float = 0.0  # likewise the logits
    embed_scale: bool = False  # embeddings are multiplied by the square root of the width
    tie_embeddings: bool = True  # the vocabulary projection is the embedding, transposed
    init_std: float = 0.02  # of kernels and embeddings at initialisation
    family: str = ""  # Hugging Face's `model_type` that it is saved as; "": the first one that can express it
    lora_scale: float = 1.0  # of an adapter, where the parameters hold one; see `LoRAConfig.scale`
    dtype: str = "float32"  # of the matrix products; logits, norms' statistics and losses are float32 always
    param_dtype: str = (
        "float32"  # bfloat16: the optimizer keeps what is trained in float32, or small updates would be lost
    )
    remat: str = "dots"  # a backward pass computes again nothing, all but products with a layer's matrices, or layers

    def __post_init__(self) -> None:
        """Fills the derived defaults in and refuses what cannot be."""
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        if not self.head_dim and self.num_heads > 0:
            check("width", self.width, self.width % self.num_heads == 0, f"a multiple of num_heads ({self.num_heads})")
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        for name in ("rotary_dim", "query_pre_attn_scalar"):  # one way to say what is the default
            object.__setattr__(self, name, getattr(self, name) * (getattr(self, name) != self.head_dim))
        object.__setattr__(self, "layer_windows", self.layer_windows if any(self.layer_windows) else ())
        for name in _POSITIVE:
            check(name, getattr(self, name), getattr(self, name) > 0, "a positive number")
        for name in _NOT_NEGATIVE:
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or a positive number")
        for name, allowed in _CHOICES.items():
            check(name, getattr(self, name), getattr(self, name) in allowed, "one of " + ", ".join(allowed))
        on_output, without = self.attention_output_bias, "True with attention_bias=False, which has none anywhere"
        check("attention_output_bias", on_output, on_output or self.attention_bias, without)
        kv_heads, head_dim = self.num_kv_heads, self.head_dim
        check("num_kv_heads", kv_heads, self.num_heads % kv_heads == 0, f"a divisor of num_heads ({self.num_heads})")
        self._check_positions(head_dim)
        self._check_experts()

    def _check_positions(self, head_dim: int) -> None:
        for positions, fields in _ONLY.items():
            for name, nothing in fields.items():
                value, fits = getattr(self, name), self.positions == positions
                check(name, value, fits or value == nothing, f"{nothing} with positions={self.positions}")
        even = self.positions == "learned" or head_dim % 2 == 0
        check("head_dim", head_dim, even, "an even number for rotary positions")
        rotated, layers, windows = self.rotary_dim, range(self.num_layers), self.layer_windows
        check("rotary_dim", rotated, rotated <= head_dim and rotated % 2 == 0, f"an even number, at most {head_dim}")
        stretched = isinstance(self.rope_scaling, YarnScaling)
        check("rope_theta", self.rope_theta, self.rope_theta > 1 or not stretched, "more than 1 for YaRN")
        if isinstance(self.rope_scaling, LongScaling):
            for name in ("short_factors", "long_factors"):
                factors, pairs = getattr(self.rope_scaling, name), self.num_rotated // 2
                check(name, factors, len(factors) == pairs, f"{pairs} numbers, one for each frequency")
        without, expected = self.unrotated_layers, f"different layers, in order, of 0 to {self.num_layers - 1}"
        check("unrotated_layers", without, tuple(sorted(set(without) & set(layers))) == without, expected)
        fits = not windows or (len(windows) == self.num_layers and min(windows) >= 0)
        check("layer_windows", windows, fits, f"{self.num_layers} numbers, one for each layer")
        check("local_rope_theta", self.local_rope_theta, any(windows) or not self.local_rope_theta, "0 without windows")

    def _check_experts(self) -> None:
        object.__setattr__(self, "experts_per_token", self.experts_per_token or self.num_experts)
        chosen, experts = self.experts_per_token, self.num_experts
        check("experts_per_token", chosen, chosen <= experts, f"at most num_experts ({experts})")
        divided = self.normalize_experts
        check("normalize_experts", divided, divided or experts > 0, "True without experts")
        for name, value in {"gated_mlp": True, "mlp_bias": False}.items():
            check(name, getattr(self, name), not experts or getattr(self, name) == value, f"{value} with experts")

    @property
    def num_rotated(self) -> int:
        """How many numbers of a head are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0: all before it."""
        return self.layer_windows[layer] if self.layer_windows else 0
