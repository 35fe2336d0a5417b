"""Stages: done once for the same settings and inputs, started anew for others, taken up again after a kill."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import folders
import pytest

from experiments.stages import Stages, identity
from ppo_jax.errors import InputError


class Road:
    """a -> b -> d and a -> c: each stage writes a file, returns a number of its own, and notes that it ran."""

    AFTER = {"a": [], "b": ["a"], "c": ["a"], "d": ["b"]}  # noqa: RUF012

    def __init__(self, workdir: Path):
        self.workdir, self.numbers = workdir, itertools.count(1)

    def walk(self, fail: str = "", **inputs) -> tuple[str, dict[str, dict]]:
        """(names of the stages that ran, all results); the inputs of a stage are 0 where they are not given."""
        ran, stages, results = [], Stages(self.workdir), {}
        for name, after in self.AFTER.items():

            def work(folder: Path, name=name) -> dict:
                ran.append(name)
                folder.mkdir(exist_ok=True)
                (folder / f"{len(os.listdir(folder))}.txt").write_text(name)
                if name == fail:
                    raise KeyboardInterrupt
                return {"number": next(self.numbers)}

            results[name] = stages.run(name, inputs.get(name, 0), after, work)
            assert stages.result(name) == results[name]
        return "".join(ran), results

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.workdir.iterdir() if path.is_dir())


@pytest.fixture
def road(tmp_path):
    return Road(tmp_path / "deep" / "road")


# What runs


def test_all_stages_run_once(road):
    ran, results = road.walk()
    assert ran == "abcd"
    assert road.folders() == ["a", "b", "c", "d"]
    before = folders.contents(road.workdir)
    assert road.walk() == ("", results)
    assert folders.contents(road.workdir) == before


@pytest.mark.parametrize(("changed", "expected"), [("a", "abcd"), ("b", "bd"), ("c", "c"), ("d", "d")])
def test_a_change_runs_a_stage_and_what_depends_on_it(road, changed, expected):
    _, first = road.walk()
    ran, second = road.walk(**{changed: 1})
    assert ran == expected
    assert {name for name in first if first[name] != second[name]} == set(expected)
    # The old folders stay beside the new ones.
    assert set(road.folders()) == {*"abcd", *(f"{name}.old" for name in expected)}
    for name in "abcd":
        assert os.listdir(road.workdir / name) == ["0.txt"]
    assert road.walk(**{changed: 1}) == ("", second)


def test_nothing_is_ever_deleted(road):
    for number in range(4):
        road.walk(d=number)
    assert road.folders() == ["a", "b", "c", "d", "d.old", "d.old2", "d.old3"]
    # Back to what it was at first: it is not looked for among the old ones.
    assert road.walk(d=0)[0] == "d"
    assert road.folders() == ["a", "b", "c", "d", "d.old", "d.old2", "d.old3", "d.old4"]


def test_it_is_said_what_runs_and_where_the_old_folder_went(road, capsys):
    road.walk()
    assert capsys.readouterr().out.splitlines()[1] == f"b: {road.workdir / 'b'}"
    road.walk()
    assert capsys.readouterr().out == ""
    road.walk(b=1)
    told = capsys.readouterr().out
    assert f"b: other settings or inputs; the old folder stays as {road.workdir / 'b.old'}" in told
    assert "a:" not in told


def test_a_folder_that_was_removed_is_made_again(road):
    _, first = road.walk()
    os.unlink(road.workdir / "b" / "0.txt")
    os.rmdir(road.workdir / "b")
    ran, second = road.walk()
    assert ran == "bd"  # what comes after is made again as well: the second result may differ
    assert second["a"] == first["a"]


def test_inputs_are_compared_by_what_they_say(road):
    """A tuple is a list, the order of a dictionary is none, a path is its text."""
    road.walk(a={"x": (1, 2), "y": Path("z")})
    assert road.walk(a={"y": "z", "x": [1, 2]})[0] == ""
    assert road.walk(a={"y": "z", "x": [2, 1]})[0] == "abcd"


def test_results_survive_as_json(tmp_path):
    result = {"mean": 0.1 + 0.2, "none": None, "rows": [{"n": 1}], "text": "naïve 猫"}
    Stages(tmp_path / "road").run("a", 0, [], lambda folder: folder.mkdir() or result)
    stages = Stages(tmp_path / "road")
    assert stages.result("a") == result
    assert stages.run("a", 0, [], lambda _: pytest.fail("it ran again")) == result


def test_what_is_protected_is_not_set_aside(tmp_path):
    """People's work: a change stops before it, and what is there stays there."""
    workdir, ran = tmp_path / "road", []

    def walk(inputs, held="3 judgements"):
        stages = Stages(workdir)
        stages.run("a", inputs, [], lambda folder: folder.mkdir() or {}, lambda folder: pytest.fail("it is unchanged"))
        asked = []

        def work(folder):
            folder.mkdir(exist_ok=True)
            ran.append(inputs)
            return {}

        stages.run("b", 0, ["a"], work, lambda folder: asked.append(folder) or held)
        return stages, asked

    assert walk(0)[1] == []  # there is nothing yet
    stages, asked = walk(0)
    assert (stages.walked, asked, ran) == (["a", "b"], [], [0])
    os.rmdir(workdir / "a")
    before = folders.contents(workdir)
    with pytest.raises(InputError, match=rf"{workdir / 'b'}: it holds 3 judgements, made with other settings or after"):
        walk(0)  # a is made again, and its result may be another
    assert (workdir / "b").exists()
    assert not (workdir / "b.old").exists()
    assert before.keys() == folders.contents(workdir).keys()
    with pytest.raises(InputError, match="3 judgements"):
        walk(0)
    assert walk(0, held="")[1] == [workdir / "b"]
    assert ran == [0, 0]
    assert (workdir / "b.old").exists()


