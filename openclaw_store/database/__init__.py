"""`Database`: the schema and its migrations, sessions, and group commit.

This room stores rows. It knows neither the meaning of a write nor the caches.
"""

from openclaw_store.database.change_chain import history_of
from openclaw_store.database.claim_statements import SKILL_GROUPS
from openclaw_store.database.cluster_id import cluster_id_of
from openclaw_store.database.database import Database
from openclaw_store.database.dialects import statements_for, statements_in, statements_of
from openclaw_store.database.difference import Difference
from openclaw_store.database.group_commit import Apply
from openclaw_store.database.legacy_import import LegacyImport
from openclaw_store.database.migrations import (
    COPYING,
    COPYING_HEAD,
    HEAD,
    names_of_tables,
    stored,
)
from openclaw_store.database.row_codec import COLUMNS, FIELDS, places_of
from openclaw_store.database.schema_differences import differences
from openclaw_store.database.sharing import Sharing
from openclaw_store.database.slices import Slices
from openclaw_store.database.statements import REASON, USAGE, Statements
from openclaw_store.database.store_write import CALL_FIELDS, FUNCTION
from openclaw_store.database.tables import (
    HAS_FAILED,
    IS_ASSIGNED,
    IS_DELAYED,
    IS_EXPIRING,
    IS_FINISHED,
    IS_LIVE,
    IS_PENDING,
    IS_READY,
    ROWS,
    ArchiveRunRow,
    ArchiveVoidRow,
    Base,
    ChangeRow,
    CounterRow,
    DecisionRow,
    IncomingRow,
    LeaseRow,
    NodeRow,
    OutgoingRow,
    PastChangeRow,
    SealingKeyRow,
    TaskRow,
    table_of,
)
from openclaw_store.database.transactions import (
    Unit,
    commit_unit,
    end_prepared,
    is_beside,
    open_block,
)
from openclaw_store.database.types import (
    EnumValue,
    Json,
    SealableText,
    UtcTime,
    from_microseconds,
    to_microseconds,
)
from openclaw_store.database.write_transaction import WriteTransaction
