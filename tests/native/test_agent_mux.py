"""The rules of the agent channel: what the guest's agent grants, refuses and survives."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from hutch.plan import guest
from tests import fuzzing
from tests.native import guests
from tests.native.guests import Peer, frame
from tests.requires import requires

pytestmark = [requires("cc"), pytest.mark.integration]

CALLS = 300


def broken(peer: Peer, *frames: bytes) -> None:
    """Send frames that break a rule: the agent forgets everything and waits for a HELLO."""
    peer.send(b"".join(frames))
    peer.hello(b"afterall")
    assert peer.call(guest.Call.PING).errno == 0


def test_hello_is_answered_with_its_nonce(peer: Peer) -> None:
    assert peer.hello(b"\0\1\2\3\4\5\6\7") == (1, 512)
    assert peer.start_ns > 0


@pytest.mark.parametrize("sent", [5, 12, 13, 30000])
def test_a_hello_is_heard_after_padding_when_a_frame_was_cut_off(peer: Peer, sent: int) -> None:
    """As in the twin of a machine that was copied in the middle of a frame."""
    channel = peer.open(guests.CALL)
    peer.send(frame(channel.number, guests.DATA, bytes(32768))[:sent])
    peer.send(guests.PADDING)
    peer.hello()
    assert peer.call(guest.Call.PING).errno == 0


def test_a_hello_closes_every_channel(peer: Peer) -> None:
    before = guests.descriptors(peer.pid)
    for _ in range(20):
        peer.open(guests.FILES)
    peer.hello()
    peer.next_id = 1  # all of them are free again
    assert peer.call(guest.Call.PING).errno == 0
    assert guests.descriptors(peer.pid) == before


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([frame(0, guests.OPEN, flag=1)], id="a channel 0"),
        pytest.param([frame(9, guests.OPEN, flag=1)] * 2, id="a channel twice"),
        pytest.param([frame(9, guests.DATA, b"x")], id="data of no channel"),
        pytest.param([frame(9, guests.CREDIT, bytes(4))], id="credit of no channel"),
        pytest.param([frame(9, 0)], id="type 0"),
        pytest.param([frame(9, 7)], id="type 7"),
        pytest.param([struct.pack("<IBBHI", 9, 2, 1, 1, 0)], id="a bit that must be zero"),
        pytest.param([struct.pack("<IBBHI", 9, 3, 0, 0, 32769)], id="a frame too long"),
        pytest.param([struct.pack("<IBBHI", 9, 3, 0, 0, 0xFFFFFFFF)], id="a frame of 4 GiB"),
        pytest.param([frame(9, guests.OPEN, b"x", flag=1)], id="open with a payload"),
        pytest.param(
            [frame(9, guests.OPEN, flag=1), frame(9, guests.EOF), frame(9, guests.EOF)],
            id="the end twice",
        ),
        pytest.param(
            [frame(9, guests.OPEN, flag=2), frame(9, guests.CREDIT, b"\xff\xff\xff\xff")],
            id="credit beyond bounds",
        ),
        pytest.param(
            [frame(9, guests.OPEN, flag=2), frame(9, guests.CREDIT, b"\xff")], id="half a credit"
        ),
        pytest.param([frame(0, guests.HELLO, bytes(11))], id="half a hello"),
    ],
)
def test_a_broken_rule_resets_the_channel(peer: Peer, frames: list[bytes]) -> None:
    broken(peer, *frames)


def test_more_data_than_credit_breaks_the_rules(peer: Peer) -> None:
    channel = peer.open(guests.SPAWN)
    # A plan of 4 MiB: the agent takes it as it comes, and gives credit for half a window.
    channel.write(struct.pack("<I", 4 << 20) + bytes(60000))
    broken(peer, *[frame(channel.number, guests.DATA, bytes(32768))] * 4)


def test_more_than_512_channels_break_the_rules(peer: Peer) -> None:
    for _ in range(512):
        peer.open(guests.CALL)
    broken(peer, frame(peer.next_id, guests.OPEN, flag=1))


def test_an_unknown_kind_of_channel_is_closed(peer: Peer) -> None:
    assert peer.open(9).closed() == errno.EPROTONOSUPPORT
    assert peer.call(guest.Call.PING).errno == 0


def test_a_closed_channel_is_answered_once_and_its_id_is_free(peer: Peer) -> None:
    for _ in range(5):
        peer.next_id = 7
        peer.open(guests.CALL).close()
        peer.next_id = 7
        assert peer.call(guest.Call.PING).errno == 0


def test_many_channels_at_once_keep_apart(peer: Peer) -> None:
    channels = [peer.open(guests.CALL) for _ in range(CALLS)]
    order = list(range(CALLS))
    random.Random(1).shuffle(order)
    for at in order:
        call = guest.Call.PING if at % 2 else guest.Call.FREEZE
        argument = b"" if at % 2 else guest.path_argument(f"/nonexistent/{at}")
        channels[at].write(guest.encode_call(call, argument))
    for at in order:
        channels[at].eof()
    for at, channel in enumerate(channels):
        answer = channel.rest()
        assert (f"/nonexistent/{at}".encode() in answer) == (at % 2 == 0)


def test_the_agent_sends_no_more_than_its_credit(peer: Peer) -> None:
    content = random.Random(2).randbytes(1 << 20)
    head, _ = peer.files(guest.WriteContent(path="/big"), content)
    assert head.errno == 0
    slow = peer.open(guests.FILES)
    slow.generous = False
    slow.write(guest.encode_files(guest.ReadFile(path="/big")))
    slow.eof()
    while slow.granted:  # Channel.take fails the test when it is more
        peer.turn()
    # The others go on while one does not read.
    assert peer.call(guest.Call.PING).errno == 0
    head, body = peer.files(guest.ReadFile(path="/big"))
    assert body == content
    slow.generous = True
    slow.grant()
    assert slow.rest()[9:] == content


def test_a_request_beyond_its_limit_is_refused(peer: Peer) -> None:
    channel = peer.open(guests.CALL)
    channel.write(bytes((4 << 20) + 1))
    assert channel.closed() == errno.EMSGSIZE


def test_frames_that_nobody_meant(peer: Peer) -> None:
    """Whatever arrives, the agent is there for the next HELLO."""
    dice = fuzzing.dice(3)
    for _ in range(fuzzing.rounds(300)):
        frames = []
        for _ in range(dice.randrange(1, 8)):
            payload = dice.randbytes(dice.choice([0, 0, 4, 12, 100, 3000]))
            one = bytearray(frame(dice.randrange(4), dice.randrange(8), payload, dice.randrange(5)))
            if dice.random() < 0.2:
                one[dice.randrange(len(one))] = dice.randrange(256)
            frames.append(bytes(one))
        peer.send(b"".join(frames) + guests.PADDING)
        peer.hello(dice.randbytes(8))
    assert peer.call(guest.Call.PING).errno == 0
