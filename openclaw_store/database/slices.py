"""Slices: long computations on an event loop, between which its other coroutines run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from openclaw_store.domain import Entity, Record, Steps

Result = TypeVar("Result")

_SLICE_BYTES = 1 << 18
"""Bytes of JSON decoded in one slice, at most; it takes a few milliseconds."""


class Slices:
    """The long computations of one event loop: at most one runs at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, steps: Steps[Result]) -> Result:
        """Run a computation, and other coroutines between its steps."""
        try:
            # Most computations have one step, and need not wait for their turn.
            next(steps)
            async with self._turn:
                while True:
                    await asyncio.sleep(0)
                    next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result

    async def copies(self, records: Iterable[Record[Entity]]) -> list[Entity]:
        """Return copies for the caller; other coroutines run after each slice of a long list."""
        copies: list[Entity] = []
        size = 0
        for record in records:
            size += record.size
            if size > _SLICE_BYTES:
                await asyncio.sleep(0)
                size = record.size
            if size > _SLICE_BYTES:
                copies.append(await self.run(record.copy_in_steps()))
            else:
                copies.append(record.copy())
        return copies
