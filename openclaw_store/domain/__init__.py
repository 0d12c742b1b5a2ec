"""Tasks, nodes and the rules for them: pure values and functions.

Nothing in this room performs I/O, knows SQL, awaits, or asks for the time (except `clock`).
"""
