"""SQLite: connections, write sessions, and the refusal of connections inherited by a fork."""
