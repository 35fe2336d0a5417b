"""No setting is accepted and ignored: every field of every settings class is changed, and the output changes with it,
or the change is refused by the field's name.

The classes are found in the packages: a new one, or a new field of one, fails here until it has a row. A row holds what
else has to be set for the field to matter, and other values; the outputs of all of them have to differ. Programs run
operation by operation here (`jax.disable_jit`): they are the same functions, nothing is compiled anew for a value, and
no other rounding than the field's own can change a bit. Fields whose effect needs a whole run are proven by the test
that a row names.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import pkgutil
import types
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from field_rows import BASES, EOS, GROUPS, IDLE, KL, PPO_ROWS, ROWS, SMALL, TINY, TRUNCATE, Row
from small import random_params

import experiments
import ppo_jax
from experiments import (
    best_of_n,
    collect_feedback,
    evaluate,
    ppo_results,
    ppo_setup,
    rlhf,
    train_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from experiments import settings as kinds
from experiments.methods import METHODS, idle, resolve, resolve_control
from ppo_jax.config import ControlConfig, PPOConfig
from ppo_jax.control import act, architecture, init_optimizer, learn, make_tx, new_worlds
from ppo_jax.dpo import DPOConfig, preference_loss
from ppo_jax.envs import QUADRANTS
from ppo_jax.errors import InputError
from ppo_jax.feedback.simulated import annotate
from ppo_jax.models import REMATS, ActorCritic, Decoder, LoRAConfig, ModelConfig, init_adapter, overlay, rope
from ppo_jax.models.control import init_networks
from ppo_jax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling
from ppo_jax.policy import policy_sampling
from ppo_jax.ppo import init_state, make_train_step
from ppo_jax.runs import RunError
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.sharding import make_mesh, make_shardings
from ppo_jax.types import Examples, Experience, Prompts, Rollout, Scores

TESTS = Path(__file__).parent
NOT_SETTINGS = {  # dataclasses that hold what was computed or read
    "Prompts", "Examples", "Comparisons", "Ratings", "Rollout", "Experience", "Scores", "Running", "TrainState",
    "Preferences", "PreferenceSet", "JudgedSet", "Judged", "ExampleSet", "Texts", "PromptSet", "SpecialTokens",
    "Family", "Item", "Shown", "Judgement", "Progress", "Panel", "Course", "Verdict", "Picture", "Table", "Section",
    "Review", "Discrete", "Box", "Environment", "Steps", "Learning", "Work",
}  # fmt: skip


def digest(tree: Any) -> str:
    """One name for everything in a tree: two trees with the same name are the same, bit for bit."""
    summed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        told = leaf if isinstance(leaf, (str, bytes, bool, type(None))) else np.asarray(leaf)
        what = (told.dtype, told.shape, told.tobytes()) if isinstance(told, np.ndarray) else told
        summed.update(repr((jax.tree_util.keystr(path), what)).encode())
    return summed.hexdigest()


# PPOConfig: one iteration of a tiny policy


def a_score(rollout: Rollout) -> jax.Array:
    return jnp.sum(rollout.response_mask * rollout.response_tokens, axis=1) / 10.0


class Bench(NamedTuple):
    """What an iteration is called with; all of it the same for every configuration."""

    params: Any
    rollout: Rollout
    texts: Examples


@functools.cache
def bench() -> Bench:
    """Random parameters; four responses that ended by EOS, by the truncation token, and by their limit."""
    rng = np.random.default_rng(0)
    responses = [[4, 5, EOS], [TRUNCATE, EOS, 0], [6, 7, 8], [9, TRUNCATE, 0]]
    sizes = np.array([3, 2, 3, 2])
    prompts = [[0, 5], [6, 7], [8, 9], [0, 4]]
    mask = np.concatenate([[[0, 1], [1, 1], [1, 1], [0, 1]], np.arange(3) < sizes[:, None]], 1).astype(bool)
    old, values = rng.uniform(-4.0, -1.0, (4, 3)), rng.normal(size=(4, 3))  # ratios far from one, on both sides
    rollout = Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, responses], 1), jnp.int32),
        mask=jnp.asarray(mask),
        logprobs=jnp.asarray(np.where(mask[:, 2:], old, 0), jnp.float32),
        values=jnp.asarray(np.where(mask[:, 2:], values, 0), jnp.float32),
    )
    tokens = jnp.asarray(rng.integers(0, 11, (4, 4)), jnp.int32)
    texts = Examples(tokens, jnp.ones_like(tokens), jnp.ones((4, 4), bool))
    return Bench(jax.device_get(random_params(rng, TINY)), rollout, texts)


def program(config: PPOConfig):
    """(train step, state, reference) of a configuration, as the scripts put them together."""
    method, model = resolve(config), ActorCritic(TINY)
    _, tx = ppo_setup.optimizer(config, num_iterations=5)
    params = jax.tree.map(jnp.array, bench().params)  # a copy: the step takes it over
    head = {"value_head": params["value_head"]} if method.critic else None
    state = init_state(params["decoder"], model, tx, method, jax.random.key(0), head)
    seen = dict(
        score_count=jnp.float32(5), score_mean=jnp.float32(0.3), score_m2=jnp.float32(2), baseline=jnp.float32(0.2)
    )
    # The reference is another model than the policy, or their KL would be zero.
    reference = jax.tree.map(lambda x: 0.7 * x, params["decoder"])
    state = state.replace(running=state.running.replace(**seen))
    shardings = make_shardings(make_mesh(1, 1, 1), state)
    sampling = policy_sampling(config, (EOS,), 0, TRUNCATE)
    step = make_train_step(model, tx, method, sampling, shardings, lambda _, rollout: Scores(a_score(rollout)))
    return step, state, reference


@functools.cache
def learned(config: PPOConfig) -> str:
    """What learning from the rollout gives: metrics, parameters and what else is carried, but Adam's moments."""
    step, state, reference = program(config)
    scores = Scores(jnp.array([2.0, 0.8, 0.5, 0.3]))
    if config.advantage == "remax":
        scores = scores.replace(greedy=jnp.array([0.1, 0.2, 0.3, 0.4]))
    texts = bench().texts if config.ptx_coef else None
    with jax.disable_jit():
        state, metrics, _ = step.learn(state, reference, bench().rollout, scores, texts)
    assert metrics["guard/first_broken"] == -1
    assert all(np.isfinite(x) for name, x in metrics.items())
    return digest((metrics, state.params, state.running, state.ema_params))


