"""Encryption at rest: keys, the form of a sealed value, and its cipher.

This room knows no table by its contents, and reads and writes no database. The cipher is imported
only if a database has keys.
"""

from openclaw_store.encryption.envelope import (
    PREFIX,
    USER_ID,
    Hash,
    Protection,
    Sealed,
    SealedColumn,
    SealedColumns,
)
from openclaw_store.encryption.fields import (
    FIXED_REASONS,
    SEALED_FIELDS,
)
from openclaw_store.encryption.key_ring import (
    KEYS_VARIABLE,
    Key,
    KeyProvider,
    KeyRing,
    KeyState,
    keys_of,
)
