"""`.dockerignore` as Docker reads it."""

from __future__ import annotations

import pytest

from hutch.dockerfile.ignore import Ignore, read_ignore
from hutch.errors import InvalidArgument

CASES = [
    (["a"], ["a", "a/b", "a/b/c"], ["b/a", "ab"]),
    (["/a"], ["a"], ["b/a"]),
    (["a/"], ["a", "a/b"], ["b"]),
    (["./a/../b"], ["b"], ["a"]),
    (["*"], ["a", "a/b", ".x"], []),
    (["*.py"], ["x.py"], ["a/x.py", "x.pyc"]),
    (["*/temp*"], ["a/temp", "a/temps/b"], ["temp", "a/b/temp"]),
    (["*/*/temp*"], ["a/b/temp"], ["a/temp"]),
    (["temp?"], ["tempa"], ["temp", "tempab"]),
    (["**/x"], ["x", "a/x", "a/b/x/c"], ["ax", "a/xb"]),
    (["**"], ["a", "a/b"], []),
    (["a/**"], ["a/b", "a/b/c"], ["a"]),
    (["a/**/b"], ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
    (["**/*.md"], ["x.md", "a/b/x.md"], ["x.mdx"]),
    (["[a-c]x"], ["ax", "cx"], ["dx"]),
    (["[^a-c]x"], ["dx"], ["ax", "d/x", "/x"]),
    ([r"a\*"], ["a*"], ["ab"]),
    (["*.md", "!README.md"], ["x.md"], ["README.md"]),
    (["*.md", "!README*.md", "README-x.md"], ["README-x.md", "y.md"], ["README.md", "README-y.md"]),
    (["a", "!a/b"], ["a", "a/c"], ["a/b", "a/b/c"]),
    (["a", "!a/b", "a/b/c"], ["a/b/c"], ["a/b", "a/b/d"]),
    (["."], [], ["a"]),
    (["a.b"], ["a.b"], ["axb"]),
    (["a*b*c"], ["abc", "axbxbxc", "abcbc"], ["ab/c", "acb"]),
    (["a[^b]c"], ["adc"], ["a/c"]),
    (["**/a*/**/b"], ["ax/b", "x/a/y/z/b"], ["xa/b", "a/xb"]),
    (["a**b*c"], ["axbyc", "a/b/xbyc"], ["axb/c"]),
    (["x**/y"], ["xy", "xa/y", "x/a/y"], ["xay", "x/ay"]),
    (["a+b(c)"], ["a+b(c)"], ["aab(c)"]),
]


@pytest.mark.parametrize(("patterns", "ignored", "kept"), CASES, ids=[str(c[0]) for c in CASES])
def test_patterns_tell_what_is_left_out(
    patterns: list[str], ignored: list[str], kept: list[str]
) -> None:
    rule = Ignore(patterns)
    assert [path for path in ignored if not rule.ignores(path)] == []
    assert [path for path in kept if rule.ignores(path)] == []


def test_a_file_has_comments_blanks_and_a_byte_order_mark() -> None:
    rule = read_ignore(b"\xef\xbb\xbf# no\n\n  a  \n#b\n!  a/c\n")
    assert rule.ignores("a") and not rule.ignores("a/c") and not rule.ignores("#b")


def test_only_directories_that_may_hold_kept_files_are_looked_into() -> None:
    rule = Ignore(["node", "x", "!node/keep/me"])
    assert rule.may_keep_beneath("node") and rule.may_keep_beneath("node/keep")
    assert not rule.may_keep_beneath("x") and not rule.may_keep_beneath("node/other")
    assert Ignore(["a", "!**/b"]).may_keep_beneath("a")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 20 + "*b", "a" * 250),
        ("**/a/" * 10 + "b", "a/" * 120 + "a"),
        ("a**" * 10 + "c", "ab" * 99),
    ],
)
def test_no_pattern_takes_long_on_any_path(pattern: str, path: str) -> None:
    """One that tried every way would take years."""
    assert not Ignore([pattern]).ignores(path)


@pytest.mark.parametrize("pattern", ["[a", "a\\", "!", "*" * 60 + "?*" * 60])
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match="x"):
        Ignore([pattern], name="x")
