"""Tools for developers: the PostgreSQL server of tests, counts of calls, the picture of imports."""
