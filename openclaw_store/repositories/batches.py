"""Apply commands in a write transaction, in the way of its database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openclaw_store.backends import BatchCursor
from openclaw_store.database import WriteTransaction
from openclaw_store.repositories.one_call import OneCall
from openclaw_store.repositories.unit_of_work import Command, UnitOfWork


def unit_of(transaction: WriteTransaction) -> UnitOfWork:
    """Return the unit of work of a transaction; the first call makes it."""
    if transaction.unit_of_work is None:
        cursor = transaction.cursor
        if isinstance(cursor, BatchCursor):
            transaction.unit_of_work = OneCall(transaction, cursor)
        else:
            transaction.unit_of_work = UnitOfWork(transaction)
    unit: UnitOfWork = transaction.unit_of_work
    return unit


def apply(transaction: WriteTransaction, commands: Sequence[Command]) -> Sequence[Any]:
    """Apply the commands in order and return their results, which may be errors."""
    return unit_of(transaction).run(commands) if commands else []


def apply_together(
    transaction: WriteTransaction, groups: Sequence[Sequence[Command]]
) -> Sequence[Sequence[Any]]:
    """Apply groups of commands; each group was submitted as one operation."""
    return [apply(transaction, group) for group in groups]