def sampled(config: PPOConfig) -> str:
    """Shapes of a rollout of two prompts."""
    step, state, reference = program(config)
    prompts = Prompts(bench().rollout.tokens[:2, :2], bench().rollout.mask[:2, :2])
    return repr(jax.eval_shape(step.act, state, reference, prompts))


def watched(config: PPOConfig, folder: Path) -> str:
    """What a run does about a second broken iteration in a row."""
    _, state, _ = program(config)
    state = state.replace(step=jnp.int32(2), running=state.running.replace(skipped=jnp.int32(2)))
    shown = bench().rollout
    experience = Experience(**{field.name: getattr(shown, field.name) for field in dataclasses.fields(shown)},
                            advantages=shown.values, returns=shown.values)  # fmt: skip
    metrics = {"guard/first_broken": 0.0, "guard/skipped": 1.0}
    turn = train_ppo.Turn(np.arange(4), metrics, experience, Scores(jnp.zeros(4)))
    setup = types.SimpleNamespace(settings=types.SimpleNamespace(ppo=config))
    try:
        train_ppo.watch(setup, state, turn, folder, types.SimpleNamespace(print=lambda text: None))
    except RunError:
        return "the run ends"
    return "the run goes on"


# Without compiling: what a script loads and builds, of a world of files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, data and judges for all scripts."""
    root = tmp_path_factory.mktemp("world")
    the = (
        "\n\ndef count_the(prompts, completions, **columns):\n    return [text.count('the') for text in completions]\n"
    )
    (root / "rewards.py").write_text(folders.REWARDS + the)
    tokenizer = folders.word_tokenizer()
    two = folders.llama_config(len(tokenizer), num_layers=2)
    for name, seed in (("model", 0), ("other", 1)):
        folders.make_folder(root / name, config=two, seed=seed)
    folders.make_folder(root / "words", folders.word_tokenizer(folders.WORDS[::-1]))
    rows = folders.prompt_rows()
    long = {"prompt": "the very old dog and the very old cat sat here", "number": -1}
    folders.write_jsonl(root / "prompts.jsonl", [*rows, long])
    folders.write_jsonl(root / "others.jsonl", rows[5:15])
    folders.write_jsonl(root / "answered.jsonl", [x | {"completion": " a good film was here"} for x in rows])
    folders.write_jsonl(root / "mixed.jsonl", [x | {"completion": "好good the cat 是bad the"} for x in rows])
    folders.write_jsonl(root / "texts.jsonl", [{"prompt": x["prompt"], "completion": " was good ."} for x in rows])
    folders.write_jsonl(root / "texts2.jsonl", [{"prompt": x["prompt"], "completion": " was bad"} for x in rows])
    sides = [dict(chosen=" is good", rejected=" is bad here", margin=0.5 + i % 2) for i in range(20)]
    folders.write_jsonl(root / "pairs.jsonl", [{"prompt": x["prompt"], **y} for x, y in zip(rows, sides, strict=True)])
    swapped = [dict(chosen=" is great", rejected=" is dull") for _ in range(20)]
    folders.write_jsonl(
        root / "pairs2.jsonl", [{"prompt": x["prompt"], **y} for x, y in zip(rows, swapped, strict=True)]
    )
    scored = [
        {"prompt": x["prompt"], "completion": " is good", "score": (-1.0, 1.0, -2.0, 3.0)[i % 4]}
        for i, x in enumerate(rows)
    ]
    folders.write_jsonl(root / "scores.jsonl", scored)
    given = [{"prompt": x["prompt"], "completions": [" is good", " is bad"]} for x in rows[:4]]
    folders.write_jsonl(root / "given.jsonl", given)
    return root


