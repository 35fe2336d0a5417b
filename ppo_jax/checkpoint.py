"""Train states on disk: written by Orbax, made durable here.

Orbax writes the arrays; a step counts once all its files, and a manifest with their digests, are forced to the disk and
the folder has got its name (`ppo_jax/manifest.py`). Then, and only then, older steps go.
"""

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax

from ppo_jax.errors import InputError
from ppo_jax.manifest import DamagedError, commit, facts_of, retire, verify
from ppo_jax.types import TrainState


class CheckpointError(InputError):
    """A checkpoint that does not fit the run, is damaged, or could not be saved; the message says which and why."""


class Checkpointer:
    """Saves train states by step, keeps the newest few, and finds the newest whole one again.

    A kill or a power loss at any moment leaves the earlier steps whole and this one whole or absent; a bit that has
    changed on the disk is noticed before anything is restored. On a GPU or TPU `save` returns when the state is on the
    host, and it is durable after `wait`; on a CPU it is durable when `save` returns: what writes and what trains would
    share the cores, and the next train step could not reuse the memory of the state.

    To be used in a `with`, which waits at its end. One process opens a folder at a time (`ppo_jax/lock.py`).
    """

    def __init__(self, folder: str | Path, max_to_keep: int = 2, inputs: Mapping[str, str] | None = None) -> None:
        """Opens a folder, and makes it if need be; what an interrupted save or removal left there is removed.

        Args:
            folder: of the checkpoints.
            max_to_keep: newest ones that stay.
            inputs: digests of what the run reads, by name; see `restore`.
        """
        import orbax.checkpoint as ocp  # slow to import

        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._max_to_keep, self._inputs = max_to_keep, dict(inputs or {})
        self._damaged: set[int] = set()  # found while looking for one to restore
        self._orbax = ocp
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, state: TrainState, early: bool = False) -> None:
        """Saves under `state.step`; a step that is there already is left as it is.

        Args:
            state: what is saved.
            early: only because the process ends now; it goes when a later one is there, and counts for nothing else.

        Raises:
            CheckpointError: it could not be written, or the one before it; earlier steps are as they were.
        """
        self.wait()
        step = int(state.step)
        if step in self._steps():
            return
        self._remove_leftovers()  # threads of Orbax may have gone on writing after a save that failed
        tree = _to_tree(state)
        if jax.default_backend() == "cpu":
            self._write(step, tree, early)
        else:
            self._saving = self._thread.submit(self._write, step, jax.device_get(tree), early)

    def wait(self) -> None:
        """Until what was saved is durable.

        Raises:
            CheckpointError: it could not be written; earlier steps are as they were.
        """
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def latest_step(self) -> int | None:
        """The newest saved step, None when there is none."""
        self.wait()
        return max(self._steps(), default=None)

    def restore(self, like: TrainState, before: int | None = None) -> TrainState:
        """The newest saved state that is whole, placed as `like` is; those that are not are logged as warnings. So are
        Python files among the inputs that have changed.

        Args:
            like: a state of the same shapes, dtypes and shardings, a fresh one say.
            before: only steps below this one count, and none that was saved early.

        Raises:
            CheckpointError: nothing is saved, or nothing is whole; or an array is missing, left over, or of another
                shape or dtype; or an input that is no Python file has changed since.
        """
        self.wait()
        found = []
        for step in sorted(self._steps() | self._damaged, reverse=True):
            if before is not None and (step >= before or self._is_early(step)):
                continue
            try:
                facts = verify(self._path(step))
            except DamagedError as error:
                self._damaged.add(step)
                found.append(str(error))
                continue
            for told in found:
                logging.warning("damaged checkpoint: %s; going back to step %d", told, step)
            self._check_inputs(step, facts["inputs"])
            return self._read(step, like)
        if found:
            raise CheckpointError(f"checkpoint: none in {self.folder} is whole: {'; '.join(found)}")
        raise CheckpointError(f"checkpoint: nothing is saved in {self.folder}")

    def close(self) -> None:
        """Waits for the last save, and ends its thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._remove_leftovers()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it, also when something went wrong: what was saved before is kept."""
        self.close()

    def _path(self, name: int | str) -> Path:
        return self.folder / str(name)

    def _steps(self) -> set[int]:
        """What has a name, and has not been found to be damaged."""
        return {int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()} - self._damaged

    def _remove_leftovers(self) -> None:
        for pattern in (".*.new*", ".*.old"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def _is_early(self, step: int) -> bool:
        try:
            return facts_of(self._path(step))["early"]
        except DamagedError:
            return False

    def _write(self, step: int, tree: dict[str, Any], early: bool) -> None:
        written, target = self._path(f".{step}.new"), self._path(step)
        try:
            with self._opened() as orbax:
                orbax.save(written, args=self._orbax.args.StandardSave(tree))
            if target.exists():  # a damaged one
                retire(target)
            commit(written, target, self._facts(step) | {"early": early})
        except Exception as error:  # of Orbax, TensorStore or the file system, each in its own way
            self._remove_leftovers()  # or the disk stays full
            size, free = sum(x.nbytes for x in jax.tree.leaves(tree)), shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"checkpoint: step {step} could not be saved in {self.folder}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}; it needs {size / 1e6:,.1f} MB, free are {free / 1e6:,.1f} MB; "
                "earlier steps are as they were"
            ) from error
        self._damaged.discard(step)
        planned = sorted(other for other in self._steps() if not self._is_early(other))
        for old in self._steps() - {step, *planned[-self._max_to_keep :]}:
            try:
                retire(self._path(old))
            except OSError as error:  # it is tried again after the next save
                logging.warning("old checkpoint: %s could not be removed: %s", self._path(old), error)

    def _facts(self, step: int) -> dict[str, Any]:
        versions = {"jax": jax.__version__, "orbax": self._orbax.__version__}
        return {"step": step, "inputs": self._inputs, "versions": versions, "devices": jax.device_count()}

    def _check_inputs(self, step: int, saved: Mapping[str, str]) -> None:
        changed = [name for name, digest in saved.items() if self._inputs.get(name, digest) != digest]
        for name in changed:
            if name.endswith(".py"):  # a judge that was mended
                logging.warning("changed since checkpoint %s: %s", self._path(step), name)
        if data := [name for name in changed if not name.endswith(".py")]:
            raise CheckpointError(
                f"checkpoint: {self._path(step)}: changed since it was saved: {', '.join(data)}; expected the same "
                "contents, or another workdir"
            )

    def _opened(self) -> Any:
        """Orbax, anew each time: after an error it goes on telling it."""
        return self._orbax.Checkpointer(self._orbax.StandardCheckpointHandler())

    def _read(self, step: int, like: TrainState) -> TrainState:
        tree = _to_tree(like)
        path = self._path(step)
        with self._opened() as orbax:
            _check_same(orbax.metadata(path).item_metadata, tree, str(path))
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
            return _from_tree(orbax.restore(path, args=self._orbax.args.StandardRestore(abstract)), like)


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
