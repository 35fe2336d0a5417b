"""What runs inside the sandbox: sets the limits, then the code, and writes a line of JSON a call.

A file of its own, with nothing but the standard library: the interpreter in the sandbox may be another one than ours.
"""

import builtins
import json
import os
import resource
import sys
import types


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
    """The names that the code defines, as a module of this name."""
    module = types.ModuleType(name)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which the site module would bring
    sys.modules[name] = module
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module.__dict__


def run_call(function, call):
    """The value of a call, as JSON can hold it."""
    return plain(function(*call.get("args", ()), **call.get("kwargs", {})))


def run_program(source, stdin):
    """What the program writes, by whatever way."""
    given, written = nameless(stdin.encode()), nameless(b"")
    os.dup2(given, 0)
    os.dup2(written, 1)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = out = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    try:
        load(source, "__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        out.flush()
    return os.pread(written, 1 << 20, 0).decode(errors="replace")


def nameless(data):
    """A descriptor of a file with this content, read from its beginning."""
    descriptor = os.open("/tmp/.nameless", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink("/tmp/.nameless")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


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


if __name__ == "__main__":
    main()
