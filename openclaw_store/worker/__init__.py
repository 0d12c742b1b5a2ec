"""Workers: processes that claim tasks for a node, run them, and report their results.

This room uses only the public calls of `StateManager`.
"""

from openclaw_store.worker.run import Handler, Run
from openclaw_store.worker.worker import Worker

__all__ = ["Handler", "Run", "Worker"]
