"""Build one stage: its base, then its instructions in turn."""

from __future__ import annotations

import copy as copying
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.decoding import decode_json
from hutch.dockerfile import model
from hutch.dockerfile.config import apply, environment, workdir_of
from hutch.dockerfile.keys import step_key
from hutch.dockerfile.parse import parse_trigger
from hutch.dockerfile.scopes import Scope
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.stages import StagePlan
from hutch.engine.builder.cache import CacheRecord
from hutch.engine.builder.copying import CopyStep, owner_of
from hutch.engine.builder.events import Step
from hutch.engine.builder.layering import Placing, commit_tar, commit_tree
from hutch.engine.builder.running import RunStep
from hutch.engine.builder.tree import Tree
from hutch.errors import HutchError, Unavailable
from hutch.image.assemble import now_text
from hutch.image.records import ImageRecord, LayerRecord
from hutch.oci.platform import host_platform
from hutch.spec.process import DEFAULT_PATH
from hutch.storage.overlay import Merged
from hutch.storage.tarstream import DIR
from hutch.storage.tarwrite import END, header

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build, Files

__all__ = ["StageState", "build_stage"]

_COMMENT = "hutch build"


class StageState:
    """A stage so far: layers, configuration, history; `base_count` of its layers are those of
    the image it stands on."""

    def __init__(self, scope: Scope, epoch_s: float | None) -> None:
        here = host_platform()
        self._epoch_s = epoch_s
        self.layers: list[LayerRecord] = []
        self.document: dict[str, Any] = {"architecture": here.architecture, "os": here.os}
        if here.variant:
            self.document["variant"] = here.variant
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.scope = scope
        self.base_count = 0
        self.created_s = 0.0
        self.author = ""
        self.triggers: list[str] = []

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """The chainIDs of the layers, lowest first."""
        return tuple(layer.chain_id for layer in self.layers)

    @property
    def chain_id(self) -> str:
        """The chainID of the topmost layer, "" for none: it names the whole tree."""
        return self.layers[-1].chain_id if self.layers else ""

    @property
    def workdir(self) -> str:
        """The directory that relative paths count from."""
        return workdir_of(self.config)

    def take_parent(self, parent: StageState) -> None:
        """Go on from another stage."""
        self.layers = list(parent.layers)
        self.document = dict(parent.document)
        self.config = copying.deepcopy(parent.config)
        self.history = list(parent.history)
        self.base_count = parent.base_count
        self.created_s = parent.created_s
        self.author = parent.author
        self.scope.env = environment(self.config)
        self.triggers = self.config.pop("OnBuild", None) or []

    def take_image(self, record: ImageRecord, config: bytes) -> None:
        """Begin with an image."""
        document = decode_json(config, dict[str, Any])
        self.layers = list(record.layers)
        self.config = dict(document.pop("config", None) or {})
        self.history = list(document.pop("history", None) or [])
        self.author = document.pop("author", "") or ""
        self.document = {
            key: document[key]
            for key in ("architecture", "os", "variant", "os.version", "os.features")
            if key in document
        }
        self.base_count = len(record.layers)
        self.created_s = _seconds(document.get("created") or "")
        self.scope.env = environment(self.config)
        self.triggers = self.config.pop("OnBuild", None) or []

    def note(self, created_by: str, *, layer: LayerRecord | None, created_s: float) -> None:
        """Add a line to the history, with the layer it made."""
        latest = max(self.created_s, created_s)
        self.created_s = latest if self._epoch_s is None else self._epoch_s
        entry: dict[str, Any] = {
            "created": now_text(self.created_s),
            "created_by": created_by,
            "comment": _COMMENT,
        }
        if self.author:
            entry["author"] = self.author
        if layer is None:
            entry["empty_layer"] = True
        else:
            self.layers.append(layer)
        self.history.append(entry)


def _seconds(text: str) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(text[:19] + "+00:00").timestamp()
    except ValueError:
        return 0.0


def _begin_empty(state: StageState) -> None:
    """Give a stage the configuration of no image."""
    state.config = {"Env": [DEFAULT_PATH], "WorkingDir": "/"}
    state.scope.env = environment(state.config)


class _Pruned(Unavailable):
    """What the cache had for a step went before the build held it."""


def build_stage(build: Build, plan: StagePlan) -> StageState:
    """Build a stage and return what it came to; errors are located in the Dockerfile."""
    return _StageBuilder(build, plan).run()


