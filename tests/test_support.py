"""The helpers of the tests keep what they promise."""

from __future__ import annotations

import pytest
from conftest import Maker, execute

from openclaw_store.database import FUNCTION

pytestmark = pytest.mark.postgresql


@pytest.mark.parametrize(
    "change",
    [
        "CREATE INDEX mine ON tasks (name)",
        "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_status",
        "GRANT SELECT ON nodes TO PUBLIC",
        "CREATE SCHEMA berlin",
        "UPDATE alembic_version SET version_num = '9999'",
        f"DROP FUNCTION {FUNCTION}",
    ],
)
def test_borrowed_database_is_emptied_and_dropped_if_its_schema_was_changed(
    maker: Maker, migrated_postgresql: str, change: str
) -> None:
    url = maker.borrow(migrated_postgresql)
    before = execute(url, "SELECT * FROM counters")
    execute(url, "INSERT INTO tasks (task_id, task_type, name) VALUES ('t', 'batch', 't')")
    execute(url, "UPDATE counters SET beat = 7")
    maker.give_back(url)

    again = maker.borrow(migrated_postgresql)
    assert again == url
    assert execute(url, "SELECT * FROM counters") == before
    assert execute(url, "SELECT count(*) FROM tasks") == [(0,)]
    execute(url, change)
    maker.give_back(url)

    other = maker.borrow(migrated_postgresql)
    maker.give_back(other)
    assert other != url
