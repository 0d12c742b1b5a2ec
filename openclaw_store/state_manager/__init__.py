"""`StateManager`: cluster state answered from memory and kept in step with the database.

This room holds the cache, its indexes, the replication of changes, and the scheduler.
"""
