"""The loop over variants and seeds: what it is told, what it runs, what it makes of the runs."""

import json
import shutil
import statistics
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from folders import call_script, make_world

from experiments import compare, train_ppo
from experiments.settings import CompareExperiment, PPOExperiment
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl

# --- what is compared ---


def test_variants_are_base_with_other_fields():
    base = PPOExperiment(seed=5, ppo=PPOConfig(lr=1e-4, kl_coef=0.5))
    changes = "ppo.lr=2e-3 ppo.num_epochs=7 critic=policy ppo.whiten_rewards=True lora.rank=2 ppo.lr_schedule=cosine"
    text = f"plain; a.b-1: {changes}"
    plan = CompareExperiment(variants=text, base=base).plan()
    assert list(plan) == ["plain", "a.b-1"]
    assert plan["plain"] == base
    other = plan["a.b-1"]
    assert (other.ppo.lr, other.ppo.num_epochs, other.critic, other.ppo.whiten_rewards) == (2e-3, 7, "policy", True)
    assert (other.lora.rank, other.ppo.lr_schedule) == (2, "cosine")
    assert (other.seed, other.ppo.kl_coef, other.ppo.batch_size) == (5, 0.5, base.ppo.batch_size)


def test_fields_that_only_fit_together_are_set_together():
    # Neither alone would do: rloo needs groups, and 3 minibatches do not divide 64 responses.
    text = "a: ppo.responses_per_prompt=4 ppo.advantage=rloo; b: ppo.num_minibatches=3 ppo.batch_size=66;"
    plan = CompareExperiment(variants=text).plan()
    assert (plan["a"].ppo.advantage, plan["a"].ppo.responses_per_prompt) == ("rloo", 4)
    assert (plan["b"].ppo.num_minibatches, plan["b"].ppo.batch_size) == (3, 66)


def test_without_variants_base_is_run_alone():
    assert CompareExperiment().plan() == {"base": PPOExperiment()}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("a: ppo.lr=fast", "variants: a: ppo.lr: got 'fast', expected a value of type float"),
        ("a: ppo.num_epochs=2.5", "variants: a: ppo.num_epochs: got '2.5', expected a value of type int"),
        ("a: ppo.whiten_rewards=1", "variants: a: ppo.whiten_rewards: got '1', expected a value of type bool"),
        ("a: ppo.lrr=1", "variants: a: no such field in base: 'ppo.lrr'; did you mean ppo.lr?"),
        ("a: ppo=1", "variants: a: no such field in base: 'ppo'"),
        ("a: ppo.lr", "variants: a: got 'ppo.lr', expected field=value"),
        ("a: ppo.lr=1 ppo.lr=2", "variants: a: ppo.lr: got '2', expected one value, not two"),
        ("a: seed=1", "variants: a: seed: got '1', expected no value: num_seeds decides it"),
        ("a: ppo.num_minibatches=3", "variants: a: batch_size: got 64"),
        ("a: ppo.lr=-1", "variants: a: lr: got -1.0"),
        ("a:; a: ppo.lr=1", "variants: got 'a', expected a name that no other variant has"),
        ("../a: ppo.lr=1", "variants: got '../a', expected a name of letters"),
        (": ppo.lr=1", "variants: got '', expected a name of letters"),
        ("task: ppo.lr=1", "variants: got 'task', expected a name of letters"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_by_its_name(variants, message):
    with pytest.raises(InputError) as error:
        CompareExperiment(variants=variants)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "cartpole"}, "task: got 'cartpole', expected one of set_fraction"),
        ({"num_seeds": 0}, "num_seeds: got 0"),
        ({"metric": ""}, "metric: got ''"),
        ({"thresholds": "5,high"}, "thresholds: got 'high'"),
        ({"thresholds": "inf"}, "thresholds: got 'inf'"),
        ({"task": "set_fraction", "base": PPOExperiment(model="gpt2")}, "base.model: got 'gpt2'"),
        ({"task": "set_fraction", "variants": "a: model=gpt2"}, "variants: a: model: got 'gpt2'"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError) as error:
        CompareExperiment(**fields)
    assert message in str(error.value)


def test_thresholds_are_numbers():
    assert CompareExperiment(thresholds="5, 7.5,9").levels() == (5.0, 7.5, 9.0)
    assert CompareExperiment().levels() == ()


