"""The kernel command line of a guest that starts without firmware, tuned by measurement.

What each part gained in a cold boot under TCG: `cryptomgr.notests` 0.54 s,
`init_on_alloc=0` 0.33 s, `rcupdate.rcu_expedited=1` 0.2 s, `apparmor=0 audit=0` 0.14 s.
"""

from __future__ import annotations

from hutch.errors import InvalidArgument
from hutch.plan.machine.model import Accelerator
from hutch.plan.machine.quoting import plain

__all__ = ["COMMAND_LINE_MAX", "kernel_command_line"]

COMMAND_LINE_MAX = 2047
"""COMMAND_LINE_SIZE of x86 is 2048 with the NUL."""

_ALWAYS = (
    *("panic=-1", "reboot=t", "tsc=reliable", "no_timer_check", "random.trust_cpu=on"),
    *("cryptomgr.notests", "rcupdate.rcu_expedited=1", "audit=0"),
    # Without the modules that do nothing before somebody gives them a policy.
    "lsm=landlock,lockdown,yama,integrity,bpf",
    # A host that is busy stops its guests for longer than a watchdog thinks possible.
    "nowatchdog",
)
# Under emulation the guest shares no processor with another tenant's guest code, and the
# host has mitigations of its own; what these cost is a third of the boot.
# What comes while the machine runs is used at once, and up to eight times the memory from the
# start only for what can be moved away again (the kernel's own default is three times). For
# each byte the kernel needs 1/64 of one elsewhere.
_GROWING = (
    *("memhp_default_state=online", "memory_hotplug.online_policy=auto-movable"),
    "memory_hotplug.auto_movable_ratio=801",
)
# A guest that may have memory above 4 GiB sets 64 MiB aside for devices that do not reach so
# far. Ours do; a megabyte stays, should one be passed through that does not.
_BOUNCE = "swiotlb=512"
_LOW_MEMORY = 2 << 30
_EMULATED = (
    *("mitigations=off", "init_on_alloc=0", "apparmor=0"),
    # What the guest's kernel compiles is compiled once more by QEMU: a filter of system calls,
    # which each exec brings, takes less as it is. Its answers are kept by number anyway.
    "sysctl.net.core.bpf_jit_enable=0",
    # An idle guest wakes twice a second to look for memory to compact for huge pages, which an
    # emulated processor has nothing from, and once to add up statistics.
    *("sysctl.vm.compaction_proactiveness=0", "sysctl.vm.stat_interval=10"),
)


def kernel_command_line(
    *,
    accelerator: Accelerator,
    tsc_khz: int = 0,
    memory: int = 0,
    max_memory: int = 0,
    quiet: bool = True,
    console: str = "ttyS0",
    extra: str = "",
) -> str:
    """Return the command line. `extra` comes last and so wins over what is before.

    `tsc_khz` is the host's time stamp counter (0 where it is not known): an emulated guest
    that calibrates against a busy host is wrong or, on microvm, stuck. It is not given
    under KVM, where the guest reads it from kvm-clock. `memory` and `max_memory` are those
    of the machine's shape, in bytes.
    """
    words = [f"console={console}", *(["quiet"] if quiet else []), *_ALWAYS]
    if max_memory > memory:
        words += _GROWING
        if memory <= _LOW_MEMORY:
            words.append(_BOUNCE)
    if accelerator == "tcg":
        words += _EMULATED
        if tsc_khz:
            words.append(f"tsc_early_khz={tsc_khz}")
    if extra.strip():
        words.append(plain(extra.strip(), field="kernel.extra"))
    line = " ".join(words)
    if len(line.encode()) > COMMAND_LINE_MAX:
        raise InvalidArgument(
            f"the kernel takes {COMMAND_LINE_MAX} bytes, got {len(line.encode())}",
            field="kernel.command_line",
        )
    return line
