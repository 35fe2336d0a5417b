"""What is laid over a frozen base: adapters against NumPy in float64, gradients, memory, the upper layers alone.

Tolerance of logits: as in test_models.py.
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.errors import InputError
from ppo_jax.models import (
    Decoder,
    LoRAConfig,
    ModelConfig,
    causal_mask,
    empty_cache,
    init_adapter,
    merge,
    overlay,
    positions_of,
    upper_layers,
)
from ppo_jax.models.transformer import Projection
from ppo_jax.sharding import make_mesh, param_shardings

TOLERANCE = 2e-5
SIZES = {"vocab_size": 29, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 12, "mlp_width": 20}
LLAMA = ModelConfig(**SIZES, max_positions=16, head_dim=6)
GPT2 = ModelConfig(
    **{**SIZES, "num_kv_heads": 4},
    max_positions=16,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
)
MODELS = {"llama": LLAMA, "gpt2": GPT2}
KINDS = {
    "lora": LoRAConfig(rank=3, alpha=6),
    "rslora": LoRAConfig(rank=4, alpha=1, rslora=True),
    "dora": LoRAConfig(rank=2, alpha=3, dora=True),
}


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]


@pytest.fixture(params=["llama-lora", "gpt2-rslora", "gpt2-dora"])
def styled(request):
    """A model and a kind of adapter: each of both at least once."""
    model, kind = request.param.split("-")
    return MODELS[model], KINDS[kind]


def random_params(rng, config):
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return np.asarray(1 + 0.3 * drawn if "scale" in str(path[-1]) else 0.3 * drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree["params"])


def trained(rng, base, lora):
    """An adapter as if it had been trained: everything in it counts."""

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return np.asarray(leaf) * (1 + 0.3 * drawn) if path[-1].key == "lora_magnitude" else 0.3 * drawn

    return jax.tree_util.tree_map_with_path(draw, init_adapter(base, lora, jax.random.key(0)))


def batch(rng, config, sizes=(9, 5, 1)):
    tokens = rng.integers(0, config.vocab_size, (len(sizes), max(sizes))).astype(np.int32)
    return tokens, np.arange(max(sizes)) >= max(sizes) - np.array(sizes)[:, None]


def logits_of(config, params, tokens, mask):
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))


def max_relative_error(actual, expected, mask):
    actual, expected = np.asarray(actual, np.float64)[mask], np.asarray(expected, np.float64)[mask]
    return float(np.max(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))


def merged_by_hand(params, scale):
    """One column of one matrix at a time, in float64: w + s sum_r b_r a_r, then to the length m."""
    if "lora_a" not in params:
        return {name: merged_by_hand(x, scale) if isinstance(x, dict) else x for name, x in params.items()}
    kernel = np.array(params["kernel"], np.float64)
    for column in range(kernel.shape[1]):
        for r, strength in enumerate(np.asarray(params["lora_b"])[:, column]):
            kernel[:, column] += scale * float(strength) * np.asarray(params["lora_a"], np.float64)[:, r]
        if "lora_magnitude" in params:
            length = math.sqrt(math.fsum(x * x for x in kernel[:, column]))
            kernel[:, column] *= float(params["lora_magnitude"][column]) / length
    rest = {name: x for name, x in params.items() if name in ("bias",)}
    return rest | {"kernel": kernel.astype(np.float32)}


def scaled(config, lora):
    return dataclasses.replace(config, lora_scale=lora.scale)


# Laying one tree over another.


def test_overlay_takes_the_leaves_themselves():
    a, b, c, d, e = (np.zeros(i) for i in range(5))
    base = {"layer": {"query": {"kernel": a, "bias": b}}, "embed": {"embedding": c}}
    both = overlay(base, {"layer": {"query": {"bias": d, "lora_a": e}}, "new": {"x": a}})
    assert both["layer"]["query"] == {"kernel": a, "bias": d, "lora_a": e}
    assert both["layer"]["query"]["kernel"] is a
    assert both["layer"]["query"]["bias"] is d
    assert both["embed"]["embedding"] is c
    assert both["new"]["x"] is a
    assert base == {"layer": {"query": {"kernel": a, "bias": b}}, "embed": {"embedding": c}}  # untouched
    assert base["layer"]["query"]["bias"] is b


@pytest.mark.parametrize("changes", [{}, None])
def test_overlay_with_nothing_and_with_everything(changes, rng, config):
    base, everything = random_params(rng, config), random_params(rng, config)
    both = overlay(base, everything if changes is None else changes)
    expected = everything if changes is None else base
    assert jax.tree.structure(both) == jax.tree.structure(base)
    assert all(one is other for one, other in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True))


# A projection.


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_without_an_adapter_it_is_flaxs_dense_rounded_once(use_bias, dtype, param_dtype, rng, key):
    config = dataclasses.replace(LLAMA, dtype=dtype, param_dtype=param_dtype, lora_scale=7.0)
    ours = Projection(config, 10, use_bias, 0.3)
    init = nn.initializers.normal(0.3)
    theirs = nn.Dense(10, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=init)
    x = rng.normal(size=(3, 5, 8)).astype(np.float32)
    params = jax.jit(ours.init)(key, x)
    expected = jax.jit(theirs.init)(key, x)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    out = jax.jit(ours.apply)(params, x)
    exact = jax.jit(dataclasses.replace(ours, out_dtype="float32").apply)(params, x)
    assert (out.dtype, exact.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(out, exact.astype(dtype))
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype if leaf.ndim > 1 else leaf.dtype).astype(jnp.float32), params)
    dense = jax.jit(nn.Dense(10, use_bias=use_bias).apply)(rounded, x.astype(dtype).astype(np.float32))
    if dtype == "float32":
        np.testing.assert_array_equal(out, dense)
    np.testing.assert_allclose(exact, dense, rtol=1e-5, atol=1e-5)  # sums of eight products of about one


def test_a_model_without_an_adapter_has_no_parameters_of_one(config):
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes) if "lora" in str(path)]


def test_an_adapter_by_hand():
    """One input x = (1, 2), W = ((1, 0), (3, 1)), A = (1, -1), B = (2, 5), s = 0.5, b = (10, 20).

    x W = (7, 2); x A = -1; (x A) B = (-2, -5); y = (7 - 1, 2 - 2.5) + b = (16, 19.5).
    With magnitudes (10, 3): W + s A B = ((2, 2.5), (2, -1.5)), of lengths sqrt(8) and sqrt(8.5);
    y = (10 * 6 / sqrt(8), 3 * -0.5 / sqrt(8.5)) + b.
    """
    params = {"kernel": jnp.array([[1.0, 0.0], [3.0, 1.0]]), "bias": jnp.array([10.0, 20.0])}
    params |= {"lora_a": jnp.array([[1.0], [-1.0]]), "lora_b": jnp.array([[2.0, 5.0]])}
    apply = Projection(dataclasses.replace(LLAMA, lora_scale=0.5), 2, True).apply
    np.testing.assert_allclose(apply({"params": params}, jnp.array([1.0, 2.0])), [16, 19.5], rtol=1e-6)
    params["lora_magnitude"] = jnp.array([10.0, 3.0])
    expected = [60 / math.sqrt(8) + 10, -1.5 / math.sqrt(8.5) + 20]
    np.testing.assert_allclose(apply({"params": params}, jnp.array([1.0, 2.0])), expected, rtol=1e-6)


# A model.


def test_logits_are_those_of_merged_weights(styled, rng):
    config, lora = styled
    base = random_params(rng, config)
    both = overlay(base, trained(rng, base, lora))
    tokens, mask = batch(rng, config)
    expected = logits_of(config, merged_by_hand(both, lora.scale), tokens, mask)
    assert max_relative_error(logits_of(config, base, tokens, mask), expected, mask) > 0.01  # the adapter counts
    assert max_relative_error(logits_of(scaled(config, lora), both, tokens, mask), expected, mask) < TOLERANCE


@pytest.mark.parametrize("merge", [merge, jax.jit(merge, static_argnums=1)], ids=["eager", "jit"])
def test_merge(merge, styled, rng):
    config, lora = styled
    base = random_params(rng, config)
    both = overlay(base, trained(rng, base, lora))
    expected = merged_by_hand(both, lora.scale)
    merged = merge(both, lora.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6)


def test_merge_copies_no_more_than_it_changes(rng):
    base = random_params(rng, dataclasses.replace(LLAMA, param_dtype="bfloat16"))
    both = overlay(base, trained(rng, base, LoRAConfig(targets="layer_1/mlp/up")))
    merged = merge(both, 2.0)
    changed = merged["layer_1"]["mlp"].pop("up")
    assert changed["kernel"].dtype == jnp.bfloat16
    kept = overlay(base, {})
    kept["layer_1"] = {**base["layer_1"], "mlp": {n: x for n, x in base["layer_1"]["mlp"].items() if n != "up"}}
    assert all(one is other for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(kept), strict=True))
    again = merge(base, 2.0)
    assert all(one is other for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(base), strict=True))


def test_a_fresh_adapter_changes_nothing(styled, rng, key):
    config, lora = styled
    base = random_params(rng, config)
    tokens, mask = batch(rng, config)
    both = overlay(base, jax.jit(init_adapter, static_argnums=1)(base, lora, key))
    expected = logits_of(config, base, tokens, mask)
    logits = logits_of(scaled(config, lora), both, tokens, mask)
    if lora.dora:
        assert max_relative_error(logits, expected, mask) < TOLERANCE
    else:
        np.testing.assert_array_equal(logits, expected)


def test_acting_token_by_token_gives_the_logits_of_the_whole(styled, rng):
    """With a cache, prefill and steps: what a sampled token was drawn from is what training sees."""
    config, lora = styled
    base = random_params(rng, config)
    params, config = overlay(base, trained(rng, base, lora)), scaled(config, lora)
    tokens, mask = batch(rng, config)
    expected = logits_of(config, params, tokens, mask)
    model, visible = Decoder(config), jnp.asarray(causal_mask(jnp.asarray(mask)))

    def run(tokens, positions, visible, cache, slot):
        hidden, cache = model.apply({"params": params}, tokens, positions, visible, cache, slot, method=Decoder.trunk)
        return model.apply({"params": params}, hidden, method=Decoder.logits), cache

    run, cache = jax.jit(run), empty_cache(config, *tokens.shape)
    positions = positions_of(jnp.asarray(mask))
    pieces = []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        part = slice(start, end)
        logits, cache = run(tokens[:, part], positions[:, part], visible[:, part], cache, start)
        pieces.append(logits)
    assert max_relative_error(np.concatenate(pieces, 1), expected, mask) < TOLERANCE


def test_bfloat16_rounds_an_adapter_as_it_rounds_a_kernel(styled, rng):
    """Over 180 draws: the error with an adapter was 0.25 to 3.5 times that of merged weights, the median 1.1 times."""
    config, lora = dataclasses.replace(styled[0], num_layers=1), styled[1]
    base = random_params(rng, config)
    both = overlay(base, trained(rng, base, lora))
    tokens, mask = batch(rng, config)
    exact = logits_of(scaled(config, lora), both, tokens, mask)
    half = dataclasses.replace(scaled(config, lora), dtype="bfloat16")
    error = max_relative_error(logits_of(half, both, tokens, mask), exact, mask)
    merged = max_relative_error(logits_of(half, merge(both, lora.scale), tokens, mask), exact, mask)
    assert error < 10 * merged


# Gradients and memory.


def test_gradients_reach_the_adapter_as_through_merged_weights(styled, rng):
    """dL/dA, dL/dB and dL/dm by the chain rule from dL/dW of the merged model; DoRA's norm is a constant."""
    config, lora = dataclasses.replace(styled[0], num_layers=1), styled[1]
    base = random_params(rng, config)
    adapter = trained(rng, base, lora)
    tokens, mask = batch(rng, config)

    def loss(config, params):
        logits = Decoder(config).apply({"params": params}, tokens, mask)
        return jnp.mean(jnp.square(jnp.where(mask[..., None], logits, 0.0)))

    gradient = jax.jit(jax.grad(lambda a: loss(scaled(config, lora), overlay(base, a))))(adapter)
    whole = jax.device_get(jax.jit(jax.grad(partial(loss, config)))(merged_by_hand(overlay(base, adapter), lora.scale)))
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    for layer, parts in gradient.items():
        for part, projections in parts.items():
            for name, got in projections.items():
                one, kernel = adapter[layer][part][name], np.float64(base[layer][part][name]["kernel"])
                a, b, d_kernel = (
                    np.float64(x) for x in (one["lora_a"], one["lora_b"], whole[layer][part][name]["kernel"])
                )
                turned = np.ones(kernel.shape[1])
                direction = kernel + lora.scale * a @ b
                if lora.dora:
                    length = np.sqrt((direction**2).sum(0))
                    turned = one["lora_magnitude"] / length
                    expected = {"lora_magnitude": (d_kernel * direction / length).sum(0)}
                else:
                    expected = {}
                expected["lora_a"] = lora.scale * (d_kernel * turned) @ b.T
                expected["lora_b"] = lora.scale * a.T @ (d_kernel * turned)
                assert got.keys() == expected.keys()
                for kind, x in expected.items():
                    np.testing.assert_allclose(
                        got[kind], x, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=f"{name} {kind}"
                    )