# --- what is made of the runs ---


def run_of(seed, values, iterations=None, **cost):
    iterations = list(range(1, len(values) + 1)) if iterations is None else iterations
    cost = {"kl": 2.0, "seconds": 10.0, "parameters": 100, "peak_mb": 1.0} | cost
    return {"seed": seed, "iterations": iterations, "values": values, **cost}


def test_summary_golden():
    runs = [run_of(0, [1.0, 5.0, 4.0, 6.0], peak_mb=3.0), run_of(1, [2.0, 3.0, 7.0, 8.0], peak_mb=None)]
    told = compare.summary(runs, (5.0, 7.0, 9.0))
    assert told["final"] == [5.0, 6.0]  # (5 + 4 + 6) / 3, (3 + 7 + 8) / 3
    assert told["best"] == [6.0, 8.0]
    assert told["reached"] == {"5": [2, 3], "7": [None, 3], "9": [None, None]}
    assert (told["seeds"], told["kl"], told["peak_mb"], told["parameters"]) == ([0, 1], [2.0, 2.0], 3.0, 100)
    assert told["curve"]["iterations"] == [1, 2, 3, 4]
    assert told["curve"]["mean"] == [1.5, 4.0, 5.5, 7.0]
    # The standard error of two is half their distance: sqrt((2 (d / 2)^2 / 1) / 2) = d / 2.
    np.testing.assert_allclose(told["curve"]["se"], [0.5, 1.0, 1.5, 1.0])


def test_seeds_that_ended_early_or_have_gaps_are_averaged_where_all_have_values():
    told = compare.summary([run_of(0, [1.0, 2.0, 3.0]), run_of(1, [5.0, 7.0], iterations=[1, 3])], (6.0,))
    assert told["curve"]["iterations"] == [1, 3]
    assert told["curve"]["mean"] == [3.0, 5.0]
    assert told["reached"] == {"6": [None, 3]}


def test_mean_and_error_against_statistics(rng):
    values = rng.normal(size=7).tolist()
    mean, error = compare.mean_and_error(values)
    np.testing.assert_allclose([mean, error], [statistics.fmean(values), statistics.stdev(values) / 7**0.5])
    assert compare.mean_and_error([3.0]) == (3.0, None)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}}",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"final": []}}',
        '{"a": {"final": ["high"]}}',
        '{"a": {"final": [NaN]}}',
        '{"a": {"final": [1], "values": [1, 2], "episodes": [1]}}',
    ],
)
def test_references_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.references: got .*r\.json, expected a JSON object"):
        compare.read_references(str(tmp_path / "r.json"))


def test_references_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.references"):
        compare.read_references(str(tmp_path / "r.json"))
    assert compare.read_references("") == {}


# --- the loop ---

CONFIG = """
from experiments.settings import CompareExperiment, defaults

def get_config():
    return defaults(CompareExperiment)
"""
VARIANTS = "slow: ppo.lr=1e-3; rloo: ppo.advantage=rloo ppo.responses_per_prompt=2"  # in JAX: one program
ON_THE_HOST = "remax: ppo.advantage=remax ppo.responses_per_prompt=2"  # in three


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def flags(world, workdir, *changes):
    """Flags of a comparison of seconds."""
    config = world.root / "compare.py"
    config.write_text(CONFIG)
    base = [flag.replace("--config.", "--config.base.", 1) for flag in world.flags(reward="score_good")[1:]]
    base += ["--config.base.num_iterations=2", "--config.base.eval_prompts=4"]
    own = ["--config.num_seeds=2", "--config.thresholds=-1,99", f"--config.variants={VARIANTS}"]
    return [f"--config={config}", f"--workdir={workdir}", *base, *own, *changes]


THEIRS = {"theirs": {"final": [0.5, 0.7], "reached": {"99": [3, None]}, "kl": [4.0]}}


@pytest.fixture(scope="module")
def others(world):
    """A file of references."""
    path = world.root / "others.json"
    path.write_text(json.dumps(THEIRS))
    return f"--config.references={path}"


@pytest.fixture(scope="module")
def finished(world, others, tmp_path_factory):
    """The workdir of a finished comparison."""
    workdir = tmp_path_factory.mktemp("finished") / "runs"
    silent = SimpleNamespace(readouterr=lambda: ("", ""))
    assert call_script(compare, CompareExperiment, flags(world, workdir, others), silent).status == 0
    return workdir


