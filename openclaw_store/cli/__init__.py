"""The command line: `openclaw-store` and `python -m openclaw_store`.

This room parses arguments and renders results; each action is one call of a room below. It contains
no SQL and no rules about tasks or nodes.
"""
