"""The library's types as a user's checker sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import hutch
import hutch.aio
from hutch import errors

def good(engine: hutch.Engine) -> bytes:
    done = engine.run("busybox", ["true"], network="none", memory="64M", timeout=10)
    with engine.start("busybox", volumes=["/tmp:/m:ro"]) as box:
        box.files.write("/x", b"data")
        with box.exec_stream(["cat"], stdin=True) as session:
            for piece in session.output():
                if isinstance(piece, hutch.Output):
                    return piece.data
    try:
        return done.stdout + box.exec("true", check=True).stdout
    except (hutch.CommandError, errors.NotFound) as problem:
        return str(problem).encode()

async def also_good(engine: hutch.aio.Engine) -> bytes:
    async with await engine.start("busybox", ["sleep", "60"]) as box:
        return (await box.exec(["id"])).stdout + await box.files.read("/etc/passwd")
"""
WRONG = """
hutch.Enginee
good(engine=1)
hutch.Engine().run("busybox", memroy="64M")
hutch.Engine().run("busybox").exit_code.upper()
"""


def check(program: str, directory: Path) -> list[str]:
    """Return what mypy --strict says of a program."""
    (directory / "program.py").write_text(program)
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "program.py"],
        cwd=directory,
        env=os.environ | {"MYPYPATH": str(source)},
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_a_typed_program_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    assert check(PROGRAM, tmp_path) == []
    said = check(PROGRAM + WRONG, tmp_path)
    first = PROGRAM.count("\n") + 2
    assert {line.split(":")[1] for line in said if "error" in line} == {
        str(first + n) for n in range(len(WRONG.strip().splitlines()))
    }
