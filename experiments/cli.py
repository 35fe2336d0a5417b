"""What every experiment script does before its work: read flags and configuration, and report mistakes in one line."""

import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from experiments.ending import told_in_one_line
from experiments.settings import describe, from_config_dict
from ppo_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="experiments/configs/NAME.py; then --config.field=value"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; started again with the same folder, a run goes on")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "show every field with its value and help, and stop")
CACHE_BYTES = 2 * 2**30  # of compiled programs, those used last
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "compile, print memory and arithmetic per device, and stop")


def launch(kind: type, main: Callable[[Any, Path], None], dry_run: Callable[[Any], None]) -> None:
    """Runs a script; a mistake in the input ends in one line and exit status 1.

    Args:
        kind: the settings dataclass of the script.
        main: `main(settings, workdir)` does its work.
        dry_run: `dry_run(settings)` only compiles.
    """
    with told_in_one_line("interrupted; the same command goes on from the last checkpoint"):
        config = _parse(sys.argv)
        if _PRINT_CONFIG.value:
            print_config(kind, config)
            return
        settings = from_config_dict(kind, config)
        keep_compiled_programs()
        # float32 means float32: by default a GPU or TPU multiplies it with fewer digits, and acting and learning
        # disagree.
        jax.config.update("jax_default_matmul_precision", "float32")
        if _DRY_RUN.value:
            dry_run(settings)
        elif _WORKDIR.value:
            main(settings, Path(_WORKDIR.value).expanduser())
        else:
            raise InputError("--workdir: it is missing; expected a folder for this run")


def keep_compiled_programs() -> None:
    """What is compiled is kept for the next start, up to `CACHE_BYTES`, in ~/.cache/ppo_jax (XDG_CACHE_HOME).

    JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "ppo_jax"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def _parse(argv: list[str]) -> ml_collections.ConfigDict:
    app.define_help_flags()
    for name in ("config", "workdir", "print_config", "dry_run"):  # what --help shows
        flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[name])
    _check_config_path(argv)
    try:
        rest = flags.FLAGS(argv)
    except AttributeError as error:  # ml_collections: a field that does not exist, with its suggestion
        told = " ".join(str(error).replace("\\n", " ").replace("\\", "").strip("'").split())
        fields = re.sub(r'^Key "([^"]*)" does not exist.*Other fields present: .*\}"', r"\1.", told)  # all of them
        name, _, suggestion = fields.partition(" ")
        raise InputError(f"--config: no such field: {name.strip(chr(39)).rstrip('.')}. {suggestion}") from error
    except Exception as error:  # a wrong flag, or whatever the configuration file raises
        raise InputError(f"{type(error).__name__}: {_last_line(error)}") from error
    if len(rest) > 1:
        raise InputError(f"arguments: got {rest[1]!r}, expected flags only, such as --config.seed=1")
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise InputError(
            f"--config: the file failed to load, or its get_config returns no ConfigDict: {_reason(_CONFIG.value)}"
        )
    return _CONFIG.value


def _reason(config: Any) -> str:
    try:
        return f"got {config.seed!r}"  # ml_collections keeps the error of a failed load until the first access
    except Exception as error:
        return _last_line(error)


def _last_line(error: Exception) -> str:
    """What went wrong; above it ml_collections puts a whole traceback."""
    return (str(error).strip() or "no message").splitlines()[-1].strip()


def _check_config_path(argv: list[str]) -> None:
    """A wrong path is told here: ml_collections itself stays silent until the first access."""
    paths = [argument.split("=", 1)[1] for argument in argv if argument.lstrip("-").startswith("config=")]
    paths += [after for before, after in itertools.pairwise(argv) if before.lstrip("-") == "config"]
    folder = Path(__file__).parent / "configs"
    shipped = ", ".join(f"experiments/configs/{path.name}" for path in sorted(folder.glob("[!_]*.py")))
    if not paths and not any(argument.lstrip("-") in ("help", "helpfull", "helpshort") for argument in argv):
        raise InputError(f"--config: it is missing; expected a configuration file, of which are shipped: {shipped}")
    for path in paths:
        if not Path(path.split(":")[0]).is_file():
            raise InputError(f"--config: got {path}, which is no file; shipped are: {shipped}")


def print_config(kind: type, config: ml_collections.ConfigDict) -> None:
    """Every field with its value and help, as a table."""
    table = Table("field", "value", "help", box=None, pad_edge=False)
    for name, value, text in describe(kind, config):
        table.add_row(name, repr(value), text)
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)
