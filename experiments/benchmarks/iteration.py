"""A whole PPO iteration, sampling to the last gradient step, beside the last PPOTrainer of TRL: seconds, and memory.

The reward is a model of the policy's shape. TRL's critic is a model of its own; ours is a value head on the policy's
trunk, or (`separate`) a model of its own as well.
"""

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.limits import seconds
from experiments.benchmarks.memory import peak_bytes, resident_bytes
from experiments.benchmarks.models import EOS, PAD, SHAPES, attention, in_torch, random_params, weights
from experiments.benchmarks.sides import Comparison, Side
from ppo_jax.models import Decoder, RewardModel

PROMPT, RESPONSE = 32, 48
EPOCHS, MINIBATCH = 4, 16
TRL = ("trl", "torch", "transformers")
PROMPTS = 4096  # that TRL draws from


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done in an iteration."""

    shape: str
    batch: int = 64
    response: int = RESPONSE
    critic: str = "shared"  # or separate
    dtype: str = "float32"
    layers: int = 0  # 0: as the shape has
    vocabulary: int = 0  # likewise

    @property
    def model(self) -> Any:
        """The policy's configuration."""
        config = SHAPES[self.shape]
        changed = {"num_layers": self.layers or config.num_layers, "vocab_size": self.vocabulary or config.vocab_size}
        return dataclasses.replace(config, dtype=self.dtype, **changed)

    @property
    def name(self) -> str:
        """What a row calls it."""
        more = f", {self.layers} layers" * bool(self.layers) + f", {self.vocabulary:,} words" * bool(self.vocabulary)
        return f"{self.shape}{more}, {self.batch} x ({PROMPT} + {self.response}) tokens, {self.critic} critic"


def comparisons() -> list[Comparison]:
    """The rows in seconds."""
    works = [
        Work("tiny"), Work("tiny", critic="separate"), Work("tiny", dtype="bfloat16"), Work("gpt2", batch=16),
    ]  # fmt: skip
    return [compared("iteration", work, "s", "iteration_s") for work in works]


def memory_comparisons() -> list[Comparison]:
    """The rows in gigabytes; then what doubles when something is doubled."""
    works = [Work("tiny"), Work("tiny", critic="separate"), Work("gpt2", batch=16)]
    base = Work("tiny", batch=32, response=24)
    grown = [
        base, dataclasses.replace(base, batch=64), dataclasses.replace(base, response=48),
        dataclasses.replace(base, vocabulary=16384), dataclasses.replace(base, layers=12),
    ]  # fmt: skip
    rows = [compared("memory", work, "GB", "peak_gb") for work in works]
    return rows + [compared("memory: growth", work, "GB", "peak_gb")._replace(peer=None) for work in grown]


def compared(work: str, what: Work, unit: str, measured: str) -> Comparison:
    """A row of ours beside TRL's."""
    given = dataclasses.asdict(what) | {"measured": measured}
    theirs = {name: given[name] for name in ("shape", "batch", "dtype", "measured")}
    return Comparison(
        work, what.name, what.batch, unit, True,
        Side("experiments.benchmarks.iteration:ours", given),
        Side("experiments.benchmarks.iteration:trl", theirs, TRL),
        flops(what) if measured == "iteration_s" else None, dtype=what.dtype,
    )  # fmt: skip


def flops(work: Work) -> float:
    """Floating-point operations of an iteration: each token through policy, reference and reward model, and in every
    epoch forward and backward; the projection where a response token is predicted.
    """
    layers, projection = weights(work.model)
    length = PROMPT + work.response
    trunk = length * (2 * layers + attention(work.model, length / 2))
    projected = work.response * 2 * projection
    times = 3 * EPOCHS
    critic = (1 + times) * trunk if work.critic == "separate" else 0.0
    return work.batch * ((3 + times) * trunk + (2 + times) * projected + critic)


