"""Run the benchmarks: `python -m bench.run [--rounds N] [--json FILE] [--svg FILE] [CASE …]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.builds import BUILD_CASES
from bench.cases import CASES, peers
from bench.chart import chart
from bench.docker_api import DOCKER_API_CASES
from bench.jobs import JOB_CASES
from bench.machines import MACHINE_CASES, fetch_kernel, has_kernel, remove_kernel
from bench.measure import Row, render
from bench.migration import MIGRATION_CASES
from bench.peers import install_peers
from bench.protection import PROTECTION_CASES
from bench.pulls import PULL_CASES
from bench.rootdisks import DISK_CASES
from bench.sched import SCHED_CASES, fetch_accasim, remove_accasim
from bench.slurm import install_slurm
from bench.stage import enter_namespaces, is_inside, stage
from hutch.sched.report.drawing import to_svg

Case = Callable[..., Row | list[Row]]
_ON_MACHINES: dict[str, Case] = {**MACHINE_CASES, **MIGRATION_CASES}
_WITHOUT_PEERS: dict[str, Case] = {
    **DISK_CASES,
    **_ON_MACHINES,
    **SCHED_CASES,
    **JOB_CASES,
    **PROTECTION_CASES,
}
_CASES: dict[str, Case] = {
    **CASES,
    **BUILD_CASES,
    **DOCKER_API_CASES,
    **PULL_CASES,
    **_WITHOUT_PEERS,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=", description=__doc__)
    names = ", ".join(_CASES)
    parser.add_argument("case", nargs="*", help=f"which of {names} (all of them)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way")
    parser.add_argument("--json", type=Path, help="also write the samples to this file")
    parser.add_argument("--svg", type=Path, help="also draw the cases that are times")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if os.geteuid() != 0:
        print("the bench needs root: its peers do", file=sys.stderr)
        return 1
    wanted: list[str] = arguments.case or list(_CASES)
    if unknown := set(wanted) - set(_CASES):
        print(f"no such case: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    beside = not set(wanted) <= set(_WITHOUT_PEERS)
    if not is_inside():
        # Before the namespaces: in there, apt reaches no mirror nor a proxy on the loopback.
        for package in install_peers() if beside else []:
            print(f"{package} could not be installed; its cases are left out", file=sys.stderr)
        if set(wanted) & set(_ON_MACHINES):
            reason = fetch_kernel()
            if reason:
                print(f"{reason}: the cases of machines are left out", file=sys.stderr)
        if "jobs" in wanted and (reason := install_slurm()):
            print(reason, file=sys.stderr)
        if "sched-accasim" in wanted and (reason := fetch_accasim()):
            print(reason, file=sys.stderr)
    enter_namespaces()
    if not has_kernel():
        wanted = [name for name in wanted if name not in _ON_MACHINES]
    try:
        rows = _measure(wanted, arguments.rounds, beside=beside)
    finally:
        remove_kernel()
        remove_accasim()
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    if arguments.svg:
        try:
            arguments.svg.write_text(to_svg(chart(rows)))
        except ValueError as exc:
            print(exc, file=sys.stderr)
    missed = [v for row in rows for v in row.verdicts() if "MISSED" in v]
    print(f"{len(rows)} cases; {len(missed)} targets missed")
    return 0


def _measure(wanted: list[str], rounds: int, *, beside: bool) -> list[Row]:
    """Measure the cases and print each; `beside` starts the container engines too."""
    rows: list[Row] = []
    with stage() as where, peers(where, start=beside) as with_peers:
        for name in wanted:
            found = _CASES[name](where, with_peers, rounds)
            for row in found if isinstance(found, list) else [found]:
                rows.append(row)
                print(render([row]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
