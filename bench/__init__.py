"""Benchmarks of hutch beside its peers, in one run. Start with `make bench`."""
