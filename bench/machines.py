"""The cases of virtual machines: starts, exec, memory, many at once; beside bare QEMU.

The peer boots the same kernel, initramfs and amount of memory (`bench.vm_bare`); its agent
answers a greeting, and nothing else is done. What hutch does beside that (disks, network,
the program in its sandbox) is in hutch's figure.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from bench import vm_bare
from bench.measure import Row, Samples, measure
from bench.stage import IMAGE

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["MACHINE_CASES", "fetch_kernel", "has_kernel", "machines_root", "remove_kernel"]

MEMORY_MIB = 256
CLONES = 50
IDLE_CLONES = 4
_IDLE_S = 5.0
_TRIES = 60
_SLEEP = ["sleep", "100000"]
_ROOT = "HUTCH_BENCH_MACHINES"


def fetch_kernel() -> str:
    """Fetch a guest kernel into a root of its own, while there is a network; return why
    there is none, or nothing."""
    import hutch
    from hutch.errors import HutchError

    root = tempfile.mkdtemp(prefix="hutch-bench-machines-")
    try:
        with hutch.Engine(root) as engine:
            engine.kernels.add()
    except BaseException as exc:
        shutil.rmtree(root, ignore_errors=True)
        if isinstance(exc, HutchError):
            return exc.message
        raise
    os.environ[_ROOT] = root
    return ""


def has_kernel() -> bool:
    """Tell whether `fetch_kernel` has got one."""
    return _ROOT in os.environ


def machines_root() -> str:
    """Return the root with the kernel that `fetch_kernel` has got."""
    return os.environ[_ROOT]


def remove_kernel() -> None:
    """Remove what `fetch_kernel` made."""
    if root := os.environ.get(_ROOT):
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def _engine(stage: Stage) -> Iterator[Any]:
    """An engine with a kernel and the image; neither instances nor templates are left."""
    import hutch

    engine: Any
    with hutch.Engine(os.environ[_ROOT]) as engine:
        engine.images.import_(str(stage.tar), IMAGE)
        try:
            yield engine
        finally:
            for info in engine.list(all=True):
                engine.get(info.id).remove(force=True, volumes=True)
            engine._context.driver("vm").prune_templates()


def _options(**more: Any) -> dict[str, Any]:
    return {"isolation": "vm", "memory": f"{MEMORY_MIB}M", **more}


def _start(engine: Any, **options: Any) -> float:
    """Return the seconds until the program runs; the machine is removed after that."""
    began = time.perf_counter()
    box = engine.start(IMAGE, _SLEEP, **_options(**options))
    taken = time.perf_counter() - began
    box.remove(force=True)
    return taken


def _have_templates(engine: Any) -> None:
    """Start until a start goes on from the image's own template, which is made beside the
    second one."""
    driver = engine._context.driver("vm")
    for _ in range(_TRIES):
        box = engine.start(IMAGE, _SLEEP, **_options())
        template = driver.record(box.id).template
        box.remove(force=True)
        if (engine.root / "templates" / template / "disk").exists():
            return
        time.sleep(_IDLE_S / 5)
    raise RuntimeError("the image has got no template")


def _bare(engine: Any) -> vm_bare.Guest:
    """Return the guest that hutch boots, for QEMU alone."""
    kernel = engine.kernels.get()
    box = engine.start(IMAGE, _SLEEP, **_options(network="none"))  # makes the initramfs
    box.remove(force=True)
    directory = engine._context.kernels.directory(kernel.id)
    return vm_bare.guest(directory / "vmlinux", next(directory.glob("initramfs-*")), MEMORY_MIB)


def cold_start(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """A boot with disks and network to the running program, without a template."""
    with _engine(stage) as engine:
        guest = _bare(engine)
        ways = {
            "hutch": lambda: _start(engine, template=False),
            "bare boot": lambda: vm_bare.cold_boot(guest),
        }
        case = "machine: cold start to the program running"
        turns = max(5, rounds // 2)
        return measure(case, ways, rounds=turns, targets={"bare boot": 1.25})


def template_start(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """A start from a template, with disks and network, to the running program; from that of
    the image, and beside it from that of the kernel, as the first two starts."""
    with (
        _engine(stage) as engine,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
        vm_bare.template(_bare(engine), Path(shm)) as made,
    ):
        _have_templates(engine)
        images = engine._context.machines._machines.images

        def from_kernels() -> float:
            with patch.object(images, "take", lambda request, disk: (None, False)):
                return _start(engine)

        return measure(
            "machine: start from a template to the program running",
            {
                "hutch": lambda: _start(engine),
                "kernel's template": from_kernels,
                "bare clone": lambda: vm_bare.clone_once(made),
                "cold start": lambda: _start(engine, template=False),
            },
            rounds=rounds,
            targets={"median ms": 250, "bare clone": 3, "cold start": 1 / 8},
        )


def execute(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """`true` in a running machine."""
    with _engine(stage) as engine:
        box = engine.start(IMAGE, _SLEEP, **_options())

        def hutch() -> None:
            if code := box.exec(["true"]).exit_code:
                raise RuntimeError(f"exit code {code}")

        return measure(
            "machine: exec of true",
            {"hutch": hutch},
            rounds=rounds,
            targets={"median ms": 15},
        )


def _own_kb(pids: list[int]) -> int:
    """Return the kB that only these processes have."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1])
    return total


