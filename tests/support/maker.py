"""Databases of tests on PostgreSQL: copies of a template, which are emptied and used again."""

from __future__ import annotations

import asyncio
import importlib
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.pool import StaticPool

from devtools.postgres import Databases, Server
from support.in_cluster import CLUSTER

APPLICATION = "maker of databases"
"""The name of the connections of this module, for tests that count those to a database."""

_END_SECONDS = 5.0
"""For the end of connections that were closed: as long as `DROP DATABASE` waits for it."""

_LARGE = 1 << 21
"""Bytes of tables and indexes; a copy with more is dropped."""

_OTHERS = """
    SELECT (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND pid <> pg_backend_pid() AND backend_type = 'client backend')
    + (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database())"""

# The identifiers of objects that are not PostgreSQL's own begin with 16384.
_CATALOGUES = {
    **dict.fromkeys(
        (
            "alembic_version", "pg_attrdef", "pg_constraint", "pg_db_role_setting",
            "pg_default_acl", "pg_depend", "pg_event_trigger", "pg_extension", "pg_inherits",
            "pg_namespace", "pg_policy", "pg_publication", "pg_statistic_ext", "pg_trigger",
        ),
        "true",
    ),
    **dict.fromkeys(("pg_class", "pg_proc", "pg_rewrite", "pg_type"), "oid >= 16384"),
    "pg_attribute": "attrelid >= 16384",
    "pg_database": "datname = current_database()",
    "pg_index": "indexrelid >= 16384",
    "pg_statistic": "starelid >= 16384",
}  # fmt: skip
"""Tables in which each change of the schema is a row of a later transaction, or a lost row."""

_SCHEMA = "SELECT concat_ws(' ', {})".format(
    ", ".join(
        f"(SELECT concat(count(*), ':', max(xmin::text::bigint)) FROM {name} WHERE {condition})"
        for name, condition in _CATALOGUES.items()
    )
)

_TABLES = """
    SELECT relname, pg_total_relation_size(oid) FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
    AND relname <> 'alembic_version'
    ORDER BY relname"""


async def connect(url: str, **settings: str) -> Any:
    """Connect to a database without SQLAlchemy, whose engine asks four things first."""
    driver = importlib.import_module("asyncpg")  # it has no types
    return await driver.connect(
        make_url(url).set(drivername="postgresql").render_as_string(hide_password=False),
        server_settings={"search_path": CLUSTER or "public", **settings},
    )


@dataclass
class _Copy:
    """A database in use, with what is to be found in it afterwards.

    Args:
        connection: It is kept, since catalogues are read ten times faster the second time.
        schema: Changes with each change of the schema.
        counters: The only row of a new database.
    """

    connection: Any
    schema: str
    counters: str

    async def ends_without_connections(self) -> bool:
        """Wait until nobody else is connected; false if somebody is."""
        until = time.monotonic() + _END_SECONDS
        while await self.connection.fetchval(_OTHERS):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.002)
        return True

    async def is_emptied(self) -> bool:
        """Delete all rows, unless the schema was changed."""
        if await self.connection.fetchval(_SCHEMA) != self.schema:
            return False
        sizes = dict(await self.connection.fetch(_TABLES))
        if sum(sizes.values()) > _LARGE:
            return False
        deletions = "".join(f"DELETE FROM {table}; " for table in sizes)
        await self.connection.execute(
            f"BEGIN; {deletions} INSERT INTO counters"
            f" SELECT * FROM json_populate_record(NULL::counters, '{self.counters}'); COMMIT"
        )
        return True


class Maker:
    """Makes and drops databases on one connection: to make one for each takes longer than that."""

    def __init__(self, server: Databases) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._databases = Databases(
            server.url, poolclass=StaticPool, has_fast_disk=isinstance(server, Server)
        )
        self._copies: dict[str, _Copy] = {}
        self._unused: list[str] = []

    def make(self, template: str | None = None) -> str:
        """The URL of a new database, empty or a copy of `template`."""
        return self._runner.run(self._databases.create_database(template))

    def drop(self, url: str) -> None:
        """Drop a database; a connection that is left to it is an error."""
        self._runner.run(self._drop(url))

    def borrow(self, template: str) -> str:
        """The URL of a copy of `template`, new or emptied; `template` is always the same one."""
        return self._unused.pop() if self._unused else self._runner.run(self._copy(template))

    def give_back(self, url: str) -> None:
        """Take a borrowed copy back, to lend it again; a connection that is left is an error."""
        if self._runner.run(self._is_usable(url)):
            self._unused.append(url)
        else:
            self.drop(url)

    def close(self) -> None:
        self._runner.run(self._databases.close())
        for copy in self._copies.values():
            copy.connection.terminate()
        self._runner.close()

    async def _copy(self, template: str) -> str:
        url = await self._databases.create_database(template)
        connection = await connect(url, application_name=APPLICATION)
        schema = await connection.fetchval(_SCHEMA)
        counters = await connection.fetchval("SELECT row_to_json(counters) FROM counters")
        self._copies[url] = _Copy(connection, schema, counters)
        return url

    async def _is_usable(self, url: str) -> bool:
        driver = importlib.import_module("asyncpg")
        copy = self._copies[url]
        try:
            return await copy.ends_without_connections() and await copy.is_emptied()
        except (OSError, driver.PostgresError, driver.InterfaceError):
            return False

    async def _drop(self, url: str) -> None:
        if (copy := self._copies.pop(url, None)) is not None:
            copy.connection.terminate()
        await self._databases.drop_database(url)
