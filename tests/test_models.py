"""The decoder against goldens of torch, a NumPy oracle, and identities; no torch needed.

Tolerance of logits: the largest error of a token's logits over the largest magnitude among them. A logit near zero has
no relative error to speak of, and softmax sees absolute differences; so the scale is that of the token's own row.
Float32 rounds by 6e-8 and a forward pass of these sizes chains about a hundred such roundings: 5e-7 is usual, 3e-6 the
worst of a thousand draws, 2e-5 leaves room, and 1e-4 is what is promised.
"""

import dataclasses
import itertools
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import hub
from ppo_jax.models import (
    REMATS,
    ActorCritic,
    Decoder,
    LoRAConfig,
    ModelConfig,
    by_output,
    causal_mask,
    empty_cache,
    init_adapter,
    overlay,
    positions_of,
    segment_mask,
    segment_positions,
)
from ppo_jax.models.rope import LinearScaling, Llama3Scaling, LongScaling, YarnScaling, frequencies, rotate
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.sharding import jit_training
from ppo_jax.types import Prompts

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5


def tiny(**changes) -> ModelConfig:
    fields = {"vocab_size": 29, "num_layers": 2, "num_heads": 4, "width": 12, "mlp_width": 20, "max_positions": 16}
    return ModelConfig(**{**fields, "head_dim": 6, **changes})


GPT2_LIKE = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
}


def random_params(rng: np.random.Generator, config: ModelConfig):
    """Every parameter random, large enough for each to matter; norms around one."""
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return np.asarray(1 + 0.3 * drawn if "scale" in str(path[-1]) else 0.3 * drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree["params"])


def left_padded(rng: np.random.Generator, config: ModelConfig, sizes=(9, 5, 1)):
    """Tokens and mask, [3, 9]; the padding is garbage, not zeros."""
    tokens = rng.integers(0, config.vocab_size, (len(sizes), max(sizes)))
    return tokens.astype(np.int32), np.arange(max(sizes)) >= max(sizes) - np.array(sizes)[:, None]


def logits_of(config: ModelConfig, params, tokens, mask) -> np.ndarray:
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens), jnp.asarray(mask)))


def test_remat_saves_memory_and_changes_no_gradient(rng):
    """On a CPU too, where XLA would find that what is to be computed again is there already."""
    config = tiny(num_layers=4, width=48, mlp_width=192, max_positions=64, vocab_size=31)
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (8, 64)))
    grads, temporaries = {}, {}
    for remat in REMATS:
        model = Decoder(dataclasses.replace(config, remat=remat))

        def loss(params, model=model):
            return jnp.mean(jnp.square(model.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))))

        program = jit_training(lambda state, loss=loss: jax.grad(loss)(state), None, None).lower(params).compile()
        temporaries[remat] = program.memory_analysis().temp_size_in_bytes
        grads[remat] = jax.device_get(program(jax.tree.map(jnp.copy, params)))
    # A layer keeps its 14 products and inputs, or its input, of what are some 25 arrays.
    assert temporaries["full"] < 0.75 * temporaries["dots"] < 0.75 * 0.75 * temporaries["none"]
    for remat in ("dots", "full"):  # sums in another order: 64 x 8 terms, of which each has its own rounding
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads[remat], grads["none"])


@pytest.mark.parametrize("kind", ["dense", "experts", "dora"])
def test_what_the_matrices_give_is_not_computed_again(kind, rng):
    experts = {"num_experts": 4, "experts_per_token": 2} if kind == "experts" else {}
    config = tiny(width=96, head_dim=24, mlp_width=192, **experts)
    key, tokens = jax.random.key(0), jnp.asarray(rng.integers(0, config.vocab_size, (2, 16)))
    base = Decoder(config).init(key, tokens, tokens >= 0)["params"]
    params = init_adapter(base, LoRAConfig(rank=2, dora=True), key) if kind == "dora" else base
    costs = {}
    for remat in ("none", "dots"):
        model = Decoder(dataclasses.replace(config, remat=remat))

        def loss(params, model=model):
            return jnp.mean(jnp.square(model.apply({"params": overlay(base, params)}, tokens, tokens >= 0)))

        program = jit_training(lambda state, loss=loss: jax.grad(loss)(state), None, None).lower(params).compile()
        costs[remat] = program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes
    (flops, memory), (fewest, most) = costs["dots"], costs["none"]
    assert flops < 1.1 * fewest  # attention and norms are; a third would be everything
    assert memory < most


