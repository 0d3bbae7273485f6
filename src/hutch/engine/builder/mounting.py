"""Prepare `RUN --mount`: caches, files of the context or a stage, memory, secrets, an agent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hutch.dockerfile.mounts import RunMount
from hutch.dockerfile.source import SourceError
from hutch.drivers.base import LaunchMount
from hutch.engine.builder.cachedirs import CacheDirectories
from hutch.engine.builder.layering import copy_tree
from hutch.engine.builder.tree import Tree, clean
from hutch.storage.overlay import Merged

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build

__all__ = ["Mounting"]

_AGENT = "/run/buildkit/ssh_agent.{}"


class Mounting:
    """The mounts of one RUN; a context manager that lets go of them.

    `mounts` go into the launch and into no record, `spec_mounts` into the specification, `env`
    holds secrets for the process alone, and `targets` are the places, which belong to no layer.
    """

    def __init__(self, build: Build, *, machine: bool) -> None:
        self._build = build
        self._machine = machine
        self._held = ExitStack()
        self._agents = 0
        self._caches: dict[RunMount | str, str] = {}
        self.mounts: list[LaunchMount] = []
        self.spec_mounts: list[dict[str, Any]] = []
        self.env: dict[str, str] = {}
        self.targets: list[bytes] = []

    def __enter__(self) -> Mounting:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, mounts: Sequence[RunMount]) -> None:
        """Prepare the mounts of a command.

        Its caches are taken before, in an order that all commands have: two that wait for each
        other's would do so for ever, as would one for a cache of its own, or for a stage that
        waits for the cache.
        """
        caches = [mount for mount in mounts if mount.type == "cache"]
        for mount in caches:
            if mount.from_:
                self._build.stage_files(mount.from_)
        locked = {mount.id for mount in caches if mount.sharing == "locked"}
        for mount in sorted(caches, key=lambda one: (one.id, one.sharing == "private")):
            self._take(mount, "locked" if mount.id in locked else "shared")
        for mount in mounts:
            self._add(mount)

    def _add(self, mount: RunMount) -> None:
        match mount.type:
            case "cache":
                self._cache(mount)
            case "tmpfs":
                self._tmpfs(mount)
            case "secret":
                self._secret(mount)
            case "ssh":
                self._ssh(mount)
            case _:
                self._bind(mount)

    def add_script(self, target: str, content: str) -> None:
        """Put a script in place that is run by its path."""
        directory = self._held.enter_context(self._build.scratch("script"))
        path = f"{directory}/script"
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(content)
        os.chmod(path, 0o755)
        self._place(LaunchMount(source=path, target=target, read_only=True, ours=True))

    def _place(self, mount: LaunchMount) -> None:
        self.mounts.append(mount)
        self.targets.append(os.fsencode(mount.target.lstrip("/")))

    # ---- kinds ------------------------------------------------------------------------

    def _take(self, mount: RunMount, sharing: str) -> None:
        """Hold the directory of a cache: a private one for this mount, others once an id."""
        own = mount.sharing == "private"
        name = mount if own else mount.id
        if name not in self._caches:
            directories = CacheDirectories(self._build.context)
            self._caches[name] = self._held.enter_context(
                directories.use(
                    mount.id, "private" if own else sharing, self._build.check, self._fill(mount)
                )
            )

    def _cache(self, mount: RunMount) -> None:
        path = self._caches[mount if mount.sharing == "private" else mount.id]
        self._place(LaunchMount(source=path, target=mount.target, read_only=mount.read_only))

    def _fill(self, mount: RunMount) -> Any:
        """Return what makes a new cache what it is to be."""

        def fill(path: str) -> None:
            if mount.from_ or mount.source:
                self._copy_into(mount, path)
            self._give(path, mount)
            os.chmod(path, 0o755 if mount.mode < 0 else mount.mode)

        return fill

    def _give(self, file: str | int, mount: RunMount) -> None:
        """Give a file to who is to have it inside. An ordinary user is root there, and has
        nobody else to give it to."""
        if not self._build.context.rootless:
            os.chown(file, mount.uid, mount.gid)

    def _tmpfs(self, mount: RunMount) -> None:
        options: dict[str, Any] = {"type": "tmpfs", "target": mount.target}
        if mount.size:
            options["tmpfs-size"] = mount.size
        self.spec_mounts.append(options)
        self.targets.append(os.fsencode(mount.target.lstrip("/")))

    def _secret(self, mount: RunMount) -> None:
        secret = self._build.options.secrets.get(mount.id)
        if secret is None:
            if mount.required:
                raise SourceError(
                    f"secret {mount.id!r} is required and was not given",
                    hint=f"give --secret id={mount.id},src=FILE",
                )
            return
        value = secret.read(mount.id)
        if mount.env:
            if b"\0" in value:
                raise SourceError(f"secret {mount.id!r} is no text: it cannot be a variable")
            self.env[mount.env] = os.fsdecode(value)
        if not mount.target:
            return
        directory = self._held.enter_context(self._build.memory_directory())
        path = f"{directory}/secret"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(value)
            self._give(file.fileno(), mount)
            os.fchmod(file.fileno(), 0o400 if mount.mode < 0 else mount.mode)
        self._place(
            LaunchMount(source=path, target=mount.target, read_only=True, ours=self._machine)
        )

    def _ssh(self, mount: RunMount) -> None:
        socket = self._build.options.ssh.get(mount.id)
        if socket is None:
            if mount.required:
                raise SourceError(
                    f"SSH agent {mount.id!r} is required and was not given",
                    hint=f"give --ssh {mount.id}",
                )
            return
        if self._machine:
            raise SourceError(
                "RUN --mount=type=ssh: an agent cannot be reached from a virtual machine",
                hint="use --isolation=container for this command",
            )
        target = mount.target or _AGENT.format(self._agents)
        if not self._agents:
            self.env["SSH_AUTH_SOCK"] = target
        self._agents += 1
        self._place(LaunchMount(source=socket, target=target))

    # ---- files of elsewhere -----------------------------------------------------------

    def _bind(self, mount: RunMount) -> None:
        if mount.read_only and (found := self._shared(mount)) is not None:
            fd, path = found
            self._place(LaunchMount(source=path, target=mount.target, read_only=True, fd=fd))
            return
        directory = self._held.enter_context(self._build.scratch("bind"))
        path = self._copy_into(mount, directory)
        self._place(LaunchMount(source=path, target=mount.target, read_only=mount.read_only))

    def _shared(self, mount: RunMount) -> tuple[int, str] | None:
        """Return a descriptor of the files themselves and their path, where one directory has
        them all: then nothing is copied. An ordinary user's mounts are made in a namespace of
        their own, where no descriptor from here counts: the path alone then (-1)."""
        if self._machine:
            return None
        if mount.from_:
            lower = self._build.stage_files(mount.from_).lower
        elif self._build.source.is_filtered:
            return None
        else:
            lower = (self._build.source.directory,)
        with Merged(lower) as merged:
            where, found = merged.resolve(os.fsencode(clean(mount.source)))
            if len(found.layers) > 1:
                return None
            if self._build.context.rootless:
                return -1, f"{lower[found.layer]}/{os.fsdecode(where)}".rstrip("/")
            parent, _, base = where.rpartition(b"/")
            directory = merged.open(found.layer, parent)
        try:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(base or b".", flags, dir_fd=directory)
        finally:
            os.close(directory)
        self._held.callback(os.close, fd)
        return fd, f"/proc/self/fd/{fd}"

    def _copy_into(self, mount: RunMount, directory: str) -> str:
        """Copy the files of a mount into a directory of ours; return what is to be mounted."""
        with ExitStack() as held:
            if mount.from_:
                files = self._build.stage_files(mount.from_)
                tree = Tree(held.enter_context(Merged(files.lower)))
            else:
                tree = self._build.source.tree
            single = copy_tree(tree, directory, mount.source or ".")
        return f"{directory}/file" if single else directory
