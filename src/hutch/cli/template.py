"""The part of Go's text/template that people use with `--format`.

Actions: fields (`.State.Status`), variables, literals, pipelines, `range`, `if`, `with`,
`else`, `end`, comments, `{{-` and `-}}`. Functions: json, index, len, join, split, upper,
lower, title, println, print, printf (%s %d %v %q), eq, ne, lt, le, gt, ge, and, or, not,
truncate. A field that is missing is an error naming it, as with Docker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hutch.errors import InvalidArgument

__all__ = ["Template"]

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|`[^`]*`|-?\d+(?:\.\d+)?|\$?[A-Za-z_]\w*'
    r"|\.(?=[\s)|]|$)|(?:\.[\w-]+)+|\$|:=|[(),|=])"
)
_NAME = re.compile(r"[A-Za-z_]\w*$")
_MAX_DEPTH = 50
_MISSING = object()

Node = tuple[Any, ...]
Scope = dict[str, Any]


class Template:
    """A compiled template; `render` fills it with one value."""

    def __init__(self, source: str) -> None:
        self._parts = _split(source)
        self._position = 0
        self._nodes, end = self._block(0)
        if end:
            raise _error(f"unexpected {{{{{end}}}}}")

    def render(self, data: Any) -> str:
        """Return the text for `data`, made of dictionaries, sequences and plain values."""
        out: list[str] = []
        _run(self._nodes, data, {"$": data}, out)
        return "".join(out)

    def _block(self, depth: int) -> tuple[list[Node], str]:
        """Read nodes up to `end` or `else`; return them and the word that ended them."""
        if depth > _MAX_DEPTH:
            raise _error("nested too deeply")
        nodes: list[Node] = []
        while self._position < len(self._parts):
            is_action, text = self._parts[self._position]
            self._position += 1
            if not is_action:
                nodes.append(("text", text))
                continue
            word = text.split(None, 1)[0] if text else ""
            if text.startswith("/*") or not text:
                continue
            if word == "end" or word == "else":
                return nodes, text
            if word in ("if", "range", "with"):
                nodes.append(self._control(word, text[len(word) :], depth))
            else:
                nodes.append(("print", _Parser(text).statement()))
        return nodes, ""

    def _control(self, word: str, rest: str, depth: int) -> Node:
        head = _Parser(rest).control()
        body, end = self._block(depth + 1)
        other: list[Node] = []
        if end == "else":
            other, end = self._block(depth + 1)
        elif end.startswith("else"):
            inner = end[4:].lstrip()
            if not inner.startswith("if"):
                raise _error(f"unexpected {{{{{end}}}}}")
            return (word, head, body, [self._control("if", inner[2:], depth + 1)])
        if end != "end":
            raise _error(f"{word} without end")
        return (word, head, body, other)


def _split(source: str) -> list[tuple[bool, str]]:
    parts: list[tuple[bool, str]] = []
    last = 0
    trim = False
    for match in _ACTION.finditer(source):
        text = source[last : match.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if match[1] else text
        if text:
            parts.append((False, text))
        parts.append((True, match[2]))
        trim = bool(match[3])
        last = match.end()
    tail = source[last:].lstrip() if trim else source[last:]
    if "{{" in tail:
        raise _error("unclosed action")
    if tail:
        parts.append((False, tail))
    return parts


class _Parser:
    """Read one action into an expression: (kind, …) tuples."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _error(f"cannot read {text[position:]!r}")
            self._tokens.append(match[1])
            position = match.end()
        self._at = 0

    def statement(self) -> Node:
        if (
            len(self._tokens) > 2
            and self._tokens[0].startswith("$")
            and (self._tokens[1] in (":=", "="))
        ):
            self._at = 2
            return ("set", self._tokens[0], self._whole())
        return self._whole()

    def control(self) -> Node:
        names: list[str] = []
        if ":=" in self._tokens:
            cut = self._tokens.index(":=")
            names = [token for token in self._tokens[:cut] if token != ","]
            self._at = cut + 1
        return ("control", names, self._whole())

    def _whole(self) -> Node:
        expression = self._pipeline()
        if self._at != len(self._tokens):
            raise _error(f"unexpected {self._tokens[self._at]!r}")
        return expression

    def _pipeline(self) -> Node:
        expression = self._command(None)
        while self._peek() == "|":
            self._at += 1
            expression = self._command(expression)
        return expression

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _command(self, piped: Node | None) -> Node:
        token = self._peek()
        if _NAME.match(token) and token not in ("true", "false", "nil"):
            if token not in _FUNCTIONS:
                raise _error(f"function {token!r} not defined")
            self._at += 1
            arguments: list[Node] = []
            while self._peek() not in ("", "|", ")"):
                arguments.append(self._operand())
            return ("call", token, arguments + ([piped] if piped else []))
        operand = self._operand()
        if self._peek() not in ("", "|", ")"):  # `.Label "x"`: a field that takes arguments
            arguments = [operand]
            while self._peek() not in ("", "|", ")"):
                arguments.append(self._operand())
            return ("method", arguments)
        if piped is not None:
            raise _error("a value cannot take another")
        return operand

    def _operand(self) -> Node:
        token = self._peek()
        self._at += 1
        if token == "(":
            inner = self._pipeline()
            if self._peek() != ")":
                raise _error("missing )")
            self._at += 1
            return self._fields(inner)
        if token[:1] in '"`' and token:
            return ("value", _unquote(token))
        if token == ".":
            return ("dot",)
        if token.startswith("."):
            return ("field", ("dot",), token[1:].split("."))
        if token.startswith("$"):
            return self._fields(("variable", token))
        if token in ("true", "false", "nil"):
            return ("value", {"true": True, "false": False, "nil": None}[token])
        if token[:1].isdigit() or token[:1] == "-":
            return ("value", float(token) if "." in token else int(token))
        if token in _FUNCTIONS:
            return ("call", token, [])
        raise _error(f"unexpected {token!r}")

    def _fields(self, base: Node) -> Node:
        token = self._peek()
        if token.startswith(".") and len(token) > 1:
            self._at += 1
            return ("field", base, token[1:].split("."))
        return base


