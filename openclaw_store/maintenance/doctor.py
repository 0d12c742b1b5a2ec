"""Diagnose: check that the environment lets the store keep its promises.

The database may be closed, not migrated, or missing. Nothing is changed, except that SQLite may
move pages from the WAL to the file.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, text

from openclaw_store.backends import schema_of
from openclaw_store.backends.postgresql import backend as postgresql
from openclaw_store.backends.sqlite import files as sqlite
from openclaw_store.database import (
    COPYING,
    HEAD,
    Base,
    Database,
    NodeRow,
    OutgoingRow,
    SealingKeyRow,
    legacy_import,
    names_of_tables,
    stored,
)
from openclaw_store.domain import Clock
from openclaw_store.encryption import KEYS_VARIABLE, KeyRing
from openclaw_store.errors import BackendError, SchemaMismatchError
from openclaw_store.maintenance.citus import check_citus
from openclaw_store.maintenance.diagnosis import Finding as Finding
from openclaw_store.maintenance.diagnosis import Level as Level
from openclaw_store.maintenance.diagnosis import judge
from openclaw_store.maintenance.domains import LATEST
from openclaw_store.maintenance.schema import find_differences

MOUNTS = Path("/proc/self/mountinfo")
"""Linux's table of mounted file systems."""

# File locks and the shared memory of the WAL do not work reliably between machines.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|ocfs2|gfs2|vboxsf|"
    r"fuse\.(sshfs|glusterfs\S*|s3fs|rclone|ceph\S*|gcsfuse|blobfuse\S*|mfs|seaweedfs)"
)
_IN_MEMORY = ("tmpfs", "ramfs")

FREE_BYTES = 8 << 20
"""A vacuum is advised if free pages take more than this, and a quarter of the file."""

WAL_PAGES = 4000
"""Four times the number of WAL pages after which SQLite starts a checkpoint."""

LOW_DISK_BYTES = 100 << 20
"""Less free space than this is an error."""

SKEW_SECONDS = 2.0
"""Tolerated difference between two clocks."""

LONG_SECONDS = 60
"""Tolerated duration of a transaction."""

_ACTIVITY = text("""
    SELECT pid, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::int
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND xact_start < clock_timestamp() - make_interval(secs => :seconds) ORDER BY xact_start""")
HORIZON_TRANSACTIONS = 10_000
"""Tolerated age of the oldest snapshot, in transactions of the server."""

# Removed and former rows that a snapshot may still see are read again and again, and are kept.
_SNAPSHOTS = text("""
    SELECT holder || ' for ' || age || ' transactions' FROM (
        SELECT 'process ' || pid || ' (' || coalesce(nullif(application_name, ''), 'nameless')
            || ')', greatest(age(backend_xmin), age(backend_xid)) FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend'
        AND pid <> pg_backend_pid()
        UNION ALL SELECT 'the replica ' || application_name || ' by hot_standby_feedback',
            age(backend_xmin) FROM pg_stat_replication
        UNION ALL SELECT 'the replication slot ' || slot_name, age(xmin) FROM pg_replication_slots
        UNION ALL SELECT 'the prepared transaction ' || gid, age(transaction)
        FROM pg_prepared_xacts WHERE database = current_database()
    ) AS one (holder, age) WHERE age > :limit ORDER BY age DESC""")

_PREPARED = text("""
    SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::int
    FROM pg_catalog.pg_prepared_xacts
    WHERE database = current_database() AND gid LIKE 'openclaw_store_%'
    ORDER BY prepared""")
_WRITABLE = text("""
    SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(grantee) END
    FROM pg_namespace, aclexplode(coalesce(nspacl, acldefault('n', nspowner)))
    WHERE nspname = :schema AND privilege_type = 'CREATE'
    AND grantee NOT IN (nspowner, (SELECT oid FROM pg_roles WHERE rolname = current_user))
    ORDER BY 1""")
_CONNECTIONS = text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
_SETTINGS = text("SELECT name, setting FROM pg_settings")


async def diagnose(database: Database) -> list[Finding]:
    """Check the environment of a database, which may be closed or missing."""
    if database.dialect == "sqlite" and database.db_path != ":memory:":
        path = sqlite.file_of(database.db_path)
        if not path.is_file():
            advice = "check the path; `openclaw-store db upgrade` makes a new database"
            return [_error("connection", f"There is no file {path}.", advice)]
    check = _check_file if database.dialect == "sqlite" else _check_server

    def find(connection: Connection) -> list[Finding]:
        found = list(check(connection, database.clock))
        if any(finding.name == "heartbeats" for finding in found):  # else the schema is another one
            found += _check_keys(connection, database.keys)
            found.append(_check_transfers(connection))
        return found

    try:
        return await database.inspect(find)
    except BackendError as error:
        return [_error("connection", f"It cannot be read: {error}.", "solve the problem named")]


