"""State of a cluster of nodes that run tasks: kept in a database, answered from memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openclaw_store.archive import open_archive
    from openclaw_store.clusters import (
        ClusterInfo,
        Clusters,
        Resolved,
        Server,
        Transferred,
        resolve,
        transaction,
        transfer,
    )
    from openclaw_store.database import Database
    from openclaw_store.domain import (
        Backoff,
        Change,
        ChangeKind,
        Clock,
        ClusterState,
        NodeFilter,
        NodeInfo,
        NodeStatus,
        Progress,
        Retention,
        Task,
        TaskFilter,
        TaskPage,
        TaskPriority,
        TaskStatus,
        TaskType,
        new_id,
        utc_now,
    )
    from openclaw_store.encryption import KeyProvider, KeyRing, Sealed
    from openclaw_store.errors import (
        BackendError,
        CompactedError,
        ConflictError,
        DeadlineError,
        DuplicateError,
        InvalidDataError,
        InvalidTransitionError,
        KeyRingError,
        NodeInUseError,
        NodeNotFoundError,
        NotFoundError,
        NotOwnerError,
        OutcomeUnknownError,
        SchemaMismatchError,
        SealedValueError,
        StaleVersionError,
        StoreError,
        TaskNotFoundError,
        UnavailableError,
        UnsavedConflictError,
    )
    from openclaw_store.maintenance.copy import Copied, copy
    from openclaw_store.maintenance.doctor import Finding, Level, diagnose
    from openclaw_store.maintenance.verify import Problem, Verification, verify
    from openclaw_store.repositories import Lease, NodeRepository, TaskRepository
    from openclaw_store.state_manager import Explanation, Recovery, StateManager
    from openclaw_store.worker import Run, Worker
else:
    _ROOMS = (
        "errors",
        "domain",
        "encryption",
        "database",
        "repositories",
        "archive",
        "state_manager",
        "worker",
        "maintenance.copy",
        "clusters",
        "maintenance.verify",
        "maintenance.doctor",
    )

    def __getattr__(name: str) -> object:
        # Import names on first use: the whole library takes longer than `--help` may.
        if name in __all__:
            for room in _ROOMS:
                found = vars(import_module(f"{__name__}.{room}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Backoff",
    "Change",
    "ChangeKind",
    "Clock",
    "ClusterInfo",
    "ClusterState",
    "Clusters",
    "CompactedError",
    "ConflictError",
    "Copied",
    "Database",
    "DeadlineError",
    "DuplicateError",
    "Explanation",
    "Finding",
    "InvalidDataError",
    "InvalidTransitionError",
    "KeyProvider",
    "KeyRing",
    "KeyRingError",
    "Lease",
    "Level",
    "NodeFilter",
    "NodeInUseError",
    "NodeInfo",
    "NodeNotFoundError",
    "NodeRepository",
    "NodeStatus",
    "NotFoundError",
    "NotOwnerError",
    "OutcomeUnknownError",
    "Problem",
    "Progress",
    "Recovery",
    "Resolved",
    "Retention",
    "Run",
    "SchemaMismatchError",
    "Sealed",
    "SealedValueError",
    "Server",
    "StaleVersionError",
    "StateManager",
    "StoreError",
    "Task",
    "TaskFilter",
    "TaskNotFoundError",
    "TaskPage",
    "TaskPriority",
    "TaskRepository",
    "TaskStatus",
    "TaskType",
    "Transferred",
    "UnavailableError",
    "UnsavedConflictError",
    "Verification",
    "Worker",
    "__version__",
    "copy",
    "diagnose",
    "new_id",
    "open_archive",
    "resolve",
    "transaction",
    "transfer",
    "utc_now",
    "verify",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
