"""From the text in `config.reward` to a judge."""

import importlib
import runpy
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
    return (function(tokenizer), True) if in_program else (function, False)


def _import(spec: str, name: str) -> object:
    path = Path(name).expanduser()
    if path.suffix != ".py":
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"config.reward: got {spec!r}, but module {name} cannot be imported: {error}") from error
    if not path.is_file():
        raise InputError(f"config.reward: got {spec!r}, but there is no file {name}")
    try:
        return SimpleNamespace(**runpy.run_path(str(path)))
    except Exception as error:  # the file is the user's, and may raise anything
        raise InputError(f"config.reward: {name} cannot be imported: {type(error).__name__}: {error}") from error
