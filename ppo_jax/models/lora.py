"""Parameters on top of frozen ones: adapters of low rank (LoRA), the upper layers alone (hydra), or everything.

A decoder that is trained is `overlay(base, changes)`: `base` stays as it is and is shared with whoever else reads it
(the reference policy is the base with nothing laid over it), `changes` is the tree that is trained, saved and averaged.

Sources: Hu et al. 2021 (LoRA, arXiv:2106.09685), Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732), Liu et al. 2024 (DoRA,
arXiv:2402.09353), Ouyang et al. 2022 and CarperAI's trlx (hydra).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.errors import InputError, check
from ppo_jax.models.config import ModelConfig

Params = Mapping[str, Any]
"""Nested dictionaries of arrays."""

EVERY_PROJECTION = "query|key|value|output|gate|up|down"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which projections of the layers get an adapter, and how large it is.

    Raises:
        InputError: a field outside its range, by name, with its value and what was expected.
    """

    rank: int = 8  # r: columns of A, rows of B
    alpha: float = 16.0  # strength; see `scale`
    targets: str = EVERY_PROJECTION  # regular expression, searched for in paths such as layer_0/attention/query
    rslora: bool = False  # a scale that does not shrink the gradient of a large rank
    dora: bool = False  # a trained magnitude for each output, of which the adapter turns the direction

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("rank", self.rank, type(self.rank) is int and self.rank > 0, "a positive whole number")
        check("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InputError(f"targets: got {self.targets!r}, expected a regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """What `A B` is multiplied with, for `ModelConfig.lora_scale`: alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def overlay(base: Params, changes: Params) -> dict[str, Any]:
    """The parameters of `base` with those of `changes` laid over them; no array is copied.

    Args:
        base: nested dict of arrays.
        changes: nested dict of arrays; what is also in `base` wins over it, what is not is added.

    Returns:
        A new nested dict whose leaves are those of the two arguments themselves.
    """
    both = dict(base)
    for name, change in changes.items():
        both[name] = overlay(both.get(name, {}), change) if isinstance(change, Mapping) else change
    return both


def init_adapter(base: Params, config: LoRAConfig, key: jax.Array) -> dict[str, Any]:
    """A new adapter, to be laid over `base`; it changes nothing yet, since B is zero.

    A ~ U(-1/sqrt(in), 1/sqrt(in)), the uniform law of He with a = sqrt(5); DoRA's magnitude is the norm of each column.

    Args:
        base: parameters of a `Decoder`.
        config: what to make.
        key: a typed key.

    Returns:
        `{"layer_0": {"attention": {"query": {"lora_a": [in, r], "lora_b": [r, out]}}}}` for each target, float32; with
        `dora` also `"lora_magnitude": [out]`.

    Raises:
        InputError: the regular expression matches no projection; the message lists what there is.

    Source: huggingface/peft `src/peft/tuners/lora/layer.py`, `reset_lora_parameters`: the same law.
    """
    kernels = dict(_kernels(base))
    targets = sorted(path for path in kernels if re.search(config.targets, path))
    if not targets:
        there = ", ".join(sorted(kernels)[:7])
        raise InputError(f"targets: got {config.targets!r}, which matches no projection, expected some of {there}, ...")
    adapter: dict[str, Any] = {}
    for path, draw in zip(targets, jax.random.split(key, len(targets)), strict=True):
        kernel = jnp.asarray(kernels[path])
        a = jax.random.uniform(draw, (kernel.shape[0], config.rank), minval=-1, maxval=1) / math.sqrt(kernel.shape[0])
        one = {"lora_a": a, "lora_b": jnp.zeros((config.rank, kernel.shape[1]))}
        if config.dora:
            one["lora_magnitude"] = column_norms(kernel, **one, scale=0.0)
        for name in reversed(path.split("/")):
            one = {name: one}
        adapter = overlay(adapter, one)
    return adapter


def merge(params: Params, scale: float) -> dict[str, Any]:
    """Plain parameters that compute what `params` with its adapter compute: W + scale A B, with DoRA's magnitudes.

    W' = m (W + s A B) / ||W + s A B||, the norm over each column; without magnitudes W' = W + s A B. In float32, then
    rounded to the dtype of W.

    Args:
        params: parameters of a `Decoder` overlaid with an adapter; without one they come back as they are.
        scale: `LoRAConfig.scale`.

    Returns:
        A new nested dict without `lora_*`; leaves that no adapter changes are not copied.
    """
    if "lora_a" not in params:
        return {name: merge(x, scale) if isinstance(x, Mapping) else x for name, x in params.items()}
    rest = {name: x for name, x in params.items() if not name.startswith("lora_")}
    kernel = _with_delta(params["kernel"], params["lora_a"], params["lora_b"], scale)
    if "lora_magnitude" in params:
        turned = params["lora_magnitude"] / column_norms(params["kernel"], params["lora_a"], params["lora_b"], scale)
        kernel = kernel * turned[None, :]
    return rest | {"kernel": kernel.astype(params["kernel"].dtype)}


def upper_layers(base: Params, config: ModelConfig, num_frozen: int) -> dict[str, Any]:
    """What is trained when the lower layers are frozen: a copy of everything above them (the hydra form).

    That is the layers from `num_frozen` on, the final norm, and the vocabulary projection where it is not tied;
    embeddings stay frozen. It is a copy, since the reference keeps the base's own and trained buffers are donated.

    Args:
        base: parameters of a `Decoder`.
        config: the model.
        num_frozen: layers that are not trained, 0 to num_layers - 1.

    Returns:
        A tree for `overlay(base, ...)`.

    Raises:
        InputError: no layer would be left to train, or a negative number.
    """
    expected = f"0 to {config.num_layers - 1}: the model has {config.num_layers} layers"
    check("num_frozen", num_frozen, 0 <= num_frozen < config.num_layers, expected)
    names = [f"layer_{i}" for i in range(num_frozen, config.num_layers)] + ["final_norm", "lm_head"]
    return jax.tree.map(lambda leaf: leaf.copy(), {name: base[name] for name in names if name in base})


def column_norms(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """||W + s A B|| of each output, over its inputs: `[in, out]` to `[out]` float32."""
    return jnp.linalg.norm(_with_delta(kernel, lora_a, lora_b, scale), axis=0)


def _with_delta(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """W + s A B in float32, whatever the device likes to round products to."""
    a, b = (jnp.asarray(x, jnp.float32) for x in (lora_a, lora_b))
    return jnp.asarray(kernel, jnp.float32) + scale * jnp.matmul(a, b, precision="highest")


def _kernels(base: Params, path: str = "") -> Iterator[tuple[str, jax.Array]]:
    """(path, kernel) of the projections in the layers, but for those of experts and their router."""
    for name, child in base.items():
        if isinstance(child, Mapping) and (path or name.startswith("layer_")):
            here = f"{path}/{name}" if path else name
            if "kernel" in child and not name.startswith(("expert_", "router")):
                yield here, child["kernel"]
            yield from _kernels(child, here)
