"""Before the first gradient step the policy that learns is the policy that acted: their ratio is one, up to rounding.

Acting runs one token at a time over a cache, learning reads whole padded rows; the ratio tells of every difference
between the two in positions, masks, temperature, forbidden tokens, adapters or dtypes. It is measured where training
measures it, in an iteration: `policy/first_ratio_dev`, the largest |ratio - 1| of the first minibatch.
"""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import GPT2, LLAMA, PAD, left_padded

from experiments.methods import resolve
from experiments.ppo_setup import optimizer
from ppo_jax import hub
from ppo_jax.config import PPOConfig
from ppo_jax.data import load_prompts
from ppo_jax.models import ActorCritic, Decoder, LoRAConfig, ModelConfig, init_adapter, upper_layers
from ppo_jax.models.rope import LinearScaling, LongScaling, YarnScaling
from ppo_jax.policy import policy_params, policy_sampling, response_hidden, response_values
from ppo_jax.ppo import TrainStep, init_state, make_train_step
from ppo_jax.sharding import Shardings, make_mesh, make_shardings
from ppo_jax.tokenizers import load_tokenizer
from ppo_jax.types import Params, Prompts, Rollout, Scores, TrainState

LARGEST = {"float32": 1e-4, "bfloat16": 0.05}
LORA = LoRAConfig(rank=2, alpha=3.0)
EOS_IDS = (1, 5, 7)

GROUPED = {"num_kv_heads": 1}
WHOLE = {"num_kv_heads": 2}
UNTIED = {"tie_embeddings": False}
BF16 = {"dtype": "bfloat16"}
BF16_PARAMS = BF16 | {"param_dtype": "bfloat16"}
FAMILIES = {"gpt2": GPT2, "llama": dataclasses.replace(LLAMA, num_heads=2)}
# What Qwen 2 and Qwen 3 have and Llama has not, at once.
FAMILIES["qwen"] = dataclasses.replace(
    FAMILIES["llama"], attention_bias=True, attention_output_bias=False, qk_norm="head"
)


# What only other families have, three at a time.
LIKE_GEMMA = dict(
    norm_unit_offset=True, norm_placement="both", qk_norm="head", embed_scale=True, activation="gelu_tanh",
    attention_softcap=5.0, final_softcap=3.0, layer_windows=(4, 0), local_rope_theta=10.0, query_pre_attn_scalar=9,
)  # fmt: skip
FURTHER = {
    "gemma": dataclasses.replace(FAMILIES["llama"], **LIKE_GEMMA, rope_scaling=LinearScaling(4.0)),
    "olmo2": dataclasses.replace(
        FAMILIES["llama"], norm_placement="after", qk_norm="projection", unrotated_layers=(1,), layer_windows=(5, 5)
    ),
    "gpt_neox": dataclasses.replace(
        GPT2, positions="rotary", rotary_dim=4, parallel_residual=True, rope_scaling=YarnScaling(2.0, 8, 1.1, 4.0)
    ),
    "mixtral": dataclasses.replace(FAMILIES["llama"], num_experts=3, experts_per_token=2, qk_norm="head"),
    "opt": dataclasses.replace(GPT2, position_offset=2, activation="relu"),
    "phi3_long": dataclasses.replace(FAMILIES["llama"], rope_scaling=LongScaling((1.0, 1.5), (2.0, 3.0), 15, 1.1)),
}


class Case(NamedTuple):
    """A policy and what is trained of it."""

    family: str
    changes: dict  # to the family's configuration
    trained: str  # all, lora, dora, or hydra: the upper layer
    critic: str  # shared: a head on the policy's trunk; separate: a trunk of its own; none