def max_relative_error(actual, expected, mask) -> float:
    """Over the real tokens: largest error of a row of logits over the row's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64)[mask], np.asarray(expected, np.float64)[mask]
    return float(np.max(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))


# An oracle: one unpadded sequence, one position and one head at a time, in float64.


def oracle_norm(x, p, config):
    p = p | {"scale": p["scale"] + 1} if config.norm_unit_offset else p
    if config.norm == "layernorm":
        centred = [v - sum(x) / len(x) for v in x]
        size = math.sqrt(sum(v * v for v in centred) / len(x) + config.norm_eps)
        return np.array([v / size * s + b for v, s, b in zip(centred, p["scale"], p["bias"], strict=True)])
    size = math.sqrt(sum(v * v for v in x) / len(x) + config.norm_eps)
    return np.array([v / size * s for v, s in zip(x, p["scale"], strict=True)])


def oracle_dense(x, p):
    y = x @ p["kernel"].astype(np.float64)
    return y + p["bias"] if "bias" in p else y


def oracle_activation(x, name):
    one = {
        "relu": lambda v: max(v, 0.0),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    }[name]
    return np.array([one(v) for v in x])


def oracle_frequency(i, size, theta, scaling, slots):
    """Radians a position of plane i, as the papers write it."""
    plain = theta ** (-2 * i / size)
    match scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original):
            wavelength = 2 * math.pi / plain
            if wavelength < original / high:
                return plain
            if wavelength > original / low:
                return plain / factor
            smooth = (original / wavelength - low) / (high - low)
            return (1 - smooth) * plain / factor + smooth * plain
        case YarnScaling(factor, original, _, fast, slow, truncate):
            ends = [size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
            first, last = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
            ramp = min(max((i - max(first, 0)) / (min(last, size - 1) - max(first, 0)), 0), 1)
            return plain / factor * ramp + plain * (1 - ramp)
        case LongScaling(short, long, original):
            return plain / (long if slots > original else short)[i]


def oracle_rotate(x, position, config, layer, slots):
    """Turns the plane of coordinates (i, i + F) by its angle; what is not rotated passes."""
    local = config.local_rope_theta and config.layer_windows[layer]
    theta, scaling = (config.local_rope_theta, None) if local else (config.rope_theta, config.rope_scaling)
    size = config.rotary_dim or config.head_dim
    y = np.array(x)
    for i in range(size // 2):
        angle = position * oracle_frequency(i, size, theta, scaling, slots)
        turn = np.exp(1j * angle) * complex(x[i], x[i + size // 2]) * getattr(scaling, "magnitude", 1.0)
        y[i], y[i + size // 2] = turn.real, turn.imag
    return y


def oracle_cap(x, cap):
    return cap * math.tanh(x / cap) if cap else x


def oracle_attention(xs, p, config, layer, slots):
    def heads(name, count, turned):
        rows = [oracle_dense(x, p[name]) for x in xs]
        if turned and config.qk_norm == "projection":
            rows = [oracle_norm(row, p[f"{name}_norm"], config) for row in rows]
        rows = [row.reshape(count, config.head_dim) for row in rows]
        if turned and config.qk_norm == "head":
            rows = [[oracle_norm(h, p[f"{name}_norm"], config) for h in row] for row in rows]
        if turned and config.positions == "rotary" and layer not in config.unrotated_layers:
            rows = [[oracle_rotate(h, t, config, layer, slots) for h in row] for t, row in enumerate(rows)]
        return rows

    query = heads("query", config.num_heads, True)
    key, value = heads("key", config.num_kv_heads, True), heads("value", config.num_kv_heads, False)
    out = []
    window = (config.layer_windows or [0] * config.num_layers)[layer] or len(xs)
    scale = 1 / math.sqrt(config.query_pre_attn_scalar or config.head_dim)
    for t in range(len(xs)):
        mixed, seen = [], range(max(0, t - window + 1), t + 1)
        for n in range(config.num_heads):
            shared = n * config.num_kv_heads // config.num_heads
            scores = [query[t][n] @ key[s][shared] * scale for s in seen]
            scores = np.array([oracle_cap(score, config.attention_softcap) for score in scores])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(weight * value[s][shared] for weight, s in zip(weights, seen, strict=True)))
        out.append(oracle_dense(np.concatenate(mixed), p["output"]))
    return out


def oracle_mlp(x, p, config):
    up = oracle_dense(x, p["up"])
    if config.gated_mlp:
        inner = oracle_activation(oracle_dense(x, p["gate"]), config.activation) * up
    else:
        inner = oracle_activation(up, config.activation)
    return oracle_dense(inner, p["down"])


def oracle_experts(x, p, config):
    """Every expert apart; those with the greatest weights add up."""
    scores = np.exp(oracle_dense(x, p["router"]))
    weights = dict(enumerate(scores / scores.sum()))
    chosen = sorted(weights, key=weights.get, reverse=True)[: config.experts_per_token]
    whole = sum(weights[e] for e in chosen) if config.normalize_experts else 1.0
    y = np.zeros(config.width)
    for e in chosen:
        one = {name: {"kernel": p[f"expert_{name}"]["kernel"][e]} for name in ("gate", "up", "down")}
        y += weights[e] / whole * oracle_mlp(x, one, config)
    return y


def oracle_logits(params, tokens, config, slots) -> np.ndarray:
    """Logits [T, V] of one sequence without padding, which stands in so many slots."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    xs = [params["embed"]["embedding"][token] for token in tokens]
    if config.embed_scale:
        xs = [x * math.sqrt(config.width) for x in xs]
    if config.positions == "learned":
        xs = [x + params["positions"]["embedding"][config.position_offset + t] for t, x in enumerate(xs)]
    for i in range(config.num_layers):
        p = params[f"layer_{i}"]

        def normed(x, name, p=p):
            return oracle_norm(x, p[name], config) if name in p else x

        before = xs
        attended = oracle_attention([normed(x, "attention_norm") for x in xs], p["attention"], config, i, slots)
        xs = [x + normed(y, "attention_post_norm") for x, y in zip(xs, attended, strict=True)]
        for t, x in enumerate(xs):
            h = normed(before[t] if config.parallel_residual else x, "mlp_norm")
            inner = (oracle_experts if config.num_experts else oracle_mlp)(h, p["mlp"], config)
            xs[t] = x + normed(inner, "mlp_post_norm")
    hidden = np.array([oracle_norm(x, params["final_norm"], config) for x in xs])
    logits = hidden @ (params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"])
    return np.vectorize(oracle_cap)(logits, config.final_softcap)


def oracle_rows(params, tokens, mask, config) -> np.ndarray:
    """Logits [B, T, V] of a padded batch; 0 where the mask is False."""
    logits = np.zeros((*tokens.shape, config.vocab_size))
    for row, real in enumerate(mask):
        logits[row, real] = oracle_logits(params, tokens[row][real], config, tokens.shape[1])
    return logits


GEMMA_LIKE = {
    "norm_unit_offset": True,
    "norm_placement": "both",
    "embed_scale": True,
    "activation": "gelu_tanh",
    "query_pre_attn_scalar": 9,
}


VARIANTS = {
    "llama": {},
    "llama_grouped": {"num_kv_heads": 2, "rope_theta": 100.0},
    "llama_one_key_head": {"num_kv_heads": 1, "head_dim": 2},
    "llama_biases_untied": {"attention_bias": True, "mlp_bias": True, "tie_embeddings": False},
    "llama_gelu": {"activation": "gelu", "norm_eps": 1e-2},
    "gpt2": GPT2_LIKE,
    "gpt2_untied_relu": {**GPT2_LIKE, "tie_embeddings": False, "activation": "relu"},
    "gpt2_grouped": {**GPT2_LIKE, "num_kv_heads": 2, "activation": "gelu"},
    "rotary_layernorm": {"norm": "layernorm", "gated_mlp": False},
    "llama3": {"rope_theta": 100.0, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 24)},
    "linear": {"rope_theta": 100.0, "rope_scaling": LinearScaling(2.5)},
    "yarn": {"rope_theta": 100.0, "rope_scaling": YarnScaling(4.0, 16, 1.2, 2.0, 0.5)},
    "yarn_not_truncated": {"head_dim": 8, "rope_scaling": YarnScaling(4.0, 64, 1.2, 4.0, 0.5, truncate=False)},
    "long_frequencies": {"rope_scaling": LongScaling((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), 8, 1.2)},
    "short_frequencies": {"rope_scaling": LongScaling((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), 9, 1.2)},
    "windows": {"layer_windows": (3, 3)},
    "olmo2": {"norm_placement": "after", "qk_norm": "projection", "num_kv_heads": 2},
    "smollm3": {"unrotated_layers": (1,), "layer_windows": (0, 4)},
    "gemma2": {**GEMMA_LIKE, "layer_windows": (3, 0), "attention_softcap": 1.5, "final_softcap": 2.0},
    "gemma3": {
        **GEMMA_LIKE,
        "qk_norm": "head",
        "layer_windows": (4, 0),
        "local_rope_theta": 10.0,
        "rope_scaling": LinearScaling(8.0),
    },
    "gpt_neox": {**GPT2_LIKE, "positions": "rotary", "head_dim": 8, "rotary_dim": 4, "parallel_residual": True},
    "gemma_in_parallel": {**GEMMA_LIKE, "parallel_residual": True},
    "opt": {**GPT2_LIKE, "position_offset": 2, "activation": "relu"},
    "mixtral": {"num_experts": 4, "experts_per_token": 2},
    "qwen3_moe": {"num_experts": 5, "experts_per_token": 3, "normalize_experts": False, "qk_norm": "head"},
    "one_expert_of_many": {"num_experts": 9, "experts_per_token": 1, "activation": "gelu"},
    "all_experts": {"num_experts": 3, "norm_placement": "both"},
    "learned_rmsnorm_gated": {"positions": "learned", "activation": "relu", "mlp_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_oracle(name, rng):
    config = tiny(**VARIANTS[name])
    params = random_params(rng, config)
    tokens, mask = left_padded(rng, config)
    expected = oracle_rows(params, tokens, mask, config)
    # A few draws lie near a division by nothing, and magnify what float32 rounds. How much, the oracle says as well:
    # where parameters move by half of float32's last place. In thousands of draws we were at most 8 times as far.
    moved = jax.tree.map(lambda x: np.float64(x) * (1 + rng.choice((-1, 1), x.shape) * 2.0**-24), params)
    rounded = oracle_rows(moved, tokens, mask, config)
    error = max_relative_error(logits_of(config, params, tokens, mask), expected, mask)
    assert error < max(TOLERANCE, 20 * max_relative_error(rounded, expected, mask))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recorded_models_give_torchs_logits(name):
    golden = json.loads((GOLDEN / name / "golden.json").read_text())
    config = hub.load_config(GOLDEN / name)
    params = hub.load_params(GOLDEN / name, config)
    mask = np.array(golden["mask"], bool)
    actual = logits_of(config, params, np.array(golden["tokens"]), mask)
    assert max_relative_error(actual, np.array(golden["logits"]), mask) < TOLERANCE


@pytest.mark.parametrize("greedy", ["greedy", "greedy_without_eos"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recorded_models_give_torchs_greedy_tokens(name, greedy):
    golden = json.loads((GOLDEN / name / "golden.json").read_text())
    config = hub.load_config(GOLDEN / name)
    params = with_value_head(hub.load_params(GOLDEN / name, config))
    prompts = Prompts(jnp.array(golden["tokens"]), jnp.array(golden["mask"], bool))
    eos_ids = (golden["eos_id"],) if greedy == "greedy" else ()
    sampling = SamplingConfig(max_new_tokens=12, eos_ids=eos_ids, pad_id=golden["pad_id"], temperature=0.0)
    act = jax.jit(partial(generate, ActorCritic(config), sampling=sampling))
    rollout = act(params, prompts, jax.random.key(0))
    rows = zip(rollout.response_tokens, rollout.response_mask, strict=True)
    assert [np.asarray(tokens)[np.asarray(mask)].tolist() for tokens, mask in rows] == golden[greedy]


def with_value_head(decoder):
    width = decoder["final_norm"]["scale"].shape[0]
    return {"decoder": decoder, "value_head": {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}}


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped", "windows", "long_frequencies", "gemma3", "opt"])
def test_prefill_and_steps_with_a_cache_equal_the_full_pass(name, rng):
    config = tiny(**VARIANTS[name])
    params = {"params": random_params(rng, config)}
    tokens, mask = (jnp.asarray(x) for x in left_padded(rng, config))
    size, prefilled = tokens.shape[1], 4
    trunk = jax.jit(partial(Decoder(config).apply, method="trunk"))
    positions, visible = positions_of(mask), causal_mask(mask)
    full, none = trunk(params, tokens, positions, visible)
    assert none is None

    cache = empty_cache(config, len(tokens), size)
    stops = [prefilled, *range(prefilled + 1, size + 1)]
    pieces = []
    for start, stop in itertools.pairwise([0, *stops]):
        part = slice(start, stop)
        hidden, cache = trunk(params, tokens[:, part], positions[:, part], visible[:, part], cache, start)
        pieces.append(hidden)
    assert max_relative_error(jnp.concatenate(pieces, 1), full, np.asarray(mask)) < TOLERANCE


@pytest.mark.parametrize("variant", [GPT2_LIKE, {}], ids=["gpt2", "llama"])
def test_more_padding_on_the_left_changes_nothing(variant, rng):
    config = tiny(**variant)
    params = random_params(rng, config)
    tokens, mask = left_padded(rng, config)
    more = rng.integers(0, config.vocab_size, (len(tokens), 4))
    padded = logits_of(config, params, np.hstack([more, tokens]), np.hstack([np.zeros_like(more, bool), mask]))
    assert max_relative_error(padded[:, 4:], logits_of(config, params, tokens, mask), mask) < TOLERANCE


def test_later_tokens_change_nothing_before_them(rng):
    config = tiny()
    params = random_params(rng, config)
    tokens, mask = left_padded(rng, config)
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % config.vocab_size
    before, after = logits_of(config, params, tokens, mask), logits_of(config, params, changed, mask)
    moved = np.abs(before - after).max(-1)
    assert np.all(moved[:, :6][mask[:, :6]] == 0)
    assert np.all(moved[:, 6:] > 1e-3)


def test_padding_gets_no_gradient(rng):
    config = tiny(**GPT2_LIKE, tie_embeddings=False)
    params = random_params(rng, config)
    tokens, mask = left_padded(rng, config)
    tokens = np.where(mask, 1 + tokens % (config.vocab_size - 1), 0)  # token 0 is padding and nothing else

    def loss(params):
        logprobs = jax.nn.log_softmax(Decoder(config).apply({"params": params}, tokens, mask))
        return -jnp.sum(jnp.where(mask[..., None], logprobs, 0.0)[..., 1:])

    gradient = jax.jit(jax.grad(loss))(params)
    rows = np.abs(np.asarray(gradient["embed"]["embedding"])).max(-1)
    assert rows[0] == 0.0
    assert all(rows[token] > 0 for token in np.unique(tokens[mask]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_rotation_keeps_lengths_and_sees_distances_only():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def turned(x, position):
        return np.asarray(rotate(jnp.asarray(x), jnp.array([[position]]), frequencies(8, 50.0)))

    np.testing.assert_array_equal(turned(query, 0), query)
    np.testing.assert_allclose(np.linalg.norm(turned(query, 7)), np.linalg.norm(query), rtol=1e-6)
    near, far = (np.sum(turned(query, 3 + shift) * turned(key, shift)) for shift in (0, 40))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(near - np.sum(turned(query, 4) * turned(key, 0))) > 0.1


def test_positions_and_causal_mask():
    mask = jnp.array([[False, True, True], [True, True, True]])
    # padding counts for nothing, the first real token stands at position 0
    np.testing.assert_array_equal(positions_of(mask), [[0, 0, 1], [0, 1, 2]])
    # query 2 of the first row sees itself and token 1, not the padding at 0; query 0 is padding and sees nothing
    np.testing.assert_array_equal(causal_mask(mask)[0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(causal_mask(mask)[1], np.tri(3))


def test_positions_and_mask_of_texts_that_share_a_row():
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]])
    # positions begin anew with every text
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 0], [0, 0, 0, 1, 2]])
    # two blocks of two, and padding that sees nothing and that nobody sees
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(segment_mask(segments)[0], expected)
    np.testing.assert_array_equal(segment_mask(segments)[1, 2:, 2:], np.tri(3))
    assert not segment_mask(segments)[1, 2:, :2].any()
    # one text to a row: what `positions_of` and `causal_mask` say of its real tokens
    one = jnp.array([[1, 1, 1, 0]])
    np.testing.assert_array_equal(segment_positions(one)[:, :3], positions_of(one > 0)[:, :3])
    np.testing.assert_array_equal(segment_mask(one)[:, :3], causal_mask(one > 0)[:, :3])


@pytest.mark.parametrize("variant", [GPT2_LIKE, {"tie_embeddings": False}], ids=["gpt2", "llama_untied"])
def test_bfloat16_gives_float32_logits(variant, rng):
    config = tiny(**variant)
    params = random_params(rng, config)
    tokens, mask = left_padded(rng, config)
    half = logits_of(dataclasses.replace(config, dtype="bfloat16"), params, tokens, mask)
    assert half.dtype == np.float32
    assert len(np.unique(half)) > len(np.unique(half.astype(jnp.bfloat16)))  # no rounding at the end
    error = max_relative_error(half, logits_of(config, params, tokens, mask), mask)
    assert 1e-3 < error < 0.3  # bfloat16 rounds by 2^-9, dozens of times in a row: 0.005 to 0.1 over 300 draws


def test_bfloat16_parameters_and_cache(rng):
    config = tiny(dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(rng, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    kept = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert {leaf.dtype for pair in empty_cache(config, 1, 2) for leaf in pair} == {jnp.dtype(kept)}
    assert logits_of(config, params, *left_padded(rng, config)).dtype == np.float32


def test_actor_critic_adds_a_value_and_starts_at_zero(rng, key):
    config = tiny(dtype="bfloat16")
    tokens, mask = left_padded(rng, config)
    model = ActorCritic(config)
    params = jax.jit(model.init)(key, tokens, mask)["params"]
    assert params.keys() == {"decoder", "value_head"}
    logits, values = jax.jit(model.apply)({"params": params}, tokens, mask)
    assert (values.shape, values.dtype) == (tokens.shape, jnp.float32)
    np.testing.assert_array_equal(values, np.zeros(tokens.shape))
    np.testing.assert_array_equal(logits, logits_of(config, params["decoder"], tokens, mask))

    hidden = rng.normal(size=(2, 3, config.width)).astype(np.float32)
    head = {"kernel": rng.normal(size=(config.width, 1)).astype(np.float32), "bias": np.float32([2.5])}
    values = model.apply({"params": {**params, "value_head": head}}, hidden, method="value")
    np.testing.assert_allclose(values, (hidden @ head["kernel"])[..., 0] + 2.5, atol=1e-5)


def test_too_long_a_sequence_is_refused(rng):
    config = tiny(max_positions=8)
    tokens, mask = left_padded(rng, config)
    with pytest.raises(ValueError, match=r"sequence length: got 9 tokens .* at most the model's 8 positions"):
        jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, mask)
    jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens[:, :8], mask[:, :8])


# Published sizes, and what each family's parameters are called.


def count(config: ModelConfig) -> int:
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        # GPT-2 small: Radford et al. 2019 say 117M; the released file holds this many
        (124_439_808, {"vocab_size": 50257, "num_layers": 12, "num_heads": 12, "width": 768, "mlp_width": 3072,
                       "max_positions": 1024, **GPT2_LIKE}),
        # SmolLM2-135M
        (134_515_008, {"vocab_size": 49152, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "width": 576,
                       "mlp_width": 1536, "max_positions": 8192}),
        # Llama 2 7B
        (6_738_415_616, {"vocab_size": 32000, "num_layers": 32, "num_heads": 32, "width": 4096, "mlp_width": 11008,
                         "max_positions": 4096, "tie_embeddings": False}),
    ],
    ids=["gpt2", "smollm2_135m", "llama2_7b"],
)  # fmt: skip
def test_published_parameter_counts(expected, fields):
    assert count(ModelConfig(**fields)) == expected


