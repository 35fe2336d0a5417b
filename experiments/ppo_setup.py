"""What PPO needs, loaded, checked and built before anything is written."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from transformers import PreTrainedTokenizerBase

from experiments.methods import resolve
from experiments.settings import PPOExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.config import PPOConfig
from ppo_jax.data import PromptSet, load_prompts
from ppo_jax.errors import check
from ppo_jax.examples import ExampleSet, load_examples, make_rows
from ppo_jax.experience import Method
from ppo_jax.metrics import check_trackers
from ppo_jax.models import ActorCritic, ModelConfig, init_adapter, upper_layers
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.policy import policy_sampling
from ppo_jax.ppo import TrainStep, init_state, make_train_step
from ppo_jax.rewards import (
    HostReward,
    HttpOptions,
    Judges,
    check_score,
    load_critic,
    load_host_reward,
    load_reward,
)
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sharding import Shardings, make_mesh, make_place, make_shardings
from ppo_jax.tokenizers import SpecialTokens, check_vocabulary, load_tokenizer, one_token, special_tokens
from ppo_jax.types import Params, Scores, TrainState


class Setup(NamedTuple):
    """Everything that training needs."""

    settings: PPOExperiment
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    heldout: PromptSet  # for the comparison before and after
    texts: ExampleSet | None  # for the auxiliary next-token loss
    model: ActorCritic
    method: Method
    sampling: SamplingConfig
    shardings: Shardings
    state: TrainState  # before the first iteration
    ref_params: Params
    step: TrainStep
    schedule: Any  # gradient step -> learning rate of the policy
    judges: Judges
    scores: Scores  # the shapes of what they say
    gold: HostReward | None  # only logged
    save_dtype: str  # of the exported weights


def prepare(settings: PPOExperiment) -> Setup:
    """Loads and checks all inputs, and builds (without compiling) the programs.

    Raises:
        InputError: any of the inputs cannot be used.
    """
    config = settings.ppo
    method = resolve(config)
    folder = hub.resolve(settings.model)
    lora = settings.lora.config()
    model_config = dataclasses.replace(
        hub.load_config(folder, dtype=settings.dtype, param_dtype=settings.param_dtype),
        remat=settings.remat,
        lora_scale=lora.scale if lora else 1.0,
    )
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, hub.load_eos_ids(folder), settings.pad_token, settings.eos_token)
    length = config.prompt_length + config.response_length
    check(
        "config.ppo.prompt_length + response_length", length, length <= model_config.max_positions,
        f"at most the model's {model_config.max_positions} positions",
    )  # fmt: skip
    how = (tokenizer, special.pad_id, config.prompt_length, settings.long_prompts, settings.prompts_split)
    prompts = load_prompts(settings.prompts, *how)
    heldout = load_prompts(settings.heldout_prompts, *how) if settings.heldout_prompts else prompts
    for part in (prompts, heldout):
        check_vocabulary(special, part.tokens, model_config.vocab_size)
    texts = load_texts(settings, tokenizer, special, model_config)
    check_trackers(tracker_names(settings.trackers))
    http = HttpOptions(settings.reward_timeout_s, settings.reward_retries, settings.reward_batch_size)
    judges = load_reward(settings.reward, tokenizer, special, http)
    scores = check_score(settings.reward, judges, config.batch_size, config.prompt_length, config.response_length)
    gold = load_host_reward(settings.gold, http) if settings.gold else None
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    check_shares(settings, mesh.shape["data"] * mesh.shape["fsdp"])

    model = ActorCritic(model_config)
    truncate_id = one_token(tokenizer, settings.truncate_token) if settings.truncate_token else None
    sampling = policy_sampling(config, special.eos_ids, special.pad_id, truncate_id)
    schedule, tx = optimizer(config, settings.num_iterations)
    base = hub.load_params(folder, model_config, make_place(mesh))
    critic = read_critic(settings, model_config, tokenizer, base) if method.critic else None
    key = jax.random.key(settings.seed)
    state = init_state(trained_part(settings, model_config, base), model, tx, method, key, critic)
    shardings = make_shardings(mesh, state, judges.params, base)
    step = make_train_step(model, tx, method, sampling, shardings, judges.score)
    return Setup(
        settings=settings,
        tokenizer=tokenizer,
        prompts=prompts,
        heldout=heldout,
        texts=texts,
        model=model,
        method=method,
        sampling=sampling,
        shardings=shardings,
        state=jax.device_put(state, shardings.state),
        ref_params=jax.device_put(base, shardings.ref_params),
        step=step,
        schedule=schedule,
        judges=judges._replace(params=jax.device_put(judges.params, shardings.judge_params)),
        scores=scores,
        gold=gold,
        save_dtype=hub.load_dtype(folder) if settings.save_dtype == "model" else settings.save_dtype,
    )


def load_texts(
    settings: PPOExperiment, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, model_config: ModelConfig
) -> ExampleSet | None:
    """The texts of the auxiliary next-token loss, if there is one."""
    if not settings.ptx_data:
        return None
    length = settings.ptx_length
    check("config.ptx_length", length, length <= model_config.max_positions,
          f"at most the model's {model_config.max_positions} positions")  # fmt: skip
    texts = load_examples(settings.ptx_data, tokenizer, special, length, settings.ptx_split)
    rows = make_rows(texts, length, special.pad_id, pack=False)
    check_vocabulary(special, rows.tokens, model_config.vocab_size)
    return rows


def check_shares(settings: PPOExperiment, shares: int) -> None:
    """Refuses batches that the devices cannot share evenly, down to the part that one gradient is taken of."""
    config = settings.ppo
    parts = config.num_minibatches * config.accumulation
    told = f"a multiple of mesh data x fsdp ({shares})"
    smallest = config.batch_size // parts
    check("config.ppo.batch_size / num_minibatches / accumulation", smallest, smallest % shares == 0, told)
    asked = config.batch_size // config.responses_per_prompt
    check("config.ppo.batch_size / responses_per_prompt", asked, asked % shares == 0, told)
    texts = settings.ptx_batch_size
    fits = not settings.ptx_data or texts % (parts * shares) == 0
    check("config.ptx_batch_size", texts, fits, f"{told} x num_minibatches x accumulation ({parts})")


def optimizer(config: PPOConfig, num_iterations: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """(learning rate of the policy by gradient step of the run, the optimizer)."""
    each = config.updates_per_iteration
    waits = config.critic_warmup_iterations * each

    def schedule(lr: float, steps: int) -> optax.Schedule:
        return make_schedule(lr, config.lr_schedule, config.warmup_iterations * each, steps)

    policy = schedule(config.lr, num_iterations * each - waits)
    critic = schedule(config.critic_lr or config.lr, num_iterations * each)
    tx = make_optimizer(
        policy,
        config.adam_b1,
        config.adam_b2,
        config.adam_eps,
        config.weight_decay,
        config.max_grad_norm,
        eps_form=config.adam_eps_form,
        critic_schedule=critic if config.critic_lr or waits else None,
        critic_warmup_steps=waits,
    )

    def rate(step: Any) -> jax.Array:
        return jnp.where(step < waits, 0.0, policy(jnp.maximum(step - waits, 0)))

    return rate, tx


def trained_part(settings: PPOExperiment, model_config: ModelConfig, base: Params) -> Params:
    """What is trained of the decoder, as it is before training: buffers of its own, which a train step may donate."""
    if lora := settings.lora.config():
        return init_adapter(base, lora, jax.random.fold_in(jax.random.key(settings.seed), 1))
    if settings.frozen_layers:
        return upper_layers(base, model_config, settings.frozen_layers)
    return jax.tree.map(jnp.copy, base)


def read_critic(
    settings: PPOExperiment, model_config: ModelConfig, tokenizer: PreTrainedTokenizerBase, base: Params
) -> Params | None:
    """What the critic starts as; None: a new value head."""
    if not settings.critic:
        return None
    if settings.critic != "model":
        return load_critic(settings.critic, settings.reward, model_config, tokenizer, base)
    folder = hub.resolve(settings.model)
    head = hub.load_value_head(folder)
    check("config.critic", "model", head is not None, f"a value head beside the model, in {folder}")
    return {"value_head": jax.tree.map(jnp.asarray, head)}
