"""`Expression`: regular expressions that come out of files, matched without ever going back, so
that none can run for ever as it can in `re`. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable

# How far matches have got, as the bits of an int: bit i stands before character i of the text.
Node = Callable[["_Match", int], int]

LONGEST = 1000
"""Characters of an expression, and of a text: far more than any path of a model has."""
DEEPEST = 20
"""Groups in groups."""
STEPS = 20_000
"""Of one match; an expression that people write takes hundreds."""

_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\\[^A-Za-z0-9]|[^\\()\[*+?{|^$]")
_REPEAT = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})\??(?![*+?{])")
_OPEN = re.compile(r"\((?:\?:|\?=|\?!|\?P<\w+>|(?!\?))")


class Expression:
    """What `re` means by the same pattern: literals, escapes, classes, `.`, groups, `|`, `^`, `$`,
    `* + ? {m,n}` and lookahead. Raises ValueError for anything else."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._depth = pattern, 0, 0
        if len(pattern) > LONGEST:
            raise self._refused()
        self._node = self._choice()
        if self._at < len(pattern):
            raise self._refused()

    def fits_end(self, path: str) -> bool:
        """Whether it matches the whole of `path`, or all behind one of its dots. Raises ValueError
        for a path of more than `LONGEST` characters and a match of more than `STEPS` steps."""
        if len(path) > LONGEST:
            raise ValueError(f"a path has {len(path)} characters: at most {LONGEST} are read")
        match = _Match(path)
        starts = 1 | match.places(re.compile(r"\.")) << 1
        return self._node(match, starts) >> len(path) == 1

    def _choice(self) -> Node:
        branches = [self._sequence()]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            branches.append(self._sequence())

        def either(match: _Match, places: int) -> int:
            found = 0
            for branch in branches:
                found |= branch(match, places)
            return found

        return either

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._repeated(self._item()))

        def one_by_one(match: _Match, places: int) -> int:
            for part in parts:
                places = part(match, places)
            return places

        return one_by_one

    def _item(self) -> Node:
        opened = self._take(_OPEN)
        if opened is not None:
            self._depth += 1
            inner = self._choice() if self._depth <= DEEPEST else None
            if inner is None or self._take(re.compile(r"\)")) is None:
                raise self._refused()
            self._depth -= 1
            if opened in ("(?=", "(?!"):
                return lambda match, places: match.ahead(inner, places, opened == "(?=")
            return inner
        edge = self._take(re.compile(r"[$^]"))
        if edge is not None:
            return lambda match, places: places & (1 if edge == "^" else match.end)
        atom = self._take(_ATOM)
        if atom is None:
            raise self._refused()
        try:
            kind = re.compile(atom)
        except re.error as error:
            raise self._refused() from error
        return lambda match, places: (places & match.places(kind)) << 1

    def _repeated(self, node: Node) -> Node:
        repeat = self._take(_REPEAT)
        if repeat is None:
            return node
        short = {"*": "0,", "+": "1,", "?": "0,1"}.get(repeat[0], repeat.rstrip("?")[1:-1])
        least, comma, most = short.partition(",")
        low = int(least or 0)
        high = int(most) if most else None if comma else low
        if high is not None and high < low:
            raise self._refused()
        return lambda match, places: match.repeat(node, places, low, high)

    def _take(self, kind: re.Pattern[str]) -> str | None:
        found = kind.match(self._pattern, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found.group()

    def _refused(self) -> ValueError:
        rest = self._pattern[self._at :]
        return ValueError(
            f"an expression cannot be read at {rest[:40]!r}: literals, classes, groups, choices, "
            f"repetitions and lookahead can, up to {LONGEST} characters and {DEEPEST} groups deep"
        )


class _Match:
    """One text on its way through an expression."""

    def __init__(self, text: str) -> None:
        self.text, self.end = text, 1 << len(text)
        self._places: dict[re.Pattern[str], int] = {}
        self._steps = 0

    def places(self, kind: re.Pattern[str]) -> int:
        """Where a character stands that a one-character expression fits."""
        self._step()
        if kind not in self._places:
            fits = enumerate(map(kind.fullmatch, self.text))
            self._places[kind] = sum(1 << i for i, found in fits if found)
        return self._places[kind]

    def repeat(self, node: Node, places: int, least: int, most: int | None) -> int:
        for _ in range(min(least, len(self.text) + 1)):  # more often changes nothing
            places = node(self, places)
        found = fresh = places
        left = -1 if most is None else most - least
        while fresh and left != 0:
            self._step()
            left -= 1
            fresh = node(self, fresh) & ~found
            found |= fresh
        return found

    def ahead(self, node: Node, places: int, wanted: bool) -> int:
        found = 0
        for i in range(places.bit_length()):
            self._step()
            if places >> i & 1 and bool(node(self, 1 << i)) == wanted:
                found |= 1 << i
        return found

    def _step(self) -> None:
        self._steps += 1
        if self._steps > STEPS:
            raise ValueError(f"matching an expression to a path takes more than {STEPS} steps")
