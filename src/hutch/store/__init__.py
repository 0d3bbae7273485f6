"""The state that outlives processes: SQLite, one file per root."""

from __future__ import annotations

from hutch.store.database import Store

__all__ = ["Store"]
