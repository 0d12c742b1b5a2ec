"""Tests of workers in processes of their own, which are ended by signals."""

from __future__ import annotations

import pytest
from conftest import Location, MakeTask
from support.scripts import run_scripts

from openclaw_store import Database, StateManager, TaskStatus

pytestmark = pytest.mark.asyncio

DEPLOYMENTS = 40

DEPLOY = """
import asyncio, os, random, signal, sys, time
from openclaw_store import Database, NodeInfo, StateManager, Worker

location, deployments = sys.argv[1], int(sys.argv[2])
node = NodeInfo("atlas", "host", max_concurrent_tasks=3)

def deploy():
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        async def handle(task, run):
            os.write(begin, b"x")
            await asyncio.sleep(random.uniform(0, 0.1))

        asyncio.run(Worker(Database(location), node, handle, grace_seconds=0).run())
        os._exit(0)
    os.close(begin)
    assert os.read(begun, 1), "the worker has failed"
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code
    os.close(begun)

async def finish():
    async def handle(task, run):
        pass

    async with StateManager(Database(location)) as store:
        worker = Worker(store, node, handle)
        running = asyncio.create_task(worker.run())
        async for task in store.iter_tasks():
            await store.wait_for_task(task.task_id)
        worker.stop()
        await running

for _ in range(deployments):
    deploy()
asyncio.run(finish())
"""

SECOND_SIGNAL = """
import asyncio, os, signal, sys
from openclaw_store import Database, NodeInfo, Worker

location = sys.argv[1]
seen, see = os.pipe()
child = os.fork()
if child == 0:
    async def handle(task, run):
        os.write(see, b"x")
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                os.write(see, b"x")  # and goes on in spite of it

    node = NodeInfo("atlas", "host")
    asyncio.run(Worker(Database(location), node, handle, grace_seconds=0).run())
    os._exit(0)
os.close(see)
for _ in range(2):
    assert os.read(seen, 1), "the worker has failed"
    os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


async def test_forty_deployments_cost_no_task_a_retry_or_a_loss(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    """Issue #23: in the first edition, four restarts made every task FAILED."""
    async with StateManager(database) as store:
        tasks = [make_task() for _ in range(3 * DEPLOYMENTS)]
        await store.add_tasks(tasks)

        (ended,) = run_scripts((DEPLOY, [location, DEPLOYMENTS]))

        assert ended.code == 0, ended.err
        found = [await store.task_repo.get(task.task_id) for task in tasks]
        assert {(one.status, one.retry_count, one.losses) for one in found if one is not None} == {
            (TaskStatus.COMPLETED, 0, 0)
        }
        assert sum(one.attempt > 1 for one in found if one is not None) > 0
        node = await store.node_repo.get("atlas")
        assert node is not None
        assert (node.running_tasks, node.failed_tasks) == (0, 0)
        assert node.total_tasks_processed == len(tasks)


async def test_second_signal_ends_the_worker_at_once(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    async with StateManager(database) as store:
        await store.add_task(make_task())

        (ended,) = run_scripts((SECOND_SIGNAL, [location]))

    assert (ended.code, ended.out) == (0, ["-15"]), ended.err