def test_the_first_step_moves_b_alone(config, rng, key):
    """B is zero, so A has no gradient yet; B has one everywhere."""
    base = random_params(rng, config)
    tokens, mask = batch(rng, config)
    adapter = init_adapter(base, LoRAConfig(rank=2), key)

    def loss(adapter):
        return jnp.mean(jnp.square(Decoder(config).apply({"params": overlay(base, adapter)}, tokens, mask)))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(adapter)):
        assert np.any(gradient) == (path[-1].key == "lora_b"), path


def sizes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_base_is_in_memory_once(rng, key):
    """A step of policy, reference and gradient takes the base as one argument, returns the adapter alone, and leaves
    the base alive when the adapter's buffers are given away.
    """
    config = dataclasses.replace(LLAMA, vocab_size=400, width=64, mlp_width=256, head_dim=16)
    base = jax.tree.map(jnp.asarray, random_params(rng, config))
    adapter = init_adapter(base, LoRAConfig(rank=1), key)
    tokens, mask = (jnp.asarray(x) for x in batch(rng, config))

    def step(adapter, base):
        reference = Decoder(config).apply({"params": base}, tokens, mask)

        def loss(adapter):
            return jnp.mean(
                jnp.square(Decoder(config).apply({"params": overlay(base, adapter)}, tokens, mask) - reference + 1)
            )

        return jax.tree.map(lambda x, g: x - 0.1 * g, adapter, jax.grad(loss)(adapter))

    program = jax.jit(step, donate_argnums=0).lower(adapter, base).compile()
    memory = program.memory_analysis()
    assert sizes(base) > 10 * sizes(adapter)
    assert memory.argument_size_in_bytes <= sizes(base) + sizes(adapter) + 10_000
    assert memory.output_size_in_bytes <= sizes(adapter) + 10_000
    before, shapes = jax.device_get(base), jax.tree.map(jnp.shape, adapter)
    moved = program(adapter, base)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapter))
    assert jax.tree.all(jax.tree.map(np.array_equal, base, before))
    assert jax.tree.map(jnp.shape, moved) == shapes


