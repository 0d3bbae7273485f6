"""The states of an instance and the moves between them."""

from __future__ import annotations

from hutch.lifecycle.states import MOVES, State, move

__all__ = ["MOVES", "State", "move"]
