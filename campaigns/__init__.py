"""Trouble for the store, to see that it keeps its promises: `python -m campaigns`."""
