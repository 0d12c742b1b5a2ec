"""Faults for the store, to check its promises: `python -m campaigns`.

`scenarios` has the campaigns by name. Each combines `faults` with `workloads` and the `checks` of
the promises; `harness` holds the parts of every campaign. Each folder imports only from those after
it in this list: scenarios, checks, workloads, faults, harness.
"""
