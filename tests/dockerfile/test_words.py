"""Variables, quotes and escapes of a Dockerfile's words."""

from __future__ import annotations

import pytest

from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import MAX_VALUE, expand, expand_words, split_words

ENV = {"x": "one", "empty": "", "path": "/a/b/c.tar.gz", "v": "hello", "sp": "a b", "s_1": "u"}

EXPANDED = [
    ("plain", "plain"),
    ("$x", "one"),
    ("${x}", "one"),
    ("a$x.b", "aone.b"),
    ("$s_1-", "u-"),
    ("$unset", ""),
    ("${unset}b", "b"),
    ("$", "$"),
    ("a$", "a$"),
    ("$/b", "$/b"),
    (r"\$x", "$x"),
    (r"\${x}", "${x}"),
    (r"\a", "a"),
    (r"a\\b", r"a\b"),
    ("'$x'", "$x"),
    ('"$x"', "one"),
    (r'"\$x"', "$x"),
    (r'"\a\""', r"\a" + '"'),
    (r"'\a'", r"\a"),
    ("a'b'\"c\"d", "abcd"),
    ("'\"'", '"'),
    ("${x:-d}", "one"),
    ("${empty:-d}", "d"),
    ("${empty-d}", ""),
    ("${unset-d}", "d"),
    ("${unset:-${x}}", "one"),
    ("${unset:-${unset:-${v}}}", "hello"),
    ("${unset:-a b}", "a b"),
    ("${unset:-'}'}", "}"),
    ("${unset:-}", ""),
    ("${x:+d}", "d"),
    ("${empty:+d}", ""),
    ("${empty+d}", "d"),
    ("${unset+d}", ""),
    ("${x:?no}", "one"),
    ("${empty?no}", ""),
    ("${path#*/}", "a/b/c.tar.gz"),
    ("${path##*/}", "c.tar.gz"),
    ("${path%.*}", "/a/b/c.tar"),
    ("${path%%.*}", "/a/b/c"),
    ("${path%nothing}", "/a/b/c.tar.gz"),
    ("${v#h}", "ello"),
    ("${v#?}", "ello"),
    ("${v#${v}}", ""),
    ("${v#l}", "hello"),
    ("${unset#x}", ""),
    (r"${path%\.*}", "/a/b/c.tar"),
    ("${v/l/L}", "heLlo"),
    ("${v//l/L}", "heLLo"),
    ("${v//l}", "heo"),
    ("${v/l*/-}", "he-"),
    ("${v//?/x}", "xxxxx"),
    ("${path//\\//-}", "-a-b-c.tar.gz"),
    ("${v/$x/y}", "hello"),
    ("${v/l/$x}", "heonelo"),
    ("${v//z/y}", "hello"),
    ("$1x", "x"),
    ("$@", ""),
]


@pytest.mark.parametrize(("text", "wanted"), EXPANDED, ids=[text for text, _ in EXPANDED])
def test_a_text_is_expanded(text: str, wanted: str) -> None:
    assert expand(text, ENV) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${x", "unsupported modifier"),
        ("${x:-d", "'}' is missing"),
        ("${}", "bad substitution"),
        ("${-", "unsupported modifier"),
        ("${x:", "'}' is missing"),
        ("${x:=d}", "unsupported modifier"),
        ("${x^^}", "unsupported modifier"),
        ("'a", "not closed"),
        ('"a', "not closed"),
        ("${unset:?give it}", "unset: give it"),
        ("${unset?}", "unset: is not set"),
        ("${v/a", "'}' is missing"),
        ("${v#a", "'}' is missing"),
    ],
)
def test_a_broken_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message.replace("?", r"\?").replace("{", r"\{")):
        expand(text, ENV)


def test_another_escape_character_leaves_backslashes_alone() -> None:
    assert expand(r"C:\dir\$x", ENV, escape="`") == r"C:\dir\one"
    assert expand("`$x", ENV, escape="`") == "$x"


def test_a_document_keeps_quotes_and_escapes_but_for_dollars() -> None:
    text = "echo \"$x\" '$x' \\n \\$x"
    assert expand(text, ENV, keep_quotes=True, keep_escapes=True) == "echo \"one\" 'one' \\n $x"


def test_words_are_split_outside_quotes_and_keep_them() -> None:
    assert split_words("a 'b c' d\"e f\"g h\\ i\tj") == ["a", "'b c'", 'd"e f"g', "h\\ i", "j"]


def test_a_value_with_blanks_is_several_words_unless_quoted() -> None:
    assert expand_words('$sp "$sp" x', ENV) == ["a", "b", "a b", "x"]


def test_names_asked_for_without_an_alternative_are_told() -> None:
    asked: list[str] = []
    expand("$x ${unset:-$v} ${v#l} $unset", ENV, used=asked.append)
    assert asked == ["x", "v", "v", "unset"]


def test_variables_that_double_do_not_grow_without_end() -> None:
    value = "x" * 1024
    with pytest.raises(SourceError, match="longer than"):
        for _ in range(30):
            value = expand("$a$a", {"a": value})
    assert len(value) <= MAX_VALUE


def test_a_nest_without_end_is_refused() -> None:
    with pytest.raises(SourceError, match="nested too deep"):
        expand("${a:-" * 5000 + "}" * 5000, {})


def test_a_hostile_pattern_ends() -> None:
    value = "a" * 4000
    assert expand("${a#*a*a*a*a*a*a*a*a*a*b}", {"a": value}) == value
    assert expand("${a//a*a*a*b/x}", {"a": value[:300]}) == value[:300]
