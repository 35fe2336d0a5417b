"""What a run shows at its end: the page of results, the curves, the costs of a dry run."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_jax.plots import PPO_PANELS, Panel

ROWS = (
    ("score", "mean score", ".3f"),
    ("score_se", "its standard error", ".3f"),
    ("score_std", "its standard deviation", ".3f"),
    ("gold", "gold: mean score of the judge that only looks on", ".3f"),
    ("kl", "KL to the reference, nats a sequence", ".2f"),
    ("kl_exact", "the same over the whole vocabulary", ".2f"),
    ("ref_perplexity", "perplexity under the reference, a token", ".2f"),
    ("length", "mean length, tokens", ".1f"),
    ("eos_frac", "share that ended with EOS", ".2f"),
)

SFT_COLUMNS = (
    ("loss", "sft/loss", ".4f"),
    ("held-out perplexity", "heldout/perplexity", ".3f"),
    ("tokens/s", "time/tokens_per_s", ",.0f"),
)
SFT_PANELS = (
    Panel("loss", (("sft/loss", "training"), ("heldout/loss", "held out")), "nats per token"),
    Panel("held-out perplexity", (("heldout/perplexity", "perplexity"),), "per token"),
    Panel("gradient norm", (("optim/grad_norm", "norm"),), "norm"),
    Panel("learning rate", (("optim/lr", "rate"),), "per step"),
    Panel("speed", (("time/tokens_per_s", "tokens"),), "tokens per second"),
)

REWARD_COLUMNS = (
    ("loss", "reward/loss", ".4f"),
    ("accuracy", "reward/accuracy", ".3f"),
    ("held-out accuracy", "heldout/accuracy", ".3f"),
    ("held-out loss", "heldout/loss", ".4f"),
)
REWARD_PANELS = (
    Panel("loss", (("reward/loss", "training"), ("heldout/loss", "held out")), "nats per comparison, or 1/2 error^2"),
    Panel("accuracy", (("reward/accuracy", "training"), ("heldout/accuracy", "held out")), "of ordered pairs"),
    Panel("root mean square error", (("reward/rmse", "training"), ("heldout/rmse", "held out")), "units of the rating"),
    Panel("gradient norm", (("optim/grad_norm", "norm"),), "norm"),
    Panel("learning rate", (("optim/lr", "rate"),), "per step"),
)


def results_page(results: dict[str, Any], workdir: Path, kl_limit: float = 0.0) -> str:
    """The page of results as Markdown.

    Args:
        results: `before` and `after` (rows as in `ROWS`, and `num_responses`), and `samples` of `prompt`, `before`,
            `after`.
        workdir: where everything lies.
        kl_limit: nats a sequence; 0: none.
    """
    before, after = results["before"], results["after"]
    lines = ["", "# Results", "", "| | before | after |", "|---|---:|---:|"]
    shown = [row for row in ROWS if after.get(row[0]) is not None]
    lines += [f"| {label} | {before[key]:{form}} | {after[key]:{form}} |" for key, label, form in shown]
    lines += ["", f"Over {after['num_responses']} responses to the same prompts, with the same random numbers."]
    if kl_limit:
        verdict = "held" if after["kl"] <= kl_limit else "NOT held"
        lines.append(f"KL limit of {kl_limit:g} nats: {verdict}.")
    for sample in results["samples"]:
        lines += ["", f"**{_one_line(sample['prompt'])}**", "", f"- before: {_one_line(sample['before'])}"]
        lines.append(f"- after: {_one_line(sample['after'])}")
    names = {
        "curves.png": "curves",
        "policy": "policy, a Hugging Face folder",
        "samples.jsonl": "samples along the way",
    }
    lines += ["", *(f"- {label}: {workdir / name}" for name, label in names.items()), ""]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def curves(kl_limit: float) -> tuple[Panel, ...]:
    """The panels of PPO, with the KL limit drawn in."""
    return tuple(
        dataclasses.replace(panel, limit=kl_limit) if kl_limit and panel.lines[0][0] == "objective/kl" else panel
        for panel in PPO_PANELS
    )


def print_costs(programs: dict[str, dict[str, float]]) -> None:
    """Costs by program, as `ppo_jax.planning.program_cost` gives them, in a table."""
    table = Table("per device", *programs, box=None)
    for name in next(iter(programs.values())):
        table.add_row(name, *(f"{cost[name]:,.1f}" for cost in programs.values()))
    Console().print(table, "gflops counts the body of every loop once", sep="\n")
