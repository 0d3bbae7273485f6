"""`exec` and `attach`."""

from __future__ import annotations

import os

from hutch.cli.command import Command
from hutch.cli.options import UsageError
from hutch.cli.run_options import from_environment, read_env_file
from hutch.cli.session import Invocation
from hutch.cli.terminal import Streams, detach_keys, relay, terminal_size

__all__ = ["COMMANDS"]


def _exec(invocation: Invocation) -> int:
    values = invocation.options
    name, *command = invocation.arguments
    env = [line for path in values.get("env_file", ()) for line in read_env_file(path)]
    env += from_environment(values.get("env", []))
    detach, tty = invocation.flag("detach"), invocation.flag("tty")
    stdin = invocation.flag("interactive") and not detach
    if tty and stdin and not os.isatty(0):
        raise UsageError("the input device is not a terminal", hint="leave out -t", exit_code=1)
    rows, columns = terminal_size() if tty else (0, 0)
    keys = detach_keys(values.get("detach_keys"))
    session = invocation.engine.get(name).exec_stream(
        command,
        stdin=stdin,
        tty=tty,
        user=values.get("user"),
        env=env or None,
        workdir=values.get("workdir"),
        privileged=invocation.flag("privileged"),
        detach=detach,
        rows=rows,
        columns=columns,
    )
    if detach:
        session.close()
        return 0
    return relay(
        session,
        tty=tty,
        streams=Streams(stdin=stdin),
        keys=keys,
        proxy_signals=True,
    )


def _attach(invocation: Invocation) -> int:
    values = invocation.options
    instance = invocation.engine.get(invocation.arguments[0])
    process = instance.info().spec.process
    stdin = process.stdin and not invocation.flag("no_stdin")
    if process.tty and stdin and not os.isatty(0):
        raise UsageError("the input device is not a terminal", hint="give --no-stdin", exit_code=1)
    session = instance.attach(stdin=stdin)
    if process.tty:
        session.resize(*terminal_size())
    return relay(
        session,
        tty=process.tty,
        streams=Streams(stdin=stdin, ends=process.stdin_once),
        keys=detach_keys(values.get("detach_keys")),
        proxy_signals=values.get("sig_proxy", True),
    )


COMMANDS = {
    "exec": Command(
        handler=_exec,
        summary="Run a further process in a running instance.",
        arguments="INSTANCE COMMAND [ARG...]",
        low=2,
        high=-1,
        interspersed=False,
        options=(
            ("detach", "d", "flag", "", "Leave it running in the background"),
            ("detach-keys", "", "text", "KEYS", "Keys that leave it running (ctrl-p,ctrl-q)"),
            ("env", "e", "list", "NAME[=VALUE]", "Set a variable"),
            ("env-file", "", "list", "FILE", "Read variables from a file"),
            ("interactive", "i", "flag", "", "Keep stdin open"),
            ("privileged", "", "flag", "", "Give it all rights over the host"),
            ("tty", "t", "flag", "", "Give it a terminal"),
            ("user", "u", "text", "USER[:GROUP]", "Run as this user"),
            ("workdir", "w", "text", "PATH", "Working directory inside"),
        ),
        epilog="Options end at INSTANCE. The exit code is the program's, 126 if it cannot be "
        "run, 127 if it was not found, 128+n if signal n ended it.",
        examples=(
            "hutch exec web ls -l /srv",
            "hutch exec -it web sh",
            "echo data | hutch exec -i web sh -c 'cat > /tmp/x'",
        ),
    ),
    "attach": Command(
        handler=_attach,
        summary="Connect to the streams of an instance's main process.",
        arguments="INSTANCE",
        low=1,
        high=1,
        options=(
            ("detach-keys", "", "text", "KEYS", "Keys that leave it running (ctrl-p,ctrl-q)"),
            ("no-stdin", "", "flag", "", "Do not send stdin"),
            ("sig-proxy", "", "flag", "", "Hand signals on to the program (true)"),
        ),
        examples=("hutch attach shell",),
    ),
}
