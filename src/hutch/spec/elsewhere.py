"""What options are called in other libraries, for who has their words at hand."""

from __future__ import annotations

__all__ = ["hint_for"]

# docker-py, then those of services that sell sandboxes, then subprocess.
_CALLED_HERE = {
    "auto_remove": "remove",
    "cpu_count": "cpus",
    "device_requests": "gpus",
    "dns_opt": "dns_options",
    "environment": "env",
    "extra_hosts": "add_host",
    "healthcheck": "health_cmd",
    "ipc_mode": "ipc",
    "log_config": "log_driver",
    "mem_limit": "memory",
    "mem_reservation": "memory_reservation",
    "mem_swappiness": "memory_swappiness",
    "memswap_limit": "memory_swap",
    "nano_cpus": "cpus",
    "network_mode": "network",
    "pid_mode": "pid",
    "ports": "publish",
    "restart_policy": "restart",
    "runtime": "isolation",
    "stdin_open": "interactive",
    "storage_opt": "storage_opts",
    "userns_mode": "userns",
    "working_dir": "workdir",
    "cpu": "cpus",
    "envs": "env",
    "gpu": "gpus",
    "metadata": "labels",
    "cwd": "workdir",
}
_ANOTHER_WAY = {
    "block_network": 'network="none" has no way out',
    "capture_output": "the result has stdout and stderr",
    "detach": "Engine.start leaves it running",
    "stdin": "input= is what the program reads",
    "text": "the result's text is standard output as text",
}


def hint_for(name: str, known: frozenset[str]) -> str | None:
    """Return what an option that there is not might be here."""
    if name in _ANOTHER_WAY:
        return _ANOTHER_WAY[name]
    if name not in _CALLED_HERE:
        from difflib import get_close_matches

        near = get_close_matches(name, sorted(known), 1)
        return f"did you mean {near[0]}?" if near else None
    return f"did you mean {_CALLED_HERE[name]}?"
