"""The house rules that a machine can hold: floors, fences, file lengths, docstrings. Sources are read, not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# A module, or a sub-package with everything in it, imports from lower floors only. Between two of the same floor there
# is no import, other than inside a sub-package and the pairs below.
FLOORS = {
    # words and arithmetic
    "errors": 0,
    "types": 0,
    "numerics": 0,
    "guard": 0,
    # the mathematics of the papers
    "advantages": 1,
    "losses": 1,
    "kl": 1,
    "shaping": 1,
    "optim": 1,
    # networks, and where arrays live
    "models": 1,
    "hub": 1,
    "sharding": 1,
    # host data
    "tokenizers": 1,
    "data": 1,
    "examples": 1,
    "preferences": 1,
    "comparisons": 1,
    # code that nobody has read
    "sandbox": 1,
    # acting and judging
    "config": 2,
    "sampling": 2,
    "policy": 2,
    "rewards": 2,
    "envs": 2,
    # training programs
    "experience": 3,
    "update": 3,
    "ppo": 3,
    "sft": 3,
    "dpo": 3,
    "reward_model": 3,
    "control": 3,
    # the outside world
    "lock": 4,
    "manifest": 4,
    "checkpoint": 4,
    "metrics": 4,
    "fingerprints": 4,
    "recorded": 4,
    "runs": 4,
    "plots": 4,
    "evaluation": 4,
    "feedback": 4,
    "planning": 4,
}
SAME_FLOOR_PAIRS = {
    ("guard", "types"),  # it looks at an experience, field by field
    ("policy", "config"),  # how many responses, of what length
    ("policy", "sampling"),  # the policy is a distribution over tokens
    ("update", "experience"),  # the parts of PPO, in the order in which they run
    ("ppo", "experience"),
    ("ppo", "update"),
    ("control", "update"),  # the same passes and the same terms of the loss
    ("update", "sft"),  # an auxiliary loss on texts
    ("dpo", "sft"),  # log-probabilities of texts
    ("hub", "models"),  # a Hugging Face folder is read into a ModelConfig and parameters
    ("data", "tokenizers"),  # a prompt is text until it is encoded
    ("examples", "tokenizers"),  # so is what is learned
    ("examples", "data"),  # it comes in rows
    ("comparisons", "data"),  # judged texts are padded
    ("comparisons", "preferences"),  # and read
    ("comparisons", "tokenizers"),  # and encoded
    ("preferences", "data"),  # judgements are rows
    ("plots", "evaluation"),  # a bar of uncertainty is an interval
    ("plots", "metrics"),  # the curves of what was logged
    ("runs", "metrics"),  # files are written whole or not at all
    ("recorded", "fingerprints"),  # what was asked, as a digest
    ("recorded", "metrics"),  # lines that survive a kill
    ("runs", "fingerprints"),  # files that a run began with
    ("runs", "lock"),  # one process a folder
    ("runs", "checkpoint"),  # a run goes on from its newest checkpoint
    ("manifest", "metrics"),  # names are forced to the disk
    ("checkpoint", "manifest"),  # a step is a folder that is whole
    ("feedback", "metrics"),  # files are written whole or not at all
}

# What may import a package from outside ours; a name that is missing here may be imported anywhere.
FENCES = {
    "flax.linen": {"models"},
    "orbax": {"checkpoint"},
    "absl": set(),
    "ml_collections": set(),
    "experiments": set(),
}

# Below the fourth floor nothing reads files or clocks, except where files are the subject.
READERS = {"hub", "data", "tokenizers", "sandbox"}
CLOCKS = {"time", "datetime"}
TIMERS = {"sandbox"}  # which ends what takes too long

# Nothing from outside is run: no pickles, no text as code, nobody's remote code. Only the sandbox's guest may.
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
GUEST = "ppo_jax.sandbox.guest"
FILE_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
ARRAY_FILE_METHODS = {"load", "save", "savez", "loadtxt", "savetxt", "fromfile", "memmap"}

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def imported(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `module` imports, also inside functions; relative names made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def unit(dotted: str) -> str:
    """The row of FLOORS that a module belongs to: ppo_jax.models.config -> models."""
    return dotted.partition(".")[2].partition(".")[0]


def is_inside(name: str, package: str) -> bool:
    """Whether a dotted name is the package or something in it."""
    return name == package or name.startswith(package + ".")


def floor_problems(here: str, imports: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Imports that do not go down."""
    for line, name in imports:
        there = unit(name)
        if not is_inside(name, "ppo_jax") or there in ("__version__", here):
            continue
        if there not in FLOORS:
            yield line, f"imports {name}, which has no row in FLOORS"
        elif FLOORS[there] >= FLOORS[here] and (here, there) not in SAME_FLOOR_PAIRS:
            yield line, f"floor {FLOORS[here]} imports {name} of floor {FLOORS[there]}"


