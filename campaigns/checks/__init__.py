"""Checks of the promises: answers, databases and files after a fault, compared with the workload.

A module here compares and reports. It starts no fault, and imports from `workloads` and below.
"""
