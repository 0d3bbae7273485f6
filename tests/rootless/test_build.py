"""Builds of an ordinary user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.requires import requires
from tests.rootless.test_user import hutch, hutch_with_range

__all__ = ["hutch", "hutch_with_range"]

pytestmark = requires("root", "userns", "overlayfs", "busybox")

TEXT = """\
FROM busybox
COPY --chmod=0755 f /d/
WORKDIR /w
RUN --network=none test $(id -u) = 0 && cat /d/f && echo one > x && rm /bin/true
RUN --network=none --mount=type=cache,target=/c --mount=type=tmpfs,target=/t \\
    --mount=target=/ctx --mount=type=secret,id=s cat /ctx/f /run/secrets/s; touch /c/x /t/x
RUN --network=none --mount=from=busybox,target=/b /b/bin/busybox true; rm -r /d
"""


@pytest.mark.parametrize("who", ["hutch", "hutch_with_range"])
def test_a_user_builds_and_runs(
    who: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run: Callable[..., object] = request.getfixturevalue(who)
    place = Path("/tmp") / f"hutch-build-{tmp_path_factory.mktemp('x').name}-{who}"
    place.mkdir(mode=0o755)
    try:
        (place / "Dockerfile").write_text(TEXT)
        (place / "f").write_text("file\n")
        words = ["build", "--progress=plain", "-t", "built", f"--secret=id=s,src={place}/f"]
        done = run(*words, str(place))
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
        assert done.stderr.count("file\n") >= 2  # type: ignore[attr-defined]
        again = run(*words, str(place))
        assert again.stderr.count("CACHED") == 5  # type: ignore[attr-defined]
        script = "cat x; ls / | grep -c '^[cdtb]$'; test -e /bin/true || echo gone"
        ran = run("run", "--rm", "--network=none", "built", "sh", "-c", script)
        assert ran.stdout == "one\n0\ngone\n", ran.stderr  # type: ignore[attr-defined]
    finally:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
