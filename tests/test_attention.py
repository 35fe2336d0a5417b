"""Attention: a NumPy loop as oracle, what nobody may look at, and where cuDNN's kernel takes it over."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ppo_jax.models import attention, causal_mask
from ppo_jax.models.attention import attend, fits_cudnn
from ppo_jax.sharding import make_mesh


def inputs(rng, heads=6, kv_heads=2, length=5, slots=5, size=4):
    query = rng.normal(size=(2, length, heads, size)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, kv_heads, slots, size)).astype(np.float32)
    return query, key, value


def by_hand(query, key, value, mask, scale, cap):
    """One query at a time."""
    batch, length, heads, _ = query.shape
    out, group = np.zeros(query.shape), heads // key.shape[1]
    for b, t, n in np.ndindex(batch, length, heads):
        scores = key[b, n // group].astype(np.float64) @ query[b, t, n] * scale
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0.0)
        out[b, t, n] = weights @ value[b, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_attention_equals_a_loop(rng, heads, kv_heads, cap):
    query, key, value = inputs(rng, heads, kv_heads, length=3, slots=7)
    mask = rng.random((2, 3, 7)) < 0.6
    mask[..., 0] = True
    expected = by_hand(query, key, value, mask, 0.5, cap)
    np.testing.assert_allclose(attend(query, key, value, mask, 0.5, cap), expected, rtol=0, atol=2e-6)


def test_grouped_queries_equal_repeated_keys(rng):
    query, key, value = inputs(rng)
    mask = causal_mask(jnp.ones((2, 5), bool))
    repeated = attend(query, np.repeat(key, 3, 1), np.repeat(value, 3, 1), mask, 0.5)
    np.testing.assert_allclose(attend(query, key, value, mask, 0.5), repeated, rtol=0, atol=1e-6)


def test_a_query_that_sees_nothing_gets_the_average(rng):
    query, key, value = inputs(rng, heads=2)
    heads = attend(query, key, value, jnp.zeros((2, 5, 5), bool), 0.5)
    average = value.mean(2)[:, None]  # [B, 1, N, H]: over the slots, of each head
    np.testing.assert_allclose(heads, np.broadcast_to(average, heads.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"backend": "cpu"}, False),
        ({"backend": "tpu"}, False),
        ({"dtype": "float32"}, False),
        ({"capability": "7.5"}, False),
        ({"capability": "gfx942"}, False),  # of another make
        ({"length": 1}, False),  # a decode step
        ({"length": 3}, False),
        ({"slots": 7}, False),
        ({"size": 12}, False),
        ({"size": 128}, True),
        ({"size": 256}, False),
        ({"cap": 50.0}, False),
        ({"tensor": 2}, True),
        ({"tensor": 4}, False),  # of 6 heads
    ],
)
def test_cudnn_takes_what_it_can(monkeypatch, changed, fits):
    case = {"backend": "gpu", "capability": "9.0", "tensor": 1, "dtype": "bfloat16"}
    case |= {"length": 4, "slots": 8, "size": 64, "cap": 0.0} | changed
    mesh = make_mesh(tensor=case["tensor"])
    monkeypatch.setattr(jax, "default_backend", lambda: case["backend"])
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=case["capability"])])
    place = NamedSharding(mesh, PartitionSpec())
    query = jax.ShapeDtypeStruct((2, case["length"], 6, case["size"]), case["dtype"], sharding=place)
    key = jax.ShapeDtypeStruct((2, 2, case["slots"], case["size"]), case["dtype"], sharding=place)
    found = []
    jax.eval_shape(lambda query, key: found.append(fits_cudnn(query, key, case["cap"])), query, key)
    assert found == [fits]


def test_cudnn_is_asked_for_the_same(monkeypatch, rng):
    """With XLA's own kernel in the place of cuDNN's: same layout, mask and scale."""
    asked = []
    real = jax.nn.dot_product_attention

    def instead(*args, implementation, **named):
        asked.append(implementation)
        return real(*args, **named)

    query, key, value = (x.astype(jnp.bfloat16) for x in inputs(rng, length=4, slots=6))
    mask = (rng.random((2, 4, 6)) < 0.6) | (np.arange(6) == 0)
    plain = attend(query, key, value, mask, 0.3)
    monkeypatch.setattr(attention, "fits_cudnn", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    fused = attend(query, key, value, mask, 0.3)
    assert asked == ["cudnn"]
    # Both round the weights, numbers below 1, to bfloat16 (2^-9), and sum them with values of a few units.
    np.testing.assert_allclose(np.float32(fused), np.float32(plain), rtol=0, atol=0.05)
