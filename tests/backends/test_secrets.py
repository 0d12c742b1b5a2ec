"""No error, no traceback and no message shows a value of a row, or a password."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from conftest import MakeTask, OpenManager, execute, refuse_tasks
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from openclaw_store import Database, InvalidDataError, StoreError, TaskRepository
from openclaw_store.backends import qualified

SECRET = "hunter2"

REFUSED = {
    "a constraint": "INSERT INTO {schema}nodes (node_id, status) VALUES (:secret, 'nowhere')",
    "a key": "INSERT INTO {schema}nodes (node_id) VALUES (:secret), (:secret)",
    "nothing there": "INSERT INTO {schema}tasks (task_id, name) VALUES (:secret, NULL)",
    "a table": "SELECT :secret FROM nowhere",
}
"""Statements of a caller, and the reason for which the database refuses each."""

REFUSED_BY_POSTGRESQL = {
    "a value": "SELECT CAST(CAST(:secret AS text) AS integer)",
    "the driver": "SELECT CAST(:secret AS integer)",
    "JSON": "SELECT CAST(CAST(:secret AS text) AS json)",
    "a name": "SELECT CAST(CAST(:secret AS text) AS regclass)",
    "a parameter": "SELECT CAST(:secret AS regclass)",
    "a role": "SELECT CAST(CAST(:secret AS text) AS regrole)",
    "a type": "SELECT CAST(CAST(:secret || ' ' || :secret AS text) AS regtype)",
    "a schema": "SELECT CAST(CAST(:secret AS text) AS regnamespace)",
    "a function": "SELECT CAST(CAST(:secret AS text) AS regproc)",
    "a signature": "SELECT CAST(CAST(:secret AS text) || '(' AS regprocedure)",
    "a path": "SELECT CAST(CAST(:secret || '.b.c' AS text) AS regclass)",
    "a file": "SELECT pg_catalog.pg_read_file(:secret)",
    "a sequence": "SELECT pg_catalog.nextval(CAST(CAST(:secret AS text) AS regclass))",
    "a search": "SELECT pg_catalog.to_tsquery(CAST(:secret || ' ' || :secret AS text))",
    "a setting": "SELECT pg_catalog.set_config(:secret, :secret, true)",
    "a place": "SELECT CAST(CAST(:secret AS text) AS pg_lsn)",
    "a database": "SELECT pg_catalog.pg_database_size(CAST(:secret AS name))",
    "XML": "SELECT pg_catalog.query_to_xml(CAST(:secret AS text), true, true, '')",
}
"""The same for PostgreSQL, which quotes the value."""


def shown(error: BaseException) -> str:
    """Return the traceback as programs log it."""
    return "".join(traceback.format_exception(error))


async def test_statement_of_a_caller_that_fails_shows_no_value(database: Database) -> None:
    extra = REFUSED_BY_POSTGRESQL if database.dialect == "postgresql" else {}
    for statement in (*REFUSED.values(), *extra.values()):
        statement = statement.format(schema=qualified(database.schema, ""))
        inside: list[str] = []

        async def run(statement: str = statement, inside: list[str] = inside) -> None:
            async with database.transaction() as tx:
                try:
                    await tx.execute(text(statement), {"secret": SECRET})
                except SQLAlchemyError as error:
                    inside.append(shown(error))
                    raise

        with pytest.raises((StoreError, SQLAlchemyError)) as caught:
            await run()

        assert inside
        assert SECRET not in inside[0] + shown(caught.value) + repr(caught.value)


async def test_refused_task_shows_the_constraint_and_no_value(
    database: Database, make_task: MakeTask, location: Any
) -> None:
    refuse_tasks(location, SECRET)

    with pytest.raises(InvalidDataError, match="refused by the database") as caught:
        await TaskRepository(database).create(make_task(name=SECRET, description=SECRET))

    assert SECRET not in shown(caught.value)
    assert database.dialect == "sqlite" or 'constraint "refused"' in str(caught.value)


@pytest.mark.sqlite
async def test_text_that_cannot_be_decoded_is_not_shown(
    database: Database,
    make_task: MakeTask,
    location: Any,
    open_manager: OpenManager,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = TaskRepository(database)
    await tasks.create(make_task(task_id="t"))
    execute(location, f"UPDATE tasks SET name = CAST('{SECRET}' || x'ff' AS TEXT)")

    with pytest.raises(StoreError, match="column 'name'") as caught:
        await tasks.get("t")
    await open_manager()

    assert SECRET not in shown(caught.value)
    assert "column 'name'" in caplog.text
    assert SECRET not in caplog.text
