"""Where the host keeps UEFI for virtual machines, under the names of several distributions."""

from __future__ import annotations

import os

import msgspec

from hutch.errors import Unsupported

__all__ = ["Uefi", "find_uefi"]

# Each pair belongs together: the size of the variables is that of the code's own store.
_PLACES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)


class Uefi(msgspec.Struct, frozen=True, kw_only=True):
    """The firmware's code, and its empty store of variables."""

    code: str
    variables: str


def find_uefi() -> Uefi:
    """Return the host's UEFI; raise `Unsupported` with the cure where there is none."""
    for code, variables in _PLACES:
        if os.access(code, os.R_OK) and os.access(variables, os.R_OK):
            return Uefi(code=code, variables=variables)
    raise Unsupported(
        "uefi: the host has no firmware for virtual machines", hint="apt-get install ovmf"
    )
