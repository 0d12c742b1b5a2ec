"""The keys of a database: which ones it needs, and the statements that seal and open values.

The table `sealing_keys` lists the keys by which values may be sealed. A database is opened only
with all of them. The primary key is added to the list before it seals anything.

Each row also names the optional fields that are sealed, as `name user_id`. The name of a field that
is sealed no more begins with `-` until a rotation has opened its values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from secrets import randbits
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import Backend
from openclaw_store.database.dialects import statements_for
from openclaw_store.database.statements import Statements
from openclaw_store.database.tables import (
    ChangeRow,
    CounterRow,
    NodeRow,
    OutgoingRow,
    PastChangeRow,
    SealingKeyRow,
    TaskRow,
)
from openclaw_store.domain import Clock
from openclaw_store.encryption import KEYS_VARIABLE, KeyRing, KeyState
from openclaw_store.errors import KeyRingError, SchemaMismatchError

if TYPE_CHECKING:
    from openclaw_store.encryption.cipher import Cipher

_ADVICE: Final = f"give Database(keys=KeyRing.load(…)), or set {KEYS_VARIABLE}"


def require_no_keys(connection: Connection) -> None:
    """Refuse to open a database without keys if it has sealed values.

    Raises:
        KeyRingError: With the keys that it needs.
    """
    needed = list(_listed(connection))
    if needed:
        numbers = ", ".join(map(str, needed))
        raise KeyRingError(
            f"values of the database are sealed by the keys {numbers}: {_ADVICE}", needed[-1]
        )


def accept(connection: Connection) -> None:
    """Accept any content, as `open_statements` checks it."""


def open_statements(backend: Backend, ring: KeyRing, clock: Clock) -> Statements:
    """Return the statements that seal and open the values of a database; blocks the thread.

    The primary key is added to the list of the database, if it is missing there.

    Args:
        ring: An unlocked key ring.

    Raises:
        KeyRingError: If the ring lacks a key that the database needs, or has another one under
            its number.
    """
    plain = statements_for(backend)
    found = backend.inspect(partial(_cipher_if_listed, ring))
    cipher = found or backend.migrate(partial(add_keys, ring=ring, clock=clock))
    return plain.protected_by(cipher)


def add_keys(connection: Connection, ring: KeyRing, clock: Clock) -> Cipher:
    """Add the primary key of a ring to the list of the database, and return the cipher.

    Without a primary key, values in clear are allowed from now on. Errors are those of
    `open_statements`.
    """
    cipher = _checked_cipher(connection, ring)
    primary, fields = ring.primary, _text_of(cipher)
    is_complete = not cipher.accepts_clear or not _has_rows(connection)
    if primary is not None and primary not in _listed(connection):
        values = {
            "id": primary,
            "cluster_id": cipher.cluster,
            "proof": cipher.prove(),
            "added_at": clock(),
        }
        connection.execute(insert(SealingKeyRow).values(values))
    is_complete = is_complete and primary is not None
    values = {"is_complete": int(is_complete), "sealed_fields": fields}
    connection.execute(update(SealingKeyRow).values(values))
    cipher.accepts_clear = not is_complete
    return cipher


def _cipher_if_listed(ring: KeyRing, connection: Connection) -> Cipher | None:
    """Return the cipher, or `None` if the list must be changed before."""
    cipher = _checked_cipher(connection, ring)
    listed = _listed(connection)
    is_listed = ring.primary in listed and _text_of(cipher) == _stored_fields(connection)
    if not is_listed and (listed or ring.primary is not None):
        return None
    return cipher


def _stored_fields(connection: Connection) -> str:
    return connection.scalar(select(func.max(SealingKeyRow.sealed_fields))) or ""


def _text_of(cipher: Cipher) -> str:
    """Return the optional fields of a cipher as the list of keys has them."""
    return " ".join([*sorted(cipher.seals), *(f"-{name}" for name in sorted(cipher.opens))])


def _checked_cipher(connection: Connection, ring: KeyRing) -> Cipher:
    listed = _listed(connection)
    stored = _stored_fields(connection).split()
    before = {name for name in stored if not name.startswith("-")}
    seals = before if ring.seal is None else ring.seal
    opens = {name.removeprefix("-") for name in stored} - seals
    cipher = _new_cipher(ring, _cluster_id(connection), seals, opens)
    for id, proof in listed.items():
        if id not in ring.keys:
            raise KeyRingError(
                f"values of the database are sealed by key {id}, which the key ring lacks: add it",
                id,
            )
        if not cipher.proves(id, proof):
            raise KeyRingError(
                f"key {id} of the key ring is not the key {id} of the database: {_ADVICE} with the "
                "file of this database",
                id,
            )
    complete = select(func.max(SealingKeyRow.is_complete))
    is_all_sealed = ring.primary is not None and seals <= before
    cipher.accepts_clear = not is_all_sealed or not connection.scalar(complete)
    return cipher


def _new_cipher(
    ring: KeyRing, cluster: int, seals: Collection[str], opens: Collection[str]
) -> Cipher:
    try:
        from openclaw_store.encryption.cipher import Cipher
    except ImportError as error:
        raise KeyRingError(
            "keys need the package cryptography: pip install 'openclaw-store[encryption]'"
        ) from error
    return Cipher(ring, cluster, accepts_clear=True, seals=seals, opens=opens)


def _cluster_id(connection: Connection) -> int:
    """Return the number of the cluster, to which sealed values are bound.

    While `copy` fills a database, it has no counters. The list of keys has the number then, and
    `copy` gives it to the new counters.
    """
    numbers: set[int] = {
        *connection.scalars(select(CounterRow.cluster_id)),
        *connection.scalars(select(SealingKeyRow.cluster_id)),
    } or {randbits(62)}
    if len(numbers) > 1:
        raise SchemaMismatchError(
            "the number of the cluster was changed, and no key opens its values: restore a backup"
        )
    return numbers.pop()


def _listed(connection: Connection) -> Mapping[int, str]:
    columns = SealingKeyRow.id, SealingKeyRow.proof
    found = connection.execute(select(*columns).order_by(SealingKeyRow.id))
    return {row.id: row.proof for row in found}


def _has_rows(connection: Connection) -> bool:
    rows = (TaskRow, NodeRow, ChangeRow, PastChangeRow, OutgoingRow)
    return any(connection.scalar(select(select(row).exists())) for row in rows)


async def finish_rotation(
    tx: AsyncSession, cipher: Cipher, left: set[int], *, is_complete: bool
) -> None:
    """Take keys off the list by which nothing is sealed, and note if all values are current.

    An active key stays on the list: another process may seal by it.

    Args:
        left: Keys by which values are sealed still.
    """
    ring = cipher.ring
    active = {key.id for key in ring.keys.values() if key.state is KeyState.ACTIVE}
    kept = left | (active if ring.primary is not None else set())
    await tx.execute(delete(SealingKeyRow).where(SealingKeyRow.id.not_in(kept)))
    if is_complete:
        values = {
            "is_complete": int(ring.primary is not None),
            "sealed_fields": " ".join(sorted(cipher.seals)),
        }
        await tx.execute(update(SealingKeyRow).values(values))
