"""Records `losses.json`: values and gradients of the losses, as the libraries that people use compute them.

    python tests/golden/record_losses.py

Needs torch, trl 0.24.0 (where the preference losses are functions that can be called), which needs transformers 4, and
verl 0.9.1; the versions that were used stand in the file. Everything is computed in float64 from the inputs that are
recorded beside.
"""

import json
import math
import pathlib
from importlib.metadata import version
from types import SimpleNamespace

import torch
from trl import DPOTrainer, KTOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

HERE = pathlib.Path(__file__).parent
LENGTHS = (4, 2, 3)
WIDTH = 4
AGGREGATIONS = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
# One response with a large ratio where the advantage is negative: the dual clip binds there.
LOG_RATIO = [[0.1, -0.5, 0.4, -0.05], [1.6, -0.3, 0.0, 0.0], [0.02, 0.7, -0.15, 0.0]]
OLD_LOGPROBS = [[-1.2, -0.3, -2.5, -0.9], [-3.1, -0.6, -9.0, -9.0], [-1.7, -2.2, -0.4, -9.0]]
ADVANTAGES = [[1.5, -0.7, 0.9, -1.1], [-2.0, 0.4, 5.0, 5.0], [-0.6, 1.3, -0.2, 5.0]]
SAME_ADVANTAGES = [[1.5] * 4, [-2.0] * 4, [0.6] * 4]
POLICY = {
    "clip": ("vanilla", "token", {"clip_eps": 0.2}),
    "clip higher": ("vanilla", "token", {"clip_eps": 0.2, "clip_eps_high": 0.45}),
    "clip, sequence": ("vanilla", "sequence", {"clip_eps": 0.2}),
    "clip, constant": ("vanilla", "constant", {"clip_eps": 0.2}),
    "dual clip": ("vanilla", "token", {"clip_eps": 0.2, "dual_clip": 3.0}),
    "gspo": ("gspo", "sequence", {"clip_eps": 0.1, "clip_eps_high": 0.3}),
    "cispo": ("cispo", "token", {"clip_eps_high": 0.4}),
}


def tensor(x, learns: bool = False) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=learns)


MASK = tensor([[float(t < n) for t in range(WIDTH)] for n in LENGTHS])


def policy(kind: str, aggregation: str, settings: dict, advantages) -> dict:
    """A surrogate of verl: aggregated loss, gradient by log-probability, fraction that is clipped from either side."""
    low = settings.get("clip_eps", 1.0)  # cispo: no lower bound
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=settings.get("clip_eps_high", low),
        clip_ratio_c=settings.get("dual_clip", math.inf),
    )
    old = tensor(OLD_LOGPROBS)
    logprobs = (old + tensor(LOG_RATIO)).requires_grad_()
    function = core_algos.get_policy_loss_fn(kind)
    loss, metrics = function(old, logprobs, tensor(advantages), MASK, AGGREGATIONS[aggregation], config)
    loss.backward()
    fraction = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    return {"loss": loss.item(), "grad": logprobs.grad.tolist(), "clip_frac": fraction}


def policies() -> dict:
    """Each with its settings, on advantages that differ by token and, for GSPO, on those that do not as well."""
    results = {}
    for name, (kind, aggregation, settings) in POLICY.items():
        for suffix, advantages in (("", ADVANTAGES), (", same advantages", SAME_ADVANTAGES)):
            found = policy(kind, aggregation, settings, advantages)
            results[name + suffix] = {
                "kind": name.split(",")[0].split()[0].replace("dual", "clip"),
                "aggregation": aggregation,
                "settings": settings,
                "advantages": advantages,
            } | found
    return results


def values() -> dict:
    """The critic's errors: verl's clipped one, torch's squared and Huber's."""
    old, returns = tensor([[0.3, -1.0, 0.8, 0.0]] * 3), tensor([[1.0, 0.5, -0.4, 2.0]] * 3)
    new = [[0.9, -0.9, 0.4, 0.1], [-0.2, -1.4, 9.0, 9.0], [0.35, 0.6, 1.3, 9.0]]
    result = {"values": new, "old_values": old.tolist(), "returns": returns.tolist(), "errors": {}}
    for name, settings in {"clipped": {"value_clip_eps": 0.2}, "squared": {}, "huber": {"huber_delta": 0.75}}.items():
        learns = tensor(new, learns=True)
        if name == "clipped":
            loss, _ = core_algos.compute_value_loss(learns, returns, old, MASK, 0.2)
        else:
            delta = settings.get("huber_delta", math.inf)
            small = 0.5 * torch.nn.functional.mse_loss(learns, returns, reduction="none")
            error = (
                small
                if delta == math.inf
                else torch.nn.functional.huber_loss(learns, returns, reduction="none", delta=delta)
            )
            loss = (error * MASK).sum() / MASK.sum()
        loss.backward()
        result["errors"][name] = {"settings": settings, "loss": loss.item(), "grad": learns.grad.tolist()}
    return result