def test_programs_that_are_compiled_ahead_are_those_that_run(world, tmp_path, capsys):
    """With a judge on the host, and a method that asks it for the likeliest response as well."""
    reward = f"--config.base.reward={world.rewards}:count_good"
    given = flags(world, tmp_path / "runs", reward, f"--config.variants={ON_THE_HOST}", "--config.num_seeds=1")
    assert call_script(compare, CompareExperiment, given, capsys).status == 0
    assert [row["iteration"] for row in metrics_of(tmp_path / "runs")["remax/seed_0"]] == [0, 1]


def metrics_of(workdir):
    """The rows of all runs, by folder."""
    paths = sorted(workdir.glob("*/*/metrics.jsonl"))
    return {str(path.parent.relative_to(workdir)): read_jsonl(path) for path in paths}


def test_a_comparison(finished):
    rows = metrics_of(finished)
    assert list(rows) == ["rloo/seed_0", "rloo/seed_1", "slow/seed_0", "slow/seed_1"]
    results = json.loads((finished / "results.json").read_text())
    assert results["references"] == THEIRS
    for name, variant in results["variants"].items():
        for i, seed in enumerate((0, 1)):
            curve = [row["objective/score"] for row in rows[f"{name}/seed_{seed}"]]
            assert len(curve) == 2
            np.testing.assert_allclose(variant["final"][i], sum(curve) / 2)
            assert variant["reached"] == {"-1": [1, 1], "99": [None, None]}
            seconds = sum(row["time/iteration_s"] for row in rows[f"{name}/seed_{seed}"])
            np.testing.assert_allclose(variant["seconds"][i], seconds)
        assert variant["peak_mb"] > 0
        assert variant["batch_size"] == 8
    configs = [json.loads((finished / name / "config.json").read_text()) for name in rows]
    assert [(c["seed"], c["ppo"]["advantage"], c["ppo"]["lr"]) for c in configs] == [
        (0, "rloo", 0.01),
        (1, "rloo", 0.01),
        (0, "gae", 0.001),
        (1, "gae", 0.001),
    ]
    # A critic on the policy's trunk of width 16 has a matrix of 16 and a bias; rloo has none.
    parameters = {name: variant["parameters"] for name, variant in results["variants"].items()}
    assert parameters["slow"] - parameters["rloo"] == 17


def test_its_table_and_picture(finished):
    table = (finished / "results.md").read_text()
    assert (finished / "curves.png").stat().st_size > 10_000
    (slow,) = [line for line in table.splitlines() if line.startswith("| slow ")]
    assert [cell.strip() for cell in slow.split("|")[4:6]] == ["1, 1", "never, never"]
    (theirs,) = [line for line in table.splitlines() if line.startswith("| theirs ")]
    # The standard error of 0.5 and 0.7 is 0.1.
    assert [cell.strip() for cell in theirs.split("|")[2:9]] == ["0.60 ± 0.10", "", "", "3, never", "4.0", "", ""]


def test_the_same_command_passes_over_what_is_done(world, others, finished, capsys, monkeypatch):
    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr(train_ppo, "prepare", lambda settings: pytest.fail("a run that is done began again"))
    outcome = call_script(compare, CompareExperiment, flags(world, finished, others), capsys)
    assert outcome.status == 0, outcome.err
    assert (finished / "results.json").read_bytes() == before
    assert (finished / "results.md").read_text().strip() in outcome.out


def test_another_threshold_runs_nothing_and_another_setting_runs_its_variant_only(
    world, finished, tmp_path, capsys, monkeypatch
):
    workdir = shutil.copytree(finished, tmp_path / "runs")
    prepare, begun, before = train_ppo.prepare, [], metrics_of(workdir)

    def counted(settings):
        begun.append((settings.seed, settings.ppo.advantage, settings.ppo.lr))
        return prepare(settings)

    monkeypatch.setattr(train_ppo, "prepare", counted)
    changed = VARIANTS.replace("1e-3", "2e-3")
    arguments = flags(world, workdir, f"--config.variants={changed}", "--config.thresholds=0", "--config.num_seeds=1")
    outcome = call_script(compare, CompareExperiment, arguments, capsys)
    assert outcome.status == 0, outcome.err
    assert begun == [(0, "gae", 0.002)]
    after = metrics_of(workdir)
    assert after["slow/seed_0.old"] == before["slow/seed_0"]
    assert after["rloo/seed_0"] == before["rloo/seed_0"]
    results = json.loads((workdir / "results.json").read_text())
    assert [list(variant["reached"]) for variant in results["variants"].values()] == [["0"], ["0"]]
    assert results["variants"]["slow"]["curve"]["se"] == [None, None]


