"""The settings of the experiment scripts: every field documented, none silent, from and to a ConfigDict."""

import ast
import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import ml_collections
import pytest

from experiments import settings
from experiments.methods import METHODS
from experiments.settings import (
    Architecture,
    BenchmarkExperiment,
    BestOfNExperiment,
    CompareExperiment,
    ControlExperiment,
    CorpusSettings,
    DPOExperiment,
    EvaluateExperiment,
    FeedbackExperiment,
    LoRASettings,
    MeshSettings,
    PPOExperiment,
    RewardExperiment,
    RLHFExperiment,
    SFTExperiment,
    defaults,
    describe,
    from_config_dict,
)
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_ppo": PPOExperiment,
    "train_sft": SFTExperiment,
    "train_reward": RewardExperiment,
    "collect_feedback": FeedbackExperiment,
    "evaluate": EvaluateExperiment,
    "rlhf": RLHFExperiment,
    "train_dpo": DPOExperiment,
    "best_of_n": BestOfNExperiment,
    "compare": CompareExperiment,
    "train_control": ControlExperiment,
    "benchmark": BenchmarkExperiment,
}
KINDS = tuple(SCRIPTS.values())
ALL = (*KINDS, MeshSettings, Architecture, CorpusSettings, LoRASettings, PPOConfig)
SHIPPED = sorted((ROOT / "experiments" / "configs").glob("[!_]*.py"))


def kind_of(config: ml_collections.ConfigDict) -> type:
    """The settings that a ConfigDict belongs to, by its fields."""
    (kind,) = [kind for kind in KINDS if set(config) == {field.name for field in dataclasses.fields(kind)}]
    return kind


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Fields


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_field_has_a_default_and_help(kind):
    for field in dataclasses.fields(kind):
        nested = field.default is dataclasses.MISSING
        if nested:
            assert dataclasses.is_dataclass(field.default_factory())
        else:
            help = field.metadata["help"]
            assert len(help) >= 5, field.name
            assert "\n" not in help, field.name
            assert isinstance(field.default, {"int": int, "float": float, "str": str, "bool": bool}[str_of(field.type)])


def str_of(kind) -> str:
    return kind if isinstance(kind, str) else kind.__name__


def test_the_fields_that_people_script_against_are_there():
    names = {name for name, _, _ in describe(PPOExperiment, defaults(PPOExperiment))}
    promised = "model prompts reward seed num_iterations checkpoint_every".split()
    of_ppo = "batch_size prompt_length response_length num_epochs num_minibatches kl_coef clip_eps gamma gae_lambda"
    promised += [f"ppo.{name}" for name in (*of_ppo.split(), "temperature")]
    assert {f"config.{name}" for name in promised} <= names


def attributes_and_parameters(node: ast.AST) -> set[str]:
    """Names that code reads as attributes or takes as parameters; what only checks values does not count."""
    checks = isinstance(node, ast.FunctionDef) and re.match("__post_init__|_check_|_refuse_", node.name)
    read = set().union(*map(attributes_and_parameters, ast.iter_child_nodes(node))) if not checks else set()
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
    elif isinstance(node, ast.FunctionDef) and not checks:
        read |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return read


