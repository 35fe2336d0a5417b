"""Records 20 steps of OpenAI's adaptive KL coefficient, computed in exact fractions, in adaptive_kl.json beside this
file.

    python tests/golden/record_adaptive_kl.py [TRAIN_POLICY]

The formula is that of openai/lm-human-preferences, lm_human_preferences/train_policy.py, `AdaptiveKLController.update`,
with its published settings: target 6, horizon 10000, batches of 512, start at 0.15. The KL rises as it does in a run:
from below the target through it to far above, and back. With the path of their train_policy.py, their controller itself
(which needs NumPy only) is run on the same numbers and has to agree to the last digits of float64.
"""

import ast
import json
import math
import pathlib
import sys
import types
from fractions import Fraction

import numpy as np

TARGET, HORIZON, BATCH_SIZE, START = 6, 10_000, 512, Fraction(15, 100)
KLS = "0 0.5 1.3 2.9 4.7 4.8 5.1 5.9 6 6.1 6.9 7.2 7.3 9.5 14 60 8.25 6.6 -1.5 5.4".split()
LIMIT = Fraction(1, 5)


def exact() -> list[Fraction]:
    """The coefficient after each step."""
    coefs, coef = [], START
    for kl in KLS:
        error = Fraction(kl) / TARGET - 1
        clipped = LIMIT if error > LIMIT else -LIMIT if error < -LIMIT else error
        coef *= 1 + clipped * BATCH_SIZE / HORIZON
        coefs.append(coef)
    return coefs


def theirs(path: str) -> list[float]:
    """The same by the class in a file of OpenAI's repository, without importing the rest of the file."""
    tree = ast.parse(pathlib.Path(path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "AdaptiveKLController"]
    names = {"np": np}
    exec(compile(tree, path, "exec"), names)
    hparams = types.SimpleNamespace(target=TARGET, horizon=HORIZON)
    controller = names["AdaptiveKLController"](float(START), hparams=hparams)
    coefs = []
    for kl in KLS:
        controller.update(float(kl), BATCH_SIZE)
        coefs.append(float(controller.value))
    return coefs


def main() -> None:
    """Writes the file."""
    coefs = [float(coef) for coef in exact()]
    source = "python tests/golden/record_adaptive_kl.py: exact fractions of the formula of openai/lm-human-preferences"
    if len(sys.argv) > 1:
        assert all(math.isclose(a, b, rel_tol=1e-14) for a, b in zip(coefs, theirs(sys.argv[1]), strict=True))
        source += "; their AdaptiveKLController (commit cbfd210, train_policy.py) gives the same within 1e-14"
    settings = {"target": TARGET, "horizon": HORIZON, "batch_size": BATCH_SIZE, "start": float(START)}
    record = {"source": source} | settings | {"kls": [float(kl) for kl in KLS], "coefs": coefs}
    pathlib.Path(__file__).with_name("adaptive_kl.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
