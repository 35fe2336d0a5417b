"""Records `adam.json`: five steps of Adam in float64, by PyTorch and by TensorFlow, for the same gradients.

    python tests/golden/record_optim.py

Needs torch and tensorflow-cpu, which nothing else here needs: record in an environment of its own.
"""

import json
import pathlib
import platform
from importlib.metadata import version

import numpy as np
import tensorflow as tf
import torch

HERE = pathlib.Path(__file__).parent
STEPS = 5
# The first is OpenAI's: `AdamOptimizer(learning_rate=0.00001, epsilon=1e-5)`; the second has no default left.
SETTINGS = (
    {"lr": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-5},
    {"lr": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3},
)


def by_torch(grads: np.ndarray, lr: float, b1: float, b2: float, eps: float) -> list[list[float]]:
    """Parameters after each step, from zero."""
    x = torch.zeros(grads.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=lr, betas=(b1, b2), eps=eps)
    path = []
    for grad in grads:
        x.grad = torch.from_numpy(grad)
        optimizer.step()
        path.append(x.detach().tolist())
    return path


def by_tensorflow(grads: np.ndarray, lr: float, b1: float, b2: float, eps: float) -> list[list[float]]:
    """Parameters after each step, from zero; the optimizer of TensorFlow 1."""
    tf1, path = tf.compat.v1, []
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.Variable(np.zeros(grads.shape[1]))
        grad = tf1.placeholder(tf.float64, x.shape)
        step = tf1.train.AdamOptimizer(lr, b1, b2, eps).apply_gradients([(grad, x)])
        session.run(tf1.global_variables_initializer())
        for values in grads:
            session.run(step, {grad: values})
            path.append(session.run(x).tolist())
    return path


def record() -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    # One size a parameter, from a tenth of the smaller eps to 1; the signs vary from step to step.
    sizes = 10.0 ** np.arange(-6, 1)
    grads = (rng.normal(size=(STEPS, len(sizes))) * sizes).astype(np.float32).astype(np.float64)
    golden = {
        "source": {
            "command": "python tests/golden/record_optim.py",
            "pytorch": "torch.optim.Adam, float64",
            "tensorflow": "tf.compat.v1.train.AdamOptimizer, float64",
            "versions": {name: version(name) for name in ("numpy", "torch", "tensorflow-cpu")}
            | {"python": platform.python_version()},
        },
        "gradients": grads.tolist(),
        "runs": [
            setting | {"pytorch": by_torch(grads, **setting), "tensorflow": by_tensorflow(grads, **setting)}
            for setting in SETTINGS
        ],
    }
    # One step a line.
    text = json.dumps(golden).replace("], [", "],\n[").replace(', "', ',\n"')
    assert json.loads(text) == golden
    (HERE / "adam.json").write_text(text + "\n")


if __name__ == "__main__":
    record()
