"""A gradient step on the next-token loss with Adam beside torch's: tokens a second."""

import dataclasses
import statistics
from collections.abc import Callable

from experiments.benchmarks.limits import seconds
from experiments.benchmarks.models import SHAPES, attention, in_torch, random_params, weights
from experiments.benchmarks.sides import Comparison, Side
from ppo_jax.models import Decoder

BATCH, LENGTH = 8, 96
LR = 1e-5
STEPS = 4  # of a measurement, after one that finds the caches as the other side has left them


def comparisons() -> list[Comparison]:
    """The rows: every token but the first is a target."""
    rows = []
    for shape in ("tiny", "gpt2"):
        for dtype in ("float32", "bfloat16"):
            given = {"shape": shape, "dtype": dtype}
            rows.append(
                Comparison(
                    "update", f"{shape}, {BATCH} x {LENGTH} tokens", BATCH, "tokens/s", False,
                    Side("experiments.benchmarks.update:ours", given),
                    Side("experiments.benchmarks.update:torch", given, ("torch", "transformers")),
                    flops(shape), dtype=dtype,
                )
            )  # fmt: skip
    return rows


def flops(shape: str) -> float:
    """Floating-point operations of a token: 2 a weight forward, 4 backward."""
    config = SHAPES[shape]
    return 6.0 * sum(weights(config)) + 3 * attention(config, LENGTH / 2)


def ours(shape: str, dtype: str) -> Callable[[], dict]:
    """`sft.make_sft_step`: float32 parameters, products in `dtype`."""
    import jax
    import jax.numpy as jnp

    from ppo_jax.optim import fresh_state, make_optimizer
    from ppo_jax.sft import make_sft_step
    from ppo_jax.sharding import make_mesh, make_shardings
    from ppo_jax.types import Examples

    model = Decoder(dataclasses.replace(SHAPES[shape], dtype=dtype))
    tx = make_optimizer(lambda step: LR)
    state = fresh_state(random_params(model), tx, jax.random.key(1))
    shardings = make_shardings(make_mesh(1, 1, 1), state)
    state = jax.device_put(state, shardings.state)
    tokens = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 3, SHAPES[shape].vocab_size)
    ones = jnp.ones_like(tokens)
    batch = jax.device_put(Examples(tokens, ones, ones > 0), shardings.batch)
    learn = make_sft_step(model, tx, shardings).learn.lower(state, batch).compile()

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(learn(state, batch))

    return lambda: measured(step)


def torch(shape: str, dtype: str) -> Callable[[], dict]:
    """Torch's eager AdamW (fused) on transformers' model; bfloat16 by autocast, as its users train."""
    import torch

    torch.manual_seed(0)
    model = in_torch(Decoder(SHAPES[shape]), "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    tokens = torch.randint(3, SHAPES[shape].vocab_size, (BATCH, LENGTH), device=model.device)

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits

    return lambda: measured(step)


def measured(step: Callable[[], None]) -> dict:
    """Tokens a second."""
    step()
    return {"value": BATCH * LENGTH / statistics.fmean(seconds(step) for _ in range(STEPS))}
