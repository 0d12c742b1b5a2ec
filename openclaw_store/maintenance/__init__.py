"""Tools for operators: verify, repair, copy, restore, diagnose.

They use the rooms below through their public names and are used by the command line.
"""
