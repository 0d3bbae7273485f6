"""Moving instances between hutches: the protocol, the links it runs over, and its streams.

docs/reference/migration.md describes the protocol; the use cases are in `hutch.engine`.
"""
