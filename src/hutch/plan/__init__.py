"""Plans: what will be done, as data. Pure functions from specification and assets."""

from __future__ import annotations
