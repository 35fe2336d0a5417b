"""What the machine itself reaches."""

import time
from collections.abc import Callable

SIZE = 2048
REPEATS = 5


def matmul() -> Callable[[], dict]:
    """Floating-point operations a second of float32 matrix products, the best of a few."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision="float32")).lower(x).compile()

    def measure() -> dict:
        best = min(_seconds(lambda: multiply(x).block_until_ready()) for _ in range(REPEATS))
        return {"value": 2 * SIZE**3 / best}

    return measure


def _seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