class Case(NamedTuple):
    """Where a setting is looked at."""

    world: Path
    folder: Path  # empty
    patch: pytest.MonkeyPatch


def here(world: Path, value: Any) -> Any:
    """A value in which `@` stands for the world's folder."""
    return value.replace("@", f"{world}/") if isinstance(value, str) else value


def with_datasets(case: Case) -> None:
    """A hub with a dataset @NAME whose split `train` is NAME.jsonl, and any other split the rows of it in reverse."""

    def rows(name: str, split: str) -> list[dict]:
        read = list(data._jsonl_rows(Path(f"{name}.jsonl")))
        return read if split == "train" else read[::-1]

    data = importlib.import_module("ppo_jax.data")
    case.patch.setattr(data, "_dataset_rows", rows)
    for name in ("prompts", "texts", "pairs", "given", "others", "texts2", "pairs2"):
        (case.world / name).mkdir(exist_ok=True)  # a folder is read as a dataset


def shown_optimizer(case: Case, module: Any) -> dict:
    """Gets what the optimizer that a script makes does to a matrix and a bias, over four steps."""
    seen, original = {}, module.make_optimizer

    def make(*args: Any, **options: Any) -> Any:
        tx = original(*args, **options)
        params = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.ones(2)}
        at, told = tx.init(params), []
        for size in (1.0, 3.0, 0.01, 2.0):
            updates, at = tx.update(jax.tree.map(lambda x, size=size: size * x, params), at, params)
            told.append(updates)
        seen["optimizer"] = told
        return tx

    case.patch.setattr(module, "make_optimizer", make)
    return seen


def of_ppo(settings: kinds.PPOExperiment, case: Case) -> str:
    """What `train_ppo.py` starts with."""
    services, registry = [], importlib.import_module("ppo_jax.rewards.registry")
    original = registry.make_http_reward
    case.patch.setattr(
        registry,
        "make_http_reward",
        lambda url, http: (services.append(dataclasses.astuple(http)), original(url, http))[1],
    )
    with_datasets(case)
    setup = ppo_setup.prepare(settings)
    texts = train_ppo.texts_to_learn(setup, 0)
    named = repr((setup.model.config, setup.sampling, dict(setup.shardings.batch.mesh.shape), setup.judges.names,
                  setup.judges.weights, getattr(setup.gold, "__name__", ""), services))  # fmt: skip
    rates = [float(setup.schedule(step)) for step in (0, 7, 30)]
    rows = train_ppo.rows_of(setup, 0)
    return digest(
        (setup.prompts.tokens, setup.heldout.tokens, texts, named, setup.state, setup.ref_params, rates, rows)
    )


