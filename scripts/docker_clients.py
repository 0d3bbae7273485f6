"""Run the tests with real clients of Docker's API: docker-py, aiodocker, Testcontainers, Compose
(the host's and sid's), skopeo, podman; Schemathesis asks what Docker's description allows. What
they need beside the host's packages is kept in build/clients, build/compose and
build/schemathesis.

A target of its own (nightly): it fetches packages, and bootstraps a PostgreSQL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, source

CLIENTS = ROOT / "build" / "clients"
SCHEMA = CLIENTS / "swagger.yaml"
# Compose of the second generation, which is a plugin of Docker's command line and a program.
COMPOSE = ROOT / "build" / "compose" / "docker-compose"
WANTED = (
    "aiodocker==0.27.0",
    "docker==7.2.0",
    "jsonschema==4.26.0",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
    "pg8000==1.31.5",
    "testcontainers==4.15.0",
)
# By itself: it needs libraries that the tests have in other versions.
FUZZER = ROOT / "build" / "schemathesis"
PROGRAMS = {"docker-compose": "docker-compose", "podman": "podman", "skopeo": "skopeo"}


def main() -> int:
    install()
    fetch_schema()
    fetch_compose()
    paths = [str(CLIENTS), str(ROOT)]
    variables = os.environ | {"HUTCH_CLIENTS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "tests/clients", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def install() -> None:
    """Have the packages; quick when they are there."""
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if missing:
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, stdout=sys.stderr)
    _keep(CLIENTS, WANTED)
    _keep(FUZZER, ("schemathesis==4.32.5",))


def _keep(directory: Path, wanted: tuple[str, ...]) -> None:
    stamp = directory / ".wanted"
    if stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return
    shutil.rmtree(directory, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(directory), *wanted]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    stamp.write_text("\n".join(wanted))


def fetch_schema() -> None:
    """Have Docker's description of its API, from the package with its sources in Debian's sid."""
    if SCHEMA.exists():
        return
    wanted = source("sid")
    if wanted is None:
        print("no mirror of Debian's: answers are not checked against the schema", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="hutch-docker-") as workspace:
        (package,) = fetch(wanted, Path(workspace), "golang-github-docker-docker-dev")
        tree = Path(workspace, "tree")
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
        (found,) = tree.glob("usr/share/gocode/src/github.com/docker/docker/api/swagger.yaml")
        shutil.copy(found, SCHEMA)


def fetch_compose() -> None:
    """Have the newest Compose of Debian's sid."""
    if COMPOSE.exists():
        return
    suite, problem = make_from_first(("sid", "forky"), _make_compose)
    if not suite:
        print(f"no newer Compose from {problem}: it is not tested", file=sys.stderr)


def _make_compose(wanted: Source, workspace: Path) -> None:
    """Keep the program, and see that it runs here before it gets its name."""
    (package,) = fetch(wanted, workspace, "docker-compose")
    subprocess.run(["dpkg-deb", "-x", str(package), str(workspace / "tree")], check=True)
    COMPOSE.parent.mkdir(parents=True, exist_ok=True)
    beside = COMPOSE.with_name(f".docker-compose-{os.getpid()}")
    shutil.copy(workspace / "tree/usr/libexec/docker/cli-plugins/docker-compose", beside)
    try:
        subprocess.run([str(beside), "version"], check=True, capture_output=True, text=True)
    except BaseException:
        beside.unlink()
        raise
    beside.rename(COMPOSE)


if __name__ == "__main__":
    sys.exit(main())
