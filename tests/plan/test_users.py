"""Who a container's process is, by the files of its image and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hutch.drivers.base import Launch
from hutch.drivers.container.assets import AssetBuilder


class _Launch:
    """What a launch says of users and layers."""

    rootfs = ""

    def __init__(self, upper: Path, lower: Path) -> None:
        class Process:
            user = "app"
            groups: tuple[str, ...] = ()

        class Spec:
            process = Process()

        self.spec = Spec()
        self.upper, self.lower = str(upper), (str(lower),)


def test_an_instances_own_password_file_counts_and_an_images_is_read_once(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    upper.mkdir()
    (lower / "etc").mkdir(parents=True)
    (lower / "etc/passwd").write_text("app:x:5:6::/home/app:/bin/sh\n")
    builder = AssetBuilder(tmp_path, cast(Any, None))
    launch = cast(Launch, _Launch(upper, lower))
    assert (builder._user(launch).uid, builder._user(launch).home) == (5, "/home/app")
    (upper / "etc").mkdir()
    (upper / "etc/passwd").write_text("app:x:7:8::/:/bin/sh\n")
    assert (builder._user(launch).uid, builder._user(launch).gid) == (7, 8)
    (upper / "etc/passwd").unlink()
    assert builder._user(launch).uid == 5
