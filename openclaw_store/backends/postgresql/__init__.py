"""PostgreSQL: connections, the write session of a batch, and backups with pg_dump."""
