"""The part of Go's templates that `--format` takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.cli.template import Template
from hutch.errors import InvalidArgument

DATA: dict[str, Any] = {
    "Id": "abc",
    "State": {"Running": True, "ExitCode": 0, "Health": None},
    "Env": ["A=1", "B=2"],
    "Networks": {"back": {"IP": "10.0.0.2"}, "front": {"IP": "10.1.0.2"}},
    "Labels": {"a.b/c": "dotted"},
    "Empty": [],
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("{{.Id}}", "abc"),
        ("{{ .State.Running }}/{{.State.ExitCode}}", "true/0"),
        ("{{json .Env}}", '["A=1","B=2"]'),
        ("{{json .State}}", '{"ExitCode":0,"Health":null,"Running":true}'),
        ("{{range .Env}}[{{.}}]{{end}}", "[A=1][B=2]"),
        ("{{range $i, $e := .Env}}{{$i}}={{$e}};{{end}}", "0=A=1;1=B=2;"),
        ("{{range $k, $v := .Networks}}{{$k}}:{{$v.IP}} {{end}}", "back:10.0.0.2 front:10.1.0.2 "),
        ("{{range .Networks}}{{.IP}}{{end}}", "10.0.0.210.1.0.2"),
        ("{{range .Empty}}x{{else}}none{{end}}", "none"),
        ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
        ("{{if eq .State.ExitCode 1}}one{{else if eq .Id \"abc\"}}abc{{else}}no{{end}}", "abc"),
        ("{{with .State}}{{.ExitCode}}{{end}}", "0"),
        ('{{index .Labels "a.b/c"}}', "dotted"),
        ("{{index .Env 1}}", "B=2"),
        ("{{len .Env}}", "2"),
        ('{{join .Env ","}}', "A=1,B=2"),
        ("{{.Id | upper | printf \"<%s>\"}}", "<ABC>"),
        ("{{$x := .Id}}{{$x}}{{$.Id}}", "abcabc"),
        ('{{printf "%-5s|%5s|%q" .Id .Id .Id}}', 'abc  |  abc|"abc"'),
        ("a {{- .Id -}} b", "aabcb"),
        ("{{/* comment */}}x", "x"),
        ("{{.State.Health.Status}}", "<no value>"),
        ("{{not .State.Running}}{{and 1 0}}{{or 0 2}}", "false02"),
        ("{{(index .Networks \"back\").IP}}", "10.0.0.2"),
    ],
)  # fmt: skip
def test_templates_are_filled(template: str, text: str) -> None:
    assert Template(template).render(DATA) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{", "{{.Id", "{{range .Env}}", "{{end}}", "{{else}}", "{{nosuch .Id}}",
        "{{.Id .}} {{if}}", "{{if .Id}}x{{else}}", "{{.Nope}}", "{{index .Env 9}}", "{{$y}}",
        '{{.Id"a"}}', "{{.Id)}}", "{{range .Id}}{{end}}", '{{"unclosed}}', "{{len 5}}",
    ],
)  # fmt: skip
def test_a_bad_template_is_an_invalid_argument(template: str) -> None:
    with pytest.raises(InvalidArgument):
        Template(template).render(DATA)


_WORDS = st.sampled_from(
    ["{{", "}}", ".Id", ".Env", "range ", "end", "if ", "else", " ", "|", "json ", "(", ")", "$x",
     ":=", '"a"', ".", "1", "x", "index ", "-", "printf "]
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_WORDS, max_size=12).map("".join) | st.text(max_size=30))
def test_only_invalid_argument_escapes(template: str) -> None:
    try:
        Template(template).render(DATA)
    except InvalidArgument:
        return
