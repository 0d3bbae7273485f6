"""The daemon: sockets, configuration, signals, metrics. What it speaks is in `hutch.api`."""
