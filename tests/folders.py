"""Tiny Hugging Face folders, prompts and rewards for the tests of the host side: everything that a run starts from."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl.testing import flagsaver
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments import cli, train_ppo
from experiments.settings import PPOExperiment
from ppo_jax import hub
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.metrics import read_jsonl
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.types import TrainState

ROOT = Path(__file__).parents[1]

GOOD = ("good", "fine", "great", "kind")
BAD = ("bad", "dull", "poor", "rude")
WORDS = (*GOOD, *BAD, "the", "a", "cat", "dog", "old", "film", "was", "is", "and", "very", "sat", "here", ".", ",")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}bot :{% endif %}"
)

# Rewards as a user writes them, in a file of its own. `count_good` and `score_good` judge alike.
REWARDS = """
import time

import jax.numpy as jnp

GOOD = ("good", "fine", "great", "kind")


def count_good(prompts, completions, **columns):
    return [sum(word in GOOD for word in text.split()) / 4 for text in completions]


def score_good(tokenizer):
    ids = jnp.array([tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in GOOD])

    def score(rollout):
        good = jnp.isin(rollout.response_tokens, ids) & rollout.response_mask
        return jnp.sum(good, axis=1) / 4.0

    return score


def nan_at_dog(prompts, completions, **columns):
    return [float("nan") if "dog" in prompt else 0.0 for prompt in prompts]


def too_few(prompts, completions, **columns):
    return [0.0] * (len(prompts) - 1)


def raises(prompts, completions, **columns):
    raise RuntimeError("the judge\\nis asleep")


def score_nan(tokenizer):
    return lambda rollout: jnp.where(rollout.tokens[:, 0] >= 0, jnp.nan, 0.0)
"""


def word_tokenizer(
    words: Iterable[str] = WORDS, special: dict[str, str] | None = None, bos: bool = True
) -> PreTrainedTokenizerFast:
    """One token a word, with Llama's conventions: a space belongs to the word after it, `<s>` stands in front.

    Args:
        words: the vocabulary, beside the special tokens.
        special: which special tokens it has (default: pad, bos, eos, unk); the ids of all four exist in any case.
        bos: whether `<s>` is put in front of a text.
    """
    special = SPECIAL if special is None else special
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *("▁" + word for word in words)])}
    # Without an unknown token in the model itself an unknown word would vanish; that is a case of its own.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def llama_config(vocab_size: int, **changes: Any) -> ModelConfig:
    """A Llama of one layer and width 16."""
    fields = dict(vocab_size=vocab_size, num_layers=1, num_heads=2, width=16, mlp_width=32, max_positions=32)
    return ModelConfig(**(fields | changes))


def gpt2_config(vocab_size: int, **changes: Any) -> ModelConfig:
    """A GPT-2 of one layer and width 16."""
    family = dict(
        positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    return llama_config(vocab_size, **(family | changes))


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Random parameters of a `Decoder`, without compiling anything."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, jnp.ones((1, 2), bool))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
    )


def make_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    config: ModelConfig | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> Path:
    """A Hugging Face folder with a random model and its tokenizer; see `llama_config`, `word_tokenizer`."""
    tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    config = llama_config(len(tokenizer)) if config is None else config
    return hub.save(folder, random_params(config, seed), config, tokenizer, eos_ids=eos_ids)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows(num: int = 20) -> list[dict[str, Any]]:
    """Distinct prompts of 2 to 5 words, with a column of their number."""
    subjects, verbs = ("the cat", "the dog", "a film", "the old cat", "the very old dog"), ("was", "is", "sat", "here")
    return [{"prompt": f"{subjects[i % 5]} {verbs[i // 5 % 4]}", "number": i} for i in range(num)]


class Outcome(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a refused input: exit status 1, nothing but this line on stderr, no traceback anywhere."""
        assert self.status == 1, (self.status, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.out + self.err
        return lines[0]


def call_script(script: Any, kind: type, arguments: Sequence[str], capsys: Any) -> Outcome:
    """Runs a script of `experiments/` within this process, as its command line would.

    Flags and the module path are global and are put back as they were; so is the precision, which `launch` sets.
    """
    capsys.readouterr()
    app.define_help_flags()  # once a process, so before the flags are noted down
    sys.modules.pop("config_config", None)  # where ml_collections keeps the file of the last start, and would add to it
    saved, precision = flagsaver.save_flag_values(), jax.config.jax_default_matmul_precision
    argv, path = sys.argv, list(sys.path)
    sys.argv, status = [f"{script.__name__}.py", *map(str, arguments)], 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)  # ml_collections
            cli.launch(kind, script.main, script.dry_run)
    except SystemExit as ending:
        status = ending.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
        flagsaver.restore_flag_values(saved)
        jax.config.update("jax_default_matmul_precision", precision)
    return Outcome(status, *capsys.readouterr())


