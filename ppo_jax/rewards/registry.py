"""From the text in `config.reward` to a judge."""

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from ppo_jax import hub
from ppo_jax.errors import InputError, check
from ppo_jax.rewards.host import HostReward
from ppo_jax.rewards.model import load_scorer, make_model_score, make_text_score
from ppo_jax.rewards.sentiment import vader
from ppo_jax.tokenizers import SpecialTokens, same_tokenizer
from ppo_jax.types import Params, Rollout

HOST_REWARDS: dict[str, HostReward] = {"vader": vader}


class Judge(NamedTuple):
    """What gives scores: a function on the host, or one in the program with its parameters. One of the two is None."""

    host: Any  # a HostReward
    score: Callable[[Params, Rollout], jax.Array] | None = None
    params: Params = ()


def load_reward(spec: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens | None = None) -> Judge:
    """Finds the judge that a configuration names.

    Args:
        spec: the name of a built-in host reward ("vader"); or `FILE.py:function` / `package.module:function`, a host
            reward `function(prompts, completions, **columns) -> list[float]`; or either of these after `jax:`, where
            `function(tokenizer)` returns a score in pure JAX, `rollout -> [B]`; or a reward model's folder after
            `model:`. The score of a reward model is compiled into the iteration if it has the policy's tokenizer, and
            is a host reward if it has another.
        tokenizer: the policy's.
        special: the policy's pad and EOS; None: a reward model judges text, whatever its tokenizer.

    Raises:
        InputError: nothing of that name.
    """
    if spec.startswith("model:"):
        return _load_model(spec.removeprefix("model:"), tokenizer, special)
    if not spec.startswith("jax:"):
        return Judge(load_host_reward(spec))
    function = _load_function(spec, spec.removeprefix("jax:"))
    try:
        score = function(tokenizer)
    except Exception as error:  # the function is the user's, and may raise anything
        raise InputError(f"config.reward: {spec}: {type(error).__name__}: {error}") from error
    return Judge(None, lambda params, rollout: score(rollout))


def check_score(name: str, judge: Judge, batch_size: int, prompt_length: int, response_length: int) -> None:
    """Tries a score in pure JAX on shapes, without computing anything; a host reward passes.

    Raises:
        InputError: it fails, or does not return one number a sequence.
    """
    if judge.score is None:
        return

    def try_out(params: Params) -> jax.Array:
        per_token = jnp.zeros((batch_size, response_length))
        length = prompt_length + response_length
        tokens, mask = jnp.zeros((batch_size, length), jnp.int32), jnp.ones((batch_size, length), bool)
        return judge.score(params, Rollout(tokens=tokens, mask=mask, logprobs=per_token, values=per_token))

    try:
        shape = jax.eval_shape(try_out, judge.params).shape
    except Exception as error:  # the score is the user's, and may raise anything
        raise InputError(f"config.reward: {name}: {type(error).__name__}: {error}") from error
    check(f"config.reward: {name}: shape", shape, shape == (batch_size,), f"({batch_size},), one score a sequence")


def load_host_reward(spec: str) -> HostReward:
    """The judge of texts that a configuration names: see `load_reward`; scores in pure JAX are refused.

    Raises:
        InputError: nothing of that name, or a score that knows tokens only.
    """
    if spec.startswith("model:"):
        return make_text_score(*load_scorer(hub.resolve(spec.removeprefix("model:"))))
    if spec.startswith("jax:"):
        raise InputError(f"reward: got {spec!r}, expected one that judges text: a jax: score knows tokens only")
    if spec not in HOST_REWARDS:
        return _load_function(spec, spec)
    try:
        HOST_REWARDS[spec]([], [])  # what it needs and is not installed shows itself now, not after the first rollout
    except ImportError as error:
        raise InputError(f"config.reward: {error}") from error
    return HOST_REWARDS[spec]


def _load_model(name: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens | None) -> Judge:
    folder = hub.resolve(name)
    config, params, own_tokenizer, own_special = load_scorer(folder)
    if special is None or not same_tokenizer(own_tokenizer, tokenizer):
        return Judge(make_text_score(config, params, own_tokenizer, own_special))
    unseen = [end for end in special.eos_ids if not tokenizer.decode([end], skip_special_tokens=True)]
    special = SpecialTokens(own_special.pad_id, (own_special.eos_ids[0], *unseen))  # another end is part of the text
    return Judge(None, make_model_score(config, special), params)


def _load_function(spec: str, target: str) -> Callable:
    module_name, _, function_name = target.rpartition(":")
    if not module_name or not function_name:
        raise InputError(
            f"config.reward: got {spec!r}, expected one of {', '.join(HOST_REWARDS)}, model:FOLDER, "
            "FILE.py:function or package.module:function, each of these two after jax: for a JAX score"
        )
    function = getattr(_import(spec, module_name), function_name, None)
    if not callable(function):
        raise InputError(f"config.reward: got {spec!r}, but {module_name} has no function {function_name!r}")
    return function


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
