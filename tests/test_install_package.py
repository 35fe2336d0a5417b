"""scripts/install_package.sh, with stand-ins for what it finds and calls."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "install_package.sh"
APT_GET = '#!/bin/sh\necho "apt-get $*" >>"$CALLS"\n'
SUDO = '#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n'


@pytest.fixture
def machine(tmp_path):
    """Runs the script where these programs exist and no others; gives status, calls of apt-get, standard error."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mktemp", "rm", "tail", "env"):
        (folder / name).symlink_to(shutil.which(name))

    def run(user: int = 0, **programs: str) -> tuple[int, list[str], str]:
        for name, text in {"id": f"#!/bin/sh\necho {user}\n", **programs}.items():
            path = folder / name.replace("_", "-")
            path.write_text(text)
            path.chmod(0o755)
        calls = tmp_path / "calls"
        browsers = ("chromium", "chromium-browser", "google-chrome")
        command = [shutil.which("bash"), str(SCRIPT), "chromium", "350", *browsers]
        environment = {"PATH": str(folder), "CALLS": str(calls), "TMPDIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == ""
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return run


INSTALLS = ["apt-get update", "apt-get install --yes --no-install-recommends chromium"]


@pytest.mark.parametrize("name", ["chromium", "chromium_browser", "google_chrome"])
def test_nothing_happens_when_a_browser_is_there(machine, name):
    assert machine(apt_get=APT_GET, **{name: "#!/bin/sh\n"}) == (0, [], "")


def test_a_stub_that_does_not_run_is_no_browser(machine):
    assert machine(apt_get=APT_GET, chromium_browser="#!/bin/sh\nexit 1\n")[:2] == (0, INSTALLS)


def test_root_installs_it(machine):
    status, calls, told = machine(apt_get=APT_GET)
    assert (status, calls) == (0, INSTALLS)
    assert told == "install_package: installing chromium, 350 MB\n"


def test_so_does_sudo_without_a_password(machine):
    assert machine(user=1000, apt_get=APT_GET, sudo=SUDO, true="#!/bin/sh\n")[:2] == (0, INSTALLS)


@pytest.mark.parametrize(
    ("user", "programs", "told"),
    [
        (0, {}, "no apt-get to install it with; install it by hand"),
        (1000, {"apt_get": APT_GET}, "no right to install it; run: sudo apt-get install chromium"),
        (1000, {"apt_get": APT_GET, "sudo": "#!/bin/sh\nexit 1\n"}, "run: sudo apt-get install chromium"),
    ],
)
def test_what_it_may_not_do_it_says(machine, user, programs, told):
    status, calls, error = machine(user, **programs)
    assert (status, calls) == (1, [])
    assert told in error


def test_what_apt_get_said_is_shown_when_it_fails(machine):
    status, _, error = machine(apt_get="#!/bin/sh\necho E: no network\nexit 100\n")
    assert status == 1
    assert "E: no network" in error
    assert "apt-get could not install chromium" in error