def fence_problems(here: str, imports: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Imports of packages that are kept to one place."""
    for line, name in imports:
        for package, allowed in FENCES.items():
            if is_inside(name, package) and here not in allowed:
                yield line, f"imports {package}, which only {sorted(allowed) or 'experiments/'} may"
        if FLOORS[here] < 4 and here not in TIMERS and name.split(".")[0] in CLOCKS:
            yield line, f"reads the clock ({name}) below floor 4"


def file_problems(here: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that open files, below the fourth floor."""
    if FLOORS[here] >= 4 or here in READERS:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name("open"):
                yield node.lineno, "opens a file below floor 4"
            case ast.Attribute(attr=method) if method in FILE_METHODS:
                yield node.lineno, f"opens a file (.{method}) below floor 4"
            case ast.Attribute(ast.Name("np" | "jnp" | "numpy"), method) if method in ARRAY_FILE_METHODS:
                yield node.lineno, f"opens a file (np.{method}) below floor 4"


def code_problems(module: str, tree: ast.Module, imports: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Where something from outside could be run."""
    for line, name in imports:
        if name.split(".")[0] in UNPICKLERS:
            yield line, f"imports {name}, which runs what it reads"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in RUNS_CODE and module != GUEST:
            yield node.lineno, f"names {node.id}, which runs text as code"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            if not off:
                yield node.value.lineno, f"sets {node.arg}"


def docstring_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The module, its public functions and its public classes, where they say nothing."""
    if not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for node in tree.body:
        public = isinstance(node, DEFINITIONS) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def problems(module: str, source: str) -> list[str]:
    """Everything wrong with one file of ppo_jax, as `module:line: what`."""
    tree = ast.parse(source)
    found = list(docstring_problems(tree))
    here = unit(module)
    imports = list(imported(tree, module))
    if module == "ppo_jax":
        # An environment variable must stand before the first import of what reads it; nothing else is at home here.
        told = "ppo_jax/__init__.py imports {}: it holds the version only"
        found += [(line, told.format(name)) for line, name in imports if name != "os"]
    elif here not in FLOORS:
        found.append((1, "has no row in FLOORS"))
    else:
        found += [*floor_problems(here, imports), *fence_problems(here, imports), *file_problems(here, tree)]
    found += code_problems(module, tree, imports)
    return [f"{module}:{line}: {what}" for line, what in found]


def module_name(path: Path) -> str:
    """ppo_jax/models/__init__.py -> ppo_jax.models.__init__ (relative imports count from it); ppo_jax at the top."""
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return "ppo_jax" if dotted == "ppo_jax.__init__" else dotted


def lines(path: Path) -> int:
    """How many lines a file has."""
    return len(path.read_text().splitlines())


PACKAGE = sorted((ROOT / "ppo_jax").rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_floors_fences_and_docstrings(path):
    assert not problems(module_name(path), path.read_text())


def test_files_fit_on_a_few_screens():
    too_long = {str(path.relative_to(ROOT)): n for path in PACKAGE + SCRIPTS if (n := lines(path)) > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines"


# The checker itself, on sources that break one rule each.


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("types", "from ppo_jax.losses import x", "floor 0 imports ppo_jax.losses.x of floor 1"),
        ("types", "from ppo_jax import numerics", "floor 0 imports ppo_jax.numerics of floor 0"),
        ("ppo", "import ppo_jax.checkpoint", "floor 3 imports ppo_jax.checkpoint of floor 4"),
        ("ppo", "from .sft import x", "floor 3 imports ppo_jax.sft.x of floor 3"),
        ("ppo", "from . import metrics", "floor 3 imports ppo_jax.metrics of floor 4"),
        ("ppo", "from ppo_jax import elsewhere", "imports ppo_jax.elsewhere, which has no row in FLOORS"),
        ("models.heads", "from ..hub import x", "floor 1 imports ppo_jax.hub.x of floor 1"),
        ("models.heads", "from ..ppo.inner import x", "floor 1 imports ppo_jax.ppo.inner.x of floor 3"),
        ("kl", "def f():\n    'Lazy.'\n    import ppo_jax.ppo", "floor 1 imports ppo_jax.ppo of floor 3"),
        ("elsewhere", "import jax", "has no row in FLOORS"),
        ("ppo", "import flax.linen as nn", "imports flax.linen, which only ['models'] may"),
        ("ppo", "from flax import linen", "imports flax.linen, which only ['models'] may"),
        ("ppo", "from flax.linen import Dense", "imports flax.linen, which only ['models'] may"),
        ("metrics.jsonl", "import orbax.checkpoint", "imports orbax, which only ['checkpoint'] may"),
        ("planning", "from absl import flags", "imports absl, which only experiments/ may"),
        ("planning", "import ml_collections", "imports ml_collections, which only experiments/ may"),
        ("planning", "from experiments.rlhf import main", "imports experiments, which only experiments/ may"),
        ("sampling", "import time", "reads the clock (time) below floor 4"),
        ("sampling", "from datetime import datetime", "reads the clock (datetime.datetime) below floor 4"),
        ("rewards.host", "open('x')", "opens a file below floor 4"),
        ("rewards.host", "Path('x').read_text()", "opens a file (.read_text) below floor 4"),
        ("rewards.host", "np.load('x')", "opens a file (np.load) below floor 4"),
        ("metrics.jsonl", "import pickle", "imports pickle, which runs what it reads"),
        ("hub.load", "x = eval('1')", "names eval, which runs text as code"),
        ("sandbox.host", "run = exec", "names exec, which runs text as code"),
        ("hub.load", "load('x', trust_remote_code=True)", "sets trust_remote_code"),
        ("hub.load", "np.load('x', allow_pickle=ALLOWED)", "sets allow_pickle"),
        ("kl", "def k1(): ...", "k1 has no docstring"),
        ("kl", "class K1: ...", "K1 has no docstring"),
    ],
)
def test_the_checker_finds(module, line, expected):
    (found,) = problems(f"ppo_jax.{module}", f'"""Says something."""\n{line}\n')
    assert found.endswith(expected)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("losses", "from ppo_jax.numerics import masked_mean"),
        ("losses", "from .numerics import masked_mean"),
        (
            "models.heads",
            "import flax.linen as nn\nfrom ppo_jax.models.config import ModelConfig\nfrom .config import x",
        ),
        ("models.__init__", "from .config import ModelConfig\nfrom ..types import Params"),
        ("hub.load", "from ppo_jax.models import ModelConfig\nopen('config.json')"),
        ("metrics.jsonl", "import time\nfrom ppo_jax import __version__, types\nopen('metrics.jsonl')"),
        ("checkpoint", "import orbax.checkpoint as ocp"),
        ("sandbox.host", "import time\nopen('x')"),
        ("sandbox.guest", "exec('1')"),
        ("hub.load", "load('x', trust_remote_code=False)\nmodel.eval()"),
        ("kl", "from flax import traverse_util\nimport timeit_like\ndef _helper(): ..."),
    ],
)
def test_the_checker_lets_pass(module, line):
    assert problems(f"ppo_jax.{module}", f'"""Says something."""\n{line}\n') == []


def test_the_checker_wants_module_docstrings_and_a_plain_top_level():
    assert problems("ppo_jax.kl", "x = 1") == ["ppo_jax.kl:1: the module has no docstring"]
    (found,) = problems("ppo_jax", '"""PPO."""\nfrom ppo_jax.ppo import collect\n')
    assert found == "ppo_jax:2: ppo_jax/__init__.py imports ppo_jax.ppo.collect: it holds the version only"
