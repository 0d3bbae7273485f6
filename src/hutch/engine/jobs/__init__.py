"""Queues of jobs: submitted to the store, run on instances by the order of a policy."""

from __future__ import annotations
