"""Which tensors the files of a model have, and where each belongs in our tree of parameters."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.hub.errors import HubError
from ppo_jax.hub.family import Family, Model
from ppo_jax.hub.tensors import listed
from ppo_jax.models import RewardModel
from ppo_jax.types import Params


class Tensor(NamedTuple):
    """A tensor in a file, and where it belongs."""

    name: str
    paths: tuple[str, ...]  # of our parameters, which share the last axis
    transposed: bool
    shape: tuple[int, ...]  # in our orientation, all parts together
    cuts: tuple[int, ...]  # where one part ends and the next begins
    dtype: np.dtype  # of our parameters
    heads: int = 0  # parts of equal size stand head by head; 0: side by side
    expert: int | None = None  # of which this is the part of our parameter, along its first axis

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """The parts of an array whose last axis is that of the tensor in our orientation."""
        if not self.heads:
            return np.split(array, self.cuts, axis=-1)
        by_head = array.reshape(*array.shape[:-1], self.heads, len(self.paths), -1)
        return [by_head[..., i, :].reshape(*array.shape[:-1], -1) for i in range(len(self.paths))]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The array that `split` takes apart."""
        if not self.heads:
            return np.concatenate(parts, axis=-1)
        by_head = [part.reshape(*part.shape[:-1], self.heads, -1) for part in parts]
        return np.stack(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dictionaries to path -> leaf, paths joined by slashes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def param_shapes(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter, as the model itself makes them; nothing is computed."""
    pad_id = (None,) if isinstance(model, RewardModel) else ()

    def init() -> Params:
        return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), *pad_id)["params"]

    return flatten(jax.eval_shape(init))


def file_layout(family: Family, model: Model, where: object, limit: float = math.inf) -> list[Tensor]:
    """Every tensor in the files of a model, by the table of its family.

    Args:
        family: whose files.
        model: the module.
        where: for messages.
        limit: how many tensors there can be: said before anything as large as a strange configuration claims is built.

    Raises:
        HubError: more layers or experts than `limit`, or a parameter that has no row in the table.
    """
    layers, experts = model.config.num_layers, model.config.num_experts
    if layers * max(experts, 1) > limit:
        told = f"{layers} layers" + (f" of {experts} experts" if experts else "")
        raise HubError(f"{where}: {told} in the configuration, {limit} tensors in the files")
    shapes = param_shapes(model)
    layout = list(_rows_present(family, model, shapes))
    lost = shapes.keys() - {path for tensor in layout for path in tensor.paths}
    if lost:
        architecture = family.architectures[type(model)]
        raise HubError(f"{where}: the files of {architecture} have no place for {listed(lost)}")
    return layout


def _rows_present(family: Family, model: Model, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[Tensor]:
    decoder = "decoder/" if isinstance(model, RewardModel) else ""
    for row in family.rows:
        for i in range(model.config.num_layers if "{i}" in row.theirs else 1):
            paths = tuple(path.format(i=i) for path in row.parts())
            paths = tuple(path if path in shapes else decoder + path for path in paths)
            if all(path in shapes for path in paths):
                first, ends = shapes[paths[0]], np.cumsum([shapes[path].shape[-1] for path in paths]).tolist()
                shape = (*first.shape[:-1], ends[-1])
                heads = model.config.num_heads if row.by_head else 0
                of = partial(Tensor, paths=paths, transposed=row.transposed, cuts=tuple(ends[:-1]), dtype=first.dtype)
                if "{j}" in row.theirs:
                    for j in range(model.config.num_experts):
                        yield of(row.theirs.format(i=i, j=j), shape=shape[1:], heads=heads, expert=j)
                else:
                    yield of(row.theirs.format(i=i), shape=shape, heads=heads)
