"""The command line. Nothing is imported here: each command imports what it needs."""
