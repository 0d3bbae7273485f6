"""`system memory`: who has the memory, what reclaim did about it, and doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli.command import Command
from hutch.cli.options import UsageError
from hutch.cli.output import print_json, table_lines, to_json
from hutch.cli.session import Invocation
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine.memory import MemoryReport, MemoryUse
    from hutch.engine.reclaim import ReclaimReport, ReclaimStep

__all__ = ["COMMANDS"]


def _memory(invocation: Invocation) -> int:
    resources = invocation.engine.resources
    watching = invocation.flag("watch")
    if invocation.flag("release"):
        if watching or invocation.flag("reclaim") or invocation.flag("dry_run"):
            raise UsageError("--release goes alone")
        return _show_steps(invocation, tuple(resources.release()))
    if watching or invocation.flag("reclaim") or invocation.flag("dry_run"):
        if watching:
            return _watch(invocation)
        done = resources.reclaim(dry_run=invocation.flag("dry_run"))
        if invocation.json:
            print_json(done)
            return 0
        for line in (*_picture(done.after), "", *_steps(done.steps)):
            print(line)
        return 1 if any(step.error for step in done.steps) else 0
    report = resources.memory()
    if invocation.json:
        print_json(report)
        return 0
    for line in _picture(report):
        print(line)
    return 0


def _watch(invocation: Invocation) -> int:
    from hutch.units import parse_duration

    interval = parse_duration(invocation.options.get("interval") or "5s", field="interval")
    if not interval:
        raise UsageError("--interval: must be above 0")
    for done in invocation.engine.resources.watch(interval):
        if invocation.json:
            print(to_json(done, indent=False), flush=True)
            continue
        if done.steps:
            print(_summary(done), flush=True)
            for step in done.steps:
                print(f"  {_step_line(step)}", flush=True)
    return 0


def _show_steps(invocation: Invocation, steps: tuple[ReclaimStep, ...]) -> int:
    if invocation.json:
        print_json(steps)
    else:
        for line in _steps(steps):
            print(line)
    return 1 if any(step.error for step in steps) else 0


def _picture(report: MemoryReport) -> list[str]:
    stalls = "stalls not told by the kernel"
    if report.some is not None:
        stalls = f"stalls {report.some:g}% some, {report.full or 0:g}% all"
    swap = f", swap {format_bytes(report.swap_free)} free" if report.swap else ", no swap"
    lines = [
        f"memory {format_bytes(report.total)}, {format_bytes(report.available)} available"
        f"{swap}; pressure {report.level} ({stalls})"
    ]
    if report.merged:
        lines.append(f"equal pages save {format_bytes(report.merged)}")
    lines += ["", *_instances(report.instances)]
    if report.measures:
        rows = [
            (m.rung, m.name or "the host", format_bytes(m.given), m.reason) for m in report.measures
        ]
        lines += ["", *table_lines(("IN FORCE", "ON", "GAVE BACK", "WHY"), rows)]
    return lines


def _instances(uses: tuple[MemoryUse, ...]) -> list[str]:
    rows = [
        (
            use.name,
            use.kind,
            use.state,
            format_bytes(use.usage),
            format_bytes(use.working_set),
            format_bytes(use.cache),
            format_bytes(use.guarantee) if use.guarantee else "-",
            format_bytes(use.guest or use.limit or 0) if use.guest or use.limit else "-",
            f"{use.idle_s:.0f}s" if use.idle_s >= 1 else "-",
            ",".join(use.measures) or "-",
        )
        for use in sorted(uses, key=lambda use: -use.usage)
    ]
    titles = "INSTANCE KIND STATE HAS NEEDS FILES PROMISED LIMIT IDLE RECLAIM".split()
    return table_lines(titles, rows)


def _summary(done: ReclaimReport) -> str:
    free = format_bytes(done.before.available), format_bytes(done.after.available)
    return f"{done.before.level} to {done.after.level}: {free[0]} to {free[1]} available"


def _steps(steps: tuple[ReclaimStep, ...]) -> list[str]:
    return [_step_line(step) for step in steps] or ["nothing to do"]


def _step_line(step: ReclaimStep) -> str:
    what = f"undo {step.rung}" if step.undone else step.rung
    line = f"{what} {step.name or 'the host'}: {format_bytes(step.given)}"
    if step.error:
        return f"{line}; failed: {step.error}"
    return f"{line} ({step.reason})"


COMMANDS = {
    "system memory": Command(
        handler=_memory,
        summary="Show who has the memory and what reclaim has in force; make a pass of it.",
        options=(
            ("dry-run", "", "flag", "", "Say what a pass would do"),
            ("interval", "", "text", "DURATION", "Time between passes with --watch (5s)"),
            ("reclaim", "", "flag", "", "Make one pass: take back, or undo what was done"),
            ("release", "", "flag", "", "Undo everything that is in force"),
            ("watch", "", "flag", "", "Make passes until interrupted, at once at a stall"),
        ),
        epilog="The rungs are those of the setting `ladder`, in its order: balloon, cache and "
        "swap unless configured; merge, hold, freeze, suspend and kill where you name them.",
        examples=(
            "hutch system memory",
            "hutch system memory --reclaim",
            "hutch system memory --watch --interval 2s",
            "hutch system configure ladder=balloon,cache,swap,hold,freeze,suspend,kill",
        ),
    ),
}
