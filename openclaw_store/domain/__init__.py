"""The domain: tasks, nodes, changes and their rules, as pure values and functions.

This room performs no I/O, knows no SQL and awaits nothing; only `clock` asks for the time.
Rules that need the database or the cache belong in the rooms above.
"""

from openclaw_store.domain.backoff import DEFAULT_BACKOFF, Backoff, Wait, check_backoff
from openclaw_store.domain.changes import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    Change,
    ChangeKind,
    EntityKey,
    key_of,
)
from openclaw_store.domain.clock import Clock, new_id, utc_now
from openclaw_store.domain.conditions import free_slots, has_skills, is_due, is_expired
from openclaw_store.domain.filters import (
    NodeFilter,
    TaskFilter,
    TaskPage,
    check_filter,
    check_selection,
)
from openclaw_store.domain.lifecycle import (
    SET_BY_REGISTRATION,
    TURNED_BACK,
    Decision,
    NodeDelta,
    Outcome,
    Step,
    Values,
    missing_time,
)
from openclaw_store.domain.models import (
    ALIVE,
    ASSIGNED,
    FINISHED,
    LIVE,
    WAITING,
    ClusterState,
    NodeInfo,
    NodeStatus,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain.preferences import WINDOW, by_preference, passed_over
from openclaw_store.domain.progress import (
    Progress,
    decode_progress,
    encode_progress,
    is_progress,
    progress_of,
)
from openclaw_store.domain.records import (
    JSON_FIELDS,
    KEY,
    SMALL_BYTES,
    STAMPED,
    ConvertRow,
    Decode,
    Entity,
    Raw,
    Record,
    RowCodec,
    admit,
    check_record,
    decode,
    encode,
    encode_long_values,
    write_back,
)
from openclaw_store.domain.retention import Retention
from openclaw_store.domain.serialization import STORE_FIELDS
from openclaw_store.domain.validation import (
    MAX_ID_LENGTH,
    MAX_INTEGER,
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_TEXT_LENGTH,
    LongValueError,
    Steps,
    check_count,
    check_enum,
    check_key,
    check_limit,
    check_limit_seconds,
    check_number,
    check_percentage,
    check_positive,
    check_seconds,
    check_text,
    check_time,
    describe_exception,
    encode_in_steps,
    encode_json,
    short_only,
)
