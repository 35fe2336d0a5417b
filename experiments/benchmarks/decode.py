"""Sampling beside torch transformers' `generate`: new tokens a second, the prefill included."""

import dataclasses
from collections.abc import Callable

from experiments.benchmarks.limits import seconds
from experiments.benchmarks.models import PAD, SHAPES, attention, in_torch, random_params, weights
from experiments.benchmarks.sides import Comparison, Side
from ppo_jax.models import Decoder

PROMPT, NEW = 32, 64
BATCHES = (16, 32, 64)
TORCH = ("torch", "transformers")


def comparisons() -> list[Comparison]:
    """The rows; no sequence ends before its last token."""
    rows = []
    for shape in ("gpt2", "tiny"):
        for dtype in ("float32", "bfloat16"):
            for batch in BATCHES:
                given = {"shape": shape, "batch": batch, "dtype": dtype}
                rows.append(
                    Comparison(
                        "decode", f"{shape}, {PROMPT} + {NEW} tokens", batch, "tokens/s", False,
                        Side("experiments.benchmarks.decode:ours", given),
                        Side("experiments.benchmarks.decode:transformers", given, TORCH),
                        flops(shape), traffic(shape, batch, 4 if dtype == "float32" else 2), dtype,
                    )
                )  # fmt: skip
    return rows


def flops(shape: str) -> float:
    """Floating-point operations of a new token, with its share of the prefill."""
    config = SHAPES[shape]
    layers, projection = weights(config)
    prefill = PROMPT * (2 * layers + attention(config, PROMPT / 2))
    decode = (NEW - 1) * (2 * layers + attention(config, PROMPT + NEW / 2))
    return (prefill + decode) / NEW + 2 * projection


def traffic(shape: str, batch: int, size: int) -> float:
    """Bytes that are read for a new token: the weights once a step, and the sequence's own cache."""
    config = SHAPES[shape]
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (PROMPT + NEW / 2)
    return size * (sum(weights(config)) / batch + cache)


def ours(shape: str, batch: int, dtype: str) -> Callable[[], dict]:
    """`sampling.generate`, compiled."""
    import jax
    import jax.numpy as jnp

    from ppo_jax.models import ActorCritic
    from ppo_jax.sampling import SamplingConfig, generate
    from ppo_jax.types import Prompts

    config = dataclasses.replace(SHAPES[shape], dtype=dtype, param_dtype=dtype)
    params = {"decoder": random_params(Decoder(config))}
    tokens = jax.random.randint(jax.random.key(1), (batch, PROMPT), 3, config.vocab_size)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool))
    sampling = SamplingConfig(NEW, eos_ids=(), pad_id=PAD)
    model, key = ActorCritic(config), jax.random.key(2)
    program = jax.jit(lambda params, prompts, key: generate(model, params, prompts, key, sampling))
    run = program.lower(params, prompts, key).compile()

    def measure() -> dict:
        took = seconds(lambda: jax.block_until_ready(run(params, prompts, key)))
        return {"value": batch * NEW / took, "step_ms": 1000 * took / NEW}

    return measure


def transformers(shape: str, batch: int, dtype: str) -> Callable[[], dict]:
    """Torch transformers, with its dynamic cache."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    model = in_torch(Decoder(SHAPES[shape]), dtype).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.randint(3, SHAPES[shape].vocab_size, (batch, PROMPT), device=model.device)
    how = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0, pad_token_id=PAD, eos_token_id=None)

    def generate() -> None:
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=how)
        if out.shape[1] != PROMPT + NEW:
            raise RuntimeError(f"got {out.shape[1]} tokens, expected {PROMPT + NEW}")
        if out.is_cuda:
            torch.cuda.synchronize()

    return lambda: {"value": batch * NEW / seconds(generate)}