# Interruptions


@pytest.mark.parametrize(("stage", "rest"), [("a", "abcd"), ("b", "bcd"), ("d", "d")])
def test_an_interrupted_stage_goes_on_in_its_folder(road, stage, rest):
    with pytest.raises(KeyboardInterrupt):
        road.walk(fail=stage)
    ran, results = road.walk()
    assert ran == rest
    assert road.folders() == ["a", "b", "c", "d"]
    assert sorted(os.listdir(road.workdir / stage)) == ["0.txt", "1.txt"]  # what it had, and the rest
    assert road.walk() == ("", results)


def test_what_was_interrupted_is_set_aside_when_the_settings_change(road):
    road.walk()
    with pytest.raises(KeyboardInterrupt):
        road.walk(fail="b", b=1)
    ran, _ = road.walk(b=2)
    assert ran == "bd"
    assert road.folders() == ["a", "b", "b.old", "b.old2", "c", "d", "d.old"]


WALKER = """
import sys, time
from pathlib import Path
from experiments.stages import Stages

workdir, ran = Path(sys.argv[1]), Path(sys.argv[2])


def work(folder):
    folder.mkdir(exist_ok=True)
    with ran.open("a") as file:
        file.write(folder.name + "\\n")
    time.sleep(0.02)
    (folder / "result").write_text("done")
    return {"number": int(folder.name)}


print("ready", flush=True)
stages = Stages(workdir)
for i in range(30):
    stages.run(str(i), [i], [str(i - 1)] if i else [], work)
print("end", flush=True)
"""


