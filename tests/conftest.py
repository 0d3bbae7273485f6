"""Fixtures and rules for every test: needs of the host, a root of its own, nothing leaked.

Marks: `requires` (see `tests.requires`), `integration` (checked for leaks at its end),
`serial` (must have the machine to itself), `slow`. A test with none of `requires`,
`integration`, `serial` and `slow` is `unit` and runs in `make check`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzzing import LONGER
from tests.leaks import global_snapshot, wait_until_clean
from tests.requires import MUST_HOLD, missing

# Made in the background, they would be found as left behind; their own tests ask for them.
os.environ.setdefault("HUTCH_IMAGE_TEMPLATES", "0")
_CI = os.environ.get("HUTCH_CI") == "1"
_ALONE = "PYTEST_XDIST_WORKER" not in os.environ
_WHOLE_MACHINE = _ALONE and (_CI or os.environ.get("HUTCH_LEAKS") == "all")


def pytest_configure(config: pytest.Config) -> None:
    # Started in the background by a shell, or by nohup, we and our children would ignore Ctrl-C
    # and a terminal that goes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # How long it takes to think of an input says how busy the machine is; and the suite finds
    # what it found the day before, but for a longer run (tests/fuzzing.py).
    settings.register_profile(
        "hutch",
        suppress_health_check=[HealthCheck.too_slow],
        deadline=None,
        derandomize=LONGER == 1,
    )
    settings.load_profile("hutch")
    for line in (
        "requires(*needs): what the test needs of the host, from tests.requires",
        "integration: touches the kernel; checked for leaks at its end",
        "serial: must not run beside other tests",
        "slow: takes more than a few seconds",
        "soak: more of what other tests see a part of; with HUTCH_SOAK=1 only",
        "versions: also run with other versions of QEMU and of the guests' kernel (nightly)",
        "unit: needs nothing of the host (set by tests/conftest.py)",
    ):
        config.addinivalue_line("markers", line)


# What takes longest comes first, so that at the end of a parallel run no worker is left alone
# with it.
_FIRST = (
    "tests/migration/test_live",
    "tests/vm/test_saved",
    "tests/migration",
    "tests/vm",
    "tests/cli",
    "tests/engine",
    "tests/api",
)


def _rank(item: pytest.Item) -> int:
    found = (i for i, prefix in enumerate(_FIRST) if item.nodeid.startswith(prefix))
    return next(found, len(_FIRST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("HUTCH_SOAK"):
        later = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    items.sort(key=_rank)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if not marks & {"requires", "integration", "serial", "slow"}:
            item.add_marker(pytest.mark.unit)
        if _CI:
            # A machine that other work starves for a minute is no news about the change. The
            # closing line counts such tests, and each is named with what it said.
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=2))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = {need for mark in item.iter_markers("requires") for need in mark.args}
    # Root first: the other probes fail without it and would hide the reason.
    for need in sorted(needs, key=lambda n: (n != "root", n)):
        reason = missing(need)
        if reason is None:
            continue
        if _CI and need in MUST_HOLD:
            pytest.fail(f"this machine was set up to have {need}: {reason}", pytrace=False)
        pytest.skip(f"{need}: {reason}")


@pytest.fixture
def hutch_root(tmp_path: Path) -> Path:
    """An empty state directory of the test's own, on the temporary file system."""
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    return root


@pytest.fixture
def busybox_rootfs(tmp_path: Path) -> Path:
    """A small root file system: static busybox with all its applets, the test's own copy."""
    reason = missing("busybox")
    if reason:
        (pytest.fail if _CI else pytest.skip)(reason)
    busybox = shutil.which("busybox")
    assert busybox is not None
    root = tmp_path / "busybox"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    shutil.copy2(busybox, root / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\n"
        "daemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
    )
    (root / "etc/group").write_text("root:x:0:\ndaemon:x:1:\nusers:x:100:\nnogroup:x:65534:\n")
    return root


@pytest.fixture
def leak_check(tmp_path: Path) -> Iterator[None]:
    """Fail the test if mounts, processes, cgroups, devices or descriptors stay behind."""
    before = global_snapshot() if _WHOLE_MACHINE else None
    yield
    left = wait_until_clean(tmp_path, before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(sorted(left)), pytrace=False)


@pytest.fixture(autouse=True)
def _check_integration_tests_for_leaks(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("integration"):
        request.getfixturevalue("leak_check")
