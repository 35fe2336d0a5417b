"""From the text in `config.reward` to judges."""

from __future__ import annotations

import importlib
import math
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from ppo_jax import hub
from ppo_jax.errors import InputError
from ppo_jax.rewards.code import code
from ppo_jax.rewards.combined import Judge, Judges, judge_in_jax, make_judges
from ppo_jax.rewards.host import HostReward
from ppo_jax.rewards.http import HttpOptions, make_http_reward
from ppo_jax.rewards.model import load_scorer, make_model_score, make_text_score
from ppo_jax.rewards.sentiment import vader
from ppo_jax.tokenizers import SpecialTokens, same_tokenizer
from ppo_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOST_REWARDS: dict[str, HostReward] = {"vader": vader, "code": code}
_WEB = ("http://", "https://")


def load_reward(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens | None = None,
    http: HttpOptions | None = None,
) -> Judges:
    """Finds the judges that a configuration names.

    Args:
        spec: one or several, separated by commas, each with its weight after `*` if it has one: see `split_judges`.
            One is the name of a built-in host reward (vader, code); or `FILE.py:function`, `package.module:function`, a
            host reward `function(prompts, completions, **columns) -> list[float]`; or either of these after `jax:`,
            where `function(tokenizer)` returns a score in pure JAX, rollout to `[B]`, or to `[B, R]` if it judges each
            token (which no judge of texts can); or a reward model's folder after `model:`; or the web address of a
            service (see `make_http_reward`). The score of a reward model is compiled into the iteration if it has the
            policy's tokenizer, and is a host reward if it has another.
        tokenizer: the policy's.
        special: the policy's pad and EOS; None: a reward model judges text, whatever its tokenizer.
        http: how services are asked; None: the defaults.

    Raises:
        InputError: nothing of that name, or a weight that is no number.
    """
    specs, weights = zip(*split_judges(spec), strict=True)
    members, params = zip(*(_load(one, tokenizer, special, http) for one in specs), strict=True)
    return make_judges(_short_names(specs), weights, members, params)


def split_judges(spec: str) -> list[tuple[str, float]]:
    """Judges and weights of a list: "model:RM*0.8, vader*-0.2, FILE.py:function" gives the weights 0.8, -0.2 and 1.

    The weight is what stands after the last `*`. What a judge with a negative one counts is a price; one with 0 is
    logged only. There is no other meaning of a comma: in a web address it is written %2C.

    Raises:
        InputError: a weight that is not a finite number, or no weight that is not 0.
    """
    judges = []
    for part in spec.split(","):
        name, star, text = part.rpartition("*")
        try:
            weight = float(text) if star else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"config.reward: got {part.strip()!r}, expected a finite number after the *")
        judges.append(((name if star else part).strip(), weight))
    if not any(weight for _, weight in judges):
        raise InputError(f"config.reward: got {spec!r}, expected a weight other than 0")
    return judges


def load_host_reward(spec: str, http: HttpOptions | None = None) -> HostReward:
    """The one judge of texts that a configuration names: see `load_reward`; scores in pure JAX are refused.

    Raises:
        InputError: nothing of that name, or a score that knows tokens only.
    """
    if spec.startswith("model:"):
        return make_text_score(*load_scorer(hub.resolve(spec.removeprefix("model:"))))
    if spec.startswith("jax:"):
        raise InputError(f"reward: got {spec!r}, expected one that judges text: a jax: score knows tokens only")
    if spec.startswith(_WEB):
        return make_http_reward(spec, http)
    if spec not in HOST_REWARDS:
        return _load_function(spec, spec)
    try:
        HOST_REWARDS[spec]([], [])  # what it needs and is not installed shows itself now, not after the first rollout
    except ImportError as error:
        raise InputError(f"config.reward: {error}") from error
    return HOST_REWARDS[spec]


def _load(
    spec: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens | None, http: HttpOptions | None
) -> tuple[Judge, Params]:
    if spec.startswith("model:"):
        return _load_model(spec.removeprefix("model:"), tokenizer, special)
    if not spec.startswith("jax:"):
        return Judge(load_host_reward(spec, http)), ()
    function = _load_function(spec, spec.removeprefix("jax:"))
    try:
        score = function(tokenizer)
    except Exception as error:  # the function is the user's, and may raise anything
        raise InputError(f"config.reward: {spec}: {type(error).__name__}: {error}") from error
    return judge_in_jax(lambda params, rollout: score(rollout)), ()


def _load_model(name: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens | None) -> tuple[Judge, Params]:
    folder = hub.resolve(name)
    config, params, own_tokenizer, own_special = load_scorer(folder)
    if special is None or not same_tokenizer(own_tokenizer, tokenizer):
        return Judge(make_text_score(config, params, own_tokenizer, own_special)), ()
    unseen = [end for end in special.eos_ids if not tokenizer.decode([end], skip_special_tokens=True)]
    special = SpecialTokens(own_special.pad_id, (own_special.eos_ids[0], *unseen))  # another end is part of the text
    return judge_in_jax(make_model_score(config, special)), params


def _load_function(spec: str, target: str) -> Callable:
    module_name, _, function_name = target.rpartition(":")
    if not module_name or not function_name:
        raise InputError(
            f"config.reward: got {spec!r}, expected one of {', '.join(HOST_REWARDS)}, model:FOLDER, http://ADDRESS, "
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


def _short_names(specs: Sequence[str]) -> list[str]:
    """The function, the folder's last part, or the address without its scheme; a number where that is taken."""
    names: list[str] = []
    for spec in specs:
        own = spec.partition("?")[0].partition("://")[2] if spec.startswith(_WEB) else spec.rpartition(":")[2]
        own = Path(own).name if spec.startswith("model:") else own
        short = name = re.sub(r"[^\w.-]+", "_", own).strip("_") or "judge"
        number = 1
        while name in names:
            number += 1
            name = f"{short}_{number}"
        names.append(name)
    return names
