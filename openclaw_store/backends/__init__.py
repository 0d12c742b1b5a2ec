"""One folder for each database engine, behind the interfaces of `base`.

Drivers, connections and error mapping belong here; tables and rules about tasks do not.
"""

from openclaw_store.backends.atomic_files import (
    make_folder,
    rename_to_unused,
    unused_name,
    written_aside,
)
from openclaw_store.backends.base import (
    DEFAULT_ANSWER_SECONDS,
    DEFAULT_LOCATION,
    DEFAULT_TIMEOUT_SECONDS,
    PUBLIC,
    Backend,
    BatchCursor,
    CounterStatements,
    Cursor,
    LockRequiredError,
    OnCommit,
    WriteSession,
    qualified,
    schema_of,
)
from openclaw_store.backends.cancellation import (
    STOPPING_SECONDS,
    cancel_once,
    ended_badly,
    on_thread,
    shield_until_done,
    was_interrupted,
)
from openclaw_store.backends.cluster_names import PLACE, check_cluster
from openclaw_store.backends.error_mapping import SQLiteErrorMapping, unreadable_value
from openclaw_store.backends.factory import backend_of, has_secret, refuse_location
from openclaw_store.backends.internals import fetch_raw_rows
from openclaw_store.backends.notifications import Notifier, notify_of_commits
from openclaw_store.backends.postgresql import citus
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.listening import Follower, Listening
from openclaw_store.backends.postgresql.protocol import array
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.files import BESIDES, file_of
