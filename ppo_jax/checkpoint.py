"""Train states on disk, with Orbax."""

from pathlib import Path
from typing import Any, Self

import jax

from ppo_jax.errors import InputError
from ppo_jax.types import TrainState


class CheckpointError(InputError):
    """A checkpoint that does not fit the run; the message names the first array that differs."""


class Checkpointer:
    """Saves train states by step, keeps the newest few, and finds the newest again.

    A save is written beside the others and renamed, so that a kill at any moment leaves the earlier steps whole and
    this one absent. On a GPU or TPU `save` returns when the state is on the host, and it is durable after `wait`; on a
    CPU it is durable when `save` returns: what writes and what trains would share the cores, and the next train step
    could not reuse the memory of the state.

    To be used in a `with`, which waits at its end.
    """

    def __init__(self, folder: str | Path, max_to_keep: int = 2) -> None:
        """Opens a folder, and makes it if need be; what an interrupted save left there is removed."""
        import orbax.checkpoint as ocp  # slow to import

        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            enable_async_checkpointing=jax.default_backend() != "cpu",
            cleanup_tmp_directories=True,
        )
        self._args = ocp.args
        # The handler is named, so that a new process can read the tree of what an earlier one saved.
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handler)

    def save(self, state: TrainState) -> None:
        """Saves under `state.step`; a step that is there already is left as it is."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=self._args.StandardSave(_to_tree(state)))

    def wait(self) -> None:
        """Until what was saved is durable."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The newest saved step, None when there is none."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, like: TrainState, before: int | None = None) -> TrainState:
        """The newest saved state, placed as `like` is.

        Args:
            like: a state of the same shapes, dtypes and shardings, a fresh one say.
            before: only steps below this one count.

        Raises:
            CheckpointError: nothing is saved, or an array is missing, left over, or of another shape or dtype.
        """
        self.wait()
        step = max((step for step in self._manager.all_steps() if before is None or step < before), default=None)
        if step is None:
            raise CheckpointError(f"checkpoint: nothing is saved in {self._manager.directory}")
        tree = _to_tree(like)
        _check_same(self._manager.item_metadata(step), tree, f"{self._manager.directory}/{step}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        return _from_tree(self._manager.restore(step, args=self._args.StandardRestore(abstract)), like)

    def close(self) -> None:
        """Waits for the last save, and ends Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it, also when something went wrong: what was saved before is kept."""
        self.close()


def free(state: TrainState) -> None:
    """Gives the memory of a state back that a restored one replaces."""
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema_params, state.pending)):
        leaf.delete()


def _to_tree(state: TrainState) -> dict[str, Any]:
    fields = {name: value for name, value in vars(state).items() if name != "key" and jax.tree.leaves(value)}
    return fields | {"key_data": jax.random.key_data(state.key)}


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    fields = dict(tree)
    key = jax.random.wrap_key_data(fields.pop("key_data"), impl=jax.random.key_impl(like.key))
    return like.replace(key=jax.device_put(key, like.key.sharding), **fields)


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_same(saved: Any, expected: Any, where: str) -> None:
    """Orbax casts a wrong dtype silently and names no parameter on a wrong shape; this does neither."""
    saved_leaves, expected_leaves = _leaves(saved), _leaves(expected)
    for name in sorted(saved_leaves.keys() | expected_leaves.keys()):
        old, new = saved_leaves.get(name), expected_leaves.get(name)
        old_kind = "nothing" if old is None else f"{old.dtype}{list(old.shape)}"
        new_kind = "nothing" if new is None else f"{new.dtype}{list(new.shape)}"
        if old_kind != new_kind:
            raise CheckpointError(f"checkpoint: {where}: {name}: got {old_kind}, expected {new_kind}")
