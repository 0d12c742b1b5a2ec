"""Tools for operators: verify, repair, copy, restore, diagnose, summarise.

The command line uses this room. It uses the public names of the rooms below, and the backends only
where a tool depends on the engine. It keeps no state, and formats no text for terminals.
"""
