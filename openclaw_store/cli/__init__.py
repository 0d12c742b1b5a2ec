"""The command line: `openclaw-store` and `python -m openclaw_store`.

It parses arguments and renders results; every action is a call of a room below.
"""
