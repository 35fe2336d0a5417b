"""Where arrays live: a mesh of devices with three axes, and one table that says how each parameter is cut.

`data` and `fsdp` both split the batch; `fsdp` also splits parameters and optimizer moments; `tensor` splits the matrix
products of each layer (Megatron's arrangement: columns into a block, rows out of it).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from ppo_jax.errors import InputError
from ppo_jax.types import Params, TrainState

Tree = TypeVar("Tree")
Batch = TypeVar("Batch")

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|positions)/embedding$", P("tensor", "fsdp")),
    (r"router/kernel$", P("fsdp", None)),
    (r"expert_(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [experts, in, out]
    (r"expert_down/kernel$", P(None, "tensor", "fsdp")),
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(output|down)/kernel$", P("tensor", "fsdp")),
    (r"(output|down)/bias$", P()),
    (r"(query|key|value|gate|up)/lora_a$", P("fsdp", None)),  # an adapter is cut where its kernel is
    (r"(query|key|value|gate|up)/lora_b$", P(None, "tensor")),
    (r"(query|key|value|gate|up)/lora_magnitude$", P("tensor")),
    (r"(output|down)/lora_a$", P("tensor", None)),
    (r"(output|down)/lora_b$", P(None, "fsdp")),
    (r"(output|down)/lora_magnitude$", P()),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"norm/(scale|bias)$", P()),
    (r"(value|score)_head/(kernel|bias)$", P()),
)


class Shardings(NamedTuple):
    """Where the arguments of a train step live; `batch` cuts the leading axis of every array in a batch."""

    state: TrainState
    ref_params: Params
    judge_params: Params
    batch: NamedSharding
    replicated: NamedSharding


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data x fsdp x tensor devices; `data=-1` takes all that are left.

    Raises:
        InputError: more devices than there are, or sizes that do not divide them.
    """
    available = jax.device_count()
    if data == -1 and min(fsdp, tensor) >= 1 and available % (fsdp * tensor) == 0:
        data = available // (fsdp * tensor)
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1 or math.prod(sizes) > available:
        raise InputError(
            f"mesh: got data x fsdp x tensor = {data} x {fsdp} x {tensor}, expected at most {available} devices"
        )
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(mesh: Mesh, params: Params) -> Params:
    """The sharding of each parameter, by the first row of `RULES` that matches its path.

    An axis that does not divide the dimension (a vocabulary of 50257, say) leaves that dimension whole.

    Args:
        mesh: from `make_mesh`.
        params: arrays or their shapes; any tree whose paths end as the rules say (optimizer moments do).

    Raises:
        ValueError: a parameter of one or more dimensions that no row matches, by its path.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return _sharding(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding, params)


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    if not shape:
        return NamedSharding(mesh, P())
    for pattern, spec in RULES:
        if re.search(pattern, name):
            fits = (
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(tuple(spec) + (None,) * len(shape), shape, strict=False)
            )
            return NamedSharding(mesh, P(*fits))
    raise ValueError(
        f"sharding: no rule for parameter {name} of shape {shape}; add a row to RULES in ppo_jax/sharding.py"
    )


def make_place(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """A function that puts a parameter, by its path, where `param_shardings` says: for `hub.load_params`."""
    return lambda path, array: jax.device_put(array, _sharding(mesh, path, array.shape))


def minibatches(batch: Tree, num: int) -> Tree:
    """`[B, ...]` to `[num, B / num, ...]` in every leaf; part i has rows i, i + num, ..., so some of every device's."""
    return jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1), batch)


def by_minibatch(function: Callable[[Batch], Tree], batch: Batch, num: int) -> Tree:
    """A function of a batch to arrays `[B, ...]`, a part at a time: acting needs no more memory than learning."""
    parts = jax.lax.map(function, minibatches(batch, num))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)  # the rows back in their places


def make_shardings(mesh: Mesh, state: TrainState, judge_params: Params = (), ref_params: Params = None) -> Shardings:
    """Where everything of a train step lives, by the shapes of what it is given (arrays or their shapes).

    Args:
        mesh: from `make_mesh`.
        state: a train state; rollouts that wait in it are cut like batches.
        judge_params: of a judge in the program.
        ref_params: of the reference; None: those of the state's decoder, all of which is trained.
    """
    replicated, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "fsdp")))
    places = param_shardings(mesh, state.replace(pending=()))
    if ref_params is None:
        ref_params = state.params.get("decoder", state.params)
    return Shardings(
        state=places.replace(pending=jax.tree.map(lambda _: batch, state.pending)),
        ref_params=param_shardings(mesh, ref_params),
        judge_params=param_shardings(mesh, judge_params),
        batch=batch,
        replicated=replicated,
    )


def jit_training(step: Callable[..., Any], in_shardings: Any, out_shardings: Any) -> Wrapped:
    """A train step, compiled over the mesh. Its argument `state` is donated. It is to be called by Python, not within
    another `jax.jit`; `jax.vmap` may map it.

    On a CPU XLA is told to keep `optimization_barrier`: it takes them out before it looks for common expressions, finds
    that what `jax.checkpoint` computes again is there already, and keeps it (`ModelConfig.remat`).
    """
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else None
    return jax.jit(
        step,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnames="state",
        compiler_options=options,
    )
