"""A compact set of revisions."""

from __future__ import annotations

from collections.abc import Iterable

BATCH = 5000
"""Rows of a few numbers that are read before other coroutines run."""


class Revisions:
    """A set of revisions that needs one bit for each of the revisions close together."""

    _BITS = 1 << 16

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}

    def update(self, revisions: Iterable[int]) -> None:
        """Add many revisions."""
        blocks, bits = self._blocks, self._BITS
        number, block = -1, bytearray()
        for revision in revisions:  # written out, as below: there may be millions
            if revision // bits != number:
                number = revision // bits
                block = blocks.setdefault(number, bytearray(bits // 8))
            position = revision % bits
            block[position >> 3] |= 1 << (position & 7)

    def missing(self, revisions: Iterable[int]) -> list[int]:
        """Return the revisions that are not in the set."""
        blocks, bits, none = self._blocks, self._BITS, bytearray(self._BITS // 8)
        number, block = -1, none
        found: list[int] = []
        for revision in revisions:
            if revision // bits != number:
                number = revision // bits
                block = blocks.get(number, none)
            position = revision % bits
            if not block[position >> 3] >> (position & 7) & 1:
                found.append(revision)
        return found