class _StageBuilder:
    def __init__(self, build: Build, plan: StagePlan) -> None:
        self._build = build
        self._stage = plan.stage
        self._plan = plan
        self._escape = build.dockerfile.directives.escape
        self._label = plan.stage.name or f"stage-{plan.stage.index}"
        self._at_once = False
        self._no_cache = build.options.no_cache or (self._label in build.options.no_cache_filter)
        self._state: StageState

    def run(self) -> StageState:
        try:
            return self._through()
        except _Pruned:
            # What was found a moment ago is gone. Now it is not found, or held at once.
            self._at_once = True
            return self._through()

    def _through(self) -> StageState:
        self._number = 0
        self._total = 1 + len(self._stage.instructions)
        self._taken: list[LayerRecord] = []
        self._state = self._located(self._stage.base, self._base)
        triggers = self._located(self._stage.base, self._parse_triggers)
        self._total += len(triggers)
        for instruction in (*triggers, *self._stage.instructions):
            self._build.check()
            self._located(instruction, partial(self._step, instruction))
        self._hold()
        for name in sorted(self._state.scope.missing):
            self._build.reporter.warn(f"stage {self._label}: variable ${name} is not set")
        return self._state

    def _located(self, instruction: model.Instruction, act: Callable[[], Any]) -> Any:
        """Do something; let what goes wrong tell the line of the instruction."""
        try:
            return act()
        except HutchError as error:
            raise self._build.locate(error, instruction.statement) from error.__cause__

    def _parse_triggers(self) -> list[model.Instruction]:
        return [parse_trigger(text, self._escape) for text in self._state.triggers]

    # ---- the base ---------------------------------------------------------------------

    def _base(self) -> StageState:
        build, plan = self._build, self._plan
        if plan.platform:
            build.check_platform(plan.platform)
        if plan.parent >= 0:
            parent = build.stage(plan.parent)
            state = StageState(
                Scope(build.arguments, self._escape, parent.scope), build.options.epoch_s
            )
            state.take_parent(parent)
            self._begin(self._from()).end(parent.chain_id)
            return state
        state = StageState(Scope(build.arguments, self._escape), build.options.epoch_s)
        step = self._begin(self._from())
        if plan.image.lower() == "scratch" and not plan.replaced:
            _begin_empty(state)
            step.end()
            return state
        try:
            files = build.context_files(plan.image)
            if files is not None:
                layer = self._context_layer(files)
                _begin_empty(state)
                state.note(f"FROM {plan.image}", layer=layer, created_s=build.now_s)
                step.end(layer.chain_id)
                return state
            record = build.image(plan.image, step, plan.platform)
        except BaseException as error:
            step.fail(str(error))
            raise
        state.take_image(record, build.context.content.read(record.id))
        step.end(record.id)
        return state

    def _context_layer(self, files: Files) -> LayerRecord:
        with Merged(files.lower) as merged:
            return commit_tree(self._build.context, Tree(merged), self._build.lease)

    def _from(self) -> str:
        """Return FROM with its variables put in."""
        if self._plan.replaced:
            return f"context {self._plan.image}"
        name = self._plan.image or self._stage.base.image
        return f"FROM {name}" + (f" AS {self._stage.base.name}" if self._stage.base.name else "")

    # ---- instructions -----------------------------------------------------------------

    def _begin(self, text: str) -> Step:
        self._number += 1
        return self._build.reporter.begin(
            f"[{self._label} {self._number}/{self._total}] {text}",
            stage=self._label,
            number=self._number,
            total=self._total,
            text=text,
        )

    def _step(self, instruction: model.Instruction) -> None:
        written = " ".join(instruction.statement.written.split())
        step = self._begin(written)
        try:
            match instruction:
                case model.Run():
                    self._run(instruction, step)
                case model.Copy():
                    self._copy(instruction, step)
                case _:
                    self._configure(instruction, step)
        except BaseException as error:
            step.fail(str(error) or type(error).__name__)
            raise

    def _configure(self, instruction: model.Instruction, step: Step) -> None:
        state = self._state
        line = apply(state.config, instruction, state.scope, self._escape)
        if isinstance(instruction, model.Maintainer):
            state.author = instruction.name
        layer = None
        if isinstance(instruction, model.Workdir):
            layer = self._directory(line, step)
            if layer is not None:
                return
        state.note(line, layer=None, created_s=state.created_s or self._build.now_s)
        step.end()

    def _directory(self, line: str, step: Step) -> LayerRecord | None:
        """Make the directory of a WORKDIR where the image has none; it belongs to the user."""
        state, build = self._state, self._build
        self._hold()
        names = [
            name.encode("utf-8", "surrogateescape") for name in state.workdir.split("/") if name
        ]
        with Merged(build.context.layers.lower(state.chain_ids)) as base:
            placing = Placing(base)
            target = placing.destination(state.workdir)
            if not names or placing.is_directory(target):
                return None
            if placing.what(target) is not None:
                raise SourceError(f"{line}: is not a directory in the image")
            parts = target.split(b"/")
            missing = [
                path
                for count in range(1, len(parts) + 1)
                if placing.what(path := b"/".join(parts[:count])) is None
            ]

        user = str(state.config.get("User") or "")

        def make() -> LayerRecord:
            uid, gid = 0, 0
            with suppress(SourceError):  # a user that the image does not know yet
                uid, gid = owner_of(build, state, user, "WORKDIR")
            chunks = (
                header(path + b"/", DIR, mode=0o755, uid=uid, gid=gid, mtime=int(build.now_s))
                for path in missing
            )
            return commit_tar(build.context, iter((*chunks, END)), state.chain_ids, build.lease)

        epoch = "" if build.options.epoch_s is None else str(int(build.options.epoch_s))
        said = [("path", state.workdir), ("user", user), ("epoch", epoch)]
        key = step_key("workdir", state.chain_id, said)
        self._layer("workdir", line, step, "", lambda: key, make)
        return state.layers[-1]

    def _run(self, instruction: model.Run, step: Step) -> None:
        run = RunStep(self._build, self._state, instruction)
        self._layer("run", run.history(), step, "", run.key, lambda: run.make(step))

    def _copy(self, instruction: model.Copy, step: Step) -> None:
        expanded = self._expand_copy(instruction)
        keyword = "ADD" if expanded.add else "COPY"
        names = [*expanded.sources, *(f"<<{h.name}" for h in expanded.heredocs)]
        flags = "".join(f"{flag} " for flag in instruction.statement.flags)
        line = f"{keyword} {flags}{' '.join(names)} {expanded.destination}"
        if expanded.link and expanded.chown:
            self._hold()  # its key has the owner's number, which the image knows
        with CopyStep(self._build, self._state, expanded) as copy:
            self._layer("copy", line, step, copy.quick_key(), copy.key, copy.make)

    def _expand_copy(self, copy: model.Copy) -> model.Copy:
        expand = self._state.scope.expand
        documents = tuple(
            msgspec.structs.replace(
                document, content=self._state.scope.expand_document(document.content)
            )
            if document.expand
            else document
            for document in copy.heredocs
        )
        sources = tuple(expand(text) for text in copy.sources)
        destination = expand(copy.destination)
        if not destination or not all(sources):
            raise SourceError("a path is empty once its variables are put in")
        return msgspec.structs.replace(
            copy,
            sources=sources,
            destination=destination,
            heredocs=documents,
            chown=expand(copy.chown),
            chmod=expand(copy.chmod),
            checksum=expand(copy.checksum),
            exclude=tuple(expand(text) for text in copy.exclude),
        )

    # ---- layers and the cache ---------------------------------------------------------

    def _layer(
        self,
        kind: str,
        line: str,
        step: Step,
        quick: str,
        find_key: Callable[[], str],
        make: Callable[[], LayerRecord],
    ) -> None:
        """Take a step's layer from the cache, or make it and keep it there."""
        build, state = self._build, self._state
        cache = build.cache
        if quick and not self._no_cache and (found := cache.find(quick, state.chain_id)):
            self._take(quick, found, line, step)
            return
        key = find_key()
        if not self._no_cache and (found := build.find_cached(key, state.chain_id, step)):
            if quick:
                cache.link(quick, key, line)
            self._take(key, found, line, step)
            return
        with cache.making(key, build.checks()):
            if not self._no_cache and (found := cache.find(key, state.chain_id)):
                self._take(key, found, line, step)
                return
            created_s = build.now_s if build.options.epoch_s is not None else time.time()
            self._hold()
            layer = make()
            record = CacheRecord(
                description=line[:500],
                kind=kind,
                parent=state.chain_id,
                layer=layer,
                created_at=created_s,
                size=layer.unpacked_size + layer.size,
            )
            cache.store(key, record, also=[quick] if quick else [])
            build.used(key, record)
        state.note(line, layer=layer, created_s=created_s)
        step.end(layer.digest)

    def _take(self, key: str, found: CacheRecord, line: str, step: Step) -> None:
        assert found.layer is not None
        layer = found.layer
        self._build.used(key, found)
        self._taken.append(layer)
        self._state.note(line, layer=layer, created_s=found.created_at)
        if self._at_once:
            self._hold()
        step.cached(layer.digest)

    def _hold(self) -> None:
        """Hold what came from the cache, before anything looks into it: in one transaction, as
        one for each step takes longer than all else that a build does whose steps are found.

        Raises `_Pruned` where somebody was faster.
        """
        taken, self._taken = self._taken, []
        if not taken:
            return
        build = self._build
        build.lease.add(*(name for layer in taken for name in (layer.digest, layer.chain_id)))
        for layer in taken:
            if not (
                build.context.content.has(layer.digest) and build.context.layers.has(layer.chain_id)
            ):
                raise _Pruned("the build cache was pruned meanwhile", hint="build again")
        build.context.layers.settle(self._state.chain_ids)
