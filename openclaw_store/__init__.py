"""State of a cluster of nodes that run tasks: kept in a database, answered from memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openclaw_store.changes import Change, ChangeKind
    from openclaw_store.clock import Clock, new_id, utc_now
    from openclaw_store.copying import Copied, copy
    from openclaw_store.database import Database
    from openclaw_store.dispatcher import Recovery
    from openclaw_store.doctor import Finding, Level, diagnose
    from openclaw_store.errors import (
        BackendError,
        CompactedError,
        ConflictError,
        DeadlineError,
        DuplicateError,
        InvalidDataError,
        InvalidTransitionError,
        NodeNotFoundError,
        NotFoundError,
        NotOwnerError,
        OutcomeUnknownError,
        SchemaMismatchError,
        StaleVersionError,
        StoreError,
        TaskNotFoundError,
        UnavailableError,
        UnsavedConflictError,
    )
    from openclaw_store.explanations import Explanation
    from openclaw_store.filters import TaskFilter, TaskPage
    from openclaw_store.lifecycle import Backoff
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
    from openclaw_store.verification import Problem, Verification, verify
else:
    _MODULES = (
        "errors",
        "clock",
        "models",
        "lifecycle",
        "database",
        "changes",
        "filters",
        "repositories",
        "explanations",
        "dispatcher",
        "state_manager",
        "copying",
        "verification",
        "doctor",
    )

    def __getattr__(name: str) -> object:
        # Imported when it is asked for: all of it takes longer than the command line may.
        if name in __all__:
            for module in _MODULES:
                found = vars(import_module(f"{__name__}.{module}"))
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
    "ClusterState",
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
    "Level",
    "NodeInfo",
    "NodeNotFoundError",
    "NodeRepository",
    "NodeStatus",
    "NotFoundError",
    "NotOwnerError",
    "OutcomeUnknownError",
    "Problem",
    "Recovery",
    "SchemaMismatchError",
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
    "UnavailableError",
    "UnsavedConflictError",
    "Verification",
    "__version__",
    "copy",
    "diagnose",
    "new_id",
    "utc_now",
    "verify",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
