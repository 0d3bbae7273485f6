"""What two daemons answered, with what must differ taken out, and what differs all the same."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Difference", "Found", "Side", "compare", "is_named"]

_TIMEOUT_S = 120.0
_NOTHING = "(absent)"


class Difference(NamedTuple):
    """A difference that is meant: where it is found (two patterns) and why it is there."""

    step: str
    path: str
    why: str


class Found(NamedTuple):
    """A difference that was found."""

    step: str
    path: str
    docker: Any
    hutch: Any

    def __str__(self) -> str:
        return f"{self.step} {self.path}: docker {self.docker!r:.500}, hutch {self.hutch!r:.500}"


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


class Side:
    """One daemon: asks it, and keeps each answer under the name of its step."""

    def __init__(self, path: Path, program: str, version: str) -> None:
        self._path = path
        self._version = version
        self._program = program
        self.steps: dict[str, Any] = {}

    def ask(
        self,
        step: str,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Ask over HTTP and return the answer's content; with an empty `step` it is not kept."""
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = _Connection(self._path)
        try:
            connection.request(method, f"/{self._version}{path}", body, sent)
            response = connection.getresponse()
            kind = response.headers.get("Content-Type", "")
            content = _content(kind, response.read(), path)
        except TimeoutError as exc:
            raise TimeoutError(f"{self._path}: {step or 'a step'}: {method} {path}") from exc
        finally:
            connection.close()
        if step:
            self.steps[step] = {"status": response.status, "type": kind, "body": content}
            stat = response.headers.get("X-Docker-Container-Path-Stat")
            if stat:
                self.steps[step]["has stat"] = True
        return content

    def run(self, step: str, *arguments: str, input: bytes = b"") -> str:
        """Run the docker command; its output and exit code are kept."""
        done = subprocess.run(
            [self._program, "--host", f"unix://{self._path}", *arguments],
            input=input,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
        output = done.stdout.decode(errors="replace")
        if step:
            told = done.stderr.decode(errors="replace")
            self.steps[step] = {
                "code": done.returncode,
                "output": output.splitlines(),
                "errors": told.splitlines(),
            }
        return output


# ---- reading ------------------------------------------------------------------------------


def _content(kind: str, data: bytes, path: str) -> Any:
    if not data:
        return None
    if kind.startswith("application/x-tar"):
        return _members(data)
    if "/logs" in path or "/attach" in path or "/start" in path:
        return _streams(data)
    try:
        return json.loads(data)
    except ValueError:
        pass
    try:
        return _joined([json.loads(line) for line in data.splitlines() if line.strip()])
    except ValueError:
        return data.decode(errors="replace")


def _joined(lines: list[Any]) -> list[Any]:
    """Return the lines of a progress stream with what is text put together."""
    if not any(isinstance(line, dict) and "stream" in line for line in lines):
        return lines
    text = "".join(line["stream"] for line in lines if "stream" in line)
    return [*text.splitlines(), *(line for line in lines if "stream" not in line)]


def _members(data: bytes) -> Any:
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in archive:
            found.append(
                {
                    "name": entry.name.rstrip("/"),
                    "type": entry.type.decode(),
                    "mode": oct(entry.mode & 0o7777),
                    "size": entry.size,
                    "owner": [entry.uid, entry.gid],
                    "link": entry.linkname,
                }
            )
    return sorted(found, key=lambda entry: str(entry["name"]))


def _streams(data: bytes) -> Any:
    """Return what each stream has, of a multiplexed answer; the text of another."""
    found: dict[str, str] = {}
    rest = data
    while len(rest) >= 8 and rest[0] in (0, 1, 2) and rest[1:4] == b"\0\0\0":
        size = int.from_bytes(rest[4:8], "big")
        name = ("stdin", "stdout", "stderr")[rest[0]]
        found[name] = found.get(name, "") + rest[8 : 8 + size].decode(errors="replace")
        rest = rest[8 + size :]
    if found and not rest:
        return found
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


# ---- what must differ ---------------------------------------------------------------------

_TEXTS = (
    (re.compile(r"\b(sha256:)?[0-9a-f]{64}\b"), r"<id>"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "<id>"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z| ?[+-]\d\d:?\d\d( \w+)?)"), "<time>"),
    (re.compile(r"\b172\.\d+\.\d+\.\d+\b|\b192\.168\.\d+\.\d+\b"), "<address>"),
    (re.compile(r"\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b"), "<mac>"),
    (re.compile(r"(Less than a second|About a minute|\d+ (second|minute)s?)( ago)?"), "<ago>"),
    (re.compile(r"/[^\s:,]*hutch-compare-[^\s:,]*"), "<path>"),
    (re.compile(r"^\d+ {4,}"), "<pid> "),
)
# Values that say where, when or how much: only whether they are there is compared.
_VALUES = frozenset(
    """Created CreatedAt StartedAt FinishedAt LastTagTime time timeNano Start End Pid read preread
    SandboxID SandboxKey EndpointID NetworkID ResolvConfPath HostnamePath HostsPath LogPath
    MergedDir UpperDir LowerDir WorkDir DeviceId DeviceName DeviceSize Mountpoint Source
    SizeRootFs SizeRw SystemTime ID NFd NGoroutines MemTotal NEventsListener KernelVersion
    Gateway IPAddress MacAddress IPv6Gateway GlobalIPv6Address LayersSize PublicPort
    SpaceReclaimed usage total_usage usage_in_kernelmode usage_in_usermode system_cpu_usage limit
    max_usage stats rx_bytes rx_packets current percpu_usage execDuration
    io_service_bytes_recursive io_serviced_recursive""".split()
)


_UNSORTED = frozenset("Mounts Volumes Ports Env".split())  # Docker has them in any order
# Measured: whatever it is, it is not compared.
_MEASURED = frozenset(
    """periods throttled_periods throttled_time usage_in_kernelmode usage_in_usermode tx_bytes
    tx_packets SizeRw FailingStreak""".split()
)


def plain(value: Any, key: str = "body") -> Any:
    """Return an answer without what cannot be the same."""
    if key in _MEASURED:
        return "<measured>"
    if key in _VALUES and value not in (None, "", 0, [], {}, "0001-01-01T00:00:00Z"):
        return "<some>"
    if isinstance(value, dict):
        return {plain(name): plain(member, name) for name, member in value.items()}
    if key == "Processes" and isinstance(value, list):
        return [[plain(cell) for cell in row[1:]] for row in value]
    if isinstance(value, list):
        members = [plain(member) for member in value]
        return sorted(members, key=_place) if key in _UNSORTED or _are_changes(value) else members
    if isinstance(value, str):
        for pattern, replacement in _TEXTS:
            value = pattern.sub(replacement, value)
    return value


def _are_changes(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(m, dict) and {"Path", "Kind"} == m.keys() for m in value)


def _place(member: Any) -> str:
    if not isinstance(member, dict):
        return str(member)
    return str([member.get(name) for name in ("Path", "Destination", "Name", "PrivatePort")])


# ---- comparing ----------------------------------------------------------------------------


def compare(docker: dict[str, Any], hutch: dict[str, Any]) -> list[Found]:
    """Return where the steps of the two differ."""
    found: list[Found] = []
    for step in {**docker, **hutch}:
        ours, theirs = hutch.get(step, _NOTHING), docker.get(step, _NOTHING)
        for path, left, right in _differing(plain(theirs), plain(ours), ""):
            found.append(Found(step, path or ".", left, right))
    return found


def _differing(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted({*left, *right}, key=str):
            yield from _differing(
                left.get(name, _NOTHING), right.get(name, _NOTHING), f"{path}.{name}"
            )
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for one, other in zip(left, right, strict=True):
            yield from _differing(one, other, f"{path}[]")
    elif left != right or isinstance(left, bool) != isinstance(right, bool):
        yield path, left, right


def is_named(found: Found, named: Difference) -> bool:
    """Tell whether a difference is one that is named."""
    return bool(re.fullmatch(named.step, found.step) and re.fullmatch(named.path, found.path))


def unnamed(found: Sequence[Found], named: Sequence[Difference]) -> list[Found]:
    """Return the differences that no name is for."""
    return [one for one in found if not any(is_named(one, name) for name in named)]