def start_script(name: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen:
    """Starts a script of `experiments/` as a process of its own, as a user does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NPROC": "2"} | options.pop("env", {})
    command = [sys.executable, str(ROOT / "experiments" / name), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def run_script(name: str, arguments: Sequence[str], **options: Any) -> Outcome:
    """Runs a script to its end."""
    process = start_script(name, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


class World(NamedTuple):
    """A folder with everything that a PPO run needs."""

    root: Path
    model: Path
    prompts: Path
    rewards: Path

    def flags(self, *changes: str, reward: str = "count_good") -> list[str]:
        """Flags of `train_ppo.py` for a run of seconds; the last of two flags for the same field counts."""
        in_program = "jax:" if reward.startswith("score_") else ""
        fields = {
            "model": self.model, "prompts": self.prompts, "reward": f"{in_program}{self.rewards}:{reward}",
            "num_iterations": 4, "checkpoint_every": 2, "samples_every": 2, "num_samples": 2, "eval_prompts": 8,
            "mesh.data": 1, "kl_limit": 0.0, "long_prompts": "drop", "ppo.batch_size": 8, "ppo.prompt_length": 8,
            "ppo.response_length": 6, "ppo.num_epochs": 2, "ppo.num_minibatches": 2, "ppo.lr": 0.01,
            "ppo.kl_coef": 0.01, "ppo.score_scale": "none",
        }  # fmt: skip
        config = ROOT / "experiments" / "configs" / "ppo_sentiment.py"
        return [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items()), *changes]


def make_world(root: Path) -> World:
    """Model, prompts (one of them too long) and rewards."""
    rows = [*prompt_rows(), {"prompt": "the very old dog and the very old cat sat here", "number": -1}]
    (root / "rewards.py").write_text(REWARDS)
    model, prompts = make_folder(root / "model"), write_jsonl(root / "prompts.jsonl", rows)
    return World(root, model, prompts, root / "rewards.py")


def remember_programs(prepare: Any) -> Any:
    """`train_ppo.prepare` or `train_sft.prepare` that compiles each program once for all runs of a test module.

    All else is made anew. A program depends on what is closed over, which is the key here; the processes of
    test_resume.py and the tests of the train steps compile their own.
    """
    known: dict[Any, Any] = {}

    def prepared(settings: Any) -> Any:
        setup = prepare(settings)
        if hasattr(setup, "sampling"):
            rate = settings.ppo.lr_schedule == "constant" or settings.num_iterations
            trained = (settings.lora, settings.frozen_layers, settings.critic, settings.param_dtype)
            key = (setup.model, setup.sampling, settings.ppo, settings.mesh, trained, rate)
        else:
            rate = settings.lr_schedule == "constant" or settings.num_steps
            key = (setup.model, settings.mesh, settings.lr, settings.warmup_steps, settings.weight_decay, rate)
            key += (settings.accumulation, settings.max_grad_norm)
        programs = {}
        for name, program in setup.step._asdict().items():
            of_score = settings.reward if name in ("score", "iterate") else ""
            programs[name] = program and known.setdefault((key, name, of_score), program)
        return setup._replace(step=type(setup.step)(**programs))

    return prepared


def saved_state(workdir: Path) -> TrainState:
    """The newest train state of a PPO run."""
    checkpoints = Checkpointer(workdir / "checkpoints")
    state = checkpoints.restore(train_ppo.prepare(settings_of(workdir)).state)
    checkpoints.close()
    return state


def settings_of(workdir: Path) -> PPOExperiment:
    """The settings of a PPO run."""
    settings = json.loads((workdir / "config.json").read_text())
    nested = {name: type(getattr(PPOExperiment(), name))(**x) for name, x in settings.items() if isinstance(x, dict)}
    return PPOExperiment(**settings | nested)


def bits(state: TrainState) -> dict[str, tuple[str, bytes]]:
    """Every leaf of a train state by its path: dtype and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(key=jax.random.key_data(state.key)))
    return {jax.tree_util.keystr(path): (str(x.dtype), np.asarray(x).tobytes()) for path, x in leaves}


def without_time(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, less what the clock said."""
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in read_jsonl(path)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes; but for its lock, which tells of the last process there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
