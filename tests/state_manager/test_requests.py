"""What users ask for: to submit tasks, to list and cancel many, to know why one waits."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    Cluster,
    FakeClock,
    Location,
    assert_counted,
    assert_in_step,
    execute,
    feed,
    ids,
    locked,
    refuse_tasks,
    start,
    stored,
    until,
)

from openclaw_store import (
    DuplicateError,
    Explanation,
    InvalidDataError,
    NodeStatus,
    StoreError,
    Task,
    TaskFilter,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.sqlite.writing import WriteSession
from openclaw_store.domain.models import FINISHED, LIVE
from openclaw_store.repositories import pages
from openclaw_store.repositories.change_log import read_changes
from openclaw_store.state_manager import filter_calls, task_batches
from openclaw_store.state_manager import scheduler as scheduler

NAMES = [
    "100% done",
    "100 done",
    "snake_case",
    "snakeXcase",
    "Straße",
    "STRASSE",
    "ñ",
    "n\u0303",
    "it's",
    "",
]
MOMENT = datetime(2026, 2, 1, tzinfo=UTC)
EVERYTHING = TaskFilter.everything()


def moment(minutes: int) -> datetime:
    return MOMENT + timedelta(minutes=minutes)


def is_meant(filter: TaskFilter, task: Task) -> bool:
    """What a filter means, said in Python."""

    def among(value: Any, wanted: Any) -> bool:
        return value in ([wanted] if isinstance(wanted, str | int) else wanted)

    def ago(time: Any) -> Any:
        return FakeClock()() - time if isinstance(time, timedelta) else time

    def within(value: Any, start: Any, end: Any) -> bool:
        return (start is None or (value is not None and value >= start)) and (
            end is None or (value is not None and value < end)
        )

    return (
        (filter.status is None or among(task.status, filter.status))
        and (filter.task_type is None or among(task.task_type, filter.task_type))
        and filter.node in (None, task.assigned_node)
        and filter.user in (None, task.user_id)
        and (filter.skill is None or filter.skill in task.required_skills)
        and (filter.name_contains or "") in task.name
        and within(task.submitted_at, ago(filter.submitted_from), ago(filter.submitted_until))
        and within(task.completed_at, ago(filter.completed_from), ago(filter.completed_until))
        and (
            filter.finished_after is filter.finished_before is None
            or (
                task.status in FINISHED
                and within(
                    task.completed_at, ago(filter.finished_after), ago(filter.finished_before)
                )
            )
        )
        and (filter.priority is None or among(task.priority, filter.priority))
        and filter.idempotency_key in (None, task.idempotency_key)
        and (
            filter.error_contains is None
            or (task.error is not None and filter.error_contains in task.error)
        )
        and all(has_value(task.metadata, *one) for one in (filter.metadata or {}).items())
    )


def has_value(document: Any, path: str, wanted: Any) -> bool:
    for key in path.split("."):
        if not isinstance(document, dict) or key not in document:
            return False
        document = document[key]
    is_bool = isinstance(document, bool), isinstance(wanted, bool)
    return bool(document == wanted) and is_bool[0] is is_bool[1]


VALUES: list[Any] = [
    None, True, False, 0, 1, 1.0, -0.0, 0.5, "1", "", "null", "ä'", 1e23, 0.1 + 0.2, 2**62,
    2.0**62, 2**53 + 1, 2.0**53, 2**63 - 1, -(2**63), 2.0**63, 1e-7,
]  # fmt: skip
"""Values in the metadata, and the ones to search for."""

ODD_SKILL = 'G"\\ö'

FILTERS = [
    TaskFilter(),
    TaskFilter(status=TaskStatus.PENDING),
    TaskFilter(status="running"),  # type: ignore[arg-type]  # the text of one
    TaskFilter(status=[TaskStatus.FAILED, TaskStatus.TIMEOUT, TaskStatus.FAILED]),
    TaskFilter(status=FINISHED),
    TaskFilter(status=[]),
    TaskFilter(task_type=TaskType.DAEMON),
    TaskFilter(task_type=["batch", TaskType.IO_INTENSIVE]),  # type: ignore[list-item]  # the text of one
    TaskFilter(task_type=[]),
    TaskFilter(node="node-1"),
    TaskFilter(node="node-1", status=[TaskStatus.RUNNING, TaskStatus.COMPLETED]),
    TaskFilter(node="node-1", status=[]),
    TaskFilter(node=""),
    TaskFilter(user="Anna"),
    TaskFilter(user="Anna", task_type=TaskType.BATCH, skill="Go"),
    TaskFilter(skill="Go"),
    TaskFilter(skill="G%"),
    TaskFilter(skill=""),
    TaskFilter(skill=ODD_SKILL),
    *[
        TaskFilter(name_contains=text)
        for text in ("%", "_", "ß", "SS", "ss", "n", "ñ", "'", "", "\\")
    ],
    TaskFilter(submitted_from=moment(10)),
    TaskFilter(submitted_until=moment(10)),
    TaskFilter(submitted_from=moment(5), submitted_until=moment(15), name_contains="1"),
    TaskFilter(submitted_from=moment(15), submitted_until=moment(5)),
    TaskFilter(completed_from=moment(25)),
    TaskFilter(completed_until=moment(25), status=TaskStatus.COMPLETED),
    TaskFilter(submitted_from=moment(10).astimezone(timezone(timedelta(hours=5)))),
    EVERYTHING,
    TaskFilter(priority=TaskPriority.HIGH),
    TaskFilter(priority=[0, TaskPriority.LOW]),  # type: ignore[list-item]  # the value of one
    TaskFilter(priority=[]),
    TaskFilter(priority=[], completed_from=moment(25)),
    TaskFilter(idempotency_key="key 7"),
    *[TaskFilter(error_contains=text) for text in ("", "%", "No", "no")],
    TaskFilter(submitted_until=timedelta(days=28) - timedelta(minutes=10)),
    TaskFilter(finished_after=moment(25)),
    TaskFilter(finished_before=timedelta(days=28, minutes=-15), finished_after=moment(21)),
    *[TaskFilter(metadata={"a.b": value}) for value in VALUES],
    *[TaskFilter(metadata={path: 1}) for path in ("a", "a.0", "a.b.c", "", ".", "x", "ä b", "'")],
    TaskFilter(metadata={"a.b": 1, "x": True}),
]


class TestSubmit:
    async def test_hundred_at_once_make_one_row(self, cluster: Cluster) -> None:
        tasks = [cluster.make_task(idempotency_key="key") for _ in range(100)]

        found = await asyncio.gather(
            *[
                (cluster.one, cluster.two)[number % 2].submit_task(task)
                for number, task in enumerate(tasks)
            ]
        )

        rows, _, changes = await stored(cluster.one)
        assert len(rows) == len(changes) == 1
        assert found == rows * 100

    async def test_key_is_free_again_when_its_task_has_ended(self, cluster: Cluster) -> None:
        manager, node = cluster.one, await cluster.join()

        async def end_by_hand(task: Task) -> None:
            task.status = TaskStatus.TIMEOUT
            await manager.update_task(task)

        async def drop_key(task: Task) -> None:
            task.idempotency_key = None
            await manager.update_task(task)

        async def fail_for_good(task: Task) -> None:
            task.max_retries = 0
            await manager.update_task(task)
            await manager.fail_task(task, "no")

        for end in (
            manager.complete_task,
            fail_for_good,
            lambda task: manager.cancel_task(task.task_id),
            lambda task: manager.remove_task(task.task_id),
            end_by_hand,
            drop_key,
        ):
            first = await cluster.claimed(node, idempotency_key="key")
            before = await stored(manager)
            for taker in (manager, cluster.two):
                second = cluster.make_task(idempotency_key="key")
                assert await taker.submit_task(second) == first
                assert second.version == 0
                for add in (taker.add_task, partial(taker.add_task, persist=False)):
                    with pytest.raises(DuplicateError, match="idempotency key 'key'") as caught:
                        await add(second)
                    assert (caught.value.kind, caught.value.id) == ("task", first.task_id)
                    assert caught.value.idempotency_key == "key"
            assert await stored(manager) == before
            keyless = await cluster.add()
            keyless.idempotency_key = "key"
            for persist in (True, False):
                with pytest.raises(DuplicateError):
                    await manager.update_task(keyless, persist=persist)
            await end(first)
        third = cluster.make_task(idempotency_key="key")
        assert await cluster.two.submit_task(third) == await cluster.task(third.task_id) == third

    async def test_it_can_be_repeated(self, cluster: Cluster) -> None:
        task = cluster.make_task(idempotency_key="key")
        first = await cluster.one.submit_task(task)
        assert await cluster.two.submit_task(replace(task, version=0)) == first
        await cluster.one.cancel_task(task.task_id)
        ended = await cluster.task(task.task_id)
        assert await cluster.two.submit_task(replace(task, version=0)) == ended
        assert await cluster.two.get_task(task.task_id) == ended

        for stranger in (
            cluster.make_task(task_id=task.task_id),
            cluster.make_task(task_id=task.task_id, idempotency_key="another key"),
        ):
            with pytest.raises(DuplicateError) as caught:
                await cluster.two.submit_task(stranger)
            assert (caught.value.id, caught.value.idempotency_key) == (task.task_id, None)

    async def test_key_is_not_free_because_a_node_is_gone_that_is_called_like_its_task(
        self, cluster: Cluster
    ) -> None:
        holder = await cluster.add(idempotency_key="key")
        await cluster.join(node_id=holder.task_id)
        one, other = [cluster.make_task(idempotency_key="key") for _ in range(2)]

        first, is_gone, second = await asyncio.gather(  # one batch
            cluster.one.submit_task(one),
            cluster.one.remove_node(holder.task_id),
            cluster.one.submit_task(other),
        )

        assert is_gone
        assert first == second == holder

    async def test_key_that_becomes_free_meanwhile_is_taken(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the refusal and the look at who has it."""
        holder = await cluster.add(idempotency_key="key")
        get = cluster.two.task_repo.get

        async def get_too_late(task_id: str) -> Task | None:
            await cluster.one.remove_task(task_id)
            return await get(task_id)

        monkeypatch.setattr(cluster.two.task_repo, "get", get_too_late)
        task = cluster.make_task(idempotency_key="key")

        assert await cluster.two.submit_task(task) == task
        assert ids((await stored(cluster.one))[0]) == ids([task]) != ids([holder])


