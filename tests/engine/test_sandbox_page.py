"""What the page about sandboxes shows does what the page says."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hutch
from tests.hosttree import host_tree
from tests.requires import requires

pytestmark = [
    requires("root", "overlayfs", "cgroup"),
    pytest.mark.integration,
    pytest.mark.skipif(not os.path.islink("/lib"), reason="the host's /lib is no part of /usr"),
]

PAGE = Path(__file__).parents[2] / "docs/how-to/sandboxes.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
SHOWN = {
    "import hutch\n\nLIMITS": """0 [1, 2, 3]

the program wrote more than 10000 bytes b'again\\nagain\\n' b''
""",
    "import json": """['', '']
['42\\n', '']
['', 'Traceback (most recent call last):\\n  File "<cell>", line 1, in <module>\\n\
ZeroDivisionError: division by zero\\n']
['', 'Traceback (most recent call last):\\n  File "<cell>", line 1, in <module>\\n\
KeyboardInterrupt\\n']
['6\\n', '']
""",
    "import asyncio": "['0', '1', '4', '9', '16', '25', '36', '49', '64', '81']\n",
}


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A root of the test's own as the default one, with the host's system as an image."""
    monkeypatch.setenv("HUTCH_ROOT", str(tmp_path / "root"))
    with hutch.Engine() as engine:
        engine.images.import_(io.BytesIO(host_tree()), "host:1")
        yield
        left = [info.name for info in engine.list(all=True)]
        engine.reset()
    assert left == []


@pytest.mark.parametrize("begins", SHOWN)
def test_the_page_says_what_happens(
    begins: str, system: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in BLOCKS if block.startswith(begins))
    # A machine with much else to do may need a second to take a cell up.
    block = block.replace("timeout=1)", "timeout=8)")
    block = block.replace('"py:1"', '"host:1"').replace('"network": "none"', MOUNTED)
    block = block.replace('network="none"', f"**{{{MOUNTED}}}")
    exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == SHOWN[begins]


MOUNTED = '"network": "none", "volumes": ["/usr:/usr:ro"]'
