"""The page: see and steer a store in a browser.

This room renders HTML on the server and sends changes as they happen. Its queries are those of
`maintenance`, and its actions are calls of a `StateManager`; it holds no rule and no SQL.
"""

from openclaw_store.web.app import app

__all__ = ["app"]