# A new adapter.


def test_the_default_adapts_every_projection(config, rng, key):
    base = random_params(rng, config)
    adapter = init_adapter(base, LoRAConfig(rank=5), key)
    projections = ["gate"] * config.gated_mlp + ["up", "down"]
    assert adapter.keys() == {"layer_0", "layer_1"}
    for layer in adapter.values():
        assert {part: set(names) for part, names in layer.items()} == {
            "attention": {"query", "key", "value", "output"},
            "mlp": set(projections),
        }
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        layer, part, name, kind = (entry.key for entry in path)
        kernel = base[layer][part][name]["kernel"]
        assert leaf.shape == {"lora_a": (kernel.shape[0], 5), "lora_b": (5, kernel.shape[1])}[kind]
        assert leaf.dtype == jnp.float32
        assert np.any(leaf) == (kind == "lora_a")


def test_a_is_drawn_as_pefts(key):
    """U(-1/sqrt(in), 1/sqrt(in)): variance 1 / (3 in); every matrix has numbers of its own."""
    base = {f"layer_{i}": {"mlp": {"up": {"kernel": jnp.zeros((400, 3))}}} for i in range(2)}
    one, other = (layer["mlp"]["up"]["lora_a"] for layer in init_adapter(base, LoRAConfig(rank=100), key).values())
    for drawn in (one, other):
        assert 0.0499 < np.abs(drawn).max() <= 0.05  # 1 / sqrt(400); 40,000 draws
        np.testing.assert_allclose(np.var(drawn), 1 / 1200, rtol=0.05)  # its standard error is 0.4 %
        assert abs(np.mean(drawn)) < 1e-3  # seven standard errors
    assert np.mean(np.asarray(one) == np.asarray(other)) < 1e-3  # of 2^23 numbers, two are the same now and then


