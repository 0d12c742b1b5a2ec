"""Repositories: read and write tasks and nodes, and number every change.

This room holds the commands, the unit of work and the change log. It caches nothing.
"""
