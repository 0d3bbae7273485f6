"""One invocation of the command line: its options, and the engine, opened when first asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hutch.errors import HutchError

if TYPE_CHECKING:
    from types import TracebackType

    from hutch.engine import Engine

__all__ = ["Invocation", "Told", "warn"]

# A line for people, and what an object for programs has beside the name.
Told = tuple[str, dict[str, object]]


class Invocation:
    """What a command's function gets. Closes the engine at its end."""

    def __init__(
        self,
        *,
        words: str,
        options: dict[str, Any],
        arguments: list[str],
        root: str | None,
        output: str,
    ) -> None:
        self.words = words
        self.options = options
        self.arguments = arguments
        self.root = root
        self.json = output == "json"
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine on the root of this invocation."""
        if self._engine is None:
            from hutch.engine import Engine

            self._engine = Engine(self.root)
        return self._engine

    def __enter__(self) -> Invocation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._engine is not None:
            self._engine.close()

    def flag(self, name: str) -> bool:
        """Return whether a flag was given."""
        return bool(self.options.get(name, False))

    def filters(self) -> dict[str, list[str]]:
        """Return `--filter KEY=VALUE` options by key."""
        from hutch.cli.options import UsageError

        result: dict[str, list[str]] = {}
        for entry in self.options.get("filter", ()):
            key, equals, value = entry.partition("=")
            if not equals or not key:
                raise UsageError(f"--filter: expected KEY=VALUE, got {entry!r}", exit_code=1)
            result.setdefault(key.strip(), []).append(value.strip())
        return result

    def each(self, names: Iterable[str], action: Callable[[str], Told | str | None]) -> int:
        """Do one thing for each name; report failures and go on; return the exit code.

        `action` returns what to print, or None for the name itself, or `Told`. As JSON a list
        is printed at the end, of an object with the `Name` for each that did not fail and was
        not passed over, which an empty text says.
        """
        from hutch.cli.exitcodes import report

        code = 0
        done: list[dict[str, object]] = []
        try:
            for name in names:
                try:
                    answer = action(name)
                except HutchError as exc:
                    code = report(exc, as_json=self.json)
                    continue
                line, fields = answer if isinstance(answer, tuple) else (answer, {})
                line = name if line is None else line
                if line and self.json:
                    done.append({"Name": name, **fields})
                elif line:
                    print(line, flush=True)
        finally:  # what was done before a Ctrl-C is told as well
            if self.json:
                from hutch.cli.output import print_json

                print_json(done)
        return code


def warn(message: str) -> None:
    """Write a warning to stderr."""
    print(f"hutch: warning: {message}", file=sys.stderr)
