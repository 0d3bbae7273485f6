"""Build the native programs into the package: for wheels, editable and plain installs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).parent


def build_native(package_root: Path) -> None:
    """Compile native/ and put the binaries beneath `package_root`."""
    target = (package_root / "hutch" / "_native").resolve()
    subprocess.run(["make", "-C", str(HERE / "native"), "install", f"DEST={target}"], check=True)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            build_native(Path(self.build_lib))


class EditableWheel(editable_wheel):
    def run(self) -> None:
        build_native(HERE / "src")
        super().run()


class BdistWheel(bdist_wheel):
    """The binary is static: it suits any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel, "bdist_wheel": BdistWheel},
)