# Every family, with grouped heads and without, tied and untied; of each what is trained, with both critics; each pair
# of these in float32 and in bfloat16.
CASES = [
    Case("gpt2", {}, "all", "shared"),
    Case("gpt2", UNTIED, "lora", "separate"),
    Case("gpt2", GROUPED, "hydra", "shared"),
    Case("llama", WHOLE, "lora", "shared"),
    Case("llama", WHOLE | UNTIED, "dora", "separate"),
    Case("llama", GROUPED, "all", "separate"),
    Case("llama", GROUPED | UNTIED, "hydra", "none"),
    Case("qwen", WHOLE | UNTIED, "all", "shared"),
    Case("qwen", GROUPED, "lora", "separate"),
    Case("gpt2", BF16, "dora", "shared"),
    Case("gpt2", UNTIED | BF16, "all", "none"),
    Case("gpt2", BF16_PARAMS, "hydra", "separate"),
    Case("llama", GROUPED | BF16, "lora", "shared"),
    Case("llama", GROUPED | UNTIED | BF16, "hydra", "separate"),
    Case("llama", WHOLE | BF16_PARAMS, "dora", "separate"),
    Case("llama", GROUPED | UNTIED | BF16_PARAMS, "all", "shared"),
    Case("qwen", GROUPED | UNTIED | BF16, "dora", "none"),
    Case("qwen", WHOLE | BF16_PARAMS, "hydra", "shared"),
]

FURTHER_CASES = [Case(family, dtype, "all", "shared") for family in FURTHER for dtype in ({}, BF16)]


def named(case: Case) -> str:
    changes = "-".join(f"{name}={value}" for name, value in case.changes.items())
    return f"{case.family}-{case.trained}-{case.critic}-{changes}"


