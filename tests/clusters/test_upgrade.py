"""`alembic -x all-clusters=1`: each cluster is upgraded under a lock of its own."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from conftest import Location, execute

from openclaw_store import Clusters
from openclaw_store.backends.factory import backend_of
from openclaw_store.database import HEAD, migrations

NAMES = ["berlin", "paris", "tokyo"]


async def upgrade_all(places: Location) -> None:
    config = Config(cmd_opts=Namespace(x=[f"url={places}", "all-clusters=1"]))
    config.set_main_option("script_location", str(migrations.SCRIPTS))
    await asyncio.to_thread(command.upgrade, config, "head")


async def test_each_cluster_is_upgraded_and_a_failure_names_those_that_are_left(
    location: Location, tmp_path: Path
) -> None:
    is_file = isinstance(location, Path)
    places = tmp_path / "{cluster}.db" if is_file else location
    clusters = Clusters(places)
    for name in NAMES:
        await clusters.create(name)
        backend = backend_of(places, cluster=name)
        await asyncio.to_thread(migrations.downgrade, backend, "0008")
    if is_file:
        add = "CREATE TRIGGER late AFTER INSERT ON tasks BEGIN SELECT 1; END"
        remove = "DROP TRIGGER late"
    else:
        add = "ALTER TABLE paris.tasks ENABLE ROW LEVEL SECURITY"
        remove = "ALTER TABLE paris.tasks DISABLE ROW LEVEL SECURITY"
    place = tmp_path / "paris.db" if is_file else location
    execute(place, add)

    with pytest.raises(CommandError, match=r"paris.*; not done yet: paris, tokyo"):
        await upgrade_all(places)
    assert [one.revision for one in await clusters.list()] in (
        [HEAD, revision, "0008"]
        for revision in ("0008", None)  # `None` if it is refused
    )

    execute(place, remove)
    await upgrade_all(places)
    assert [one.revision for one in await clusters.list()] == [HEAD] * 3
    await upgrade_all(places)  # again: there is nothing to do
