"""Code that nobody has read: it gives values, and it gets nowhere. The attacks are in `attacks.py`."""

import json
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path

import attacks
import pytest

from ppo_jax.errors import InputError
from ppo_jax.rewards import RewardError, call_reward, load_host_reward
from ppo_jax.rewards.code import code, extract_code, same
from ppo_jax.sandbox import Limits, SandboxError, find_python, host, run

QUICK = Limits(wall_s=2.0, cpu_s=1, memory_mb=256)


def isolates() -> bool:
    try:
        return bool(find_python())
    except SandboxError:
        return False


NEEDS_BWRAP = pytest.mark.skipif(not isolates(), reason="needs bubblewrap (Debian: apt-get install bubblewrap)")


# What it gives


@NEEDS_BWRAP
def test_calls_give_their_values():
    source = "def f(a, b=1):\n    return [a + b, (a, b), {a, b}, {'k': a}]"
    calls = [{"args": [2]}, {"args": [2], "kwargs": {"b": 5}}, {"args": ["x"]}, {"kwargs": {"a": 0.5}}]
    result = run(source, "f", calls, QUICK)
    assert result.values == [
        [3, [2, 1], [1, 2], {"k": 2}],
        [7, [2, 5], [2, 5], {"k": 2}],
        None,
        [1.5, [0.5, 1], [0.5, 1], {"k": 0.5}],
    ]
    assert result.returned == [True, True, False, True]
    assert result.ended == ""


@NEEDS_BWRAP
def test_programs_give_what_they_write():
    source = "import sys\nprint('ignored', file=sys.stderr)\nif __name__ == '__main__':\n    print(input()[::-1])"
    result = run(source, "", [{"stdin": "abc\n"}, {"stdin": ""}, {"stdin": "☃é\n"}], QUICK)
    assert result == (["cba\n", None, "é☃\n"], [True, False, True], "")


@NEEDS_BWRAP
@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "exit()", "quit(0)", "raise SystemExit"])
def test_a_program_may_end_itself(end):
    assert run(f"print(1)\n{end}", "", [{"stdin": ""}], QUICK) == (["1\n"], [True], "")


@NEEDS_BWRAP
@pytest.mark.parametrize(
    "program",
    [
        "print(open(0).read()[::-1])",
        "import sys\nprint(sys.stdin.buffer.read().decode()[::-1])",
        "import sys\nsys.stdout.buffer.write(sys.stdin.read()[::-1].encode())",
        "import os\nos.write(1, os.read(0, 99)[::-1])",
        "import subprocess\nsubprocess.run(['/usr/bin/rev'])",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: str\n"
        "print(A(input()[::-1]).x)",
    ],
)
def test_programs_may_read_and_write_as_they_like(program):
    for _ in range(2):
        result = run(program, "", [{"stdin": "abc"}, {"stdin": "de"}], QUICK)
        assert [value.strip() for value in result.values] == ["cba", "ed"], result


@NEEDS_BWRAP
@pytest.mark.parametrize("status", [1, 160, 161, 200, 255])
def test_an_exit_status_is_no_error_of_ours(status):
    """Also where it looks like a signal that there is none of."""
    result = run(f"import os\ndef f(): os._exit({status})", "f", [{}], QUICK)
    assert (result.values, result.returned) == ([], [])
    assert result.ended == f"status {status}"


@NEEDS_BWRAP
@pytest.mark.parametrize("source", ["def g(): pass", "def f(:", "import numpy_of_nobody", "1/0", "\0", ""])
def test_code_that_does_not_load_returns_nothing(source):
    assert run(source, "f", [{}, {}], QUICK) == ([None, None], [False, False], "")


@NEEDS_BWRAP
def test_limits_that_cannot_be_are_refused():
    for name in ("wall_s", "cpu_s", "memory_mb", "processes", "disk_mb", "output_bytes"):
        with pytest.raises(InputError, match=f"sandbox {name}: got 0, expected"):
            Limits(**{name: 0})


COUNTS = {
    "wall_s": (5.0, 0.3, "import time; time.sleep(1)"),
    "cpu_s": (5, 1, "import time\n    while time.process_time() < 1.6: pass"),
    "memory_mb": (512, 96, "x = bytearray(150 << 20)"),
    "processes": (4, 1, "import threading; threading.Thread(target=print).start()"),
    "disk_mb": (16, 1, "open('/tmp/x', 'wb').write(bytes(4 << 20))"),
    "output_bytes": (1 << 16, 100, "return 'x' * 1000"),
}