class TestAddTasks:
    async def test_each_task_has_an_outcome_and_a_bad_one_harms_no_other(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_batches, "ADD_BATCH_SIZE", 4)
        make = cluster.make_task
        there = await cluster.add(task_id="there")
        unsaved = make(task_id="unsaved")
        await cluster.one.add_task(unsaved, persist=False)
        good, keyed, last = make(submitted_at=None), make(idempotency_key="key"), make()
        bad: Any = make(name=None)
        tasks = [
            good,
            make(task_id="there"),
            bad,
            keyed,
            replace(good),
            make(idempotency_key="key"),
            make(task_id="unsaved"),
            "no task",
            last,
            last,
        ]

        outcomes = await cluster.one.add_tasks(one for one in tasks)

        def shown(outcome: StoreError | None) -> Any:
            if isinstance(outcome, DuplicateError):
                return outcome.id, outcome.idempotency_key
            return outcome.field if isinstance(outcome, InvalidDataError) else outcome

        assert [shown(outcome) for outcome in outcomes] == [
            None,
            ("there", None),
            "name",
            None,
            (good.task_id, None),
            (keyed.task_id, "key"),
            ("unsaved", None),
            "task",
            None,
            (last.task_id, None),
        ]
        rows, _, changes = await stored(cluster.one)
        assert sorted(ids(rows)) == sorted(ids([good, keyed, last, there, unsaved]))
        for task in (good, keyed, last):
            assert task.version > 0
            assert task == await cluster.task(task.task_id)
            assert task == await cluster.one.get_task(task.task_id)
        assert good.submitted_at == cluster.clock()
        assert bad.version == 0
        assert len(changes) == 5
        assert await cluster.one.add_tasks([]) == []

    async def test_others_write_between_its_chunks(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_batches, "ADD_BATCH_SIZE", 10)
        tasks = [cluster.make_task() for _ in range(35)]
        other = cluster.make_task()

        await asyncio.gather(cluster.one.add_tasks(tasks), cluster.one.add_task(other))

        assert [task.version for task in tasks[:10]] == list(range(1, 11))
        assert other.version == 11
        assert [task.version for task in tasks[10:]] == list(range(12, 37))

    async def test_next_tasks_are_checked_while_the_ones_before_are_written(
        self, cluster: Cluster, location: Location
    ) -> None:
        """Two cores work at the same time, and memory is bounded."""
        taken: list[str] = []

        def tasks() -> Iterator[Task]:
            for number in range(3 * task_batches.ADD_BATCH_SIZE):
                taken.append(f"task-{number:05}")
                yield cluster.make_task(task_id=taken[-1])

        async with locked(location):
            adding = start(cluster.one.add_tasks(tasks()))
            await until(lambda: len(taken) == 2 * task_batches.ADD_BATCH_SIZE)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(taken) == 2 * task_batches.ADD_BATCH_SIZE

        assert await adding == [None] * 3 * task_batches.ADD_BATCH_SIZE
        newest, _ = await cluster.one.db.read(partial(read_changes, since=2999))
        assert [change.item_id for change in newest] == ["task-02999"]

    async def test_batches_are_smaller_while_others_write(
        self, cluster: Cluster, location: Location
    ) -> None:
        """Others waited for a thousand tasks each time."""
        taken: list[Task] = []

        def tasks() -> Iterator[Task]:
            for _ in range(3 * task_batches.SHARED_BATCH_SIZE):
                taken.append(cluster.make_task())
                yield taken[-1]

        async with locked(location):
            others = [start(cluster.one.add_task(cluster.make_task())) for _ in range(2)]
            await until(cluster.one.db.has_other_writers)
            adding = start(cluster.one.add_tasks(tasks()))
            await until(lambda: len(taken) == 2 * task_batches.SHARED_BATCH_SIZE)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(taken) == 2 * task_batches.SHARED_BATCH_SIZE

        await asyncio.gather(*others)
        assert await adding == [None] * 3 * task_batches.SHARED_BATCH_SIZE

    @pytest.mark.parametrize("is_behind", [False, True])
    async def test_tasks_of_any_status_are_in_memory_at_once(
        self, cluster: Cluster, *, is_behind: bool
    ) -> None:
        """Also if the revisions before them are not in memory yet."""
        if is_behind:
            await cluster.two.add_tasks([cluster.make_task()])
        tasks = [cluster.make_task() for _ in range(3)]
        await cluster.one.add_tasks(tasks)
        tasks += (others := [cluster.make_task(status=status) for status in TaskStatus])
        await cluster.one.add_tasks(others)

        state = await cluster.one.get_state()

        live = {task.task_id: task for task in tasks if task.status in LIVE}
        assert state.tasks == live
        pending = await cluster.one.get_pending_tasks()
        assert {task.task_id for task in pending} == {
            id for id, task in live.items() if task.status is not TaskStatus.RUNNING
        }
        stats = await cluster.one.get_task_stats()
        assert (stats["pending"], stats["failed"], stats["total"]) == (4, 1, len(tasks))
        assert cluster.one.version == tasks[-1].version

    async def test_batch_is_written_with_few_statements(
        self, cluster: Cluster, sent: list[str]
    ) -> None:
        """Thirty of SQLite took longer, and `store_write` of PostgreSQL twice as long."""
        await cluster.one.add_tasks([cluster.make_task()])  # opens the connection
        session: Any = cluster.one.db._writer._session
        if isinstance(session, WriteSession):
            driver: Any = session._connection.connection.driver_connection
            driver.set_trace_callback(sent.append)
        sent.clear()

        await cluster.one.add_tasks([cluster.make_task() for _ in range(1000)])

        inserts = 2 * (1000 // 500 if isinstance(session, WriteSession) else 1)
        assert len([statement for statement in sent if "INSERT" in statement]) == inserts
        assert len(sent) == 3 + inserts
        assert not any("store_write" in statement for statement in sent)

    async def test_chunk_that_the_database_refuses_is_undone_and_those_before_it_stay(
        self, cluster: Cluster, location: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_batches, "ADD_BATCH_SIZE", 3)
        refuse_tasks(location, "bad")
        tasks = [cluster.make_task() for _ in range(8)]
        tasks[4].name = "bad"

        with pytest.raises(InvalidDataError) as caught:
            await cluster.one.add_tasks(tasks)

        assert caught.value.__notes__ == ["3 tasks were processed before this error"]
        rows, _, changes = await stored(cluster.one)
        assert sorted(ids(rows)) == ids(tasks[:3])
        assert [task.version for task in tasks] == [1, 2, 3, 0, 0, 0, 0, 0]
        assert len(changes) == 3
        await assert_in_step(cluster.one, cluster.two)
        tasks[4].name = "good"
        again = await cluster.one.add_tasks(tasks)
        assert [isinstance(outcome, DuplicateError) for outcome in again] == [
            *[True] * 3,
            *[False] * 5,
        ]
        assert (await cluster.one.get_task_stats())["total"] == 8

    async def test_error_of_the_iterable_tells_how_many_tasks_were_added(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_batches, "ADD_BATCH_SIZE", 3)

        def tasks() -> Iterator[Task]:
            yield from [cluster.make_task() for _ in range(5)]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            await cluster.one.add_tasks(tasks())

        assert caught.value.__notes__ == ["3 tasks were processed before this error"]
        assert (await cluster.one.get_task_stats())["total"] == 3


class TestLists:
    async def test_filter_means_what_it_says(
        self, cluster: Cluster, location: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Newest submitted first, then by identifier; in pages of whatever size, by each plan."""
        luck = random.Random(1)
        for number in range(70):
            await cluster.add(
                task_id=f"{'aBä'[number % 3]}{number:02}",
                status=luck.choice(list(TaskStatus)),
                task_type=luck.choice(list(TaskType)),
                name=NAMES[number % len(NAMES)],
                assigned_node=luck.choice([None, "node-1", "node-2"]),
                user_id=luck.choice([None, "Anna", "anna"]),
                required_skills=luck.choice([[], ["Go"], ["go", "G%"], ["Go", "", ODD_SKILL]]),
                submitted_at=moment(luck.randrange(20)),
                completed_at=luck.choice([None, moment(luck.randrange(20, 30))]),
                priority=luck.choice(list(TaskPriority)),
                idempotency_key=luck.choice([None, f"key {number}"]),
                error=luck.choice([None, "", "No", "no 100%"]),
                metadata=luck.choice([{}, {"a": [1]}, {"a": 1, "x": 1}, {"": 1, "'": 1, "ä b": 1}])
                if number >= 2 * len(VALUES)
                else {"a": {"b": VALUES[number // 2]}, "x": luck.choice([1, True])},
            )
        by_hand = json.dumps(["G%", ODD_SKILL]).replace("G", r"\u0047")
        change = f"UPDATE tasks SET required_skills = '{by_hand}' WHERE task_id = 'B04'"
        execute(location, change)
        rows, _, _ = await stored(cluster.one)
        assert len(rows) == 70
        rows.sort(key=lambda task: (task.submitted_at or MOMENT, task.task_id), reverse=True)
        for wanted in FILTERS:
            expected = [task for task in rows if is_meant(wanted, task)]
            assert await cluster.two.count_tasks(wanted) == len(expected)
            for size, first, short in ((7, 70, 70), (30, 4, 3), (250, 0, 0)):
                monkeypatch.setattr(filter_calls, "ITER_PAGE_SIZE", size)
                monkeypatch.setattr(pages, "_FIRST_TASKS", first)
                monkeypatch.setattr(pages, "_SHORT_RANGE", short)
                assert [task async for task in cluster.two.iter_tasks(wanted)] == expected
        assert await cluster.one.list_tasks() == await cluster.two.task_repo.list_tasks(None)

    async def test_pages_stay_stable_while_tasks_change(self, cluster: Cluster) -> None:
        """Nothing comes twice, and nothing is left out that was there and still fits."""
        for number in range(20):
            await cluster.add(task_id=f"{number:02}", submitted_at=moment(number // 3))
        live, after, found = TaskFilter(status=LIVE), None, list[str]()
        pages = 0
        while not pages or after is not None:
            page = await cluster.two.list_tasks(live, after=after, limit=4)
            found += ids(page.tasks)
            after, pages = page.after, pages + 1
            await cluster.one.remove_task(found[-1])  # where the cursor stands
            await cluster.one.cancel_task(found[-2])
            await cluster.add(task_id=f"new {pages}", submitted_at=moment(60 + pages))
            await cluster.one.change_task(found[-3], lambda task: setattr(task, "name", "new"))
            if pages == 1:
                await cluster.one.cancel_task("05")
                await cluster.one.remove_task("04")
                await cluster.one.change_task(
                    "03", lambda task: setattr(task, "status", TaskStatus.RUNNING)
                )

        assert found == [f"{number:02}" for number in reversed(range(20)) if number not in (4, 5)]

    async def test_cursor_is_a_place_whichever_filter_it_came_with(self, cluster: Cluster) -> None:
        for number in range(6):
            status = TaskStatus.RUNNING if number % 2 else TaskStatus.PENDING
            await cluster.add(task_id=f"{number}", status=status)
        page = await cluster.one.list_tasks(TaskFilter(status=TaskStatus.RUNNING), limit=1)

        rest = await cluster.one.list_tasks(TaskFilter(status=TaskStatus.PENDING), after=page.after)
        assert (ids(page.tasks), ids(rest.tasks)) == (["5"], ["4", "2", "0"])

    async def test_nonsense_is_refused_by_name(self, cluster: Cluster) -> None:
        await cluster.add()
        both: list[Any] = [cluster.one.list_tasks, cluster.one.task_repo.list_tasks]
        no_values: list[Any] = [[], {}, 1j, math.nan, 2**64, "\0", "\ud800"]
        field_values: list[tuple[str, Any]] = [
            *[("status", value) for value in ("done", 1, ["pending", "done"], [None])],
            *[("task_type", value) for value in ("BATCH", TaskStatus.PENDING, [True])],
            *[(name, value) for name in ("node", "user", "skill", "name_contains")
              for value in (7, b"text", "\0", "\ud800", ["text"])],
            *[(name, "x" * 256) for name in ("node", "user")],
            *[(f"{name}_{end}", value) for name in ("submitted", "completed")
              for end in ("from", "until") for value in ("2026-01-01", 0, MOMENT.date())],
            *[("finished_after", value) for value in (timedelta(-1), timedelta.max, 60)],
            *[("priority", value) for value in (9, "high", [None], True)],
            *[("error_contains", value) for value in (7, "\0")],
            ("idempotency_key", "x" * 256),
            ("metadata", []),
            *[("metadata", {path: 1}) for path in (1, '"', "\\", "a\n", "\0")],
            *[("metadata", {"a": odd}) for odd in no_values],
        ]  # fmt: skip
        for name, value in field_values:
            for call in (*both, cluster.one.count_tasks, cluster.one.cancel_tasks):
                with pytest.raises(InvalidDataError) as caught:
                    await call(TaskFilter(**{name: value}))
                assert caught.value.field == name
        for call in both:
            for filter in ("pending", {"status": "pending"}, TaskStatus.PENDING):
                with pytest.raises(InvalidDataError, match="filter"):
                    await call(filter)
            for after in (
                "",
                "task-0001",
                "1",
                ".",
                "x.y",
                f"{10**30}.x",
                "1.\0",
                7,
                "0." + "x" * 256,
            ):
                with pytest.raises(InvalidDataError, match="after"):
                    await call(after=after)
            for limit in (0, -1, None, True, "1", 1 << 63):
                with pytest.raises(InvalidDataError, match="limit"):
                    await call(limit=limit)
            assert len(await call(limit=(1 << 63) - 1)) == 1
        assert len(await cluster.one.task_repo.list_by_status(TaskStatus.PENDING)) == 1


class TestCancelTasks:
    async def test_live_tasks_that_are_meant_are_ended_and_named(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scheduler, "TASK_PAGE_SIZE", 3)
        node = await cluster.join(max_concurrent_tasks=9)
        for status in FINISHED:
            await cluster.add(status=status, name="train")
        held = [await cluster.claimed(node, name="train"), await cluster.running(node)]
        held.append(await cluster.running(node, name="train"))
        waiting = [await cluster.add(name="train") for _ in range(7)]
        other = await cluster.add(name="Train")
        meant = [*waiting, held[0], held[2]]
        rows, _, changes = await stored(cluster.one)

        done = await cluster.two.cancel_tasks(TaskFilter(name_contains="train"), "no money")

        assert sorted(done) == sorted(ids(meant))
        for task in rows:
            found = await cluster.task(task.task_id)
            if task.task_id in done:
                assert (found.status, found.error) == (TaskStatus.CANCELLED, "no money")
                assert found.completed_at == cluster.clock()
            else:
                assert found == task
        later = [one for one in await feed(cluster.one, len(changes)) if one.item == "task"]
        assert [one.reason for one in later] == ["no money"] * 9
        await assert_counted(cluster.one)
        cancel = cluster.one.cancel_tasks
        finished = TaskFilter(status=[TaskStatus.COMPLETED, TaskStatus.FAILED])
        assert await cancel(finished) == await cancel(TaskFilter(user="nobody")) == []
        with pytest.raises(InvalidDataError, match="reason"):
            await cancel(EVERYTHING, reason="\0")
        assert await cancel(TaskFilter(status=TaskStatus.RUNNING)) == ids([held[1]])
        assert await cancel(EVERYTHING) == ids([other])
        assert await cancel(EVERYTHING) == []

    async def test_what_is_changed_meanwhile_is_looked_at_again(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        renamed, noted, started, gone = [await cluster.add(name="train") for _ in range(4)]
        node = await cluster.join()
        list_records = cluster.two.task_repo.list_records

        async def list_too_early(*arguments: Any, **options: Any) -> Any:
            page = await list_records(*arguments, **options)
            monkeypatch.undo()
            await cluster.one.update_task(replace(renamed, name="keep"))
            await cluster.one.update_task(replace(noted, metadata={"a": "note"}))
            await cluster.one.update_task(
                replace(started, status=TaskStatus.RUNNING, assigned_node=node)
            )
            await cluster.one.remove_task(gone.task_id)
            return page

        monkeypatch.setattr(cluster.two.task_repo, "list_records", list_too_early)

        done = await cluster.two.cancel_tasks(TaskFilter(name_contains="train"))

        assert sorted(done) == ids([noted, started])
        assert (await cluster.task(renamed.task_id)).status is TaskStatus.PENDING
        assert (await cluster.task(noted.task_id)).metadata == {"a": "note"}

    async def test_what_is_only_in_memory_is_ended_too(self, cluster: Cluster) -> None:
        held = cluster.make_task()
        await cluster.one.add_task(held, persist=False)
        lost = cluster.make_task()
        await cluster.one.add_task(lost, persist=False)
        await cluster.two.add_task(replace(lost, name="newer"))

        assert sorted(await cluster.one.cancel_tasks(EVERYTHING)) == ids([held, lost])

        assert (await cluster.task(lost.task_id)).name == "newer"

    async def test_task_that_was_put_back_by_hand_does_not_go_round_for_ever(
        self, cluster: Cluster, location: Location
    ) -> None:
        done, live = await cluster.add(status=TaskStatus.FAILED), await cluster.add()
        put = f"UPDATE tasks SET status = '{{}}' WHERE task_id = '{done.task_id}'"
        execute(location, put.format("pending"))

        async with asyncio.timeout(PATIENCE):
            assert await cluster.one.cancel_tasks(EVERYTHING) == ids([live])

        execute(location, put.format("failed"))


class TestExplain:
    async def test_each_reason_as_data_and_as_a_sentence(self, cluster: Cluster) -> None:
        manager = cluster.one
        task = await cluster.add(task_id="t", required_skills=["gpu", "go"])

        async def why(id: str = "t") -> tuple[Explanation, str]:
            explanation = await manager.explain_task(id)
            assert explanation.task_id == id
            return explanation, str(explanation)

        data, text = await why()
        assert (data.missing_skills, data.nodes, data.ahead) == (("go", "gpu"), {}, 0)
        assert text == "Task 't' waits: no node has the skill 'go' or 'gpu'."
        await cluster.join(node_id="a", available_skills=["go", "GPU"])
        data, text = await why()
        assert (data.missing_skills, data.nodes) == (("gpu",), {})
        assert text == "Task 't' waits: no node has the skill 'gpu'."
        await cluster.join(node_id="b", available_skills=["gpu"])
        data, text = await why()
        assert (data.missing_skills, data.nodes) == ((), {})
        assert text == "Task 't' waits: no node has all of its skills."

        both = {"available_skills": ["go", "gpu"], "max_concurrent_tasks": 1}
        for id, status in (("c", NodeStatus.OFFLINE), ("d", NodeStatus.MAINTENANCE)):
            await cluster.join(node_id=id, status=status, **both)
        await cluster.claimed(await cluster.join(node_id="e", **both), required_skills=["gpu"])
        data, text = await why()
        assert data.nodes == {"c": "offline", "d": "maintenance", "e": "full"}
        assert text == (
            "Task 't' waits: of the nodes that have its skills, c is offline, d is maintenance, "
            "e is full."
        )

        await cluster.join(node_id="f", available_skills=["java"])
        at_first = {"priority": TaskPriority.HIGH}
        await cluster.add(**at_first)
        await cluster.add(required_skills=["java"], **at_first)  # none of these nodes' business
        await cluster.add(not_before=cluster.clock() + timedelta(hours=1), **at_first)
        await cluster.add()  # behind it
        await manager.cancel_task("task-0002")
        data, text = await why()
        assert (data.nodes, data.ahead) == ({"c": "offline", "d": "maintenance", "e": "free"}, 1)
        assert text == "Task 't' waits: 1 task goes first."
        await cluster.add(required_skills=["gpu"], **at_first)
        task.not_before = cluster.clock() + timedelta(minutes=1)
        await manager.update_task(task)
        data, text = await why()
        assert (data.not_before, data.ahead) == (task.not_before, 2)
        assert text == (
            "Task 't' waits: it is not due until 2026-03-01T12:01:00+00:00; 2 tasks go first."
        )

        cluster.clock.advance(hours=1)
        assert (await why())[1] == "Task 't' waits: 3 tasks go first."
        await manager.cancel_tasks(TaskFilter(status=TaskStatus.PENDING, name_contains="number 8"))
        claimed = await manager.claim_tasks("e", 9)
        await cluster.one.complete_task(claimed[0])
        while (await manager.explain_task("t")).ahead:
            [claimed_next] = await manager.claim_tasks("e")
            await manager.complete_task(claimed_next)
        data, text = await why()
        assert data == Explanation("t", TaskStatus.PENDING, None, None, (), data.nodes, 0)
        assert text == "Task 't' can be claimed now, for e."

        [task] = await manager.claim_tasks("e")
        await cluster.two.refresh_from_database()
        data = await cluster.two.explain_task("t")
        assert (data.status, data.assigned_node, data.nodes) == (TaskStatus.SCHEDULED, "e", {})
        assert str(data) == "Task 't' does not wait: it is scheduled on node 'e'."
        await cluster.add(task_id="done", status=TaskStatus.COMPLETED)
        assert (await why("done"))[1] == "Task 'done' does not wait: it is completed."
        with pytest.raises(TaskNotFoundError):
            await manager.explain_task("unknown")
