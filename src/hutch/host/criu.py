"""Whether CRIU on this host can save and bring back the processes of containers.

CRIU is asked once; the answer is kept in a cache directory until the program or the running
kernel changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.errors import HutchError, Unsupported
from hutch.host.facts import replace_file
from hutch.host.findings import Finding, State, finding_of
from hutch.host.programs import find_program
from hutch.linux.boot import boot_id

__all__ = ["CriuFacts", "examine_criu", "find_criu", "load_criu"]

FORMAT = 2
OLDEST = (4, 0)
CURE = "apt-get install criu where the distribution has 4.0 or later, or name one in HUTCH_CRIU"
_ASK_S = 60.0
_VERSION = re.compile(r"Version:\s*(\d+)\.(\d+)(\.\d+)?")
_ERROR = re.compile(r"Error \([^)]*\): (.*)")
# What it says of limits that it would like to have and does without.
_HARMLESS = "RLIMIT_NOFILE"


class CriuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A CRIU: where it is, its version, and why it does not work here ("" where it does)."""

    format: int = FORMAT
    path: str
    stamp: str
    version: str
    problem: str = ""


def find_criu() -> str | None:
    """Return the path of the CRIU to be used: HUTCH_CRIU, else the one on PATH."""
    return os.environ.get("HUTCH_CRIU") or find_program("criu")


def load_criu(cache: Path | None, *, program: str | None = None) -> CriuFacts:
    """Return what CRIU can do here; raise `Unsupported` where it is missing or does not work.

    `program` is asked instead of the one to be used. A few hundred milliseconds the first time.
    """
    facts = _load(cache, program or find_criu())
    if facts.problem:
        raise Unsupported(f"CRIU: {facts.problem}", hint=CURE)
    return facts


def _load(cache: Path | None, path: str | None) -> CriuFacts:
    if path is None:
        raise Unsupported("CRIU: the program criu is not installed", hint=CURE)
    if os.geteuid() != 0:
        raise Unsupported("CRIU: needs root", hint="run hutch as root")
    try:
        status = os.stat(path)
    except OSError as exc:
        raise Unsupported(f"CRIU: {path}: {(exc.strerror or '').lower()}", hint=CURE) from exc
    stamp = f"{path}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{boot_id()}"
    file = cache / "criu.json" if cache else None
    if file is not None:
        try:
            known = decode_json(file.read_bytes(), CriuFacts)
        except (OSError, msgspec.DecodeError):
            known = None
        if known is not None and known.format == FORMAT and known.stamp == stamp:
            return known
    facts = _ask(path, stamp)
    if file is not None and file.parent.is_dir():
        replace_file(file, msgspec.json.encode(facts))
    return facts


def _ask(path: str, stamp: str) -> CriuFacts:
    from hutch.process.run import run_command

    def said(*arguments: str) -> tuple[int, str]:
        try:
            done = run_command([path, *arguments], timeout_s=_ASK_S)
        except OSError as exc:
            return 1, f"Error (): {path}: {(exc.strerror or '').lower()}"
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    _, text = said("--version")
    match = _VERSION.search(text)
    version = match.group(0).split(":")[1].strip() if match else ""
    problem = ""
    if match is None:
        problem = f"{path} does not run: {text.strip()[:200]}"
    elif (int(match.group(1)), int(match.group(2))) < OLDEST:
        problem = f"{path} is version {version}, older than {OLDEST[0]}.{OLDEST[1]}"
    else:
        code, text = said("check", "-v1")
        if code:
            errors = [e for e in _ERROR.findall(text) if _HARMLESS not in e]
            problem = errors[0] if errors else text.strip()[-200:] or "its check fails"
            if "Network is unreachable" in problem:
                problem = "the loopback interface is down here: ip link set lo up"
    return CriuFacts(path=path, stamp=stamp, version=version, problem=problem)


def examine_criu(cache: Path | None) -> Iterator[Finding]:
    """Yield what `hutch doctor` says of it."""
    problem: str | None = None
    good = ""
    try:
        facts = load_criu(cache)
        good = f"{facts.version}, {facts.path}: fork, snapshot, suspend and migrate containers"
    except HutchError as exc:
        problem = f"{exc.message.removeprefix('CRIU: ')}: no memory of containers is saved"
    yield finding_of("programs", "criu", problem, good=good, cure=CURE, worst=State.DEGRADED)