def test_an_interrupted_run_goes_on(world, tmp_path, capsys, monkeypatch):
    arguments = flags(world, tmp_path / "runs", "--config.variants=", "--config.num_seeds=1")
    arguments += ["--config.base.checkpoint_every=1", "--config.base.num_iterations=3"]
    iterate, calls = train_ppo.iterate, []

    def stopped(setup, state, number, clock):
        calls.append(number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return iterate(setup, state, number, clock)

    monkeypatch.setattr(train_ppo, "iterate", stopped)
    assert call_script(compare, CompareExperiment, arguments, capsys).status == 130
    outcome = call_script(compare, CompareExperiment, arguments, capsys)
    assert outcome.status == 0, outcome.err
    assert calls == [0, 1, 1, 2]
    rows = read_jsonl(tmp_path / "runs" / "base" / "seed_0" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]


def test_a_reward_on_the_host_has_its_memory_as_well(world, tmp_path, capsys):
    arguments = flags(world, tmp_path / "runs", "--config.variants=", "--config.num_seeds=1")
    arguments += [f"--config.base.reward={world.rewards}:count_good"]
    assert call_script(compare, CompareExperiment, arguments, capsys).status == 0
    assert json.loads((tmp_path / "runs" / "results.json").read_text())["variants"]["base"]["peak_mb"] > 0


def test_a_metric_that_no_run_has_is_refused(world, tmp_path, capsys):
    arguments = flags(world, tmp_path / "runs", "--config.metric=objective/scores", "--config.num_seeds=1")
    error = call_script(compare, CompareExperiment, arguments, capsys).error()
    assert "config.metric: got 'objective/scores'" in error
    assert "objective/score," in error


def test_a_folder_with_something_else_is_refused(world, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("keep me")
    assert "stages.json" in call_script(compare, CompareExperiment, flags(world, tmp_path), capsys).error()
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_dry_run_says_what_each_variant_costs(world, tmp_path, capsys):
    outcome = call_script(compare, CompareExperiment, [*flags(world, tmp_path / "runs"), "--dry_run"], capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("peak_mb") == 2
    assert "slow:" in outcome.out
    assert not (tmp_path / "runs").exists()


def test_the_anchor_brings_model_prompts_reward_and_critic(world, tmp_path, capsys, monkeypatch):
    prepared = []

    def noted(settings):
        prepared.append(settings)
        return {}

    monkeypatch.setattr(train_ppo, "dry_run", noted)
    config = world.root / "compare.py"
    config.write_text(CONFIG)
    variants = "own: critic={task}/critic; other: ppo.lr=1e-3"
    arguments = [f"--config={config}", "--config.task=set_fraction", f"--config.variants={variants}", "--dry_run"]
    assert call_script(compare, CompareExperiment, arguments, capsys).status == 0
    own, other = prepared
    folder = own.model.removesuffix("/model")
    assert (own.critic, other.critic) == (f"{folder}/critic", "")
    assert own.prompts == other.prompts == f"{folder}/prompts.jsonl"
    assert own.reward == other.reward == "jax:experiments.anchor:set_fraction"


def test_seeds_share_their_programs(world, tmp_path, capsys, compiled):
    """The second seed compiles none of the large ones, and what the first has compiled tells its memory."""
    arguments = flags(world, tmp_path / "runs", "--config.variants=")
    assert call_script(compare, CompareExperiment, arguments, capsys).status == 0
    assert compiled.count("iterate") == 1
    assert compiled.count("measure") == 1


@pytest.fixture
def compiled(caplog):
    """Names of the jitted functions that were compiled."""

    class Names(list):
        def count(self, name):
            return sum(f"XLA compilation of jit({name}) " in record.message for record in caplog.records)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        yield Names()
