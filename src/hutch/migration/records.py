"""What each side writes down of a migration, so that a killed one can be settled."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
from enum import StrEnum

import msgspec

__all__ = ["MIGRATIONS", "MigrationRecord", "Phase", "Role"]

MIGRATIONS = "migrations"


class Role(StrEnum):
    """Which side this root is."""

    SOURCE = "source"
    TARGET = "target"


class Phase(StrEnum):
    """How far it is. The source's step from `sending` to `committed` is the decision, which
    only a target that has `declined` a live machine takes back."""

    SENDING = "sending"
    COMMITTED = "committed"
    ABORTED = "aborted"
    PREPARING = "preparing"
    PREPARED = "prepared"
    ACTIVE = "active"
    DECLINED = "declined"


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A migration under its token. `previous` is the state that the instance has when it may
    be started; `resume` that it ran, and is to run again wherever it ends up; `volumes` are
    those that the target makes for it. `live` is of a machine that runs until its memory is
    there: what is at the source can go on, and what is at the target has run or never will.
    `cards` is how many networks it is in, `isolation` its kind."""

    token: str
    role: Role
    phase: Phase
    instance: str
    name: str
    destination: str = ""
    previous: str = ""
    resume: bool = False
    volumes: tuple[str, ...] = ()
    live: bool = False
    cards: int = 0
    isolation: str = "vm"
