"""How fast the store is, beside what it is compared with: run `python -m benchmarks`."""
