"""Records what rlax's generalised advantage estimation gives for random trajectories, in rlax.json beside this file.

    python tests/golden/record_rlax.py

Needs rlax, which is no dependency of ours and wants a jax older than it (rlax 0.1.7 runs with jax 0.4.38): give it an
environment of its own. The numbers are computed in float64; an episode ends inside of the second trajectory.
"""

import json
import pathlib
from importlib.metadata import version

import jax
import numpy as np
import rlax

LAMBDAS = (0.0, 0.5, 0.95, 1.0)


def main() -> None:
    """Writes the file."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(7)
    cases = []
    for steps, end in ((1, None), (8, 3), (12, None)):
        rewards, values = (np.round(rng.normal(size=size), 3) for size in (steps, steps + 1))
        discounts = np.round(rng.uniform(0.5, 1.0, size=steps), 3)
        if end is not None:
            discounts[end] = 0.0
        for gae_lambda in LAMBDAS:
            advantages = rlax.truncated_generalized_advantage_estimation(rewards, discounts, gae_lambda, values)
            given = {"rewards": rewards, "discounts": discounts, "values": values, "advantages": advantages}
            cases.append({"gae_lambda": gae_lambda} | {name: np.asarray(x).tolist() for name, x in given.items()})
    versions = ", ".join(f"{name} {version(name)}" for name in ("rlax", "jax", "numpy"))
    source = (
        f"python tests/golden/record_rlax.py ({versions}): rlax.truncated_generalized_advantage_estimation, float64"
    )
    path = pathlib.Path(__file__).with_name("rlax.json")
    path.write_text(json.dumps({"source": source, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
