"""scripts/setup.sh, with a stand-in for uv that notes how it was called; and what conftest promises to every test."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ppo_jax

ROOT = Path(__file__).parents[1]

# Makes an environment as `uv venv` does, as far as the script looks at it: a python that runs.
FAKE_UV = """#!/bin/sh
[ "$1" = --version ] && exit 0
echo "${UV_DEFAULT_INDEX:-} $*" >>"$CALLS"
case $1 in
venv) for last; do :; done; mkdir -p "$last/bin" && ln -sf "$REAL_PYTHON" "$last/bin/python" ;;
pip) [ -z "${UV_FAILS:-}" ] ;;
esac
"""


class Checkout:
    """A copy of the script and of pyproject.toml, on a PATH with the system's tools and the given programs only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.bin.mkdir()
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.program("uv", FAKE_UV)

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def setup(self, *extras: str, **variables: str) -> tuple[int, list[str], str]:
        """(exit status, how uv was called, standard error)."""
        self.calls.unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "PIP_CONFIG_FILE": os.devnull,
            "CALLS": str(self.calls),
            "REAL_PYTHON": sys.executable,
            "PYTHON": sys.executable,
            "ACCELERATOR": "cpu",
        }
        script = [shutil.which("bash") or "bash", "scripts/setup.sh", *extras]
        done = subprocess.run(script, cwd=self.folder, env=environment | variables, capture_output=True, text=True)
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done.returncode, [call.strip() for call in calls], done.stderr


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def install(extras: str) -> str:
    return f"pip install --python .venv/bin/python --resolution highest --editable .{extras}"


def test_installs_once_and_then_only_what_is_new(checkout):
    status, (venv, pip), _ = checkout.setup("test")
    assert status == 0
    assert venv == f"venv --quiet --clear --no-project --python {sys.executable} .venv"
    assert pip == install("[test]")
    assert checkout.setup("test")[:2] == (0, [])
    assert checkout.setup()[:2] == (0, [])
    assert checkout.setup("dev")[:2] == (0, [install("[dev,test]")])
    assert checkout.setup("test", "dev")[:2] == (0, [])


def test_another_pyproject_installs_again_in_the_same_environment(checkout):
    assert checkout.setup()[1][1:] == [install("")]
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert checkout.setup()[:2] == (0, [install("")])


def test_another_resolution_makes_the_environment_anew(checkout):
    checkout.setup("test")
    _, (venv, pip), _ = checkout.setup(RESOLUTION="lowest-direct")
    assert venv.startswith("venv")
    assert pip == install("").replace("highest", "lowest-direct")


def test_a_failed_installation_is_tried_again(checkout):
    status, calls, _ = checkout.setup(UV_FAILS="yes")
    assert (status, len(calls)) == (1, 2)
    assert checkout.setup()[:2] == (0, [install("")])
    checkout.setup("test", UV_FAILS="yes")
    assert checkout.setup()[:2] == (0, [install("[test]")])


