"""`diagnose`: whether the environment is one in which the store can keep its promises.

It changes nothing (but may have SQLite move pages from the WAL to the file), and takes the database
as it is: not opened, not migrated, or not there at all.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, select, text

from openclaw_store.backends.postgresql import backend as postgresql
from openclaw_store.backends.sqlite import files as sqlite
from openclaw_store.database import COPYING, HEAD, Base, Database, NodeRow, legacy_import, stored
from openclaw_store.domain import Clock
from openclaw_store.errors import UnavailableError

MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux tells what is mounted."""

# File locks and the shared memory of the WAL do not work reliably, or at all, between machines.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|ocfs2|gfs2|vboxsf|"
    r"fuse\.(sshfs|glusterfs\S*|s3fs|rclone|ceph\S*|gcsfuse|blobfuse\S*|mfs|seaweedfs)"
)
_IN_MEMORY = ("tmpfs", "ramfs")

FREE_BYTES = 8 << 20
"""Free pages are worth a vacuum if they take more than this, and a quarter of the file."""

WAL_PAGES = 4000
"""Four times what SQLite lets pile up before it begins to move pages to the database."""

LOW_DISK_BYTES = 100 << 20
"""Less free space than this is an error."""

SKEW_SECONDS = 2.0
"""How far clocks may be apart."""

LONG_SECONDS = 60
"""How long a transaction may be open."""

_ACTIVITY = text("""
    SELECT pid, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::int
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND xact_start < clock_timestamp() - make_interval(secs => :seconds) ORDER BY xact_start""")
_CONNECTIONS = text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
_SETTINGS = text("SELECT name, setting FROM pg_settings WHERE name = ANY (:names)")
_NAMES = (
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "default_transaction_isolation",
    "idle_in_transaction_session_timeout",
    "autovacuum",
    "max_connections",
    "server_version",
    "server_version_num",
)


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not well, or not for long."""
    ERROR = "error"
    """It does not work, or its promises do not hold."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    text: str
    """What was found, as a sentence."""
    advice: str | None = None
    """What to do about it."""


async def diagnose(database: Database) -> list[Finding]:
    """Look whether the store can keep its promises where it is.

    Args:
        database: Need not be open, and stays as it is.
    """
    if database.dialect == "sqlite" and database.db_path != ":memory:":
        path = sqlite.file_of(database.db_path)
        if not path.is_file():
            advice = "check the path; `openclaw-store db upgrade` makes a new database"
            return [_error("connection", f"There is no file {path}.", advice)]
    look = _look_at_file if database.dialect == "sqlite" else _look_at_server
    try:
        return await database.inspect(lambda connection: list(look(connection, database.clock)))
    except UnavailableError as error:
        return [_error("connection", f"It cannot be read: {error}.", "see what it says")]


def _look_at_file(connection: Connection, clock: Clock) -> Iterator[Finding]:
    pragma = partial(_pragma, connection)
    version, needed = sqlite3.sqlite_version, ".".join(map(str, sqlite.MINIMUM_VERSION))
    yield _judge(
        "sqlite_version",
        sqlite3.sqlite_version_info >= sqlite.MINIMUM_VERSION,
        f"SQLite is {version}; {needed} or newer is needed.",
        "use a newer Python, or a newer SQLite library",
        Level.ERROR,
    )
    yield from _look_at_schema(connection)
    mode = pragma("journal_mode")
    yield _judge(
        "journal_mode",
        mode == "wal",
        f"The journal mode is {mode}.",
        "open it once with the library, which turns WAL on",
    )
    yield _judge(
        "synchronous",
        pragma("synchronous") >= 2,
        "A commit waits until it is on the disk.",
        "connect with synchronous=FULL",
        Level.ERROR,
    )
    path = Path(connection.exec_driver_sql("PRAGMA database_list").all()[0][2])
    size, pages, free = pragma("page_size"), pragma("page_count"), pragma("freelist_count")
    yield _judge(
        "free_pages",
        free * size <= FREE_BYTES or 4 * free <= pages,
        f"{free} of {pages} pages are free ({_size(free * size)}).",
        "run `openclaw-store vacuum` when writers can wait",
    )
    waiting = _waiting_pages(connection)
    yield _judge(
        "wal",
        waiting <= WAL_PAGES,
        f"{waiting} pages of the WAL have not been moved to the database "
        f"({_size(waiting * size)}).",
        "look for a program that keeps reading in one transaction: it holds them back, and reading "
        "becomes slow",
    )
    yield _look_at_file_system(path)
    yield _look_at_disk(path, size * pages)
    yield from _look_at_heartbeats(connection, clock())


