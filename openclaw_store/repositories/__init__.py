"""Repositories: read and write tasks and nodes, and assign a revision to every change.

This room holds the commands, the unit of work, the change log and its retention. It caches nothing.
"""

from openclaw_store.repositories.base import Repository, admit_entity
from openclaw_store.repositories.batches import apply, apply_together
from openclaw_store.repositories.bulk import (
    Inserted,
    Refusals,
    TasksAdded,
    changes_of,
    insert_past,
    insert_tasks,
    row_of,
)
from openclaw_store.repositories.change_log import (
    CHANGE_BATCH_SIZE,
    PAGE_BYTES,
    read_changes,
    read_counters,
    read_history,
    read_newest_changes,
)
from openclaw_store.repositories.commands import (
    CONTENT,
    PART_SIZE,
    Advance,
    Advanced,
    Claim,
    Create,
    Recover,
    Register,
    Remove,
    Resume,
    SetNodeStatus,
    Update,
    cancellation_of,
    change_of,
    requeue_of,
)
from openclaw_store.repositories.heartbeats import (
    AfterHeartbeat,
    Heartbeat,
    HeartbeatWritten,
    apply_heartbeats,
)
from openclaw_store.repositories.leases import (
    Lease,
    Owned,
    apply_progress,
    read_lease,
    read_progress,
)
from openclaw_store.repositories.nodes import NodeRepository, node_status
from openclaw_store.repositories.parts import claim_in_parts, register_in_parts
from openclaw_store.repositories.removal import Removal, remove_tasks
from openclaw_store.repositories.retention import (
    COMPACTION_BATCH_SIZE,
    Compact,
    Policy,
    compact,
    compact_feed,
    count_old_tasks,
    old_revisions,
    old_rows,
    redate_tasks,
    remove_old_tasks,
)
from openclaw_store.repositories.row_reader import (
    FETCH_SIZE,
    TolerantReader,
    decoder_here,
    read_histories,
    read_records,
    read_rows,
    select_pending,
)
from openclaw_store.repositories.tasks import (
    TaskRepository,
    check_ids,
    each_of_pages,
    encode_result,
    is_known,
)
from openclaw_store.repositories.unit_of_work import (
    Command,
    Event,
    Row,
    counters_of,
    missing,
)
