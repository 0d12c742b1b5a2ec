"""State of a cluster of nodes that run tasks: kept in a database, answered from memory."""

from openclaw_store.changes import Change, ChangeKind
from openclaw_store.clock import Clock, new_id, utc_now
from openclaw_store.database import Database
from openclaw_store.errors import (
    BackendError,
    CompactedError,
    ConflictError,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeNotFoundError,
    NotFoundError,
    OutcomeUnknownError,
    SchemaMismatchError,
    StaleVersionError,
    StoreError,
    TaskNotFoundError,
    UnavailableError,
    UnsavedConflictError,
)
from openclaw_store.models import (
    ClusterState,
    NodeInfo,
    NodeStatus,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.repositories import NodeRepository, TaskRepository
from openclaw_store.state_manager import StateManager

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Change",
    "ChangeKind",
    "Clock",
    "ClusterState",
    "CompactedError",
    "ConflictError",
    "Database",
    "DeadlineError",
    "DuplicateError",
    "InvalidDataError",
    "NodeInfo",
    "NodeNotFoundError",
    "NodeRepository",
    "NodeStatus",
    "NotFoundError",
    "OutcomeUnknownError",
    "SchemaMismatchError",
    "StaleVersionError",
    "StateManager",
    "StoreError",
    "Task",
    "TaskNotFoundError",
    "TaskPriority",
    "TaskRepository",
    "TaskStatus",
    "TaskType",
    "UnavailableError",
    "UnsavedConflictError",
    "__version__",
    "new_id",
    "utc_now",
]
