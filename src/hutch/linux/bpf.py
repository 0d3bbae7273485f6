"""bpf(2): load a program, and attach it to a control group."""

from __future__ import annotations

import ctypes
import os

from hutch.linux.libc import raise_errno, syscall

__all__ = [
    "bpf_prog_attach",
    "bpf_prog_get_fd_by_id",
    "bpf_prog_load",
    "bpf_prog_query",
]

BPF_PROG_LOAD = 5
BPF_PROG_ATTACH = 8
BPF_PROG_DETACH = 9
BPF_PROG_GET_FD_BY_ID = 13
BPF_PROG_QUERY = 16

BPF_PROG_TYPE_CGROUP_DEVICE = 15
BPF_CGROUP_DEVICE = 6

BPF_F_ALLOW_MULTI = 2
BPF_F_REPLACE = 4


class _Load(ctypes.Structure):
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
    )


class _Attach(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("replace_bpf_fd", ctypes.c_uint32),
    )


class _Query(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
    )


class _GetId(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint32),
        ("next_id", ctypes.c_uint32),
        ("open_flags", ctypes.c_uint32),
    )


def _bpf(command: int, attr: ctypes.Structure) -> int:
    result = syscall("bpf", command, ctypes.byref(attr), ctypes.sizeof(attr))
    if result < 0:
        raise_errno()
    return result


def bpf_prog_load(prog_type: int, program: bytes, licence: bytes = b"Apache-2.0") -> int:
    """BPF_PROG_LOAD: return the descriptor of the program; the caller closes it."""
    code = ctypes.create_string_buffer(program, len(program))
    text = ctypes.create_string_buffer(licence)
    attr = _Load(
        prog_type=prog_type,
        insn_cnt=len(program) // 8,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(text),
    )
    return _bpf(BPF_PROG_LOAD, attr)


def bpf_prog_query(target_fd: int, attach_type: int) -> list[int]:
    """BPF_PROG_QUERY: return the ids of the programs attached to a control group."""
    ids = (ctypes.c_uint32 * 64)()
    attr = _Query(
        target_fd=target_fd,
        attach_type=attach_type,
        prog_ids=ctypes.addressof(ids),
        prog_cnt=len(ids),
    )
    _bpf(BPF_PROG_QUERY, attr)
    return list(ids[: attr.prog_cnt])


def bpf_prog_get_fd_by_id(identifier: int) -> int:
    """BPF_PROG_GET_FD_BY_ID: return a descriptor; the caller closes it."""
    return _bpf(BPF_PROG_GET_FD_BY_ID, _GetId(id=identifier))


def bpf_prog_attach(target_fd: int, prog_fd: int, attach_type: int) -> None:
    """BPF_PROG_ATTACH: attach to a control group, replacing the program attached before.

    Groups beneath may attach programs of their own, which can only narrow this one.
    """
    flags = BPF_F_ALLOW_MULTI
    before = bpf_prog_query(target_fd, attach_type)
    old = bpf_prog_get_fd_by_id(before[-1]) if before else -1
    try:
        attr = _Attach(
            target_fd=target_fd,
            attach_bpf_fd=prog_fd,
            attach_type=attach_type,
            attach_flags=flags | (BPF_F_REPLACE if before else 0),
            replace_bpf_fd=max(old, 0),
        )
        _bpf(BPF_PROG_ATTACH, attr)
    finally:
        if old >= 0:
            os.close(old)