def ppo_with(config: PPOConfig, case: Case) -> str:
    fields = {name: getattr(config, name) for name in ("batch_size", "stale_iterations")}
    ppo = dataclasses.replace(KL, prompt_length=config.prompt_length + 6, **fields)
    return of_ppo(experiment(kinds.PPOExperiment, case.world, ppo=ppo), case)


def dry(setup: Any, kl: float = 0.0) -> Any:
    """A setup of PPO whose programs do nothing but what they promise, at once: all responses are empty."""
    config = setup.settings.ppo
    k, length = config.responses_per_prompt, config.response_length

    def act(state, ref_params, prompts):
        tokens, mask = (jnp.pad(x.repeat(k, 0), ((0, 0), (0, length))) for x in (prompts.tokens, prompts.mask))
        return Rollout(tokens, mask, *(jnp.zeros((len(tokens), length)) for _ in range(2)))

    def measure(state, ref_params, rollout, scores):
        return {f"objective/{name}": jnp.float32(kl) for name in ("kl", "ref_nll", "length", "eos_frac")} | {
            "kl/exact": jnp.float32(0)
        }

    def learn(state, ref_params, rollout, scores, texts):
        metrics = measure(state, ref_params, rollout, scores) | {"guard/first_broken": jnp.float32(-1)}
        metrics["objective/kl"] = kl * state.step
        return state.replace(step=state.step + 1), metrics, rollout

    return setup._replace(step=setup.step._replace(act=act, learn=learn, measure=measure, score=None, iterate=None))


def ppo_begun(settings: kinds.PPOExperiment, case: Case) -> str:
    """What is known before the first iteration."""
    setup = ppo_setup.prepare(settings)
    return digest(train_ppo.begin(dry(setup), setup.state).running)


def ppo_run(settings: kinds.PPOExperiment, case: Case) -> str:
    """What a run leaves, of programs that do nothing; times apart, and the settings themselves."""
    case.patch.setattr(ppo_results, "plot_curves", lambda *_, **__: None)
    case.patch.setattr(ppo_results, "export", lambda *_: None)
    case.patch.setattr(train_ppo, "with_compiled_step", lambda setup: setup)
    train_ppo.train(dry(ppo_setup.prepare(settings), kl=1.0), case.folder)
    saved = sorted(path.name for path in (case.folder / "checkpoints").iterdir())
    files = {name: (case.folder / name).read_bytes() for name in ("samples.jsonl", "responses.jsonl", "results.json")}
    return digest((saved, files, len(folders.without_time(case.folder / "metrics.jsonl"))))


def of_sft(settings: kinds.SFTExperiment, case: Case) -> str:
    """What `train_sft.py` starts with."""
    with_datasets(case)
    seen = shown_optimizer(case, train_sft)
    setup = train_sft.prepare(settings)
    named = repr((setup.model.config, setup.special, dict(setup.shardings.batch.mesh.shape)))
    measured = []

    def measure(params, batch):
        measured.append(batch.tokens)
        return 1.0, 1

    train_sft.heldout_loss(setup._replace(step=setup.step._replace(measure=measure)), setup.state.params)
    rates = [float(setup.schedule(step)) for step in (0, 3, 700)]
    examples = [(x.tokens, x.segments, x.target_mask) for x in (setup.examples, setup.heldout)]
    return digest((examples, named, setup.state.params, setup.state.key, seen, rates, measured))


def of_judgements(module: Any):
    """What `train_reward.py` or `train_dpo.py` starts with."""

    def output(settings: Any, case: Case) -> str:
        with_datasets(case)
        seen = shown_optimizer(case, module)
        setup = module.prepare(settings)
        named = repr((setup.model.config, setup.special, dict(setup.shardings.batch.mesh.shape), setup.num_steps))
        parts = [vars(x) for x in (setup.judged, setup.heldout, getattr(setup, "data", None)) if x is not None]
        data = [{name: x for name, x in part.items() if isinstance(x, (np.ndarray, Examples))} for part in parts]
        rates = [float(setup.schedule(step)) for step in (0, 1, 7)]
        return digest((data, named, setup.state.params, setup.state.key, seen, rates))

    return output


