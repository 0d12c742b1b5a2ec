"""What operators ask in the night: which tasks failed, which ones are stuck, how fast it goes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from conftest import FakeClock, MakeNode, MakeTask
from sqlalchemy import Connection

from openclaw_store import StateManager, Task, TaskStatus
from openclaw_store.maintenance.failures import find_failures, fold
from openclaw_store.maintenance.statistics import Quantiles, read_intervals, read_statistics
from openclaw_store.maintenance.stuck import Reason, find_stuck

Result = TypeVar("Result")

HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


async def ask(
    manager: StateManager, question: Callable[..., Result], *given: Any, **options: Any
) -> Result:
    def on_connection(connection: Connection) -> Result:
        return question(connection, *given, **options)

    return await manager.db.read(
        lambda session: session.run_sync(lambda sync: on_connection(sync.connection()))
    )


class TestFailures:
    async def test_failures_are_grouped_by_status_and_text_without_numbers(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        failed: list[Task] = [
            make_task(
                task_id=f"t{number}",
                status=TaskStatus.FAILED,
                assigned_node="atlas" if number else "borg",
                error=f"Traceback\n  line {number}\nOSError: page {number} of 0x{number}ff",
                completed_at=clock() - number * MINUTE,
            )
            for number in range(4)
        ]
        failed.append(make_task(task_id="slow", status=TaskStatus.TIMEOUT, completed_at=clock()))
        failed.append(
            make_task(task_id="old", status=TaskStatus.FAILED, completed_at=clock() - 2 * HOUR)
        )
        await manager.add_tasks([*failed, make_task(status=TaskStatus.COMPLETED)])

        found = await ask(manager, find_failures, manager.db.statements, clock() - HOUR)

        assert [(one.status, one.text, one.count) for one in found.groups] == [
            (TaskStatus.FAILED, "OSError: page # of #", 4),
            (TaskStatus.TIMEOUT, "", 1),
        ]
        first = found.groups[0]
        assert (first.newest_at, first.examples) == (clock(), ["t0", "t1", "t2"])
        assert first.nodes == ["atlas", "borg"]
        assert (found.count, found.is_complete) == (5, True)

    async def test_only_the_newest_failures_are_read(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        await manager.add_tasks(
            [
                make_task(
                    task_id=f"t{number}",
                    status=TaskStatus.FAILED,
                    error=f"error of kind {'abc'[number]}",
                    completed_at=clock() - number * MINUTE,
                )
                for number in range(3)
            ]
        )

        found = await ask(manager, find_failures, manager.db.statements, clock() - HOUR, most=2)

        assert (found.count, found.is_complete) == (2, False)
        assert {one.text for one in found.groups} == {"error of kind a", "error of kind b"}

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            ("", ""),
            ("\n", ""),
            ("KeyError: 'a1'\n", "KeyError: 'a#'"),
            ("id 0af76519-16cd-43dd-8448-eb211c80319c gone", "id # gone"),
            ("x" * 500, "x" * 160),
        ],
    )
    def test_errors_are_folded(self, error: str, text: str) -> None:
        assert fold(error) == text


class TestStuck:
    async def test_each_reason_is_found(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.register_node(make_node(node_id="dead", available_skills=["gpu"]))
        clock.advance(seconds=1000)
        await manager.register_node(make_node(node_id="atlas", available_skills=["cpu"]))
        await manager.register_node(make_node(node_id="drained", available_skills=["ocr"]))
        await manager.drain_node("drained")
        long_ago = clock() - 500 * SECOND
        on_atlas = {"assigned_node": "atlas", "scheduled_at": long_ago}
        running = {"status": TaskStatus.RUNNING, "started_at": long_ago}
        cpu = {"required_skills": ["cpu"], "submitted_at": long_ago}
        tasks = [
            make_task(task_id="held", assigned_node="dead", **running),
            make_task(task_id="removed", assigned_node="gone", **running),
            make_task(task_id="lazy", status=TaskStatus.SCHEDULED, **on_atlas),
            make_task(task_id="slow", timeout=100, **on_atlas, **running),
            make_task(task_id="well", timeout=1000, **on_atlas, **running),
            make_task(task_id="ready", **cpu),
            make_task(task_id="odd", required_skills=["quantum", "cpu"], submitted_at=long_ago),
            make_task(task_id="odd too", required_skills=["quantum", "cpu"]),
            make_task(
                task_id="odd retry", required_skills=["quantum"], not_before=clock() + MINUTE
            ),
            make_task(task_id="dark", required_skills=["gpu"], submitted_at=long_ago),
            make_task(task_id="scan", required_skills=["ocr"], submitted_at=long_ago),
            make_task(task_id="late", expires_at=clock() - MINUTE, **cpu),
        ]
        await manager.add_tasks(tasks)
        clock.advance(seconds=90)  # of the writes, which are young
        await manager.update_heartbeat("atlas")
        await manager.sync_to_database()

        found = await ask(manager, find_stuck, clock())

        assert {(one.reason, one.subject): list(one.examples) for one in found} == {
            (Reason.NODE_LOST, "dead"): ["held"],
            (Reason.NODE_LOST, "gone"): ["removed"],
            (Reason.NOT_STARTED, "atlas"): ["lazy"],
            (Reason.OVERDUE, "atlas"): ["slow"],
            (Reason.NO_SKILL, "cpu, quantum"): ["odd", "odd too"],
            (Reason.NO_SKILL, "quantum"): ["odd retry"],
            (Reason.NO_LIVE_NODE, "gpu"): ["dark"],
            (Reason.NO_LIVE_NODE, "ocr"): ["scan"],
            (Reason.EXPIRED, ""): ["late"],
        }
        assert found[0].subject == "cpu, quantum"  # the largest group is first
        assert (found[0].count, found[0].since, found[0].is_complete) == (2, long_ago, True)

    async def test_counts_have_a_limit(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        await manager.add_tasks(
            [make_task(task_id=f"t{number}", required_skills=["gpu"]) for number in range(5)]
        )

        [found] = await ask(manager, find_stuck, clock(), most=3)

        assert (found.count, found.is_complete) == (3, False)

    async def test_nothing_is_stuck_in_an_empty_store(
        self, manager: StateManager, clock: FakeClock
    ) -> None:
        assert await ask(manager, find_stuck, clock()) == []


class TestStatistics:
    async def test_numbers_and_times_of_a_period(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        since = clock() - HOUR
        await manager.add_tasks(
            [
                make_task(
                    task_id=f"t{number}",
                    status=TaskStatus.FAILED if number == 9 else TaskStatus.COMPLETED,
                    submitted_at=since + number * 6 * MINUTE,
                    started_at=since + number * 6 * MINUTE + 10 * SECOND,
                    completed_at=since + number * 6 * MINUTE + number * MINUTE,
                    assigned_node="atlas" if number < 7 else "borg",
                    user_id="anna",
                )
                for number in range(1, 10)
            ]
        )
        await manager.add_task(make_task(task_id="waits", submitted_at=clock() - SECOND))

        found = await ask(manager, read_statistics, manager.db.statements, since, clock(), parts=6)

        assert [one.submitted for one in found.intervals] == [1, 2, 1, 2, 2, 2]
        assert [one.finished for one in found.intervals] == [1, 1, 2, 1, 2, 1]
        assert [one.failed for one in found.intervals] == [0] * 6
        assert found.waiting == Quantiles(10, 10, 10)
        assert found.running is not None
        assert found.running.p50 == 4 * 60 - 10
        assert dict(found.by["node"]) == {"atlas": 6, "borg": 2}
        assert dict(found.by["user"]) == {"anna": 8}
        assert not found.is_sampled

    async def test_sampled_tasks_count_for_the_others(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        await manager.add_tasks(
            [
                make_task(status=TaskStatus.CANCELLED, completed_at=clock() - number * SECOND)
                for number in range(1, 31)
            ]
        )

        found = await ask(
            manager,
            read_statistics,
            manager.db.statements,
            clock() - HOUR,
            clock(),
            parts=4,
            most=10,
        )

        assert found.is_sampled
        assert sum(found.by["type"].values()) == 30
        assert found.waiting is None

    async def test_failed_tasks_are_among_the_finished_ones(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        for status in (TaskStatus.FAILED, TaskStatus.TIMEOUT, TaskStatus.COMPLETED):
            await manager.add_task(make_task(status=status, completed_at=clock() - MINUTE))

        [found] = await ask(manager, read_intervals, clock() - HOUR, clock(), 1)

        assert (found.finished, found.failed) == (3, 2)
