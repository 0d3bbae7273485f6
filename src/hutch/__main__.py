"""`python -m hutch` is the command line."""

from __future__ import annotations

from hutch.cli.entry import main

if __name__ == "__main__":
    main()
