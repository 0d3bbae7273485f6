"""Rules of the code base that import-linter cannot express."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "hutch"
MODULES = sorted(p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py"))
SPAWNERS = {"fork", "forkpty", "posix_spawn", "posix_spawnp", "popen", "system", "vfork"}
VAGUE = {"utils", "helpers", "manager", "common", "misc"}
LINES_MAX = 1000


def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / module).read_text())


def os_calls(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                yield name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("process/")])
def test_only_the_process_package_starts_processes(module: str) -> None:
    assert not SPAWNERS & set(os_calls(module))


@pytest.mark.parametrize("module", MODULES)
def test_no_process_is_started_through_a_shell_or_with_preexec_fn(module: str) -> None:
    keywords = [n for n in ast.walk(tree(module)) if isinstance(n, ast.keyword)]
    assert not [k for k in keywords if k.arg == "preexec_fn"]
    assert not [
        k
        for k in keywords
        if k.arg == "shell" and isinstance(k.value, ast.Constant) and k.value.value is True
    ]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_grows_past_the_wall(module: str) -> None:
    assert len((SOURCE / module).read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_named_for_what_it_does(module: str) -> None:
    assert Path(module).stem not in VAGUE


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__.py")])
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module))