def _pragma(connection: Connection, name: str) -> Any:
    return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def _waiting_pages(connection: Connection) -> int:
    """How many pages of the WAL cannot be moved to the database now, since somebody reads them.

    SQLite is asked to move the others. To look into the `-shm` file instead would cost this process
    all locks it has there, as soon as the file is closed (https://sqlite.org/howtocorrupt.html).
    """
    _, pages, moved = connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").one()
    return int(max(0, pages - moved))


def _look_at_file_system(path: Path) -> Finding:
    kind = file_system_of(path)
    name = "file_system"
    if kind is None:
        return Finding(name, Level.OK, "What file system it is on cannot be told on this system.")
    if _NETWORK.fullmatch(kind):
        advice = "move it to a local disk, or to PostgreSQL: SQLite's locks do not work there"
        return _error(name, f"The file is on a network file system ({kind}).", advice)
    said = f"The file is on {kind}"
    if kind in _IN_MEMORY:
        advice = "move it to a disk, unless it may be lost"
        return Finding(name, Level.WARNING, f"{said}, in memory: it goes with the machine.", advice)
    return Finding(name, Level.OK, f"{said}.")


def file_system_of(path: Path) -> str | None:
    """The file system that a file is on; `None` where the system does not tell."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found: tuple[int, str] | None = None
    place = path.resolve()
    for line in lines:
        mount, _, source = line.partition(" - ")
        folder = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split(" ")[4])
        # Of several at one place, the last one is seen.
        if place.is_relative_to(folder) and (found is None or len(folder) >= found[0]):
            found = len(folder), source.split(" ")[0]
    return None if found is None else found[1]


def _look_at_disk(path: Path, size: int) -> Finding:
    free = shutil.disk_usage(path.parent).free
    said = f"{_size(free)} are free on the disk; the database has {_size(size)}."
    if free < LOW_DISK_BYTES:
        return _error("disk_space", said, "free some space: writes will fail")
    advice = "free some space: a vacuum, a migration and a backup need as much as the database"
    return _judge("disk_space", free >= size, said, advice)


def _look_at_server(connection: Connection, clock: Clock) -> Iterator[Finding]:
    names = {"names": list(_NAMES)}
    settings = {str(name): str(it) for name, it in connection.execute(_SETTINGS, names)}
    yield _judge(
        "server_version",
        int(settings["server_version_num"]) >= postgresql.MINIMUM_VERSION * 10_000,
        f"The server is PostgreSQL {settings['server_version']}; {postgresql.MINIMUM_VERSION} or "
        "newer is needed.",
        "upgrade the server",
        Level.ERROR,
    )
    yield from _look_at_schema(connection)
    yield _judge(
        "recovery",
        not connection.scalar(text("SELECT pg_is_in_recovery()")),
        "The server writes; it is no standby.",
        "name the server that writes, as with target_session_attrs=read-write",
        Level.ERROR,
        "The server is a standby, which only reads.",
    )
    yield from _look_at_settings(settings)
    used = connection.scalar(_CONNECTIONS) or 0
    most = int(settings["max_connections"])
    yield _judge(
        "max_connections",
        used <= 0.8 * most,
        f"{used} of {most} connections are in use.",
        "raise max_connections, lower pool_size, or put a pooler before the server",
    )
    long = connection.execute(_ACTIVITY, {"seconds": LONG_SECONDS}).all()
    listed = "; ".join(
        f"process {pid} ({name or 'nameless'}, {state}) for {seconds} s"
        for pid, name, state, seconds in long[:5]
    )
    yield _judge(
        "long_transactions",
        not long,
        f"No transaction is open for more than {LONG_SECONDS} s.",
        "end them, as with pg_terminate_backend: they keep locks, or removed rows from going",
        said_else=f"{len(long)} transactions are open: {listed}.",
    )
    before = clock()
    server: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    after = clock()
    skew = max((before - server).total_seconds(), (server - after).total_seconds(), 0.0)
    yield _judge(
        "server_clock",
        skew <= SKEW_SECONDS,
        f"The clocks of this machine and of the server are {skew:.1f} s apart.",
        "keep the machines' clocks in step, as by NTP",
    )
    yield from _look_at_heartbeats(connection, after)


def _look_at_settings(settings: Mapping[str, str]) -> Iterator[Finding]:
    for name, why in (
        ("fsync", "what was committed is lost when the machine fails"),
        ("full_page_writes", "pages may be torn when the machine fails"),
    ):
        on = settings[name] == "on"
        said = f"{name} is {settings[name]}{'' if on else f': {why}'}."
        yield _judge(name, on, said, f"set {name} = on", Level.ERROR)
    commit = settings["synchronous_commit"]
    yield _judge(
        "synchronous_commit",
        commit != "off",
        f"synchronous_commit is {commit}.",
        "set it to on: this library does so for its own connections, other programs may lose what "
        "they committed",
    )
    isolation = settings["default_transaction_isolation"]
    yield _judge(
        "default_isolation",
        isolation == "read committed",
        f"default_transaction_isolation is {isolation}.",
        "know that it holds for other programs only: this library sets its own",
    )
    limit = int(settings["idle_in_transaction_session_timeout"])
    yield _judge(
        "idle_in_transaction_session_timeout",
        limit == 0 or limit >= 5000,
        "Idle transactions may stay open." if limit == 0 else f"They are ended after {limit} ms.",
        "set it to 0, or to some seconds: this ends readers who only pause",
    )
    yield _judge(
        "autovacuum",
        settings["autovacuum"] == "on",
        f"autovacuum is {settings['autovacuum']}.",
        "set autovacuum = on, or run `openclaw-store vacuum` often: tables grow without end",
    )


def _look_at_schema(connection: Connection) -> Iterator[Finding]:
    name = "schema"
    advice = "run `openclaw-store db upgrade`"
    revision = stored(connection)
    tables = set(inspect(connection).get_table_names())
    if revision is None:
        if not tables & {"tasks", "nodes"}:
            yield _error(name, "There are no tables yet.", advice)
        elif connection.dialect.name == "sqlite" and legacy_import.is_legacy(connection):
            yield _error(name, "It has the original, hand-made schema.", f"{advice}: it is adopted")
        else:
            yield _error(name, "Its tables are not this library's.", "give another path")
    elif revision.startswith(COPYING):
        yield _error(name, "It is half of a copy.", "copy to it again from the same database")
    elif revision != HEAD:
        newer = revision > HEAD
        said = f"The schema is {revision}; this version of the library knows {HEAD}."
        yield _error(name, said, "upgrade the library" if newer else advice)
    else:
        missing = [
            str(index.name)
            for table in Base.metadata.sorted_tables
            for index in table.indexes
            if index.name
            not in {one["name"] for one in inspect(connection).get_indexes(table.name)}
        ]
        said = f"The schema is {HEAD}, as this version of the library needs it."
        lost = f"The schema is {HEAD}, but without {', '.join(sorted(missing))}."
        advice = "make the indexes again: without them, searches go through whole tables"
        yield _judge(name, not missing, said, advice, said_else=lost)


def _look_at_heartbeats(connection: Connection, now: datetime) -> Iterator[Finding]:
    if stored(connection) != HEAD:
        return
    query = select(NodeRow.node_id, NodeRow.last_heartbeat).order_by(NodeRow.last_heartbeat.desc())
    early = connection.execute(
        query.where(NodeRow.last_heartbeat > now + timedelta(seconds=SKEW_SECONDS))
    ).all()
    said = "No node has sent a heartbeat that is in the future."
    lost = f"{len(early)} nodes have sent heartbeats that are in the future"
    if early and early[0][1] is not None:
        seconds = (early[0][1] - now).total_seconds()
        lost += f", {early[0][0]!r} one of {seconds:.0f} s ahead."
    advice = "keep the machines' clocks in step, as by NTP: nodes are held for lost late, or early"
    yield _judge("heartbeats", not early, said, advice, said_else=lost)


def _judge(
    name: str,
    is_good: bool,
    said: str,
    advice: str,
    level: Level = Level.WARNING,
    said_else: str | None = None,
) -> Finding:
    if is_good:
        return Finding(name, Level.OK, said)
    return Finding(name, level, said_else or said, advice)


def _error(name: str, said: str, advice: str) -> Finding:
    return Finding(name, Level.ERROR, said, advice)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
