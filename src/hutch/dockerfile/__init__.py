"""Dockerfiles: parsed, their stages planned, their effects on a configuration (pure)."""

from hutch.dockerfile.ignore import Ignore, read_ignore
from hutch.dockerfile.parse import parse_dockerfile
from hutch.dockerfile.source import SourceError, StepFailed
from hutch.dockerfile.stages import plan_stages

__all__ = ["Ignore", "SourceError", "StepFailed", "parse_dockerfile", "plan_stages", "read_ignore"]
