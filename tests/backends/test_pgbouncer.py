"""Through PgBouncer, with the documented settings: what works, and what does not."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import PATIENCE, MakeNode, MakeTask, execute, locked
from sqlalchemy import make_url
from support.pages import DOCS, blocks

from devtools.postgres import Server, free_port, wait_until
from openclaw_store import Database, StateManager, Task, TaskRepository, TaskStatus, verify
from openclaw_store.errors import UnavailableError
from openclaw_store.testing import create_database

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")

pytestmark = [
    pytest.mark.postgresql,
    pytest.mark.skipif(PROGRAM is None, reason="no PgBouncer: apt-get install pgbouncer"),
]

PAGE = DOCS / "how-to" / "postgresql.md"
[SETTINGS] = [
    block.text for block in blocks(PAGE, "ini") if "ignore_startup_parameters" in block.text
]
[ROLE] = [block.text for block in blocks(PAGE, "sql") if "ALTER ROLE" in block.text]

Bouncer = Callable[..., str]
"""Runs PgBouncer in a mode; gives the URL of the database by that way."""


@pytest.fixture
def url(own_server: Server) -> Iterator[str]:
    """A migrated, empty database of a role with the documented settings, but short waits."""
    role = f"role_{uuid4().hex}"
    execute(own_server.url, f"CREATE ROLE {role} LOGIN")
    for statement in ROLE.replace("scheduler", role).replace("'9s'", "'1s'").splitlines():
        execute(own_server.url, statement)
    url = asyncio.run(own_server.create_database())
    create_database(url)
    tables = "ALL TABLES IN SCHEMA public"
    execute(url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role}")
    yield make_url(url).set(username=role).render_as_string()
    asyncio.run(own_server.drop_database(url))
    execute(own_server.url, f"DROP ROLE {role}")


@pytest.fixture
def bouncer(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bouncer]:
    with contextmanager(running)(url, tmp_path_factory.mktemp("bouncer")) as bouncer:
        yield bouncer


def running(url: str, folder: Path) -> Iterator[Bouncer]:
    """Programs that have ended when the context has."""
    started: list[subprocess.Popen[bytes]] = []
    server = make_url(url)

    def start(mode: str, settings: str = SETTINGS) -> str:
        port = free_port()
        (folder / "pgbouncer.ini").write_text(f"""
[databases]
{server.database} = host={server.host} port={server.port} user={server.username}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
{settings}""")
        assert PROGRAM is not None
        # It refuses to run as root, and nobody else may read the folder.
        with (folder / "pgbouncer.ini").open() as configuration:
            started.append(
                subprocess.Popen(
                    [PROGRAM, "-q", "/dev/stdin"],
                    stdin=configuration,
                    stderr=subprocess.DEVNULL,
                    user="nobody" if os.geteuid() == 0 else None,
                )
            )

        def is_there() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        wait_until(is_there, "PgBouncer takes connections")
        return server.set(port=port).render_as_string()

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
            process.wait(PATIENCE)


async def until_seen(manager: StateManager, task: Task) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await manager.get_state()).tasks.get(task.task_id) != task:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_two_coordinators_work_with_the_settings_of_the_readme(
    bouncer: Bouncer, make_task: MakeTask, make_node: MakeNode, mode: str
) -> None:
    url = bouncer(mode)
    async with (
        StateManager(Database(url), 3600) as one,
        StateManager(Database(url), 3600) as two,
    ):
        await one.register_node(make_node(node_id="n", max_concurrent_tasks=99))
        tasks = [make_task() for _ in range(60)]
        await asyncio.gather(*[(one, two)[n % 2].add_task(task) for n, task in enumerate(tasks)])
        for manager in (one, two, one):
            for task in await manager.claim_tasks("n", limit=10):
                await manager.complete_task(await manager.start_task(task))
        async with two.db.transaction() as tx:
            await TaskRepository(tx).delete(tasks[-1].task_id)
        last = make_task()
        await two.add_task(last)

        await until_seen(one, last)  # by polling, where a transaction gets another connection
        await two.refresh_from_database()
        assert (await one.get_state()).tasks == (await two.get_state()).tasks
        assert (await one.get_task_stats())[TaskStatus.COMPLETED] == 30
        assert (await verify(two.db)).problems == []


@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_who_waits_for_a_lock_in_vain_is_told_that_nothing_was_written(
    bouncer: Bouncer, url: str, own_server: Server, make_task: MakeTask, mode: str
) -> None:
    # The role of `url` may not be idle in a transaction for so long.
    owner = make_url(url).set(username=make_url(own_server.url).username).render_as_string()
    async with Database(bouncer(mode), timeout=3) as database:
        tasks = TaskRepository(database)
        async with locked(owner):
            with pytest.raises(UnavailableError, match="another process keeps it locked"):
                await tasks.create(make_task())

        await tasks.create(make_task())
        assert await tasks.count_by_status() == 1


async def test_without_these_settings_it_is_told_what_is_refused(bouncer: Bouncer) -> None:
    with pytest.raises(UnavailableError, match=r"unsupported startup parameter.*: check the pool"):
        await Database(bouncer("session", settings="")).initialize()


async def test_statement_pooling_is_refused(bouncer: Bouncer) -> None:
    with pytest.raises(UnavailableError):
        await Database(bouncer("statement")).initialize()
