"""The costs of a compiled program, for programs whose costs are known."""

import math
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.memory import resident_bytes
from ppo_jax.planning import count_parameters, program_cost, release_free_memory

MB = 2**20


def cost_of(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program_cost(jax.jit(function, **options).lower(*arguments).compile())


def test_a_matrix_product():
    m, n, k = 256, 512, 1024
    cost = cost_of(jnp.matmul, (m, k), (k, n))
    assert cost["gflops"] == pytest.approx(2 * m * n * k / 1e9, rel=1e-3)  # m n k multiplications, as many additions
    assert cost["arguments_mb"] == 4 * (m * k + k * n) / MB
    assert cost["outputs_mb"] == 4 * m * n / MB
    assert cost["donated_mb"] == 0
    assert cost["peak_mb"] >= cost["arguments_mb"] + cost["outputs_mb"]


def test_a_donated_argument_is_counted_once():
    kept = cost_of(lambda x: x + 1, (512, 512))
    donated = cost_of(lambda x: x + 1, (512, 512), donate_argnums=0)
    assert donated["donated_mb"] == 1
    assert donated["peak_mb"] == kept["peak_mb"] - 1


def test_temporaries_are_counted():
    # The product of [512, 8] and [8, 512] does not fit into the output's 2 kB, and has to lie somewhere.
    cost = cost_of(lambda x, y: jnp.sort(x @ y, axis=1)[:, 0], (512, 8), (8, 512))
    assert cost["temporaries_mb"] >= 1
    assert cost["peak_mb"] == cost["arguments_mb"] + cost["outputs_mb"] + cost["temporaries_mb"]


def test_costs_are_per_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    alone = cost_of(jnp.matmul, (1024, 256), (256, 512))
    shared = cost_of(jnp.matmul, (1024, 256), (256, 512), in_shardings=(rows, whole), out_shardings=rows)
    assert shared["gflops"] == pytest.approx(alone["gflops"] / 8, rel=1e-3)
    assert shared["arguments_mb"] == (1024 * 256 / 8 + 256 * 512) * 4 / MB
    assert shared["outputs_mb"] == alone["outputs_mb"] / 8


def test_what_a_backend_does_not_tell_is_nan():
    class Silent:
        def memory_analysis(self):
            return None

        def cost_analysis(self):
            return None

    assert all(math.isnan(x) for x in program_cost(Silent()).values())


def test_parameters_are_counted():
    tree = {"a": np.zeros((3, 4)), "b": {"c": jax.ShapeDtypeStruct((5,), jnp.float32), "d": jnp.zeros(())}}
    assert count_parameters(tree) == 12 + 5 + 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to give memory back")
def test_free_memory_goes_back_to_the_system():
    kept = [b"x" * 2**16 for _ in range(2**11)]  # 128 MiB, each too small to be mapped by itself
    last = b"y" * 2**16  # above them: without it the heap would shrink by itself
    before = resident_bytes()
    del kept
    release_free_memory()
    assert resident_bytes() < before - 2**26
    del last
