"""What the console script imports: the command line, with a Ctrl-C that comes before it is loaded.

Only the script imports this module, which changes what a signal does to the process, and opens
those of its streams that it was started without.
"""

from __future__ import annotations

import os
import sys

# By its own name: `signal` loads `enum` and `re`, and until then Ctrl-C has a traceback.
_signal = sys.modules.get("_signal") or __import__("_signal")

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main"]

_INTERRUPTED = 128 + 2


def _leave(*_: object) -> NoReturn:
    os._exit(_INTERRUPTED)


def _open_streams() -> None:
    """Open the null device for each closed standard stream.

    The next file that is opened would have its number: what is meant for the terminal would
    then be written into that file, the database of all things.
    """
    while (opened := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


_open_streams()

# Who has been started in the background of a shell ignores it, and goes on to.
_interruptible = _signal.getsignal(_signal.SIGINT) == _signal.default_int_handler
if _interruptible:
    _signal.signal(_signal.SIGINT, _leave)

from hutch.cli.main import main as _main  # noqa: E402 - what takes the time


def _take_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale has another encoding.

    Arguments, the environment and names of files are bytes, and those of an image are UTF-8:
    an interpreter that has read them in another encoding cannot be told otherwise any more.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode or not sys.executable:
        return
    if sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] != sys.argv[1:]:
        return  # called from a program with arguments of its own
    try:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    except OSError:
        return  # too long by one option: then it is as the locale says


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    _take_utf8()
    if _interruptible:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    try:
        _main()
    except KeyboardInterrupt:
        _leave()