@NEEDS_BWRAP
@pytest.mark.parametrize("name", COUNTS)
def test_every_limit_counts(name):
    enough, too_little, work = COUNTS[name]
    source = f"def f():\n    {work}\n    return 1"
    assert run(source, "f", [{}], Limits(**{name: enough})).returned == [True]
    assert run(source, "f", [{}], Limits(**{name: too_little})).returned in ([], [False])


# What it does not


@pytest.fixture
def host_world(tmp_path, monkeypatch):
    """Things of ours that an attack may look for; nothing may have come in or changed."""
    tmp_path.chmod(0o777)
    canary, reached = tmp_path / "canary", []
    canary.write_text("secret")
    canary.chmod(0o666)
    monkeypatch.setenv("CANARY", "secret")
    abstract = f"\0canary-{secrets.token_hex(8)}"
    servers = []
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, abstract),
    ):
        server = socket.socket(family)
        server.bind(address)
        server.listen()
        servers.append(server)
    (tmp_path / "s").chmod(0o777)

    def accept(server):
        try:
            server.accept()[0].close()
            reached.append(server)
        except OSError:
            pass

    for server in servers:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    yield {
        "HOME": str(Path.home()),
        "CANARY": str(canary),
        "PORT": servers[0].getsockname()[1],
        "SOCKET": str(tmp_path / "s"),
        "ABSTRACT": abstract,
    }
    assert reached == []
    assert canary.read_text() == "secret"
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for server in servers:
        server.close()


def guests() -> list[str]:
    """Processes of any sandbox that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"/sandbox/guest.py" in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


@NEEDS_BWRAP
@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda attack: attack.__name__)
def test_no_attack_gets_out(host_world, attack):
    source, began = attacks.source_of(attack, host_world), time.monotonic()
    result = run(source, attack.__name__, [{}], QUICK)
    assert time.monotonic() - began < QUICK.wall_s + 1
    assert result.values != [True]
    deadline = time.monotonic() + 1
    while guests():
        assert time.monotonic() < deadline, guests()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name", ["password_file", "list_processes", "our_environment", "find_a_process", "local_server"]
)
def test_the_attacks_are_real(host_world, monkeypatch, name):
    """Outside they find what they look for; those that do no harm."""
    for key, value in host_world.items():
        monkeypatch.setattr(attacks, key, value)
    if name == "local_server":
        monkeypatch.setattr(attacks, "PORT", 1)
        with pytest.raises(OSError, match="refused"):  # there is a network
            attacks.local_server()
    else:
        assert getattr(attacks, name)() is True


def test_there_are_enough_attacks():
    assert len(attacks.ATTACKS) + len(HACKS) >= 40


HACKS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit(255)": "import os\ndef double(x): os._exit(255)",
    "always equal": """
class Yes:
    def __eq__(self, other): return True
    def __hash__(self): return 0
def double(x): return Yes()
""",
    "an integer that is always equal": """
class Yes(int):
    def __eq__(self, other): return True
def double(x): return Yes(0)
""",
    "patched json": """
import json
json.dumps = lambda x, **k: '{"value": true}'
def double(x): return 1
""",
    "patched builtins": """
import builtins
builtins.AssertionError = None
builtins.all = lambda x: True
def double(x): return 1
""",
    "passed": "print('all tests passed')\nprint('1 passed in 0.01s')\ndef double(x): return 'passed'",
    "reads the task": """
import json
task = json.load(open('/sandbox/task.json'))
def double(x):
    return task['calls'][0].get('expected', 'expected' in str(task['calls']))
""",
    "forged lines": """
import os
for descriptor in range(3, 20):
    try: os.write(descriptor, b'{"value": true}\\n' * 9)
    except OSError: pass
def double(x): return 1
""",
    "true for all": "def double(x): return True",
    "frames": """
import sys
def double(x):
    frame = sys._getframe()
    while frame:
        frame.f_locals.update(value=4, expected=0, passed=9)
        frame = frame.f_back
    return 0