def test_an_environment_made_by_hand_is_installed_into(checkout):
    (checkout.folder / ".venv" / "bin").mkdir(parents=True)
    (checkout.folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert checkout.setup("test", PYTHON="")[:2] == (0, [install("[test]")])


def test_an_environment_that_no_longer_runs_is_made_anew(checkout):
    checkout.setup("test")
    (checkout.folder / ".venv" / "bin" / "python").unlink()
    (checkout.folder / ".venv" / "bin" / "python").symlink_to("/gone/python")
    venv, pip = checkout.setup()[1]
    assert venv.startswith("venv")
    assert pip == install("")


def test_a_gpu_adds_cuda_and_says_so(checkout):
    checkout.program("nvidia-smi", "#!/bin/sh\n")
    _, calls, errors = checkout.setup("test", ACCELERATOR="")
    assert calls[-1] == install("[test,cuda12]")
    assert "NVIDIA GPU found: adding the cuda12 extra" in errors
    (checkout.bin / "nvidia-smi").unlink()
    assert checkout.setup("test", ACCELERATOR="")[:2] == (
        0,
        [],
    )  # what is installed stays where the GPU is out of sight


def test_another_accelerator_makes_the_environment_anew(checkout):
    checkout.setup("test", ACCELERATOR="cpu")
    assert checkout.setup(ACCELERATOR="cuda13")[1] == [install("[test,cuda13]")]
    venv, pip = checkout.setup("test", ACCELERATOR="cuda12")[1]
    assert venv.startswith("venv")
    assert pip == install("[test,cuda12]")


def test_a_driver_without_a_gpu_adds_nothing(checkout):
    checkout.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert checkout.setup(ACCELERATOR="")[1][-1] == install("")


def test_the_package_index_of_pip_is_passed_on(checkout):
    index = "https://pypi.example.com/simple"
    assert checkout.setup(PIP_INDEX_URL=index)[1][-1] == f"{index} {install('')}"
    settings = checkout.folder / ".config" / "pip"  # of the home directory, which the fixture moves
    settings.mkdir(parents=True)
    (settings / "pip.conf").write_text("[global]\nindex-url = https://conf.example.com/simple\n")
    expected = f"https://conf.example.com/simple {install('[test]')}"
    assert checkout.setup("test", PIP_CONFIG_FILE="")[1][-1] == expected


def test_without_uv_pip_fetches_it(checkout):
    (checkout.bin / "uv").unlink()
    fake_pip = f"""#!/bin/sh
    [ "$1 $2" = "-m pip" ] || exec {sys.executable} "$@"
    [ "$3" = install ] || exit 1
    for last; do [ "$last" = .cache/uv ] && mkdir -p .cache/uv/bin && cp uv .cache/uv/bin/; done
    exit 0
    """
    checkout.program("python-with-pip", fake_pip)
    (checkout.folder / "uv").write_text(FAKE_UV)
    (checkout.folder / "uv").chmod(0o755)
    status, calls, errors = checkout.setup(PYTHON="python-with-pip")
    assert (status, calls[-1]) == (0, install(""))
    assert "fetching uv into .cache/uv" in errors


def test_takes_the_newest_python_that_runs(checkout):
    checkout.program("python3.13", "#!/bin/sh\nexit 127\n")  # a version manager's shim for a version that is not there
    checkout.program("python3.12", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    status, calls, _ = checkout.setup(PYTHON="")
    assert status == 0
    assert f"--python {sys.executable}" in calls[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not a working Python 3.11 or newer"),
        ({"ACCELERATOR": "cuda11"}, "ACCELERATOR=cuda11 is none of cpu, cuda12, cuda13, tpu"),
    ],
)
def test_refuses(checkout, variables, message):
    assert checkout.setup(**variables) == (1, [], f"setup: {message}\n")


def test_refuses_a_machine_without_a_new_enough_python(checkout):
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        checkout.program(name, "#!/bin/sh\nexit 1\n")
    message = "setup: no Python 3.11 or newer on PATH; name one with PYTHON=/path/to/python\n"
    assert checkout.setup(PYTHON="") == (1, [], message)


# What conftest and pyproject.toml promise.


def test_jax_is_strict_and_has_eight_devices():
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    key = jax.random.key(0)
    jax.random.bits(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.bits(key)


def test_random_inputs_come_back_with_the_seed(seed, rng, key):
    assert 0 <= seed < 2**32
    assert rng.integers(2**32) != seed
    assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_the_version_is_in_one_place():
    assert metadata.version("ppo_jax") == ppo_jax.__version__


def test_jax_and_flax_are_a_pair():
    # flax 0.12.8 is for jax 0.10, flax 0.12.12 for jax 0.11.1 and newer.
    old_jax, old_flax = (
        tuple(int(part) for part in metadata.version(name).split(".")[:3]) < bound
        for name, bound in (("jax", (0, 11, 1)), ("flax", (0, 12, 12)))
    )
    assert old_jax == old_flax


def test_every_extra_that_the_makefile_and_the_script_name_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\$\(SETUP\) (\w+)", (ROOT / "Makefile").read_text())) | {"cuda12", "cuda13", "tpu"}
    assert named <= set(extras)