def memory(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """What one of several idle clones has for itself: QEMU and its monitor."""
    with _engine(stage) as engine:
        boxes = [engine.start(IMAGE, _SLEEP, **_options()) for _ in range(IDLE_CLONES)]
        time.sleep(_IDLE_S)
        driver = engine._context.driver("vm")
        sizes = [float(_own_kb(driver.processes(box.id))) for box in boxes]
    return Row(
        case="machine: memory of an idle clone, its own",
        ways={"hutch": Samples(seconds=sizes)},
        targets={"kB": 25 * 1024},
        unit="kB",
    )


def reclaim(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """QEMU's resident memory: started, full, emptied by the guest, and with the balloon."""
    rows = []
    with _engine(stage) as engine:
        for template, name in ((True, "from a template"), (False, "booted")):
            options = _options(network="none", memory="512M", shm_size="400M", template=template)
            box = engine.start(IMAGE, _SLEEP, **options)
            found = {"hutch": _resident_kb(engine, box)}
            box.exec(["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=200"])
            found["200 MB written"] = _resident_kb(engine, box)
            box.exec(["rm", "/dev/shm/x"])
            time.sleep(_IDLE_S)
            found["removed"] = _resident_kb(engine, box)
            box.update(memory="128M")
            found["update to 128 MB"] = _resident_kb(engine, box)
            box.remove(force=True)
            ways = {way: Samples(seconds=[size]) for way, size in found.items()}
            case = f"machine: resident memory of 512 MB, {name}"
            rows.append(Row(case=case, ways=ways, unit="kB"))
    return rows


def _resident_kb(engine: Any, box: Any) -> float:
    total = 0
    for pid in engine._context.driver("vm").processes(box.id):
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 1024


def clones(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """50 starts from one template at once, until each has answered an exec."""
    with _engine(stage) as engine:
        _have_templates(engine)

        def answer(_: int) -> Any:
            box = engine.start(IMAGE, _SLEEP, **_options())
            if code := box.exec(["true"]).exit_code:
                raise RuntimeError(f"exit code {code}")
            return box

        def hutch() -> float:
            with ThreadPoolExecutor(CLONES) as pool:
                began = time.perf_counter()
                boxes = list(pool.map(answer, range(CLONES)))
                taken = time.perf_counter() - began
                list(pool.map(lambda box: box.remove(force=True), boxes))
            return taken

        return measure(
            f"machine: {CLONES} clones at once, all answer",
            {"hutch": hutch},
            rounds=max(2, rounds // 10),
            targets={"ms": 15_000},
            warm_up=0,
        )


@contextmanager
def _pauses() -> Iterator[list[float]]:
    """Yield the seconds that machines stand still, from the word to stop to the answer that
    they go on, as they come in."""
    from hutch.qmp import machine

    stop, cont = machine.stop, machine.cont
    found: list[float] = []
    began = [0.0]

    def stopping(monitor: Any) -> None:
        began[0] = time.perf_counter()
        stop(monitor)

    def going_on(monitor: Any) -> None:
        cont(monitor)
        if began[0]:
            found.append(time.perf_counter() - began[0])
        began[0] = 0.0

    machine.stop, machine.cont = stopping, going_on
    try:
        yield found
    finally:
        machine.stop, machine.cont = stop, cont


def fork(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """A twin of a running machine: how long its source stands still, and how long it takes
    until the twin's agent has answered for all that makes it a machine of its own, and then
    until a `true` in it has ended. A start from a template is what a twin saves."""
    names = ("the source's pause", "the twin's first answer", "the twin's first true")
    samples = {name: Samples() for name in names}
    starts = Samples()
    with _engine(stage) as engine, _pauses() as pauses:
        box = engine.start(IMAGE, _SLEEP, **_options())
        for number in range(-1, rounds):
            began = time.perf_counter()
            twin = box.fork()
            answered = time.perf_counter() - began
            if code := twin.exec(["true"]).exit_code:
                raise RuntimeError(f"exit code {code}")
            done = time.perf_counter() - began
            twin.remove(force=True)
            started = _start(engine)
            if number >= 0:
                starts.seconds.append(started)
                for name, value in zip(names, (pauses[-1], answered, done), strict=True):
                    samples[name].seconds.append(value)
    targets = {names[0]: 150, names[1]: 400}
    return [
        Row(
            case=f"machine: fork of a running {MEMORY_MIB} MB guest: {name}",
            ways={"hutch": samples[name], "start from a template": starts},
            targets={"median ms": targets[name]} if name in targets else {},
        )
        for name in names
    ]


MACHINE_CASES: dict[str, Callable[[Stage, Peers, int], Row | list[Row]]] = {
    "vm-cold": cold_start,
    "vm-start": template_start,
    "vm-exec": execute,
    "vm-memory": memory,
    "vm-reclaim": reclaim,
    "vm-clones": clones,
    "fork": fork,
}
