"""What stands in the way of a machine that comes while it runs, or with a saved memory."""

from __future__ import annotations

from collections.abc import Iterator

from hutch.drivers.vm.host import find_host
from hutch.drivers.vm.limits import memory_of
from hutch.engine.context import Context
from hutch.engine.headroom import available_memory
from hutch.engine.records import InstanceRecord
from hutch.errors import HutchError
from hutch.host.processors import host_processor, missing_features, userfaultfd_obstacle
from hutch.host.qemu import AcceleratorWish, load_qemu
from hutch.host.virtiofsd import find_virtiofsd
from hutch.migration.messages import Live, Offer

__all__ = ["machine_obstacles", "named_model"]

# Their guests see what the host's processor has, or what this QEMU can emulate.
_AS_THE_HOST = ("host", "max")


def machine_obstacles(context: Context, offer: Offer, record: InstanceRecord) -> Iterator[str]:
    """Yield why the memory of a machine cannot be loaded here."""
    if not offer.qemu:
        return
    try:
        there = load_qemu(context.root / "cache")
    except HutchError:
        return  # told by the driver's own check
    if str(there.version) != offer.qemu:
        yield (
            f"its memory is that of QEMU {offer.qemu}, the target has {there.version} (install "
            "the same there; stopped, it can go as it is)"
        )
    if offer.live is not None:
        yield from _live(context, offer.live, record, there.path)


def _live(context: Context, live: Live, record: InstanceRecord, qemu: str) -> Iterator[str]:
    try:
        accelerator: AcceleratorWish = "kvm" if live.accelerator == "kvm" else "tcg"
        find_host(context.root, accelerator, context.machines.proving_kernel())
    except HutchError as exc:
        yield f"it runs on {live.accelerator}, which the target does not have: {exc.message}"
    else:
        yield from _processor(live, qemu)
    yield from _shares(record, live)
    wanted, available = memory_of(record.spec), available_memory()
    if wanted > available:
        yield f"it needs {wanted} bytes of memory, the target has {available} available"
    if live.streams.post_copy:
        reason = userfaultfd_obstacle()
        if reason:
            yield f"post-copy: the target's QEMU cannot have userfaultfd: {reason}"


def _shares(record: InstanceRecord, live: Live) -> Iterator[str]:
    """Yield why the server of its directories here could not go on with what it has open."""
    if not any(mount.type == "bind" for mount in record.mounts):
        return
    if live.streams.post_copy:
        yield "post-copy: virtiofsd, which serves its directories, cannot fetch its memory"
    try:
        if find_virtiofsd().moves:
            return
    except HutchError:
        return  # told by the driver's own check
    yield (
        "it has directories of its host, and the target's virtiofsd cannot take them over while "
        "it runs (1.13 can)"
    )


def _processor(live: Live, qemu: str) -> Iterator[str]:
    model = named_model(live.cpu)
    if model:
        lacking = missing_features(qemu, live.accelerator, model)
        if lacking is None:
            yield f"its processor model {model} is not known to the target's QEMU"
        elif more := sorted(set(lacking) - set(live.lacking)):
            yield f"its processor {model} has {', '.join(more)}, which the target has not"
    elif live.accelerator == "kvm":
        here = host_processor()
        if live.processor.vendor != here.vendor:
            yield f"its processor is one of {live.processor.vendor}, the target's of {here.vendor}"
        lacking = tuple(sorted(set(live.processor.flags) - set(here.flags)))
        if lacking:
            yield (
                f"its processor has {', '.join(lacking)}, which the target's has not (start it "
                "with a model that both have: --cpu-model)"
            )


def named_model(cpu: str) -> str:
    """Return the model that a machine's processors are of, nothing where they are the host's."""
    model = cpu.split(",")[0]
    return "" if model in _AS_THE_HOST else model
