"""The documentation agrees with the code and with itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ANCHOR = re.compile(r"\[[^]]*\]\(([^)#\s]*)#([^)\s]+)\)")
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)[^)]*\)")


def test_the_generated_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/docs.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text()) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_into_pages_lead_to_a_heading(page: Path) -> None:
    missing = [
        f"{target}#{heading}"
        for target, heading in ANCHOR.findall(page.read_text())
        if "://" not in target
        and heading not in _headings(page.parent / target if target else page)
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_pages_show_of_python_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(textwrap.dedent(block), str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            ahead += [page.parent / t for t in LINK.findall(page.read_text()) if "://" not in t]
    assert [page for page in PAGES if page not in reached] == []


def test_every_dependency_has_a_licence_and_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["pictures"], *extras["telemetry"]]
    names = {re.split(r"[<>=~!]", need)[0] for need in needed}
    table = (ROOT / "docs/adr/0022-dependencies.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9, -]+) \| .+ \| .+ \| .+ \|$", table, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} - {"package"} == names


def _headings(page: Path) -> set[str]:
    """Return the anchors that a page's headings have where it is shown."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