def test_every_field_is_used():
    """A setting that is accepted and never read is a defect: each name stands as an attribute somewhere in the code."""
    files = [*(ROOT / "ppo_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    read = set().union(*(attributes_and_parameters(ast.parse(path.read_text())) for path in files))
    read |= set(METHODS)  # `resolve` looks each kind up by its name
    handed_over = {field.name for field in dataclasses.fields(Architecture)}  # all at once, to ModelConfig
    for kind in ALL:
        unused = {field.name for field in dataclasses.fields(kind)} - read - handed_over
        assert not unused, (kind.__name__, unused)


# There and back


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_defaults_go_there_and_back(kind):
    assert from_config_dict(kind, defaults(kind)) == kind()
    # Also through the plain dictionary that stands in config.json.
    assert ml_collections.ConfigDict(dataclasses.asdict(kind())).to_dict() == defaults(kind).to_dict()


def test_changes_arrive():
    config = defaults(RLHFExperiment)
    config.corpus.num_train = 17
    config.pretrain.architecture.width = 64
    config.ppo.mesh.fsdp = 2
    config.ppo.ppo.kl_coef = 0.0  # nothing is not "not given"
    config.ppo.ppo.whiten_shift = False
    config.ppo.lora.rank = 4
    made = from_config_dict(RLHFExperiment, config)
    assert made.corpus.num_train == 17
    assert made.pretrain.architecture.width == 64
    assert made.ppo.mesh.fsdp == 2
    assert made.ppo.ppo.kl_coef == 0.0
    assert made.ppo.ppo.whiten_shift is False
    assert made.ppo.lora == LoRASettings(rank=4)
    assert dataclasses.replace(made, corpus=CorpusSettings()) != made


def test_a_configuration_file_cannot_add_a_field():
    with pytest.raises(AttributeError, match="learning_rate"):
        defaults(PPOExperiment).ppo.learning_rate = 1.0


def test_a_whole_number_is_a_number():
    made = from_config_dict(PPOExperiment, ml_collections.ConfigDict({"kl_limit": 20, "ppo": {"clip_eps": 1}}))
    assert (made.kl_limit, made.ppo.clip_eps) == (20, 1)


def test_a_missing_field_has_its_default():
    config = ml_collections.ConfigDict({"model": "x", "ppo": {"batch_size": 8}})
    made = from_config_dict(PPOExperiment, config)
    assert made == PPOExperiment(model="x", ppo=PPOConfig(batch_size=8))


def test_an_unknown_field_is_refused_with_the_known_ones():
    config = defaults(PPOExperiment).unlock()
    config.ppo.learning_rate = 1.0
    with pytest.raises(
        InputError,
        match=r"unknown field 'learning_rate', expected some of batch_size, responses_per_prompt, prompt_length",
    ) as error:
        from_config_dict(PPOExperiment, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"), [("seed", "a"), ("ppo", 3), ("ppo.lr", "x"), ("model", 1), ("seed", 0.5), ("mesh", None)]
)
def test_a_value_of_another_type_is_refused_by_name(path, value):
    """A configuration that is no copy of the defaults has no types of its own."""
    owner, _, name = path.rpartition(".")
    config = ml_collections.ConfigDict({owner: {name: value}} if owner else {name: value})
    with pytest.raises(InputError, match=name):
        from_config_dict(PPOExperiment, config)


BAD = [
    (PPOExperiment, "num_iterations", 0),
    (PPOExperiment, "checkpoint_every", 0),
    (PPOExperiment, "checkpoints_to_keep", 0),
    (PPOExperiment, "samples_every", 0),
    (PPOExperiment, "num_samples", 0),
    (PPOExperiment, "eval_prompts", 0),
    (PPOExperiment, "kl_limit", -1.0),
    (PPOExperiment, "long_prompts", "cut"),
    (PPOExperiment, "dtype", "float16"),
    (PPOConfig, "batch_size", 10),  # num_minibatches is 4
    (PPOConfig, "batch_size", 0),
    (PPOConfig, "num_minibatches", 0),
    (PPOConfig, "temperature", 0.0),
    (PPOConfig, "lr", 0.0),
    (PPOConfig, "lr", float("nan")),
    (PPOConfig, "kl_coef", -0.1),
    (PPOConfig, "gamma", 1.5),
    (PPOConfig, "gae_lambda", -0.1),
    (PPOConfig, "adam_b1", 1.0),
    (PPOConfig, "min_new_tokens", 49),  # response_length is 48
    (PPOConfig, "kl_estimator", "k4"),
    (PPOConfig, "lr_schedule", "step"),
    (PPOConfig, "responses_per_prompt", 0),
    (PPOConfig, "stale_iterations", -1),
    (PPOConfig, "truncate_after", 49),
    (PPOConfig, "score_scale", "all"),
    (PPOConfig, "score_clip", 0.0),
    (PPOConfig, "missing_token_score", math.inf),
    (PPOConfig, "kl_in", "score"),
    (PPOConfig, "whiten_advantages", "rows"),
    (PPOConfig, "critic_lambda", -0.5),
    (PPOConfig, "baseline_decay", 1.0),
    (PPOConfig, "dual_clip", 1.0),
    (PPOConfig, "loss_aggregation", "mean"),
    (PPOConfig, "importance", "clip"),
    (PPOConfig, "ema_decay", 1.0),
    (PPOConfig, "max_skipped", -1),
    (PPOConfig, "noise_scale", True),  # accumulation is 1
    (LoRASettings, "rank", -1),
    (LoRASettings, "alpha", 8.0),  # nothing reads it without a rank
    (PPOExperiment, "param_dtype", "float16"),
    (PPOExperiment, "frozen_layers", -1),
    (PPOExperiment, "reference_samples", 1),
    (PPOExperiment, "ptx_length", 64),  # no ptx_data
    (PPOExperiment, "ptx_data", "texts.jsonl"),  # ppo.ptx_coef is 0
    (PPOExperiment, "reward_retries", 7),  # no service
    *((DPOExperiment, name, 0) for name in "num_epochs batch_size accumulation log_every eval_every".split()),
    (DPOExperiment, "loss", "ppo"),
    (DPOExperiment, "beta", 0.0),
    (DPOExperiment, "threshold", 0.5),  # dpo
    (DPOExperiment, "length", 1),
    (DPOExperiment, "lr", 0.0),
    (BestOfNExperiment, "n", "1"),
    (BestOfNExperiment, "n", "3,4"),
    (BestOfNExperiment, "temperature", 0.0),
    (CompareExperiment, "num_seeds", 0),
    (CompareExperiment, "task", "chess"),
    (CompareExperiment, "metric", ""),
    (CompareExperiment, "thresholds", "five"),
    (SFTExperiment, "heldout_frac", 1.0),
    (SFTExperiment, "length", 1),
    (SFTExperiment, "num_steps", 0),
    (SFTExperiment, "batch_size", 0),
    (SFTExperiment, "accumulation", 0),
    (SFTExperiment, "patience", -1),
    (SFTExperiment, "lr", -1.0),
    (SFTExperiment, "lr_schedule", "step"),
    (SFTExperiment, "warmup_steps", -1),
    (SFTExperiment, "weight_decay", -0.1),
    (SFTExperiment, "dtype", "int8"),
    *((RewardExperiment, name, 0) for name in "num_epochs batch_size response_length log_every eval_every".split()),
    (RewardExperiment, "checkpoint_every", 0),
    (RewardExperiment, "checkpoints_to_keep", 0),
    (RewardExperiment, "length", 1),
    (RewardExperiment, "reference_samples", 1),
    (RewardExperiment, "heldout_frac", 0.0),
    (RewardExperiment, "lr", 0.0),
    (RewardExperiment, "max_grad_norm", -1.0),
    (RewardExperiment, "lr_schedule", "step"),
    (RewardExperiment, "warmup_steps", -1),
    (RewardExperiment, "weight_decay", -0.1),
    (RewardExperiment, "center_coef", -0.1),
    (RewardExperiment, "seed", -1),
    (RewardExperiment, "dtype", "float16"),
    (RewardExperiment, "trackers", "nothing"),
    *((FeedbackExperiment, name, 0) for name in "num_responses prompt_length response_length batch_size".split()),
    (FeedbackExperiment, "annotators", 0),
    (FeedbackExperiment, "num_prompts", -1),
    (FeedbackExperiment, "seed", -1),
    (FeedbackExperiment, "temperature", 0.0),  # greedy responses would all be equal
    (FeedbackExperiment, "temperature", float("inf")),
    (FeedbackExperiment, "overlap", 1.5),
    (FeedbackExperiment, "overlap", float("nan")),
    (FeedbackExperiment, "scale", 1),
    (FeedbackExperiment, "scale", 101),
    (FeedbackExperiment, "port", 65536),
    (FeedbackExperiment, "kind", "order"),
    (FeedbackExperiment, "long_prompts", "cut"),
    (FeedbackExperiment, "dtype", "int8"),
    (FeedbackExperiment, "export", "pears"),
    *((EvaluateExperiment, name, 0) for name in "prompt_length response_length batch_size annotators".split()),
    (EvaluateExperiment, "num_prompts", 1),
    (EvaluateExperiment, "seed", -1),
    (EvaluateExperiment, "temperature", -0.1),
    (EvaluateExperiment, "temperature", float("nan")),
    (EvaluateExperiment, "port", -1),
    (EvaluateExperiment, "long_prompts", "cut"),
    (EvaluateExperiment, "dtype", "float16"),
    (RLHFExperiment, "num_eval_prompts", 1),
    (RLHFExperiment, "feedback", "nobody"),
    (RLHFExperiment, "annotator_temperature", 0.0),
    (RLHFExperiment, "annotator_temperature", math.inf),
    (RLHFExperiment, "seed", -1),
    (CorpusSettings, "num_prompts", 0),
    (Architecture, "num_layers", 0),
    (MeshSettings, "fsdp", 0),
    (MeshSettings, "data", -2),
    (MeshSettings, "tensor", -1),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_value_out_of_range_is_refused_by_name_value_and_range(kind, name, value):
    def make():
        made = kind(**{name: value})
        if kind is Architecture:  # checked with the model that is made of it
            made.model_config(100, "float32")
        if kind is MeshSettings:  # checked with the devices that are there
            make_mesh(**dataclasses.asdict(made))

    with pytest.raises(InputError, match=rf"{name}.*{re.escape(str(value))}.*, expected ") as error:
        make()
    assert "\n" not in str(error.value)


# The shipped files


def test_there_is_a_file_for_each_script():
    assert {kind_of(load(path).get_config()) for path in SHIPPED} == set(KINDS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_loads_and_is_valid(path):
    config = load(path).get_config()
    kind = kind_of(config)
    made = from_config_dict(kind, config)
    assert made != kind(), "it changes nothing"
    # Fields of nested settings too: nothing that the dataclass does not know.
    assert ml_collections.ConfigDict(dataclasses.asdict(made)).to_dict() == config.to_dict()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_says_how_to_run_it(path):
    """The docstring holds command, hardware, time and expected result."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    command = re.search(r"python experiments/(\w+)\.py --config=experiments/configs/(\w+)\.py", text)
    kind = kind_of(load(path).get_config())
    if command:
        assert SCRIPTS[command[1]] is kind
        assert command[2] == path.stem
        assert "--workdir=" in text
    else:
        assert path.stem == "quickstart"
        assert "make quickstart" in text
    assert re.search(r"CPU|cores?\b|GPU|TPU", text), "no hardware"
    assert re.search(r"\bminutes?\b|\bseconds?\b|\bhours?\b|not\s+yet\s+run", text), "no time"
    assert re.search(r"\d", text), "no expected result"


def test_the_readme_names_files_that_are_there():
    text = (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"experiments/[\w/]+\.py", text)) - {"experiments/configs/NAME.py"}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_docstrings_of_the_scripts_name_files_that_are_there():
    for name in SCRIPTS:
        text = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{name}.py").read_text()))
        named = re.findall(r"experiments/[\w/]+\.py", text)
        assert named
        assert not [path for path in named if not (ROOT / path).is_file()], name


def test_the_module_exports_what_a_configuration_file_needs():
    assert settings.defaults(PPOExperiment).ppo.batch_size == PPOConfig().batch_size


# What has to go together


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: FeedbackExperiment(kind="compare", num_responses=3),
            r"num_responses: got 3, expected 2, with kind=com",
        ),
        (lambda: FeedbackExperiment(kind="rank", num_responses=1), r"num_responses: got 1, expected at least 2, with"),
        (lambda: FeedbackExperiment(host="0.0.0.0"), "token"),
        (lambda: EvaluateExperiment(host="0.0.0.0"), "token"),
        (lambda: EvaluateExperiment(judge="page"), r"against: got '', expected another policy or references"),
        (lambda: RLHFExperiment(gold=""), r"gold: got '', expected a judge, for a simulated annotator"),
        (lambda: RLHFExperiment(model="gpt2"), r"prompts: got '', expected a source of prompts, next to model"),
        (
            lambda: SFTExperiment(model="gpt2", architecture=Architecture(num_layers=1)),
            r"architecture: .* expected the defaults, next to model",
        ),
        (
            lambda: PPOExperiment(frozen_layers=1, lora=LoRASettings(rank=2)),
            r"frozen_layers: got 1, expected 0 with lora",
        ),
        (
            lambda: PPOExperiment(critic="policy", ppo=PPOConfig(advantage="rloo", responses_per_prompt=2)),
            r"critic: got 'policy', expected nothing, with advantage=rloo",
        ),
        (lambda: PPOExperiment(ppo=PPOConfig(ptx_coef=0.5)), r"ptx_data: got '', expected texts exactly if ppo.ptx_co"),
        (lambda: PPOExperiment(ppo=PPOConfig(truncate_after=3)), r"truncate_after: got 3, .* without truncate_token"),
        (lambda: PPOExperiment(ppo=PPOConfig(policy_loss="soft")), r"policy_loss: got 'soft', expected one of clip, "),
        (lambda: PPOExperiment(ppo=PPOConfig(advantage="rloo")), r"responses_per_prompt: got 1, expected at least 2"),
        (
            lambda: CompareExperiment(variants="a: ppo.lrr=1"),
            r"variants: a: no such field in base: 'ppo.lrr'; did you mean ppo.lr\?",
        ),
    ],
    ids=[
        "pairs of three",
        "ranks of one",
        "open page",
        "open evaluation",
        "page of one",
        "no gold",
        "no prompts",
        "new",
        "two ways to freeze",
        "a critic that nothing asks",
        "no texts",
        "no token",
        "no surrogate",
        "no group",
        "a field that is none",
    ],
)
def test_what_cannot_go_together_is_refused(make, told):
    with pytest.raises(InputError, match=told) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_can_go_together_is_taken():
    assert FeedbackExperiment(host="0.0.0.0", token="a secret of some length").token
    assert FeedbackExperiment(kind="rank", num_responses=3).kind == "rank"
    assert EvaluateExperiment(judge="page", against="references").judge == "page"
    assert RLHFExperiment(gold="", feedback="page").feedback == "page"


def test_a_seed_of_the_road_is_added_to_those_of_its_stages():
    road = RLHFExperiment(seed=5, ppo=PPOExperiment(seed=2), corpus=CorpusSettings(seed=9)).seeded()
    seeds = [getattr(road, name).seed for name in ("pretrain", "sft", "collect", "reward", "ppo", "corpus")]
    assert seeds == [5, 5, 5, 5, 7, 9]
    assert road.seeded() == road  # added once
