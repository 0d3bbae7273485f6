"""Write the reference pages that are made from the code, or with `--check` compare them.

`docs/reference/cli.md` comes from the command line's own help; `docs/reference/python.md`
from the public signatures and docstrings of the library; `docs/reference/policies.md` from
the scheduling policies; `docs/reference/docker-api.md` from the routes of Docker's API;
`docs/explanation/pictures/` are what the simulator drew.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.docker_answers import Difference

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SOURCE = ROOT / "src" / "hutch"
REFERENCE = ROOT / "docs" / "reference"
PICTURES = ROOT / "docs" / "explanation" / "pictures"
NOTE = "<!-- Made from the code by `make docs`; change the code, not this page. -->\n"

# Module, the public names to show, in the order a reader wants them.
LIBRARY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("engine/facade.py", ("Engine",)),
    ("engine/instance.py", ("Instance",)),
    ("engine/session.py", ("Session",)),
    ("engine/files.py", ("Files",)),
    ("engine/images.py", ("Images",)),
    ("engine/networks.py", ("Networks",)),
    ("engine/volumes.py", ("Volumes",)),
    ("engine/pools.py", ("Pools",)),
    ("storage/pools.py", ("Pool",)),
    ("storage/volume_copies.py", ("VolumeSnapshot",)),
    ("engine/kernels.py", ("Kernels",)),
    ("engine/snapshots.py", ("Snapshots",)),
    ("engine/resources.py", ()),
    ("engine/memory.py", ("MemoryReport", "MemoryUse")),
    ("engine/reclaim.py", ("ReclaimReport", "ReclaimStep")),
    ("resources/ladder.py", ("Measure",)),
    ("resources/admission.py", ("Decision", "Shortage", "Held", "NoRoom")),
    ("resources/demand.py", ("Demand", "Holding")),
    ("resources/inventory.py", ()),
    ("resources/settings.py", ("Settings", "Reserved", "Overcommit", "Watermarks")),
    ("engine/records.py", ("SnapshotRecord",)),
    ("drivers/vm/kernels.py", ("KernelRecord",)),
    ("spec/options.py", ("RunOptions", "UpdateOptions")),
    ("engine/results.py", ()),
    ("aio/__init__.py", ()),
    ("aio/engine.py", ()),
    ("aio/instance.py", ()),
    ("aio/session.py", ()),
    ("testing.py", ()),
    ("sched/simulator.py", ("simulate", "Observer", "SimJob")),
    ("sched/compare.py", ()),
    ("sched/registry.py", ("create", "describe")),
    ("sched/policy.py", ("Policy", "Decisions", "Base")),
    ("sched/job.py", ("Job",)),
    ("sched/ledger.py", ()),
    ("sched/parameters.py", ("Parameter",)),
    ("sched/queues.py", ("MultiLevel", "QueueSpec", "parse_queue")),
    ("sched/estimators.py", ("Estimator", "create_estimator")),
    ("sched/metrics.py", ("Summary", "Distribution", "mean_execution", "weighted_response")),
    ("sched/workload.py", ()),
    ("sched/traces/source.py", ("open_trace", "Trace")),
    ("sched/traces/generate.py", ("generate",)),
    ("sched/traces/write.py", ("write_trace",)),
    ("errors.py", ()),
)


_JSON = """With `-o json` a command that makes or changes one thing prints an object with its `Id`,
`Name` or `Names`; one that takes several names prints a list, at its end, of an object for each
that did not fail, with the `Name` as it was given. An error is one line on stderr:
`{"Error": {"Message": …, "Hint": …, "Kind": …, "ExitCode": …}}`, with `Field`, `Excerpt`, `Notes`
and, where there was no room, the `Admission` decision if there are such. `Kind` is the class in
`hutch.errors`. Progress and warnings on stderr begin with no brace. What has an option `-o` of its
own (`build`, `save`, `volume create`) takes it before the command: `hutch -o json build .`
"""


def cli_page() -> str:
    """Return the reference of the command line."""
    from hutch.cli.help import command_page, overview
    from hutch.cli.main import load_command
    from hutch.cli.table import HIDDEN, TABLE

    parts = [NOTE, "# Command line\n", "```text", overview(None), "```\n", _JSON]
    for words in sorted(TABLE, key=lambda w: (w.count(" "), w)):
        if words in HIDDEN:
            continue
        page = command_page(words, load_command(words))
        parts += [f"## hutch {words}\n", "```text", page.rstrip(), "```\n"]
    return "\n".join(parts)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a function's header as it is called, on one line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    header = f"{node.name}({ast.unparse(node.args)}){returns}"
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return prefix + header.replace("(self, ", "(").replace("(self)", "()")


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


def _members(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            default = f" = {ast.unparse(item.value)}" if item.value is not None else ""
            if not item.target.id.startswith("_"):
                yield f"- `{item.target.id}: {ast.unparse(item.annotation)}{default}`\n"
        elif isinstance(item, ast.Assign) and isinstance(item.value, ast.Call):
            # In hutch.aio: `info = threaded(engine.Instance.info)`.
            name, same = ast.unparse(item.targets[0]), ast.unparse(item.value.args[0])
            yield f"- `await {name}(…)`: as `{same.removeprefix('engine.').removeprefix('Sync')}`\n"
        elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            if item.name.startswith("_") and item.name != "__init__":
                continue
            text = ast.get_docstring(item) or ""
            if _is_property(item):
                returns = ast.unparse(item.returns) if item.returns else ""
                yield _entry(f"{item.name}: {returns}", text)
            elif item.name != "__init__" or text or len(item.args.args) > 1:
                yield _entry(_signature(item), text)


def _entry(heading: str, text: str) -> str:
    return f"#### `{heading}`\n" + (f"\n{text}\n" if text else "")


def _class_section(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    heading = f"### `{node.name}({bases})`" if bases else f"### `{node.name}`"
    return "\n".join([f"{heading}\n", f"{ast.get_docstring(node) or ''}\n", *_members(node)])


def python_page() -> str:
    """Return the reference of the library, read from its source."""
    parts = [NOTE, "# Python library\n"]
    for name, wanted in LIBRARY:
        path = SOURCE / name
        module = ast.parse(path.read_text())
        dotted = "hutch." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        parts += [f"## {dotted}\n", f"{ast.get_docstring(module) or ''}\n"]
        for node in module.body:
            shown = getattr(node, "name", "_")
            if shown.startswith("_") or (wanted and shown not in wanted):
                continue
            if isinstance(node, ast.ClassDef):
                parts.append(_class_section(node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parts.append(f"### `{_signature(node)}`\n\n{ast.get_docstring(node) or ''}\n")
    return "\n".join(parts)


def policies_page() -> str:
    """Return the reference of policies, estimators and generators."""
    from hutch.sched.estimators import ESTIMATORS
    from hutch.sched.registry import POLICIES, find
    from hutch.sched.traces import GENERATORS

    parts = [NOTE, "# Scheduling policies, estimators, generators\n"]
    parts.append(
        "Each is written as its name, then its parameters: `rr:quantum=4`, "
        "`mlfq:levels=4,boost=60`. [Scheduling](../explanation/scheduling.md) says when to "
        "choose which.\n"
    )
    for name in POLICIES:
        cls = find(name)
        parts += [f"## {name}\n", f"{ast.get_docstring(_class_of(cls)) or ''}\n"]
        parts.append(_parameters(cls.parameters))
    parts.append("# Estimators\n")
    for name, known in ESTIMATORS.items():
        parts += [f"## {name}\n", f"{ast.get_docstring(_class_of(known)) or ''}\n"]
        parts.append(_parameters(known.parameters))
    parts.append("# Generators\n")
    for name, (summary, parameters) in GENERATORS.items():
        parts += [f"## {name}\n", f"{summary[0].upper()}{summary[1:]}.\n"]
        parts.append(_parameters(parameters))
    return "\n".join(part for part in parts if part)


def _class_of(cls: type) -> ast.ClassDef:
    """Return the syntax tree of a class, whose docstring is not inherited."""
    import inspect
    import textwrap

    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node


def _parameters(known: Mapping[str, Any]) -> str:
    if not known:
        return ""
    rows = ["| parameter | default | what |", "|---|---|---|"]
    rows += [f"| `{name}` | `{p.default}` ({p.kind}) | {p.summary} |" for name, p in known.items()]
    return "\n".join(rows) + "\n"


DOCKER_INTRO = """`hutch serve --docker unix://PATH` speaks Docker's Engine API, in the versions
{oldest} to {newest}. [How to serve it](../how-to/serve-docker.md) has the commands.