class Told:
    """A policy that answers at once, by its arguments and by what it is asked."""

    tokenizer = None

    def __init__(self, model: str, *sizes: Any, **options: Any) -> None:
        self.said = repr((Path(model).name, sizes, sorted(options.items())))
        self.tokenizer = evaluate.load_tokenizer(model)

    def respond(self, prompts, num_responses=1, seed=0):
        def text(prompt, number):
            words = hashlib.sha256(repr((self.said, prompt, number, seed, num_responses)).encode()).digest()
            return " ".join(("good", "bad", "the", "cat")[byte % 4] for byte in words[:12])

        return [[text(prompt, number) for number in range(num_responses)] for prompt in prompts]


def of_asking(module: Any, start: str):
    """What `evaluate.py` or `best_of_n.py` leaves, with a policy that answers at once; but the settings themselves."""

    def output(settings: Any, case: Case) -> str:
        with_datasets(case)
        served = []

        def serve(store, host, port, token):
            people = [
                number
                for number in range(9)
                if not store.complete() and annotate(store, by_length, 1.0, 0, f"p{number}")
            ]
            served.append((host, port, token, people))

        case.patch.setattr(module, "Responder", Told)
        case.patch.setattr(collect_feedback, "serve_until_complete", serve)
        getattr(module, start)(settings, case.folder)
        files = {name: x for name, x in folders.contents(case.folder).items() if name.endswith((".json", ".jsonl"))}
        files.pop("config.json")
        return digest((files, served))

    return output


def by_length(prompts, completions, **columns):
    return [len(text) for text in completions]


def resumed(module: Any):
    """What a script asks of the checkpoints of its workdir: steps to do, how many to keep, what may have changed."""

    def output(settings: Any, case: Case) -> str:
        asked: list[Any] = []

        def resume(workdir, config, may_change, state, total, keep, *rest):
            asked.extend((may_change, total, keep))
            raise KeyboardInterrupt

        case.patch.setattr(module, "resume", resume)
        with pytest.raises(KeyboardInterrupt):
            module.train(module.prepare(settings), case.folder)
        return repr(asked)

    return output


def of_feedback(settings: kinds.FeedbackExperiment, case: Case) -> str:
    """What `collect_feedback.py` asks, serves and leaves."""
    with_datasets(case)
    served = []

    def serve(store, host, port, token, until, announce):
        needed = store.progress("anybody").total_needed
        judged = [(one.annotator, one.ranks) for one in store.judgements()]
        asked = [(x.kind, x.prompt, x.responses, x.scale) for _, x in store.pending("somebody")]
        served.append(
            repr((host, port, token, needed, judged, asked, inspect.getclosurevars(until).nonlocals["until_complete"]))
        )

    case.patch.setattr(collect_feedback, "Responder", Told)
    case.patch.setattr(collect_feedback, "serve", serve)
    collect_feedback.main(settings, case.folder)
    files = {name: x for name, x in folders.contents(case.folder).items() if name.endswith(".jsonl")}
    return digest((files, served))


def of_corpus(settings: kinds.CorpusSettings, case: Case) -> str:
    """The corpus."""
    road = rlhf.Road(kinds.RLHFExperiment(corpus=settings), case.folder)
    road.corpus()
    return digest(folders.contents(case.folder / "corpus"))


def of_road(settings: kinds.RLHFExperiment, case: Case) -> str:
    """Where the road begins: its prompts, its seeds and its judge."""
    road = rlhf.Road(settings, case.folder)
    road.prompts()
    return digest((folders.contents(case.folder / "prompts"), road.gold, road.settings.sft.seed, road.model))


def of_comparison(settings: kinds.CompareExperiment, case: Case) -> str:
    """What is compared, in which units."""
    return digest(repr((settings.plan(), settings.levels())))


# The parts


