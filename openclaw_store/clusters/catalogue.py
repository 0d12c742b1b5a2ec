"""The clusters of one location: list, create, rename and drop them.

A cluster is a schema of a PostgreSQL database, or a file whose path contains its name. A step takes
the locks of its cluster alone; the other clusters go on.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, func, select, text

from openclaw_store.backends import (
    BESIDES,
    DEFAULT_TIMEOUT_SECONDS,
    PLACE,
    PUBLIC,
    Backend,
    PostgreSQL,
    SQLite,
    backend_of,
    check_cluster,
    citus,
    file_of,
    make_folder,
    rename_to_unused,
    shield_until_done,
    unused_name,
)
from openclaw_store.database import (
    IS_LIVE,
    ChangeRow,
    CounterRow,
    DecisionRow,
    NodeRow,
    OutgoingRow,
    TaskRow,
    migrations,
)
from openclaw_store.domain import check_limit_seconds
from openclaw_store.errors import (
    ConflictError,
    InvalidDataError,
    NotFoundError,
    SchemaMismatchError,
    StoreError,
)

Result = TypeVar("Result")

_OURS = ["alembic_version", "changes", "counters", "nodes", "tasks"]
"""Tables of every schema that is a cluster."""

_NAMES = """
    SELECT nspname FROM pg_namespace WHERE has_schema_privilege(oid, 'USAGE') AND (
        SELECT count(*) FROM pg_class
        WHERE relnamespace = pg_namespace.oid AND relkind = 'r' AND relname = ANY (:tables)
    ) = :count ORDER BY nspname COLLATE "C" """

_SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint FROM pg_class
    WHERE relkind = 'r' AND relnamespace = to_regnamespace(:schema)"""

_OBJECTS = """
    SELECT format('%s %I.%I', CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
        nspname, relname)
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = :schema AND relkind = 'r' AND relname = ANY (:tables)
    UNION ALL
    SELECT format('FUNCTION %s', pg_proc.oid::regprocedure)
    FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
    WHERE nspname = :schema AND proname LIKE 'store\\_write\\_%'
    ORDER BY 1"""

_IDENTIFIED = "0009"
"""The schema revision since which a cluster has a number."""

_TRANSFERS = "0012"
"""The schema revision since which tasks can be in transit."""


@dataclass(frozen=True)
class ClusterInfo:
    """A cluster at a glance."""

    name: str | None
    """`None` for the tables of the schema `public`."""
    location: str
    """The path or URL, without the password."""
    revision: str | None
    """The revision of its schema."""
    cluster_id: int | None = None
    """Its random number, which stays if it is renamed; `None` before schema 0009."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Numbers by status."""
    nodes: dict[str, int] = field(default_factory=dict)
    """Numbers by status."""
    changed_at: datetime | None = None
    """Time of the newest change."""
    size: int = 0
    """Bytes on the disk."""
    node: str | None = None
    """Host and port of the node on which Citus keeps it; `None` without Citus."""
    problem: str | None = None
    """The reason for which its content cannot be counted."""


