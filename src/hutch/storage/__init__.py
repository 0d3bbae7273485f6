"""Blobs, unpacked layers, writable layers, volumes, leases and garbage collection.

Nothing is imported here: a start needs `layers`, `snapshots` and `volumes` alone, and their
imports are part of its time.
"""

from __future__ import annotations
