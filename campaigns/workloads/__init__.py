"""Work for a store under test: calls, clients, programs, values and databases with content.

A module here uses the store and records the answers. It judges nothing, and imports from `faults`
and `harness` only.
"""
