"""From the command to the first iteration: what compiling costs, and a second start, which finds it done."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.iteration import Work, prepare
from experiments.benchmarks.limits import seconds
from experiments.benchmarks.models import SHAPES, random_params
from experiments.benchmarks.sides import ROOT, Comparison, Side
from ppo_jax.metrics import write_jsonl
from ppo_jax.models import Decoder

SHAPE = "stories15m"
LOOKS_S = 0.02  # between two looks whether the first iteration is there


def comparisons() -> list[Comparison]:
    """The rows: nobody beside us."""
    rows = []
    for work in (Work("tiny"), Work("gpt2", batch=16)):
        side = Side("experiments.benchmarks.starting:compiling", dataclasses.asdict(work), warm_up=False)
        rows.append(Comparison("compile: iteration", work.name, work.batch, "s", True, side, None))
    for name, warm in (("first", False), ("second", True)):
        side = Side("experiments.benchmarks.starting:start", {"warm": warm}, warm_up=warm)
        rows.append(Comparison(f"compile: {name} start", f"{SHAPE}, command to iteration 1", 64, "s", True, side, None))
    return rows


def compiling(**given: Any) -> Callable[[], dict]:
    """Tracing and compiling an iteration anew."""
    import jax

    program, state, rest = prepare(Work(**given))

    def measure() -> dict:
        jax.clear_caches()
        return {"value": seconds(lambda: program.lower(state, *rest).compile())}

    return measure


def start(warm: bool) -> Callable[[], dict]:
    """`train_ppo.py` from the command to the first row of its metrics; `warm`: with the programs of a start before."""
    folder = Path(tempfile.mkdtemp())
    given = write_inputs(folder)
    caches = (folder / ("cache" if warm else f"cache{i}") for i in range(1000))

    def measure() -> dict:
        workdir = Path(tempfile.mkdtemp(dir=folder))
        command = [sys.executable, "experiments/train_ppo.py", "--config=experiments/configs/ppo_sentiment.py"]
        command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in given.items())]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(next(caches)), "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            metrics = workdir / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(LOOKS_S)
            took = time.perf_counter() - began
            process.kill()
        if process.returncode > 0:
            raise RuntimeError(f"train_ppo.py ended with exit status {process.returncode}")
        return {"value": took}

    return measure


def write_inputs(folder: Path) -> dict[str, str]:
    """A model of random parameters and prompts for it; returns the settings that name them."""
    from experiments.anchor import make_tokenizer
    from ppo_jax import hub

    config = SHAPES[SHAPE]
    hub.save(folder / "model", random_params(Decoder(config)), config, make_tokenizer(config.vocab_size))
    prompts = [
        {"prompt": " ".join(f"w{3 + (7 * i + k) % (config.vocab_size - 3)}" for k in range(8))} for i in range(256)
    ]
    write_jsonl(folder / "prompts.jsonl", prompts)
    return {"model": str(folder / "model"), "prompts": str(folder / "prompts.jsonl")}