def test_magnitudes_begin_as_the_lengths_of_the_columns(rng, key):
    kernel = rng.normal(size=(5, 2)).astype(np.float32)
    base = {"layer_0": {"mlp": {"up": {"kernel": jnp.asarray(kernel, jnp.bfloat16)}}}}
    adapter = init_adapter(base, LoRAConfig(dora=True), key)["layer_0"]["mlp"]["up"]
    rounded = np.asarray(base["layer_0"]["mlp"]["up"]["kernel"], np.float64)
    expected = [math.sqrt(math.fsum(x * x for x in rounded[:, column])) for column in range(2)]
    assert adapter["lora_magnitude"].dtype == jnp.float32
    np.testing.assert_allclose(adapter["lora_magnitude"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query|value", "0.query 0.value 1.query 1.value"),
        ("layer_1/", "1.query 1.key 1.value 1.output 1.gate 1.up 1.down"),
        ("^layer_0/mlp/(up|down)$", "0.up 0.down"),
        ("mlp", "0.gate 0.up 0.down 1.gate 1.up 1.down"),
        ("", "0.query 0.key 0.value 0.output 0.gate 0.up 0.down 1.query 1.key 1.value 1.output 1.gate 1.up 1.down"),
    ],
)
def test_targets(targets, expected, rng, key):
    adapter = init_adapter(random_params(rng, LLAMA), LoRAConfig(targets=targets), key)
    found = {f"{layer[-1]}.{name}" for layer, parts in adapter.items() for part in parts.values() for name in part}
    assert found == set(expected.split())


