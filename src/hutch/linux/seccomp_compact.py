"""Make a filter program short: ranges of system call numbers instead of one test for each.

libseccomp compares each number that a profile names. Runs of neighbours with one answer are
what profiles consist of, so a search over ranges needs a tenth of the instructions, and
loading a program, which the kernel checks, compiles and tries for every number, gets that
much cheaper. The answers are the same for every architecture, number and argument.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

__all__ = ["compact"]

Instruction = tuple[int, int, int, int]

_LD, _AND, _JA, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
_KNOWN = frozenset((_LD, _AND, _JA, _JEQ, _JGT, _JGE, _JSET, _RET))
_COMPARISONS = frozenset((_JEQ, _JGT, _JGE))
_NR, _ARCH = 0, 4
_TOP = 1 << 32
_FAR = 255  # the longest conditional jump


class _Unfit(Exception):
    """A program that is not made as expected; it is left as it is."""


def compact(program: bytes) -> bytes:
    """Return a program with the same answers, and no more instructions than `program`."""
    code = list(struct.iter_unpack("=HBBI", program))
    try:
        short = _assemble(code)
    except _Unfit:
        return program
    if len(short) >= len(code):
        return program
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in short)


def _assemble(code: Sequence[Instruction]) -> list[Instruction]:
    if any(instruction[0] not in _KNOWN for instruction in code):
        raise _Unfit
    numbers, tokens = _constants(code)
    writer = _Writer(code)
    other = next(token for token in range(len(tokens) + 1) if token not in tokens)
    entries = {token: writer.search(_ranges(code, token, numbers)) for token in (other, *tokens)}
    # Written from the end: the first test of the finished program comes last.
    writer.jump(entries[other])
    for token in tokens:
        writer.branch(_JEQ, token, entries[token], writer.here)
    writer.put((_LD, 0, 0, _ARCH))
    return writer.finished()


def _constants(code: Sequence[Instruction]) -> tuple[list[int], list[int]]:
    """Return where answers may change with the number, and the architectures tested for.

    Every path is walked with what the accumulator holds: the number, the architecture, or
    something of the arguments, whose tests stay as they are.
    """
    starts, tokens = {0}, set()
    seen: set[tuple[int, int]] = set()
    todo = [(0, -1)]
    while todo:
        at, held = todo.pop()
        if (at, held) in seen:
            continue
        if at >= len(code):
            raise _Unfit
        seen.add((at, held))
        kind, _, _, k = code[at]
        if kind == _LD:
            held = k
        elif held == _NR and kind in _COMPARISONS:
            starts.update((k, k + 1) if kind != _JGE else (k,))
        elif held == _ARCH and kind == _JEQ:
            tokens.add(k)
        elif held in (_NR, _ARCH, -1) and kind not in (_JA, _RET):
            raise _Unfit
        if kind == _AND:
            held = 1 << 16  # of no word: nothing is concluded from it
        todo += [(at + 1 + step, held) for step in _steps(code[at])]
    return sorted(start for start in starts if start < _TOP), sorted(tokens)


def _steps(instruction: Instruction) -> tuple[int, ...]:
    kind, jt, jf, k = instruction
    if kind == _RET:
        return ()
    if kind == _JA:
        return (k,)
    return (0,) if kind in (_LD, _AND) else (jt, jf)


def _ranges(
    code: Sequence[Instruction], token: int, starts: Iterable[int]
) -> list[tuple[int, int]]:
    """Return (first number, where the answer is) of each run of numbers with one answer."""
    found: list[tuple[int, int]] = []
    for start in starts:
        at = _outcome(code, token, start)
        if not found or not _same(code, found[-1][1], at):
            found.append((start, at))
    return found


def _same(code: Sequence[Instruction], one: int, other: int) -> bool:
    return one == other or (code[one][0] == _RET and code[one] == code[other])


def _outcome(code: Sequence[Instruction], token: int, number: int) -> int:
    """Return the instruction that answers: a return, or the first look at an argument."""
    at, value = 0, 0
    while True:
        kind, jt, jf, k = code[at]
        if kind == _RET or (kind == _LD and k not in (_NR, _ARCH)):
            return at
        at += 1
        if kind == _LD:
            value = token if k == _ARCH else number
        elif kind == _JA:
            at += k
        else:
            taken = value == k if kind == _JEQ else value > k if kind == _JGT else value >= k
            at += jt if taken else jf


class _Writer:
    """Writes instructions from the last to the first: jumps go forward, to what is there."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self._code = code
        self._written: list[Instruction] = []
        self._places: dict[Instruction | int, int] = {}

    @property
    def here(self) -> int:
        """The place of the instruction written last, counted from the end."""
        return len(self._written)

    def finished(self) -> list[Instruction]:
        return self._written[::-1]

    def put(self, instruction: Instruction) -> int:
        self._written.append(instruction)
        return self.here

    def jump(self, place: int) -> int:
        """Go to a place: nothing to write where it comes next anyway."""
        return place if place == self.here else self.put((_JA, 0, 0, self.here - place))

    def branch(self, kind: int, k: int, taken: int, otherwise: int) -> int:
        """Write a test; a place too far for it is reached by a jump just behind it."""
        if self.here - otherwise >= _FAR:  # the next jump, too, may come between
            otherwise = self.put((_JA, 0, 0, self.here - otherwise))
        if self.here - taken > _FAR:
            taken = self.put((_JA, 0, 0, self.here - taken))
        return self.put((kind, self.here - taken, self.here - otherwise, k))

    def search(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Write the search for the number among ranges; return its place."""
        place = self._tree(ranges)
        self.jump(place)
        return self.put((_LD, 0, 0, _NR))

    def _tree(self, ranges: Sequence[tuple[int, int]]) -> int:
        if len(ranges) == 1:
            return self._answer(ranges[0][1])
        middle = len(ranges) // 2
        above = self._tree(ranges[middle:])
        below = self._tree(ranges[:middle])
        return self.branch(_JGE, ranges[middle][0], above, below)

    def _answer(self, at: int) -> int:
        """Return the place of an answer, written anew where none is near."""
        instruction = self._code[at]
        key = instruction if instruction[0] == _RET else at
        place = self._places.get(key)
        if place is None or (instruction[0] == _RET and self.here - place >= _FAR):
            place = self._places[key] = self._copy(at)
        return place

    def _copy(self, at: int) -> int:
        """Write the instructions that can be reached from `at`, in their order."""
        needed, todo = set(), [at]
        while todo:
            step = todo.pop()
            if step not in needed:
                needed.add(step)
                todo += [step + 1 + offset for offset in _steps(self._code[step])]
        order = sorted(needed)
        places: dict[int, int] = {}
        for step in reversed(order):
            kind, jt, jf, k = self._code[step]
            if kind == _RET:
                places[step] = self.put((kind, jt, jf, k))
            elif kind == _JA:
                places[step] = self.jump(places[step + 1 + k])
            elif kind in (_LD, _AND):
                # The next instruction may have been a jump that is now none.
                self.jump(places[step + 1])
                places[step] = self.put((kind, jt, jf, k))
            else:
                places[step] = self.branch(kind, k, places[step + 1 + jt], places[step + 1 + jf])
        return places[at]