def of_model(config: ModelConfig, case: Case) -> str:
    """Fresh parameters, the logits of random ones with an adapter, and how long a sequence may be."""
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    rng, decoder = np.random.default_rng(0), Decoder(config)
    with jax.disable_jit():
        fresh = decoder.init(jax.random.key(0), tokens, tokens > 0)["params"]
        params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), fresh)
        adapter = init_adapter(params, LoRAConfig(rank=1), jax.random.key(1))
        params = overlay(params, jax.tree.map(lambda x: x + 0.1, adapter))
        logits = decoder.apply({"params": params}, tokens, tokens > 0)
    return digest((fresh, logits, [shapes_of(config, length) for length in (9, 10, 11, 12)]))


def shapes_of(config: ModelConfig, length: int = 5) -> str:
    """Shapes of the parameters and the logits; or that the sequence is too long."""
    tokens, decoder = jnp.zeros((1, length), int), Decoder(config)
    try:
        return repr(jax.eval_shape(decoder.init_with_output, jax.random.key(0), tokens, tokens == 0))
    except InputError as error:
        return str(error)


def of_rope(scaling: RopeScaling, case: Case) -> str:
    """The frequencies of short and of longer sequences."""
    lengths = [rope.frequencies(8, 100.0, scaling, length) for length in (4, 8, 16)]
    return digest((lengths, rope.magnitude(scaling)))


def of_sampling(config: SamplingConfig, case: Case) -> str:
    """A rollout."""
    params, rollout = jax.tree.map(jnp.asarray, bench().params), bench().rollout
    prompts = Prompts(jnp.tile(rollout.tokens[:, :2], (3, 1)), jnp.tile(rollout.mask[:, :2], (3, 1)))
    with jax.disable_jit():
        return digest(generate(ActorCritic(TINY), params, prompts, jax.random.key(0), config))


def of_lora(config: LoRAConfig, case: Case) -> str:
    """The adapter, and how strong it is."""
    adapter = init_adapter(jax.tree.map(jnp.asarray, bench().params["decoder"]), config, jax.random.key(0))
    return digest((adapter, config.scale))


def of_preference(config: DPOConfig, case: Case) -> str:
    """The loss of four pairs, or of four single texts."""
    ours, theirs = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 2))) for i in (0, 1))
    single = config.loss == "kto"
    labels = (jnp.array([True, False, True, True]), jnp.float32(0.1)) if single else (None, None)
    return digest(preference_loss(ours, theirs, *labels, config))


def of_lora_settings(settings: kinds.LoRASettings, case: Case) -> str:
    return of_ppo(experiment(kinds.PPOExperiment, case.world, lora=settings), case)


def of_mesh(settings: kinds.MeshSettings, case: Case) -> str:
    return of_ppo(experiment(kinds.PPOExperiment, case.world, mesh=settings), case)


def of_architecture(settings: kinds.Architecture, case: Case) -> str:
    """The decoder's configuration, of which every field has rows of its own."""
    return repr(settings.model_config(30, "float32"))


def of_control(config: ControlConfig, case: Case) -> str:
    """An iteration of control, learning from a trajectory whose ratios are far from one."""
    method, net, tx = resolve_control(config), architecture(QUADRANTS, config), make_tx(config, 5)
    with jax.disable_jit():
        keys = [jax.random.key(i) for i in range(4)]
        params = init_networks(keys[0], net)
        worlds = new_worlds(QUADRANTS, keys[1], config.num_envs)
        _, trajectory, _ = act(QUADRANTS, net, params, worlds, keys[2], config.num_steps)
        moved = trajectory.logprobs + jnp.where(jnp.arange(config.num_envs) % 2, 0.7, -0.7)[None]
        rewards = trajectory.rewards + jnp.arange(config.num_steps)[:, None]
        trajectory = trajectory._replace(logprobs=moved, rewards=rewards)
        params, _, metrics = learn(net, tx, method, params, init_optimizer(tx, params), trajectory, keys[3])
    assert metrics["guard/first_broken"] == -1
    return digest((params, metrics))


