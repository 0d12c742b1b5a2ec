"""The parts of every campaign: a run, its databases, counts and findings, and its results.

Modules here know no single fault, workload or scenario, and import none.
"""
