"""SQLite: connections, write sessions, and the refusal of files inherited by a fork."""
