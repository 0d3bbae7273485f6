"""Talk to nf_tables: whole commands through libnftables, cheap checks by netlink.

libnftables is found when first used; a host without it is told which package to install.
"""

from __future__ import annotations

import _thread
import os
import struct
from typing import TYPE_CHECKING, Any

from hutch.decoding import decode_json
from hutch.linux.netlink import NetlinkSocket, attribute, attributes, message

if TYPE_CHECKING:
    import ctypes

__all__ = ["NftError", "count_rules", "generation", "query", "run"]

NETLINK_NETFILTER = 12
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_GETRULE = 7
NFT_MSG_GETGEN = 16
NFTA_GEN_ID = 1
NFTA_RULE_TABLE = 1
NFPROTO_INET = 1
NFT_CTX_OUTPUT_JSON = 16
_NFGENMSG = struct.Struct("=BBH")

_guard = _thread.allocate_lock()


class NftError(OSError):
    """nf_tables refused a command; the text is libnftables' own."""


def run(commands: str, *, flags: int = 0) -> str:
    """Carry out commands in nft(8)'s language as one transaction; return what they print.

    `flags` are NFT_CTX_OUTPUT_*. Works in the network namespace of the calling thread.
    Raises `NftError` on a refusal (nothing is changed then) and `FileNotFoundError` where
    the library is missing.
    """
    library = _library()
    _require_right()
    # libnftables keeps parser state in globals; one call at a time is safe.
    with _guard:
        context = library.nft_ctx_new(0)
        if not context:
            raise NftError(12, "nft_ctx_new failed")
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_output_set_flags(context, flags)
            failed = library.nft_run_cmd_from_buffer(context, commands.encode())
            output: bytes = library.nft_ctx_get_output_buffer(context) or b""
            error: bytes = library.nft_ctx_get_error_buffer(context) or b""
        finally:
            library.nft_ctx_free(context)
    if failed:
        raise _refusal(error.decode(errors="replace"))
    return output.decode(errors="replace")


def _require_right() -> None:
    """Raise `NftError` for those who may ask nothing: libnftables would tell them on stderr."""
    try:
        generation()
    except PermissionError as exc:
        raise NftError(exc.errno, exc.strerror) from exc
    except OSError:
        pass  # it says more of what is missing


def query(command: str) -> list[dict[str, Any]]:
    """Return what a list command prints, decoded: one dictionary of one key per object."""

    text = run(command + "\n", flags=NFT_CTX_OUTPUT_JSON)
    decoded = decode_json(text, dict[str, list[dict[str, Any]]])
    return decoded["nftables"]


def _refusal(text: str) -> NftError:
    """Return the error with the errno that the text ends its first line with."""
    lines = [line for line in text.splitlines() if "Error:" in line] or ["nft: unknown error"]
    reason = lines[0].rpartition(": ")[2].strip()
    numbers = {os.strerror(number): number for number in (1, 2, 16, 17, 22, 28, 95)}
    return NftError(numbers.get(reason, 22), lines[0].partition("Error: ")[2] or lines[0])


def _library() -> ctypes.CDLL:
    import ctypes

    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise FileNotFoundError(2, f"libnftables cannot be loaded: {error}") from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.nft_ctx_new.restype = pointer
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_run_cmd_from_buffer.argtypes = [pointer, text]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        function = getattr(library, name)
        function.restype, function.argtypes = text, [pointer]
    for name in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [pointer]
    library.nft_ctx_free.restype = None
    library.nft_ctx_output_set_flags.argtypes = [pointer, ctypes.c_uint]
    return library


def generation() -> int:
    """Return a number that every change of the namespace's ruleset raises (0.03 ms)."""
    request = message(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, _NFGENMSG.pack(0, 0, 0), 0)
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        answer = netlink.ask(request)
    return int.from_bytes(attributes(answer[_NFGENMSG.size :])[NFTA_GEN_ID], "big")


def count_rules(table: str) -> int:
    """Return how many rules an inet table has, 0 where there is no such table (0.1 ms)."""
    body = _NFGENMSG.pack(NFPROTO_INET, 0, 0)
    body += attribute(NFTA_RULE_TABLE, table.encode() + b"\0")
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        try:
            return len(netlink.dump(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE, body))
        except OSError as error:
            if error.errno == 2:  # ENOENT
                return 0
            raise
