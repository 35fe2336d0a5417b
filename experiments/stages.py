"""Stages of a long road: each in its folder, each done once for the same settings and inputs."""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ppo_jax.errors import InputError
from ppo_jax.fingerprints import digest_of
from ppo_jax.lock import NAME as LOCK
from ppo_jax.lock import lock_folder
from ppo_jax.runs import write_json

Work = Callable[[Path], dict[str, Any]]


class Stages:
    """Which stages of a workdir are done, and with what (`stages.json`).

    A stage whose settings or inputs have changed starts anew; its old folder stays beside it as NAME.old, NAME.old2,
    and so on: nothing is deleted.
    """

    def __init__(self, workdir: Path) -> None:
        """Reads what is done.

        Raises:
            InputError: `stages.json` is damaged, the folder holds something else, or another process has it.
        """
        self.workdir, self.path = workdir, workdir / "stages.json"
        foreign = workdir.exists() and {child.name for child in workdir.iterdir()} - {".stages.json.tmp", LOCK}
        if not self.path.exists() and foreign:
            raise InputError(f"workdir {workdir}: it holds files but no stages.json; expected an empty folder or a run")
        if workdir.exists():
            lock_folder(workdir)  # before it is read: another process may be about to write
        self.walked: list[str] = []  # names of the stages that were asked for, in order
        self._entries: dict[str, dict[str, Any]] = _read(self.path) if self.path.exists() else {}

    def run(
        self,
        name: str,
        inputs: Any,
        after: Collection[str],
        work: Work,
        protected: Callable[[Path], str] = lambda folder: "",
    ) -> dict[str, Any]:
        """The result of a stage: worked out now, or remembered.

        Args:
            name: of the stage and of its folder.
            inputs: what the result depends on, beside earlier stages; anything that JSON can hold.
            after: names of the stages whose results it uses.
            work: takes the folder, which a killed run may have left half full, and returns the result.
            protected: what a folder holds that must not be set aside without being asked for; "" if nothing.

        Raises:
            InputError: the folder would have to be set aside, and is protected; or another process has the workdir.
        """
        self.walked.append(name)
        self.workdir.mkdir(parents=True, exist_ok=True)
        lock_folder(self.workdir)
        # A stage that was run again has another `run`, also where its inputs are the same: its result may differ.
        fingerprint = digest_of([inputs, [self._entries[earlier]["run"] for earlier in after]])
        entry, folder = self._entries.get(name, {}), self.workdir / name
        same = entry.get("fingerprint") == fingerprint and folder.exists()
        if same and "result" in entry:
            return entry["result"]
        print(f"{name}: {folder}", flush=True)
        if folder.exists() and not same:
            held = protected(folder)
            if held:
                raise InputError(
                    f"{folder}: it holds {held}, made with other settings or after other stages; expected those, "
                    "another workdir, or this folder moved away"
                )
            print(f"{name}: other settings or inputs; the old folder stays as {_set_aside(folder)}", flush=True)
        entry = {"fingerprint": fingerprint, "run": entry["run"] if same else secrets.token_hex(8)}
        self._note(name, entry)
        result = work(folder)
        self._note(name, entry | {"result": result})
        return result

    def result(self, name: str) -> dict[str, Any]:
        """The result of a stage that is done."""
        return self._entries[name]["result"]

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        self._entries[name] = entry
        write_json(self.path, self._entries)


def identity(inputs: Any, may_change: Collection[str] = ()) -> Any:
    """What tells whether inputs have changed.

    Of settings (a dataclass) every field but those in `may_change`; of a text that names a file the file's SHA-256 as
    well, of one that names a folder the names, sizes and times in it. `jax:` and `model:` before a name, and
    `:function` after it, are understood.
    """
    if dataclasses.is_dataclass(inputs):
        fields = [field.name for field in dataclasses.fields(inputs) if field.name not in may_change]
        return {name: identity(getattr(inputs, name)) for name in fields}
    if not isinstance(inputs, str) or not inputs:
        return inputs
    name = inputs.removeprefix("jax:").removeprefix("model:")
    path = Path(name if Path(name).exists() else name.rpartition(":")[0] or name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return [inputs, hashlib.file_digest(file, "sha256").hexdigest()]
    if path.is_dir():
        files = [child for child in path.iterdir() if child.is_file()]
        return [inputs, sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
    return inputs


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())
        whole = all(isinstance(entry[name], str) for entry in entries.values() for name in ("fingerprint", "run"))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if not whole:
        raise InputError(f"{path}: damaged: a fingerprint or a run is no text")
    return entries


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number if number > 1 else ''}")).exists():
        number += 1
    folder.rename(aside)
    return aside
