"""What every test runs under: no network, 8 virtual CPU devices, strict JAX, random inputs that are new in each run.

A failing test prints the seed of its run; `pytest --seed N` (or PPO_JAX_TEST_SEED=N) draws the same inputs again.
"""

import importlib.util
import os
import secrets
import shutil
import zlib
from pathlib import Path

# In the environment, before anything imports jax or huggingface_hub, and for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# LLVM's, not XLA's: most of a test's time is compilation. In all processes, whose bits are compared.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The scripts keep what they compile in the user's folder, which is none of a test's business.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

import jax
import numpy as np
import pytest

# Here and not in the environment: a process that a test starts sees one device and the defaults, as a user's does.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

SEED_VARIABLE = "PPO_JAX_TEST_SEED"
TORCH_IS_MISSING = importlib.util.find_spec("torch") is None

# As the Makefile looks for it.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_IS_MISSING = CHROMIUM is None or importlib.util.find_spec("playwright") is None

# `pytest` alone runs what can run; the header says what was left out.
collect_ignore = ["parity"] * TORCH_IS_MISSING + ["browser"] * BROWSER_IS_MISSING


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="draw the random inputs of the run with this seed")
    parser.addoption("--soak", action="store_true", help="ten times as many attempts in the tests that count them")


def pytest_configure(config):
    seed = config.getoption("--seed")
    if seed is not None:
        os.environ[SEED_VARIABLE] = str(seed)
    # Kept in the environment: the workers of pytest-xdist inherit it, so that one number reproduces the run.
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbits(31)))


def pytest_report_header():
    lines = [f"inputs: --seed {os.environ[SEED_VARIABLE]}", f"jax {jax.__version__} on {os.environ['JAX_PLATFORMS']}"]
    lines += ["tests/parity: not collected, needs torch (make test-parity)"] * TORCH_IS_MISSING
    return lines + ["tests/browser: not collected, needs chromium (make test-browser)"] * BROWSER_IS_MISSING


def pytest_collection_modifyitems(items):
    parity = Path(__file__).parent / "parity"
    for item in items:
        if item.path.is_relative_to(parity):
            item.add_marker(pytest.mark.parity)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("random inputs", f"pytest {item.nodeid!r} --seed {os.environ[SEED_VARIABLE]}"))
    return report


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU (and JAX_PLATFORMS=cuda,cpu)")


@pytest.fixture
def times(request) -> int:
    """How often a test that counts its attempts repeats them."""
    return 10 if request.config.getoption("--soak") else 1


@pytest.fixture
def seed(request) -> int:
    """A number of 32 bits that differs by test and by run, and that `--seed` brings back."""
    return zlib.crc32(f"{os.environ[SEED_VARIABLE]} {request.node.nodeid}".encode())


@pytest.fixture
def rng(seed) -> np.random.Generator:
    """NumPy random numbers, new in each run."""
    return np.random.default_rng(seed)


@pytest.fixture
def key(seed) -> jax.Array:
    """A typed JAX key, new in each run."""
    return jax.random.key(seed)


@pytest.fixture(scope="module")
def empty_caches() -> None:
    """For modules that count a function's compiled programs (`_cache_size`): JAX keeps at most 8,192 of all functions
    together, and has none of a function that comes after those of a long run of tests.
    """
    jax.clear_caches()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; tests/browser is not collected without one."""
    assert CHROMIUM is not None
    return CHROMIUM


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data that is kept beside the repository (or in PPO_JAX_SHARED)."""
    folder = Path(os.environ.get("PPO_JAX_SHARED", Path(__file__).parents[2] / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the models and data of {folder}, which is not there (PPO_JAX_SHARED names another place)")
    return folder
