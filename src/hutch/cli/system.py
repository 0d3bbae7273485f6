"""The host and the engine: doctor, info, version, df, prune, events, reconcile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli.command import FORMAT, Command
from hutch.cli.options import UsageError
from hutch.cli.output import print_json, show_rows, stamp, table_lines, to_json, visible
from hutch.cli.prompt import confirm
from hutch.cli.session import Invocation
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine import Event

__all__ = ["COMMANDS"]


def _doctor(invocation: Invocation) -> int:
    from pathlib import Path

    from hutch.engine.context import default_root
    from hutch.engine.examination import examine_host
    from hutch.host.doctor import render_table

    report = examine_host(Path(invocation.root) if invocation.root else default_root())
    if invocation.json:
        print_json(
            {
                "usable": report.usable,
                "machines": report.runs_machines,
                "findings": report.findings,
            }
        )
    else:
        print(render_table(report), end="")
    return 0 if report.usable or report.runs_machines else 1


def _info(invocation: Invocation) -> int:
    import msgspec

    info = invocation.engine.info()
    values = msgspec.to_builtins(info)
    template = invocation.options.get("format")
    if invocation.json or template == "json":
        print_json(values)
        return 0
    if template:
        from hutch.cli.template import Template

        names = {name.title().replace("_", ""): value for name, value in values.items()}
        print(Template(template).render(names | values))
        return 0
    values["memory"] = format_bytes(info.memory)
    for name, value in values.items():
        print(f"{name.replace('_', ' ').capitalize() + ':':<14} {value}")
    return 0


def _version(invocation: Invocation) -> int:
    from hutch import __version__

    template = invocation.options.get("format")
    if invocation.json or template == "json":
        print_json({"Version": __version__})
    elif template:
        from hutch.cli.template import Template

        # Docker has one of its client and one of its server; here they are one.
        own = {"Version": __version__}
        print(Template(template).render(own | {"Client": own, "Server": own}))
    else:
        print(f"hutch {__version__}")
    return 0


def _check(invocation: Invocation) -> int:
    from hutch.cli.progress import pull_progress

    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        report = invocation.engine.check(repair=invocation.flag("repair"), progress=progress)
    if invocation.json:
        print_json(report)
    else:
        for damage in report.damaged:
            again = ": thrown away, to be made anew" if damage.name in report.repaired else ""
            print(f"{damage.kind} {damage.name}: {damage.reason}{again}")
        print(f"{report.checked} examined, {len(report.damaged)} damaged")
    return 0 if len(report.damaged) == len(report.repaired) else 1


_DF_COLUMNS = (
    ("TYPE", "Type"),
    ("TOTAL", "TotalCount"),
    ("ACTIVE", "Active"),
    ("SIZE", "Size"),
    ("RECLAIMABLE", "Reclaimable"),
)


def _df(invocation: Invocation) -> int:
    usage = invocation.engine.df()
    if invocation.json:
        print_json(usage.rows)
        return 0
    rows = []
    for row in usage.rows:
        share = f" ({row.reclaimable * 100 // row.size}%)" if row.size else ""
        rows.append(
            {
                "Type": row.kind.capitalize(),
                "TotalCount": str(row.total),
                "Active": str(row.active),
                "Size": format_bytes(row.size),
                "Reclaimable": format_bytes(row.reclaimable) + share,
            }
        )
    return show_rows(invocation, rows, _DF_COLUMNS, identifier="Type")


def _prune(invocation: Invocation) -> int:
    every, volumes = invocation.flag("all"), invocation.flag("volumes")
    parts = ["all stopped instances", "all networks that no instance uses"]
    parts.append("all templates of virtual machines")
    parts.append("the whole build cache" if every else "the build cache that no image has")
    parts.append("all images that no instance uses" if every else "all images without a name")
    if volumes:
        parts.append("all anonymous volumes that no instance uses")
    if every:
        parts.append("all guest kernels that no instance uses but the newest")
    if not confirm(invocation, "This removes " + ", ".join(parts) + "."):
        return 1
    report = invocation.engine.prune(
        all_images=every, volumes=volumes, filters=invocation.filters() or None
    )
    if invocation.json:
        print_json(report)
        return 0
    for title, names in (
        ("Deleted Containers", report.instances),
        ("Deleted Networks", report.networks),
        ("Deleted Volumes", report.volumes),
        ("Deleted Images", report.images),
        ("Deleted Kernels", report.kernels),
    ):
        if names:
            print(f"{title}:", *names, "", sep="\n")
    if report.templates:
        print(f"Deleted Templates: {report.templates}", "", sep="\n")
    if report.build_cache:
        print(f"Deleted build cache entries: {report.build_cache}", "", sep="\n")
    print(f"Total reclaimed space: {format_bytes(report.reclaimed)}")
    return 0


def _reset(invocation: Invocation) -> int:
    import os

    from hutch.cli.progress import pull_progress
    from hutch.engine.context import default_root
    from hutch.engine.reset import is_root
    from hutch.errors import NotFound

    root = os.path.abspath(invocation.root or default_root())
    if not is_root(root):
        raise NotFound(f"{root}: is no root of hutch", hint="name one with --root or HUTCH_ROOT")
    engine = invocation.engine
    info, volumes, pools = engine.info(), len(engine.volumes.list()), len(engine.pools.list())
    parts = [f"{info.instances} instances ({info.running} running)", f"{info.images} images"]
    parts += [f"{volumes} volumes with their data", f"{pools} pools"]
    warning = f"This ends and removes everything in {root}: {', '.join(parts)}, networks, "
    if not confirm(invocation, warning + "snapshots, jobs, kernels and templates."):
        return 1
    with pull_progress(quiet=invocation.json) as progress:
        report = engine.reset(progress=progress)
    if invocation.json:
        print_json(report)
        return 0
    for name in report.kept:
        print(f"Kept: {report.root}/{name}")
    print(f"Removed: {report.root}")
    return 0


def _gc(invocation: Invocation) -> int:
    from hutch.units import parse_duration

    values = invocation.options
    high, _, low = (values.get("watermark") or "").partition(":")
    older = values.get("older_than")
    report = invocation.engine.gc(
        watermark=_percent(high) if high else None,
        low=_percent(low) if low else None,
        older_than=parse_duration(older, field="older-than") if older else None,
        dry_run=invocation.flag("dry_run"),
    )
    if invocation.json:
        print_json(report)
    else:
        for name in report.images:
            print(name)
        print(f"Disk: {report.before:.1f}% to {report.after:.1f}% full")
        print(f"Total reclaimed space: {format_bytes(report.freed)}")
    return 0 if report.reached else 1


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise UsageError(
            f"--watermark: expected HIGH[:LOW] in percent, got {text[:40]!r}"
        ) from None


def _events(invocation: Invocation) -> int:
    from hutch.units import parse_moment

    values = invocation.options
    since, until = values.get("since"), values.get("until")
    stream = invocation.engine.events(
        since=parse_moment(since, "since") if since else None,
        until=parse_moment(until, "until") if until else None,
        filters=invocation.filters() or None,
        follow=not invocation.flag("no_follow"),
    )
    template = values.get("format")
    for event in stream:
        print(_event_line(event, template, as_json=invocation.json), flush=True)
    return 0


def _event_line(event: Event, template: str | None, *, as_json: bool) -> str:
    shape = {
        "Type": event.kind,
        "Action": event.action,
        "Actor": {"ID": event.subject, "Attributes": event.attributes},
        "scope": "local",
        "time": event.time_ns // 1_000_000_000,
        "timeNano": event.time_ns,
    }
    if as_json or template == "json":
        return to_json(shape, indent=False)
    if template:
        from hutch.cli.template import Template

        return Template(template).render(shape)
    details = ", ".join(f"{k}={v}" for k, v in sorted(event.attributes.items()))
    extra = visible(f" ({details})") if details else ""
    return f"{stamp(event.time_ns)} {event.kind} {event.action} {event.subject}{extra}"


def _reconcile(invocation: Invocation) -> int:
    report = invocation.engine.reconcile()
    if invocation.json:
        print_json(report)
        return 0
    rows = [
        ("exits booked", len(report.booked)),
        ("migrations settled", len(report.migrations)),
        ("instances removed", len(report.removed)),
        ("control groups removed", len(report.groups)),
        ("directories removed", len(report.directories)),
        ("addresses freed", len(report.endpoints)),
        ("space freed", format_bytes(report.reclaimed)),
    ]
    for line in table_lines(("WHAT", "COUNT"), rows):
        print(line)
    return 0


def _template(invocation: Invocation) -> int:
    if _is_gone(invocation):
        return 0
    invocation.engine.prepare_template(invocation.arguments[0])
    return 0


def _is_gone(invocation: Invocation) -> bool:
    """Tell whether the root was given up meanwhile: to open it would make it anew."""
    from hutch.engine.context import default_root
    from hutch.engine.reset import is_root

    return not is_root(invocation.root or default_root())


def _exited(invocation: Invocation) -> int:
    from hutch.errors import NotFound

    if _is_gone(invocation):
        return 0
    try:
        invocation.engine.after_exit(invocation.arguments[0])
    except NotFound:
        return 0
    return 0


def _dispatch(invocation: Invocation) -> int:
    from hutch.engine.jobs.background import IDLE_S
    from hutch.errors import Busy

    if _is_gone(invocation):
        return 0
    try:
        invocation.engine.jobs.dispatch(idle=IDLE_S, background=True)
    except Busy:
        pass
    return 0


_DOCTOR = Command(
    handler=_doctor,
    summary="Try what this host can do; say what is missing, and its cure.",
    examples=("hutch doctor", "hutch -o json doctor"),
)
_INFO = Command(
    handler=_info,
    summary="Show what this engine and this host are.",
    options=(("format", "f", *FORMAT[2:]),),
    examples=("hutch info", "hutch info -f '{{.Kernel}}'"),
)
_DF = Command(
    handler=_df,
    summary="Show what takes space.",
    options=(FORMAT, ("verbose", "v", "flag", "", "Accepted, without effect")),
    examples=("hutch df",),
)
_EVENTS = Command(
    handler=_events,
    summary="Show what happens, as it happens.",
    options=(
        ("filter", "f", "list", "KEY=VALUE", "type=…, event=…, container=…, image=…, label=…"),
        FORMAT,
        ("no-follow", "", "flag", "", "End after what has happened so far"),
        ("since", "", "text", "TIME", "From this time on: 10m, RFC 3339 or Unix time"),
        ("until", "", "text", "TIME", "Up to this time"),
    ),
    examples=("hutch events --filter type=container", "hutch events --since 1h --no-follow"),
)

COMMANDS = {
    "doctor": _DOCTOR,
    "system doctor": _DOCTOR,
    "info": _INFO,
    "system info": _INFO,
    "df": _DF,
    "system df": _DF,
    "events": _EVENTS,
    "system events": _EVENTS,
    "version": Command(
        handler=_version,
        summary="Show the version.",
        options=(("format", "f", *FORMAT[2:]),),
        examples=("hutch version -f '{{.Version}}'",),
    ),
    "system prune": Command(
        handler=_prune,
        summary="Remove everything that nothing uses.",
        options=(
            (
                "all",
                "a",
                "flag",
                "",
                "All unused images, not only those without a name, and unused guest kernels",
            ),
            ("filter", "", "list", "KEY=VALUE", "Remove what matches only"),
            ("force", "f", "flag", "", "Do not ask"),
            ("volumes", "", "flag", "", "Anonymous volumes as well"),
        ),
        examples=("hutch system prune -f",),
    ),
    "system reset": Command(
        handler=_reset,
        summary="Give the root up: end and remove everything in it and made for it.",
        options=(("force", "f", "flag", "", "Do not ask"),),
        epilog="Instances are killed; images, volumes, pools, networks, snapshots, jobs and "
        "kernels go, and with them mounts, bridges, packet rules and control groups of this "
        "root. registries.json and certificates in tls/ are kept. Interrupted, it goes on when "
        "it is asked for again.",
        examples=("hutch system reset", "hutch --root /tmp/try system reset -f"),
    ),
    "system gc": Command(
        handler=_gc,
        summary="Free what nothing names; images by age, and by how full the disk is.",
        options=(
            ("dry-run", "", "flag", "", "Say which images would go"),
            ("older-than", "", "text", "DURATION", "Images that no instance has used for so long"),
            (
                *("watermark", "", "text", "HIGH[:LOW]"),
                "Where the disk is fuller than HIGH percent, unused images until it is at LOW",
            ),
        ),
        epilog="Of unused images those go first that were used longest ago. Instances, volumes "
        "and snapshots are never touched. Exits with 1 where the watermark was not reached.",
        examples=("hutch system gc --older-than 7d", "hutch system gc --watermark 85:75"),
    ),
    "system check": Command(
        handler=_check,
        summary="Read what the root holds against its digests.",
        options=(
            ("quiet", "q", "flag", "", "Show no progress"),
            ("repair", "", "flag", "", "Throw damaged root disks away, to be made anew"),
        ),
        epilog="Blobs, root disks of virtual machines, guest kernels; and the tables of disks of "
        "machines that do not run. Exits with 1 where something is damaged and stays so.",
        examples=("hutch system check", "hutch system check --repair"),
    ),
    "system reconcile": Command(
        handler=_reconcile,
        summary="Put the records right after a crash or a power cut.",
        examples=("hutch system reconcile",),
    ),
    "_template": Command(
        handler=_template,
        summary="Make the template of an image that starts have asked for.",
        arguments="KEY",
        low=1,
        high=1,
    ),
    "_dispatch": Command(
        handler=_dispatch,
        summary="Dispatch jobs until there are none.",
    ),
    "_exited": Command(
        handler=_exited,
        summary="Do what follows the exit of an instance.",
        arguments="INSTANCE",
        low=1,
        high=1,
    ),
}