@pytest.mark.parametrize("targets", ["lm_head", "embed", "q_proj", "attention$", "layer_2"])
def test_targets_that_are_not_there(targets, rng, key):
    config = dataclasses.replace(LLAMA, tie_embeddings=False)
    with pytest.raises(
        InputError,
        match=r"^targets: got '.*', which matches no projection, .*some of layer_0/attention/key, .*mlp/up, \.\.\.$",
    ):
        init_adapter(random_params(rng, config), LoRAConfig(targets=targets), key)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rank", 0, "a positive whole number"),
        ("rank", 1.5, "a positive whole number"),
        ("rank", True, "a positive whole number"),
        ("alpha", 0, "a positive number"),
        ("alpha", -1.0, "a positive number"),
        ("alpha", math.nan, "a positive number"),
        ("alpha", math.inf, "a positive number"),
        ("targets", "(query", "a regular expression"),
    ],
)
def test_a_configuration_that_cannot_be(field, value, expected):
    with pytest.raises(InputError, match=rf"^{field}: got .*, expected {expected}"):
        LoRAConfig(**{field: value})


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(8, 16, False, 2.0), (16, 8, False, 0.5), (16, 8, True, 2.0), (4, 3, True, 1.5), (1, 3, False, 3.0)],
)
def test_scale(rank, alpha, rslora, scale):
    """16 / 8; 8 / 16; 8 / sqrt(16); 3 / sqrt(4); 3 / 1."""
    assert LoRAConfig(rank=rank, alpha=alpha, rslora=rslora).scale == scale


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_model_refuses_a_scale_that_cannot_be(scale):
    with pytest.raises(InputError, match=r"^lora_scale: got .*, expected a positive number"):
        dataclasses.replace(LLAMA, lora_scale=scale)