def random_like(rng: np.random.Generator, shapes: Params, scale: float = 0.3) -> Params:
    """Parameters of these shapes, every one random, norms and magnitudes around one."""

    def draw(path, leaf):
        drawn = scale * rng.normal(size=leaf.shape)
        around_one = path[-1].key in ("scale", "lora_magnitude")
        return jnp.asarray(around_one + drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_decoder(rng: np.random.Generator, model: ModelConfig) -> Params:
    """Parameters of a `Decoder`."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return random_like(rng, jax.eval_shape(Decoder(model).init, jax.random.key(0), tokens, tokens > 0)["params"])


def trained_part(rng: np.random.Generator, trained: str, base: Params, model: ModelConfig, key: jax.Array) -> Params:
    """What is trained of the decoder, somewhere else than where training starts: no adapter does nothing."""
    if trained == "hydra":
        return random_like(rng, upper_layers(base, model, 1))
    if trained == "all":
        return random_like(rng, base)
    return random_like(rng, init_adapter(base, dataclasses.replace(LORA, dora=trained == "dora"), key))


def critic_of(rng: np.random.Generator, critic: str, model: ModelConfig) -> Params | None:
    """A critic that says something else of every state."""
    head = {"value_head": random_like(rng, {"kernel": jnp.zeros((model.width, 1)), "bias": jnp.zeros(1)})}
    if critic != "separate":
        return head if critic == "shared" else None
    return head | {"critic": random_decoder(rng, dataclasses.replace(model, tie_embeddings=True))}


class Program(NamedTuple):
    """A train step and where everything of it lives, and what it starts from."""

    model: ActorCritic
    step: TrainStep
    shardings: Shardings
    state: TrainState  # on its devices; a step takes it over
    params: Params
    base: Params


def program_of(
    base: Params, trained: Params, model: ModelConfig, config: PPOConfig, critic: Params | None, eos_ids, key
) -> Program:
    """The train step of these parameters."""
    method, actor_critic, (_, tx) = resolve(config), ActorCritic(model), optimizer(config, 10)
    params = jax.tree.map(np.array, {"decoder": trained} | (critic or {}))  # copies: the step takes the buffers over
    state = init_state(trained, actor_critic, tx, method, key, critic)
    shardings = make_shardings(make_mesh(1, 1, 1), state, (), base)
    sampling = policy_sampling(config, eos_ids, PAD)

    def score(_, rollout: Rollout) -> Scores:
        return Scores(jnp.sum(rollout.response_mask * (rollout.response_tokens % 3), axis=1).astype(jnp.float32))

    step = make_train_step(actor_critic, tx, method, sampling, shardings, score)
    return Program(actor_critic, step, shardings, jax.device_put(state, shardings.state), params, base)


def iterate(program: Program, prompts: Prompts):
    """(metrics, experience) of one iteration."""
    base = jax.device_put(program.base, program.shardings.ref_params)
    prompts = jax.device_put(prompts, program.shardings.batch)
    _, metrics, experience, _ = program.step.iterate(program.state, base, prompts, (), None)
    assert metrics["guard/first_broken"] == -1
    return jax.device_get((metrics, experience))


def config_of(case: Case, **sizes: int) -> PPOConfig:
    free = {"advantage": "rloo", "responses_per_prompt": 2} if case.critic == "none" else {}
    return PPOConfig(
        prompt_length=6,
        response_length=10,
        min_new_tokens=3,
        temperature=0.7,
        num_epochs=1,
        num_minibatches=2,
        **(free | sizes),
    )


def assert_responses_differ(experience: Rollout, min_new_tokens: int, eos_ids) -> None:
    """Prompts and responses of several lengths: some ended early, none too early."""
    lengths = experience.response_mask.sum(axis=1)
    prompts = experience.mask.sum(axis=1) - lengths
    assert len(set(prompts)) > 1
    ended = that_ended(experience, eos_ids)
    assert any(ended)
    assert lengths[ended].min() > min_new_tokens


def that_ended(experience: Rollout, eos_ids) -> list[bool]:
    """Which responses end with EOS."""
    lengths = experience.response_mask.sum(axis=1)
    return [row[n - 1] in eos_ids for row, n in zip(experience.response_tokens, lengths, strict=True)]


@pytest.mark.parametrize("case", CASES + FURTHER_CASES, ids=named)
def test_the_ratio_of_the_first_minibatch_is_one(case, rng, key):
    layers = 2 if case.trained == "hydra" or case.family in FURTHER else 1
    model = dataclasses.replace((FAMILIES | FURTHER)[case.family], **case.changes, num_layers=layers)
    config = config_of(case, batch_size=32)
    model = dataclasses.replace(model, lora_scale=LORA.scale)
    for _ in range(4):  # one draw in a thousand is a policy that never ends
        base = random_decoder(rng, model)
        adapter_key, program_key, key = jax.random.split(key, 3)
        trained = trained_part(rng, case.trained, base, model, adapter_key)
        program = program_of(base, trained, model, config, critic_of(rng, case.critic, model), EOS_IDS, program_key)
        sizes = rng.permutation(np.resize(np.arange(1, 7), 32 // config.responses_per_prompt))
        metrics, experience = iterate(program, left_padded(rng, sizes, 6))
        if any(that_ended(experience, EOS_IDS)):
            break
    assert_responses_differ(experience, 3, EOS_IDS)
    # The trained policy is not the reference, so that an adapter or an upper layer that is left out would be seen.
    assert abs(metrics["objective/kl"]) > 0.1
    assert metrics["policy/first_ratio_dev"] <= LARGEST[model.dtype]
    if case.critic != "none":
        values = learned_values(program, experience)
        assert np.ptp(values[experience.response_mask]) > 0.5
        np.testing.assert_allclose(
            experience.values, np.where(experience.response_mask, values, 0), atol=LARGEST[model.dtype] * np.ptp(values)
        )


def learned_values(program: Program, experience: Rollout) -> np.ndarray:
    """What the critic says where the loss asks it, before the first gradient step; `[B, R]`."""

    @jax.jit
    def values(params: Params, base: Params, rollout: Rollout) -> jax.Array:
        params = policy_params(params, base)
        return response_values(program.model, params, response_hidden(program.model, params, rollout), rollout)

    return np.asarray(values(program.params, program.base, experience))


def test_every_combination_that_is_promised_has_a_case():
    """Each value of each axis meets each value of every other axis that can break it."""

    def facts(case: Case) -> dict:
        model = dataclasses.replace(FAMILIES[case.family], **case.changes)
        grouped = model.num_kv_heads < model.num_heads
        tied, dtypes = model.tie_embeddings, (model.dtype, model.param_dtype)
        return dict(case._asdict(), changes=None, grouped=grouped, tied=tied, dtype=model.dtype, dtypes=dtypes)

    every = [facts(case) for case in CASES]
    for one, other in (("family", "trained"), ("family", "critic"), ("family", "dtypes"), ("family", "tied"),
                       ("family", "grouped"), ("trained", "dtype"), ("critic", "dtype"), ("grouped", "dtype"),
                       ("tied", "dtype"), ("tied", "grouped"), ("trained", "critic")):  # fmt: skip
        seen = {(row[one], row[other]) for row in every}
        wanted = {(a[one], b[other]) for a in every for b in every}
        # Without a critic an adapter is what it is with one.
        unmet = wanted - seen - {("lora", "none"), ("dora", "none")}
        assert not unmet, (one, other, unmet)


def test_old_logprobs_that_are_not_the_policys_are_seen(rng, key):
    """The metric is no constant: what acting is said to have thought is off by 0.002 nats, at one token."""
    model, case = FAMILIES["llama"], CASES[3]
    config = config_of(case, batch_size=4)
    base = random_decoder(rng, model)
    program = program_of(base, random_like(rng, base), model, config, critic_of(rng, "shared", model), EOS_IDS, key)
    prompts = jax.device_put(left_padded(rng, [1, 2, 4, 6], 6), program.shardings.batch)
    base = jax.device_put(program.base, program.shardings.ref_params)
    rollout = program.step.act(program.state, base, prompts)
    # Every row at one of its tokens: whichever minibatch is the first has some of them.
    rollout = rollout.replace(logprobs=rollout.logprobs.at[:, 0].add(-0.002))
    metrics = program.step.learn(program.state, base, rollout, Scores(jnp.arange(4.0)), None)[1]
    assert metrics["policy/first_ratio_dev"] == pytest.approx(np.expm1(0.002), abs=LARGEST["float32"])


# Real weights


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "models" / "stories15M", shared / "data" / "story_openings" / "prompts.jsonl"


# In bfloat16 a sum that was made in another order rounds another way once in a while, by up to 0.4 %, and the logits of
# these weights are around 15. Of 60 to 190 tokens, the largest ratio to the acting policy was off by 0 to 0.08 in 20
# runs; to the learner's own pass, which is the old policy there, by 0 to 0.035.
@pytest.mark.parametrize(("dtype", "trained"), [("float32", "lora"), ("bfloat16", "all"), ("bfloat16", "lora")])
def test_the_ratio_is_one_on_real_weights(dtype, trained, stories, rng, key):
    folder, prompts = stories
    model = hub.load_config(folder, dtype=dtype, param_dtype=dtype if trained == "all" else "float32")
    base = jax.tree.map(jnp.asarray, hub.load_params(folder, model))
    changed = jax.tree.map(jnp.copy, base)
    if trained == "lora":
        adapter_key, key = jax.random.split(key)
        changed, model = init_adapter(base, LORA, adapter_key), dataclasses.replace(model, lora_scale=LORA.scale)
        # B is no longer 0.
        changed = jax.tree.map(lambda x: x + 0.02 * jnp.asarray(rng.normal(size=x.shape), x.dtype), changed)
    # The story's end, and letters and marks that stories hold, so that some end early.
    tokenizer = load_tokenizer(folder)
    marks = tokenizer.convert_tokens_to_ids(["▁and", "."])
    eos_ids = (*hub.load_eos_ids(folder), *marks)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] in eos_ids
    config = PPOConfig(batch_size=8, prompt_length=12, response_length=24, min_new_tokens=4, temperature=0.7,
                       num_epochs=1, num_minibatches=1)  # fmt: skip
    asked = load_prompts(str(prompts), tokenizer, PAD, 12, "keep_end")
    sizes = np.array(asked.mask).sum(axis=1)
    rows = np.concatenate([np.flatnonzero(sizes == size)[:3] for size in np.unique(sizes)[-4:]])[-8:]
    program = program_of(base, changed, model, config, critic_of(rng, "shared", model), eos_ids, key)
    batch = Prompts(jnp.asarray(asked.tokens[rows]), jnp.asarray(asked.mask[rows]))
    metrics, experience = iterate(program, batch)
    assert_responses_differ(experience, 4, eos_ids)
    assert metrics["policy/first_ratio_dev"] <= LARGEST[dtype]
    if dtype == "bfloat16":  # what acting thought is another matter, and is told
        assert 1 <= metrics["stale/ratio_max"] < 1.3
    values = learned_values(program, experience)
    scale = np.ptp(values[experience.response_mask])
    np.testing.assert_allclose(
        experience.values, np.where(experience.response_mask, values, 0), atol=LARGEST[dtype] * scale
    )
