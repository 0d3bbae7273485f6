"""Policies that say which job runs next, and a simulator that tells what they would do.

Pure: no engine, no root, no effects. `hutch.sched.policy` explains how policies are driven.
"""

from __future__ import annotations

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity, Ledger
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions, Policy
from hutch.sched.registry import POLICIES, create, describe

__all__ = [
    "create",
    "Policy",
    "Decisions",
    "NOTHING",
    "Job",
    "Phase",
    "Capacity",
    "Ledger",
    "Base",
    "Parameter",
    "POLICIES",
    "describe",
]
