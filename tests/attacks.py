"""Attacks on the sandbox: functions whose source is run inside. Each returns True when it has got out or has taken more
than its share, and anything else when it was held. The names that they look for are given by `test_sandbox.py`.
"""
# Imports stand where they are used: only the function itself goes into the sandbox.
# ruff: noqa: SIM105

import inspect
from collections.abc import Callable

HOME = CANARY = SOCKET = ABSTRACT = ""  # the names that the sandbox's copy is given
PORT = 0

ATTACKS: list[Callable] = []


def attack(function: Callable) -> Callable:
    """Notes it down."""
    ATTACKS.append(function)
    return function


def source_of(function: Callable, given: dict) -> str:
    """A program that defines it."""
    names = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    return names + inspect.getsource(function).removeprefix("@attack\n")


# More than its share


@attack
def fork_bomb():
    import os

    children = 0
    try:
        while children < 300:
            if os.fork() == 0:
                while True:
                    pass
            children += 1
    except OSError:
        pass
    return children > 4


@attack
def thread_bomb():
    import threading
    import time

    threads = 0
    try:
        while threads < 300:
            threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
            threads += 1
    except RuntimeError:
        pass
    return threads > 4


@attack
def memory():
    held = []
    while len(held) < 2000:
        held.append(bytearray(1 << 20))
    return True


@attack
def one_large_array():
    return len(bytearray(1 << 31)) > 0


@attack
def processor():
    while True:
        pass


@attack
def processor_in_children():
    import os

    while True:
        try:
            os.fork()
        except OSError:
            pass


@attack
def sleep():
    import time

    time.sleep(60)
    return True


@attack
def deaf_to_signals():
    import signal

    for number in range(1, 32):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass


@attack
def regular_expression():
    import re

    return not re.match("(a+)+$", "a" * 60 + "b")


@attack
def long_integer():
    return 10 ** (10**9) > 0


@attack
def output():
    import os

    while True:
        for descriptor in range(1, 8):
            try:
                os.write(descriptor, b"x" * 65536)
            except OSError:
                pass


@attack
def large_value():
    return "x" * (1 << 24)


@attack
def deep_value():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@attack
def disk():
    written = 0
    try:
        for i in range(100):
            with open(f"/tmp/{i}", "wb") as file:
                file.write(bytes(1 << 20))
            written += 1
    except OSError:
        pass
    return written > 16


@attack
def one_large_file():
    try:
        with open("/tmp/x", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
    except OSError:
        return False
    return True


@attack
def shared_memory():
    with open("/dev/shm/x", "wb") as file:
        file.write(bytes(1 << 20))
    return True


@attack
def nameless_files():
    import os

    held = []
    while len(held) < 50:
        held.append(os.memfd_create("x"))
        os.write(held[-1], bytes(1 << 20))
    return True


@attack
def system_v_memory():
    import ctypes

    new, private, size = 0o1600, 0, 64 << 20
    segments = [ctypes.CDLL(None, use_errno=True).shmget(private, size, new) for _ in range(10)]
    return max(segments) >= 0


@attack
def system_v_semaphores():
    import ctypes

    new, private = 0o1600, 0
    return max(ctypes.CDLL(None).semget(private, 30_000, new) for _ in range(10)) >= 0


@attack
def system_v_queues():
    import ctypes

    new, private = 0o1600, 0
    return max(ctypes.CDLL(None).msgget(private, new) for _ in range(10)) >= 0


@attack
def keys():
    import ctypes

    add_key, session = 248, -3
    return ctypes.CDLL(None).syscall(add_key, b"user", b"x", b"y", 1, session) >= 0


@attack
def descriptors():
    held = []
    try:
        while len(held) < 1000:
            held.append(open("/dev/null"))  # noqa: SIM115
    except OSError:
        pass
    return len(held) > 64


@attack
def higher_limits():
    import resource

    resource.setrlimit(resource.RLIMIT_NPROC, (4096, 4096))
    return True


# Other processes


@attack
def kill_the_parent():
    import os
    import signal
    import time

    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@attack
def kill_everybody():
    import os
    import signal

    os.kill(-1, signal.SIGKILL)


@attack
def list_processes():
    import os

    return len([name for name in os.listdir("/proc") if name.isdecimal()]) > 3


@attack
def find_a_process():
    import os

    for process in range(3, 99_999):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            continue
        except PermissionError:
            return True
        if process != os.getpid():
            return True
    return False


@attack
def trace_a_process():
    import ctypes

    attach = 16
    return any(ctypes.CDLL(None).ptrace(attach, process, 0, 0) == 0 for process in range(5, 3000))


@attack
def outlive_it():
    import os
    import time

    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    return "the test looks for what is left"


# Files and secrets


@attack
def our_home():
    import os

    return os.path.exists(HOME)


@attack
def our_file():
    with open(CANARY) as file:
        return file.read() == "secret"


@attack
def write_our_file():
    with open(CANARY, "w") as file:
        file.write("changed")
    return True


@attack
def password_file():
    with open("/etc/passwd") as file:
        return bool(file.read())


@attack
def write_to_usr():
    with open("/usr/lib/evil.py", "w") as file:
        file.write("x")
    return True


@attack
def write_to_the_root():
    with open("/evil", "w") as file:
        file.write("x")
    return True


@attack
def change_the_guest():
    with open("/sandbox/guest.py", "w") as file:
        file.write("x")
    return True


@attack
def link_out():
    import os

    os.symlink(CANARY, "/tmp/link")
    with open("/tmp/link") as file:
        return file.read() == "secret"


@attack
def climb_by_proc():
    import os

    return any(os.path.exists(f"/proc/{process}/root{CANARY}") for process in ("1", "2", "self", "thread-self"))


@attack
def open_descriptors():
    import os

    inside = ("/sandbox", "/tmp", "/dev/null", "/proc", "pipe:", "/memfd:")
    for descriptor in range(64):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if not path.startswith(inside):
            return True
    return False


@attack
def our_environment():
    import os

    held = str(dict(os.environ)).encode()
    for process in ("1", "2", "self"):
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                held += file.read()
        except OSError:
            continue
    return b"CANARY" in held


# The system


@attack
def kernel_settings():
    with open("/proc/sys/kernel/hostname", "w") as file:
        file.write("evil")
    return True


@attack
def mount():
    import ctypes

    return ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, 0) == 0


@attack
def another_namespace():
    import ctypes

    new_user = 0x10000000
    return ctypes.CDLL(None).unshare(new_user) == 0


@attack
def make_a_device():
    import os

    os.mknod("/tmp/mem", 0o20666, os.makedev(1, 1))
    return True


@attack
def become_root():
    import os

    os.setuid(0)
    return True


@attack
def set_user_program():
    import subprocess

    return subprocess.run(["/usr/bin/su", "-c", "id"], capture_output=True, input=b"").returncode == 0


# The network


@attack
def local_server():
    import socket

    socket.create_connection(("127.0.0.1", PORT), 1)
    return True


@attack
def outside_server():
    import socket

    socket.create_connection(("1.1.1.1", 53), 1)
    return True


@attack
def local_socket():
    import socket

    socket.socket(socket.AF_UNIX).connect(SOCKET)
    return True


@attack
def abstract_socket():
    import socket

    socket.socket(socket.AF_UNIX).connect(ABSTRACT)
    return True


@attack
def look_up_a_name():
    import socket

    return bool(socket.getaddrinfo("pypi.org", 443))


@attack
def raw_packets():
    import socket

    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    return True
