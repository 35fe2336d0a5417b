"""What the machine itself reaches, and how time is taken."""

import time
from collections.abc import Callable

REPEATS = 5
BYTES = 2**29  # of the array that is read and written


def matmul(dtype: str) -> Callable[[], dict]:
    """Floating-point operations a second of matrix products, the best of a few."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision="float32")).lower(x).compile()

    def measure() -> dict:
        best = min(seconds(lambda: multiply(x).block_until_ready()) for _ in range(REPEATS))
        return {"value": 2 * size**3 / best}

    return measure


def bandwidth() -> Callable[[], dict]:
    """Bytes a second that are read and written in place, the best of a few."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(BYTES // 4)
    add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()

    def once() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    return lambda: {"value": 2 * BYTES / min(seconds(once) for _ in range(REPEATS))}


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
