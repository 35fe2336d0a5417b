"""Which tensors the files of a model have, and where each belongs in our tree of parameters."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.hub.errors import HubError
from ppo_jax.hub.families import Family
from ppo_jax.hub.tensors import listed
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.types import Params


class Tensor(NamedTuple):
    """A tensor in a file, and where it belongs."""

    name: str
    paths: tuple[str, ...]  # of our parameters, side by side along the last axis
    transposed: bool
    shape: tuple[int, ...]  # in our orientation, all parts together
    cuts: tuple[int, ...]  # where one part ends and the next begins

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dictionaries to path -> leaf, paths joined by slashes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, as the model itself makes them; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    tree = jax.eval_shape(lambda ids, mask: Decoder(config).init(jax.random.key(0), ids, mask), ids, mask)["params"]
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def file_layout(family: Family, config: ModelConfig, where: object, limit: float = math.inf) -> list[Tensor]:
    """Every tensor in the files of a model, by the table of its family.

    Args:
        family: whose files.
        config: the model.
        where: for messages.
        limit: how many tensors there can be: said before anything as large as a strange configuration claims is built.

    Raises:
        HubError: more layers than `limit`, or a parameter that has no row in the table.
    """
    if config.num_layers > limit:
        raise HubError(f"{where}: {config.num_layers} layers in the configuration, {limit} tensors in the files")
    shapes = param_shapes(config)
    layout = list(_rows_present(family, config, shapes))
    lost = shapes.keys() - {path for tensor in layout for path in tensor.paths}
    if lost:
        raise HubError(f"{where}: the files of {family.architecture} have no place for {listed(lost)}")
    return layout


def _rows_present(family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    for row in family.rows:
        for i in range(config.num_layers if "{i}" in row.theirs else 1):
            paths = tuple(path.format(i=i) for path in row.parts())
            if all(path in shapes for path in paths):
                ends = np.cumsum([shapes[path][-1] for path in paths]).tolist()
                shape = (*shapes[paths[0]][:-1], ends[-1])
                yield Tensor(row.theirs.format(i=i), paths, row.transposed, shape, tuple(ends[:-1]))
