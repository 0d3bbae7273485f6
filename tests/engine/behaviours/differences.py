"""What cannot hold for one kind of instance, with the reason: every other behaviour holds for both.

A behaviour named here runs for the other kind only. `test_every_difference_is_a_behaviour`
keeps the table in step with the suite.
"""

from __future__ import annotations

__all__ = ["DIFFERENCES"]

DIFFERENCES: dict[tuple[str, str], str] = {
    ("vm", "test_the_host_sees_the_programs_of_an_instance"): (
        "the host sees hutch-vmm and QEMU; the program is the guest kernel's"
    ),
    ("vm", "test_top_takes_the_arguments_of_ps"): (
        "the host's ps does not see the guest's processes: it is refused with that reason"
    ),
}