class Clusters:
    """The clusters of one location.

    Args:
        location: A URL of PostgreSQL, or a path with `{cluster}` in the place of the name.
        timeout: Seconds to wait for locks.

    Raises:
        InvalidDataError: If the location is not one of these.
    """

    def __init__(self, location: str | Path, *, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self._location = location
        self._timeout = check_limit_seconds("timeout", timeout)
        self._is_server = isinstance(self._backend("a"), PostgreSQL)

    def __repr__(self) -> str:
        address = self._backend("a").address if self._is_server else self._location
        return f"<Clusters {str(address)!r}>"

    async def names(self) -> list[str]:
        """Return the names of the clusters in alphabetical order, without `public`.

        On PostgreSQL, of those whose schema this role may use.
        """
        return [name for name in await self._run(self._names) if name is not None]

    async def list(self) -> list[ClusterInfo]:
        """Return the clusters in alphabetical order, behind the one of `public` if there is one.

        Tasks are counted in an index: a million take tens of milliseconds.
        """
        return [*await self._run(self._list)]

    async def create(self, name: str) -> None:
        """Make a cluster with the schema of this version.

        Raises:
            InvalidDataError: If the name is refused, or a cluster has it.
            SchemaMismatchError: If tables of another program are in the place.
            UnavailableError: If the role lacks the privilege, or the file cannot be made.
        """
        await self._run(partial(self._create, check_cluster(name)))

    async def drop(self, name: str, *, force: bool = False) -> None:
        """Remove a cluster with all of its tasks and nodes.

        Args:
            force: Also if it has tasks that are not finished.

        Raises:
            ConflictError: If it has tasks that are not finished or in transit, or decisions that
                `resolve` may need, and `force` is off; or its schema contains objects of another
                program.
            NotFoundError: If there is no such cluster.
            UnavailableError: If its file is in use, or its lock is not free in time.
        """
        await self._run(partial(self._drop, check_cluster(name), force))

    async def move(self, name: str, node: str) -> None:
        """Move a cluster to another node of Citus; its processes continue meanwhile.

        Args:
            node: Host and port, as in `worker-2:5432`.

        Raises:
            InvalidDataError: If the location has no such node.
            NotFoundError: If there is no such cluster.
            UnavailableError: If Citus refuses; the cluster stays where it is.
        """
        await self._run(partial(self._move, check_cluster(name), node))

    async def rename(self, name: str, new_name: str) -> None:
        """Rename a cluster; its number, its tasks and its revisions stay.

        Stop its processes first: they look for the old name, and fail.

        Raises:
            InvalidDataError: If the new name is refused, or a cluster has it.
            NotFoundError: If there is no such cluster.
            SchemaMismatchError: If its schema is not that of this version.
            UnavailableError: If its file is in use, or its lock is not free in time.
        """
        names = check_cluster(name), check_cluster(new_name)
        await self._run(partial(self._rename, *names))

    @staticmethod
    async def _run(work: Callable[[], Result]) -> Result:
        return await shield_until_done(asyncio.to_thread(work))

    def _backend(self, name: str | None) -> Backend:
        return backend_of(self._location, self._timeout, cluster=name)

    def _names(self) -> Sequence[str | None]:
        if not self._is_server:
            return sorted(_names_of_files(self._location))
        return self._backend(None).inspect(_schemas)

    def _list(self) -> Sequence[ClusterInfo]:
        if not self._is_server:
            return [_file_info(self._backend(name), name) for name in self._names() if name]
        backend = self._backend(None)
        return backend.inspect(lambda one: [*_schema_infos(one, backend)])

    def _create(self, name: str) -> None:
        self._refuse_existing(name)
        migrations.upgrade(self._backend(name))

    def _drop(self, name: str, force: bool) -> None:
        backend = self._existing(name)
        if isinstance(backend, PostgreSQL):
            backend.migrate(partial(_drop_schema, backend.location, name, force))
        elif isinstance(backend, SQLite):
            _drop_file(backend, force)

    def _move(self, name: str, node: str) -> None:
        backend = self._existing(name)
        if not isinstance(backend, PostgreSQL):
            raise InvalidDataError("node", "only Citus has nodes, and this location is a file")
        citus.move(backend, node)

    def _rename(self, name: str, new_name: str) -> None:
        backend = self._existing(name)
        migrations.require(backend)
        self._refuse_existing(new_name)
        if isinstance(backend, PostgreSQL):
            backend.migrate(partial(_rename_schema, name, new_name))
        elif isinstance(backend, SQLite):
            _rename_file(backend, self._backend(new_name))

    def _existing(self, name: str) -> Backend:
        if name not in self._names():
            raise NotFoundError(f"there is no cluster {name!r}: see Clusters.list()")
        backend = self._backend(name)
        if isinstance(backend, PostgreSQL):
            backend.inspect(lambda _: None)  # it notes whether Citus is there
        return backend

    def _refuse_existing(self, name: str) -> None:
        if name in self._names():
            raise InvalidDataError("cluster", f"{name!r} exists already: choose another name")


def _schemas(connection: Connection) -> Sequence[str | None]:
    """Return the names of the clusters in a database; `None`, the first, is `public`."""
    values = {"tables": _OURS, "count": len(_OURS)}
    found = [*connection.execute(text(_NAMES), values).scalars()]
    names = [name for name in found if _is_name(name)]
    return [*([None] if PUBLIC in found else []), *names]


def _is_name(name: str) -> bool:
    try:
        return bool(check_cluster(name))
    except InvalidDataError:
        return False


def _names_of_files(location: str | Path) -> Iterator[str]:
    """Yield the names of the clusters that have a file."""
    before, after = str(file_of(location)).split(PLACE)
    folder, start = os.path.split(before)
    end, *deeper = after.split(os.sep, 1)
    if not os.path.isdir(folder):
        return
    shape = re.compile(re.escape(start) + "(.+)" + re.escape(end))
    for entry in os.listdir(folder):
        found = shape.fullmatch(entry)
        if found and _is_name(found[1]) and os.path.isfile(os.path.join(folder, entry, *deeper)):
            yield found[1]


def _schema_infos(connection: Connection, backend: Backend) -> Iterator[ClusterInfo]:
    for name in _schemas(connection):
        try:
            with backend.error_mapping.mapped(), connection.begin_nested():
                info = _schema_info(connection, name, backend.address)
        except StoreError:
            counters = f"{name or PUBLIC}.counters"
            if connection.scalar(select(func.to_regclass(counters))) is not None:
                raise
            continue  # it was dropped meanwhile
        yield info


def _schema_info(connection: Connection, name: str | None, location: str) -> ClusterInfo:
    schema = name or PUBLIC
    connection = connection.execution_options(schema_translate_map={None: schema})
    size = connection.execute(text(_SIZE), {"schema": schema}).scalar_one()
    if not connection.get_execution_options()["is_citus"]:
        return _info(connection, name, location, size)
    node = citus.node_of(connection, schema)
    if node is not None:
        size = citus.size_of(connection, schema)
    return replace(_info(connection, name, location, size), node=node)


def _file_info(backend: Backend, name: str) -> ClusterInfo:
    assert isinstance(backend, SQLite)
    files = (backend.path, backend.path.with_name(backend.path.name + "-wal"))
    size = sum(file.stat().st_size for file in files if file.exists())

    def read(connection: Connection) -> ClusterInfo:
        migrations.require_store(connection, backend.location)
        return _info(connection, name, backend.location, size)

    try:
        return backend.inspect(read)
    except StoreError as error:  # the other clusters are listed
        return ClusterInfo(name, backend.location, None, size=size, problem=str(error))


def _info(connection: Connection, name: str | None, location: str, size: int) -> ClusterInfo:
    revision = migrations.stored(connection)
    try:
        migrations.refuse_newer(revision, location)
    except SchemaMismatchError as error:
        return ClusterInfo(name, location, revision, size=size, problem=str(error))
    newest = select(ChangeRow.changed_at).order_by(ChangeRow.revision.desc()).limit(1)
    number = None
    if revision is not None and revision >= _IDENTIFIED:
        number = connection.scalar(select(CounterRow.cluster_id))
    return ClusterInfo(
        name,
        location,
        revision,
        number,
        _counts(connection, TaskRow),
        _counts(connection, NodeRow),
        connection.scalar(newest),
        size,
    )


def _counts(connection: Connection, row: Any) -> dict[str, int]:
    query = select(row.status, func.count()).group_by(row.status).order_by(row.status)
    return {status.value: count for status, count in connection.execute(query)}


def _refuse_live(connection: Connection, location: str) -> None:
    live = connection.scalar(select(func.count()).select_from(TaskRow).where(IS_LIVE))
    if live:
        raise ConflictError(
            f"{location} has unfinished tasks ({live}): wait for them, or drop it by force"
        )
    if (migrations.stored(connection) or "") >= _TRANSFERS:
        leaving = connection.scalar(select(func.sum(OutgoingRow.number)))
        if leaving:
            raise ConflictError(
                f"{location} has {leaving} tasks in transit to another cluster: complete the "
                "transfer, or drop it by force"
            )
        if connection.scalar(select(func.count()).select_from(DecisionRow)):
            raise ConflictError(
                f"{location} has decided on transactions that may not have ended in other "
                "databases: call resolve() with all of them, or drop it by force"
            )


def _drop_schema(location: str, name: str, force: bool, connection: Connection) -> None:
    # No writer adds a task between the count and the commit. One that waited for the row would have
    # a lock of the table, for which the end of this would wait.
    is_citus = connection.get_execution_options()["is_citus"]
    row, table = "SELECT 1 FROM {}.counters FOR UPDATE", "LOCK TABLE {}.counters"
    connection.execute(text((row if is_citus else table).format(name)))
    if not force:
        _refuse_live(connection, location)
    tables = [*migrations.OWN_TABLES]
    found = connection.execute(text(_OBJECTS), {"schema": name, "tables": tables}).scalars().all()
    for one in found:  # functions first: they return rows of the tables
        connection.execute(text(f"DROP {one}"))
    others = connection.execute(text(_OTHERS), {"schema": name}).scalars().all()
    if others:
        raise ConflictError(
            f"{location} is unchanged, as its schema contains {', '.join(others[:5])} of another "
            "program: move them to another schema, then try again"
        )
    # Its former nodes may still have copies of its tables, which Citus removes some time later.
    cascade = " CASCADE" if is_citus else ""
    connection.execute(text(f"DROP SCHEMA {name}{cascade}"))


_OTHERS = """
    SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend
    WHERE refclassid = 'pg_namespace'::regclass AND refobjid = to_regnamespace(:schema)
    AND deptype = 'n'"""


def _rename_schema(name: str, new_name: str, connection: Connection) -> None:
    connection.execute(text(f"SELECT 1 FROM {name}.counters FOR UPDATE"))
    connection.execute(text(f"ALTER SCHEMA {name} RENAME TO {new_name}"))
    connection = connection.execution_options(schema_translate_map={None: new_name})
    migrations.replace_function(connection)  # it names the schema of each table


def _drop_file(backend: SQLite, force: bool) -> None:
    if not force:  # else a kill before the second count would leave the file aside
        backend.inspect(partial(_refuse_live, location=backend.location))
    # Set aside first: nobody opens it between the count and the removal.
    aside = unused_name(backend.path, ".dropped", BESIDES)
    with backend.alone():
        if force:  # of a damaged file; later ones may belong to a new file of the same name
            for ending in BESIDES:
                Path(f"{backend.path}{ending}").unlink(missing_ok=True)
        rename_to_unused(backend.path, aside)
    if not force:
        try:
            SQLite(aside, 0).inspect(partial(_refuse_live, location=backend.location))
        except BaseException:
            rename_to_unused(aside, backend.path)
            raise
    aside.unlink()


def _rename_file(backend: SQLite, new: Backend) -> None:
    assert isinstance(new, SQLite)
    make_folder(new.path.parent)
    with backend.alone():
        try:
            rename_to_unused(backend.path, new.path)
        except FileExistsError:
            raise InvalidDataError(
                "cluster", f"{new.location} exists already: choose another name"
            ) from None