def test_a_kill_costs_the_stage_that_it_hit_and_no_other(tmp_path, rng):
    """SIGKILL at random moments of 30 stages of 20 ms."""
    workdir, ran = tmp_path / "road", tmp_path / "ran"
    command = [sys.executable, "-c", WALKER, str(workdir), str(ran)]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(command, cwd=folders.ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        if kills < 3:
            time.sleep(0.05 + 0.1 * rng.random())
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        ended = "end" in process.communicate()[0]
        if ended:
            break
    assert ended
    assert kills == 3
    names = ran.read_text().split()
    assert list(dict.fromkeys(names)) == [str(i) for i in range(30)]
    assert 30 <= len(names) <= 33
    assert sorted(os.listdir(workdir)) == sorted([".lock", "stages.json", *map(str, range(30))]), (
        "something was set aside"
    )
    assert Stages(workdir).result("29") == {"number": 29}


def test_what_a_kill_in_the_first_write_leaves_is_taken_over(tmp_path):
    (tmp_path / ".stages.json.tmp").write_text('{"a"')
    assert Road(tmp_path).walk()[0] == "abcd"


# Folders that are none of ours


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files but no stages\.json; expected an empty folder or a run"):
        Stages(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_and_none_are_alike(tmp_path):
    assert Road(tmp_path).walk()[0] == "abcd"
    Stages(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "road").write_text("")
    with pytest.raises((InputError, OSError)):
        Stages(tmp_path / "road")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"3", b'"text"', b"[]", b'[["a", {}]]', b'{"a": 3}', b'{"a": {}}',
     b'{"a": {"fingerprint": "x"}}', b'{"a": {"fingerprint": "x", "run": 3}}'],
    ids=lambda content: content.decode(errors="replace") or "empty",
)  # fmt: skip
def test_a_damaged_list_of_stages_is_told(road, content):
    road.walk()
    path = road.workdir / "stages.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"stages\.json: damaged: ") as error:
        road.walk()
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    assert road.folders() == ["a", "b", "c", "d"]


# What inputs are


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    every: int = 3
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_every_setting_tells_but_those_that_may_change(tmp_path):
    base = identity(Outer(), ("every",))
    assert identity(Outer(every=5), ("every",)) == base
    for changed in (Outer(name="y"), Outer(inner=Inner(rate=0.2)), Outer(inner=Inner(data="z"))):
        assert identity(changed, ("every",)) != base
    assert identity(Outer(every=5)) != identity(Outer())
    json.dumps(base)


@pytest.mark.parametrize("spec", ["{}", "{}:judge", "jax:{}:judge"])
def test_a_file_tells_by_its_content(tmp_path, spec):
    path = tmp_path / "file.py"
    spec = spec.format(path)
    missing = identity(spec)
    path.write_text("one")
    one = identity(spec)
    path.write_text("two")
    two = identity(spec)
    os.utime(path, ns=(0, 0))
    assert identity(spec) == two
    path.write_text("one")
    assert identity(spec) == one
    assert len({json.dumps(x) for x in (missing, one, two)}) == 3
    # Inside settings too.
    data = Inner(data=spec)
    before = identity(data)
    path.write_text("three")
    assert identity(data) != before


def test_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("~/data.jsonl", "~/data.jsonl:judge"):
        (tmp_path / "data.jsonl").write_text("one")
        one = identity(spec)
        (tmp_path / "data.jsonl").write_text("two")
        assert identity(spec) != one


@pytest.mark.parametrize("spec", ["{}", "model:{}"])
def test_a_folder_tells_by_the_names_sizes_and_times_in_it(tmp_path, spec):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("1234")
    spec = spec.format(folder)
    before = identity(spec)
    assert identity(spec) == before
    (folder / "weights").write_text("12345")
    assert identity(spec) != before
    (folder / "weights").write_text("4321")
    os.utime(folder / "weights", ns=(1, 1))
    assert identity(spec) != before  # trained again: another time, the same size
    before = identity(spec)
    (folder / "more").write_text("")
    assert identity(spec) != before


@pytest.mark.parametrize("value", ["", "gpt2", "nobody/nothing", "package.module:function", 3, 0.5, True, None])
def test_what_names_no_file_is_itself(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    assert identity(value) == value
