"""`StateManager`: cluster state answered from memory and kept in step with the database.

This room holds the cache, its indexes, the replication of changes, and the scheduler. It writes
only by commands of `repositories`.
"""

from openclaw_store.state_manager.explain import Explanation, explain
from openclaw_store.state_manager.manager import StateManager
from openclaw_store.state_manager.scheduler import Recovery
from openclaw_store.state_manager.watchers import WATCH_SECONDS
