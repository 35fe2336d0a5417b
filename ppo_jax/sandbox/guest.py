"""What runs inside the sandbox: sets the limits, then the code, and writes a line of JSON a call.

A file of its own, with nothing but the standard library: the interpreter in the sandbox may be another one than ours.
"""

import io
import json
import os
import resource
import sys


def main():
    """Runs the task, and writes to the descriptor that is named on the command line."""
    out = os.fdopen(os.dup(int(sys.argv[1])), "wb", buffering=0)
    os.close(int(sys.argv[1]))
    with open("/sandbox/task.json", "rb") as file:
        task = json.loads(file.read())
    limit(task["limits"])
    out.write(b"ready\n")
    for number in (1, 2):
        os.dup2(os.open("/dev/null", os.O_WRONLY), number)
    calls, function = task["calls"], None
    if task["entry_point"]:
        try:
            function = load(task["source"], "solution")[task["entry_point"]]
        except BaseException as error:  # the code may raise anything, and try to end the process
            out.write(b"".join(encode({"error": type(error).__name__}) for _ in calls))
            return
    for call in calls:
        try:
            value = run_program(task["source"], call["stdin"]) if function is None else run_call(function, call)
            line = encode({"value": value})
        except BaseException as error:
            line = encode({"error": type(error).__name__})
        out.write(line)


def limit(limits):
    """No way back from these: raising them needs a right that nobody has here."""
    of = {
        resource.RLIMIT_AS: limits["memory_mb"] << 20,
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_FSIZE: limits["disk_mb"] << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in of.items():
        resource.setrlimit(kind, (most, most))


def load(source, name):
    """The names that the code defines."""
    names = {"__name__": name, "__builtins__": __builtins__}
    exec(compile(source, "solution.py", "exec"), names)
    return names


def run_call(function, call):
    """The value of a call, as JSON can hold it."""
    return plain(function(*call.get("args", ()), **call.get("kwargs", {})))


def run_program(source, stdin):
    """What the program writes."""
    sys.stdin, sys.stdout = io.StringIO(stdin), io.StringIO()
    try:
        load(source, "__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    return sys.stdout.getvalue()


def plain(value):
    """Sets have no order, and JSON no sets."""
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def encode(said):
    """A line."""
    return json.dumps(said).encode() + b"\n"


main()
