"""A compact set of revisions."""

from __future__ import annotations

from collections.abc import Iterable


class Revisions:
    """A set of revisions that needs one bit for each of the revisions close together."""

    _BITS = 1 << 16

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}

    def add(self, revision: int) -> None:
        """Add a revision."""
        block, bit = divmod(revision, self._BITS)
        if block not in self._blocks:
            self._blocks[block] = bytearray(self._BITS // 8)
        self._blocks[block][bit >> 3] |= 1 << (bit & 7)

    def update(self, revisions: Iterable[int]) -> None:
        """Add many revisions."""
        blocks, bits = self._blocks, self._BITS
        number, block = -1, bytearray()
        for revision in revisions:  # written out: there may be millions
            if revision // bits != number:
                number = revision // bits
                block = blocks.setdefault(number, bytearray(bits // 8))
            position = revision % bits
            block[position >> 3] |= 1 << (position & 7)

    def __contains__(self, revision: int) -> bool:
        block, bit = divmod(revision, self._BITS)
        return block in self._blocks and bool(self._blocks[block][bit >> 3] >> (bit & 7) & 1)