CHOSEN, REJECTED = [-12.0, -30.5, -7.25, -18.0], [-14.0, -28.0, -7.25, -25.0]
REF_CHOSEN, REF_REJECTED = [-13.5, -29.0, -8.0, -18.5], [-13.0, -29.5, -6.0, -21.0]


def preferences() -> dict:
    """The losses of DPO (with and without label smoothing), IPO and KTO in TRL."""
    results = {"chosen": CHOSEN, "rejected": REJECTED, "ref_chosen": REF_CHOSEN, "ref_rejected": REF_REJECTED}
    beta = 0.3
    for name, kind, smoothing in (("dpo", "sigmoid", 0.0), ("dpo, smooth", "sigmoid", 0.1), ("ipo", "ipo", 0.0)):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu"),
            reference_free=False,
            f_divergence_type="reverse_kl",
            f_divergence_params=None,
            label_smoothing=smoothing,
            beta=beta,
        )
        chosen, rejected = tensor(CHOSEN, learns=True), tensor(REJECTED, learns=True)
        losses, *rewards = DPOTrainer.dpo_loss(
            trainer, chosen, rejected, tensor(REF_CHOSEN), tensor(REF_REJECTED), kind
        )
        losses.mean().backward()
        results[name] = {
            "settings": {"beta": beta} | ({"label_smoothing": smoothing} if kind == "sigmoid" else {}),
            "loss": losses.mean().item(),
            "grad_chosen": chosen.grad.tolist(),
            "grad_rejected": rejected.grad.tolist(),
            "chosen_reward": rewards[0].mean().item(),
            "rejected_reward": rewards[1].mean().item(),
            "accuracy": (rewards[0] > rewards[1]).double().mean().item(),
        }
    return results | {"kto": kto(beta)}


def kto(beta: float) -> dict:
    """Three desirable texts and two others, with the reference point of three mismatched ones."""
    other, ref_other = tensor([-20.0, -31.0, -15.0]), tensor([-22.0, -30.5, -15.6])  # log ratios 2, -0.5, 0.6: mean 0.7
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=1.0,
        undesirable_weight=1.5,
    )
    good, bad = tensor(CHOSEN[:3], learns=True), tensor(REJECTED[:2], learns=True)
    losses, good_rewards, bad_rewards, kl = KTOTrainer.kto_loss(
        trainer, good, bad, other, tensor(REF_CHOSEN[:3]), tensor(REF_REJECTED[:2]), ref_other
    )
    losses.mean().backward()
    return {
        "settings": {"beta": beta, "desirable_weight": 1.0, "undesirable_weight": 1.5},
        "desirable": [True] * 3 + [False] * 2,
        "kl": kl.item(),
        "loss": losses.mean().item(),
        "grad": good.grad.tolist() + bad.grad.tolist(),
        "chosen_reward": good_rewards.mean().item(),
        "rejected_reward": bad_rewards.mean().item(),
    }


def distributions() -> dict:
    """KL divergence and entropy of categorical distributions in torch, with their gradients by the policy's logits."""
    logits = [[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, -0.3, 4.0], [1.0, 1.0, -20.0, 0.0]]
    ref_logits = [[1.5, 0.0, 0.5, -2.0], [0.1, 0.2, -0.3, 4.001], [-3.0, 2.0, 1.0, 0.5]]
    ref = torch.distributions.Categorical(logits=tensor(ref_logits))
    result = {"logits": logits, "ref_logits": ref_logits}
    for name, function in (
        ("kl", lambda policy: torch.distributions.kl_divergence(policy, ref)),
        ("entropy", lambda policy: policy.entropy()),
    ):
        learns = tensor(logits, learns=True)
        found = function(torch.distributions.Categorical(logits=learns))
        found.sum().backward()
        result |= {name: found.tolist(), f"{name}_grad": learns.grad.tolist()}
    return result


def main() -> None:
    torch.set_default_dtype(torch.float64)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "verl"))
    old = tensor(OLD_LOGPROBS)
    golden = {
        "source": f"python tests/golden/record_losses.py with {packages}",
        "lengths": LENGTHS,
        "old_logprobs": OLD_LOGPROBS,
        "logprobs": (old + tensor(LOG_RATIO)).tolist(),
        "policy": policies(),
        "value": values(),
        "preference": preferences(),
        "distribution": distributions(),
    }
    (HERE / "losses.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
