"""Builds: commands, stages, the cache, secrets, reproducibility, and what they leave behind."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hutch import aio
from hutch.dockerfile import SourceError, StepFailed
from hutch.engine import Engine
from hutch.engine.builder.build import Build, Cancelled
from hutch.engine.builder.cachedirs import CacheDirectories
from hutch.engine.builder.leftovers import BUILD_LABEL
from hutch.errors import Exhausted, HutchError, InvalidArgument, NotFound, Unsupported
from hutch.spec.process import DEFAULT_PATH
from hutch.storage import gc
from tests.engine.building import Builder, context, kinds
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]

NONE: Any = {"network": "none"}


@pytest.fixture
def build(engine: Engine) -> Builder:
    return Builder(engine)


@pytest.fixture
def unique() -> str:
    """A text that makes keys of steps this test's own."""
    return os.urandom(6).hex()


# ---- commands -----------------------------------------------------------------------------


def test_a_built_image_runs(build: Builder, unique: str) -> None:
    image = build(
        f"FROM busybox\nARG NAME=world\nENV GREETING='hello there'\nWORKDIR /w\nUSER 5:6\n"
        f"RUN test $(id -u):$(id -g) = 5:6 && test $PWD = /w && echo {unique}\n"
        'USER root\nRUN echo "$GREETING $NAME" > said\nLABEL a=b\nCMD ["cat", "said"]\n',
        tags=["built:1", "built:2"],
        build_args={"NAME": "you"},
        labels={"c": "d"},
        **NONE,
    )
    assert unique in build.output()
    record = build.engine.images.get("built:2")
    assert record.id == image
    assert record.config.labels == {"a": "b", "c": "d"}
    assert record.config.env[-1] == "GREETING=hello there"
    assert build.engine.run("built:1").stdout == b"hello there you\n"
    assert json.loads(build.engine.images.config(image))["history"][-1]["created_by"].startswith(
        "CMD ["
    )
    build.engine.images.remove(image, force=True)


def test_shells_documents_and_lists_are_run(build: Builder, unique: str) -> None:
    build(
        f'FROM busybox\nSHELL ["/bin/sh", "-xc"]\nRUN : {unique}\n'
        'SHELL ["/bin/sh", "-c"]\nRUN ["/bin/echo", "$HOME", "two words"]\n'
        "RUN <<EOF\nset -e\nx=in\necho $x document\nEOF\n"
        "RUN <<EOF\n#!/bin/cat\nscript itself\nEOF\n"
        "RUN cat <<-one && cat <<'two'\n\tfirst $((1+1))\n\tone\nsecond $x\ntwo\n",
        **NONE,
    )
    said = build.output()
    assert f"+ : {unique}" in said and "$HOME two words" in said
    assert "in document" in said and "#!/bin/cat\nscript itself" in said
    assert "first 2" in said and "second $x" in said


def test_a_command_that_fails_is_told_with_its_line(build: Builder, unique: str) -> None:
    with pytest.raises(StepFailed) as caught:
        build(f"FROM busybox\nRUN echo {unique} && \\\n  exit 7\n", **NONE)
    assert caught.value.exit_code == 7
    assert caught.value.message.startswith("Dockerfile:2: ")
    assert "   3 | >>>   exit 7" in caught.value.excerpt
    assert kinds(build, "RUN") == ["error"]


def test_arguments_are_seen_by_commands_and_not_kept(build: Builder, unique: str) -> None:
    image = build(
        f"FROM busybox\nARG A\nARG B=two\nRUN echo {unique} $A-$B-$C-$HTTP_PROXY-$TARGETARCH-\n",
        build_args={"A": "one", "C": "three", "HTTP_PROXY": "http://proxy.invalid"},
        **NONE,
    )
    assert f"{unique} one-two--http://proxy.invalid--" in build.output()
    config = build.engine.images.config(image).decode()
    assert "proxy.invalid" not in config and '"A=one"' not in config
    assert [e.text for e in build.events if e.kind == "warning" and "argument C" in e.text]