def _check_file(connection: Connection, clock: Clock) -> Iterator[Finding]:
    def pragma(name: str) -> Any:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    version, needed = sqlite3.sqlite_version, ".".join(map(str, sqlite.MINIMUM_VERSION))
    yield judge(
        "sqlite_version",
        sqlite3.sqlite_version_info >= sqlite.MINIMUM_VERSION,
        f"SQLite is {version}; {needed} or newer is needed.",
        "use a newer Python, or a newer SQLite library",
        Level.ERROR,
    )
    schema = list(_check_schema(connection))
    yield from schema
    mode = pragma("journal_mode")
    yield judge(
        "journal_mode",
        mode == "wal",
        f"The journal mode is {mode}.",
        "open the database once with the library, which turns WAL on",
    )
    yield judge(
        "synchronous",
        pragma("synchronous") >= 2,
        "A commit waits for the disk.",
        "connect with synchronous=FULL",
        Level.ERROR,
    )
    path = Path(connection.exec_driver_sql("PRAGMA database_list").all()[0][2])
    size, pages, free = pragma("page_size"), pragma("page_count"), pragma("freelist_count")
    yield judge(
        "free_pages",
        free * size <= FREE_BYTES or 4 * free <= pages,
        f"{free} of {pages} pages are free ({_size(free * size)}).",
        "run `openclaw-store vacuum` when writers can wait",
    )
    # Only a checkpoint tells the pages that readers hold back. To read the `-shm` file instead
    # would release all locks of this process on it (https://sqlite.org/howtocorrupt.html).
    _, logged, moved = connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").one()
    waiting = max(0, logged - moved)
    yield judge(
        "wal",
        waiting <= WAL_PAGES,
        f"{waiting} pages of the WAL have not been moved to the database "
        f"({_size(waiting * size)}).",
        "end programs that keep a read transaction open: they prevent the move, and slow reading",
    )
    yield _check_permissions(path)
    yield _check_file_system(path)
    yield _check_disk(path, size * pages)
    if all(finding.level is Level.OK for finding in schema):  # else the tables may be hostile
        yield from _check_heartbeats(connection, clock())


def _check_permissions(path: Path) -> Finding:
    files = [path, *(path.with_name(path.name + ending) for ending in sqlite.BESIDES)]
    readable = [file.name for file in files if file.exists() and file.stat().st_mode & 0o077]
    if path.parent.stat().st_mode & 0o002:
        readable.append("the folder")
    return judge(
        "permissions",
        not readable or os.name == "nt",
        "Only its owner can read the database.",
        f"run `chmod go= {shlex.quote(str(path))}*`, unless these users may see all tasks",
        otherwise=f"Other users can read or write {', '.join(readable)}.",
    )


def _check_file_system(path: Path) -> Finding:
    name, kind = "file_system", file_system_of(path)
    if kind is None:
        return Finding(name, Level.OK, "This system does not tell the file system of the file.")
    if _NETWORK.fullmatch(kind):
        advice = "move it to a local disk, or to PostgreSQL: SQLite's locks do not work there"
        return _error(name, f"The file is on a network file system ({kind}).", advice)
    return judge(
        name,
        kind not in _IN_MEMORY,
        f"The file is on {kind}.",
        "move it to a disk, unless it may be lost when the machine stops",
        otherwise=f"The file is in memory ({kind}).",
    )


