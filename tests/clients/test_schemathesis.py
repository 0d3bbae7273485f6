"""Schemathesis asks a daemon whatever Docker's description of the API allows, and more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.test_schema import schema
from tests.requires import requires

pytestmark = requires(
    *("root", "overlayfs", "cgroup", "netns", "nftables", "docker-schema", "schemathesis")
)

__all__ = ["schema"]

_LIBRARIES = Path(__file__).parents[2] / "build/schemathesis"
# What waits for something to happen, takes the connection over, or is for a swarm.
_LEFT_OUT = "^/(events|session)$|/attach|/(swarm|plugins|services|secrets|configs|nodes|tasks)"
_PORT = 2399  # in a network name space of its own
_SCRIPT = f"""
ip link set lo up
"$1" -m hutch --root "$2/root" serve --docker tcp://127.0.0.1:{_PORT} --insecure-tcp 2>"$2/log" &
daemon=$!
cd "$2"
PYTHONPATH="$3" "$1" -c 'from schemathesis.cli import schemathesis; schemathesis()' run \
    schema.json --url http://127.0.0.1:{_PORT}/v1.51 --phases coverage,fuzzing \
    --checks response_schema_conformance --max-examples 5 \
    --continue-on-failure --generation-deterministic --wait-for-schema 1 --request-timeout 60 \
    --suppress-health-check all --warnings off --no-color --exclude-path-regex '{_LEFT_OUT}' \
    --exclude-path /images/load --exclude-path /build --exclude-path '/containers/{{id}}/archive'
code=$?
kill $daemon && wait $daemon
exit $code
"""


@pytest.mark.timeout(1900)
def test_no_request_breaks_the_daemon_or_is_answered_otherwise_than_described(
    schema: Any, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    # Without images, so that nothing starts; in name spaces of its own, for networks are made.
    command = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT]
    done = subprocess.run(
        [*command, "sh", sys.executable, str(tmp_path), str(_LIBRARIES)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Traceback" not in (tmp_path / "log").read_text()