OUTPUTS = {
    PPOConfig: lambda config, case: learned(config),
    ModelConfig: of_model,
    LinearScaling: of_rope,
    Llama3Scaling: of_rope,
    YarnScaling: of_rope,
    LongScaling: of_rope,
    SamplingConfig: of_sampling,
    LoRAConfig: of_lora,
    DPOConfig: of_preference,
    kinds.PPOExperiment: of_ppo,
    kinds.LoRASettings: of_lora_settings,
    kinds.MeshSettings: of_mesh,
    kinds.Architecture: of_architecture,
    kinds.SFTExperiment: of_sft,
    kinds.RewardExperiment: of_judgements(train_reward),
    kinds.DPOExperiment: of_judgements(train_dpo),
    kinds.EvaluateExperiment: of_asking(evaluate, "evaluate"),
    kinds.BestOfNExperiment: of_asking(best_of_n, "run"),
    kinds.FeedbackExperiment: of_feedback,
    kinds.CorpusSettings: of_corpus,
    kinds.RLHFExperiment: of_road,
    kinds.CompareExperiment: of_comparison,
    (kinds.SFTExperiment, "resumed"): resumed(train_sft),
    (kinds.RewardExperiment, "resumed"): resumed(train_reward),
    (kinds.DPOExperiment, "resumed"): resumed(train_dpo),
    ControlConfig: of_control,
    kinds.ControlExperiment: lambda settings, case: repr(settings),
    kinds.BenchmarkExperiment: lambda settings, case: repr(settings),
    "control": lambda settings, case: of_control(dataclasses.replace(settings.ppo, num_steps=2), case),
    "sampled": lambda config, case: sampled(config),
    "watched": lambda config, case: watched(config, case.folder),
    "prepared": ppo_with,
    "shapes": lambda config, case: shapes_of(config),
    "begun": ppo_begun,
    "run": ppo_run,
}


def experiment(kind: type, world: Path, /, **fields: Any) -> Any:
    """The settings of a class: its base with these fields."""
    return kind(**{name: here(world, value) for name, value in (BASES.get(kind, {}) | fields).items()})


# Every class and every field has a row


def settings_classes() -> set[type]:
    """The dataclasses of both packages that are settings, but those that only others inherit."""
    found: set[type] = set()
    for package in (ppo_jax, experiments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.startswith("experiments.configs."):  # they have no classes
                continue
            for kind in vars(importlib.import_module(module.name)).values():
                if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.name:
                    found.add(kind)
    assert {kind.__name__ for kind in found} >= NOT_SETTINGS, "a name in NOT_SETTINGS is no dataclass any more"
    settings = {kind for kind in found if not (kind.__name__ in NOT_SETTINGS or issubclass(kind, nn.Module))}
    parts = {base for kind in settings for base in kind.__mro__[1:]} - set(ROWS)
    return settings - parts


def test_every_settings_class_has_its_rows():
    assert settings_classes() == set(ROWS)


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_every_field_has_its_row(kind):
    assert set(ROWS[kind]) == {field.name for field in dataclasses.fields(kind)}


def test_the_tests_that_rows_name_are_there_and_know_the_field():
    for kind, rows in ROWS.items():
        for name, proof in rows.items():
            if isinstance(proof, str):
                file, _, test = proof.partition("::")
                source = (TESTS / file).read_text()
                there = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
                assert test in there, (kind.__name__, name, proof)
                assert name in source or name in Path(inspect.getsourcefile(kind)).read_text(), (kind.__name__, name)


# Every field changes something


CHANGES = [
    pytest.param(kind, name, one, id=f"{kind.__name__}-{name}-{i}")
    for kind, rows in ROWS.items()
    for name, proof in rows.items()
    if not isinstance(proof, str)
    for i, one in enumerate(proof)
]


KNOWN: dict[str, str] = {}


def outcome(kind: type, fields: dict[str, Any], name: str, one: Row, case: Case) -> str:
    """The output of these settings, worked out once; or the refusal, which names the field."""
    same = repr((kind, one.by, sorted(fields.items())))
    if same not in KNOWN:
        KNOWN[same] = work_out(kind, fields, name, one, case)
    return KNOWN[same]


def work_out(kind: type, fields: dict[str, Any], name: str, one: Row, case: Case) -> str:
    try:
        return (OUTPUTS.get((kind, one.by)) or OUTPUTS[one.by or kind])(experiment(kind, case.world, **fields), case)
    except InputError as error:
        told = f"refused: {error}"
    assert name in told  # and not for something else
    return told


@pytest.mark.parametrize(("kind", "name", "one"), CHANGES)
def test_a_change_changes_the_output_or_is_refused(kind, name, one, world, tmp_path):
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    usual = (BASES.get(kind, {}) | one.given).get(name, defaults[name])
    seen: dict[str, Any] = {}
    for number, value in enumerate((usual, *one.values)):
        fields = one.given if number == 0 else one.given | {name: value}
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            told = outcome(kind, fields, name, one, Case(world, folder, patch))
        assert number or not told.startswith("refused"), told
        assert told not in seen, f"{name}={value!r} is {name}={seen.get(told)!r}"
        seen[told] = value


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (train_ppo, kinds.PPOExperiment),
        (train_sft, kinds.SFTExperiment),
        (train_reward, kinds.RewardExperiment),
        (train_dpo, kinds.DPOExperiment),
    ],
)
def test_remat_reaches_the_model(script, kind, world):
    for remat in REMATS:
        assert script.prepare(experiment(kind, world, remat=remat)).model.config.remat == remat
    with pytest.raises(InputError, match="remat: got 'all', expected one of none, dots, full"):
        experiment(kind, world, remat="all")


