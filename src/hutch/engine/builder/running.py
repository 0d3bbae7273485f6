"""RUN: a command in an instance of its own, upon the layers so far; what it wrote is a layer."""

from __future__ import annotations

import posixpath
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.config import shell_of
from hutch.dockerfile.keys import step_key
from hutch.dockerfile.mounts import RunMount, parse_mount
from hutch.dockerfile.source import SourceError, StepFailed
from hutch.engine.builder.layering import commit_upper
from hutch.engine.builder.leftovers import BUILD_LABEL, remove_step
from hutch.image.records import ImageRecord, LayerRecord

if TYPE_CHECKING:
    from hutch.drivers.base import Launch
    from hutch.engine.builder.build import Build
    from hutch.engine.builder.events import Step
    from hutch.engine.builder.mounting import Mounting
    from hutch.engine.builder.stage import StageState
    from hutch.engine.records import InstanceRecord

__all__ = ["RunStep"]

_SCRIPTS = "/dev/pipes"


class RunStep:
    """One RUN, its variables put in."""

    def __init__(self, build: Build, state: StageState, run: model.Run) -> None:
        self._build = build
        self._state = state
        self._run = run
        scope = state.scope
        self._arguments = scope.run_arguments()
        self._proxies = scope.proxies()
        self._mounts = [parse_mount(text, scope.expand, state.workdir) for text in run.mounts]
        self._argv, self._script = self._command()

    def _command(self) -> tuple[list[str], tuple[str, str] | None]:
        """Return the words to run, and a script (name, content) that has to be there."""
        run = self._run
        if run.argv is not None:
            return list(run.argv), None
        shell = list(shell_of(self._state.config))
        if not run.heredocs:
            return [*shell, run.line], None
        only = run.heredocs[0]
        if len(run.heredocs) == 1 and run.line.replace("'", "").replace('"', "") == _mark(only):
            if only.content.startswith("#!"):
                path = f"{_SCRIPTS}/{posixpath.basename(only.name)}"
                return [path], (path, only.content)
            return [*shell, only.content], None
        parts = [run.line]
        parts += [f"{document.content}{document.name}" for document in run.heredocs]
        return [*shell, "\n".join(parts)], None

    def key(self) -> str:
        """Return the key: the tree it starts from, and all that the command may see but
        secrets, proxies, and the content of its caches."""
        run, options = self._run, self._build.options
        parts = [
            ("argv", "\0".join(self._argv)),
            ("script", self._script[1] if self._script else ""),
            ("env", "\0".join(self._state.config.get("Env") or [])),
            ("args", "\0".join(f"{k}={v}" for k, v in self._arguments.items())),
            ("user", self._state.config.get("User") or ""),
            ("workdir", self._state.workdir),
            ("network", run.network or options.network),
            ("isolation", self._isolation()),
            ("epoch", "" if options.epoch_s is None else str(int(options.epoch_s))),
        ]
        if options.add_hosts:
            parts.append(("hosts", "\0".join(options.add_hosts)))
        for number, mount in enumerate(self._mounts):
            text = msgspec.json.encode(mount).decode()
            parts.append((f"mount{number}", text))
            if mount.type == "bind":
                parts.append((f"source{number}", self._source_key(mount)))
        return step_key("run", self._state.chain_id, parts)

    def _source_key(self, mount: RunMount) -> str:
        if mount.from_:
            return self._build.stage_files(mount.from_).chain_id
        return self._build.source.digest(mount.source)

    def _isolation(self) -> str:
        return self._run.isolation or self._build.options.isolation

    def make(self, step: Step) -> LayerRecord:
        """Run the command and return the layer of what it wrote.

        Raises `StepFailed` where its exit code is not 0. Whatever happens, the instance is
        gone afterwards.
        """
        from hutch.engine.builder.mounting import Mounting

        with ExitStack() as held:
            mounting = held.enter_context(Mounting(self._build, machine=self._isolation() == "vm"))
            mounting.add(self._mounts)
            if self._script is not None:
                mounting.add_script(*self._script)
            record = self._create(mounting)
            held.callback(self._remove, record.id)
            code = self._start(record.id, mounting, step)
            if code:
                raise StepFailed(
                    f"the command {self._shown()} did not succeed: exit code {code}",
                    exit_code=code,
                    command=" ".join(self._argv)[:4096],
                )
            self._build.check()
            return self._commit(record.id, mounting)

    def _shown(self) -> str:
        text = " ".join(self._argv)
        return f"'{text[:200]}…'" if len(text) > 200 else f"'{text}'"

    def _create(self, mounting: Mounting) -> InstanceRecord:
        from hutch.engine.create import create_from_spec
        from hutch.spec.build import build as build_spec
        from hutch.spec.defaults import ImageDefaults

        build, state = self._build, self._state
        config = state.config
        env = [*(config.get("Env") or [])]
        env += [f"{name}={value}" for name, value in self._arguments.items()]
        options: dict[str, Any] = {
            **build.options.run,
            "labels": {BUILD_LABEL: build.token},
            "isolation": self._isolation(),
            "log_driver": "none",
            "user": config.get("User") or None,
            "workdir": state.workdir,
            "mounts": mounting.spec_mounts or None,
            "add_host": list(build.options.add_hosts) or None,
        }
        network = self._run.network or build.options.network
        if network not in ("", "default"):
            options["network"] = network
        spec = build_spec(
            build.name_of(state.chain_id), ImageDefaults(env=tuple(env)), self._argv, **options
        )
        image = ImageRecord(
            id="", manifest_digest="", manifest_media_type="", manifest_size=0, config_size=0,
            layers=tuple(state.layers),
        )  # fmt: skip
        # A machine's disk is mounted once more, to read what was written: overlayfs refuses
        # that after a volatile mount.
        volatile = spec.isolation == "container"
        return create_from_spec(
            build.context, spec, image, name=build.next_name(), volatile=volatile
        )

    def _start(self, identifier: str, mounting: Mounting, step: Step) -> int:
        from hutch.engine.finish import finish
        from hutch.engine.session import session_flags
        from hutch.engine.start import start
        from hutch.process.frames import Output

        def adjust(launch: Launch) -> Launch:
            """Add what no record is to hold: mounts of this build, secrets, and that the
            command ends with the process that builds."""
            process = launch.spec.process
            extra = {**self._proxies, **mounting.env}
            env = (*process.env, *(f"{name}={value}" for name, value in extra.items()))
            spec = msgspec.structs.replace(
                launch.spec, process=msgspec.structs.replace(process, env=env)
            )
            return msgspec.structs.replace(
                launch, spec=spec, mounts=(*launch.mounts, *mounting.mounts), linger=False
            )

        build = self._build
        link = start(build.context, identifier, attach=session_flags(stdin=False), adjust=adjust)
        if link is None:
            raise SourceError("the instance of the step was started by somebody else")
        try:
            with build.interrupts(link):
                for piece in link.output():
                    if isinstance(piece, Output):
                        step.output(piece.stream, piece.data)
                code = link.wait().code
            if not code:
                finish(build.context, identifier)
        finally:
            link.close()
        build.check()
        return code

    def _commit(self, identifier: str, mounting: Mounting) -> LayerRecord:
        from hutch.drivers.container.idmaps import mapping_of
        from hutch.engine.filesystem import own_paths, writable
        from hutch.engine.lookup import load

        build = self._build
        record = load(build.context, identifier)
        skip = [*own_paths(record), *mounting.targets]
        with writable(build.context, record) as assets:
            return commit_upper(
                build.context,
                assets,
                self._state.chain_ids,
                build.lease,
                skip=skip,
                mapping=mapping_of(record.spec),
                newest_s=build.options.epoch_s,
            )

    def _remove(self, identifier: str) -> None:
        remove_step(self._build.context, identifier)

    def history(self) -> str:
        """Return the line of the history; build arguments are told as Docker does."""
        words = " ".join(self._argv)
        if self._arguments:
            given = " ".join(f"{k}={v}" for k, v in self._arguments.items())
            return f"RUN |{len(self._arguments)} {given} {words}"
        return f"RUN {words}"


def _mark(document: model.Heredoc) -> str:
    return f"{document.fd}<<{'-' if document.strip_tabs else ''}{document.name}"