# The upper layers alone.


def test_upper_layers_are_copies_of_what_lies_above(config, rng):
    base = jax.tree.map(jnp.asarray, random_params(rng, config))
    changes = upper_layers(base, config, 1)
    assert changes.keys() == {"layer_1", "final_norm"}
    for name, tree in changes.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, tree, base[name]))
    tokens, mask = batch(rng, config)
    both = overlay(base, changes)
    np.testing.assert_array_equal(logits_of(config, both, tokens, mask), logits_of(config, base, tokens, mask))
    jax.jit(lambda tree: tree, donate_argnums=0)(jax.tree.map(lambda x: x, changes))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))  # what is given away is not the base's
    pointers = [
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
        for tree in (base, upper_layers(base, config, 0))
    ]
    assert not pointers[0] & pointers[1]


def test_upper_layers_of_numpy_and_of_an_untied_model(rng):
    config = dataclasses.replace(LLAMA, tie_embeddings=False)
    base = random_params(rng, config)
    assert upper_layers(base, config, 1).keys() == {"layer_1", "final_norm", "lm_head"}
    changes = upper_layers(base, config, 0)
    assert changes.keys() == base.keys() - {"embed"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(changes))
    assert not np.shares_memory(changes["layer_0"]["mlp"]["up"]["kernel"], base["layer_0"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("num_frozen", [-1, 2, 3])
def test_a_number_of_frozen_layers_that_cannot_be(num_frozen, rng):
    with pytest.raises(InputError, match=rf"^num_frozen: got {num_frozen}, expected 0 to 1: the model has 2 layers"):
        upper_layers(random_params(rng, LLAMA), LLAMA, num_frozen)


# Over devices.


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2, dora=True)])
def test_an_adapter_is_cut_where_its_kernel_is(lora, rng):
    mesh = make_mesh(2, 2, 2)
    config = dataclasses.replace(LLAMA, vocab_size=32)
    base = random_params(rng, config)
    adapter = trained(rng, base, lora)
    params = overlay(base, adapter)
    placed = jax.device_put(params, param_shardings(mesh, params))
    expected = {  # query [12, 24]: in over fsdp, out over tensor; output [24, 12] the other way round
        ("query", "lora_a"): (6, 2), ("query", "lora_b"): (2, 12), ("query", "lora_magnitude"): (12,),
        ("output", "lora_a"): (12, 2), ("output", "lora_b"): (2, 6), ("output", "lora_magnitude"): (12,),
    }  # fmt: skip
    for (name, kind), shape in expected.items():
        shards = placed["layer_0"]["attention"][name][kind].addressable_shards
        assert {shard.data.shape for shard in shards} == {shape}, (name, kind)
    tokens, mask = batch(rng, config, (9, 5, 1, 2))
    whole = logits_of(scaled(config, lora), params, tokens, mask)
    assert max_relative_error(logits_of(scaled(config, lora), placed, tokens, mask), whole, mask) < TOLERANCE