def prepare(work: Work) -> tuple[Any, Any, tuple]:
    """`ppo.make_train_step`'s iteration as one program, as `train_ppo.py` makes it: (the program, not yet compiled, a
    train state, what else it is called with).
    """
    import jax
    import jax.numpy as jnp

    from experiments.methods import resolve
    from experiments.ppo_setup import optimizer
    from ppo_jax.config import PPOConfig
    from ppo_jax.models import ActorCritic
    from ppo_jax.policy import policy_sampling
    from ppo_jax.ppo import init_state, make_train_step
    from ppo_jax.rewards.combined import judge_in_jax, make_judges
    from ppo_jax.rewards.model import make_model_score
    from ppo_jax.sharding import make_mesh, make_shardings
    from ppo_jax.tokenizers import SpecialTokens
    from ppo_jax.types import Prompts

    config = PPOConfig(
        batch_size=work.batch, prompt_length=PROMPT, response_length=work.response, num_epochs=EPOCHS,
        num_minibatches=work.batch // MINIBATCH, lr=3e-6,
    )  # fmt: skip
    method, model = resolve(config), ActorCritic(work.model)
    _, tx = optimizer(config, 1000)
    decoder = Decoder(work.model)
    base, trained = random_params(decoder), random_params(decoder)
    critic = None
    if work.critic == "separate":
        head = model.init(jax.random.key(0), jnp.zeros((1, work.model.width)), method="value")["params"]
        critic = {"critic": random_params(decoder), "value_head": head["value_head"]}
    state = init_state(trained, model, tx, method, jax.random.key(1), critic)
    judged = make_model_score(work.model, SpecialTokens(PAD, (EOS,)))
    judges = make_judges(["model"], [1.0], [judge_in_jax(judged)], [random_params(RewardModel(work.model), 1)])
    shardings = make_shardings(make_mesh(1, 1, 1), state, judges.params, base)
    state = jax.device_put(state, shardings.state)
    step = make_train_step(model, tx, method, policy_sampling(config, (EOS,), PAD), shardings, judges.score)
    tokens = jax.random.randint(jax.random.key(2), (work.batch, PROMPT), 3, work.model.vocab_size)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool))
    places = (shardings.ref_params, shardings.batch, shardings.judge_params)
    return step.iterate, state, (*jax.device_put((base, prompts, judges.params), places), None)


def ours(measured: str, **given: Any) -> Callable[[], dict]:
    """The iteration, compiled before."""
    import jax

    from ppo_jax.planning import program_cost, release_free_memory

    program, state, rest = prepare(Work(**given))
    began = time.perf_counter()
    program = program.lower(state, *rest).compile()
    compile_s = time.perf_counter() - began
    cost = program_cost(program)
    release_free_memory()

    def iterate() -> None:
        nonlocal state
        state, metrics, _, _ = program(state, *rest)
        jax.device_get(metrics)

    def measure() -> dict:
        before = resident_bytes()
        told = measured_call(iterate, measured)
        # What was there before, and is not of the program, is no part of the prediction.
        used = told["peak_gb"] - before / 1e9 + cost["arguments_mb"] * 2**20 / 1e9
        return told | {"compile_s": compile_s, "used_gb": used, "predicted_gb": cost["peak_mb"] * 2**20 / 1e9}

    return measure


def measured_call(work: Callable[[], object], measured: str) -> dict:
    """Seconds and the process's peak of memory meanwhile; `measured` names the one that is the row's."""
    with peak_bytes() as peak:
        took = seconds(work)
    told = {"iteration_s": took, "peak_gb": peak() / 1e9}
    return {"value": told[measured]} | told


def trl(measured: str, shape: str, batch: int, dtype: str) -> Callable[[], dict]:
    """TRL's, one iteration at a time. Its batch on the device is the whole batch, else its minibatches are fewer."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from experiments.anchor import make_tokenizer

    config, folder = SHAPES[shape], tempfile.mkdtemp()
    tokenizer = make_tokenizer(config.vocab_size)
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    policy, reference = (in_torch(Decoder(config), dtype) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value, reward = (in_torch(RewardModel(config), dtype) for _ in range(2))
    prompts = torch.randint(3, config.vocab_size, (PROMPTS, PROMPT))
    arguments: dict[str, Any] = dict(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=batch // MINIBATCH, num_ppo_epochs=EPOCHS, total_episodes=1000 * batch,
        local_rollout_forward_batch_size=batch, response_length=RESPONSE, temperature=1.0, learning_rate=3e-6,
        num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(),
        report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    start, ended = threading.Semaphore(0), threading.Semaphore(0)

    class OneAtATime(TrainerCallback):
        """Waits before each iteration until it is asked for."""

        def on_train_begin(self, *given: Any, **more: Any) -> None:
            start.acquire()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            ended.release()
            start.acquire()

    trainer = PPOTrainer(
        args=PPOConfig(**arguments), processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}), callbacks=[OneAtATime()],
    )  # fmt: skip
    failed: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failed.append(error)
        ended.release()

    threading.Thread(target=train, daemon=True).start()

    def iterate() -> None:
        start.release()
        ended.acquire()
        if failed:
            raise failed[0]

    return lambda: measured_call(iterate, measured)
