"""Links: what may be written, and what it comes to."""

from __future__ import annotations

import pytest

from hutch.errors import InvalidArgument
from hutch.spec.links import Link, parse_links, split_link


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("db", "db:db"),
        ("/db:store", "db:store"),
        ("db:/app/store", "db:store"),
        ("db:my_store.local", "db:my_store.local"),
    ],
)
def test_a_link_has_a_name_and_an_alias(given: str, expected: str) -> None:
    assert parse_links([given, given]) == (expected,)
    assert split_link(expected) == Link(*expected.split(":"))


@pytest.mark.parametrize("given", ["", ":", ":x", "db:", "db:a b", "db:a\nb", "db:a:b", "db:é"])
def test_a_link_that_could_write_anything_else_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgument, match=r"links\[0\]"):
        parse_links([given])


def test_links_have_a_limit() -> None:
    with pytest.raises(InvalidArgument, match="more than 256"):
        parse_links([f"a{n}" for n in range(257)])
