"""Tools of the developers: the PostgreSQL server of tests, benchmarks and campaigns."""
