"""Decoders are made in one piece, whatever signal comes meanwhile."""

from __future__ import annotations

import signal

import msgspec
import pytest

from hutch import decoding


def test_a_signal_while_a_decoder_is_made_is_handled_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Kind(msgspec.Struct):
        field: int

    made: list[object] = []
    real = msgspec.json.Decoder

    def interrupted(kind: type[Kind]) -> object:
        signal.raise_signal(signal.SIGINT)
        for _ in range(100):  # the interpreter looks for signals between these
            pass
        made.append(real(kind))
        return made[0]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(msgspec.json, "Decoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoding.prepare(Kind)
    assert len(made) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert decoding.prepare(Kind).decode(b'{"field": 1}') == Kind(field=1)


@pytest.mark.parametrize("kind", [object, dict[str, object], dict[str, str]])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"\xff": "a"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply|Expected `str`"),
        (b'{"a": ', "truncated"),
    ],
)
def test_whatever_is_wrong_with_a_document_has_one_exception(
    kind: type[object], data: bytes, said: str
) -> None:
    with pytest.raises(msgspec.DecodeError, match=said):
        decoding.decode_json(data, kind)
