"""From the text in `config.reward` to a judge."""

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from ppo_jax.errors import InputError
from ppo_jax.rewards.host import HostReward
from ppo_jax.rewards.sentiment import vader

HOST_REWARDS: dict[str, HostReward] = {"vader": vader}


def load_reward(spec: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Callable, bool]:
    """Finds the judge that a configuration names.

    Args:
        spec: the name of a built-in host reward ("vader"); or `FILE.py:function` / `package.module:function`, a host
            reward `function(prompts, completions, **columns) -> list[float]`; or either of these after `jax:`, where
            `function(tokenizer)` returns a score in pure JAX, `rollout -> [B]`, that is compiled into the iteration.
        tokenizer: given to a `jax:` function.

    Returns:
        (the judge, whether it is pure JAX).

    Raises:
        InputError: nothing of that name.
    """
    in_program = spec.startswith("jax:")
    target = spec.removeprefix("jax:")
    if not in_program and target in HOST_REWARDS:
        try:
            HOST_REWARDS[target](
                [], []
            )  # what it needs and is not installed shows itself now, not after the first rollout
        except ImportError as error:
            raise InputError(f"config.reward: {error}") from error
        return HOST_REWARDS[target], False
    module_name, _, function_name = target.rpartition(":")
    if not module_name or not function_name:
        raise InputError(
            f"config.reward: got {spec!r}, expected one of {', '.join(HOST_REWARDS)}, "
            "FILE.py:function or package.module:function, each of these two after jax: for a JAX score"
        )
    function = getattr(_import(spec, module_name), function_name, None)
    if not callable(function):
        raise InputError(f"config.reward: got {spec!r}, but {module_name} has no function {function_name!r}")
    if not in_program:
        return function, False
    try:
        return function(tokenizer), True
    except Exception as error:  # the function is the user's, and may raise anything
        raise InputError(f"config.reward: {spec}: {type(error).__name__}: {error}") from error


def _import(spec: str, name: str) -> object:
    """Runs a file or imports a module, which find their neighbours: beside the file, or in the current folder."""
    path = Path(name).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"config.reward: got {spec!r}, but there is no file {name}")
    neighbours = str(path.parent.absolute() if path.suffix == ".py" else Path.cwd())
    sys.path.insert(0, neighbours)
    try:
        return SimpleNamespace(**runpy.run_path(str(path))) if path.suffix == ".py" else importlib.import_module(name)
    except Exception as error:  # the code is the user's, and may raise anything
        raise InputError(f"config.reward: {name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(neighbours)
