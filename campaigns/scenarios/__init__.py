"""The campaigns by name: each combines a fault, a workload and the checks that must hold.

A module here defines a `CAMPAIGN`, or is shared by several. No other folder imports from here.
"""