""",
}


@NEEDS_BWRAP
@pytest.mark.parametrize("name", HACKS)
def test_a_reward_is_not_to_be_had_without_the_work(name):
    tests = [{"args": [x], "expected": 2 * x} for x in (3, 8, 21)]
    assert code([""], [HACKS[name]], tests=[tests], entry_point=["double"]) == [0.0]


# As a reward


DOUBLE = [{"args": [x], "expected": 2 * x} for x in (0, 1, 2, 3)]


@NEEDS_BWRAP
def test_the_share_of_tests_passed():
    reward = load_host_reward("code")
    completions = [
        "def double(x): return 2 * x",
        "Here it is:\n```python\ndef double(x): return 0\n```\nor better\n```\ndef double(x): return x + x\n```",
        "def double(x): return x * x",
        "I do not know.",
    ]
    rows = [{"tests": DOUBLE, "entry_point": "double"}] * 4
    assert call_reward(reward, ["p"] * 4, completions, rows).tolist() == [1.0, 1.0, 0.5, 0.0]


@NEEDS_BWRAP
def test_fields_that_a_table_fills_with_null_are_not_there():
    row = {"tests": [{"args": [2], "kwargs": None, "stdin": None, "expected": None}], "entry_point": "f"}
    assert call_reward(code, ["", ""], ["def f(x): pass", "def f(x): return x"], [row, row]).tolist() == [1.0, 0.0]


@NEEDS_BWRAP
def test_programs_are_judged_by_their_output():
    tests = [{"stdin": "3\n", "stdout": "6"}, {"stdin": "4\n", "stdout": "8\n"}]
    rows = [{"tests": tests, "entry_point": None}, {"tests": tests}]
    completions = ["print(2 * int(input()))", "print(6)"]
    assert call_reward(code, ["", ""], completions, rows).tolist() == [1.0, 0.5]


@NEEDS_BWRAP
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "a column tests is needed"),
        ({"tests": [], "entry_point": "f"}, "tests: got '[]', expected a list of one or more"),
        ({"tests": None, "entry_point": "f"}, "tests: got 'None', expected a list"),
        ({"tests": [{"args": [1]}], "entry_point": "f"}, "expected a function's with ['expected']"),
        ({"tests": [{"args": 1, "expected": 2}], "entry_point": "f"}, "expected a function's"),
        ({"tests": [{"args": [1], "expected": 2}]}, "expected a program's with ['stdin', 'stdout']"),
    ],
)
def test_rows_that_hold_no_tests_are_errors_and_no_scores(row, told):
    with pytest.raises(RewardError) as error:
        call_reward(code, ["p"], ["def f(x): return 2"], [row])
    assert told in str(error.value)


def test_without_isolation_nothing_is_run(monkeypatch, tmp_path):
    find_python.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        for call in (lambda: load_host_reward("code"), lambda: run("def f(): return 1", "f", [{}])):
            with pytest.raises(SandboxError, match=r"got no bwrap on PATH, expected bubblewrap 0.8 .* not run without"):
                call()
    finally:
        find_python.cache_clear()


def test_a_bubblewrap_that_cannot_isolate_is_an_error_and_no_score(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho bwrap: no namespaces here >&2\nexit 1\n")
    bwrap.chmod(0o755)
    tmp_path.chmod(0o755)
    which = shutil.which
    monkeypatch.setattr(
        host.shutil, "which", lambda name, **path: str(bwrap) if name == "bwrap" else which(name, **path)
    )
    find_python.cache_clear()
    try:
        with pytest.raises(SandboxError, match=r"no namespaces here|Permission denied"):
            run("def f(): return 1", "f", [{}])
    finally:
        find_python.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("a\n```py\nx = 1\n```\nb\n```\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("```c++\nint x;\n```", "int x;\n"),
        ("```python  \r\nx = 1\r\n```", "x = 1\r\n"),
    ],
)
def test_code_between_marks(text, expected):
    assert extract_code(text) == expected


@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        (1, 1, True), (1, 1.0, True), (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False), (True, 1, False), (1, True, False),
        (True, True, True), (None, None, True), (None, False, False), ("1", 1, False), ([1, [2]], [1, [2]], True),
        ([1], [1, 2], False), ([], {}, False), ({"a": 1}, {"a": 1.0}, True), ({"a": 1, "b": 2}, {"a": 1}, False),
        (float("nan"), float("nan"), False), (10**30, 10**30 + 1, False), ("é", "é", True), (1.0, 1, True),
        (1e9, 999_999_999, False), (1e15, 10**15 + 7, False), (1e9 + 1e-3, 1e9, True),
    ],
)  # fmt: skip
def test_equal_values(got, expected, equal):
    assert same(json.loads(json.dumps(got)), expected) is equal


@NEEDS_BWRAP
def test_two_at_once_do_not_meet():
    """The same user, but each in its own namespaces: no shared /tmp, no shared count of processes."""
    source = (
        "import os, time\ndef f(i):\n    if os.fork() == 0: time.sleep(0.3); os._exit(0)\n"
        "    open('/tmp/x', 'w').write(str(i))\n    time.sleep(0.2)\n"
        "    return os.listdir('/tmp'), open('/tmp/x').read()"
    )
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append((i, run(source, "f", [{"args": [i]}], QUICK).values)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(i, [[["x"], str(i)]]) for i in range(4)]


def test_the_guest_needs_nothing_but_the_standard_library():
    source = (Path(host.__file__).parent / "guest.py").read_text()
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"builtins", "json", "os", "resource", "sys", "types"}
    assert shutil.which("python3")
