"""Looks again at an iteration of PPO that held something that is not finite.

    python experiments/replay.py WORKDIR ITERATION

A run keeps such iterations in WORKDIR/broken/. This loads what the policy was to learn from and the state that did not
learn it, and shows for every quantity, in the order in which they are computed, how many of its numbers are not finite
and in which responses; then the same for the gradient of each minibatch, parameter by parameter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.ending import told_in_one_line
from experiments.ppo_setup import Setup, prepare
from experiments.rollouts import texts_of
from experiments.settings import PPOExperiment, from_config_dict
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.errors import InputError
from ppo_jax.guard import LOSS, broken_leaves, quantities
from ppo_jax.sharding import minibatches
from ppo_jax.types import Experience, Params, Scores, TrainState
from ppo_jax.update import Minibatch, gradient, make_minibatch, ppo_loss


def load(workdir: Path, iteration: int) -> tuple[Setup, TrainState, Experience, Scores]:
    """A run, and the iteration that it kept.

    Raises:
        InputError: nothing of that kind is there.
    """
    folder = workdir / "broken" / f"{iteration:06d}"
    if not (folder / "batch.npz").exists():
        kept = sorted(path.name for path in (workdir / "broken").glob("*/")) if workdir.is_dir() else []
        raise InputError(
            f"{folder}: no such iteration was kept, expected one of {', '.join(kept) or '(there is none)'}"
        )
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    setup = prepare(from_config_dict(PPOExperiment, config))
    with Checkpointer(folder / "state", max_to_keep=1) as checkpoint:
        state = checkpoint.restore(setup.state)
    with np.load(folder / "batch.npz") as arrays:
        fields = {name: jax.device_put(x, setup.shardings.batch) for name, x in arrays.items()}
    scores, parts = (
        {name.removeprefix(kind): fields.pop(name) for name in list(fields) if name.startswith(kind)}
        for kind in ("scores_", "parts_")
    )
    return setup, state, Experience(**fields), Scores(**scores, parts=parts)


def look(experience: Experience, scores: Scores) -> list[dict[str, Any]]:
    """Each quantity of the iteration: how many of its numbers are not finite, in which responses, and its range."""
    mask = np.asarray(experience.response_mask)
    named = {"score": scores.total, "score of tokens": scores.tokens, "score of the likeliest": scores.greedy}
    named |= {f"score of {name}": x for name, x in scores.parts.items()}
    per_token = ("logprobs", "ref_logprobs", "values", "advantages", "returns", "importance")
    named |= {name: getattr(experience, name) for name in per_token}
    rows = []
    for name, x in named.items():
        if x is None:
            continue
        x = np.asarray(x, np.float64)
        real = mask if x.ndim == 2 else np.ones_like(x, bool)
        broken, fine = real & ~np.isfinite(x), x[real & np.isfinite(x)]
        rows.append({
            "quantity": name,
            "broken": int(broken.sum()),
            "responses": sorted({int(row) for row in np.argwhere(broken)[:, 0]}),
            "least": float(fine.min()) if fine.size else None,
            "most": float(fine.max()) if fine.size else None,
        })  # fmt: skip
    return rows


def look_at_gradients(setup: Setup, state: TrainState, experience: Experience) -> list[list[str]]:
    """What is not finite in the loss and the gradient of each minibatch, the responses taken in their order."""
    config = setup.method.config

    def loss(params: Params, batch: Minibatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return ppo_loss(
            params, setup.ref_params, setup.model, batch, state.running.kl_coef, setup.method, setup.sampling
        )

    @jax.jit
    def broken(params: Params, batch: Experience) -> jax.Array:
        grads, metrics = gradient(params, make_minibatch(batch, None, setup.method), loss, config.accumulation)
        flags = [metrics[f"broken/{name}"] > 0 for name in ("logprob", "value", "loss")]
        return jnp.concatenate([jnp.stack(flags), broken_leaves(grads)])

    names = quantities(state.params)
    names = names[names.index(LOSS[0]) :]
    parts = minibatches(experience, config.num_minibatches)
    found = [
        np.asarray(broken(state.params, jax.tree.map(lambda x, i=i: x[i], parts)))
        for i in range(config.num_minibatches)
    ]
    return [[name for name, flag in zip(names, flags, strict=True) if flag] for flags in found]


def main(arguments: list[str]) -> None:
    """Prints what was found."""
    if len(arguments) != 2 or not arguments[1].isdigit():
        raise InputError(f"arguments: got {' '.join(arguments)!r}, expected WORKDIR ITERATION")
    setup, state, experience, scores = load(Path(arguments[0]), int(arguments[1]))
    console, table = Console(), Table("quantity", "not finite", "responses", "least", "most", box=None)
    rows = look(experience, scores)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("quantity", "broken", "responses", "least", "most")))
    console.print(table)
    texts = texts_of(setup, experience)
    for i in sorted({i for row in rows for i in row["responses"]})[:4]:
        console.print(f"response {i}: {texts[i]!r}", markup=False)
    for i, names in enumerate(look_at_gradients(setup, state, experience)):
        told = f"{len(names)} not finite, the first is: {names[0]}" if names else "all finite"
        console.print(f"minibatch {i}: loss and gradient: {told}", markup=False)


if __name__ == "__main__":
    with told_in_one_line():
        main(sys.argv[1:])