Each endpoint and each of its options *works* as in Docker, *differs* (and how), is *ignored*
(because nothing depends on it), or is *refused* with an error that says why. What is not listed
has no meaning in Docker either. Paths may begin with `/v{newest}`.
"""

DOCKER_DIFFERENCES = """## What differs from Docker 20.10 in one scenario

`make compare-docker` asks Debian's dockerd and hutch the same some 330 things, over HTTP and by
the docker command, and fails for any difference that `scripts/docker_differences.py` does not
name. Those that it names, in the order of the API:
"""
NEWER_DIFFERENCES = """
## What differs from Docker 28

`make compare-docker ARGS=--newer` asks the dockerd of Debian's sid the same, unpacked into a root
of its own. Much of the above differs from 20.10 only, and is there as here. What is named for 28
besides (`scripts/docker_newer_differences.py`):
"""


def docker_page() -> str:
    """Return the reference of Docker's API, from the table of routes."""
    from hutch.api.docker.routes import GROUPS
    from hutch.api.docker.routing import NEWEST, OLDEST, show
    from scripts.docker_differences import NAMED
    from scripts.docker_newer_differences import NEWER

    intro = DOCKER_INTRO.format(oldest=show(OLDEST), newest=show(NEWEST))
    parts = [NOTE, "# Docker Engine API\n", intro]
    for heading, routes in GROUPS:
        parts.append(f"## {heading}\n")
        for route in routes:
            since = f" (since {show(route.since)})" if route.since > OLDEST else ""
            parts.append(f"### `{route.method} {route.path}`\n")
            parts.append(f"{route.summary}{since}: {route.verdict}.\n")
            if route.options:
                rows = ["| option | |", "|---|---|"]
                rows += [f"| `{name}` | {how} |" for name, how in route.options.items()]
                parts.append("\n".join(rows) + "\n")
    differ = [DOCKER_DIFFERENCES, *_reasons(NAMED), NEWER_DIFFERENCES, *_reasons(NEWER)]
    return "\n".join([*parts, *differ])


def _reasons(names: tuple[Difference, ...]) -> list[str]:
    reasons = dict.fromkeys(name.why for name in names)
    return [f"- {why[0].upper()}{why[1:]}." if why[0] != "`" else f"- {why}." for why in reasons]


def pages() -> dict[Path, str]:
    """Return each generated page and its text."""
    from scripts.pictures import pictures

    texts = {
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "python.md": python_page(),
        REFERENCE / "policies.md": policies_page(),
        REFERENCE / "docker-api.md": docker_page(),
    }
    drawn = {PICTURES / name: text for name, text in pictures().items()}
    return drawn | {
        path: "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        for path, text in texts.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if outdated")
    check = parser.parse_args().check
    outdated = []
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        outdated.append(path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in outdated:
        print(f"{path.relative_to(ROOT)}: {'is outdated; run make docs' if check else 'written'}")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
