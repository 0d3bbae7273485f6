"""States and the table of moves: what may follow what, and what may be asked when."""

from __future__ import annotations

from enum import StrEnum

from hutch.errors import WrongState

__all__ = ["MOVES", "State", "move"]


class State(StrEnum):
    """Where an instance stands; the words are those of Docker's API."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    REMOVING = "removing"
    SUSPENDED = "suspended"
    MIGRATING = "migrating"
    EXITED = "exited"
    DEAD = "dead"


MOVES: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING, State.MIGRATING, State.REMOVING, State.DEAD}),
    State.STARTING: frozenset(
        {State.RUNNING, State.EXITED, State.CREATED, State.SUSPENDED, State.DEAD}
    ),
    State.RUNNING: frozenset(
        {
            State.PAUSED,
            State.SUSPENDED,
            State.MIGRATING,
            State.EXITED,
            State.RESTARTING,
            State.DEAD,
        }
    ),
    State.PAUSED: frozenset({State.RUNNING, State.EXITED, State.DEAD}),
    State.RESTARTING: frozenset({State.STARTING, State.EXITED, State.REMOVING, State.DEAD}),
    # Its memory is on disk: it goes on from there, or begins anew without it.
    State.SUSPENDED: frozenset(
        {State.STARTING, State.EXITED, State.MIGRATING, State.REMOVING, State.DEAD}
    ),
    # Inert: it is another hutch's, or about to be; or it comes back as what it was.
    State.MIGRATING: frozenset(
        {
            State.CREATED,
            State.RUNNING,
            State.EXITED,
            State.SUSPENDED,
            State.REMOVING,
            State.DEAD,
        }
    ),
    State.REMOVING: frozenset({State.DEAD}),
    State.EXITED: frozenset(
        {State.STARTING, State.RESTARTING, State.MIGRATING, State.REMOVING, State.DEAD}
    ),
    State.DEAD: frozenset({State.REMOVING}),
}


def move(present: State, wanted: State, *, name: str) -> State:
    """Return `wanted` if the table allows it after `present`, else raise `WrongState`."""
    if wanted not in MOVES[present]:
        raise WrongState(f"instance {name} is {present}: cannot become {wanted}")
    return wanted
