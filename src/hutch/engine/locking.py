"""One lock per instance, across threads and processes; the kernel drops it with its holder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hutch.engine.context import Context
from hutch.errors import Busy, NotFound
from hutch.linux.locks import lock_file

__all__ = ["LOCK_TIMEOUT_S", "instance_lock"]

LOCK_TIMEOUT_S = 120.0
# Who has waited for so long looks what the holder is at.
_CROWDED_S = 0.5


@contextmanager
def instance_lock(
    context: Context, identifier: str, *, timeout_s: float = LOCK_TIMEOUT_S, patient: bool = False
) -> Iterator[None]:
    """Hold the lock of an instance; raise `Busy` when another holds it for too long.

    Holders do bounded work only: nobody waits for a program's end with the lock held. The
    exception is a migration of a machine that runs, which none but the `patient` wait for.
    """
    path = context.directory(identifier) / "lock"
    try:
        with ExitStack() as held:
            if not patient:
                try:
                    held.enter_context(lock_file(path, timeout_s=min(timeout_s, _CROWDED_S)))
                except Busy:
                    _refuse_migrating(context, identifier)
                else:
                    yield
                    return
            held.enter_context(lock_file(path, timeout_s=timeout_s))
            yield
    except FileNotFoundError as exc:
        if exc.filename != str(path):
            raise
        raise NotFound(f"no such instance: {identifier[:12]}") from None


def _refuse_migrating(context: Context, identifier: str) -> None:
    """Raise `Busy` for an instance that is copied to another host; its lock is held."""
    from hutch.migration.records import MIGRATIONS, MigrationRecord, Phase, Role

    with context.store.read() as tx:
        found = [one for _, one in tx.items(MIGRATIONS, MigrationRecord)]
    for migration in found:
        if (migration.instance, migration.role, migration.phase) == (
            identifier,
            Role.SOURCE,
            Phase.SENDING,
        ):
            raise Busy(
                f"instance {migration.name} is being migrated to {migration.destination}",
                hint="wait for it, or end that `hutch migrate` with Ctrl-C",
            )
