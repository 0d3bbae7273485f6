"""What an examination of the host finds: one named fact at a time, with its cure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

__all__ = ["Finding", "Report", "State", "finding_of"]


class State(StrEnum):
    """How much of a capability there is."""

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One capability of the host: what was tried, what came of it, and what would help.

    `area` groups findings for people (`kernel`, `storage`, `network`, …). `needed` tells
    whether containers of this user need it; without it, only what the detail says is lost.
    """

    area: str
    name: str
    state: State
    detail: str = ""
    cure: str | None = None
    needed: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All findings of one examination, in the order in which they are shown."""

    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Tell whether nothing that containers need is missing."""
        return not any(f.needed and f.state is State.MISSING for f in self.findings)

    def with_section(self, findings: Iterable[Finding], *, before: str) -> Report:
        """Return the report with more findings, ahead of those of the area `before`."""
        own = self.findings
        place = next((i for i, f in enumerate(own) if f.area == before), len(own))
        return Report(findings=(*own[:place], *findings, *own[place:]))

    @property
    def runs_machines(self) -> bool:
        """Tell whether nothing that virtual machines need is missing."""
        found = [f for f in self.findings if f.area == "vm" and f.name != "kvm"]
        return bool(found) and not any(f.state is State.MISSING for f in found)

    def get(self, name: str) -> Finding:
        """Return the finding of that name; `KeyError` where none was examined."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)


def finding_of(
    area: str,
    name: str,
    failure: str | None,
    *,
    good: str = "",
    cure: str | None = None,
    needed: bool = False,
    worst: State = State.MISSING,
) -> Finding:
    """Return ok with the detail `good` where `failure` is None, else `worst` with the cure."""
    if failure is None:
        return Finding(area=area, name=name, state=State.OK, detail=good, needed=needed)
    return Finding(area=area, name=name, state=worst, detail=failure, cure=cure, needed=needed)