def _unquote(token: str) -> str:
    body = token[1:-1]
    if token[0] == "`":
        return body
    escapes = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
    return re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), body)


# ---- running ----------------------------------------------------------------------------


def _run(nodes: list[Node], dot: Any, scope: Scope, out: list[str]) -> None:
    for node in nodes:
        kind = node[0]
        if kind == "text":
            out.append(node[1])
        elif kind == "print":
            if node[1][0] == "set":
                scope[node[1][1]] = _value(node[1][2], dot, scope)
            else:
                out.append(_text(_value(node[1], dot, scope)))
        elif kind == "range":
            _run_range(node, dot, scope, out)
        else:
            _, names, expression = node[1]
            value = _value(expression, dot, scope)
            inner = dict(scope) | dict.fromkeys(names, value)
            body = node[2] if _true(value) else node[3]
            _run(body, value if kind == "with" and _true(value) else dot, inner, out)


def _run_range(node: Node, dot: Any, scope: Scope, out: list[str]) -> None:
    _, names, expression = node[1]
    value = _value(expression, dot, scope)
    if isinstance(value, Mapping):
        pairs = sorted(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    elif not value:
        pairs = []
    else:
        raise _error("range needs a list or a map")
    for key, member in pairs:
        inner = dict(scope)
        if len(names) == 1:
            inner[names[0]] = member
        elif len(names) == 2:
            inner[names[0]], inner[names[1]] = key, member
        _run(node[2], member, inner, out)
    if not pairs:
        _run(node[3], dot, scope, out)


def _value(node: Node, dot: Any, scope: Scope) -> Any:
    match node[0]:
        case "value":
            return node[1]
        case "dot":
            return dot
        case "variable":
            if node[1] not in scope:
                raise _error(f"undefined variable {node[1]}")
            return scope[node[1]]
        case "field":
            return _field(_value(node[1], dot, scope), node[2])
        case "call":
            return _call(node[1], [_value(argument, dot, scope) for argument in node[2]])
        case "method":
            base, *arguments = node[1]
            found = _value(base, dot, scope)
            keys = [_value(argument, dot, scope) for argument in arguments]
            return found(*keys) if callable(found) else _index(found, *keys)
    raise _error("cannot be evaluated")


def _field(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        found = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if found is _MISSING:
            if value is None:
                return None
            known = (
                f"there are {', '.join(map(str, value))}" if isinstance(value, Mapping) else None
            )
            raise _error(f"no field {name!r}", hint=known)
        value = found
    return value


def _call(name: str, arguments: list[Any]) -> Any:
    try:
        return _FUNCTIONS[name](*arguments)
    except (TypeError, ValueError, IndexError, KeyError) as exc:
        raise _error(f"{name}: {exc}") from exc


def _true(value: Any) -> bool:
    return bool(value)


def _text(value: Any) -> str:
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{k}:{_text(v)}" for k, v in sorted(value.items())) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(value)


def _json(value: Any) -> str:
    from hutch.cli.output import to_json

    return to_json(value, indent=False)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if value is None:
            return None
        try:
            value = value.get(key, "") if isinstance(value, Mapping) else value[key]
        except (TypeError, LookupError):
            raise _error(f"{type(value).__name__} cannot be indexed with {key!r}") from None
    return value


def _printf(form: str, *values: Any) -> str:
    remaining = list(values)

    def fill(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        value = remaining.pop(0)
        text = f'"{value}"' if match[2] == "q" else _text(value)
        width = int(match[1] or 0)
        return text.ljust(-width) if width < 0 else text.rjust(width)

    return re.sub(r"%(-?\d*)([sdvqf%])", fill, form)


def _compare(how: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    return lambda first, *others: any(how(first, other) for other in others)


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": _json,
    "index": _index,
    "len": len,
    "join": lambda items, separator="": separator.join(map(_text, items)),
    "split": lambda text, separator: text.split(separator),
    "upper": lambda text: _text(text).upper(),
    "lower": lambda text: _text(text).lower(),
    "title": lambda text: _text(text).title(),
    "print": lambda *values: "".join(map(_text, values)),
    "println": lambda *values: " ".join(map(_text, values)) + "\n",
    "printf": _printf,
    "truncate": lambda text, size: _text(text)[:size],
    "eq": _compare(lambda a, b: bool(a == b)),
    "ne": _compare(lambda a, b: bool(a != b)),
    "lt": _compare(lambda a, b: bool(a < b)),
    "le": _compare(lambda a, b: bool(a <= b)),
    "gt": _compare(lambda a, b: bool(a > b)),
    "ge": _compare(lambda a, b: bool(a >= b)),
    "and": _and,
    "or": _or,
    "not": lambda value: not value,
}


def _error(message: str, *, hint: str | None = None) -> InvalidArgument:
    return InvalidArgument(message, field="format", hint=hint)
