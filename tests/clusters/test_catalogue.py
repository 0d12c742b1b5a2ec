"""The catalogue of clusters: list, create, rename and drop."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Location, MakeNode, MakeTask, engine_of, execute, start, until
from typer.testing import CliRunner, Result

from openclaw_store import (
    Clusters,
    ConflictError,
    Database,
    InvalidDataError,
    NodeRepository,
    NotFoundError,
    StateManager,
    StoreError,
    TaskRepository,
    UnavailableError,
    verify,
)
from openclaw_store.backends.factory import backend_of
from openclaw_store.cli.main import app
from openclaw_store.clusters import catalogue
from openclaw_store.database import HEAD, DecisionRow, cluster_id_of, migrations
from openclaw_store.domain import utc_now


@pytest.fixture
def places(location: Location, tmp_path: Path) -> Location:
    return tmp_path / "many" / "of-{cluster}.db" if isinstance(location, Path) else location


@pytest.fixture
def clusters(places: Location) -> Clusters:
    return Clusters(places)


async def test_created_clusters_are_listed(
    clusters: Clusters, places: Location, make_task: MakeTask, make_node: MakeNode
) -> None:
    assert await clusters.list() == []
    for name in ("tokyo", "berlin"):
        await clusters.create(name)
    async with Database(places, cluster="berlin") as database:
        await NodeRepository(database).register(make_node())
        await TaskRepository(database).create(make_task())
        number = await cluster_id_of(database)

    berlin, tokyo = await clusters.list()

    assert (berlin.name, berlin.revision, berlin.cluster_id) == ("berlin", HEAD, number)
    assert (berlin.tasks, berlin.nodes) == ({"pending": 1}, {"online": 1})
    assert berlin.changed_at is not None
    assert berlin.size > 10_000
    assert (tokyo.name, tokyo.tasks, tokyo.nodes, tokyo.changed_at) == ("tokyo", {}, {}, None)
    assert await clusters.names() == ["berlin", "tokyo"]


@pytest.mark.postgresql
async def test_tables_of_public_are_listed_first_and_other_schemas_are_not(
    clusters: Clusters, location: str
) -> None:
    execute(location, "CREATE SCHEMA app")
    execute(location, "CREATE TABLE app.alembic_version (version_num text)")
    async with Database(location):
        await clusters.create("berlin")
    assert [one.name for one in await clusters.list()] == [None, "berlin"]


async def test_cluster_exists_once(clusters: Clusters) -> None:
    await clusters.create("berlin")
    with pytest.raises(InvalidDataError, match="'berlin' exists already"):
        await clusters.create("berlin")
    await clusters.create("tokyo")
    with pytest.raises(InvalidDataError, match="'tokyo' exists already"):
        await clusters.rename("berlin", "tokyo")
    for step in (clusters.drop("paris"), clusters.rename("paris", "rome")):
        with pytest.raises(NotFoundError, match="no cluster 'paris'"):
            await step
    with pytest.raises(InvalidDataError, match="cluster"):
        await clusters.create("Berlin")


async def test_dropped_cluster_leaves_nothing_and_the_others_alone(
    clusters: Clusters, places: Location, make_task: MakeTask
) -> None:
    for name in ("berlin", "tokyo"):
        async with Database(places, cluster=name) as database:
            await TaskRepository(database).create(make_task())

    with pytest.raises(ConflictError, match=r"unfinished tasks \(1\): wait for them"):
        await clusters.drop("berlin")
    assert [one.tasks for one in await clusters.list()] == [{"pending": 1}] * 2
    await clusters.drop("berlin", force=True)

    assert await clusters.names() == ["tokyo"]
    if isinstance(places, Path):
        assert [path.name for path in places.parent.iterdir()] == ["of-tokyo.db"]
    else:
        assert execute(places, "SELECT to_regnamespace('berlin')::text") == [(None,)]
    await clusters.create("berlin")
    async with Database(places, cluster="berlin") as database:
        assert await TaskRepository(database).count_tasks() == 0


@pytest.mark.sqlite
@pytest.mark.parametrize("force", [False, True])
async def test_drop_leaves_a_new_file_of_the_same_name_alone(
    clusters: Clusters,
    places: Path,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    force: bool,
) -> None:
    """Planted: it removes the WAL of the new file, with its commits."""
    await clusters.create("berlin")
    unlink = Path.unlink

    def make_new_file(path: Path, **options: Any) -> None:
        if ".dropped" in path.name and not opened:
            opened.append(asyncio.run(open_and_write()))
        unlink(path, **options)

    async def open_and_write() -> sqlite3.Connection:
        async with Database(places, cluster="berlin") as database:
            keeper = sqlite3.connect(database.db_path)
            keeper.execute("SELECT * FROM tasks").fetchall()  # so that the WAL stays
            await TaskRepository(database).create(make_task())
        return keeper

    opened: list[sqlite3.Connection] = []
    monkeypatch.setattr(Path, "unlink", make_new_file)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, check_same_thread=False))
    await clusters.drop("berlin", force=force)

    [berlin] = await clusters.list()
    assert berlin.tasks == {"pending": 1}
    opened[0].close()


@pytest.mark.sqlite
async def test_refused_drop_does_not_move_the_file(
    clusters: Clusters, places: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a kill before it is moved back would hide the unfinished tasks."""
    async with Database(places, cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
    monkeypatch.setattr(catalogue, "rename_to_unused", pytest.fail)
    with pytest.raises(ConflictError, match="drop it by force"):
        await clusters.drop("berlin")


async def test_decisions_that_others_may_need_keep_a_cluster(
    clusters: Clusters, places: Location
) -> None:
    """Planted: the other parts of a transaction can never be ended, and hold their locks."""
    async with Database(places, cluster="berlin") as database, database.transaction() as tx:
        tx.add(DecisionRow(decision="0" * 32, participants="[1]", decided_at=utc_now()))
    with pytest.raises(ConflictError, match="call resolve"):
        await clusters.drop("berlin")
    await clusters.drop("berlin", force=True)
    assert await clusters.names() == []


async def test_finished_tasks_do_not_keep_a_cluster(
    clusters: Clusters, places: Location, make_task: MakeTask
) -> None:
    async with StateManager(Database(places, cluster="berlin"), None) as manager:
        task = make_task()
        await manager.add_task(task)
        await manager.cancel_task(task.task_id)
    await clusters.drop("berlin")
    assert await clusters.list() == []


@pytest.mark.postgresql
async def test_drop_and_a_writer_do_not_wait_for_each_other(
    clusters: Clusters, places: str, make_task: MakeTask
) -> None:
    """Planted: the writer waits for a row that the drop has locked: the server ends the drop."""
    waiting = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    await clusters.create("berlin")
    async with Database(places, cluster="berlin") as database:
        async with engine_of(places).connect() as connection:
            await connection.exec_driver_sql("SELECT FROM berlin.counters FOR UPDATE")
            dropping = start(clusters.drop("berlin"))
            await until(lambda: execute(places, waiting) == [(1,)])
            writing = start(TaskRepository(database).create(make_task()))
            await until(lambda: execute(places, waiting) == [(2,)])
            await connection.rollback()
        await dropping
        with pytest.raises(StoreError, match="its schema is another"):
            await writing
    assert await clusters.names() == []


@pytest.mark.postgresql
async def test_cluster_that_is_dropped_meanwhile_is_not_listed(
    clusters: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the error of its missing tables ends the list."""
    await clusters.create("berlin")
    await clusters.create("tokyo")
    schemas = catalogue._schemas
    monkeypatch.setattr(catalogue, "_schemas", lambda one: ["bonn", *schemas(one), "zagreb"])
    assert [one.name for one in await clusters.list()] == ["berlin", "tokyo"]


@pytest.mark.postgresql
async def test_schema_with_objects_of_another_program_is_kept(
    clusters: Clusters, location: str, make_task: MakeTask
) -> None:
    async with Database(location, cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
    execute(location, "CREATE TABLE berlin.invoices (id int)")
    with pytest.raises(ConflictError, match=r"table berlin\.invoices of another program"):
        await clusters.drop("berlin", force=True)
    [berlin] = await clusters.list()
    assert berlin.tasks == {"pending": 1}


async def test_renamed_cluster_keeps_its_number_its_tasks_and_its_order(
    clusters: Clusters, places: Location, make_task: MakeTask, make_node: MakeNode
) -> None:
    async with StateManager(Database(places, cluster="berlin"), None) as manager:
        await manager.add_task(make_task(name="before"))
        number, revision = await cluster_id_of(manager.db), manager.version

    await clusters.rename("berlin", "bonn")

    assert await clusters.names() == ["bonn"]
    await asyncio.to_thread(migrations.check, backend_of(places, cluster="bonn"))
    async with StateManager(Database(places, cluster="bonn"), None) as manager:
        assert (await cluster_id_of(manager.db), manager.version) == (number, revision)
        node = make_node()
        await manager.register_node(node)
        [task] = await manager.claim_tasks(node.node_id, start=True)
        await manager.complete_task(task, None)
        assert task.name == "before"
        assert await verify(manager.db)
    with pytest.raises(StoreError):
        await Database(places, cluster="berlin").initialize(migrate=False)


@pytest.mark.postgresql
async def test_process_of_the_old_name_fails_and_writes_nowhere(
    clusters: Clusters, location: str, make_task: MakeTask
) -> None:
    async with Database(location, cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
        await clusters.rename("berlin", "bonn")
        with pytest.raises(StoreError):
            await TaskRepository(database).create(make_task())
    [bonn] = await clusters.list()
    assert bonn.tasks == {"pending": 1}


@pytest.mark.sqlite
async def test_file_in_use_is_neither_dropped_nor_renamed(
    clusters: Clusters, places: Location
) -> None:
    async with Database(places, cluster="berlin") as database, database.session():
        for step in (clusters.drop("berlin"), clusters.rename("berlin", "bonn")):
            with pytest.raises(UnavailableError, match="in use"):
                await step
    assert await clusters.names() == ["berlin"]


@pytest.mark.sqlite
async def test_file_that_is_no_store_is_listed_with_its_problem(
    clusters: Clusters, places: Path
) -> None:
    await clusters.create("berlin")
    places.with_name("of-tokyo.db").write_text("no database, but long enough" * 100)
    places.with_name("of-Not a name.db").touch()
    berlin, tokyo = await clusters.list()
    assert berlin.problem is None
    assert tokyo.name == "tokyo"
    assert tokyo.problem is not None


async def test_cluster_of_an_older_schema_is_listed(clusters: Clusters, places: Location) -> None:
    await clusters.create("berlin")
    backend = backend_of(places, cluster="berlin")
    await asyncio.to_thread(migrations.downgrade, backend, "0005")
    [berlin] = await clusters.list()
    assert (berlin.revision, berlin.cluster_id, berlin.problem) == ("0005", None, None)


@pytest.mark.parametrize("place", ["./store.db", ":memory:"])
def test_location_must_have_a_place_for_the_name(place: str) -> None:
    with pytest.raises(InvalidDataError, match="must contain"):
        Clusters(place)


Run = Callable[..., Any]


@pytest.fixture
def run(places: Location) -> Run:
    """Runs the command line, and returns what it writes."""

    async def run(*arguments: str, status: int = 0) -> Any:
        done: Result = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            arguments,
            env={"OPENCLAW_STORE_URL": str(places), "COLUMNS": "200"},
        )
        assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
        if "--json" in arguments:
            return json.loads(done.stdout)
        return done.stdout + done.stderr

    return run


async def test_command_line(run: Run, places: Location, make_task: MakeTask) -> None:
    for name in ("berlin", "tokyo"):
        assert name in await run("clusters", "create", name)
    async with Database(places, cluster="berlin") as database:
        await TaskRepository(database).create(make_task(name="only here"))

    assert "only here" in await run("tasks", "--cluster", "berlin")
    assert "only here" in await run("tasks", "--cluster", "berlin", "-d", str(places))
    assert "only here" not in await run("--cluster", "tokyo", "tasks")
    assert "cluster" in await run("clusters", "create", "berlin", status=1)
    everything = await run("status", "--all", "--json")
    assert everything == await run("clusters", "list", "--json")
    assert everything["total"]["clusters"] == 2
    assert everything["total"]["tasks"] == {"pending": 1}
    table = await run("status", "--all")
    assert [line.split()[0] for line in table.splitlines()] == ["cluster", "berlin", "tokyo", "2"]
    if not isinstance(places, Path):
        await run("copy", str(places), str(places), "--cluster", "berlin", "--to-cluster", "paris")
        assert "only here" in await run("tasks", "--cluster", "paris")
        await run("clusters", "drop", "paris", "--force", "--yes")
    await run("clusters", "rename", "berlin", "bonn")
    assert "unfinished" in await run("clusters", "drop", "bonn", "--yes", status=1)
    await run("clusters", "drop", "bonn", "--yes", "--force")
    assert (await run("clusters", "list", "--json"))["total"]["clusters"] == 1
    assert (await run("doctor", "--cluster", "tokyo", "--json"))["is_well"]
    assert HEAD in await run("db", "current", "--cluster", "tokyo")
