"""Faults that a campaign injects: system calls, networks and processes that fail, and planted bugs.

A module here causes one kind of fault and judges nothing. It imports from `harness` only.
"""
