"""Tools for developers: the PostgreSQL server of tests and benchmarks, and counts of calls."""