def test_a_step_has_no_network_unless_it_may(build: Builder, unique: str) -> None:
    build(f"FROM busybox\nRUN --network=none echo {unique}; ls /sys/class/net\n")
    assert build.output().split() == [unique, "lo"]


def test_what_a_command_deletes_is_gone_and_mount_points_are_no_change(
    build: Builder, unique: str
) -> None:
    image = build(
        f"FROM busybox\nRUN mkdir /d && echo {unique} > /d/x && touch /d/y\nRUN rm /d/x\n"
        "RUN --mount=type=cache,target=/deep/er/cache --mount=type=tmpfs,target=/mem true\n",
        **NONE,
    )
    layers = build.layers(image)
    assert sorted(p.name for p in layers[-3].iterdir()) == ["d"]
    assert (layers[-2] / "d" / "x").is_char_device()
    assert list(layers[-1].iterdir()) == []


# ---- stages -------------------------------------------------------------------------------


def test_only_needed_stages_are_built_and_others_read(build: Builder, unique: str) -> None:
    build(
        f"FROM busybox AS one\nRUN echo {unique} > /f\n"
        "FROM busybox AS never\nRUN exit 1\n"
        "FROM one AS two\nRUN echo more >> /f\n"
        "FROM scratch\nCOPY --from=two /f /two\nCOPY --from=0 /f /one\n"
        "COPY --from=busybox /bin/sh /\n",
        tags=["staged:1"],
        **NONE,
    )
    assert not any("exit 1" in e.name for e in build.events)
    (two, one, _) = build.layers("staged:1")
    assert (two / "two").read_text() == f"{unique}\nmore\n"
    assert (one / "one").read_text() == f"{unique}\n"
    assert build("FROM busybox\nRUN true\nFROM scratch AS t\nLABEL x=y\nFROM busybox\nRUN exit 1\n",
                 target="t")  # fmt: skip
    build.engine.images.remove("staged:1")


def test_stages_that_do_not_need_each_other_run_at_once(build: Builder, unique: str) -> None:
    """Each waits for the other through a shared cache: in turn they would never end."""
    meet = f"--mount=type=cache,id={unique},target=/c"
    wait = "for i in $(seq 600); do test -e /c/{other} && exit 0; sleep 0.1; done; exit 1"
    build(
        f"FROM busybox AS a\nRUN {meet} touch /c/a; {wait.format(other='b')}\n"
        f"FROM busybox AS b\nRUN {meet} touch /c/b; {wait.format(other='a')}\n"
        "FROM scratch\nCOPY --from=a /bin/sh /a\nCOPY --from=b /bin/sh /b\n",
        **NONE,
    )
    assert kinds(build, "RUN") == ["done", "done"]


def test_triggers_of_a_base_run_first(build: Builder, unique: str) -> None:
    base = build(
        f"FROM busybox\nONBUILD COPY f /f\nONBUILD RUN echo {unique} >> /f\nRUN true\n",
        tags=["trigger:1"],
        **NONE,
    )
    assert build.engine.images.get(base).config.on_build[0] == "COPY f /f"
    child = build("FROM trigger:1\nRUN cat /f\n", {"f": "file\n"}, **NONE)
    assert build.output() == f"file\n{unique}\n"
    assert build.engine.images.get(child).config.on_build == ()
    build.engine.images.remove("trigger:1")


def test_another_platform_is_named_and_refused(build: Builder) -> None:
    with pytest.raises(Unsupported, match="linux/s390x"):
        build("FROM scratch\nLABEL a=b\n", platform="linux/s390x")
    with pytest.raises(Unsupported, match="linux/s390x") as caught:
        build("FROM --platform=linux/s390x busybox\n")
    assert "Dockerfile:1" in caught.value.message


# ---- the cache ----------------------------------------------------------------------------