def test_the_same_settings_give_the_same_output(world, tmp_path):
    """Or what stands above could not fail."""
    for kind, output in OUTPUTS.items():
        if isinstance(kind, type) and kind not in (
            PPOConfig,
            kinds.LoRASettings,
            kinds.MeshSettings,
            kinds.Architecture,
        ):
            told = set()
            for number in range(2):
                folder = tmp_path / f"{kind.__name__}{number}"
                folder.mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    told.add(output(experiment(kind, world), Case(world, folder, patch)))
            assert len(told) == 1, kind.__name__
    assert learned.__wrapped__(SMALL) == learned(SMALL)


# What the chosen method does not read is refused


@pytest.mark.parametrize("name", IDLE)
def test_what_nothing_reads_is_refused_by_its_name(name):
    config = dataclasses.replace(SMALL, **IDLE[name])
    resolve(config)
    value = PPO_ROWS[name][0].values[0]
    with pytest.raises(InputError, match=rf"^ppo\.{name}: got .*, expected the default .*: nothing reads it "):
        resolve(dataclasses.replace(config, **{name: value}))


def test_every_field_that_may_be_idle_is_above():
    switches = {
        **{kind: tuple(functions) for kind, functions in METHODS.items()},
        "whiten_advantages": ("auto", "none"),
        "overlong_buffer": (0, 1),
        "score_scale": ("none", "batch"),
        "kl_coef": (0.0, 0.1),
        "kl_estimator": ("k1", "exact"),
        "vf_coef": (0.0, 0.1),
        "kl_target": (0.0, 6.0),
        "importance": ("none", "mask"),
        "lambda_length_scale": (0.0, 0.5),
        "critic_lambda": (-1.0, 1.0),
    }
    found = set()
    for kind, values in switches.items():  # each by itself, and the pair that takes the place of gae_lambda
        for value in values:
            found |= set(idle(dataclasses.replace(SMALL, **{kind: value})))
    found |= set(idle(dataclasses.replace(SMALL, lambda_length_scale=0.5, critic_lambda=1.0)))
    assert found == set(IDLE)


def method_cases():
    """Each method with each parameter that any method of its kind has."""
    for kind, functions in METHODS.items():
        every = {
            p.name
            for f in functions.values()
            for p in inspect.signature(f).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        every.discard("responses_per_prompt")  # which sampling reads as well
        yield from ((kind, method, name) for method, name in itertools.product(functions, sorted(every)))


@pytest.mark.parametrize(("kind", "method", "name"), list(method_cases()))
def test_a_method_reads_a_setting_or_refuses_it(kind, method, name):
    given = {kind: method} | (GROUPS if kind == "advantage" else {"clip_eps_high": 0.3} if method == "cispo" else {})
    config = dataclasses.replace(SMALL, **given)
    changed = dataclasses.replace(config, **{name: PPO_ROWS[name][0].values[0]})
    if name in idle(config):
        with pytest.raises(InputError, match=rf"^ppo\.{name}: got "):
            resolve(changed)
    else:
        assert learned(changed) != learned(config)
