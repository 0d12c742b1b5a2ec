"""The picture in memory and its containers, without any database."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import in_profile

from openclaw_store import Change, ChangeKind, NodeInfo, NodeStatus, Task, TaskPriority, TaskStatus
from openclaw_store.domain.models import FINISHED
from openclaw_store.domain.records import Record, encode
from openclaw_store.repositories.heartbeats import Heartbeat, HeartbeatWritten
from openclaw_store.repositories.unit_of_work import Event
from openclaw_store.state_manager.cache import Cache
from openclaw_store.state_manager.change_feed import STEP, ChangeBatch, InitialState
from openclaw_store.state_manager.snapshot import Records
from openclaw_store.state_manager.sorted_keys import SortedKeys
from openclaw_store.state_manager.task_index import IndexEntry, pending_key

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def task_record(id: str, version: int, status: TaskStatus = TaskStatus.PENDING) -> Record[Task]:
    task = Task(id, "batch", f"version {version}", status=status, submitted_at=START)  # type: ignore[arg-type]  # a value will do
    return encode(task).evolve(version=version)


def node_record(id: str, version: int, **fields: Any) -> Record[NodeInfo]:
    defaults: dict[str, Any] = {"hostname": "host", "registered_at": START}
    return encode(NodeInfo(id, **{**defaults, **fields})).evolve(version=version)


def change(
    revision: int, id: str, before: str | None, after: str | None, *, item: str = "task"
) -> Change:
    kind = (
        ChangeKind.CREATED if before is None
        else ChangeKind.REMOVED if after is None
        else ChangeKind.UPDATED if before == after
        else ChangeKind.STATUS
    )  # fmt: skip
    changed_at = START + timedelta(seconds=revision)
    return Change(revision, changed_at, item, id, kind, before, after, None, None)


def decode_row(row: tuple[Any, ...]) -> Record[Any]:
    """Of a row as `FakeDatabase` has it: an identifier, and the record."""
    record: Record[Any] = row[1]
    return record


def entry_of(row: tuple[Any, ...]) -> IndexEntry:
    task = decode_row(row)
    return IndexEntry(row[0], task.version, task.status, task.assigned_node, pending_key(task))


def encode_row(record: Record[Any]) -> tuple[Any, ...]:
    return record.task_id, record


NOTHING = InitialState(
    0, 0, None, {}, {Task: decode_row, NodeInfo: decode_row}, entry_of, encode_row
)


def node_news(
    revision: int,
    changes: Sequence[Change],
    *records: Record[NodeInfo],
    heartbeat_sequence: int = 0,
    heartbeats: Sequence[tuple[int, Heartbeat]] = (),
) -> ChangeBatch:
    """What the feed says of nodes."""
    return ChangeBatch(
        revision=revision,
        read_at=revision,
        heartbeat_sequence=heartbeat_sequence,
        changes=[(*step_of(change), None) for change in changes],
        changed_at=changes[-1].changed_at if changes else None,
        is_complete=True,
        nodes={record.node_id: record for record in records},
        heartbeats=heartbeats,
        task_counts=None,
    )


def step_of(change: Change) -> Sequence[Any]:
    """What a cache is told of a change."""
    values = change._asdict()
    return [values[name] for name in STEP]


def pending(cache: Cache, limit: int | None) -> list[Record[Task]]:
    """The first pending and scheduled tasks, as the index finds them."""
    found = [cache.tasks.get(id) for _, _, id in cache.task_index.pending.first(limit)]
    return [record for record in found if record is not None]


class FakeDatabase:
    """What a database with a feed would tell a cache."""

    def __init__(self) -> None:
        self.rows: dict[str, Record[Task]] = {}
        self.revision = 0
        self.changes: list[Change] = []

    def write(self, id: str, status: TaskStatus | None, *, with_history: bool = False) -> Event:
        """Create, change or (`None`) remove a task; returns what the writer would tell."""
        self.revision += 1
        old = self.rows.pop(id, None)
        before = None if old is None else str(old.status.value)
        new = None if status is None else task_record(id, self.revision, status)
        if new is not None:
            self.rows[id] = new
        if with_history:
            self.changes = [entry for entry in self.changes if entry.item_id != id]
        after = None if status is None else str(status.value)
        self.changes.append(change(self.revision, id, before, after))
        return Event(Task, id, new, self.changes[-1])

    def batch(self, since: int, page: int, *, is_complete: bool = True) -> ChangeBatch:
        """A page of the feed, as `read_change_batch` reads it."""
        changes = [entry for entry in self.changes if entry.revision > since][:page]
        until = changes[-1].revision if len(changes) == page else self.revision
        is_complete = is_complete and len(changes) == until - since
        counts = None if is_complete or until < self.revision else self.counts()
        last = {one.item_id: one.revision for one in changes}
        return ChangeBatch(
            revision=until,
            read_at=self.revision,
            heartbeat_sequence=0,
            changes=[
                (*step_of(one), *self._row(one.item_id, one.revision == last[one.item_id]))
                for one in changes
            ],
            changed_at=changes[-1].changed_at if changes else None,
            is_complete=is_complete,
            nodes={},
            heartbeats=[],
            task_counts=counts,
        )

    def _row(self, id: str, is_last: bool) -> tuple[Any, ...]:
        return (id, self.rows[id]) if is_last and id in self.rows else (None, None)

    def tell(self, cache: Cache, page: int = 100) -> None:
        """Bring a cache up to date."""
        batch: ChangeBatch | None = None
        while batch is None or batch.revision < batch.read_at:
            batch = self.batch(cache.applied.contiguous, page, is_complete=cache.applied.is_counted)
            cache.catch_up(batch)

    def counts(self) -> Counter[str]:
        return Counter(str(row.status.value) for row in self.rows.values())

    def live(self) -> dict[str, Task]:
        return {id: row.copy() for id, row in self.rows.items() if row.status not in FINISHED}


def counted(cache: Cache) -> dict[str, int]:
    return {status: number for status, number in cache.applied.task_counts.items() if number}


class TestSortedKeys:
    class Short(SortedKeys[tuple[int]]):
        """One that splits its lists early."""

        __slots__ = ()
        _LONGEST = 4

    @given(st.lists(st.tuples(st.integers(-20, 20), st.booleans()), max_size=200))
    def test_equal_a_sorted_list(self, commands: list[tuple[int, bool]]) -> None:
        keys, expected = self.Short(), set[tuple[int]]()

        for number, is_added in commands:
            key = (number,)
            if is_added and key not in expected:
                keys.add(key)
                expected.add(key)
            elif not is_added and key in expected:
                keys.remove(key)
                expected.remove(key)

            assert list(keys) == sorted(expected)
            assert keys.first(3) == sorted(expected)[:3]
        assert keys.first(None) == sorted(expected)

    @given(st.sets(st.integers(0, 40)), st.lists(st.sets(st.integers(0, 40)), max_size=4))
    def test_many_are_added_at_once(self, first: set[int], more: list[set[int]]) -> None:
        keys, expected = self.Short(), set(first)
        for number in first:
            keys.add((number,))

        for numbers in more:
            keys.extend([(number,) for number in sorted(numbers - expected)])
            expected |= numbers
            assert [number for (number,) in keys] == sorted(expected)
            assert all(0 < len(chunk) <= self.Short._LONGEST for chunk in keys._chunks)

        for number in expected:
            keys.remove((number,))
        assert list(keys) == []

    @pytest.mark.parametrize("step", [1, -1])
    def test_many_keys_stay_sorted(self, step: int) -> None:
        keys: SortedKeys[tuple[int]] = SortedKeys()
        numbers = range(5_000)[::step]

        for number in numbers:
            keys.add((number,))
        for number in numbers[::2]:
            keys.remove((number,))

        assert [number for (number,) in keys] == sorted(numbers[1::2])


class TestRecords:
    @given(
        st.lists(
            st.tuples(st.sampled_from(["put", "put", "drop", "snapshot"]), st.integers(0, 3_000)),
            max_size=80,
        )
    )
    def test_photographs_keep_what_was_there(self, commands: list[tuple[str, int]]) -> None:
        records: Records[Task] = Records(decode_row)
        expected: dict[str, Task] = {}
        snapshots = []

        for version, (command, number) in enumerate(commands):
            id = f"task-{number % 7}"
            if command == "snapshot":
                snapshots.append((records.snapshot(), expected.copy()))
            elif command == "put":
                record = task_record(id, version)
                records.put(id, record)
                expected[id] = record.copy()
            elif id in expected:
                records.drop(id)
                del expected[id]

            assert len(records) == len(expected)
        assert {record.task_id: record.copy() for record in records.values()} == expected
        assert set(records) == set(expected)
        for snapshot, then in snapshots:
            assert snapshot == then
            assert len(snapshot) == len(then)
            assert set(snapshot) == set(then)

    def test_entries_of_a_photograph_are_copies(self) -> None:
        records: Records[Task] = Records(decode_row)
        records.put("a", encode(Task("a", "batch", "n", result=[1])))  # type: ignore[arg-type]  # a value will do
        snapshot = records.snapshot()

        snapshot["a"].result.append(2)

        assert snapshot["a"].result == [1]


class TestStart:
    def test_task_is_decoded_when_somebody_asks_for_it_and_no_sooner(self) -> None:
        decoded: list[str] = []

        def decode_row(row: tuple[Any, ...]) -> Record[Task]:
            decoded.append(row[0])
            return task_record(row[0], 1)

        def entry_of(row: tuple[Any, ...]) -> IndexEntry:
            return IndexEntry(row[0], 1, TaskStatus.SCHEDULED, None, (row[1], START, row[0]))

        decode = {Task: decode_row, NodeInfo: decode_row}
        cache = Cache(InitialState(0, 0, None, {}, decode, entry_of, encode_row), 0)

        cache.load(Task, [("b", 0), ("a", 2)])

        snapshot = cache.state().tasks
        assert (len(snapshot), "a" in snapshot, decoded) == (2, True, [])
        assert [record.task_id for record in pending(cache, None)] == ["b", "a"]
        assert snapshot["a"].version == 1
        assert cache.task("a") is cache.task("a")
        assert decoded == ["b", "a"]

    def test_changes_of_another_process_are_decoded_when_they_are_read(self) -> None:
        decoded: list[str] = []

        def decode(row: tuple[Any, ...]) -> Record[Any]:
            decoded.append(row[0])
            return decode_row(row)

        database = FakeDatabase()
        cache = Cache(replace(NOTHING, decode={Task: decode, NodeInfo: decode}), 10)

        for status in (TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.COMPLETED):
            database.write("a", status)
            database.write("b", TaskStatus.SCHEDULED)
            database.tell(cache)

        assert (counted(cache), decoded) == ({"completed": 1, "scheduled": 1}, [])
        assert cache.task("a") is cache.task("a") is database.rows["a"]
        assert [record.task_id for record in pending(cache, None)] == ["b"]
        assert decoded == ["a", "b"]


COMMANDS = st.one_of(
    st.tuples(
        st.just("write"),
        st.booleans(),
        st.sampled_from("abc"),
        st.sampled_from([*TaskStatus, TaskStatus.PENDING, None]),
    ),
    st.tuples(st.just("purge"), st.booleans(), st.sampled_from("abc")),
    st.tuples(st.just("deliver"), st.integers(1, 4)),
    st.tuples(st.just("refresh"), st.integers(1, 4)),
    st.tuples(st.just("snapshot")),
)


class TestLearning:
    @settings(max_examples=in_profile(300))
    @given(st.lists(COMMANDS, max_size=40), st.integers(0, 2))
    def test_whatever_crosses_it_ends_equal_and_never_goes_back(
        self, commands: list[tuple[Any, ...]], finished_limit: int
    ) -> None:
        """Own commits arrive late, in order; the feed is read in pages, some entries purged."""
        database, cache = FakeDatabase(), Cache(NOTHING, finished_limit)
        on_its_way: deque[Event] = deque()
        newest: Counter[str] = Counter()
        pictures = []

        for command, *arguments in [*commands, ("deliver", 100), ("refresh", 2)]:
            version = cache.applied.version
            if command == "write" or command == "purge":
                own, id, *status = arguments
                if id not in database.rows and status in ([], [None]):
                    continue
                event = database.write(
                    id, status[0] if status else None, with_history=command == "purge"
                )
                if own:
                    on_its_way.append(event)
            elif command == "deliver":
                batch = [on_its_way.popleft() for _ in range(arguments[0]) if on_its_way]
                cache.apply(batch)
            elif command == "refresh":
                database.tell(cache, page=arguments[0])
            else:
                pictures.append((picture := cache.state(), dict(picture.tasks)))

            assert cache.applied.version >= version
            for id in "abc":
                record = cache.task(id)
                if record is not None:
                    assert record.version >= newest[id]
                    newest[id] = record.version

        assert cache.state().tasks == database.live()
        assert counted(cache) == database.counts()
        assert cache.applied.version == cache.applied.contiguous == database.revision
        assert [record.task_id for record in pending(cache, None)] == sorted(
            id for id, row in database.rows.items() if row.status in ("pending", "scheduled")
        )
        for id in "abc":
            assert cache.task(id) in (database.rows.get(id), None) or (
                cache.task(id).version == database.rows[id].version  # type: ignore[union-attr]
            )
        for picture, tasks in pictures:
            assert picture.tasks == tasks

    def test_commit_that_the_feed_told_already_is_counted_once(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        event = database.write("a", TaskStatus.PENDING)

        database.tell(cache)
        cache.apply([event])
        database.tell(cache)

        assert counted(cache) == {"pending": 1}
        assert cache.applied.version == 1

    def test_commit_ahead_of_a_gap_is_shown_but_the_gap_is_read_later(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.write("theirs", TaskStatus.PENDING)
        own = database.write("ours", TaskStatus.RUNNING)

        cache.apply([own])

        assert set(cache.state().tasks) == {"ours"}
        assert (cache.applied.version, cache.applied.contiguous) == (2, 0)
        database.tell(cache)
        assert set(cache.state().tasks) == {"ours", "theirs"}
        assert (cache.applied.version, cache.applied.contiguous) == (2, 2)
        assert counted(cache) == {"pending": 1, "running": 1}

    def test_news_older_than_a_removal_do_not_bring_a_task_back(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        created = database.write("a", TaskStatus.PENDING)
        before = database.batch(0, 100)
        removed = database.write("a", None)

        cache.apply([created, removed])
        cache.catch_up(before)

        assert cache.task("a") is None
        assert counted(cache) == {}
        assert cache.applied.version == 2

    def test_news_from_before_an_own_removal_behind_a_gap_do_not_either(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.write("a", TaskStatus.PENDING)
        database.write("a", TaskStatus.RUNNING)
        before = database.batch(0, 100)
        removed = database.write("a", None)

        cache.apply([removed])
        cache.catch_up(before)

        assert cache.task("a") is None
        assert set(cache.state().tasks) == set()
        assert counted(cache) == {}

    def test_row_that_somebody_inserted_by_hand_is_counted_in_the_end(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.rows["a"] = task_record("a", 0, TaskStatus.RUNNING)  # of which nobody was told
        database.write("a", TaskStatus.COMPLETED)

        database.write("b", TaskStatus.RUNNING)

        for _ in range(2):
            database.tell(cache)

        assert counted(cache) == {"completed": 1, "running": 1}

    def test_late_heartbeat_does_not_bring_a_removed_node_back(self) -> None:
        cache = Cache(NOTHING, 10)
        node = node_record("n", 1)
        cache.apply([Event(NodeInfo, "n", node, change(1, "n", None, "online", item="node"))])
        cache.catch_up(node_news(2, [change(2, "n", "online", None, item="node")]))

        cache.apply([HeartbeatWritten(Heartbeat("n", START, {}), 1)])

        assert cache.node_index.all_nodes() == []
        assert cache.node_stats()["total"] == 0

    def test_row_from_before_a_heartbeat_does_not_take_it_back(self) -> None:
        """Though another process has changed it: the heartbeat was written behind that."""
        cache = Cache(NOTHING, 10)
        node = node_record("n", 1, last_heartbeat=START)
        cache.apply([Event(NodeInfo, "n", node, change(1, "n", None, "online", item="node"))])
        heartbeats = [
            Heartbeat("n", START + timedelta(seconds=1), {"cpu_usage": 1.0, "disk_usage": 1.0}),
            Heartbeat("n", START + timedelta(seconds=2), {"cpu_usage": 2.0}),
        ]
        renamed = change(2, "n", "online", "online", item="node")
        row = node_record("n", 2, last_heartbeat=START, hostname="renamed")

        cache.apply([HeartbeatWritten(heartbeats[0], 1), HeartbeatWritten(heartbeats[1], 2)])
        cache.catch_up(node_news(2, [renamed], row))

        assert copies(cache.node_index.all_nodes()) == copies(
            [heartbeats[1].after(heartbeats[0]).over(row)]
        )

    def test_row_from_after_a_heartbeat_is_taken_as_it_is(self) -> None:
        """It is of another node with the same name, which had none yet."""
        cache = Cache(NOTHING, 10)
        node = node_record("n", 1)
        cache.apply([Event(NodeInfo, "n", node, change(1, "n", None, "online", item="node"))])
        changes = [
            change(2, "n", "online", None, item="node"),
            change(3, "n", None, "online", item="node"),
        ]
        successor = node_record("n", 3)

        cache.apply([HeartbeatWritten(Heartbeat("n", START, {"cpu_usage": 1.0}), 1)])
        cache.catch_up(node_news(3, changes, successor, heartbeat_sequence=1))

        assert cache.node_index.all_nodes() == [successor]

    def test_heartbeat_that_was_read_already_is_passed_over(self) -> None:
        """Another process has changed the usage since, and that was read with it."""
        cache = Cache(NOTHING, 10)
        node = node_record("n", 1)
        cache.apply([Event(NodeInfo, "n", node, change(1, "n", None, "online", item="node"))])
        updated = change(2, "n", "online", "online", item="node")
        row = node_record("n", 2, last_heartbeat=START, cpu_usage=7)

        read = [(2, Heartbeat("n", START, {"cpu_usage": 7}))]
        cache.catch_up(node_news(2, [updated], row, heartbeat_sequence=1, heartbeats=read))
        cache.apply([HeartbeatWritten(Heartbeat("n", START, {"cpu_usage": 1.0}), 1)])

        assert copies(cache.node_index.all_nodes()) == copies([row])

    def test_purged_history_is_recounted(self) -> None:
        database = FakeDatabase()
        cache = Cache(NOTHING, 10)
        database.write("a", TaskStatus.PENDING)
        database.write("a", TaskStatus.FAILED)
        database.write("a", None, with_history=True)
        database.write("b", TaskStatus.RUNNING)

        database.tell(cache)

        assert counted(cache) == {"running": 1}
        assert (cache.applied.version, cache.applied.contiguous) == (4, 4)

    def test_purged_history_is_recounted_with_what_came_after_the_reading(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.write("a", TaskStatus.FAILED)
        database.write("a", None, with_history=True)
        batch = database.batch(0, 100)
        own = database.write("b", TaskStatus.PENDING)

        cache.apply([own])
        cache.catch_up(batch)
        database.tell(cache)

        assert counted(cache) == {"pending": 1}
        assert cache.applied.contiguous == 3

    def test_purged_history_is_recounted_though_an_own_commit_closes_the_gap(self) -> None:
        """The first page ends right before a commit that is here already."""
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.write("a", TaskStatus.PENDING)
        database.write("b", TaskStatus.PENDING)
        database.write("a", None, with_history=True)
        own = database.write("a", TaskStatus.PENDING)

        cache.apply([own])
        database.tell(cache, page=2)
        database.tell(cache, page=2)

        assert counted(cache) == {"pending": 2}

    def test_time_is_that_of_the_newest_change(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        first = database.write("a", TaskStatus.PENDING)
        second = database.write("b", TaskStatus.PENDING)

        cache.apply([second])
        cache.apply([first])

        assert second.change is not None
        assert cache.state().updated_at == second.change.changed_at

    def test_news_do_not_bring_an_older_moment_back(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        database.write("a", TaskStatus.PENDING)
        batch = database.batch(0, 100)
        own = database.write("b", TaskStatus.PENDING)

        cache.apply([own])
        cache.catch_up(batch)

        assert cache.state().updated_at == own.change.changed_at

    def test_finished_tasks_used_last_are_kept(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, finished_limit=2)
        for id in "ab":
            cache.apply([database.write(id, TaskStatus.COMPLETED)])

        assert cache.task("a") is not None
        cache.apply([database.write("c", TaskStatus.COMPLETED)])

        assert cache.task("a") is not None
        assert cache.task("b") is None
        assert cache.task("c") is not None

    def test_only_finished_tasks_are_remembered(self) -> None:
        cache = Cache(NOTHING, 10)

        cache.remember(task_record("live", 1, TaskStatus.RUNNING))
        cache.remember(task_record("done", 2, TaskStatus.FAILED))

        assert cache.task("live") is None
        assert cache.task("done") is not None
        assert cache.state().tasks == {}


NODES = st.fixed_dictionaries(
    {
        "node_id": st.sampled_from("abcd"),
        "status": st.sampled_from([NodeStatus.ONLINE, *NodeStatus]),
        "running_tasks": st.integers(0, 2),
        "max_concurrent_tasks": st.integers(0, 2),
        "available_skills": st.lists(st.sampled_from(["java", "python"]), max_size=2),
        "registered_at": st.integers(0, 2).map(lambda second: START + timedelta(seconds=second)),
    }
)


class TestNodes:
    @settings(max_examples=in_profile(200))
    @given(
        st.lists(
            st.tuples(st.sampled_from(["commit", "hold", "beat", "remove", "discard"]), NODES),
            max_size=30,
        )
    )
    def test_every_index_equals_a_look_at_all(
        self, commands: list[tuple[str, dict[str, Any]]]
    ) -> None:
        cache = Cache(NOTHING, 10)
        stored: dict[str, Record[NodeInfo]] = {}
        held: dict[str, Record[NodeInfo]] = {}

        def tell(id: str, revision: int, after: str | None) -> None:
            entry = change(revision, id, "online", after, item="node")
            cache.apply([Event(NodeInfo, id, stored.get(id), entry)])

        for revision, (command, fields) in enumerate(commands, start=1):
            id = fields["node_id"]
            seen = held.get(id, stored.get(id))  # whose heartbeat is never taken back
            last_heartbeat = None if seen is None else seen.last_heartbeat
            record = encode(NodeInfo(hostname="host", last_heartbeat=last_heartbeat, **fields))
            record = record.evolve(version=revision)
            if command == "commit":
                stored[id] = record
                tell(id, revision, "online")
            elif command == "beat" and id in stored:
                beat = Heartbeat(id, START, {"running_tasks": fields["running_tasks"]})
                stored[id] = beat.over(stored[id])
                cache.apply([HeartbeatWritten(beat, revision)])
            elif command == "remove" and stored.pop(id, None) is not None:
                tell(id, revision, None)
            elif command == "hold":
                held[id] = record.evolve(version=-revision)
                cache.stage(held[id], stored.get(id))
            elif command == "discard":
                assert cache.discard((NodeInfo, id)) == (held.pop(id, None) is not None)

            assert_indexes_hold(cache, {**stored, **held}, set(stored))


def assert_indexes_hold(cache: Cache, shown: dict[str, Record[NodeInfo]], stored: set[str]) -> None:
    nodes = [record.copy() for record in shown.values()]
    nodes.sort(key=lambda node: node.node_id)
    nodes.sort(key=lambda node: node.registered_at or START, reverse=True)
    online = [node for node in nodes if node.status is NodeStatus.ONLINE]
    free = [node for node in online if node.running_tasks < node.max_concurrent_tasks]
    free.sort(key=lambda n: (n.running_tasks / n.max_concurrent_tasks, n.running_tasks, n.node_id))
    counts = Counter(node.status for node in nodes if node.node_id in stored)
    full = [node for node in online if node not in free and node.node_id in stored]
    state = cache.state()

    assert copies(cache.node_index.all_nodes()) == nodes
    assert copies(cache.node_index.online_nodes()) == online
    assert copies(cache.node_index.available_nodes()) == free
    for skill in ("java", "python", "unknown"):
        able = [node for node in online if skill in node.available_skills]
        assert copies(cache.node_index.nodes_by_skill(skill)) == able
    assert cache.node_stats() == {
        "total": counts.total(),
        "online": counts[NodeStatus.ONLINE],
        "offline": counts[NodeStatus.OFFLINE],
        "busy": counts[NodeStatus.BUSY] + len(full),
    }
    assert state.nodes == {node.node_id: node for node in nodes}
    assert (state.total_nodes, state.online_nodes) == (
        counts.total(),
        counts[NodeStatus.ONLINE],
    )


def copies(records: Iterable[Record[NodeInfo]]) -> Sequence[NodeInfo]:
    return [record.copy() for record in records]


class TestPending:
    @given(
        st.lists(
            st.tuples(
                st.sampled_from("abcdef"),
                st.sampled_from([*TaskStatus, TaskStatus.PENDING, None]),
                st.sampled_from(list(TaskPriority)),
                st.integers(0, 2),
            ),
            max_size=40,
        )
    )
    def test_are_sorted_whatever_changed(self, writes: list[tuple[Any, ...]]) -> None:
        cache, expected = Cache(NOTHING, 2), dict[str, Record[Task]]()

        for revision, (id, status, priority, second) in enumerate(writes, start=1):
            before = expected.get(id)
            record = None
            if status is not None:
                submitted_at = START + timedelta(seconds=second)
                record = task_record(id, revision, status)
                record = record.evolve(priority=priority, submitted_at=submitted_at)
                expected[id] = record
            elif before is not None:
                del expected[id]
            old = None if before is None else str(before.status.value)
            new = None if record is None else str(record.status.value)
            cache.apply([Event(Task, id, record, change(revision, id, old, new))])

        waiting = [r for r in expected.values() if r.status in ("pending", "scheduled")]
        waiting.sort(key=lambda r: (r.priority, r.submitted_at, r.task_id))
        assert [r.copy() for r in pending(cache, None)] == [r.copy() for r in waiting]
        assert [r.copy() for r in pending(cache, 2)] == [r.copy() for r in waiting[:2]]

    def test_keys_hold_nothing_that_the_garbage_collector_goes_through(self) -> None:
        """One member of an enumeration in it, and each pass has a tuple for every task."""
        cache = Cache(NOTHING, 10)

        cache.apply([Event(Task, "a", task_record("a", 1), change(1, "a", None, "pending"))])

        [key] = cache.task_index.pending
        assert [type(part) for part in key] == [int, datetime, str]


class TestUnsaved:
    def test_shows_what_is_held_and_what_is_stored_when_that_is_dropped(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        cache.apply([database.write("a", TaskStatus.PENDING)])
        held = task_record("a", -1, TaskStatus.COMPLETED)
        cache.stage(held, database.rows["a"])
        entry = cache.unsaved[Task, "a"]

        assert cache.task("a") is held
        assert pending(cache, None) == []
        cache.unstage((Task, "a"), entry, None)

        assert cache.task("a") is database.rows["a"]
        assert pending(cache, None) == [database.rows["a"]]

    def test_hides_a_commit_until_it_is_dropped(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        cache.apply([database.write("a", TaskStatus.PENDING)])
        cache.stage(task_record("a", -1), database.rows["a"])

        cache.apply([database.write("a", TaskStatus.RUNNING)])

        assert counted(cache) == {"running": 1}
        [shown] = pending(cache, None)
        assert shown.version == -1
        assert cache.discard((Task, "a")) is True
        assert cache.task("a") is database.rows["a"]
        assert cache.discard((Task, "a")) is False

    def test_version_of_a_written_entry_is_translated_until_the_next_change(self) -> None:
        database, cache = FakeDatabase(), Cache(NOTHING, 10)
        place = (Task, "a")
        cache.stage(task_record("a", -1), None)
        entry = cache.unsaved[place]
        cache.apply([database.write("a", TaskStatus.PENDING)])
        cache.unstage(place, entry, database.rows["a"])

        assert cache.flushed_version(place, -1) == 1
        assert cache.flushed_version(place, -2) == -2
        cache.apply([database.write("a", TaskStatus.RUNNING)])
        assert cache.flushed_version(place, -1) == -1

    @pytest.mark.parametrize("kind", ["task", "node"])
    def test_is_taken_over_by_the_next_cache(self, kind: str) -> None:
        old, new = Cache(NOTHING, 10), Cache(NOTHING, 10)
        held: Record[Any] = task_record("a", -1) if kind == "task" else node_record("a", -1)
        old.stage(held, None)

        new.keep_unsaved(old)

        shown = new.task("a") if kind == "task" else new.nodes.get("a")
        assert shown is held
        assert new.node_stats()["total"] == 0

    @pytest.mark.parametrize("kind", ["task", "node"])
    def test_update_of_what_is_gone_leaves_nothing_in_the_next_cache(self, kind: str) -> None:
        """It was removed by another process; the reload is how this one learns of it."""
        old, new = Cache(NOTHING, 10), Cache(replace(NOTHING, revision=2), 10)
        stored: Record[Any] = task_record("a", 1) if kind == "task" else node_record("a", 1)
        held = stored.evolve(version=-1)
        place = (stored.kind, "a")
        old.load(stored.kind, [("a", stored)])
        old.stage(held, stored)

        new.keep_unsaved(old)

        assert new.node_stats()["total"] == 0
        new.discard(place)
        assert new.find(place) is None
        assert pending(new, None) == []
        assert new.node_index.all_nodes() == []
