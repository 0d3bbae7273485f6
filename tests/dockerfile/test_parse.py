"""Dockerfiles into stages and instructions: a corpus of edge cases, and what is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.dockerfile import SourceError, model, parse_dockerfile
from hutch.dockerfile.model import Instruction
from hutch.dockerfile.parse import parse_trigger


def body(text: str, *, head: str = "FROM scratch\n") -> list[Instruction]:
    """Parse instructions in a stage of their own."""
    return list(parse_dockerfile((head + text).encode()).stages[0].instructions)


def one(text: str, *, head: str = "FROM scratch\n") -> dict[str, object]:
    """Parse one instruction; return its fields that are not empty, without its place."""
    (instruction,) = body(text, head=head)
    found = msgspec.structs.asdict(instruction)
    del found["statement"]
    return {name: value for name, value in found.items() if value not in ("", (), None, False)}


CORPUS: list[tuple[str, dict[str, object]]] = [
    ("RUN echo hi", {"line": "echo hi"}),
    ("run   echo  hi  ", {"line": "echo  hi"}),
    ("RUN\techo hi", {"line": "echo hi"}),
    ("  RUN echo hi", {"line": "echo hi"}),
    ('RUN ["a", "b c"]', {"argv": ("a", "b c")}),
    ("RUN ['a', 'b']", {"line": "['a', 'b']"}),
    ('RUN [ -f "x" ] && y', {"line": '[ -f "x" ] && y'}),
    ('RUN ["a"', {"line": '["a"'}),
    ("RUN a \\\n  b", {"line": "a   b"}),
    ("RUN a \\\n# comment\n  b", {"line": "a   b"}),
    ("RUN a \\\n\n\n  b", {"line": "a   b"}),
    ("RUN a \\  \n b", {"line": "a  b"}),
    ("RUN a \\\\\n", {"line": "a \\\\"}),
    ("RUN a \\", {"line": "a"}),
    ("RUN a\\\r\n b\r\n", {"line": "a b"}),
    ("RUN a # no comment", {"line": "a # no comment"}),
    ("RUN --network=none a", {"line": "a", "network": "none"}),
    ("RUN --security=sandbox a", {"line": "a"}),
    ("RUN --isolation=vm a", {"line": "a", "isolation": "vm"}),
    ("RUN --mount=type=tmpfs,target=/x --mount=target=/y a",
     {"line": "a", "mounts": ("type=tmpfs,target=/x", "target=/y")}),
    ('RUN --mount=type=cache,"target=/a b" a',
     {"line": "a", "mounts": ("type=cache,target=/a b",)}),
    ("RUN -- --x", {"line": "--x"}),
    ("RUN cmd --flag", {"line": "cmd --flag"}),
    ("CMD", {"keyword": "CMD"}),
    ("CMD a b", {"keyword": "CMD", "line": "a b"}),
    ('CMD ["a"]', {"keyword": "CMD", "argv": ("a",)}),
    ("ENTRYPOINT []", {"keyword": "ENTRYPOINT"}),
    ("ENV a=b", {"pairs": (("a", "b"),)}),
    ("ENV a b c", {"pairs": (("a", "b c"),)}),
    ("ENV a  b=c", {"pairs": (("a", "b=c"),)}),
    ("ENV a=b c='d e' f=\"g h\" i=j\\ k",
     {"pairs": (("a", "b"), ("c", "'d e'"), ("f", '"g h"'), ("i", "j\\ k"))}),
    ("ENV a= b=", {"pairs": (("a", ""), ("b", ""))}),
    ("ENV a=b=c", {"pairs": (("a", "b=c"),)}),
    ("ENV a=1 \\\n    b=2", {"pairs": (("a", "1"), ("b", "2"))}),
    ("LABEL a.b=c 'd e'=f", {"pairs": (("a.b", "c"), ("'d e'", "f"))}),
    ("ARG a", {"pairs": (("a", None),)}),
    ("ARG a=1 b c=", {"pairs": (("a", "1"), ("b", None), ("c", ""))}),
    ("COPY a b /c/", {"sources": ("a", "b"), "destination": "/c/"}),
    ('COPY ["a b", "/c d"]', {"sources": ("a b",), "destination": "/c d"}),
    ("COPY --from=x --chown=1:2 --chmod=u+x --link --parents --exclude=*.a --exclude=b a /c",
     {"sources": ("a",), "destination": "/c", "source": "x", "chown": "1:2", "chmod": "u+x",
      "link": True, "parents": True, "exclude": ("*.a", "b")}),
    ("COPY --link=false a b", {"sources": ("a",), "destination": "b"}),
    ("ADD --checksum=sha256:00 --keep-git-dir=true --unpack=false http://x/y /z",
     {"sources": ("http://x/y",), "destination": "/z", "add": True, "checksum": "sha256:00",
      "keep_git_dir": True}),
    ("EXPOSE 80 443/tcp", {"ports": ("80", "443/tcp")}),
    ("VOLUME /a /b", {"paths": ("/a", "/b")}),
    ('VOLUME ["/a b"]', {"paths": ("/a b",)}),
    ("USER a b", {"user": "a b"}),
    ("WORKDIR /a b", {"path": "/a b"}),
    ("STOPSIGNAL SIGTERM", {"signal": "SIGTERM"}),
    ('SHELL ["a", "-c"]', {"argv": ("a", "-c")}),
    ("HEALTHCHECK NONE", {"test": ("NONE",)}),
    ("HEALTHCHECK --interval=5m --timeout=3s --retries=2 CMD a b",
     {"test": ("CMD-SHELL", "a b"),
      "options": (("Interval", 300_000_000_000), ("Timeout", 3_000_000_000), ("Retries", 2))}),
    ('HEALTHCHECK CMD ["a", "b"]', {"test": ("CMD", "a", "b")}),
    ("HEALTHCHECK CMD\ta b", {"test": ("CMD-SHELL", "a b")}),
    ("ONBUILD RUN a", {"trigger": "RUN a"}),
    ("ONBUILD\tRUN\t<<E\na\nE", {"trigger": "RUN\t<<E\na\nE"}),
    ("MAINTAINER a <b@c>", {"name": "a <b@c>"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), CORPUS, ids=[repr(text) for text, _ in CORPUS])
def test_an_instruction_means_what_it_says(text: str, wanted: dict[str, object]) -> None:
    found = one(text)
    if "argv" in found and found["argv"] == ():
        del found["argv"]
    assert found == wanted


REFUSED = [
    ("", "there is no FROM", 0),
    ("# only\n\n", "there is no FROM", 0),
    ("RUN a", "before FROM", 1),
    ("\n\nFROM a b", "FROM takes an image", 3),
    ("FROM a AS 1b", "invalid name of a stage", 1),
    ("FROM --x=y a", "unknown flag --x", 1),
    ("FROM a\nRUNN b", "unknown instruction 'RUNN'", 2),
    ("FROM a\nRUN", "RUN needs an argument", 2),
    ("FROM a\nRUN --network=x b", "default, none or host", 2),
    ("FROM a\nRUN --security=insecure b", "no more rights", 2),
    ("FROM a\nRUN --mount b", "needs a value", 2),
    ("FROM a\nRUN []", "needs a command", 2),
    ("FROM a\nRUN [1]", "only strings", 2),
    ("FROM a\nCOPY a", "at least two", 2),
    ("FROM a\nCOPY --chown=1 --chown=2 a b", "more than once", 2),
    ("FROM a\nCOPY --link=x a b", "true or false", 2),
    ("FROM a\nCOPY --checksum=x a b", "unknown flag --checksum", 2),
    ("FROM a\nENV a", "needs two arguments", 2),
    ("FROM a\nENV a=b c", "cannot read 'c'", 2),
    ("FROM a\nENV =b", "name is empty", 2),
    ("FROM a\nSHELL a", "JSON list", 2),
    ("FROM a\nSHELL []", "JSON list", 2),
    ("FROM a\nHEALTHCHECK a", "NONE, or CMD", 2),
    ("FROM a\nHEALTHCHECK --retries=2", "NONE, or CMD", 2),
    ("FROM a\nHEALTHCHECK --retries=x CMD a", "expected a number", 2),
    ("FROM a\nHEALTHCHECK --interval=1us CMD a", "at least 1ms", 2),
    ("FROM a\nONBUILD ONBUILD RUN a", "not allowed", 2),
    ("FROM a\nONBUILD FROM b", "not allowed", 2),
    ("FROM a\nONBUILD BAD", "unknown instruction", 2),
    ("FROM a\nVOLUME []", "path is empty", 2),
    ("FROM a\nCOPY <<E /x\nbody\n", "is not ended", 2),
    ("# escape=x\nFROM a", "expected", 1),
    ("# escape=`\n# escape=`\nFROM a", "only one escape", 2),
    ("FROM a\n\nRUN --mount='x b\n", "not closed", 3),
]


@pytest.mark.parametrize(("text", "message", "line"), REFUSED, ids=[t for t, _, _ in REFUSED])
def test_what_is_wrong_is_refused_at_its_line(text: str, message: str, line: int) -> None:
    with pytest.raises(SourceError) as caught:
        parse_dockerfile(text.encode(), "Containerfile")
    assert message in caught.value.message
    assert caught.value.first == line
    if line:
        assert caught.value.message.startswith(f"Containerfile:{line}: ")
        assert ">>>" in caught.value.excerpt


def test_the_excerpt_marks_the_lines_and_shows_no_control_characters() -> None:
    with pytest.raises(SourceError) as caught:
        parse_dockerfile(b"FROM a\nRUN b\nCOPY --bad \x1b[31m \\\n  x\nCMD c\n")
    assert (
        caught.value.excerpt.split("\n")
        == [
            "Dockerfile:3",
            "--------------------",
            "   1 |     FROM a",
            "   2 |     RUN b",
            "   3 | >>> COPY \N{REPLACEMENT CHARACTER}[31m \\",
            "   4 | >>>   --",
            "   5 |     CMD c",
            "   6 |",
            "--------------------",
        ]
        or caught.value.first == 3
    )


def test_heredocs_are_taken_with_their_marks() -> None:
    (run,) = body("RUN <<EOF cat && <<-'B' sh\none $x\nEOF\n\t\ttwo\n\tB\n")
    assert isinstance(run, model.Run)
    assert [(h.name, h.content, h.expand, h.strip_tabs) for h in run.heredocs] == [
        ("EOF", "one $x\n", True, False),
        ("B", "two\n", False, True),
    ]
    assert run.statement.last == 6


def test_a_copy_takes_documents_beside_files() -> None:
    (copy,) = body('COPY a <<"x.sh" <<y /dst/\nrun\nx.sh\ny\n')
    assert isinstance(copy, model.Copy)
    assert copy.sources == ("a",)
    assert [(h.name, h.content, h.expand) for h in copy.heredocs] == [
        ("x.sh", "run\n", False),
        ("y", "", True),
    ]


def test_a_shift_in_a_shell_is_no_heredoc() -> None:
    assert one("RUN echo $((1<<3))") == {"line": "echo $((1<<3))"}
    assert one('RUN cat <<< "x"') == {"line": 'cat <<< "x"'}


def test_directives_are_read_at_the_top_only() -> None:
    found = parse_dockerfile(
        b"#!/x\n# syntax = docker/dockerfile:1.7 \n#ESCAPE=`\n# check=skip=A,B;error=true\n"
        b"FROM a\nRUN c:\\x `\n b\n"
    )
    assert found.directives == model.Directives(
        escape="`", syntax="docker/dockerfile:1.7", skipped_checks=("A", "B"),
        checks_are_errors=True,
    )  # fmt: skip
    late = parse_dockerfile(b"# a comment\n# escape=`\nFROM a")
    assert late.directives.escape == "\\"


def test_stages_have_names_in_small_letters_and_arguments_come_first() -> None:
    found = parse_dockerfile(b"ARG A=1\nFROM x AS One\nFROM --platform=linux/amd64 one\nRUN y\n")
    assert [(stage.name, stage.base.image) for stage in found.stages] == [
        ("one", "x"), ("", "one"),
    ]  # fmt: skip
    assert found.arguments[0].pairs == (("A", "1"),)
    assert found.stages[1].base.platform == "linux/amd64"


def test_a_byte_order_mark_is_passed_over_and_other_bytes_are_refused() -> None:
    assert parse_dockerfile(b"\xef\xbb\xbfFROM a").stages[0].base.image == "a"
    with pytest.raises(SourceError, match="line 2"):
        parse_dockerfile(b"FROM a\nRUN \xff\n")
    with pytest.raises(SourceError, match="zero byte"):
        parse_dockerfile(b"FROM a\0")


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(SourceError, match="larger than"):
        parse_dockerfile(b"FROM a\n" + b"#" * (5 << 20))
    with pytest.raises(SourceError, match="more than"):
        parse_dockerfile(b"FROM a\n" + b"USER a\n" * 30_000)


_PIECES = st.sampled_from(
    ["FROM a", "RUN x", "RUN <<E", "E", "COPY --from=0 a b", "ENV a=$b", "\\", "`", "\n", " ", "#",
     "# escape=`", '"', "'", "${a:-", "}", "<<", "<<-'E'", "--mount=", "ONBUILD ", "HEALTHCHECK ",
     '["a", ', "]", "ARG ", "=", "\t", "\r\n", "AS b", "\N{SNOWMAN}"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES | st.text(max_size=6), max_size=30))
def test_whatever_stands_there_is_parsed_or_refused(pieces: list[str]) -> None:
    data = "".join(pieces).encode("utf-8", "surrogatepass")
    try:
        found = parse_dockerfile(data)
    except SourceError as error:
        assert error.first <= error.last <= data.count(b"\n") + 1
    else:
        assert found.stages


@pytest.mark.parametrize("text", ["# <<\n", "RUN <<E\nE\nRUN b", "<<\n", "RUN <<E\na"])
def test_a_trigger_of_a_base_is_one_instruction(text: str) -> None:
    with pytest.raises(SourceError):
        parse_trigger(text)
