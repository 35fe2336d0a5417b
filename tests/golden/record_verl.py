"""Records what verl's advantage estimators and KL penalties give for random numbers, in verl.json beside this file.

    python tests/golden/record_verl.py CORE_ALGOS COMMIT

CORE_ALGOS is verl/trainer/ppo/core_algos.py in a checkout of volcengine/verl at COMMIT. Only the estimators and
penalties are read from it, so that torch is all it needs. Their whitening is replaced by the identity: it divides by
count - 1, ours and OpenAI's by the count, and it is not what is compared here. Everything in float64.
"""

import ast
import json
import pathlib
import sys
import types
from collections import defaultdict
from typing import Any, Optional

import numpy as np
import torch

LENGTHS, WIDTH, EACH = (5, 3, 1, 4, 5, 2), 5, 3  # six responses, three to each of two prompts
GAMMA, LAMBDA = 0.9, 0.8


def functions(path: str) -> dict[str, Any]:
    """The estimators and penalties of the file, by name."""
    tree = ast.parse(pathlib.Path(path).read_text())
    wanted = ("compute_", "kl_penalty")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(wanted)]
    for node in tree.body:
        node.decorator_list, node.returns = [], None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
    stub = types.SimpleNamespace(masked_whiten=lambda x, mask: x)
    names = {"torch": torch, "np": np, "defaultdict": defaultdict, "Optional": Optional, "verl_F": stub}
    exec(compile(tree, path, "exec"), names)
    return names


def advantages(verl: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Inputs, and (advantages, returns) by estimator."""
    mask = torch.tensor([[t < length for t in range(WIDTH)] for length in LENGTHS], dtype=torch.float64)
    rewards, values = (torch.tensor(np.round(rng.normal(size=mask.shape), 3)) * mask for _ in range(2))
    greedy = torch.tensor(np.round(rng.normal(size=len(LENGTHS)), 3))
    groups = np.arange(len(LENGTHS)) // EACH
    config = types.SimpleNamespace(gamma=GAMMA)
    grpo = verl["compute_grpo_outcome_advantage"]
    results = {
        "gae": verl["compute_gae_advantage_return"](rewards, values, mask, GAMMA, LAMBDA),
        "grpo": grpo(rewards.clone(), mask, groups, epsilon=1e-4),
        "dr_grpo": grpo(rewards.clone(), mask, groups, norm_adv_by_std_in_grpo=False),
        "rloo": verl["compute_rloo_outcome_advantage"](rewards.clone(), mask, groups),
        "reinforce_pp_baseline": verl["compute_reinforce_plus_plus_baseline_outcome_advantage"](
            rewards.clone(), mask, groups
        ),
        "reinforce_pp": verl["compute_reinforce_plus_plus_outcome_advantage"](rewards, mask, config=config),
        "remax": verl["compute_remax_outcome_advantage"](rewards, greedy, mask),
    }
    given = {"rewards": rewards, "values": values, "greedy": greedy}
    settings = {"lengths": LENGTHS, "responses_per_prompt": EACH, "gamma": GAMMA, "gae_lambda": LAMBDA}
    masked = {name: [(x * mask).tolist() for x in pair] for name, pair in results.items()}
    return settings | {name: x.tolist() for name, x in given.items()} | {"results": masked}


def penalties(verl: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Inputs, and (values, gradients by the policy's logprobs) by estimator."""
    ref = -np.round(rng.uniform(0.1, 4.0, size=8), 3)
    policy = ref + np.round(rng.uniform(-2.0, 2.0, size=8), 3)  # inside of where verl clamps k3
    results = {}
    for name in ("k1", "k2", "k3", "abs"):  # not k3+, their straight-through form: at this commit it is not implemented
        logprobs = torch.tensor(policy, requires_grad=True)
        value = verl["kl_penalty"](logprobs, torch.tensor(ref), name)
        (gradient,) = torch.autograd.grad(value.sum(), logprobs)
        results[name] = [value.tolist(), gradient.tolist()]
    return {"logprobs": policy.tolist(), "ref_logprobs": ref.tolist(), "results": results}


def main() -> None:
    """Writes the file."""
    path, commit = sys.argv[1:]
    verl, rng = functions(path), np.random.default_rng(11)
    source = f"python tests/golden/record_verl.py CORE_ALGOS {commit} (torch {torch.__version__}, float64)"
    record = {"source": source, "advantages": advantages(verl, rng), "kl": penalties(verl, rng)}
    pathlib.Path(__file__).with_name("verl.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
