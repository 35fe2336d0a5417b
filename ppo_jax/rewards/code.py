"""Code that passes its tests: a host reward for programs, run in a sandbox, judged outside of it.

The code never sees what is expected of it, and what it says about itself does not count: the values of its calls come
out of the sandbox as JSON and are compared here. So to end the process, to change `assert` or `==`, to read the tests
or to print that all is well earns nothing.
"""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ppo_jax.sandbox import find_python, run

_FENCE = re.compile(r"```[\w+-]*[ \t\r]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code(
    prompts: Sequence[str],
    completions: Sequence[str],
    tests: Sequence[Any] = (),
    entry_point: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float]:
    """The share of its tests that each completion passes, in [0, 1]; the prompt does not count.

    Args:
        prompts: B texts.
        completions: B texts: Python code, or text with it between ``` marks (the last such block counts).
        tests: for each a list of `{"args": [...], "kwargs": {...}, "expected": value}`, calls of the function that
            `entry_point` names (either may be left out, not both); or of `{"stdin": "text", "stdout": "text"}`, where
            the whole program is run, and white space at the end of what it writes does not count.
        entry_point: for each the function's name; None where its tests are of the second kind.
        **columns: the data's others, which do not count.

    Raises:
        ValueError: a row without tests, or a test that is none.
        SandboxError: there is no isolation here; nothing was run.
    """
    find_python()
    names = entry_point or [None] * len(completions)
    if not len(tests) == len(names) == len(completions):
        raise ValueError(
            f"got {len(tests)} lists of tests for {len(completions)} completions: a column tests is needed"
        )
    rows = [_read_tests(i, row, name) for i, (row, name) in enumerate(zip(tests, names, strict=True))]
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(_share_passed, map(extract_code, completions), (name or "" for name in names), rows))


def extract_code(text: str) -> str:
    """The last block between ``` marks, which may lack the second; the whole text if there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def same(got: Any, expected: Any) -> bool:
    """Whether two values that came as JSON are equal: where a float is expected within 1e-9 of it; True is not 1."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, int | float) and isinstance(got, int | float):
        close = isinstance(expected, float) and math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
        return close or got == expected
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    return type(got) is type(expected) and got == expected


def _read_tests(number: int, tests: Any, entry_point: str | None) -> list[dict[str, Any]]:
    kind, wanted = ("a function's", {"expected"}) if entry_point else ("a program's", {"stdin", "stdout"})
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f"row {number}: tests: got {str(tests)[:80]!r}, expected a list of one or more")
    given = ("args", "kwargs", "stdin", "stdout")  # null where a table gives every row all fields
    tests = [
        {name: x for name, x in test.items() if x is not None or name not in given} if isinstance(test, dict) else test
        for test in tests
    ]
    for test in tests:
        if not isinstance(test, dict) or not wanted <= test.keys() or not _well_formed(test):
            raise ValueError(f"row {number}: tests: got {str(test)[:80]!r}, expected {kind} with {sorted(wanted)}")
    return tests


def _well_formed(test: dict[str, Any]) -> bool:
    kinds = {"args": (list, tuple), "kwargs": dict, "stdin": str, "stdout": str}
    return all(isinstance(test[name], kind) for name, kind in kinds.items() if name in test)


def _share_passed(source: str, entry_point: str, tests: Sequence[dict[str, Any]]) -> float:
    calls = [{name: x for name, x in test.items() if name in ("args", "kwargs", "stdin")} for test in tests]
    result = run(source, entry_point, calls)
    passed = 0
    for value, returned, test in zip(result.values, result.returned, tests, strict=False):
        passed += returned and _passes(value, test, entry_point)
    return passed / len(tests)


def _passes(value: Any, test: dict[str, Any], entry_point: str) -> bool:
    if not entry_point:
        return isinstance(value, str) and value.rstrip() == test["stdout"].rstrip()
    try:
        return same(value, test["expected"])
    except (RecursionError, OverflowError):  # the code has made it so deep, or so large
        return False
