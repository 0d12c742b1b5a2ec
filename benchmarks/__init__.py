"""Benchmarks of the store, beside other libraries: run `python -m benchmarks`."""
