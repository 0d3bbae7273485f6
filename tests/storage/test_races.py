"""Work on one root by several processes at once: nothing recorded is ever incomplete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMPORT = """
import io, sys
from pathlib import Path
from hutch.image.importer import import_image
from tests.image.registries import Root
from tests.storage.tars import end, file
root = Root(Path(sys.argv[1]))
for number in range(12):
    data = file("same", b"x" * 50_000) + file(f"f{number}", b"y") + end()
    record = import_image(io.BytesIO(data), **root.parts(), created_s=number)
    assert all(map(root.content.has, record.digests)), "a blob is gone"
    assert all(map(root.layers.has, record.chain_ids)), "a layer is gone"
    assert root.content.read(record.id)
    if number % 2:
        root.images.delete(record.id)
print("done")
root.close()
"""

COLLECT = """
import sys
from pathlib import Path
from tests.image.registries import Root
root = Root(Path(sys.argv[1]))
collector = root.collector()
print("start", flush=True)
for _ in range(150):
    collector.collect()
print("done")
root.close()
"""


def test_imports_and_collection_do_not_harm_each_other(hutch_root: Path) -> None:
    here = Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(hutch_root)],
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in (COLLECT, IMPORT, IMPORT)
    ]
    for process in running:
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        assert out.endswith("done\n")
