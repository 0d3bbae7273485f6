"""AppArmor: whether the host uses it, and which profiles it has loaded."""

from __future__ import annotations

__all__ = ["is_enabled", "is_profile_loaded", "loaded_profiles"]


def is_enabled(sys_root: str = "/sys") -> bool:
    """Return whether the kernel confines processes by AppArmor."""
    try:
        with open(f"{sys_root}/module/apparmor/parameters/enabled", "rb") as file:
            return file.read(1) == b"Y"
    except OSError:
        return False


def loaded_profiles(sys_root: str = "/sys") -> dict[str, str]:
    """Return the loaded profiles with their mode (`enforce`, `complain`, …).

    Empty where AppArmor is off or its list may not be read (it takes privileges).
    """
    found: dict[str, str] = {}
    try:
        with open(f"{sys_root}/kernel/security/apparmor/profiles", encoding="utf-8") as file:
            for line in file:
                name, space, mode = line.rstrip().rpartition(" (")
                if space:
                    found[name] = mode.rstrip(")")
    except OSError:
        return {}
    return found


def is_profile_loaded(name: str, sys_root: str = "/sys") -> bool:
    """Return whether a profile of that name is loaded."""
    return name in loaded_profiles(sys_root)