def test_an_unchanged_build_is_all_cache_and_the_same_image(build: Builder, unique: str) -> None:
    text = f"FROM busybox\nWORKDIR /w\nCOPY f .\nRUN echo {unique} >> f\nCMD cat f\n"
    first = build(text, {"f": "1"}, **NONE)
    assert kinds(build, "RUN") == ["done"]
    assert build(text, {"f": "1"}, **NONE) == first
    assert kinds(build, "RUN") + kinds(build, "COPY") + kinds(build, "WORKDIR") == ["cached"] * 3
    assert build(text, {"f": "2"}, **NONE) != first
    assert kinds(build, "RUN") == ["done"]
    assert build(text, {"f": "1"}, no_cache=True, **NONE)
    assert kinds(build, "RUN") + kinds(build, "COPY") == ["done", "done"]


def test_a_step_depends_on_content_not_on_how_it_came(build: Builder, unique: str) -> None:
    text = f"FROM busybox\nCOPY {{source}} /f\nRUN echo {unique}; cat /f\n"
    build(text.format(source="a"), {"a": "same", "b": "same"}, **NONE)
    build(text.format(source="b"), {"a": "same", "b": "same"}, **NONE)
    assert kinds(build, "RUN") == ["cached"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ENV A=1", "ENV A=2"),
        ("USER 1", "USER 2"),
        ("WORKDIR /tmp", "WORKDIR /"),
        ('SHELL ["/bin/sh", "-c"]', 'SHELL ["/bin/sh", "-ec"]'),
    ],
)
def test_what_a_command_sees_makes_it_another(
    build: Builder, unique: str, before: str, after: str
) -> None:
    build(f"FROM busybox\nWORKDIR /tmp\n{before}\nRUN echo {unique}\n", **NONE)
    build(f"FROM busybox\nWORKDIR /tmp\n{after}\nRUN echo {unique}\n", **NONE)
    assert kinds(build, "RUN") == ["done"]