def file_system_of(path: Path) -> str | None:
    """Return the type of the file system that holds a file; `None` if it is unknown."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    longest, kind = -1, None
    path = path.resolve()
    for line in lines:
        mount, _, source = line.partition(" - ")
        folder = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split(" ")[4])
        # Of several mounts on one folder, the last one hides the others.
        if path.is_relative_to(folder) and len(folder) >= longest:
            longest, kind = len(folder), source.split(" ")[0]
    return kind


def _check_disk(path: Path, size: int) -> Finding:
    free = shutil.disk_usage(path.parent).free
    text = f"{_size(free)} are free on the disk; the database has {_size(size)}."
    if free < LOW_DISK_BYTES:
        return _error("disk_space", text, "free some space: writes will fail")
    advice = "free some space: a vacuum, a migration and a backup need as much as the database"
    return judge("disk_space", free >= size, text, advice)


def _check_server(connection: Connection, clock: Clock) -> Iterator[Finding]:
    settings = {str(name): str(value) for name, value in connection.execute(_SETTINGS)}
    yield judge(
        "server_version",
        int(settings["server_version_num"]) >= postgresql.MINIMUM_VERSION * 10_000,
        f"The server is PostgreSQL {settings['server_version']}; {postgresql.MINIMUM_VERSION} or "
        "newer is needed.",
        "upgrade the server",
        Level.ERROR,
    )
    schema = list(_check_schema(connection))
    yield from schema
    yield judge(
        "recovery",
        not connection.scalar(text("SELECT pg_is_in_recovery()")),
        "The server accepts writes.",
        "connect to the primary, as with target_session_attrs=read-write",
        Level.ERROR,
        "The server is a standby, which accepts no writes.",
    )
    yield from _check_settings(settings)
    yield from _check_privileges(connection, settings)
    yield from check_citus(connection, settings)
    used = connection.scalar(_CONNECTIONS) or 0
    limit = int(settings["max_connections"])
    yield judge(
        "max_connections",
        used <= 0.8 * limit,
        f"{used} of {limit} connections are in use.",
        "raise max_connections, lower pool_size, or put a pooler before the server",
    )
    long = connection.execute(_ACTIVITY, {"seconds": LONG_SECONDS}).all()
    listed = "; ".join(
        f"process {pid} ({name or 'nameless'}, {state}) for {seconds} s"
        for pid, name, state, seconds in long[:5]
    )
    yield judge(
        "long_transactions",
        not long,
        f"No transaction is open for more than {LONG_SECONDS} s.",
        "end them, as with pg_terminate_backend: they keep locks and removed rows",
        otherwise=f"{len(long)} transactions are open: {listed}.",
    )
    holders = connection.execute(_SNAPSHOTS, {"limit": HORIZON_TRANSACTIONS}).scalars().all()
    yield judge(
        "horizon",
        not holders,
        f"No snapshot is older than {HORIZON_TRANSACTIONS} transactions.",
        "end the session, drop the slot, turn the feedback off, or roll the prepared transaction "
        "back: until then, rows that were written often are read more and more slowly",
        otherwise=f"Old rows are kept by {'; '.join(holders[:5])}.",
    )
    prepared = connection.execute(_PREPARED).all()
    listed = "; ".join(f"{gid} by {owner} for {seconds} s" for gid, owner, seconds in prepared[:5])
    yield judge(
        "prepared_transactions",
        not prepared,
        "No transaction of the store over several servers is left prepared.",
        "run `openclaw-store resolve` with the locations of all databases that took part",
        otherwise=f"{len(prepared)} transactions over several servers hold the write lock of their "
        f"clusters: {listed}.",
    )
    before = clock()
    server: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    after = clock()
    skew = max((before - server).total_seconds(), (server - after).total_seconds(), 0.0)
    yield judge(
        "server_clock",
        skew <= SKEW_SECONDS,
        f"The clocks of this machine and of the server are {skew:.1f} s apart.",
        "synchronise the clocks of all machines, as by NTP",
    )
    if all(finding.level is not Level.ERROR for finding in schema):  # else a policy may run
        yield from _check_heartbeats(connection, after)


def _check_privileges(connection: Connection, settings: Mapping[str, str]) -> Iterator[Finding]:
    schema = schema_of(connection)
    roles = ", ".join(connection.scalars(_WRITABLE, {"schema": schema}))
    yield judge(
        "schema_privileges",
        not roles,
        f"No other role may create objects in the schema {schema}.",
        f"REVOKE CREATE ON SCHEMA {schema} FROM {roles}",
        otherwise=f"These roles may create objects in the schema {schema}: {roles}.",
    )
    yield judge(
        "search_path",
        settings["search_path"] == postgresql.SEARCH_PATH,
        f"The search path is {settings['search_path']}.",
        f"a pooler ignores it: ALTER ROLE … SET search_path = {postgresql.SEARCH_PATH}",
    )


def _check_settings(settings: Mapping[str, str]) -> Iterator[Finding]:
    for name, level, danger in (
        ("fsync", Level.ERROR, "commits may be lost when the machine fails"),
        ("full_page_writes", Level.ERROR, "pages may be torn when the machine fails"),
        ("synchronous_commit", Level.WARNING, "other programs may lose their commits"),
        ("autovacuum", Level.WARNING, "tables grow without end"),
    ):
        value = settings[name]
        yield judge(name, value != "off", f"{name} is {value}.", f"set it to on: {danger}", level)
    isolation = settings["default_transaction_isolation"]
    yield judge(
        "default_isolation",
        isolation == "read committed",
        f"default_transaction_isolation is {isolation}.",
        "check the other programs: the library sets its own isolation",
    )
    limit = int(settings["idle_in_transaction_session_timeout"])
    yield judge(
        "idle_in_transaction_session_timeout",
        limit == 0 or limit >= 5000,
        f"Idle transactions end after {limit} ms." if limit else "Idle transactions stay open.",
        "set it to 0, or to some seconds: it ends readers that only pause",
    )


def _check_schema(connection: Connection) -> Iterator[Finding]:
    name = "schema"
    advice = "run `openclaw-store db upgrade`"
    try:
        revision, tables = stored(connection), names_of_tables(connection)
    except SchemaMismatchError as error:
        yield _error(name, f"{error}.", "do not open it, unless you know the cause")
        return
    if revision is None:
        if not tables & {"tasks", "nodes"}:
            yield _error(name, "The database has no tables yet.", advice)
        elif connection.dialect.name == "sqlite" and legacy_import.is_legacy(connection):
            yield _error(name, "The schema is a legacy one.", f"{advice}, which imports it")
        elif Base.metadata.tables.keys() <= tables:
            yield from _check_tables(connection)
        else:
            yield _error(name, "The tables are of another program.", "give another path")
    elif revision.startswith(COPYING):
        yield _error(name, "The database is half of a copy.", "copy to it again from its source")
    elif revision != HEAD:
        text = f"The schema is {revision}; this version of the library needs {HEAD}."
        yield _error(name, text, "upgrade the library" if revision > HEAD else advice)
    else:
        yield from _check_tables(connection)


def _check_tables(connection: Connection) -> Iterator[Finding]:
    """Yield one finding for each difference of the schema."""
    found = find_differences(connection)
    for one in found:
        name = "counters" if one.invariant == "counters" else "schema"
        repair = "run `openclaw-store verify --repair`, which runs: " if one.is_safe else ""
        level = Level.ERROR if one.is_blocking else Level.WARNING
        yield Finding(name, level, f"The schema differs: {one.text}.", f"{repair}{one.advice}")
    if not found:
        text = f"The schema is {HEAD}, which this version of the library needs."
        yield Finding("schema", Level.OK, text)


def _check_heartbeats(connection: Connection, now: datetime) -> Iterator[Finding]:
    if stored(connection) != HEAD:
        return
    latest = now + timedelta(seconds=SKEW_SECONDS)
    query = (
        select(NodeRow.node_id, NodeRow.last_heartbeat)
        .where(NodeRow.last_heartbeat.between(latest, LATEST))  # text sorts behind it
        .order_by(NodeRow.last_heartbeat.desc())
    )
    early = connection.execute(query).all()
    ahead = [f"{id!r} ({(sent - now).total_seconds():.0f} s)" for id, sent in early if sent]
    yield judge(
        "heartbeats",
        not early,
        "No node has sent a heartbeat from the future.",
        "synchronise the clocks of all machines, as by NTP: lost nodes are found late, or early",
        otherwise=f"{len(early)} nodes sent heartbeats from the future: {', '.join(ahead[:3])}.",
    )


def _check_transfers(connection: Connection) -> Finding:
    row = OutgoingRow
    query = select(func.coalesce(func.sum(row.number), 0), func.min(row.left_at))
    number, since = connection.execute(query).one()
    return judge(
        "transfers",
        not number,
        "No task is in transit to another cluster.",
        "call transfer again, with the same two clusters: it completes what an interruption left",
        otherwise=f"{number} tasks are in transit to another cluster since {since}.",
    )


def _check_keys(connection: Connection, ring: KeyRing | None) -> Iterator[Finding]:
    """Compare the keys that the database needs with the given ones; nothing if both have none.

    The bytes of the keys are compared when the database is opened.
    """
    columns = SealingKeyRow.id, SealingKeyRow.is_complete
    listed = {row.id: row.is_complete for row in connection.execute(select(*columns))}
    if not listed and ring is None:
        return
    numbers = ", ".join(map(str, sorted(listed)))
    missing = sorted(listed.keys() - (set() if ring is None else ring.keys.keys()))
    if missing:
        text = f"Values are sealed by the keys {numbers}; of these, {missing} are not there."
        yield _error("encryption", text, f"set {KEYS_VARIABLE} to the file with these keys")
        return
    is_off = ring is not None and ring.primary is None
    yield judge(
        "encryption",
        is_off or any(listed.values()),
        f"No key seals; values may still be sealed by the keys {numbers}."
        if is_off
        else f"All values are sealed; the keys {numbers} are needed.",
        "run `openclaw-store keys rotate --vacuum`",
        otherwise=f"Some values may be in clear; others are sealed by the keys {numbers}."
        if listed
        else "The database was never opened with its keys: all values are in clear.",
    )


def _error(name: str, text: str, advice: str) -> Finding:
    return Finding(name, Level.ERROR, text, advice)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
