"""A filter of system calls: what would get around the sandbox's limits on memory, or reach outside of its files.

Memory of the kernel's that belongs to no process is counted by no limit of a process: System V's shared memory,
semaphores and queues, files without a name. Keys are shared by all processes of a session. The rest is there for few
programs and has had many holes. Source of the format: Linux, Documentation/userspace-api/seccomp_filter.rst.
"""

import errno
import platform
import struct

# Name: its number on x86_64, on aarch64 (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
REFUSED = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "ptrace": (101, 117),
    "unshare": (272, 97),
    "setns": (308, 268),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD+W+ABS, BPF_JMP+JEQ+K, BPF_JMP+JGE+K, BPF_RET+K
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_OTHER_ABI = 0x40000000  # x32 counts its calls from here


def make_filter(machine: str | None = None) -> bytes:
    """The program for the kernel: refused calls fail with EPERM, calls of another architecture end the process.

    Args:
        machine: as `platform.machine()` says; None: this one.

    Raises:
        KeyError: another machine than those in `MACHINES`.
    """
    column, architecture = MACHINES[machine or platform.machine()]
    program = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, 0, 1, _OTHER_ABI),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for numbers in REFUSED.values():
        program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