def test_config_fills_in_what_follows():
    config = ModelConfig(vocab_size=5, num_layers=1, num_heads=4, width=32, mlp_width=7, max_positions=9)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert dataclasses.replace(config, num_kv_heads=2).num_kv_heads == 2
    assert hash(config) == hash(dataclasses.replace(config))  # a static argument of jit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, expected a positive number"),
        ({"num_layers": -1}, "num_layers: got -1, expected a positive number"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"head_dim": -2}, "head_dim: got -2"),
        ({"rope_theta": 0.0}, "rope_theta: got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps: got nan"),
        ({"num_kv_heads": 3}, r"num_kv_heads: got 3, expected a divisor of num_heads \(4\)"),
        ({"head_dim": 5}, "head_dim: got 5, expected an even number"),
        ({"head_dim": 0, "width": 13}, r"width: got 13, expected a multiple of num_heads \(4\)"),
        ({"positions": "alibi"}, "positions: got 'alibi', expected one of learned, rotary"),
        ({"norm": "batchnorm"}, "norm: got 'batchnorm'"),
        ({"activation": "mish"}, "activation: got 'mish', expected one of gelu, gelu_tanh, silu, relu"),
        ({"norm_placement": "within"}, "norm_placement: got 'within', expected one of before, after, both"),
        ({"qk_norm": True}, "qk_norm: got True, expected one of none, head, projection"),
        ({"position_offset": 2}, "position_offset: got 2, expected 0 with positions=rotary"),
        ({"positions": "learned", "rope_scaling": LinearScaling(2.0)}, "rope_scaling: got .*, expected None with pos"),
        ({"positions": "learned", "rotary_dim": 2}, "rotary_dim: got 2, expected 0 with positions=learned"),
        ({"rotary_dim": 3}, "rotary_dim: got 3, expected an even number, at most 6"),
        ({"rotary_dim": 8}, "rotary_dim: got 8, expected an even number, at most 6"),
        (
            {"unrotated_layers": (1, 0)},
            r"unrotated_layers: got \(1, 0\), expected different layers, in order, of 0 to 1",
        ),
        ({"unrotated_layers": (2,)}, r"unrotated_layers: got \(2,\)"),
        ({"layer_windows": (4,)}, r"layer_windows: got \(4,\), expected 2 numbers, one for each layer"),
        ({"layer_windows": (4, -1)}, r"layer_windows: got \(4, -1\)"),
        ({"local_rope_theta": 10.0}, "local_rope_theta: got 10.0, expected 0 without windows"),
        ({"attention_softcap": -1.0}, "attention_softcap: got -1.0, expected 0 or a positive number"),
        (
            {"rope_scaling": LongScaling((1.0,), (1.0,), 4, 1.0)},
            "short_factors: got .*, expected 3 numbers, one for each",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": YarnScaling(2.0, 4, 1.0)},
            "rope_theta: got 1.0, expected more than 1 for Y",
        ),
        ({"num_experts": -1}, "num_experts: got -1, expected 0 or a positive number"),
        ({"num_experts": 2, "experts_per_token": 3}, r"experts_per_token: got 3, expected at most num_experts \(2\)"),
        ({"experts_per_token": 1}, r"experts_per_token: got 1, expected at most num_experts \(0\)"),
        ({"normalize_experts": False}, "normalize_experts: got False, expected True without experts"),
        ({"num_experts": 2, "gated_mlp": False}, "gated_mlp: got False, expected True with experts"),
        ({"num_experts": 2, "mlp_bias": True}, "mlp_bias: got True, expected False with experts"),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype: got 'int8'"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny(**changes)


@pytest.mark.parametrize("variant", [GPT2_LIKE, {"tie_embeddings": False}], ids=["gpt2", "llama_untied"])
def test_matrices_by_output_give_the_same_logits(variant, rng):
    config = tiny(**variant)
    params = random_params(rng, config)
    turned = by_output(params)
    names = {str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(turned)}
    assert "by_output" in names
    assert "kernel" not in names
    tokens, mask = left_padded(rng, config)
    same = logits_of(config, turned, tokens, mask)
    # The same sums in another order: float32 rounds by 6e-8, and a few layers of such sums follow each other.
    assert max_relative_error(same, logits_of(config, params, tokens, mask), mask) < 1e-4
