"""Run a command to which the kernel refuses file locks: `python without_flock.py ENOSYS COMMAND…`."""

import ctypes
import errno
import os
import platform
import struct
import sys

FLOCK = {"x86_64": 73, "aarch64": 32}
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38  # sys/prctl.h
SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 2, 0x0005_0000, 0x7FFF_0000  # linux/seccomp.h
BPF_LOAD, BPF_JUMP_IF_EQUAL, BPF_RETURN = 0x20, 0x15, 0x06  # linux/filter.h


class Program(ctypes.Structure):
    """A `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_flock(number: int) -> None:
    """Have the kernel answer every `flock` of this process and its children with an error; raises OSError."""
    instructions = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (BPF_LOAD, 0, 0, 0),  # the number of the system call
            (BPF_JUMP_IF_EQUAL, 0, 1, FLOCK[platform.machine()]),
            (BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO | number),
            (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    program = Program(len(instructions) // 8, instructions)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0),
    ):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "seccomp is not permitted here")


if __name__ == "__main__":
    refuse_flock(getattr(errno, sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