def test_two_equal_builds_at_once_do_each_step_once(build: Builder, unique: str) -> None:
    mount = f"--mount=type=cache,id={unique},target=/c"
    text = f"FROM busybox\nRUN {mount} echo x >> /c/count; sleep 0.3\n"
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(Builder(build.engine)(text, **NONE)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    build(f"FROM busybox\nRUN --mount=type=cache,id={unique},target=/c wc -l < /c/count\n", **NONE)
    assert build.output().strip() == "1"


def test_the_cache_is_seen_pruned_and_collected(build: Builder, unique: str) -> None:
    engine = build.engine
    text = f"FROM busybox\nRUN --mount=type=cache,id={unique},target=/c echo {unique} > /f\n"
    image = build(text, **NONE)
    (item,) = [item for item in engine.build_cache() if f"echo {unique}" in item.description]
    assert item.kind == "run" and item.shared
    (mount,) = [item for item in engine.build_cache() if item.description == unique]
    assert mount.kind == "cache mount"
    row = next(row for row in engine.df().rows if row.kind == "build cache")
    assert row.total >= 2 and row.size >= item.size
    engine.images.remove(image)
    assert build(text, **NONE) == image, "the cache outlives the image"
    assert kinds(build, "RUN") == ["cached"]
    engine.images.remove(image)
    report = engine.prune_build_cache(filters={"description": [item.description]})
    assert len(report.records) == 1 and report.reclaimed > 0
    assert build(text, **NONE)
    assert kinds(build, "RUN") == ["done"]
    assert engine.prune_build_cache(filters={"id": [mount.id]}).mounts
    with pytest.raises(InvalidArgument, match="unknown filter"):
        engine.prune_build_cache(filters={"nonsense": ["x"]})


def test_a_lost_blob_is_made_again(build: Builder, unique: str) -> None:
    engine = build.engine
    text = f"FROM busybox\nRUN echo {unique} > /f\n"
    record = engine.images.get(build(text, **NONE))
    layer = record.layers[-1]
    os.unlink(engine._context.content.path(layer.digest))
    engine._context.layers.remove(layer.chain_id)
    assert build(text, **NONE)
    assert kinds(build, "RUN") == ["done"]


# ---- mounts -------------------------------------------------------------------------------


def test_caches_keep_their_content_and_sharing(build: Builder, unique: str) -> None:
    text = "FROM busybox\nRUN --mount=type=cache,id={u}{more},target=/c {do}\n"
    build(
        text.format(u=unique, more=",mode=0707,uid=3", do="stat -c %a:%u /c; echo 1 > /c/f"), **NONE
    )
    assert build.output() == "707:3\n"
    build(text.format(u=unique, more="", do="cat /c/f"), **NONE)
    assert build.output() == "1\n"
    build(text.format(u=unique, more=",ro,sharing=locked", do="touch /c/x 2>&1 || true"), **NONE)
    assert "Read-only" in build.output()


def test_caches_are_taken_in_one_order_and_once_and_after_stages(
    build: Builder, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two commands wait for each other's, or one for its own, for ever."""
    taken: list[str] = []
    use, stage = CacheDirectories.use, Build.stage_files

    def noted(self: CacheDirectories, identifier: str, *rest: Any) -> Any:
        assert identifier not in taken, "it is held already"
        taken.append(identifier)
        return use(self, identifier, *rest)

    def waited(self: Build, name: str) -> Any:
        taken.append(name)
        return stage(self, name)

    monkeypatch.setattr(CacheDirectories, "use", noted)
    monkeypatch.setattr(Build, "stage_files", waited)
    one, two = f"{unique}-1", f"{unique}-2"
    build(
        "FROM busybox AS s\nRUN mkdir /d && touch /d/there\nFROM busybox\n"
        f"RUN --mount=type=cache,id={two},target=/2,sharing=locked "
        f"--mount=type=cache,id={one},target=/1,sharing=locked,from=s,source=/d "
        f"--mount=type=cache,id={two},target=/again touch /2/x && ls /1 /again\n",
        **NONE,
    )
    assert list(dict.fromkeys(taken)) == ["s", one, two]
    assert {"x", "there"} <= set(build.output().split())


def test_a_cache_that_is_pruned_while_it_is_taken_is_made_anew(
    engine: Engine, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = CacheDirectories(engine._context)

    def use() -> Any:
        return directories.use(unique, "locked", lambda: None, lambda _path: None)

    with use():
        (cache,) = [one for one in directories.all() if one.id == unique]
    flock = fcntl.flock

    def late(fd: int, kind: int) -> None:
        monkeypatch.undo()
        assert directories.remove(cache.key)
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with use():
        assert [one.in_use for one in directories.all() if one.id == unique] == [True]
        assert not directories.remove(cache.key)
    assert directories.remove(cache.key)


def test_files_of_context_and_stages_are_mounted_and_not_kept(build: Builder, unique: str) -> None:
    image = build(
        f"FROM busybox AS s\nRUN mkdir /d && echo {unique} > /d/f\nRUN echo upper > /d/g\n"
        "FROM busybox\n"
        "RUN --mount=target=/ctx,rw cat /ctx/c/f && touch /ctx/new\n"
        "RUN --mount=target=/one,source=c/f cat /one; touch /one 2>&1 || true\n"
        "RUN --mount=from=s,source=/d,target=/s cat /s/f /s/g\n"
        "RUN --mount=from=s,source=/d/f,target=/t,rw cat /t; echo changed > /t\n"
        "RUN --mount=from=busybox,target=/b /b/bin/echo all\n",
        {"c/f": "from context\n"},
        **NONE,
    )
    said = build.output()
    assert said.count("from context\n") == 2 and said.count(f"{unique}\n") == 2
    assert "Read-only" in said and "upper\n" in said and "all\n" in said
    assert all(not list(layer.iterdir()) for layer in build.layers(image)[1:])
    with pytest.raises(NotFound):
        build("FROM busybox\nRUN --mount=target=/x,source=../../etc/passwd cat /x\n", **NONE)


def test_a_filtered_context_is_mounted_filtered(build: Builder, unique: str) -> None:
    files = {".dockerignore": "hidden\n", "hidden": "h", "seen": "s"}
    build(f"FROM busybox\nRUN --mount=target=/c echo {unique}; ls /c\n", files, **NONE)
    assert build.output().split() == [unique, "Dockerfile", "seen"]


def _everything(root: Path) -> bytes:
    """Return all that a root has on disk, compressed blobs as they unpack.

    The database is read by another process: to close a file of it here takes away the locks
    that SQLite has on it (fcntl(2)), and then others may delete its log.
    """
    import gzip

    parts = []
    for place, _, names in os.walk(root):
        for name in names:
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                command = ["cat", str(path)]
                if name.startswith("hutch.db"):
                    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                else:
                    data = path.read_bytes()
                parts.append(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    return b"\n".join(parts)


def _in_memory(value: bytes) -> list[Path]:
    """Return the files that builds keep in memory, also those of other tests, with this in them."""
    found = []
    for path in Path("/dev/shm").glob("hutch-build-*/**/*"):
        with suppress(OSError):
            if path.is_file() and value in path.read_bytes():
                found.append(path)
    return found


def test_secrets_are_seen_by_their_step_and_kept_nowhere(build: Builder, unique: str) -> None:
    value = f"s3cret-{unique}".encode()
    image = build(
        "FROM busybox\n"
        f"RUN --mount=type=secret,id=t,uid=3,mode=0440 stat -c %a:%u /run/secrets/t; : {unique}; "
        "wc -c < /run/secrets/t\n"
        "RUN --mount=type=secret,id=t,env=TOKEN,target=/x "
        'test "$TOKEN" = "$(cat /x)" && echo same\n'
        "RUN --mount=type=secret,id=missing ls /run/secrets 2>/dev/null || echo none\n",
        secrets={"t": value},
        **NONE,
    )
    assert build.output().split() == ["440:3", str(len(value)), "same", "none"]
    engine = build.engine
    engine._context.trash.drain(30)
    assert value not in _everything(engine.root)
    assert not _in_memory(value)
    assert value.decode() not in str(build.events) and value not in engine.images.config(image)
    with pytest.raises(SourceError, match="is required"):
        build("FROM busybox\nRUN --mount=type=secret,id=no,required true\n", **NONE)
    build(
        "FROM busybox\nRUN --mount=type=secret,id=t,uid=3,mode=0440 "
        f"stat -c %a:%u /run/secrets/t; : {unique}; wc -c < /run/secrets/t\n",
        secrets={"t": b"another"},
        **NONE,
    )
    assert kinds(build, "RUN") == ["cached"], "a secret is in no key"


def test_an_agent_is_reached(build: Builder, unique: str, tmp_path: Path) -> None:
    path = f"/tmp/agent-{unique}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            build(
                f"FROM busybox\nRUN --mount=type=ssh test -S $SSH_AUTH_SOCK && echo {unique}\n",
                ssh=[f"default={path}"],
                **NONE,
            )
        finally:
            os.unlink(path)
    assert build.output() == f"{unique}\n"
    with pytest.raises(InvalidArgument, match="no socket"):
        build("FROM busybox\n", ssh=[f"default={__file__}"])


# ---- what comes out -----------------------------------------------------------------------


def test_a_date_makes_builds_the_same(build: Builder, unique: str) -> None:
    text = (
        f"FROM busybox\nWORKDIR /w\nCOPY <<E f\n{unique}\nE\nRUN date +%N > /dev/null; touch a b; "
        "mkdir d; ln a d/l; ln -s a s\n"
    )
    manifests = set()
    for _ in range(2):
        image = build(text, no_cache=True, source_date_epoch=1_234_567_890, **NONE)
        manifests.add(build.engine.images.get(image).manifest_digest)
        time.sleep(1.1)  # the clock's second has to be another
    assert len(manifests) == 1
    assert build.engine.images.get(image).created == "2009-02-13T23:31:30Z"
    again = build(text, build_args={"SOURCE_DATE_EPOCH": "1234567890"}, **NONE)
    assert again == image
    with pytest.raises(InvalidArgument, match="SOURCE_DATE_EPOCH"):
        build(text, build_args={"SOURCE_DATE_EPOCH": "soon"})


def test_squashed_layers_do_what_they_did(build: Builder, unique: str) -> None:
    text = (
        f"FROM busybox\nRUN mkdir /d && echo {unique} > /d/a && echo b > /d/b && rm /bin/true\n"
        "RUN rm /d/a && rm -r /bin/false && mkdir /bin/false && echo x > /bin/false/x\n"
        "RUN rm -r /d && mkdir /d && echo c > /d/c && rm -rf /tmp && mkdir /tmp && touch /tmp/t\n"
    )
    plain = build(text, **NONE)
    squashed = build(text, squash=True, **NONE)
    engine = build.engine
    assert len(engine.images.get(squashed).layers) == len(engine.images.get(plain).layers) - 2
    script = "cd /; find d tmp bin | sort; cat d/c bin/false/x"
    both = [engine.run(image, ["sh", "-c", script], **NONE).stdout for image in (plain, squashed)]
    assert both[0] == both[1]
    assert b"d/a" not in both[0] and b"bin/true\n" not in both[0]


def test_outputs_go_to_a_directory_or_an_archive(
    build: Builder, unique: str, tmp_path: Path
) -> None:
    text = "FROM scratch\nCOPY --chown=9:9 f /d/f\n"
    assert build(text, {"f": unique}, outputs=[str(tmp_path / "out")]) == ""
    assert (tmp_path / "out" / "d" / "f").read_text() == unique
    assert (tmp_path / "out" / "d" / "f").stat().st_uid == os.geteuid()
    build(text, {"f": unique}, outputs=[f"type=oci,dest={tmp_path}/o.tar"], tags=["oci:1"])
    build.engine.images.remove("oci:1", force=True)
    (loaded,) = build.engine.images.load(f"{tmp_path}/o.tar")
    assert loaded.names == ("docker.io/library/oci:1",)
    build.engine.images.remove("oci:1", force=True)
    with pytest.raises(InvalidArgument, match="unknown type"):
        build(text, {"f": unique}, outputs=["type=nonsense"])


def test_further_contexts_are_read(build: Builder, unique: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(unique)
    found = build.files(
        "FROM base AS b\nFROM scratch\nCOPY --from=more f /f\nCOPY --from=b /bin/sh /sh\n",
        contexts={"more": str(tmp_path), "base": "docker-image://busybox"},
    )
    assert found["f"][1] == unique.encode() and "sh" in found


def test_a_context_stands_for_the_stage_that_has_its_name(
    build: Builder, unique: str, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text(unique)
    if os.geteuid() == 0:
        os.chown(tmp_path / "f", 1234, 1234)
    text = (
        "FROM nowhere.invalid/none AS Tool\nRUN exit 1\n"
        "FROM tool AS on\nRUN --mount=from=tool,target=/m exit 1\n"
        "FROM tool\nENV A=1\nCOPY --from=0 f /copied\nCOPY --from=tool f /again\n"
    )
    found = build.files(text, contexts={"tool": str(tmp_path)})
    assert {found[name][1] for name in ("f", "copied", "again")} == {unique.encode()}
    assert {found[name][0].uid for name in ("f", "copied", "again")} == {0}
    made = build(
        text, contexts={"TOOL": "docker-image://busybox", "on": str(tmp_path)}, target="on"
    )
    assert build.engine.images.get(made).layers
    found = build.files(
        text.replace(" f ", " /bin/sh "), contexts={"tool": "docker-image://busybox"}
    )
    assert "copied" in found and "bin/sh" in found


# ---- ends ---------------------------------------------------------------------------------


def _wait(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_build_that_is_stopped_ends_its_commands(build: Builder, unique: str) -> None:
    stop = threading.Event()
    seen: list[Any] = []

    def progress(event: Any) -> None:
        seen.append(event)
        if event.kind == "output":
            stop.set()

    with pytest.raises(Cancelled):
        build.engine.build(
            context({"Dockerfile": f"FROM busybox\nRUN echo {unique}; sleep 1000\n"}),
            stop=stop,
            progress=progress,
            network="none",
        )
    assert build.engine.list(all=True) == []


async def _cancelled(engine: Engine, unique: str) -> None:
    import asyncio

    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def progress(event: Any) -> None:
        if event.kind == "output":
            loop.call_soon_threadsafe(began.set)

    async with aio.Engine(engine.root) as other:
        task = asyncio.create_task(
            other.build(
                context({"Dockerfile": f"FROM busybox\nRUN echo {unique}; sleep 1000\n"}),
                progress=progress,
                network="none",
            )
        )
        await asyncio.wait_for(began.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_cancelled_task_ends_its_build(engine: Engine, unique: str) -> None:
    import asyncio

    asyncio.run(_cancelled(engine, unique))
    assert engine.list(all=True) == []


@pytest.mark.parametrize("reconciled", [False, True])
def test_a_command_ends_with_the_process_that_builds(
    build: Builder, unique: str, tmp_path: Path, reconciled: bool
) -> None:
    """Its supervisor sees to it, and what the build kept goes too; or whoever comes first."""
    engine = build.engine
    (tmp_path / "Dockerfile").write_text(
        f"FROM busybox\nRUN --mount=type=secret,id=s echo {unique}; sleep 1000\n"
    )
    (tmp_path / "secret").write_text(unique)
    process = subprocess.Popen(
        [sys.executable, "-m", "hutch", "--root", str(engine.root), "build", "--network=none",
         "--progress=plain", f"--secret=id=s,src={tmp_path}/secret", str(tmp_path)],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.split()[-1:] == [unique.encode()] and b"RUN" not in line:
                break
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finally:
        process.kill()
        if process.stderr is not None:
            process.stderr.close()
    if reconciled:
        engine.reconcile()
    _wait(lambda: not engine.list(all=True))
    _wait(lambda: not _in_memory(unique.encode()))
    with sqlite3.connect(engine.root / "hutch.db") as database:
        assert BUILD_LABEL not in "".join(database.iterdump())
    database.close()


def test_an_image_that_has_the_label_of_steps_is_no_step(build: Builder, unique: str) -> None:
    image = build(f"FROM busybox\nLABEL {BUILD_LABEL}={unique}\n")
    kept = build.engine.create(image, ["true"], **NONE)
    try:
        assert kept.info().labels[BUILD_LABEL] == unique
        build("FROM scratch\nLABEL a=b\n")
        build.engine.reconcile()
        assert [info.id for info in build.engine.list(all=True)] == [kept.id]
    finally:
        kept.remove(force=True)
        build.engine.images.remove(image, force=True)


def test_what_is_pruned_while_it_is_found_is_made_anew(
    build: Builder, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are found are held together, once something needs them."""
    engine = build.engine
    text = f"FROM busybox\nRUN echo {unique} > /f\nRUN echo more >> /f\n"
    engine.images.remove(build(text, **NONE), force=True)
    build.events = []
    monkeypatch.setattr(gc, "_CLOCK_S", -3600.0)  # what was made just now is old

    def progress(event: Any) -> None:
        build.events.append(event)
        if kinds(build, "RUN") == ["cached", "cached"]:
            engine.prune_build_cache(all_entries=True)

    image = engine.build(context({"Dockerfile": text}), progress=progress, network="none").id
    assert kinds(build, "RUN") == ["cached", "cached", "done", "done"]
    assert engine.run(image, ["cat", "/f"], **NONE).text == f"{unique}\nmore\n"


def test_a_stage_reads_one_further_down(build: Builder, unique: str) -> None:
    text = (
        "FROM scratch AS a\nCOPY --from=c /f /g\nFROM scratch AS c\nCOPY f /f\n"
        "FROM scratch\nCOPY --from=a /g /h\n"
    )
    assert build.files(text, {"f": unique}, parallel=1)["h"][1] == unique.encode()


def test_a_trigger_reads_no_stage_that_waits_for_it(build: Builder, unique: str) -> None:
    base = build("FROM scratch\nONBUILD COPY --from=late /f /g\n", tags=[f"{unique}:1"])
    text = f"FROM {unique}:1 AS a\nFROM a AS late\nCOPY f /f\n"
    with pytest.raises(SourceError, match="is built after this one"):
        build(text, {"f": "x"})
    build.engine.images.remove(base, force=True)


def test_an_image_from_scratch_has_a_path(build: Builder) -> None:
    config = build.engine.images.get(build("FROM scratch\nENV PATH=$PATH:/z\n")).config
    assert config.env == (f"{DEFAULT_PATH}:/z",)


def test_a_failure_at_any_event_leaves_nothing(build: Builder, unique: str) -> None:
    """Whatever is told raises in turn: then every step is undone."""
    text = f"FROM busybox\nWORKDIR /w\nCOPY f .\nRUN --mount=type=cache,target=/c echo {unique}\n"

    class Stop(Exception):
        pass

    count = 0
    while True:
        left = count

        def progress(_event: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        try:
            build.engine.build(
                context({"Dockerfile": text, "f": "x"}),
                progress=progress,
                no_cache=True,
                network="none",
            )
            break
        except (Stop, HutchError):
            count += 1
        assert build.engine.list(all=True) == []
    assert count > 8
    assert list((build.engine.root / "instances").iterdir()) == []


def test_options_that_mean_nothing_are_refused(build: Builder) -> None:
    for options, message in (
        ({"nonsense": 1}, "no such option"),
        ({"target": 5}, "expected a text"),
        ({"secrets": ["src=x"]}, "needs an id"),
        ({"secrets": {"x": 5}}, "expected bytes"),
        ({"cache_from": ["type=gha"]}, "unknown type"),
        ({"cache_to": ["type=registry"]}, "needs a name"),
        ({"isolation": "magic"}, "expected container or vm"),
        ({"build_args": {"a=b": "c"}}, "bad name"),
        ({"tags": ["UPPER"]}, "tags"),
        ({"ulimits": ["nofile"]}, "ulimits"),
        ({"add_host": ["foo"]}, "add_host"),
        ({"memory": "1k"}, "memory"),
        ({"outputs": ["/proc/none/x"]}, "output: /proc/none/x: no such file"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            build("FROM scratch\nLABEL a=b\n", **options)


def test_a_tar_of_the_result_is_whole(build: Builder) -> None:
    out = io.BytesIO()
    build("FROM scratch\nCOPY f /\n", {"f": "x"}, outputs=["type=tar,dest=-"], stream=out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert "f" in archive.getnames()


def test_a_full_disk_is_told_and_freed(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(tmp_path)], check=True)
    try:
        with Engine(tmp_path / "root") as engine:
            engine.images.bootstrap("busybox")
            build = Builder(engine)
            with pytest.raises(Exhausted, match="no space left"):
                build("FROM busybox\nCOPY big /x\n", {"big": os.urandom(30 << 20)})
            assert engine.list(all=True) == []
            assert build("FROM busybox\nCOPY small /x\n", {"small": "x"})
    finally:
        _wait(lambda: subprocess.run(["umount", str(tmp_path)]).returncode == 0)
