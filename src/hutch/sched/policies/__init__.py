"""The policies, a module for each kind; `hutch.sched.registry` finds them by name."""
