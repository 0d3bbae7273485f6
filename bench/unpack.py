"""Unpack one gzip layer: hutch against Python's tarfile and `tar -xzf`, side by side.

`python bench/unpack.py [LAYER.tar.gz] [--directory DIR] [--rounds N] [--json FILE]`.
Without a layer one of 250 MB and 35,000 entries is made. Minimum and median of each, and
the ratios of the minima, are printed.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

_GAP_S = 0.15
_ENTRIES = 35_000
_BYTES = 250 << 20


def make_layer(path: Path) -> None:
    """Write a layer that looks like a distribution's: many small files, a few large."""
    from isal import isal_zlib

    dice = random.Random(7)
    words = [dice.randbytes(6).hex().encode() for _ in range(4000)]
    text = b" ".join(dice.choice(words) for _ in range(400_000))
    noise = dice.randbytes(8 << 20)
    files = int(_ENTRIES * 0.9)
    sizes = [int(dice.paretovariate(1.05) * 500) for _ in range(files)]
    scale = _BYTES / sum(min(size, 20 << 20) for size in sizes)
    press = isal_zlib.compressobj(3, isal_zlib.DEFLATED, 31)
    with open(path, "wb") as out:

        class Pressed(io.RawIOBase):
            def write(self, data: bytes, /) -> int:  # type: ignore[override]
                out.write(press.compress(data))
                return len(data)

        with tarfile.open(fileobj=Pressed(), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for number, size in enumerate(sizes):
                place = f"usr/d{number // 540}/e{number // 9}"
                if number % 9 == 0:
                    info = tarfile.TarInfo(place)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
                info = tarfile.TarInfo(f"{place}/f{number}")
                info.size = max(1, int(min(size, 20 << 20) * scale))
                info.mtime = 1_700_000_000
                source = noise if number % 3 == 0 else text
                at = dice.randrange(max(1, len(source) - min(info.size, len(source))))
                body = source[at : at + info.size]
                body += bytes(info.size - len(body))
                archive.addfile(info, io.BytesIO(body))
        out.write(press.flush())


def with_hutch(layer: Path, target: Path) -> None:
    """Unpack as a pull does."""
    from hutch.storage.unpack import unpack

    fd = os.open(target, os.O_RDONLY)
    with open(layer, "rb", buffering=0) as stream:
        unpack(stream, fd)
    os.close(fd)


def with_tarfile(layer: Path, target: Path) -> None:
    """Unpack with the standard library."""
    with tarfile.open(layer) as archive:
        archive.extractall(target, filter="fully_trusted")


def with_tar(layer: Path, target: Path) -> None:
    """Unpack with GNU tar."""
    subprocess.run(["tar", "-xzf", layer, "-C", target], check=True)


CASES: dict[str, Callable[[Path, Path], None]] = {
    "hutch": with_hutch,
    "tar -xzf": with_tar,
    "tarfile": with_tarfile,
}


def measure(layer: Path, directory: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of every case, rounds taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, case in CASES.items():
            target = Path(tempfile.mkdtemp(dir=directory, prefix="unpack-"))
            gc.collect()
            time.sleep(_GAP_S)
            start = time.perf_counter()
            case(layer, target)
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(target)
    return times


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layer", nargs="?", type=Path)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        layer = options.layer
        if layer is None:
            layer = Path(scratch) / "layer.tar.gz"
            make_layer(layer)
        print(f"layer: {layer.stat().st_size >> 20} MiB compressed")
        times = measure(layer, Path(scratch), options.rounds)
    best = min(times["hutch"])
    for name, found in times.items():
        ratio = best / min(found)
        print(
            f"{name:10} min {min(found):6.2f} s  median {statistics.median(found):6.2f} s"
            f"  hutch/this {ratio:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
